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

from . import shards
from .datasets import ImageDataset, load_set
from .image_folder import (
    ImageFolderDataset,
    class_folders,
    evaluated_folder,
    known_list,
    list_set,
    one_folder_too_many,
    read_set,
)
from .imagenet_archives import imagenet_classes
from .label_sets import LabelSets, ObjectNetFiles
from .lists import load_list, read_list, read_text
from .walk import to_bytes, to_text

MAX_SPLITS = 50
NO_DATA = "--data: is missing; give --data DIR with val/CLASS/*.jpg"


def read_classes(option: str, name: str) -> dict[str, int]:
    """Return class name → line of a file with one per line (# starts a comment), or class folders."""
    if os.path.isdir(name):
        return {folder: number for number, folder in enumerate(class_folders(Path(name)), 1)}
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
    data: DataConfig,
    info: Outputs,
    wanted: dict[str, int] | None,
    classes_file: str | None,
    sets: LabelSets | None = None,
) -> tuple[ImageDataset, Sequence[str], list[int] | None, list[str]]:
    """Load what evaluation scores; with `sets`, only images that have right outputs.

    Return (images, their names, the outputs that compete or None for all, warnings).
    """
    classes, notes, columns = info.classes, list[str](), None
    if sets:
        return load_labeled(data, info, sets)
    if classes is None:
        classes, notes = known_classes(data, info.outputs or 0, info.origin)
    if wanted:
        columns = find_columns(wanted, classes, f"--classes {classes_file}")
    val_set, names = load_val(data, classes, columns)
    notes = [*notes, *val_set.notes]
    if classes == imagenet_classes() and not columns and len(np.unique(val_set.labels)) < len(classes):
        text = "if this is ImageNet-A or -R, add --classes DIR: only the classes of its folders compete"
        notes.append(text)
    if columns:
        val_set, names = restrict(val_set, names, columns, f"--classes {classes_file}")
    return val_set, names, columns, notes


def load_labeled(
    data: DataConfig, info: Outputs, sets: LabelSets
) -> tuple[ImageDataset, Sequence[str], None, list[str]]:
    """Load the images with right outputs of an ImageNet test set, labeled with the first of these."""
    classes, option = imagenet_classes(), f"--real-labels {sets.source}"
    if info.outputs != len(classes) or info.classes not in (None, classes):
        raise UserError(
            f"{option}: numbers ImageNet's classes in the order of their WNIDs, and the network has others; "
            "give other weights, or name its outputs with --class-names data/imagenet_wnids.txt"
        )
    if sets.by_folder and data.dir:
        folder = evaluated_folder(data.dir)
        if not sets.outputs.keys() & set(class_folders(folder)) and (folder / "images").is_dir():
            raise UserError(f"{option}: --data has none of its folders; did you mean --data {folder}/images?")
        files = list_set(data.dir, "val", data.val_images, tuple(class_folders(folder)), folder=folder)
        val_set: ImageDataset = ObjectNetFiles(**vars(files))
        names: Sequence[str] = [to_text(path) for path in files.paths]
    else:
        val_set, names = load_val(data, classes)
    right = [sets.of(name) for name in names]
    labels = np.array([outputs[0] if outputs else -1 for outputs in right])
    part, kept = select(replace(val_set, classes=classes), names, labels, classes, option)
    note = f"{option}: {len(kept):,} of {len(names):,} images have right outputs and are scored"
    return part, kept, None, [*val_set.notes, note]


def known_classes(data: DataConfig, outputs: int, origin: str) -> tuple[tuple[str, ...], list[str]]:
    """Return names of the outputs for weights without names, ImageNet's or the data's, and warnings."""
    if data.dir is None:
        raise UserError(NO_DATA)
    if data.dataset not in IMAGE_FILES:
        return load_set(data, "val").classes, []
    wnids = imagenet_classes()
    if data.val_list:
        listed = read_list(data.val_list, "val")
        if listed.numbered:
            return wnids if outputs == len(wnids) else tuple(map(str, range(outputs))), []
        found = sorted(set(listed.names))
    elif data.dataset == "shards":
        found = list(shards.stored_classes(data.dir))
    else:
        val = evaluated_folder(data.dir)
        found, train = class_folders(val), val.with_name("train")
        if len(found) < outputs and train.is_dir() and set(found) < set(class_folders(train)):
            found = class_folders(train)  # val/ may lack classes
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
    files = load_list(data, "val", classes, wanted) if data.val_list else list_val(data, classes, wanted)
    val_set = read_set(files, data.image_size, data.max_pixels) if data.pipeline == "memory" else files
    return val_set, [to_text(path) for path in files.paths]


def list_val(
    data: DataConfig, classes: tuple[str, ...], wanted: Collection[int] | None
) -> ImageFolderDataset:
    """Return the images in class folders, of the network's classes or named by the numbers of its outputs."""
    root, sharded = str(data.dir), data.dataset == "shards"
    val = Path(root) if sharded else evaluated_folder(root)
    found = list(shards.stored_classes(root)) if sharded else class_folders(val)
    names, notes = classes, []
    if not set(found) <= set(classes):
        numbers = output_numbers(found, len(classes))
        inner = [] if sharded else class_folders(val / os.fsdecode(to_bytes(found[0])))
        if numbers is None or any(name.isdecimal() for name in classes) or set(inner) & set(classes):
            hint = f"did you mean --data {val / found[0]}?" if set(inner) & set(classes) else known_list(val)
            raise other_classes(
                root, found, classes, "" if sharded else one_folder_too_many(val, found) or hint
            )
        if classes != imagenet_classes():
            notes.append(
                f"warning: class folders 0…{len(classes) - 1} are interpreted as numbers of the network's "
                f"outputs, {abbreviate(classes)}"
            )
        names = tuple(numbers.get(output, str(output)) for output in range(len(classes)))
    if sharded:
        files = shards.list_set(root, "val", data.val_images, names, wanted=wanted)
        shards.check_wnids(classes, files.paths, files.labels, f"{root}: shards of val")
    else:
        files = list_set(root, "val", data.val_images, names, wanted=wanted, folder=val)
    return replace(files, classes=classes, notes=(*notes, *files.notes))


def other_classes(
    root: str | None, found: Collection[str], classes: Collection[str], hint: str = ""
) -> UserError:
    """Return the error for data whose classes are not the network's."""
    example = "".join(f", such as {name!r}" for name in sorted(set(found) - set(classes))[:1])
    hint = hint or "give the data of the run, or name another program's outputs with --class-names FILE"
    return UserError(
        f"--data {root}: its classes ({len(found)}) are not those that the network was trained on "
        f"({len(classes)}){example}; {hint}"
    )


def restrict(
    val_set: ImageDataset, names: Sequence[str], columns: list[int], option: str
) -> tuple[ImageDataset, Sequence[str]]:
    """Return the images of some classes, labeled among these, and their names."""
    position = np.full(len(val_set.classes), -1)
    position[columns] = np.arange(len(columns))
    classes = tuple(val_set.classes[column] for column in columns)
    return select(val_set, names, position[val_set.labels], classes, option)


def select(
    val_set: ImageDataset, names: Sequence[str], labels: np.ndarray, classes: tuple[str, ...], option: str
) -> tuple[ImageDataset, Sequence[str]]:
    """Return the images whose new label is not negative, and their names."""
    keep = np.flatnonzero(labels >= 0)
    if not len(keep):
        raise UserError(f"{option}: the data has no image of these classes; check --data")
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
