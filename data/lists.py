"""Images and their classes as a file names them, instead of class folders: data.train_list, data.val_list.

The content of the file shows its kind:

    ImageId,PredictionString     Kaggle's ImageNet, LOC_val_solution.csv
    path,label                   CSV with a header; FILE:COLUMN names the column of the classes
    NAME tab CLASS tab …         tiny-imagenet's val_annotations.txt
    PATH CLASS                   Caffe's and mmpretrain's lists
    490                          the devkit's ground truth next to its meta.mat, or the devkit's archive

Classes are names, or the numbers of outputs from 0. Images are sorted by class and path, as those of class
folders are, so the order of the lines changes nothing.
"""

import csv
import os
import posixpath
import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from resnext.classes import abbreviate, sort_classes
from resnext.config import DataConfig
from resnext.errors import UserError

from .image_folder import ImageFolderDataset, absent_classes, split_folder
from .imagenet_archives import DEVKIT, decode_truth, find_wnids, imagenet_classes, read_devkit, val_name
from .in_memory import even_indices
from .walk import to_bytes

PATH_COLUMNS = ("path", "file_name", "filename", "image", "ImageId")
# What columns split and is_valid say about a row.
SPLITS = dict.fromkeys(("train", "training", "false", "0", "no"), "train")
SPLITS |= dict.fromkeys(("val", "valid", "validation", "true", "1", "yes"), "val") | {"test": "test"}
CLASS_COLUMNS = ("label", "class", "wnid", "PredictionString")
# Outputs of the official validation images 2 to 6, which tell the order of the classes.
KNOWN_OUTPUTS = {val_name(number): out for number, out in enumerate((970, 230, 809, 516, 57), 2)}
NUMBER = re.compile("[0-9]{1,9}")

Row = tuple[int, str, str]  # line, path, class


@dataclass(frozen=True)
class ImageList:
    """What a list names: the line of each image, its path below some folder, and its class as text."""

    file: str
    lines: tuple[int, ...]
    paths: tuple[str, ...]
    names: tuple[str, ...]

    @property
    def numbered(self) -> bool:
        return all(map(NUMBER.fullmatch, self.names))


def read_text(option: str, name: str) -> str:
    """Return a text file; bytes that are not UTF-8 are decoded as in file names."""
    try:
        return Path(name).read_text(encoding="utf-8-sig", errors="surrogateescape")
    except OSError as error:
        raise UserError(f"{option} {name}: cannot be read ({error.strerror}); check the path") from None


def read_list(file: str, split: str) -> ImageList:
    """Read a list, FILE or FILE:COLUMN, of images of a split, train or val."""
    name, column = os.path.expanduser(file), ""
    if not os.path.exists(name) and ":" in name:
        name, _, column = name.rpartition(":")
    rows: dict[str, Row] = {}
    for line, path, class_name in _rows(name, column, split):
        where = f"{name}, line {line}"
        if not path or not class_name:
            raise UserError(f"{where}: has no path or no class; write both")
        if path.startswith("/") or ".." in path.split("/") or "\0" in path:
            raise UserError(
                f"{where}: {path[:80]!r} is not below the data folder; write a path relative to it"
            )
        # Kaggle's lists name no extension.
        path = posixpath.normpath(path) + ("" if "." in posixpath.basename(path) else ".JPEG")
        if path in rows:
            raise UserError(f"{where}: {path!r} is also on line {rows[path][0]}; keep one")
        rows[path] = line, path, class_name
    if not rows:
        raise UserError(f"{name}: names no image of {split}/; write a path and a class per line")
    found = ImageList(name, *zip(*rows.values(), strict=True))
    if found.names == tuple(map(str, range(1, len(rows) + 1))):
        raise UserError(
            f"{name}: numbers its images from 1 to {len(rows):,} and names no classes; for ImageNet's, give "
            f"LOC_val_solution.csv or {DEVKIT}"
        )
    return found


def _rows(name: str, column: str, split: str) -> Iterable[Row]:
    """Return the rows of a list of any kind."""
    if name.endswith(".tar.gz"):
        return _truth_rows(name, "")
    if name.endswith(".gz"):
        raise UserError(f"{name}: is compressed; decompress it (gunzip)")
    text = read_text(f"data.{split}_list", name)
    lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    header = [cell.strip() for cell in lines[0][1].split(",")] if lines else []
    if set(header) & set(PATH_COLUMNS):
        return _csv_rows(name, text.split("\n"), column, split)
    if column:
        raise UserError(f"{name}: has no header with a path; remove :{column}, or add a header path,label")
    if lines and all(line.strip().isdecimal() for _, line in lines):
        return _truth_rows(name, text)
    return (_split_line(f"{name}, line {number}", number, line) for number, line in lines)


def _truth_rows(name: str, text: str) -> Iterable[Row]:
    """Return the rows of the devkit's ground truth, or of its archive if there is no text."""
    try:
        truth = decode_truth(Path(name).with_name("meta.mat").read_bytes(), text, name) if text else None
    except OSError:
        raise UserError(
            f"{name}: has the devkit's class numbers, and no meta.mat next to it explains them; leave it in "
            f"the devkit's folder data/, or give {DEVKIT}"
        ) from None
    numbered = enumerate(truth or read_devkit(Path(name)), 1)
    return ((number, val_name(number), wnid) for number, wnid in numbered)


def _csv_rows(name: str, lines: Iterable[str], column: str, split: str) -> Iterator[Row]:
    """Yield the rows of a CSV file; a column is_valid or split tells which of them belong to val/."""
    reader = csv.DictReader(lines, strict=True, restval="")
    reader.fieldnames = header = [cell.strip() for cell in reader.fieldnames or ()]
    path = next(key for key in PATH_COLUMNS if key in header)
    column = column or next((key for key in CLASS_COLUMNS if key in header), "label")
    own = next((key for key in ("is_valid", "split") if key in header), "")
    if column not in header:
        columns = ", ".join(header)[:120]
        raise UserError(f"{name}: has no column {column!r} (got {columns}); choose one with FILE:COLUMN")
    try:
        for row in reader:
            where = f"{name}, line {reader.line_num}"
            if own and (member := row[own].strip().lower()) not in SPLITS:
                expected = ", ".join(SPLITS)
                raise UserError(
                    f"{where}: unknown {own} (got {member[:40]!r}, expected {expected}); correct it"
                )
            if own and SPLITS[member] != split:
                continue
            class_name = row[column].strip()
            if column == "PredictionString":  # a class and the four sides of a box per object
                boxes = class_name.split()
                if len(set(boxes[::5])) != 1 or len(boxes) % 5:
                    raise UserError(f"{where}: needs one class, with boxes of four numbers; correct the line")
                class_name = boxes[0]
            yield reader.line_num, row[path].strip(), class_name
    except csv.Error as error:
        raise UserError(f"{name}, line {reader.reader.line_num}: {error}; correct the line") from None


def _split_line(where: str, number: int, line: str) -> Row:
    cells = line.strip().split("\t") if "\t" in line else line.rsplit(maxsplit=1)
    if len(cells) < 2:
        raise UserError(
            f"{where}: must be a path and a class (got {line.strip()[:80]!r}); write PATH CLASS, or CSV "
            "with the header path,label"
        )
    return number, cells[0].strip(), cells[1].strip()


def list_classes(found: ImageList, order: str | None) -> tuple[str, ...]:
    """Return the classes of a training list in the order of their outputs: numbers, or sorted names."""
    names = set(found.names)
    if len(names) < 2:
        raise UserError(f"{found.file}: has one class, {found.names[0]!r} (expected at least two)")
    if not found.numbered:
        return sort_classes(names, order)
    classes = tuple(map(str, range(len(names))))
    absent = min(set(classes) - names, key=int, default=None)
    if absent is not None:
        raise UserError(
            f"{found.file}: has {len(names):,} different class numbers, but {absent} is missing; number the "
            "classes from 0, without gaps"
        )
    return classes


def output_labels(found: ImageList, classes: Sequence[str]) -> np.ndarray:
    """Return the label of each image, int64: its class by name, or else by number from 0."""
    by_number = found.numbered and not classes[0].isdecimal()
    position = {str(key): i for i, key in enumerate(range(len(classes)) if by_number else classes)}
    for line, name in zip(found.lines, found.names, strict=True):
        if name not in position:
            known = f"0 to {len(classes) - 1:,}" if by_number else abbreviate(list(position))
            raise UserError(
                f"{found.file}, line {line}: class {name[:80]!r} is unknown (expected {known}); correct it"
            )
    return np.array([position[name] for name in found.names], np.int64)


def check_order(found: ImageList, labels: np.ndarray, classes: tuple[str, ...]) -> list[str]:
    """Return warnings about numbers, and about labels other than the class in an image's path.

    Raise UserError if paths or known images show that the numbers are of another class order.
    """
    imagenet = imagenet_classes()
    names = imagenet if found.numbered and len(classes) == len(imagenet) else classes
    position = {name: label for label, name in enumerate(names)}
    position |= KNOWN_OUTPUTS if names == imagenet else {}
    own = np.array([next((position[w] for w in _words(path) if w in position), -1) for path in found.paths])
    known, different = np.count_nonzero(own >= 0), np.flatnonzero((own >= 0) & (own != labels))
    if len(different):
        i = different[0]
        example = f"{found.paths[i]} is {names[own[i]]}, output {own[i]}, and not {names[labels[i]]}"
        if 2 * len(different) > known and found.numbered:
            raise UserError(
                f"{found.file}, line {found.lines[i]}: class {found.names[i]!r} is of another class order: "
                f"{example}; number the classes from 0 in the order of their names"
            )
        count = f"{len(different):,} of {known:,}"
        return [f"warning: {found.file}: {count} images have another class than in their path: {example}"]
    if found.numbered and not known and not classes[0].isdecimal():
        meaning = f"0 is {classes[0]!r}, {len(classes) - 1} is {classes[-1]!r}"
        return [f"warning: {found.file}: classes are interpreted as numbers of outputs: {meaning}"]
    return []


def compare_lists(train_file: str, val_file: str, classes: tuple[str, ...]) -> list[str]:
    """Return a warning if both lists name the same images.

    Raise UserError if most folders in the paths of numbered images have another number in the training list.
    """
    numbered = classes == tuple(map(str, range(len(classes))))
    if (not numbered or len(classes) == len(imagenet_classes())) and train_file != val_file:
        return []
    trained, found = read_list(train_file, "train"), read_list(val_file, "val")
    if trained == found:
        same = (
            f"warning: {val_file}: lists the same images for training; write a list per split, or a column "
        )
        return [f"{same}split; the validation error is that of training images"]
    numbers: dict[str, set[str]] = {}
    for path, name in zip(trained.paths, trained.names, strict=True):
        numbers.setdefault(posixpath.basename(posixpath.dirname(path)), set()).add(name)
    own = [numbers.get(posixpath.basename(posixpath.dirname(path)), set()) for path in found.paths]
    known = [i for i, names in enumerate(own) if len(names) == 1]  # a folder of several tells nothing
    different = [i for i in known if found.names[i] not in own[i]]
    if 2 * len(different) > len(known):
        i = different[0]
        raise UserError(
            f"{found.file}, line {found.lines[i]}: {found.paths[i]} has class {found.names[i]}, and in "
            f"{trained.file} its folder has {min(own[i])}; number the classes alike"
        )
    return []


def _words(path: str) -> Iterator[str]:
    """Yield what may tell the class of an image: its folder, its name, a WNID in its name."""
    yield from path.rsplit("/", 2)[-2:]
    yield from find_wnids(posixpath.basename(path))


def label_images(root: str, split: str, file: str, classes: tuple[str, ...]) -> ImageFolderDataset:
    """Return the images that a list names, even if they are missing.

    They are below root/split, root/split/images (tiny-imagenet), or root: where most of a sample are.
    """
    found = read_list(file, split)
    labels = output_labels(found, classes)
    notes = check_order(found, labels, classes)
    base = Path(os.fsdecode(to_bytes(root))).expanduser()
    if not base.is_dir():
        split_folder(root, split)  # raises
    paths = np.array([to_bytes(path) for path in found.paths], "S")
    sample = [os.fsdecode(path) for path in paths[even_indices(len(paths), 100)]]
    places = (base / split, base / split / "images", base)
    folder = max(places, key=lambda place: sum((place / path).exists() for path in sample))
    order = np.lexsort((paths, labels))
    return ImageFolderDataset(folder, paths[order], labels[order], classes, tuple(notes))


def missing(files: ImageFolderDataset) -> list[str]:
    """Return the missing files. Listing their folders is faster than asking for each."""
    present: dict[str, set[str]] = {}
    absent = []
    for i in range(len(files)):
        folder, name = os.path.split(files.path(i))
        if folder not in present:
            present[folder] = set(os.listdir(folder)) if os.path.isdir(folder) else set()
        if name not in present[folder]:
            absent.append(files.path(i))
    return absent


def load_list(
    data: DataConfig, split: str, classes: tuple[str, ...], wanted: Collection[int] | None = None
) -> ImageFolderDataset:
    """Return the images of data.train_list or data.val_list, as image_folder.list_set those of folders."""
    file, limit = getattr(data, f"{split}_list"), getattr(data, f"{split}_images")
    files = label_images(str(data.dir), split, file, classes)
    absent = missing(files)
    if absent:
        more = f" (and {len(absent) - 1:,} more, which scripts/check_data.py names)" if absent[1:] else ""
        raise UserError(f"{absent[0]}: is missing, but {file} names it{more}; correct --data or the list")
    notes = absent_classes(files.folder, files.labels, classes, wanted) if split == "val" else []
    keep = even_indices(len(files), limit)
    return replace(files, paths=files.paths[keep], labels=files.labels[keep], notes=(*files.notes, *notes))
