"""Class folders below train/ and val/, as the original reads them (gen.lua).

Classes are the folder names of train/ in the order of resnext/classes.py; files may lie deeper. A small
dataset is read into memory: images of another size are scaled (shorter side, bicubic, antialiased) and
cropped at the center. Of a large one only the paths are kept, in one array that workers do not copy.
"""

import os
import shlex
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

import numpy as np
from PIL import Image

from resnext.classes import abbreviate, sort_classes
from resnext.errors import UserError

from .decode import MAX_PIXELS, decode
from .file_list_cache import cached, remember
from .in_memory import ArrayDataset, check_memory, digest, even_indices
from .walk import FORMATS, Found, is_hidden, is_image, leads_to_folder, skipped, to_bytes, to_text, walk

LARGEST_FILE = 1 << 30  # bytes; nothing larger is read if a file may be anything
SHARDS = "for tar shards, set data.dataset=shards"
OTHER_NAMES = {  # that people give to a split
    "train": ("training",),
    "val": ("valid", "validation", "test", "testing", "dev", "eval"),
}


# Files with the classes of the images in a flat val/ (data/lists.py), and how far above val/ they may be.
KNOWN_LISTS = {
    "LOC_val_solution.csv": 4,
    "val_annotations.txt": 0,
    "val.txt": 1,
    "ILSVRC2012_devkit_t12.tar.gz": 2,
}


@dataclass(frozen=True)
class ImageFolderDataset:
    """Image files below `folder`: paths as one array of bytes, labels int64 (N,), class names, warnings."""

    folder: Path
    paths: np.ndarray
    labels: np.ndarray
    classes: tuple[str, ...]
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.labels)

    def path(self, i: int) -> str:
        """Return the full path of image i."""
        return os.path.join(self.folder, os.fsdecode(self.paths[i]))

    def read(self, i: int, largest: int | None = None) -> bytes:
        """Return the content of image i. Raise UserError if it cannot be read or exceeds `largest` bytes."""
        return read_file(self.path(i), largest)

    def select(self, keep: np.ndarray) -> Self:
        """Return the images of these numbers."""
        return replace(self, paths=self.paths[keep], labels=self.labels[keep])

    def fingerprint(self) -> str:
        """Return a hash of names, labels and classes (reading the images would take minutes)."""
        return digest(self.classes, self.paths, self.labels)


def read_file(path: str, largest: int | None = None) -> bytes:
    """Return a file's content. Raise UserError if it cannot be read or has more than `largest` bytes."""
    try:
        with open(path, "rb", buffering=0) as file:
            if largest and os.fstat(file.fileno()).st_size > largest:
                raise UserError(f"{path}: over {largest >> 30} GiB, too large for an image")
            return file.read()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None


def split_folder(root: str, split: str) -> Path:
    """Return root/train or root/val. Raise UserError with a hint if it does not exist."""
    base = Path(os.fsdecode(to_bytes(root))).expanduser()
    where = f"data.dir {base}"
    if "{" in root:
        raise UserError(f"{where}: no such folder; {SHARDS}")
    if not base.is_dir():
        what = "is a file; unpack it and" if base.is_file() else "no such folder;"
        raise UserError(f"{where}: {what} name a folder with train/ and val/")
    folder = base / split
    if folder.is_dir():
        return folder
    names = class_folders(base)
    renamed = [name for name in names if name.lower() in (split, *OTHER_NAMES[split])]
    nested = [name for name in names if (base / os.fsdecode(to_bytes(name)) / split).is_dir()]
    classes = [name for name in names if name not in OTHER_NAMES]
    hint = "put images into train/CLASS/ and val/CLASS/"
    if _tars_hint(base):
        hint += f"; {_tars_hint(base)}"
    elif any(base.glob("*.parquet")) or any(base.glob("data/*.parquet")):
        hint = "convert Parquet files with scripts/make_shards.py"
    elif renamed:
        link = shlex.join(["ln", "-s", renamed[0], str(folder)])
        hint = f"did you mean {renamed[0]}/? Rename it, or create a link: {link}"
    elif nested:
        hint = f"did you mean --data {shlex.quote(str(base / nested[0]))}?"
    elif classes:
        hint += f"; if {abbreviate(classes)} are classes, split their images between the two"
    raise UserError(f"{where}: has no {split}/; {hint}")


def _tars_hint(folder: Path) -> str:
    """Return what to do with the tar files in `folder`, or "" if there are none."""
    if any(folder.glob("ILSVRC2012_img_*.tar")):
        return "unpack ImageNet's archives with scripts/prepare_imagenet.py"
    if any(folder.glob("*.tar")):
        return SHARDS
    return "decompress tar shards (gunzip)" if any(folder.glob("*.t*gz")) else ""


def evaluated_folder(root: str) -> Path:
    """Return root/val, or `root` itself if it holds class folders alone, as published test sets do."""
    base = Path(os.fsdecode(to_bytes(root))).expanduser()
    names = class_folders(base) if base.is_dir() else []
    splits = {*OTHER_NAMES, *OTHER_NAMES["train"], *OTHER_NAMES["val"]}
    nested = any((base / os.fsdecode(to_bytes(name)) / "val").is_dir() for name in names)
    alone = names and not nested and splits.isdisjoint(map(str.lower, names))
    return base if alone else split_folder(root, "val")


def known_list(folder: Path) -> str:
    """Return a hint if a known list of the images of val/ is near, else ""."""
    folders = (folder, *folder.absolute().parents)
    near = [place / name for name, height in KNOWN_LISTS.items() for place in folders[: height + 1]]
    file = next((shlex.quote(str(path)) for path in near if path.is_file()), "")
    return file and f"use its list: data.val_list={file} (evaluate.py: --val-list {file})"


def class_folders(folder: Path) -> list[str]:
    """Return the names of the visible folders in `folder`, in string order."""
    return _entries(folder)[0]


def _entries(folder: Path) -> tuple[list[str], list[str]]:
    """Return the names of the visible folders and of the images in `folder`, in string order."""
    try:
        with os.scandir(os.fsencode(folder)) as entries:
            visible = [entry for entry in entries if not is_hidden(entry.name)]
    except OSError as error:
        raise UserError(f"{folder}: cannot be read ({error.strerror})") from None
    folders = {entry.name for entry in visible if leads_to_folder(entry)}
    images = {entry.name for entry in visible if is_image(entry.name)} - folders
    return sorted(map(to_text, folders)), sorted(map(to_text, images))


def class_names(root: str, order: str | None = None) -> tuple[str, ...]:
    """Return the folder names of train/ in an order of resnext/classes.py. Raise UserError if under two."""
    train = split_folder(root, "train")
    names = class_folders(train)
    if not names:
        hint = _tars_hint(train) or f"put images into {train}/CLASS/"
        raise UserError(f"{train}: contains no class folders; {hint}")
    if len(names) == 1:
        hint = one_folder_too_many(train, names) or f"put the images of each class into {train}/CLASS/"
        raise UserError(f"{train}: has one class, {names[0]!r} (expected at least two); {hint}")
    return sort_classes(names, order)


def one_folder_too_many(folder: Path, names: Collection[str]) -> str:
    """Return a hint if the only folder contains the classes, as train/images/CLASS, else ""."""
    if len(names) != 1:
        return ""
    (name,) = names
    inner = folder / os.fsdecode(to_bytes(name))
    below = class_folders(inner)
    if not below or any(map(is_image, os.listdir(os.fsencode(inner)))):
        return ""
    return f"did you mean {abbreviate(below)} inside it? Move them up into {folder}/"


@dataclass
class Listing:
    """The images of a split, and the warnings and errors that training and check_data report."""

    paths: np.ndarray  # bytes, relative to the split's folder, sorted by class and path
    labels: np.ndarray  # int64
    notes: list[str]
    errors: list[str]  # the most serious first
    found: Found


def list_split(folder: Path, classes: tuple[str, ...]) -> Listing:
    """List the images in the class folders of `folder`, train/ or val/. val/ may lack classes."""
    changed = os.stat(folder).st_mtime_ns  # before it is read
    folders, loose = _entries(folder)
    present = set(folders)
    names = [name for name in classes if name in present]
    found = walk([os.path.join(os.fsencode(folder), to_bytes(name)) for name in names])
    found.directories[os.fsencode(folder)] = changed
    images = {name: list[bytes]() for name in classes} | dict(zip(names, found.images, strict=True))
    start = len(os.fsencode(folder)) + 1
    paths = np.array([path[start:] for name in classes for path in images[name]], "S")
    labels = np.array([label for label, name in enumerate(classes) for _ in images[name]], np.int64)
    notes = skipped(found, folder)
    if loose and folder.name != "val":
        what = f"images outside class folders: {len(loose):,} ({abbreviate(loose)})"
        notes.insert(0, f"warning: {folder}: skipped {what}")
    empty = [name for name in classes if not images[name]]
    errors = _errors(folder, found, loose, present - set(classes))
    if len(empty) == len(classes):
        errors.append(f"{folder}: contains no images of the known classes; check the path")
    elif empty and folder.name == "train":
        inner = folder / os.fsdecode(to_bytes(empty[0]))
        linked = any(path.startswith(os.fsencode(inner) + b"/") for path, _ in found.repeated)
        what = "only links to images of other classes" if linked else f"no images ({FORMATS})"
        errors.append(f"{inner}: contains {what}; add some, or remove the class from train/ and val/")
    return Listing(paths, labels, notes, errors, found)


def _errors(folder: Path, found: Found, loose: list[str], strangers: set[str]) -> list[str]:
    """Return errors for everything but images in known class folders, the most serious first."""
    errors = []
    if loose and folder.name == "val":
        hint = ("" if any(found.images) else known_list(folder)) or (
            "for ImageNet's validation set, run python scripts/prepare_imagenet.py TARS "
            f"{shlex.quote(str(folder.parent))} --flat-val {shlex.quote(str(folder))} (TARS has the devkit)"
        )
        errors.append(f"{folder}: contains images outside class folders; {hint}")
    if strangers:
        hint = one_folder_too_many(folder, strangers) or (
            "use the same classes in train/ and val/, or give both data.train_list and data.val_list"
        )
        if folder.name == "val":
            hint = known_list(folder) or hint
        errors.append(f"{folder}: class folder {min(strangers)!r} is not a training class; {hint}")
    for path, error in found.unreadable.items():
        errors.append(f"{os.fsdecode(path)}: cannot be read ({error.strerror})")
    for path, first in found.repeated:
        if os.path.dirname(path) == os.fsencode(folder):
            same = f"{os.fsdecode(path)}: is the same folder as {os.fsdecode(first)}"
            errors.append(f"{same}; remove one of the two")
    return errors


def absent_classes(
    folder: Path, labels: np.ndarray, classes: Sequence[str], wanted: Collection[int] | None = None
) -> list[str]:
    """Return a warning if classes, or the `wanted` labels among them, have no images in val/."""
    wanted = range(len(classes)) if wanted is None else wanted
    present = set(np.unique(labels).tolist())
    absent = [classes[label] for label in wanted if label not in present]
    if not absent:
        return []
    which = f"{len(absent):,} of {len(wanted):,} classes ({abbreviate(absent)})"
    return [f"warning: {folder}: has no images of {which}; errors are computed on the other classes"]


def list_files(folder: Path, classes: tuple[str, ...]) -> tuple[np.ndarray, np.ndarray, tuple[str, ...]]:
    """Return (paths, labels, warnings) of a split: from the cache if no folder has changed.

    Raise the first error.
    """
    known = cached(folder, classes, ("paths", "labels", "notes"))
    if known is None:
        listing = list_split(folder, classes)
        if listing.errors:
            raise UserError(listing.errors[0])
        notes = np.array([to_bytes(note) for note in listing.notes], "S")
        known = {"paths": listing.paths, "labels": listing.labels, "notes": notes}
        remember(folder, classes, known, listing.found.directories)
    return known["paths"], known["labels"], tuple(map(to_text, known["notes"].tolist()))


def list_set(
    root: str,
    split: str,
    limit: int | None = None,
    classes: tuple[str, ...] | None = None,
    order: str | None = None,
    wanted: Collection[int] | None = None,
    folder: Path | None = None,
) -> ImageFolderDataset:
    """List the images below root/split, or `folder`, at most `limit`.

    Without `classes`, the folders of train/ name them, in the given `order`. A warning names classes, or
    the `wanted` labels, that val/ lacks.
    """
    classes = classes or class_names(root, order)
    folder = folder or split_folder(root, split)
    paths, labels, notes = list_files(folder, classes)
    train = folder.with_name("train")
    if split == "val":
        notes += tuple(absent_classes(folder, labels, classes, wanted))
        if train.exists() and train.samefile(folder):
            same = f"warning: {folder}: is the same folder as train/"
            notes += (f"{same}; the validation error is that of training images",)
    files = ImageFolderDataset(folder, paths, labels, classes, notes)
    return files.select(even_indices(len(files), limit))


def read_set(files: ImageFolderDataset, size: int, max_pixels: int = MAX_PIXELS) -> ArrayDataset:
    """Read the images of a small dataset into memory, as uint8 (N, size, size, 3)."""
    check_memory(len(files), size, str(files.folder))
    images = np.empty((len(files), size, size, 3), np.uint8)

    def read(i: int) -> None:
        images[i] = resize_and_center_crop(decode(files.read(i), files.path(i), max_pixels=max_pixels), size)

    with ThreadPoolExecutor() as pool:  # reading and Pillow's decoders release the GIL
        for _ in pool.map(read, range(len(files))):
            pass
    return ArrayDataset(images, files.labels, files.classes, files.notes)


def resize_and_center_crop(image: np.ndarray, size: int) -> np.ndarray:
    """Scale the shorter side to `size` and crop the center; return an image of that size unchanged."""
    height, width = image.shape[:2]
    if (height, width) == (size, size):
        return image
    scale = size / min(height, width)
    scaled_width, scaled_height = max(size, round(width * scale)), max(size, round(height * scale))
    # The crop in coordinates of the source: nothing larger than the result is allocated.
    x, y = width / scaled_width, height / scaled_height
    left, top = (scaled_width - size) // 2 * x, (scaled_height - size) // 2 * y
    crop = (left, top, left + size * x, top + size * y)
    return np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.BICUBIC, box=crop))
