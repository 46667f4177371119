"""Training and evaluation batches of datasets in memory, and the base of all training loaders.

A small dataset lives on the device as one uint8 tensor: no workers, no copies.
"""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from resnext.config import Config, DataConfig

from .augment import cifar_crop, erase, mix, normalize, on_device, sample_cifar_crops
from .datasets import ImageDataset
from .in_memory import ArrayDataset
from .sampler import EpochSampler, LocalIndices, StepIndices


def pixel_statistics(data: DataConfig, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the mean and standard deviation of pixel values 0...255, float32 (3,) on the device."""
    mean, std = (torch.tensor(v, dtype=torch.float32, device=device) for v in (data.mean, data.std))
    return mean, std


# ---------------------------------------------------------------------------- training


class BaseTrainLoader:
    """Base of the training loaders: the order of the images, random erasing, and mixing."""

    def __init__(self, image_set: ImageDataset, config: Config, device: torch.device, share: LocalIndices):
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


class InMemoryTrainLoader(BaseTrainLoader):
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
