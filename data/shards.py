"""Tar shards (WebDataset's convention) as a dataset that behaves like the class folders of the same images.

The headers of all shards are read once, and the places of the images cached. Images are then read one by
one, in any order. Their order, names, and fingerprint are those of class folders, and so is every batch.
"""

import codecs
import json
import os
import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import KW_ONLY, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Self

import numpy as np

from resnext.classes import abbreviate, sort_classes
from resnext.errors import UserError

from .file_list_cache import Arrays, cached, remember
from .image_folder import OTHER_NAMES, ImageFolderDataset, absent_classes, class_folders
from .imagenet_archives import COPY, TRAIN, VAL, WNID, imagenet_classes
from .in_memory import even_indices
from .process_pool import process_pool, progress
from .tar_samples import read_samples
from .walk import is_hidden, to_bytes, to_text

PLACE = np.dtype([("shard", "u4"), ("offset", "u8"), ("size", "u4")])
WORDS = {split: (split, *names) for split, names in OTHER_NAMES.items()}
LARGE = 1 << 32  # bytes of shards that are indexed by several processes
OPEN = 256  # shards that a process keeps open
EXAMPLE = "train-0000.tar and val-0000.tar, or train/0000.tar and val/0000.tar"


@dataclass(frozen=True)
class ShardDataset(ImageFolderDataset):
    """Images in tar shards: paths as in class folders, the shards, and the place of each image in them."""

    _: KW_ONLY
    shards: tuple[str, ...]
    places: np.ndarray  # PLACE (N,)

    def path(self, i: int) -> str:
        """Return the shard and the name of image i, for messages."""
        return f"{self.shards[self.places[i]['shard']]}: {to_text(self.paths[i])}"

    def read(self, i: int, largest: int | None = None) -> bytes:
        """Return the content of image i. Raise UserError if it cannot be read."""
        shard, offset, size = self.places[i].item()
        try:
            opened = _opened(self.shards[shard])  # a name keeps it open until pread returns
            content = os.pread(opened.descriptor, size, offset)
        except OSError as error:
            raise UserError(f"{self.path(i)}: cannot be read ({error.strerror})") from None
        if len(content) < size:
            raise UserError(f"{self.path(i)}: the shard is cut off; {COPY}")
        return content

    def select(self, keep: np.ndarray) -> Self:
        """Return the images of these numbers."""
        return replace(super().select(keep), places=self.places[keep])


class _Opened:
    """A shard that stays open until nothing uses it. Forked workers can share it: pread has no position."""

    def __init__(self, descriptor: int):
        self.descriptor = descriptor

    def __del__(self) -> None:
        os.close(self.descriptor)


@lru_cache(OPEN)
def _opened(path: str) -> _Opened:
    return _Opened(os.open(path, os.O_RDONLY | os.O_CLOEXEC))


# ---------------------------------------------------------------------------- which files are shards


def expand_braces(pattern: str) -> list[str]:
    """Return the names that a pattern stands for: x{0000..1023}, x{a,b}, also one inside the other."""
    before, brace, rest = pattern.partition("{")
    if not brace:
        return [pattern]
    parts, depth = [""], 1
    for letter in rest:
        depth += (letter == "{") - (letter == "}")
        if not depth:
            break
        if letter == "," and depth == 1:
            parts.append("")
        else:
            parts[-1] += letter
    ends = expand_braces(rest[len(",".join(parts)) + 1 :])
    span = re.fullmatch(r"([0-9]{1,7})\.\.([0-9]{1,7})", ",".join(parts))
    if span:
        parts = [f"{number:0{len(span[1])}}" for number in range(int(span[1]), int(span[2]) + 1)]
    if depth or len(parts) < 2:
        raise UserError(f"data.dir {pattern}: has braces without alternatives; write {{00..09}} or {{a,b}}")
    return [before + middle + last for part in parts for middle in expand_braces(part) for last in ends]


def split_files(root: str, suffix: str = ".tar", depth: int = 2) -> dict[str, list[Path]]:
    """Return the files of train and val in a folder, down to `depth` levels, or of a pattern, sorted by name.

    A word in its own name, or else in that of its folder, says which split a file belongs to: train, val, or
    what other people call these. Raise UserError if files of a pattern do not exist.
    """
    base = Path(os.path.abspath(Path(os.fsdecode(to_bytes(root))).expanduser()))
    if base.is_dir():
        patterns = ["*/" * level + f"*{suffix}" for level in range(depth)]
        found = [path for pattern in patterns for path in base.glob(pattern) if path.is_file()]
        files = sorted(path for path in found if not is_hidden(os.fsencode(path.name)))
    else:
        files = sorted(map(Path, expand_braces(str(base))))
        missing = [path for path in files if not path.is_file()]
        if missing:
            more = f" ({len(missing):,} of {len(files):,} files are missing)" if files[1:] else ""
            raise UserError(
                f"data.dir {root}: {missing[0]} does not exist{more}; name a local folder, or local files as "
                "in 'x-{train,val}-{000..099}.tar'"
            )
    words: dict[str, list[Path]] = {}
    for path in files:
        words.setdefault(_split_word(path), []).append(path)
    return {
        split: next((words[name] for name in names if name in words), []) for split, names in WORDS.items()
    }


def _split_word(path: Path) -> str:
    """Return the word that names the split of a file, or ""."""
    tokens = [token for name in (path.stem, path.parent.name) for token in re.split("[^a-z]+", name.lower())]
    return next((token for token in tokens if any(token in names for names in WORDS.values())), "")


def is_sharded(root: str) -> bool:
    """Return whether a folder has shards, and no class folders, or a name is a pattern of shards."""
    base = Path(os.fsdecode(to_bytes(root))).expanduser()
    if not base.is_dir():
        return "{" in root or root.endswith(".tar")
    val = base / "val"
    images = val.is_dir() and (class_folders(val) or not any(val.glob("*.tar")))
    return not images and any(split_files(root).values())


def find_shards(root: str, split: str) -> list[Path]:
    """Return the shards of a split. Raise UserError if there are none, or _info.json lists others too."""
    shards = split_files(root)[split]
    if not shards:
        compressed = [path for ending in (".tar.gz", ".tgz") for path in split_files(root, ending)[split]]
        remedy = f"decompress {compressed[0].name} (gunzip)" if compressed else f"name them {EXAMPLE}"
        folder = Path(root).expanduser() / split
        if folder.is_dir() and class_folders(folder):
            remedy = "for class folders, set data.dataset=folder"
        raise UserError(f"data.dir {root}: has no shards of {split}; {remedy}")
    if shards[0].name in (TRAIN, VAL):
        raise UserError(f"{shards[0]}: is ImageNet's archive; unpack it with scripts/prepare_imagenet.py")
    missing = [path for path in _listed(shards) if not path.is_file()]
    if missing and "{" not in root:
        raise UserError(
            f"{_home(shards) / '_info.json'}: lists {missing[0].name}, which does not exist (missing files: "
            f"{len(missing):,}); add it, or name the files in a pattern"
        )
    return shards


def _home(shards: Sequence[Path]) -> Path:
    """Return the folder of the files about all shards: theirs, or the one with train/ and val/."""
    folder = shards[0].parent
    return folder.parent if any(folder.name.lower() in names for names in WORDS.values()) else folder


def _listed(shards: Sequence[Path]) -> list[Path]:
    """Return the shards of the same split in _info.json, which timm's datasets and make_shards.py have."""
    try:
        splits = json.loads((_home(shards) / "_info.json").read_bytes())["splits"].values()
        lists = [[_home(shards) / name for name in split["filenames"]] for split in splits]
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return []
    return next((paths for paths in lists if shards[0] in paths), [])


# ---------------------------------------------------------------------------- what they contain


def read_index(root: str, split: str) -> tuple[tuple[str, ...], Arrays]:
    """Return (shards of a split, arrays about its images, sorted by label and name), from the cache if valid.

    The arrays are "names", bytes below the class folders, "labels", int64, and "places".
    """
    paths = find_shards(root, split)
    shards, names = tuple(map(str, paths)), tuple("/".join(path.parts[-2:]) for path in paths)
    entry = Path(os.fsdecode(to_bytes(root))) / f"shards of {split}"
    known = cached(entry, names, ("names", "labels", "places"))
    if known is None:
        changed = {os.fsencode(shard): os.stat(shard).st_mtime_ns for shard in shards}  # before it is read
        known = _join(shards, list(_read_all(shards)))
        remember(entry, names, known, changed)
    return shards, known


def _read_all(shards: Sequence[str]) -> Iterator[Arrays]:
    """Yield the arrays of each shard."""
    if sum(map(os.path.getsize, shards)) < LARGE:
        yield from map(_read, shards)
        return
    with (
        process_pool(len(os.sched_getaffinity(0))) as pool,
        progress("indexing", len(shards), " shards") as bar,
    ):
        for arrays in pool.map(_read, shards):
            yield arrays
            bar.update()


def _read(shard: str) -> Arrays:
    samples = read_samples(shard)
    places = np.array([(0, sample.offset, sample.size) for sample in samples], PLACE)
    labels = np.array([sample.label for sample in samples], np.int64)
    return {"names": np.array([sample.name for sample in samples], "S"), "labels": labels, "places": places}


def _join(shards: Sequence[str], parts: list[Arrays]) -> Arrays:
    """Return the arrays of all shards as one, sorted by label and name. Raise UserError if names repeat."""
    if not any(len(part["labels"]) for part in parts):
        raise UserError(f"{shards[0]}: has no images with labels, and no other shard of the split has any")
    for number, part in enumerate(parts):
        part["places"]["shard"] = number
    arrays = _sorted(parts)
    if _repeated(arrays):  # many programs number the images of each shard from 0
        for shard, part in zip(shards, parts, strict=True):
            part["names"] = np.char.add(to_bytes(Path(shard).stem) + b"/", part["names"])
        arrays = _sorted(parts)
    for name in _repeated(arrays)[:1]:
        raise UserError(f"{shards[0]}, …: two images are {to_text(name)} with one label; remove one of them")
    return arrays


def _sorted(parts: list[Arrays]) -> Arrays:
    arrays = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    order = np.lexsort((arrays["names"], arrays["labels"]))
    return {name: array[order] for name, array in arrays.items()}


def _repeated(arrays: Arrays) -> list[bytes]:
    """Return the names that images of one label share."""
    names, labels = arrays["names"], arrays["labels"]
    return names[1:][(names[1:] == names[:-1]) & (labels[1:] == labels[:-1])].tolist()


def stored_classes(root: str) -> tuple[str, ...]:
    """Return the names of the classes 0, 1, … of shards: classes.txt, ImageNet's wnids, or their numbers."""
    splits = [split for split, shards in split_files(root).items() if shards] or ["train"]
    file = _home(find_shards(root, splits[0])) / "classes.txt"
    if file.exists():
        text = to_text(file.read_bytes().removeprefix(codecs.BOM_UTF8)).replace("\r", "")
        names = tuple(text.rstrip("\n").split("\n"))
        if len(set(names)) < len(names) or not all(names):
            raise UserError(
                f"{file}: has a class twice, or an empty line; write one name per line, in the order of the "
                "labels"
            )
        return names
    _, arrays = read_index(root, splits[0])
    return class_labels(int(arrays["labels"][-1]) + 1, arrays["names"], arrays["labels"], root)


def _wnids(names: np.ndarray, labels: np.ndarray) -> list[tuple[list[str], int]]:
    """Return the wnids in the names of up to 10,000 images, and the labels of these."""
    some = even_indices(len(names), 10_000).tolist()
    pattern = re.compile(rf"(?<![a-z0-9]){WNID}(?![0-9])")
    found = ((pattern.findall(to_text(names[i])), int(labels[i])) for i in some)
    return [(words, label) for words, label in found if words]


def check_wnids(classes: Sequence[str], names: np.ndarray, labels: np.ndarray, where: str) -> None:
    """Raise UserError if most images with the wnid of a class in their names have another label."""
    known = set(classes)
    found = [(words, classes[label]) for words, label in _wnids(names, labels) if known & set(words)]
    different = [(words[0], name) for words, name in found if name not in words]
    if 2 * len(different) > len(found):
        wnid, name = different[0]
        raise UserError(
            f"{where}: an image of {wnid} has the label of {name!r}; write classes.txt in the order of the "
            "labels"
        )


def class_labels(count: int, names: np.ndarray, labels: np.ndarray, where: str) -> tuple[str, ...]:
    """Return the wnids in the names of images, one per label, else the numbers of `count` classes.

    Raise UserError if the labels are other numbers than those of ImageNet's 1000 sorted wnids.
    """
    wnids, found = imagenet_classes(), _wnids(names, labels)
    if count != len(wnids):
        own = {label: words[0] for words, label in found}
        same = all(words == [own[label]] for words, label in found)
        if same and len(set(own.values())) == count:
            return tuple(own[label] for label in range(count))
        return tuple(map(str, range(count)))
    for words, label in found:
        if wnids[label] not in words:
            raise UserError(
                f"{where}: an image of {words[0]} has label {label}, not the number among the sorted wnids; "
                "name the classes in the order of the labels in classes.txt, one per line"
            )
    return wnids if found else tuple(map(str, range(count)))


# ---------------------------------------------------------------------------- as class folders


def class_names(root: str, order: str | None = None) -> tuple[str, ...]:
    """Return the classes in the order of their labels, or in one of resnext/classes.py."""
    names = stored_classes(root)
    if len(names) < 2:
        raise UserError(f"data.dir {root}: has one class, {names[0]!r} (expected at least two); add images")
    return sort_classes(names, order) if order else names


def list_set(
    root: str,
    split: str,
    limit: int | None = None,
    classes: tuple[str, ...] | None = None,
    order: str | None = None,
    wanted: Collection[int] | None = None,
) -> ImageFolderDataset:
    """Return what image_folder.list_set returns for the class folders of the same images."""
    stored = stored_classes(root)
    classes = classes or class_names(root, order)
    shards, arrays = read_index(root, split)
    names, labels, places = arrays["names"], arrays["labels"], arrays["places"]
    where = f"{root}: shards of {split}"
    if labels[-1] >= len(stored):
        raise UserError(
            f"{where}: have label {labels[-1]}, and there are {len(stored)} classes; number the labels from "
            "0, in the order of the classes"
        )
    check_wnids(stored, names, labels, where)
    position = {name: number for number, name in enumerate(classes)}
    unknown = [stored[label] for label in np.unique(labels) if stored[label] not in position]
    if unknown:
        raise UserError(f"{where}: class {unknown[0]!r} is not in train; use the same classes in both")
    folders = np.array([to_bytes(f"{name}/") for name in stored], "S")
    paths = np.char.add(folders[labels], names)
    paths = paths.astype(f"S{np.char.str_len(paths).max()}")  # the type of a folder's list
    labels = np.array([position.get(name, -1) for name in stored])[labels]
    by_class = np.argsort(labels, kind="stable")
    paths, labels, places = paths[by_class], labels[by_class], places[by_class]
    notes = absent_classes(Path(where), labels, classes, wanted) if split == "val" else []
    empty = [classes[n] for n in np.setdiff1d(np.arange(len(classes)), labels)]
    if split == "train" and empty:
        remedy = "number the labels from 0" if empty == [stored[0]] else "add some"
        raise UserError(f"{where}: have no images of {abbreviate(empty)}; {remedy}")
    files = ShardDataset(Path(root), paths, labels, classes, tuple(notes), shards=shards, places=places)
    return files.select(even_indices(len(files), limit))
