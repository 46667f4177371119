"""Training and evaluation batches on the device, of datasets in memory and of class folders.

A small dataset lives on the device as one uint8 tensor: no workers, no copies. For class folders,
DataLoader workers read, decode, crop, and resize whole batches to uint8. These are pinned, copied on a
side stream, and augmented on the device. A batch is a function of (seed, epoch, step) alone, whatever the
number of workers. Each rank prepares only its own part of a global batch.
"""

from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import torch
from torch import Tensor

from resnext.config import AugmentConfig, Config, DataConfig
from resnext.errors import UserError

from .augment import (
    cifar_crop,
    erase,
    jitter,
    mirror,
    mix,
    normalize,
    on_device,
    sample_cifar_crops,
    sample_color_params,
    sample_flips,
)
from .decode import check_decoder
from .image_folder import ImageFolderDataset
from .in_memory import ArrayDataset
from .rng import RngStream, random_uint64, random_uniform
from .sampler import EpochSampler, LocalIndices, StepIndices
from .transforms import CROP_DRAWS, apply_policy, eval_images, train_image
from .workers import WorkerBatch, collate_images, make_loader, prefetch_to_device

MAX_SKIPPED = 100  # broken files in a row

ImageSet = ArrayDataset | ImageFolderDataset


def make_train_loader(
    image_set: ImageSet,
    config: Config,
    device: torch.device,
    warn: Callable[[str], None] = print,
    share: LocalIndices = np.arange,
) -> "InMemoryTrainLoader | FileTrainLoader":
    """Return the training batches of a dataset; `warn` gets a line for each broken file that is skipped."""
    if isinstance(image_set, ImageFolderDataset):
        return FileTrainLoader(image_set, config, device, warn, share)
    return InMemoryTrainLoader(image_set, config, device, share)


def make_eval_loader(
    image_set: ImageSet,
    data: DataConfig,
    batch_size: int,
    device: torch.device,
    ten_crop: bool = False,
    rank: int = 0,
    ranks: int = 1,
) -> "InMemoryEvalLoader | FileEvalLoader":
    """Return batches of every image once, in order; with `ten_crop`, the ten crops of an image are adjacent.

    Each rank gets the images rank, rank + ranks, … and the same number of batches; its last may be empty.
    """
    own = np.arange(rank, len(image_set), ranks)
    steps = -(-len(image_set) // (ranks * batch_size))
    parts = [own[step * batch_size : (step + 1) * batch_size] for step in range(steps)]
    if isinstance(image_set, ImageFolderDataset):
        return FileEvalLoader(image_set, data, parts, device, ten_crop)
    if ten_crop:
        raise UserError("--ten-crop: images in memory have the size of a crop; remove the option")
    return InMemoryEvalLoader(image_set, data, parts, device)


def pixel_statistics(data: DataConfig, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the mean and standard deviation of pixel values 0...255, float32 (3,) on the device."""
    mean, std = (torch.tensor(v, dtype=torch.float32, device=device) for v in (data.mean, data.std))
    return mean, std


# ---------------------------------------------------------------------------- training


class TrainLoader:
    """Base of the training loaders: the order of the images, random erasing, and mixing."""

    def __init__(self, image_set: ImageSet, config: Config, device: torch.device, share: LocalIndices):
        self.device, self.augment, self.seed = device, config.augment, config.run.seed
        self.statistics = pixel_statistics(config.data, device)
        self.images, self.classes = len(image_set), len(image_set.classes)
        self.steps = -(-self.images // config.train.batch_size)
        self.sampler = EpochSampler(self.images, config, share)

    def erase_and_mix(self, images: Tensor, labels: Tensor, part: StepIndices) -> tuple[Tensor, Tensor]:
        """Return normalized images and their labels after random erasing and mixup or CutMix."""
        augment = self.augment
        if augment.erasing:
            erase(images, self.seed, part.epoch, part.ids, augment.erasing)
        if len(images) and (augment.mixup or augment.cutmix):
            images, labels = mix(images, labels, augment, self.classes, self.seed, part.epoch, part.step)
        if part.kept is not None:
            kept = on_device(part.kept, images.device)
            images, labels = images[kept], labels[kept]
        return images, labels


class InMemoryTrainLoader(TrainLoader):
    """Training batches of a dataset in memory, with CIFAR's augmentation; the last batch may be smaller."""

    def __init__(self, image_set: ArrayDataset, config: Config, device: torch.device, share: LocalIndices):
        super().__init__(image_set, config, device, share)
        self.pixels = torch.from_numpy(image_set.images).to(device)
        self.labels = torch.from_numpy(image_set.labels).to(device)

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the steps from `first_step` on: float32 (N, 3, S, S), labels (N,) or (N, classes)."""
        self.sampler.set_epoch(epoch, first_step)
        parts = list(self.sampler)
        if not parts:
            return
        ids = np.concatenate([part.ids for part in parts])
        draws = sample_cifar_crops(self.seed, epoch, ids, self.augment.mirror, self.augment.padding)
        # One copy per epoch, so that no step waits for the host.
        arrays = [on_device(np.ascontiguousarray(array), self.device) for array in (ids, *draws)]
        sizes = [len(part.ids) for part in parts]
        for part, *step in zip(parts, *(array.split(sizes) for array in arrays), strict=True):
            picked, mirrored, x, y = step
            pixels = self.pixels[picked]
            images = cifar_crop(pixels, mirrored, x, y, self.augment.padding, *self.statistics)
            yield self.erase_and_mix(images, self.labels[picked], part)


class FileTrainLoader(TrainLoader):
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
                self.warn(f"warning: {len(self.skipped)} broken files skipped so far: {line}")


# ---------------------------------------------------------------------------- evaluation


class InMemoryEvalLoader:
    """Evaluation batches of a dataset in memory: the images of each part, normalized."""

    crops = 1

    def __init__(
        self, image_set: ArrayDataset, data: DataConfig, parts: list[np.ndarray], device: torch.device
    ):
        own = np.concatenate(parts) if parts else np.empty(0, np.int64)
        self.pixels = torch.from_numpy(image_set.images[own]).to(device)
        self.labels = torch.from_numpy(image_set.labels[own]).to(device)
        self.statistics = pixel_statistics(data, device)
        self.sizes, self.images, self.steps = [len(part) for part in parts], len(image_set), len(parts)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for pixels, labels in zip(self.pixels.split(self.sizes), self.labels.split(self.sizes), strict=True):
            yield normalize(pixels, *self.statistics), labels


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
