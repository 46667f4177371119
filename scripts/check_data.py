"""Check images before training: report what training would say, decode every image, list odd ones.

    python scripts/check_data.py DIR                       DIR has train/CLASS/ and val/CLASS/, or shards
    python scripts/check_data.py DIR --json report.json    the complete lists too
    python scripts/check_data.py ILSVRC/Data/CLS-LOC --val-list LOC_val_solution.csv

Exit status 0: fit for training, in spite of warnings and odd files (gray, CMYK, rotated, …); 1: training
would refuse the folders, files are broken, or the same file is in train/ and val/; 2: wrong usage, or
shards that training would refuse.
"""

import contextlib
import hashlib
import io
import json
import os
import sys
from collections.abc import Iterable
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Future, wait
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import numpy as np
from PIL import Image

from data import image_folder, shard_files, shards
from data.datasets import training_classes
from data.decode import MAX_PIXELS, decode
from data.image_folder import ImageFolderDataset, Listing
from data.lists import label_images
from data.process_pool import process_pool, progress
from data.walk import FORMATS, Found, to_text
from resnext.config import DataConfig
from resnext.errors import UserError, command_parser, run_main
from resnext.files import check_target, write_file

SPLITS = ("train", "val")
ALIASES = {"MPO": "JPEG", "DIB": "BMP"}  # Pillow's names of variants of a format
ODD = {
    "gray": "gray",
    "cmyk": "CMYK",
    "deep": "16 bits per channel",
    "format": "not the format of the file name",
    "orientation": "EXIF orientation, which is ignored",
    "alpha": "transparency, which is dropped: the colors below show",
    "frames": "several images in one file; only the first is used",
    "small": "a side under 32 pixels",
    "large": "a side over 10,000 pixels",
    "aspect": "one side over 5 times the other",
}
PROBLEMS = {
    "refused": "training would stop with this error",
    "broken": "broken files",
    "train_and_val": "the same file in train/ and val/",
}
RECORD = np.dtype(f"?, i4, i4, i8, S16, ({len(ODD)},)?")
RECORD.names = ("decoded", "width", "height", "bytes", "hash", "odd")
Inspected = tuple[np.ndarray, dict[int, str]]  # a RECORD per file; number of a broken file → reason
CHUNK = 32  # files per task


def main() -> int:
    parser = command_parser(__doc__)
    parser.add_argument("folder", metavar="DIR", help="folder with train/ and val/")
    cores = len(os.sched_getaffinity(0))
    parser.add_argument("--workers", type=int, default=cores, metavar="N", help="default: one per CPU core")
    parser.add_argument("--json", metavar="FILE", help="write the complete report to FILE")
    list_help = "file of image paths and classes instead of class folders (data.train_list)"
    parser.add_argument("--train-list", metavar="FILE", help=list_help)
    parser.add_argument("--val-list", metavar="FILE", help="the same for val/ (data.val_list)")
    parser.add_argument("--max-pixels", type=int, default=MAX_PIXELS, metavar="N", help="data.max_pixels")
    arguments = parser.parse_args()
    if arguments.workers < 1:
        raise UserError(f"--workers: must be at least 1 (got {arguments.workers})")
    lists = {"train": arguments.train_list, "val": arguments.val_list}
    sharded = not any(lists.values()) and shard_files.is_sharded(arguments.folder)
    for split in SPLITS:
        if not lists[split] and not sharded:
            image_folder.split_folder(arguments.folder, split)
    root = Path(arguments.folder).expanduser()
    if arguments.json:
        check_target("--json", Path(arguments.json))
    dataset = "shards" if sharded else "folder"
    data = DataConfig(dataset=dataset, dir=str(root), train_list=lists["train"])
    try:
        classes, refused = training_classes(data, None) or (), []
    except UserError as error:
        if data.train_list or sharded:
            raise
        classes, refused = tuple(image_folder.class_folders(root / "train")), [str(error)]
    if sharded:
        sets = [shards.list_set(str(root), split, classes=classes) for split in SPLITS]
        parts = [Listing(part.paths, part.labels, [], [], Found([])) for part in sets]
        parts[0].notes.extend(shard_files.unused_files(str(root)))
        listed = {split: (part, f"{split}/".encode()) for split, part in zip(SPLITS, parts, strict=True)}
    else:
        listed = {split: list_images(root, split, lists[split], classes) for split in SPLITS}
    listings = {split: listing for split, (listing, _) in listed.items()}
    paths = np.concatenate([np.char.add(prefix, listing.paths) for listing, prefix in listed.values()])
    labels = np.concatenate([listing.labels for listing in listings.values()])
    files = ImageFolderDataset(root, paths, labels, classes)
    if sharded:
        places = np.concatenate([part.places for part in sets])
        places["shard"][len(sets[0]) :] += len(sets[0].shards)
        names = sets[0].shards + sets[1].shards
        files = replace(sets[0], paths=paths, labels=labels, places=places, shards=names)
    found = inspect_all(files, arguments.workers, arguments.max_pixels)
    report = summarize(root, classes, listings, paths, found)
    report["problems"]["refused"][:0] = refused
    print_report(report, arguments.json)
    if arguments.json:
        write_file("--json", arguments.json, json.dumps(report, indent=1) + "\n")
        print(f"wrote {arguments.json}")
    return int(any(report["problems"].values()))


def list_images(root: Path, split: str, file: str | None, classes: tuple[str, ...]) -> tuple[Listing, bytes]:
    """Return the images of class folders or of a list, and what precedes their paths below `root`."""
    if not file:
        return image_folder.list_split(root / split, classes), f"{split}/".encode()
    images = label_images(str(root), split, file, classes)
    prefix = os.path.relpath(images.folder, root)
    listing = Listing(images.paths, images.labels, list(images.notes), [], Found([]))
    return listing, b"" if prefix == "." else os.fsencode(f"{prefix}/")


def inspect(files: ImageFolderDataset, max_pixels: int) -> Inspected:
    """Return a RECORD per file, and why some are broken."""
    records = np.zeros(len(files), RECORD)
    reasons = {}
    for number in range(len(files)):
        path = files.path(number)
        try:
            records[number] = inspect_file(files.read(number, image_folder.LARGEST_FILE), path, max_pixels)
        except UserError as error:
            reasons[number] = str(error).removeprefix(f"{path}: ")
    return records, reasons


def inspect_file(content: bytes, path: str, max_pixels: int) -> tuple:
    """Return the fields of a RECORD. Raise UserError if the file is broken."""
    if not content:
        raise UserError("empty")
    height, width, _ = decode(content, path, max_pixels=max_pixels).shape
    alpha, frames, orientation = False, False, 1
    # The pixels could be decoded, but EXIF data may be damaged in any way.
    with contextlib.suppress(Exception), Image.open(io.BytesIO(content)) as image:
        mode, kind, alpha = image.mode, image.format, image.has_transparency_data
        frames = kind != "MPO" and getattr(image, "n_frames", 1) > 1
        orientation = image.getexif().get(274, 1)
    extension = os.path.splitext(path)[1].lower()
    odd = {
        "gray": mode in ("1", "L", "LA", "La") or mode.startswith("I"),
        "cmyk": mode == "CMYK",
        # Pillow opens 16-bit color PNGs as 8-bit; their header has the depth.
        "deep": mode.startswith("I") or (kind == "PNG" and content[24:25] == b"\x10"),
        "format": Image.registered_extensions().get(extension) != ALIASES.get(kind, kind),
        "orientation": orientation not in (0, 1),
        "alpha": alpha,
        "frames": frames,
        "small": min(height, width) < 32,
        "large": max(height, width) > 10_000,
        "aspect": max(height, width) > 5 * min(height, width),
    }
    digest = hashlib.blake2b(content, digest_size=16).digest()
    return True, width, height, len(content), digest, [odd[key] for key in ODD]


def inspect_all(files: ImageFolderDataset, workers: int, max_pixels: int) -> Inspected:
    """Inspect all files in other processes. A file that crashes its process counts as broken."""
    records = np.zeros(len(files), RECORD)
    reasons: dict[int, str] = {}
    spans = [range(len(files))[start : start + CHUNK] for start in range(0, len(files), CHUNK)][::-1]
    with progress("decoding", len(files), " images") as bar:
        while spans:
            running: dict[Future, range] = {}
            try:
                with process_pool(workers) as pool:
                    while spans or running:
                        while spans and len(running) < (2 * workers if len(spans[-1]) > 1 else 1):
                            future = pool.submit(inspect, files.select(np.array(spans[-1])), max_pixels)
                            running[future] = spans.pop()
                        for future in wait(running, return_when=FIRST_COMPLETED).done:
                            found, why = future.result()
                            span = running.pop(future)
                            records[span] = found
                            reasons.update({span[number]: reason for number, reason in why.items()})
                            bar.update(len(span))
            except BrokenExecutor:  # inspect the running files one by one, to find the one that crashed
                suspects = [range(n, n + 1) for span in running.values() for n in span]
                if len(suspects) != 1:
                    spans += reversed(suspects)
                else:
                    reasons[suspects[0].start] = "its process died (decoder crash or out of memory)"
                    bar.update()
    return records, reasons


def summarize(
    root: Path, classes: tuple[str, ...], listings: dict[str, Listing], paths: np.ndarray, found: Inspected
) -> dict:
    """Return the report as plain values for JSON."""

    def names(numbers: Iterable[int]) -> list[str]:
        return [to_text(paths[number]) for number in numbers]

    records, reasons = found
    _, content, copies = np.unique(records["hash"], return_inverse=True, return_counts=True)
    groups: dict[int, list[int]] = {}
    for number in np.flatnonzero(records["decoded"] & (copies[content] > 1)):
        groups.setdefault(content[number], []).append(number)
    same: dict[str, list] = {"train_and_val": [], "train": [], "val": []}
    train, val = listings["train"], listings["val"]
    for group in groups.values():
        splits = {"train" if number < len(train.paths) else "val" for number in group}
        same["train_and_val" if len(splits) == 2 else splits.pop()].append(names(group))
    parts = zip(SPLITS, np.split(records, [len(train.paths)]), strict=True)
    decoded = {split: part[part["decoded"]] for split, part in parts}
    notes = [*train.notes, *val.notes, *image_folder.absent_classes(root / "val", val.labels, classes)]
    return {
        "folder": str(root),
        "pictures": {split: len(listing.paths) for split, listing in listings.items()},
        "problems": {
            "refused": [*train.errors, *val.errors],
            "broken": {to_text(paths[number]): reasons[number] for number in sorted(reasons)},
            "train_and_val": same.pop("train_and_val"),
        },
        "warnings": [note.removeprefix("warning: ") for note in notes],
        "odd": {kind: names(np.flatnonzero(records["odd"][:, n])) for n, kind in enumerate(ODD)},
        "duplicates": same,
        "ignored": [
            to_text(os.path.relpath(path, os.fsencode(root)))
            for path in train.found.others + val.found.others
        ],
        "sizes": {
            split: {key: quantiles(part[key]) for key in ("width", "height", "bytes") if len(part)}
            for split, part in decoded.items()
        },
        "classes": {
            split: dict(zip(classes, np.bincount(part.labels, minlength=len(classes)).tolist(), strict=True))
            for split, part in listings.items()
        },
    }


def quantiles(values: np.ndarray) -> dict[str, int]:
    """Return minimum, 5% quantile, median, 95% quantile and maximum."""
    return {f"{q:g}": int(np.quantile(values, q)) for q in (0, 0.05, 0.5, 0.95, 1)}


def print_report(report: dict, json_file: str | None) -> None:
    """Print a summary."""
    for split, counts in report["classes"].items():
        text = f"{split}: {report['pictures'][split]:,} images in {len(counts):,} classes"
        if counts:
            low, high = min(counts, key=counts.get), max(counts, key=counts.get)
            text += f", {counts[low]:,} ({plain(low)}) to {counts[high]:,} ({plain(high)}) each"
            text += f", median {np.median(list(counts.values())):,g}"
        print(text)
    if any(report["sizes"].values()):
        print(f"\n{'':14}" + "".join(f"{text:>12}" for text in ("least", "5%", "median", "95%", "most")))
    for split, table in report["sizes"].items():
        for key, row in table.items():
            print(f"{split + ' ' + key:14}" + "".join(f"{value:>12,}" for value in row.values()))
    more = f"in {json_file}" if json_file else "with --json FILE"
    kinds = ODD | {split: f"the same file several times in {split}/" for split in SPLITS}
    kinds["ignored"] = f"ignored: not {FORMATS}"
    remarks = report["odd"] | report["duplicates"] | {"ignored": report["ignored"]}
    print_lists("Problems", PROBLEMS, report["problems"], 10, more)
    print_lists("Warnings", {"warnings": "training also prints"}, report, 10, more)
    print_lists("Odd, but harmless", kinds, remarks, 3, more)
    print("\nnot fit for training" if any(report["problems"].values()) else "\nfit for training")


def print_lists(title: str, kinds: dict[str, str], found: dict, limit: int, more: str) -> None:
    """Print the first `limit` items of each kind that was found."""
    if any(found[kind] for kind in kinds):
        print(f"\n{title}")
    for kind, text in kinds.items():
        items = found[kind]
        if items:
            print(f"  {text}: {len(items):,}")
        for item in list(items)[:limit]:
            if isinstance(item, list):
                others = f" (and {len(item) - 3:,} more)" if len(item) > 3 else ""
                print("    " + " = ".join(map(plain, [item[0], *item[1:][-2:]])) + others)
            else:
                print(f"    {plain(item)}" + (f": {items[item]}" if isinstance(items, dict) else ""))
        if len(items) > limit:
            print(f"    and {len(items) - limit:,} more, {more}")


def plain(name: str) -> str:
    """Return a file name in printable form, whatever its bytes."""
    return name if name.isprintable() else ascii(name)


if __name__ == "__main__":
    run_main(main)
