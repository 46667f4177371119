"""Class folders below train/ and val/, as the original reads them (gen.lua): a small set in memory.

Classes are the sorted folder names of train/; files may lie deeper. Pictures of another size
are scaled (shorter side, bicubic, antialiased) and cropped at the centre once, while reading.
"""

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

from resnext.errors import UserError

from .decode import decode
from .images import ImageSet, check_memory, even_indices

EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp")


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


def list_files(folder: Path, classes: tuple[str, ...]) -> tuple[np.ndarray, np.ndarray]:
    """(paths relative to `folder` as bytes, int64 labels), sorted by class and path."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; it must hold one folder a class")
    strangers = {e.name for e in os.scandir(folder) if e.is_dir()} - set(classes)
    if strangers:
        raise UserError(
            f"{folder}: class folder {sorted(strangers)[0]!r} is not in train/; the classes of "
            "train/ and val/ must be the same"
        )
    paths: list[bytes] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        found = []
        for directory, _, files in os.walk(folder / name, followlinks=True):
            below = os.path.relpath(directory, folder)
            found += [os.path.join(below, f) for f in files if f.lower().endswith(EXTENSIONS)]
        if not found:
            raise UserError(
                f"{folder / name}: holds no pictures ({', '.join(EXTENSIONS)}); add some, or "
                "remove the class from train/ and val/"
            )
        paths += sorted(os.fsencode(path) for path in found)
        labels += [label] * len(found)
    return np.array(paths), np.array(labels)


def read_set(root: str, split: str, size: int, limit: int | None) -> ImageSet:
    """Pictures of root/split as uint8 (N, size, size, 3)."""
    base = Path(root).expanduser()
    classes = class_names(base)
    folder = base / split
    paths, labels = list_files(folder, classes)
    keep = even_indices(len(paths), limit)
    paths, labels = paths[keep], labels[keep]
    check_memory(len(paths), size, str(folder))
    images = np.empty((len(paths), size, size, 3), np.uint8)

    def read(i: int) -> None:
        path = folder / os.fsdecode(paths[i])
        try:
            content = path.read_bytes()
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror})") from None
        images[i] = fit(decode(content, path), size)

    with ThreadPoolExecutor() as pool:  # reading and Pillow's decoders release the GIL
        for _ in pool.map(read, range(len(paths))):
            pass
    return ImageSet(images, labels, classes)


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
