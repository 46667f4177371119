"""Parts of a validation set: some classes, named splits. Also checks that its classes are the network's."""

import csv
import difflib
import io
import os
import re
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import numpy as np

from resnext.classes import abbreviate, name_outputs, output_numbers
from resnext.config import IMAGE_FILES, DataConfig
from resnext.errors import UserError

from . import image_folder, shards
from .datasets import ImageDataset, load_set
from .image_folder import class_folders, one_folder_too_many, read_set, split_folder
from .imagenet_archives import imagenet_classes
from .walk import to_text

MAX_SPLITS = 50
NO_DATA = "--data: is missing; give --data DIR with val/CLASS/*.jpg"


def read_text(option: str, name: str) -> str:
    """Return a text file; bytes that are not UTF-8 are decoded as in file names."""
    try:
        return Path(name).read_text(encoding="utf-8-sig", errors="surrogateescape")
    except OSError as error:
        raise UserError(f"{option} {name}: cannot be read ({error.strerror}); check the path") from None


def read_classes(option: str, name: str) -> dict[str, int]:
    """Read a file with one class per line; # starts a comment. Return class name → line."""
    wanted: dict[str, int] = {}
    for number, line in enumerate(read_text(option, name).split("\n"), 1):
        word = re.sub(r"(^|\s)#.*", "", line).strip()
        if word in wanted:
            where = f"{option} {name}, line {number}"
            raise UserError(f"{where}: {word[:80]!r} is also on line {wanted[word]}; keep one")
        if word:
            wanted[word] = number
    if not wanted:
        raise UserError(f"{option} {name}: names no class; write one name per line")
    return wanted


def read_splits(name: str) -> list[tuple[int, str, str]]:
    """Read a CSV file with the header path,split; other columns are ignored. Return (line, path, split)s."""
    where = f"--splits {name}"
    reader = csv.DictReader(io.StringIO(read_text("--splits", name)), strict=True, restval="")
    rows: list[tuple[int, str, str]] = []
    try:
        reader.fieldnames = header = [cell.strip() for cell in reader.fieldnames or ()]
        if not {"path", "split"} <= set(header):
            raise UserError(f"{where}: the first line must be path,split (got {','.join(header)[:80]!r})")
        for row in reader:
            path, split = row["path"].strip(), row["split"].strip()
            if not path or not split or split == "all" or len(split) > 40:
                raise UserError(
                    f"{where}, line {reader.line_num}: needs a path and a short split name other than 'all' "
                    f"(got {path[:80]!r}, {split[:80]!r}); write path,split"
                )
            rows.append((reader.line_num, path, split))
    except csv.Error as error:
        raise UserError(f"{where}, line {reader.reader.line_num}: {error}; write path,split") from None
    if not rows:
        raise UserError(f"{where}: names no image; write a line path,split for each")
    if len({split for *_, split in rows}) > MAX_SPLITS:
        raise UserError(f"{where}: has more than {MAX_SPLITS} splits; check the order of its columns")
    return rows


class Outputs(Protocol):
    """What is known of a network's outputs; a weights.load.WeightsInfo."""

    @property
    def classes(self) -> tuple[str, ...] | None: ...
    @property
    def outputs(self) -> int | None: ...
    @property
    def origin(self) -> str: ...


def load_scored(
    data: DataConfig, info: Outputs, wanted: dict[str, int] | None, classes_file: str | None
) -> tuple[ImageDataset, Sequence[str], list[int] | None, list[str]]:
    """Load what evaluation scores.

    Return (images, their names, the outputs that compete or None for all, warnings).
    """
    classes, notes, columns = info.classes, list[str](), None
    if classes is None:
        classes, notes = known_classes(data, info.outputs or 0, info.origin)
    if wanted:
        columns = find_columns(wanted, classes, f"--classes {classes_file}")
    val_set, names = load_val(data, classes, columns)
    notes = [*notes, *val_set.notes]
    if columns:
        val_set, names = restrict(val_set, names, columns, f"--classes {classes_file}")
    return val_set, names, columns, notes


def known_classes(data: DataConfig, outputs: int, origin: str) -> tuple[tuple[str, ...], list[str]]:
    """Return names of the outputs for weights without names, ImageNet's or the data's, and warnings."""
    if data.dir is None:
        raise UserError(NO_DATA)
    if data.dataset not in IMAGE_FILES:
        return load_set(data, "val").classes, []
    if data.dataset == "shards":
        found = list(shards.stored_classes(data.dir))
    else:
        val = split_folder(data.dir, "val")
        found, train = class_folders(val), val.with_name("train")
        if len(found) < outputs and train.is_dir() and set(found) < set(class_folders(train)):
            found = class_folders(train)  # val/ may lack classes
    wnids = imagenet_classes()
    numbered = output_numbers(found, outputs) is not None and data.class_order is None
    if outputs == len(wnids) and (numbered or set(found) <= set(wnids)):
        return wnids, []
    try:
        return name_outputs(found, outputs, origin, data.class_order, "--class-order ")
    except UserError as error:
        remedy = "or name the classes in the order of the outputs with --class-names FILE"
        raise UserError(f"--data {data.dir}: val/: {error}; {remedy}") from None


def find_columns(wanted: dict[str, int], classes: Sequence[str], option: str) -> list[int]:
    """Return the network's outputs for the wanted classes, ascending."""
    columns = {name: column for column, name in enumerate(classes)}
    for word, line in wanted.items():
        if word not in columns:
            words = (word[:200], word.split()[0][:200])  # "n01440764 tench" is common
            close = [c for w in words for c in difflib.get_close_matches(w, classes, n=1)]
            hint = f"did you mean {close[-1]!r}?" if close else f"its first class is {classes[0]!r}"
            raise UserError(f"{option}, line {line}: {word[:80]!r} is unknown to the network; {hint}")
    return sorted(columns[word] for word in wanted)


def load_val(
    data: DataConfig, classes: tuple[str, ...], wanted: Collection[int] | None = None
) -> tuple[ImageDataset, Sequence[str]]:
    """Load the validation set with the network's classes. Return it and the names of its images.

    Classes, or the `wanted` outputs, without images cause a warning. Folders named 0…N-1, as in
    ImageNet-V2, are the network's outputs. Names are paths below val/, or numbers if there are no files.
    """
    if data.dataset not in IMAGE_FILES:
        val_set = load_set(data, "val", classes)
        if val_set.classes != classes:
            raise other_classes(data.dir, val_set.classes, classes)
        return val_set, list(map(str, range(len(val_set))))
    if data.dir is None:
        raise UserError(NO_DATA)
    if data.dataset == "shards":
        found, hint = list(shards.stored_classes(data.dir)), ""
    else:
        val = split_folder(data.dir, "val")
        found = class_folders(val)
        hint = one_folder_too_many(val, found)
    names, notes = classes, []
    if not set(found) <= set(classes):
        numbers = output_numbers(found, len(classes))
        if numbers is None or any(name.isdecimal() for name in classes):
            raise other_classes(data.dir, found, classes, hint)
        if classes != imagenet_classes():
            notes.append(
                f"warning: class folders 0…{len(classes) - 1} are interpreted as numbers of the network's "
                f"outputs, {abbreviate(classes)}"
            )
        names = tuple(numbers.get(output, str(output)) for output in range(len(classes)))
    list_set = shards.list_set if data.dataset == "shards" else image_folder.list_set
    files = list_set(data.dir, "val", data.val_images, names, wanted=wanted)
    val_set = read_set(files, data.image_size, data.max_pixels) if data.pipeline == "memory" else files
    val_set = replace(val_set, classes=classes, notes=(*notes, *val_set.notes))
    return val_set, [to_text(path) for path in files.paths]


def other_classes(
    root: str | None, found: Collection[str], classes: Collection[str], hint: str = ""
) -> UserError:
    """Return the error for data whose classes are not the network's."""
    example = "".join(f", such as {name!r}" for name in sorted(set(found) - set(classes))[:1])
    return UserError(
        f"--data {root}: its classes ({len(found)}) are not those that the network was trained on "
        f"({len(classes)}){example}; {hint or 'give the data of the run'}"
    )


def restrict(
    val_set: ImageDataset, names: Sequence[str], columns: list[int], option: str
) -> tuple[ImageDataset, Sequence[str]]:
    """Return the images of some classes, labeled among these, and their names."""
    position = np.full(len(val_set.classes), -1)
    position[columns] = np.arange(len(columns))
    labels = position[val_set.labels]
    keep = np.flatnonzero(labels >= 0)
    if not len(keep):
        raise UserError(f"{option}: the data has no image of these classes; check --data")
    classes = tuple(val_set.classes[column] for column in columns)
    part = replace(val_set.select(keep), labels=labels[keep], classes=classes)
    return part, [names[i] for i in keep.tolist()]


def find_members(
    splits: list[tuple[int, str, str]], names: Sequence[str], splits_file: str
) -> dict[str, list[int]]:
    """Return split → numbers of its images, which may be in several. Skip lines of other images."""
    numbers: dict[str, int | None] = {}
    for number, name in enumerate(names):
        base = os.path.basename(name)
        numbers[base] = None if base in numbers else number  # None: ambiguous
    numbers |= {name: number for number, name in enumerate(names)}
    members: dict[str, dict[int, int]] = {}
    for line, path, split in splits:
        where = f"--splits {splits_file}, line {line}: {path[:80]!r}"
        if path not in numbers:
            continue
        image = numbers[path]
        if image is None:
            raise UserError(f"{where} is the name of several images; write paths below val/, CLASS/NAME")
        first = members.setdefault(split, {}).setdefault(image, line)
        if first != line:
            raise UserError(f"{where} is also in {split!r} on line {first}; keep one")
    if not members:
        raise UserError(
            f"--splits {splits_file}: none of its {len(splits)} images, such as {splits[0][1][:80]!r}, is "
            f"scored; write paths below val/, such as {names[0][-80:]!r}"
        )
    return {split: sorted(found) for split, found in members.items()}
