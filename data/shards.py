"""Tar shards (WebDataset's convention) as a dataset that behaves like the class folders of the same images.

The headers of all shards are read once, and the places of the images cached. Images are then read one by
one, in any order. Their order, names, and fingerprint are those of class folders, and so is every batch.
"""

import codecs
import os
from collections.abc import Collection, Iterator, Sequence
from dataclasses import KW_ONLY, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Self

import numpy as np

from resnext.classes import abbreviate, sort_classes
from resnext.errors import UserError

from .file_list_cache import Arrays, cached, remember
from .image_folder import ImageFolderDataset, absent_classes
from .imagenet_archives import COPY, find_wnids, imagenet_classes
from .in_memory import digest, even_indices
from .process_pool import process_pool, progress
from .shard_files import common_folder, find_shards, listed_shards, split_files, unused_files
from .tar_samples import read_samples
from .walk import to_bytes, to_text

PLACE = np.dtype([("shard", "u4"), ("offset", "u8"), ("size", "u4")])
LARGE = 1 << 32  # bytes of shards that are indexed by several processes
OPEN = 256  # shards that a process keeps open


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
        listed, count = listed_shards(paths)
        if isinstance(count, int) and len(known["labels"]) != count and set(listed) == set(paths):
            found = f"{len(known['labels']):,} images (got _info.json, expected {count:,})"
            raise UserError(f"{shards[0]}, …: have {found}; {COPY}")
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
    contents: dict[str, str] = {}
    for number, (shard, part) in enumerate(zip(shards, parts, strict=True)):
        first = contents.setdefault(digest((), part["names"], part["labels"], part["places"]["size"]), shard)
        if first != shard and len(part["labels"]):
            raise UserError(f"{shard}: has the same images as {first}; remove one of the two")
        part["places"]["shard"] = number
    arrays = _sorted(parts)
    if len(_repeated(arrays)):  # many programs number the images of each shard from 0
        for shard, part in zip(shards, parts, strict=True):
            part["names"] = np.char.add(to_bytes(Path(shard).stem) + b"/", part["names"])
        arrays = _sorted(parts)
    for i in _repeated(arrays)[:1]:
        shard, name = shards[arrays["places"]["shard"][i]], to_text(arrays["names"][i])
        raise UserError(f"{shard}: two images are {name} with one label; remove one of them")
    return arrays


def _sorted(parts: list[Arrays]) -> Arrays:
    arrays = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    order = np.lexsort((arrays["names"], arrays["labels"]))
    return {name: array[order] for name, array in arrays.items()}


def _repeated(arrays: Arrays) -> np.ndarray:
    """Return the numbers of images with the name and the label of the image before."""
    names, labels = arrays["names"], arrays["labels"]
    return np.flatnonzero((names[1:] == names[:-1]) & (labels[1:] == labels[:-1])) + 1


def stored_classes(root: str) -> tuple[str, ...]:
    """Return the names of the classes 0, 1, … of shards: classes.txt, ImageNet's wnids, or their numbers."""
    splits = [split for split, shards in split_files(root).items() if shards] or ["train"]
    file = common_folder(find_shards(root, splits[0])) / "classes.txt"
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
    count = int(arrays["labels"][-1]) + 1
    return wnid_classes(count, arrays["names"], arrays["labels"], root) or tuple(map(str, range(count)))


def _wnids(names: np.ndarray, labels: np.ndarray) -> list[tuple[list[str], int]]:
    """Return the wnids in the names of up to 10,000 images, and the labels of these."""
    some = even_indices(len(names), 10_000).tolist()
    found = ((find_wnids(to_text(names[i])), int(labels[i])) for i in some)
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


def wnid_classes(count: int, names: np.ndarray, labels: np.ndarray, where: str) -> tuple[str, ...] | None:
    """Return the classes by label, if the names of the images have one wnid per label, else None.

    Raise UserError if the labels are other numbers than those of ImageNet's 1000 sorted wnids.
    """
    wnids, found = imagenet_classes(), _wnids(names, labels)
    if count != len(wnids):
        own = {label: words[0] for words, label in found}
        same = all(words == [own[label]] for words, label in found)
        if same and len(set(own.values())) == count:
            return tuple(own[label] for label in range(count))
        return None
    for words, label in found:
        if wnids[label] not in words:
            raise UserError(
                f"{where}: an image of {words[0]} has label {label}, not the number among the sorted wnids; "
                "name the classes in the order of the labels in classes.txt, one per line"
            )
    return wnids if found else None


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
    own_labels = _positions(labels, names, stored, classes, where)
    folders = np.array([to_bytes(f"{name}/") for name in stored], "S")
    paths = np.char.add(folders[labels], names)
    paths = paths.astype(f"S{np.char.str_len(paths).max()}")  # the type of a folder's list
    by_class = np.argsort(own_labels, kind="stable")
    paths, labels, places = paths[by_class], own_labels[by_class], places[by_class]
    notes = (
        unused_files(root) + absent_classes(Path(where), labels, classes, wanted) if split == "val" else []
    )
    empty = [classes[n] for n in np.setdiff1d(np.arange(len(classes)), labels)]
    if split == "train" and empty:
        remedy = "number the labels from 0" if empty == [stored[0]] else "add some"
        raise UserError(f"{where}: have no images of {abbreviate(empty)}; {remedy}")
    files = ShardDataset(Path(root), paths, labels, classes, tuple(notes), shards=shards, places=places)
    return files.select(even_indices(len(files), limit))


def _positions(
    labels: np.ndarray, names: np.ndarray, stored: Sequence[str], classes: Sequence[str], where: str
) -> np.ndarray:
    """Return the positions in `classes` of sorted labels, which are positions in `stored`."""
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
    return np.array([position.get(name, -1) for name in stored])[labels]
