"""Parts of a validation set: some classes, named splits; and whether its classes are the network's."""

import csv
import difflib
import io
import os
import re
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from resnext.classes import abbreviate, name_outputs, output_numbers
from resnext.config import DataConfig
from resnext.errors import UserError

from .datasets import load_set
from .image_folder import (
    ImageFolderDataset,
    class_folders,
    list_set,
    one_folder_too_many,
    read_set,
    split_folder,
)
from .in_memory import ArrayDataset
from .walk import to_text

MAX_SPLITS = 50
IMAGENET_WNIDS = Path(__file__).with_name("imagenet_wnids.txt")  # in the order of the outputs

# ---------------------------------------------------------------------------- files that name parts


def read_text(option: str, name: str) -> str:
    """A text file; what is not UTF-8 comes out as it does in the names of files."""
    try:
        return Path(name).read_text(encoding="utf-8-sig", errors="surrogateescape")
    except OSError as error:
        raise UserError(f"{option} {name}: cannot be read ({error.strerror}); check the path") from None


def read_classes(option: str, name: str) -> dict[str, int]:
    """Class name → line of a file with one a line; # begins a comment."""
    wanted: dict[str, int] = {}
    for number, line in enumerate(read_text(option, name).split("\n"), 1):
        word = re.sub(r"(^|\s)#.*", "", line).strip()
        if word in wanted:
            raise UserError(
                f"{option} {name}, line {number}: {word[:80]!r} is on line {wanted[word]} too; keep one"
            )
        if word:
            wanted[word] = number
    if not wanted:
        raise UserError(f"{option} {name}: names no class; write one name a line")
    return wanted


def read_splits(name: str) -> list[tuple[int, str, str]]:
    """(line, path, split) of a CSV file with the header path,split; more columns are ignored."""
    where = f"--splits {name}"
    reader = csv.reader(io.StringIO(read_text("--splits", name)), strict=True)
    rows: list[tuple[int, str, str]] = []
    try:
        header = [cell.strip() for cell in next(reader, [])]
        if not {"path", "split"} <= set(header):
            raise UserError(f"{where}: the first line must be path,split, not {','.join(header)[:80]!r}")
        path_at, split_at = header.index("path"), header.index("split")
        for row in reader:
            if not row:
                continue
            line = reader.line_num
            path, split = row[path_at].strip(), row[split_at].strip()
            if not path or not split or split == "all" or len(split) > 40:
                raise UserError(
                    f"{where}, line {line}: needs a path and the short name of a split (all is taken), not "
                    f"{','.join(row)[:80]!r}"
                )
            rows.append((line, path, split))
    except (csv.Error, IndexError) as error:
        reason = "too few columns" if isinstance(error, IndexError) else error
        raise UserError(f"{where}, line {reader.line_num}: {reason}; write path,split") from None
    if not rows:
        raise UserError(f"{where}: names no picture; write a line path,split for each")
    if len({split for *_, split in rows}) > MAX_SPLITS:
        raise UserError(f"{where}: has more than {MAX_SPLITS} splits; are the columns exchanged?")
    return rows


# ---------------------------------------------------------------------------- the pictures


def imagenet_classes() -> tuple[str, ...]:
    """ImageNet's wnids in the order of the outputs."""
    return tuple(IMAGENET_WNIDS.read_text().split())


def known_classes(data: DataConfig, outputs: int, origin: str) -> tuple[tuple[str, ...], list[str]]:
    """(classes of a network whose file does not name them, warnings): ImageNet's, or those of the data."""
    if data.dir is None:
        raise UserError("--data: is missing; give --data DIR with val/CLASS/*.jpg")
    if data.dataset != "folder":
        return load_set(data, "val").classes, []
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
        raise UserError(
            f"--data {data.dir}: val/: {error}; or name the classes in the order of the outputs with "
            "--class-names FILE"
        ) from None


def find_columns(wanted: dict[str, int], classes: Sequence[str], name: str) -> list[int]:
    """The network's outputs for the wanted classes, ascending."""
    known = {known: column for column, known in enumerate(classes)}
    for word, line in wanted.items():
        if word not in known:
            words = (word[:200], word.split()[0][:200])  # "n01440764 tench" is often seen
            close = [c for w in words for c in difflib.get_close_matches(w, classes, n=1)]
            hint = f"did you mean {close[-1]!r}?" if close else f"the first that it knows is {classes[0]!r}"
            raise UserError(f"--classes {name}, line {line}: {word[:80]!r} is unknown to the network; {hint}")
    return sorted(known[word] for word in wanted)


def load_val(
    data: DataConfig, classes: tuple[str, ...], wanted: Collection[int] | None = None
) -> tuple[ArrayDataset | ImageFolderDataset, Sequence[str]]:
    """(the validation set with the network's classes, names of its pictures).

    Classes, or the `wanted` among them, without pictures are a warning. Folders called 0…N-1, as
    ImageNet-V2's, are the network's outputs. Names are paths below val/, or numbers where there are no files.
    """
    if data.dataset != "folder":
        val_set = load_set(data, "val", classes)
        if val_set.classes != classes:
            raise other_classes(data.dir, val_set.classes, classes)
        return val_set, list(map(str, range(len(val_set))))
    if data.dir is None:
        raise UserError("--data: is missing; give --data DIR with val/CLASS/*.jpg")
    val = split_folder(data.dir, "val")
    found = class_folders(val)
    names, notes = classes, []
    if not set(found) <= set(classes):
        numbers = output_numbers(found, len(classes))
        if numbers is None or any(name.isdecimal() for name in classes):
            raise other_classes(data.dir, found, classes, one_folder_too_many(val, found))
        if classes != imagenet_classes():
            notes.append(
                f"warning: class folders 0…{len(classes) - 1} are taken for the numbers of the network's "
                f"outputs, {abbreviate(classes)}"
            )
        names = tuple(numbers.get(output, str(output)) for output in range(len(classes)))
    files = list_set(data.dir, "val", data.val_images, names, wanted=wanted)
    val_set = read_set(files, data.image_size, data.max_pixels) if data.pipeline == "memory" else files
    val_set = replace(val_set, classes=classes, notes=(*notes, *val_set.notes))
    return val_set, [to_text(path) for path in files.paths]


def other_classes(
    root: str | None, found: Collection[str], classes: Collection[str], hint: str = ""
) -> UserError:
    example = "".join(f", such as {name!r}" for name in sorted(set(found) - set(classes))[:1])
    return UserError(
        f"--data {root}: its classes ({len(found)}) are not those that the network was trained on "
        f"({len(classes)}){example}; {hint or 'give the data of the run'}"
    )


def restrict(
    val_set: ArrayDataset | ImageFolderDataset, names: Sequence[str], columns: list[int], classes_file: str
) -> tuple[ArrayDataset | ImageFolderDataset, Sequence[str]]:
    """The pictures of some classes, labelled among these, and their names."""
    position = np.full(len(val_set.classes), -1)
    position[columns] = np.arange(len(columns))
    labels = position[val_set.labels]
    keep = np.flatnonzero(labels >= 0)
    if not len(keep):
        raise UserError(f"--classes {classes_file}: the data has no picture of these classes; check --data")
    pictures = "images" if hasattr(val_set, "images") else "paths"
    return replace(
        val_set,
        labels=labels[keep],
        classes=tuple(val_set.classes[column] for column in columns),
        **{pictures: getattr(val_set, pictures)[keep]},
    ), [names[i] for i in keep]


def find_members(
    splits: list[tuple[int, str, str]], names: Sequence[str], splits_file: str
) -> dict[str, list[int]]:
    """Split → numbers of its pictures; a picture may be in several. Lines of others are passed over."""
    numbers: dict[str, int | None] = {}
    for number, name in enumerate(names):
        base = os.path.basename(name)
        numbers[base] = None if base in numbers else number  # None: not the only one
    numbers |= {name: number for number, name in enumerate(names)}
    members: dict[str, dict[int, int]] = {}
    for line, path, split in splits:
        if path not in numbers:
            continue
        number = numbers[path]
        if number is None:
            raise UserError(
                f"--splits {splits_file}, line {line}: there are several {path[:80]!r}; "
                "write their paths below val/, CLASS/NAME"
            )
        first = members.setdefault(split, {}).setdefault(number, line)
        if first != line:
            raise UserError(
                f"--splits {splits_file}, line {line}: {path[:80]!r} is in {split!r} since line {first}; "
                "keep one"
            )
    if not members:
        raise UserError(
            f"--splits {splits_file}: none of its {len(splits)} pictures, such as {splits[0][1][:80]!r}, is "
            f"scored; write the paths below val/, such as {names[0][-80:]!r}"
        )
    return {split: sorted(found) for split, found in members.items()}


def load_scored(
    info: Any, wanted: dict[str, int] | None, classes_file: str | None
) -> tuple[ArrayDataset | ImageFolderDataset, list[str], list[int] | None, list[str]]:
    """(the pictures to score, their names, the outputs that compete or None for all, warnings)."""
    data, classes, notes, columns = info.config.data, info.classes, [], None
    if classes is None:
        classes, notes = known_classes(data, info.outputs, info.origin)
    if wanted:
        columns = find_columns(wanted, classes, classes_file)
    val_set, names = load_val(data, classes, columns)
    notes = [*notes, *val_set.notes]
    if columns:
        val_set, names = restrict(val_set, names, columns, classes_file)
    return val_set, names, columns, notes
