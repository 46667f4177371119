"""Class folders below train/ and val/, as the original reads them (gen.lua).

Classes are the sorted folder names of train/; files may lie deeper. A small set is read into memory,
pictures of another size scaled (shorter side, bicubic, antialiased) and cropped at the centre; of a
large one only the index is kept: one array of paths, which no worker copies.
"""

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from resnext.errors import UserError

from .decode import decode
from .images import ImageSet, check_memory, even_indices
from .index import cached, remember

EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp")


@dataclass(frozen=True)
class FileSet:
    """Picture files below `folder`: their paths as one array of bytes, labels int64 (N,), class names."""

    folder: Path
    paths: np.ndarray
    labels: np.ndarray
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.labels)

    def path(self, i: int) -> str:
        return os.path.join(self.folder, os.fsdecode(self.paths[i]))

    def read(self, i: int) -> bytes:
        """The bytes of a file."""
        path = self.path(i)
        try:
            with open(path, "rb", buffering=0) as file:
                return file.read()
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror})") from None

    def fingerprint(self) -> str:
        """Hash of names, labels and classes (not of the pictures: reading them would take minutes)."""
        digest = hashlib.sha256("\n".join(self.classes).encode("utf-8", "surrogateescape"))
        digest.update(self.paths.tobytes())
        digest.update(self.labels.tobytes())
        return digest.hexdigest()[:16]


def class_names(root: Path) -> tuple[str, ...]:
    """Sorted folder names of train/."""
    train = root / "train"
    if not root.is_dir():
        raise UserError(f"data.dir {root}: no such folder; give --data DIR with train/ and val/")
    if not train.is_dir():
        raise UserError(f"data.dir {root}: has no train/; it must hold train/CLASS/*.jpg and val/CLASS/*.jpg")
    names = sorted(entry.name for entry in os.scandir(train) if entry.is_dir())
    if not names:
        raise UserError(f"{train}: holds no class folders; put pictures into {train}/CLASS/")
    return tuple(names)


def list_files(
    folder: Path, classes: tuple[str, ...], partial: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """(paths relative to `folder` as bytes, int64 labels), sorted by class and path.

    `partial`: classes may be missing. The list comes from the cache while no folder has changed.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; it must hold one folder a class")
    known = cached(folder, classes)
    if known:
        return known
    directories = {str(folder): os.stat(folder).st_mtime_ns}
    with os.scandir(folder) as entries:
        found_here = [(entry.name, entry.is_dir()) for entry in entries]
    strangers = {name for name, is_folder in found_here if is_folder} - set(classes)
    present = {name for name, is_folder in found_here if is_folder}
    if folder.name == "val" and any(name.lower().endswith(EXTENSIONS) for name, _ in found_here):
        raise UserError(
            f"{folder}: holds pictures outside class folders; for ImageNet's validation set: python "
            f"scripts/prepare_imagenet.py TARS {folder.parent} --flat-val {folder} (TARS has the devkit)"
        )
    if strangers:
        raise UserError(
            f"{folder}: class folder {sorted(strangers)[0]!r} is not in train/; the classes of "
            "train/ and val/ must be the same"
        )
    paths: list[bytes] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        if partial and name not in present:
            continue
        found = []
        for directory, _, files in os.walk(folder / name, followlinks=True):
            directories[directory] = os.stat(directory).st_mtime_ns
            below = os.path.relpath(directory, folder)
            found += [os.path.join(below, f) for f in files if f.lower().endswith(EXTENSIONS)]
        if not found:
            raise UserError(
                f"{folder / name}: holds no pictures ({', '.join(EXTENSIONS)}); add some, or "
                "remove the class from train/ and val/"
            )
        paths += sorted(os.fsencode(path) for path in found)
        labels += [label] * len(found)
    if not paths:
        raise UserError(f"{folder}: holds no pictures of the known classes; check the path")
    if present >= set(classes):
        remember(folder, classes, np.array(paths), np.array(labels), directories)
    return np.array(paths), np.array(labels)


def list_set(
    root: str, split: str, limit: int | None = None, classes: tuple[str, ...] | None = None
) -> FileSet:
    """The pictures below root/split. Of given `classes` some may be missing; they need no train/."""
    base = Path(root).expanduser()
    partial = classes is not None
    classes = classes or class_names(base)
    paths, labels = list_files(base / split, classes, partial)
    keep = even_indices(len(paths), limit)
    return FileSet(base / split, paths[keep], labels[keep], classes)


def read_set(
    root: str, split: str, size: int, limit: int | None, classes: tuple[str, ...] | None = None
) -> ImageSet:
    """The same of a small set, read into memory as uint8 (N, size, size, 3)."""
    files = list_set(root, split, limit, classes)
    check_memory(len(files), size, str(files.folder))
    images = np.empty((len(files), size, size, 3), np.uint8)

    def read(i: int) -> None:
        images[i] = fit(decode(files.read(i), files.path(i)), size)

    with ThreadPoolExecutor() as pool:  # reading and Pillow's decoders release the GIL
        for _ in pool.map(read, range(len(files))):
            pass
    return ImageSet(images, files.labels, files.classes)


def fit(image: np.ndarray, size: int) -> np.ndarray:
    """Scale the shorter side to `size` and crop the centre; untouched where the size is right."""
    height, width = image.shape[:2]
    if (height, width) == (size, size):
        return image
    scale = size / min(height, width)
    scaled_width, scaled_height = max(size, round(width * scale)), max(size, round(height * scale))
    # The crop in coordinates of the source: nothing larger than the result is made.
    x, y = width / scaled_width, height / scaled_height
    left, top = (scaled_width - size) // 2 * x, (scaled_height - size) // 2 * y
    crop = (left, top, left + size * x, top + size * y)
    return np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.BICUBIC, box=crop))
