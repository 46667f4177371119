"""Order and batches. Small sets live on the device as one uint8 tensor: no workers, no copies."""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from resnext.config import Augment, Data

from .augment import cifar_crop, cifar_draws, normalise
from .draws import epoch_order
from .images import ImageSet


class ResidentImages:
    """An ImageSet on the device, with its normalisation."""

    def __init__(self, image_set: ImageSet, data: Data, device: torch.device):
        self.images = torch.from_numpy(image_set.images).to(device)
        self.labels = torch.from_numpy(image_set.labels).to(device)
        self.mean = torch.tensor(data.mean, dtype=torch.float32, device=device)
        self.std = torch.tensor(data.std, dtype=torch.float32, device=device)
        self.device = device


class TrainBatches:
    """Training batches: a fresh permutation each epoch, CIFAR augmentation, the last one smaller.

    What step k of an epoch sees is a function of (seed, epoch, k) alone.
    """

    def __init__(self, resident: ResidentImages, batch_size: int, augment: Augment, seed: int):
        self.resident, self.batch_size = resident, batch_size
        self.augment, self.seed = augment, seed
        self.images = len(resident.labels)
        self.steps = -(-self.images // batch_size)

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """(float32 (N, 3, S, S), int64 (N,)) of the steps from `first_step`, on the device."""
        resident, padding = self.resident, self.augment.padding
        order = epoch_order(self.seed, epoch, self.images)
        draws = cifar_draws(self.seed, epoch, order, self.augment.mirror, padding)
        # One copy an epoch: the steps then touch the host for nothing.
        order, mirrored, x, y = (
            torch.from_numpy(np.ascontiguousarray(a)).to(resident.device) for a in (order, *draws)
        )
        for step in range(first_step, self.steps):
            part = slice(step * self.batch_size, (step + 1) * self.batch_size)
            picked = order[part]
            images = cifar_crop(
                resident.images[picked],
                mirrored[part],
                x[part],
                y[part],
                padding,
                resident.mean,
                resident.std,
            )
            yield images, resident.labels[picked]


class EvalBatches:
    """Every image once, in the set's order, normalised only."""

    def __init__(self, resident: ResidentImages, batch_size: int):
        self.resident, self.batch_size = resident, batch_size
        self.images = len(resident.labels)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        resident = self.resident
        for start in range(0, self.images, self.batch_size):
            part = slice(start, start + self.batch_size)
            yield (
                normalise(resident.images[part], resident.mean, resident.std),
                resident.labels[part],
            )
