"""Class folders below train/ and val/, as the original reads them (gen.lua).

Classes are the folder names of train/ in the order of resnext/classes.py; files may lie deeper. A small set
is read into memory, pictures of another size scaled (shorter side, bicubic, antialiased) and cropped at the
centre; of a large one only the index is kept: one array of paths, which no worker copies.
"""

import hashlib
import os
import shlex
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from resnext.classes import abbreviate, sort_classes
from resnext.errors import UserError

from .decode import MAX_PIXELS, decode
from .file_list_cache import cached, remember
from .in_memory import ArrayDataset, check_memory, even_indices
from .walk import FORMATS, Found, is_hidden, is_image, leads_to_folder, left_out, to_bytes, to_text, walk

OTHER_NAMES = {  # under which people have a split
    "train": ("training",),
    "val": ("valid", "validation", "test", "testing", "dev", "eval"),
}


@dataclass(frozen=True)
class ImageFolderDataset:
    """Picture files below `folder`: their paths as one array of bytes, labels int64 (N,), class names."""

    folder: Path
    paths: np.ndarray
    labels: np.ndarray
    classes: tuple[str, ...]
    notes: tuple[str, ...] = ()  # warnings of what was left out

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
        digest = hashlib.sha256(to_bytes("\n".join(self.classes)))
        digest.update(self.paths.tobytes())
        digest.update(self.labels.tobytes())
        return digest.hexdigest()[:16]


# ---------------------------------------------------------------------------- folders


def split_folder(root: str, split: str) -> Path:
    """root/train or root/val; a UserError that says what is there instead."""
    base = Path(os.fsdecode(to_bytes(root))).expanduser()
    where = f"data.dir {base}"
    if base.is_file():
        raise UserError(f"{where}: is a file; unpack it, and give --data DIR with train/ and val/")
    if not base.is_dir():
        raise UserError(f"{where}: no such folder; give --data DIR with train/ and val/")
    folder = base / split
    if folder.is_dir():
        return folder
    there = class_folders(base)
    renamed = [name for name in there if name.lower() in OTHER_NAMES[split]]
    nested = [name for name in there if (base / os.fsdecode(to_bytes(name)) / split).is_dir()]
    classes = tuple(name for name in there if name not in OTHER_NAMES)
    hint = "it must hold train/CLASS/*.jpg and val/CLASS/*.jpg"
    if renamed:
        link = shlex.join(["ln", "-s", renamed[0], str(folder)])
        hint = f"did you mean {renamed[0]}/? Rename it, or make a link: {link}"
    elif nested:
        hint = f"did you mean --data {shlex.quote(str(base / nested[0]))}?"
    elif classes:
        hint += f"; if {abbreviate(classes)} are classes, divide their pictures between the two"
    raise UserError(f"{where}: has no {split}/; {hint}")


def class_folders(folder: Path) -> list[str]:
    """Names of the folders in `folder`, hidden and system ones left out, in string order."""
    try:
        with os.scandir(os.fsencode(folder)) as entries:
            found = [entry.name for entry in entries if not is_hidden(entry.name) and leads_to_folder(entry)]
    except OSError as error:
        raise UserError(f"{folder}: cannot be read ({error.strerror})") from None
    return sorted(map(to_text, found))


def class_names(root: str, order: str | None = None) -> tuple[str, ...]:
    """The folder names of train/ in an order of resnext/classes.py."""
    train = split_folder(root, "train")
    names = class_folders(train)
    if not names:
        raise UserError(f"{train}: holds no class folders; put pictures into {train}/CLASS/")
    if len(names) == 1:
        hint = one_folder_too_many(train, names) or f"put the pictures of each class into {train}/CLASS/"
        raise UserError(f"{train}: has one class, {names[0]!r}, where a classifier needs two; {hint}")
    return sort_classes(names, order)


def one_folder_too_many(folder: Path, names: Collection[str]) -> str:
    """What to do about train/images/CLASS; nothing to say where the only folder holds files."""
    if len(names) != 1:
        return ""
    (name,) = names
    inner = folder / os.fsdecode(to_bytes(name))
    below = class_folders(inner)
    if not below or any(is_image(entry) for entry in os.listdir(os.fsencode(inner))):
        return ""
    return f"did you mean {abbreviate(tuple(below))} inside it? Move them up into {folder}/"


# ---------------------------------------------------------------------------- files


@dataclass
class Listing:
    """The pictures of a split and what training says of them; check_data says the same."""

    paths: np.ndarray  # bytes, relative to the split's folder, sorted by class and path
    labels: np.ndarray  # int64
    notes: list[str]  # warnings
    errors: list[str] = field(default_factory=list)  # why it is refused, the gravest first
    found: Found | None = None  # None: from the cache


def list_split(folder: Path, classes: tuple[str, ...]) -> Listing:
    """The pictures in the class folders below `folder`, train/ or val/, of which val/ may lack some."""
    changed = os.stat(folder).st_mtime_ns  # before it is read
    present = set(class_folders(folder))
    names = [name for name in classes if name in present]
    roots = [os.path.join(os.fsencode(folder), to_bytes(name)) for name in names]
    found = walk(roots)
    found.directories[os.fsencode(folder)] = changed
    pictures = dict(zip(names, found.pictures, strict=True))
    skip = len(os.fsencode(folder)) + 1
    paths = [path[skip:] for name in names for path in pictures[name]]
    labels = [label for label, name in enumerate(classes) for _ in pictures.get(name, ())]
    listing = Listing(np.array(paths, "S"), np.array(labels, np.int64), [], [], found)
    _judge(listing, folder, present - set(classes), set(roots))
    empty = [name for name in classes if not pictures.get(name)]
    if len(empty) == len(classes):
        listing.errors.append(f"{folder}: holds no pictures of the known classes; check the path")
    elif empty and folder.name == "train":
        inner = folder / os.fsdecode(to_bytes(empty[0]))
        linked = any(path.startswith(os.fsencode(inner) + b"/") for path, _ in found.repeated)
        what = "only links to pictures of other classes" if linked else f"no pictures ({FORMATS})"
        listing.errors.append(f"{inner}: holds {what}; add some, or remove the class from train/ and val/")
    return listing


def absent_classes(
    folder: Path, labels: np.ndarray, classes: Sequence[str], wanted: Collection[int] | None = None
) -> list[str]:
    """A warning where val/ lacks pictures of classes; `wanted`: of these alone, by their numbers."""
    wanted = range(len(classes)) if wanted is None else wanted
    present = set(np.unique(labels).tolist())
    absent = tuple(classes[label] for label in wanted if label not in present)
    if not absent:
        return []
    return [
        f"warning: {folder}: has no pictures of {len(absent):,} of {len(wanted):,} classes ({abbreviate(absent)}); "
        "errors are over the others"
    ]


def _judge(listing: Listing, folder: Path, strangers: set[str], roots: set[bytes]) -> None:
    """Errors and notes of everything that is not a picture in its class folder."""
    found = listing.found
    with os.scandir(os.fsencode(folder)) as entries:
        pictures = [entry for entry in entries if is_image(entry.name) and not is_hidden(entry.name)]
        loose = sorted(to_text(entry.name) for entry in pictures if not leads_to_folder(entry))
    if loose and folder.name == "val":
        listing.errors.append(
            f"{folder}: holds pictures outside class folders; for ImageNet's validation set: python "
            f"scripts/prepare_imagenet.py TARS {shlex.quote(str(folder.parent))} --flat-val "
            f"{shlex.quote(str(folder))} (TARS has the devkit)"
        )
    elif loose:
        listing.notes.append(
            f"warning: {folder}: left out are pictures outside class folders: {len(loose):,} "
            f"({abbreviate(tuple(loose))})"
        )
    if strangers:
        hint = one_folder_too_many(folder, strangers) or "the classes of train/ and val/ must be the same"
        listing.errors.append(f"{folder}: class folder {min(strangers)!r} is not in train/; {hint}")
    for path, error in found.unreadable.items():
        listing.errors.append(f"{os.fsdecode(path)}: cannot be read ({error.strerror})")
    for path, first in found.repeated:
        if path in roots:
            listing.errors.append(
                f"{os.fsdecode(path)}: is the same folder as {os.fsdecode(first)}; remove one of the two"
            )
    listing.notes += left_out(found, folder)


def list_files(folder: Path, classes: tuple[str, ...]) -> tuple[np.ndarray, np.ndarray, tuple[str, ...]]:
    """(paths relative to `folder` as bytes, int64 labels, warnings), sorted by class and path.

    The list comes from the cache while no folder has changed.
    """
    known = cached(folder, classes)
    if known:
        return known
    listing = list_split(folder, classes)
    if listing.errors:
        raise UserError(listing.errors[0])
    notes = tuple(listing.notes)
    remember(folder, classes, listing.paths, listing.labels, notes, listing.found.directories)
    return listing.paths, listing.labels, notes


def list_set(
    root: str,
    split: str,
    limit: int | None = None,
    classes: tuple[str, ...] | None = None,
    order: str | None = None,
    wanted: Collection[int] | None = None,
) -> ImageFolderDataset:
    """The pictures below root/split. Given `classes` need no train/; of val/ only the `wanted` matter."""
    classes = classes or class_names(root, order)
    folder = split_folder(root, split)
    paths, labels, notes = list_files(folder, classes)
    train = folder.with_name("train")
    if split == "val":
        notes += tuple(absent_classes(folder, labels, classes, wanted))
    if split == "val" and train.exists() and train.samefile(folder):
        notes += (f"warning: {folder}: is the same folder as train/; the error is that of training pictures",)
    keep = even_indices(len(paths), limit)
    return ImageFolderDataset(folder, paths[keep], labels[keep], classes, notes)


def read_set(files: ImageFolderDataset, size: int, max_pixels: int = MAX_PIXELS) -> ArrayDataset:
    """The pictures of a small set, read into memory as uint8 (N, size, size, 3)."""
    check_memory(len(files), size, str(files.folder))
    images = np.empty((len(files), size, size, 3), np.uint8)

    def read(i: int) -> None:
        images[i] = resize_and_center_crop(decode(files.read(i), files.path(i), max_pixels=max_pixels), size)

    with ThreadPoolExecutor() as pool:  # reading and Pillow's decoders release the GIL
        for _ in pool.map(read, range(len(files))):
            pass
    return ArrayDataset(images, files.labels, files.classes, files.notes)


def resize_and_center_crop(image: np.ndarray, size: int) -> np.ndarray:
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
