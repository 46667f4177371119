"""A small data set: uint8 pictures in memory, and the choice of where they come from."""

import hashlib
import os
from dataclasses import dataclass, replace

import numpy as np

from resnext.config import Data
from resnext.errors import UserError


@dataclass(frozen=True)
class ImageSet:
    """Pictures uint8 (N, S, S, 3), labels int64 (N,) and the names of the classes."""

    images: np.ndarray
    labels: np.ndarray
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.labels)

    def fingerprint(self) -> str:
        """Hash of pictures, labels and classes, to tell whether the data is still the same."""
        digest = hashlib.sha256("\n".join(self.classes).encode())
        digest.update(np.ascontiguousarray(self.images))
        digest.update(np.ascontiguousarray(self.labels))
        return digest.hexdigest()[:16]


def load_set(config: Data, split: str) -> ImageSet:
    """The "train" or "val" part of the configured data set."""
    limit = config.train_images if split == "train" else config.val_images
    if config.dataset == "glyphs":
        from . import glyphs

        return glyphs.draw_set(split, limit, config.image_size)
    if config.dir is None:
        raise UserError(f"data.dir: {config.dataset} needs a folder; give --data DIR")
    if config.dataset == "folder":
        from . import folder

        return folder.read_set(config.dir, split, config.image_size, limit)
    from . import cifar

    return take_evenly(cifar.read_set(config.dataset, config.dir, split, config.download), limit)


def take_evenly(image_set: ImageSet, limit: int | None) -> ImageSet:
    """At most `limit` images, evenly spaced, so that sets sorted by class keep every class."""
    keep = even_indices(len(image_set), limit)
    return replace(image_set, images=image_set.images[keep], labels=image_set.labels[keep])


def even_indices(images: int, limit: int | None) -> np.ndarray:
    """int64 indices of at most `limit` of `images`, evenly spaced."""
    count = images if limit is None else min(images, limit)
    return np.arange(count) * images // count


def check_classes(model_classes: int | None, image_set: ImageSet) -> int:
    """The number of classes; a UserError where model.classes says another."""
    found = len(image_set.classes)
    if model_classes not in (None, found):
        raise UserError(
            f"model.classes: {model_classes}, but the data has {found} classes; remove the key or "
            "give the data that it was meant for"
        )
    return found


def check_memory(images: int, size: int, source: str) -> None:
    """A UserError ahead of reading more uint8 pictures than there is memory for."""
    needed = images * size * size * 3
    available = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    if needed > available:
        raise UserError(
            f"{source}: {images:,} pictures of {size}x{size} need {needed / 2**30:.1f} GiB of "
            f"memory, {available / 2**30:.1f} are free; lower data.image_size, data.train_images or "
            "data.val_images"
        )
