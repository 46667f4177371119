"""Parts of a validation set: some classes, named splits; and whether its classes are the network's."""

import csv
import difflib
import io
import os
import re
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from resnext.config import Data
from resnext.errors import UserError

from .folder import FileSet, list_set
from .images import ImageSet
from .sets import load_set

MAX_SPLITS = 50
IMAGENET_WNIDS = Path(__file__).with_name("imagenet_wnids.txt")  # in the order of the outputs

# ---------------------------------------------------------------------------- files that name parts


def read_text(option: str, name: str) -> str:
    """A text file; what is not UTF-8 comes out as it does in the names of files."""
    try:
        return Path(name).read_text(encoding="utf-8-sig", errors="surrogateescape")
    except OSError as error:
        raise UserError(f"{option} {name}: cannot be read ({error.strerror}); check the path") from None


def read_classes(name: str) -> dict[str, int]:
    """Class name → line of a file with one a line; # begins a comment."""
    wanted: dict[str, int] = {}
    for number, line in enumerate(read_text("--classes", name).split("\n"), 1):
        word = re.sub(r"(^|\s)#.*", "", line).strip()
        if word in wanted:
            raise UserError(
                f"--classes {name}, line {number}: {word[:80]!r} is on line {wanted[word]} too; keep one"
            )
        if word:
            wanted[word] = number
    if not wanted:
        raise UserError(f"--classes {name}: names no class; write one name a line")
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


def known_classes(data: Data, count: int) -> tuple[str, ...]:
    """The classes of a network whose file does not name them: ImageNet's wnids, or those of the data.

    All such programs number the sorted folder names.
    """
    if data.dir is None:
        raise UserError("--data: is missing; give --data DIR with val/CLASS/*.jpg")
    if data.dataset != "folder":
        return load_set(data, "val").classes
    val = Path(data.dir).expanduser() / "val"
    if not val.is_dir():
        raise UserError(f"--data {data.dir}: has no val/; it must hold val/CLASS/*.jpg")
    found = sorted(entry.name for entry in os.scandir(val) if entry.is_dir())
    wnids = tuple(IMAGENET_WNIDS.read_text().split())
    if count == len(wnids) and set(found) <= set(wnids):
        return wnids
    if len(found) != count:
        raise UserError(
            f"--data {data.dir}: val/ has {len(found)} classes and the network {count}, which its file does "
            "not name; give all that it was trained on"
        )
    return tuple(found)


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


def load_val(data: Data, classes: tuple[str, ...], partial: bool) -> ImageSet | FileSet:
    """The validation set with the network's classes; `partial`: some may have no pictures."""
    if data.dataset == "folder" and data.dir is not None:
        check_folders(data.dir, classes, partial)
    val_set = load_set(data, "val", classes)
    if val_set.classes != classes:
        raise other_classes(data.dir, val_set.classes, classes)
    return val_set


def check_folders(root: str, classes: tuple[str, ...], partial: bool) -> None:
    """Whether the class folders of val/ are the network's; it needs no train/."""
    base = Path(root).expanduser()
    if not base.is_dir():
        raise UserError(f"data.dir {base}: no such folder; give --data DIR with val/CLASS/*.jpg")
    if not (base / "val").is_dir():
        raise UserError(f"data.dir {base}: has no val/; it must hold val/CLASS/*.jpg")
    found = {entry.name for entry in os.scandir(base / "val") if entry.is_dir()}
    if not found <= set(classes):
        raise other_classes(root, found, classes)
    missing = sorted(set(classes) - found)
    if found and missing and not partial:
        raise UserError(
            f"--data {root}: val/ has no {missing[0]!r} and lacks {len(missing)} of the network's "
            f"{len(classes)} classes; complete it, or name those to score with --classes FILE"
        )


def other_classes(root: str | None, found: Collection[str], classes: Collection[str]) -> UserError:
    example = "".join(f", such as {name!r}" for name in sorted(set(found) - set(classes))[:1])
    return UserError(
        f"--data {root}: its classes ({len(found)}) are not those that the network was trained on "
        f"({len(classes)}){example}; give the data of the run"
    )


def picture_names(data: Data, val_set: ImageSet | FileSet) -> Sequence[str]:
    """Paths below val/, or numbers where there are no files."""
    if data.dataset != "folder":
        return list(map(str, range(len(val_set))))
    if not isinstance(val_set, FileSet):  # read into memory from the same list
        val_set = list_set(data.dir, "val", data.val_images, val_set.classes)
    return [os.fsdecode(path) for path in val_set.paths]


def restrict(
    val_set: ImageSet | FileSet, names: Sequence[str], columns: list[int], classes_file: str
) -> tuple[ImageSet | FileSet, Sequence[str]]:
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
