"""A small dataset: uint8 images in memory, their labels and class names."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import numpy as np

from resnext.errors import UserError


@dataclass(frozen=True)
class ArrayDataset:
    """Images uint8 (N, S, S, 3), labels int64 (N,), class names, and warnings about skipped files."""

    images: np.ndarray
    labels: np.ndarray
    classes: tuple[str, ...]
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.labels)

    def fingerprint(self) -> str:
        """Return a hash of images, labels and classes, which changes if the data does."""
        return digest(self.classes, self.images, self.labels)

    def select(self, keep: np.ndarray) -> Self:
        """Return the images of these numbers."""
        return replace(self, images=self.images[keep], labels=self.labels[keep])


def digest(classes: Sequence[str], *arrays: np.ndarray) -> str:
    """Return a hash, 16 hex digits, of class names and arrays."""
    found = hashlib.sha256("\n".join(classes).encode("utf-8", "surrogateescape"))
    for array in arrays:
        found.update(np.ascontiguousarray(array).data)
    return found.hexdigest()[:16]


def subsample(image_set: ArrayDataset, limit: int | None) -> ArrayDataset:
    """Keep at most `limit` images, evenly spaced, so that datasets sorted by class keep every class."""
    return image_set.select(even_indices(len(image_set), limit))


def even_indices(images: int, limit: int | None) -> np.ndarray:
    """Return int64 indices of at most `limit` of `images`, evenly spaced."""
    count = images if limit is None else min(images, limit)
    return np.arange(count) * images // count


def available_memory() -> int | None:
    """Return the bytes that a process can still allocate, or None if the system (not Linux) does not say."""
    try:
        with open("/proc/meminfo") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return None


def check_memory(images: int, size: int, source: str) -> None:
    """Raise UserError if uint8 images of size x size pixels do not fit in memory."""
    needed, available = images * size * size * 3, available_memory()
    if available is not None and needed > available:
        raise UserError(
            f"{source}: {images:,} images of {size}x{size} need {needed / 2**30:.1f} GiB of memory "
            f"({available / 2**30:.1f} free); lower data.image_size, data.train_images or data.val_images"
        )
