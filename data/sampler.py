"""The order of an epoch, and the images of each step that this rank prepares."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
from torch.utils.data import Sampler

from resnext.config import Config

from .rng import RngStream, random_uint64

LocalIndices = Callable[[int], np.ndarray]  # the positions of this rank's images in a global batch of N


class StepIndices(NamedTuple):
    """The images of a step that this rank prepares."""

    epoch: int
    step: int
    ids: np.ndarray  # int64: numbers of images, see epoch_order
    kept: np.ndarray | None  # int64: positions in `ids` to train on; None: all


def epoch_order(seed: int, epoch: int, images: int, repeats: int = 1) -> np.ndarray:
    """Return int64 (images,): the random permutation of an epoch.

    With `repeats`, only the first images of the permutation occur, each in `repeats` versions in a row
    (repeated augmentation: Hoffer et al. 2020). The number of version v of image i is i + v * images.
    """
    keys = random_uint64(seed, epoch, np.arange(images), 1, RngStream.ORDER)[:, 0]
    order = np.argsort(keys, kind="stable")
    versions = np.arange(images) % repeats
    return order[np.arange(images) // repeats] + versions * images


class EpochSampler(Sampler[StepIndices]):
    """Sampler of the steps of an epoch, in order; call `set_epoch` before each iteration."""

    def __init__(self, images: int, config: Config, local_indices: LocalIndices):
        self.images, self.seed, self.batch_size = images, config.run.seed, config.train.batch_size
        self.repeats, self.local_indices = config.augment.repeats, local_indices
        self.mixing = bool(config.augment.mixup or config.augment.cutmix)
        self.steps: list[StepIndices] = []

    def set_epoch(self, epoch: int, first_step: int = 0) -> None:
        """Select the steps of an epoch from `first_step` on."""
        order = epoch_order(self.seed, epoch, self.images, self.repeats)
        batches = np.split(order, range(self.batch_size, self.images, self.batch_size))
        self.steps = [self._step(epoch, i, ids) for i, ids in enumerate(batches)][first_step:]

    def _step(self, epoch: int, step: int, ids: np.ndarray) -> StepIndices:
        own, kept = self.local_indices(len(ids)), None
        if len(own) < len(ids) and self.mixing:
            # Mixing pairs an image with the previous one of the global batch, which may belong to another
            # rank: this rank prepares it too, and drops it after mixing.
            starts = np.flatnonzero(np.diff(own, prepend=-2) != 1)
            kept = np.flatnonzero(np.insert(np.ones(len(own), bool), starts, False))
            own = np.insert(own, starts, (own[starts] - 1) % len(ids))
        return StepIndices(epoch, step, ids[own], kept)

    def __iter__(self) -> Iterator[StepIndices]:
        return iter(self.steps)

    def __len__(self) -> int:
        return len(self.steps)
