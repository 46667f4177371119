"""Write images as tar shards (WebDataset), from class folders or from Parquet files of the Hugging Face hub.

    python scripts/make_shards.py datasets/imagenet datasets/imagenet-shards
    python scripts/make_shards.py PARQUET OUTPUT --label fine_label
    python train.py --config resnext50_32x4d.yaml --data OUTPUT data.dataset=shards

Images are copied unchanged, with their names. OUTPUT gets train-0000.tar, validation-0000.tar, …, the class
names in classes.txt, and a list of the shards in _info.json, which timm reads too. To resume after an
interruption, run the same command again: complete shards are kept. Nothing is overwritten.

PARQUET is a folder with files like train-00000-of-00294.parquet and validation-00000-of-00014.parquet.
Column and class names are those of their metadata. Reading them needs pip install pyarrow.
"""

import argparse
import contextlib
import fcntl
import io
import json
import os
import re
import sys
import tarfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import numpy as np

from data import image_folder
from data.imagenet_archives import WNID
from data.in_memory import digest
from data.process_pool import progress
from data.shard_files import check_numbers, split_files
from data.shards import wnid_classes
from data.walk import EXTENSIONS, is_hidden, to_bytes, to_text
from resnext.errors import UserError, command_parser, run_main
from resnext.files import whole_file

if TYPE_CHECKING:
    from pyarrow import Schema

NAMES = {"train": "train", "val": "validation"}
JPEG = (".jpeg", ".jpe", ".jfif")  # members end with .jpg, the only one of these that timm reads
MAGIC = {b"\xff\xd8": ".jpg", b"\x89P": ".png", b"RI": ".webp", b"BM": ".bmp", b"GI": ".gif"}


@dataclass(frozen=True)
class Split:
    """The images of a split: paths CLASS/NAME, labels, and their contents from a number on."""

    paths: np.ndarray  # bytes (N,)
    labels: np.ndarray  # int64 (N,)
    contents: Callable[[int], Iterator[bytes]]


Splits = dict[str, Split]


def main() -> None:
    arguments = parse_arguments()
    source, output = Path(arguments.source), Path(arguments.output)
    if source.suffix == ".parquet" and source.is_file():
        raise UserError(f"{source}: is a file; name the folder with the Parquet files of all splits")
    parquet = split_files(str(source), ".parquet", depth=3) if source.is_dir() else {}
    if any(parquet.values()):
        classes, splits = read_parquet(source, parquet, arguments.label)
    elif arguments.label:
        raise UserError(f"--label: is for Parquet files, and {source} has none; omit it")
    else:
        classes, splits = read_folders(str(source))
    if len(set(classes)) < len(classes) or not all(classes) or any("\n" in name for name in classes):
        raise UserError(f"{source}: a class name is empty, used twice, or has a line end; rename the class")
    try:
        write_shards(output, classes, splits, arguments.images)
    except KeyboardInterrupt:
        print("stopped; run the same command again to resume", file=sys.stderr)
        raise


def parse_arguments() -> argparse.Namespace:
    parser = command_parser(__doc__)
    add = parser.add_argument
    add("source", metavar="SOURCE", help="folder with train/CLASS/ and val/CLASS/, or with Parquet files")
    add("output", metavar="OUTPUT", help="folder to create, or to resume")
    add("--images", type=int, default=1250, metavar="N", help="images per shard (default: 1250)")
    add("--label", metavar="COLUMN", help="Parquet: the column of labels, if there are several")
    arguments = parser.parse_args()
    if arguments.images < 1:
        raise UserError(f"--images: must be at least 1 (got {arguments.images}); raise it")
    return arguments


def write_shards(output: Path, classes: tuple[str, ...], splits: Splits, images: int) -> None:
    """Write the shards that OUTPUT lacks, of up to `images` images each."""
    lists = {}  # for _info.json: timm's keys, and a hash of what the shards are made from
    for split, content in splits.items():
        count, name = len(content.labels), NAMES[split]
        lengths = [min(images, count - start) for start in range(0, count, images)]
        lists[name] = {
            "name": name,
            "num_samples": count,
            "filenames": [f"{name}-{number:04}.tar" for number in range(len(lengths))],
            "shard_lengths": lengths,
            "source": digest(classes, content.paths, content.labels),
        }
    with prepared(output, json.dumps({"splits": lists}, indent=1), classes):
        for split, content in splits.items():
            write_split(output, split, classes, content, lists[NAMES[split]])


@contextlib.contextmanager
def prepared(output: Path, info: str, classes: tuple[str, ...]) -> Iterator[None]:
    """Create OUTPUT with _info.json and classes.txt, or resume it, and lock it against other processes."""
    output.mkdir(parents=True, exist_ok=True)
    file = output / "_info.json"
    foreign = sorted(name for name in os.listdir(output) if not name.startswith(".") and name != "lost+found")
    if foreign and not file.exists():
        raise UserError(f"{output}: holds {foreign[0]!r}, which is not from here; name a new folder")
    folder = os.open(output, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if file.exists() and file.read_bytes() != info.encode():
            text = "was made from other images, or with another --images"
            raise UserError(f"{output}: {text}; give the same ones to resume, or name a new folder")
        for rest in output.glob(".*.partial*"):
            rest.unlink()
        lines = "".join(f"{name}\n" for name in classes)
        for name, text in (("_info.json", info), ("classes.txt", lines)):
            if not (output / name).exists():
                with whole_file(str(output / name)) as path:
                    path.write_bytes(to_bytes(text))
        yield
    except BlockingIOError:
        raise UserError(f"{output}: another process is writing there; wait, or stop it first") from None
    finally:
        os.close(folder)


def write_split(output: Path, split: str, classes: tuple[str, ...], images: Split, info: dict) -> None:
    """Write the shards of a split that do not exist yet."""
    start, contents = 0, None
    with progress(f"{split}: writing", len(images.labels), " images") as bar:
        for name, length in zip(info["filenames"], info["shard_lengths"], strict=True):
            numbers = range(start, start + length)
            start += length
            if (output / name).exists():
                check_whole(output / name)
                contents = None
            else:
                contents = contents or images.contents(numbers.start)
                with whole_file(str(output / name)) as path:
                    write_shard(path, classes, images, numbers, islice(contents, length))
            bar.update(length)
    shards = len(info["filenames"])
    print(f"{split}: complete, {start:,} images in {shards:,} shard{'s' * (shards > 1)}", flush=True)


def check_whole(shard: Path) -> None:
    """Raise UserError if a shard that exists lacks the end mark of a tar."""
    with open(shard, "rb") as file:
        file.seek(-min(1024, shard.stat().st_size), os.SEEK_END)
        if file.read() != bytes(1024):
            raise UserError(f"{shard}: is cut off; delete it, and run the same command again")


def write_shard(
    path: Path, classes: tuple[str, ...], images: Split, numbers: range, contents: Iterator[bytes]
) -> None:
    """Write the images of some numbers: members CLASS/NAME.jpg, .cls (label), and .json (original name)."""
    keys = set()
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT, encoding="utf-8") as tar:  # surrogateescape
        for number, content in zip(numbers, contents, strict=True):
            name, label = to_text(images.paths[number]), int(images.labels[number])
            key, extension = os.path.splitext(name)
            if extension.lower() not in EXTENSIONS:
                key, extension = name, MAGIC.get(content[:2], ".jpg")
            details = {"filename": key + extension, "label": label, "class": classes[label]}
            hidden = key.startswith(("__", "/")) or any(map(is_hidden, to_bytes(key).split(b"/")))
            if hidden or key in keys or "." in os.path.basename(key):  # a key ends at its first dot
                key = f"{number:08}"
            keys.add(key)
            extension = ".jpg" if extension.lower() in JPEG else extension.lower()
            parts = {extension: content, ".cls": b"%d" % label, ".json": json.dumps(details).encode()}
            for ending, part in parts.items():
                member = tarfile.TarInfo(key + ending)
                member.size = len(part)
                tar.addfile(member, io.BytesIO(part))


# ---------------------------------------------------------------------------- sources


def read_folders(source: str) -> tuple[tuple[str, ...], Splits]:
    """Return the classes and images of class folders."""
    classes, splits = image_folder.class_names(source), {}
    for split in NAMES:
        files = image_folder.list_set(source, split, classes=classes)
        for note in files.notes:
            print(note, file=sys.stderr)
        splits[split] = folder_split(files)
    return classes, splits


def folder_split(files: image_folder.ImageFolderDataset) -> Split:
    return Split(files.paths, files.labels, lambda start: map(files.read, range(start, len(files))))


def read_parquet(
    source: Path, parquet: dict[str, list[Path]], column: str | None
) -> tuple[tuple[str, ...], Splits]:
    """Return the classes and images of Parquet files. Only names and labels are read at first."""
    check_files(source, parquet)
    classes: tuple[str, ...] = ()
    names: tuple[str, ...] = ()
    splits: Splits = {}
    for split, files in parquet.items():  # train comes first
        labels, bases = list[int](), list[str]()
        for file in files:
            own, numbers, paths = read_table(file, column)
            if names and own and own != names:
                raise UserError(f"{file}: names other classes than the files before; convert it separately")
            names = names or own
            labels += numbers
            bases += [os.path.basename(path or "") for path in paths]
        if not labels:
            raise UserError(f"{files[0]}: has no images; download {split} again")
        if not all(bases) or len(set(zip(labels, bases, strict=True))) < len(bases):
            bases = [f"{row:08}{base and '_'}{base}" for row, base in enumerate(bases)]
        classes = classes or parquet_classes(names, bases, labels, files[0])
        check_labels(split, labels, classes, files[0])
        full = [to_bytes(f"{classes[label]}/{base}") for label, base in zip(labels, bases, strict=True)]
        contents = partial(rows, files, column)
        splits[split] = Split(np.array(full, "S"), np.array(labels, np.int64), contents)
    return classes, splits


def check_files(source: Path, parquet: dict[str, list[Path]]) -> None:
    """Raise UserError if pyarrow, a split, or some of its files are missing."""
    try:
        import pyarrow.parquet  # noqa: F401
    except ImportError:
        raise UserError("Parquet files are read by pyarrow, which is missing: pip install pyarrow") from None
    for split, files in parquet.items():
        if not files:
            raise UserError(f"{source}: has no Parquet files of {split}; download both splits")
        for file in files:
            if any("partial-" in name for name in file.parts[-2:]):
                raise UserError(f"{file}: has only a part of the split; download the others in full")
        check_numbers(files)


def check_labels(split: str, labels: list[int], classes: tuple[str, ...], file: Path) -> None:
    """Raise UserError if labels are not numbers of classes, or if train lacks a class."""
    if max(labels) >= len(classes):
        raise UserError(f"{file}: has label {max(labels)}, and there are {len(classes)} classes")
    absent = sorted(set(range(len(classes))) - set(labels))
    if split == "train" and absent:
        number = f"class {absent[0]} ({classes[absent[0]]!r})"
        raise UserError(f"{file}: has no images of {number}; number the labels of train from 0")


def parquet_classes(
    names: tuple[str, ...], bases: list[str], labels: list[int], file: Path
) -> tuple[str, ...]:
    """Return the classes by label: wnids if the metadata or the images are named by them, else `names`."""
    if names and all(re.fullmatch(WNID, name) for name in names):
        return names
    count, found = len(names) or max(labels) + 1, np.array(list(map(to_bytes, bases)))
    known = wnid_classes(count, found, np.array(labels), str(file))
    return known or names or tuple(map(str, range(count)))


def read_table(file: Path, column: str | None) -> tuple[tuple[str, ...], list[int], list[str | None]]:
    """Return the class names, or () if it has none, the labels, and the paths of a Parquet file."""
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    try:
        with ParquetFile(file) as parquet:
            image, label, names = find_columns(parquet.schema_arrow, column, file)
            table = parquet.read(columns=[f"{image}.path", label])
            labels, paths = table[label].to_pylist(), [row["path"] for row in table[image].to_pylist()]
    except (ArrowException, LookupError, TypeError, ValueError, AttributeError, OSError) as error:
        raise unreadable(file, error) from None
    if not all(isinstance(value, int) and value >= 0 for value in labels):
        raise UserError(f"{file}: rows of {label} have no class number; use a split with labels")
    return names, labels, paths


def unreadable(file: Path, error: Exception) -> UserError:
    reason = str(error).partition("\n")[0][:100]
    return UserError(f"{file}: cannot be read ({reason!a}); download it again")


def find_columns(schema: "Schema", column: str | None, where: Path) -> tuple[str, str, tuple[str, ...]]:
    """Return the columns of the images and labels, and the class names, or () if the metadata has none."""
    from pyarrow.types import is_struct

    content = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
    features = content.get("info", {}).get("features", {})
    types = {name: str(schema.field(name).type) for name in schema.names}
    if column and column not in types:
        raise UserError(f"{where}: has no column {column!r} (got {', '.join(types)}); correct --label")
    structs = {field.name: {part.name for part in field.type} for field in schema if is_struct(field.type)}
    images = [name for name, parts in structs.items() if {"bytes", "path"} <= parts]
    named = {name: features[name]["names"] for name in types if "names" in features.get(name, ())}
    numbers = [name for name in types if re.match("u?int", types[name])]
    labels = [column] if column else list(named) or [name for name in numbers if "label" in name]
    labels = ["label"] if not column and "label" in labels else labels
    kinds = ", ".join(f"{name} {kind[:40]}" for name, kind in types.items())
    if len(images) != 1:
        text = f"needs one column of images, with their bytes and path (got {kinds})"
        raise UserError(f"{where}: {text}; use a dataset in this form")
    if len(labels) != 1 or labels[0] not in numbers:
        text = f"needs a column of class numbers (got {kinds})"
        raise UserError(f"{where}: {text}; choose one with --label, or replace names by numbers from 0")
    return images[0], labels[0], tuple(map(str, named.get(labels[0], ())))


def rows(files: Sequence[Path], column: str | None, start: int) -> Iterator[bytes]:
    """Yield the images of Parquet files from row `start` on."""
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    for file in files:
        try:
            with ParquetFile(file) as parquet:
                if start >= parquet.metadata.num_rows:
                    start -= parquet.metadata.num_rows
                    continue
                image, *_ = find_columns(parquet.schema_arrow, column, file)
                for batch in parquet.iter_batches(64, columns=[f"{image}.bytes"]):
                    for value in batch.column(0).to_pylist()[start:]:
                        if value["bytes"] is None:
                            raise UserError(f"{file}: has an image without bytes; get a dataset with images")
                        yield value["bytes"]
                    start = max(0, start - len(batch))
        except (ArrowException, OSError) as error:
            raise unreadable(file, error) from None


if __name__ == "__main__":
    run_main(main)
