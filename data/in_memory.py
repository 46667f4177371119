"""A small data set: uint8 pictures in memory, their labels and the names of the classes."""

import hashlib
from dataclasses import dataclass, replace

import numpy as np

from resnext.errors import UserError

from .walk import to_bytes


@dataclass(frozen=True)
class ArrayDataset:
    """Pictures uint8 (N, S, S, 3), labels int64 (N,) and the names of the classes."""

    images: np.ndarray
    labels: np.ndarray
    classes: tuple[str, ...]
    notes: tuple[str, ...] = ()  # warnings of what was left out

    def __len__(self) -> int:
        return len(self.labels)

    def fingerprint(self) -> str:
        """Hash of pictures, labels and classes, to tell whether the data is still the same."""
        digest = hashlib.sha256(to_bytes("\n".join(self.classes)))
        digest.update(np.ascontiguousarray(self.images))
        digest.update(np.ascontiguousarray(self.labels))
        return digest.hexdigest()[:16]


def subsample(image_set: ArrayDataset, limit: int | None) -> ArrayDataset:
    """At most `limit` images, evenly spaced, so that sets sorted by class keep every class."""
    keep = even_indices(len(image_set), limit)
    return replace(image_set, images=image_set.images[keep], labels=image_set.labels[keep])


def even_indices(images: int, limit: int | None) -> np.ndarray:
    """int64 indices of at most `limit` of `images`, evenly spaced."""
    count = images if limit is None else min(images, limit)
    return np.arange(count) * images // count


def available_memory() -> int | None:
    """Bytes that a process can still take, None where the system does not say (other than Linux)."""
    try:
        with open("/proc/meminfo") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return None


def check_memory(images: int, size: int, source: str) -> None:
    """A UserError ahead of reading more uint8 pictures than there is memory for."""
    needed, available = images * size * size * 3, available_memory()
    if available is not None and needed > available:
        raise UserError(
            f"{source}: {images:,} pictures of {size}x{size} need {needed / 2**30:.1f} GiB of "
            f"memory, {available / 2**30:.1f} are free; lower data.image_size, data.train_images or "
            "data.val_images"
        )
