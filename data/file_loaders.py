"""Training and evaluation batches of class folders.

DataLoader workers read, decode, crop, and resize whole batches to uint8. These are pinned, copied on a side
stream, and augmented on the device. A batch is the same for any number of workers.
"""

from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import torch
from torch import Tensor

from resnext.config import AugmentConfig, Config, DataConfig
from resnext.errors import UserError

from .augment import jitter, mirror, normalize, sample_color_params, sample_flips
from .decode import check_decoder
from .image_folder import ImageFolderDataset
from .memory_loaders import BaseTrainLoader, pixel_statistics
from .rng import RngStream, random_uint64, random_uniform
from .sampler import LocalIndices, StepIndices
from .transforms import CROP_DRAWS, apply_policy, eval_images, train_image
from .workers import WorkerBatch, collate_images, make_loader, prefetch_to_device

MAX_SKIPPED = 100  # broken files in a row


class FileTrainLoader(BaseTrainLoader):
    """Training batches of class folders, with the original's ImageNet augmentation and its additions."""

    def __init__(
        self,
        files: ImageFolderDataset,
        config: Config,
        device: torch.device,
        warn: Callable[[str], None],
        share: LocalIndices = np.arange,
    ):
        super().__init__(files, config, device, share)
        data = config.data
        check_decoder(data.decoder)
        self.warn = warn
        self.skipped: set[str] = set()
        load = partial(load_train, files, data, config.augment, self.seed)
        images = len(share(config.train.batch_size))
        self.loader = make_loader(load, self.sampler, data, images, data.train_size, device, True)

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield what InMemoryTrainLoader.epoch yields."""
        self.sampler.set_epoch(epoch, first_step)
        batches = prefetch_to_device(self.loader, self.device)
        for part, batch in zip(list(self.sampler), batches, strict=True):
            self.report(batch.skipped)
            mirror(batch.images, batch.mirrored)
            if self.augment.jitter or self.augment.lighting:
                images = jitter(batch.images, batch.colors, *self.statistics)
            else:
                images = normalize(batch.images, *self.statistics)
            yield self.erase_and_mix(images, batch.labels, part)

    def report(self, skipped: tuple[str, ...]) -> None:
        """Log each broken file once; every epoch skips it again."""
        for line in skipped:
            if line not in self.skipped:
                self.skipped.add(line)
                self.warn(f"warning: broken files skipped so far: {len(self.skipped)}, the latest: {line}")


class FileEvalLoader:
    """Evaluation batches of class folders: the images of each part, cropped and normalized."""

    def __init__(
        self,
        files: ImageFolderDataset,
        data: DataConfig,
        parts: list[np.ndarray],
        device: torch.device,
        ten_crop: bool,
    ):
        check_decoder(data.decoder)
        self.device, self.images, self.steps = device, len(files), len(parts)
        self.crops = 10 if ten_crop else 1
        self.statistics = pixel_statistics(data, device)
        load = partial(load_eval, files, data, ten_crop)
        images = max(map(len, parts), default=0) * self.crops
        self.loader = make_loader(load, parts, data, images, data.image_size, device, False)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for batch in prefetch_to_device(self.loader, self.device):
            yield normalize(batch.images, *self.statistics), batch.labels


# ---------------------------------------------------------------------------- in a worker


def load_train(
    files: ImageFolderDataset, data: DataConfig, augment: AugmentConfig, seed: int, part: StepIndices
) -> WorkerBatch:
    """Return a training batch."""
    epoch, ids = part.epoch, part.ids
    draws = random_uniform(seed, epoch, ids, CROP_DRAWS, RngStream.CROP).tolist()
    seeds = random_uint64(seed, epoch, ids, 1, RngStream.POLICY)[:, 0].tolist()
    indices = (ids % len(files)).tolist()
    found = [load_crop(files, data, augment, *one) for one in zip(indices, draws, seeds, strict=True)]
    return WorkerBatch(
        collate_images([crop for crop, _, _ in found], data.train_size),
        files.labels[[index for _, index, _ in found]],
        sample_flips(seed, epoch, ids, augment),
        sample_color_params(seed, epoch, ids, augment),
        tuple(error for _, _, errors in found for error in errors),
    )


def load_crop(
    files: ImageFolderDataset,
    data: DataConfig,
    augment: AugmentConfig,
    index: int,
    draws: list[float],
    policy_seed: int,
) -> tuple[np.ndarray, int, list[str]]:
    """Return (training crop, number of the file, errors of the files skipped before it).

    With data.skip_broken, the next file of the list stands in for a broken one.
    """
    errors: list[str] = []
    while len(errors) < MAX_SKIPPED:
        try:
            crop = train_image(files.read(index), files.path(index), draws, data, augment.min_area)
        except UserError as error:
            if not data.skip_broken:
                raise
            errors.append(str(error))
            index = (index + 1) % len(files)
            continue
        if augment.policy:
            crop = apply_policy(crop, augment.policy, policy_seed)
        return crop, index, errors
    raise UserError(
        f"data.skip_broken: {MAX_SKIPPED} files in a row cannot be decoded, the last: {errors[-1]}"
    )


def load_eval(files: ImageFolderDataset, data: DataConfig, ten_crop: bool, part: np.ndarray) -> WorkerBatch:
    """Return an evaluation batch; the ten crops of an image are adjacent."""
    crops: list[np.ndarray] = []
    for index in part.tolist():
        crops += eval_images(files.read(index), files.path(index), data, ten_crop)
    return WorkerBatch(collate_images(crops, data.image_size), files.labels[part])
