"""Check class folders before training on them: decode every picture, report what is wrong or odd.

    python scripts/check_data.py DIR                       DIR has train/CLASS/ and val/CLASS/
    python scripts/check_data.py DIR --json report.json    the complete lists too

Exit status 0: fit for training; odd files (gray, CMYK, rotated …) are listed and do no harm.
1: broken files, a class that is empty or not in both train/ and val/, pictures outside class folders, or the
same file in train/ and val/.
2: wrong usage, such as a folder that is not there.
"""

import contextlib
import hashlib
import io
import json
import multiprocessing
import os
import signal
import stat
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import numpy as np
from PIL import Image

from data.decode import decode
from data.folder import EXTENSIONS
from resnext.errors import UserError, command_parser, run_command

SPLITS = ("train", "val")
FORMATS = {"JPEG": (".jpg", ".jpeg"), "MPO": (".jpg", ".jpeg"), "PNG": (".png",), "PPM": (".ppm",)}
FORMATS |= {"BMP": (".bmp",), "DIB": (".bmp",)}
ODD = {  # a bit of a record's flags each, in this order
    "gray": "gray",
    "cmyk": "CMYK",
    "deep": "16 bits a channel",
    "format": "another format than the name says",
    "orientation": "EXIF orientation, which is ignored",
    "small": "a side under 32 pixels",
    "large": "a side over 10,000 pixels",
    "aspect": "one side over 5 times the other",
}
PROBLEMS = {
    "broken": "broken files",
    "only_train": "classes that only train/ has",
    "only_val": "classes that only val/ has",
    "empty": "class folders without pictures",
    "loose": "pictures outside class folders, which training leaves out",
    "train_and_val": "the same file in train/ and val/",
}
RECORD = np.dtype(
    [("decoded", "?"), ("width", "i4"), ("height", "i4"), ("bytes", "i8"), ("flags", "u2"), ("hash", "u8", 2)]
)
LARGEST_FILE = 1 << 30  # bytes; what is larger is not read
CHUNK = 32  # files a task
QUANTILES = (0, 0.05, 0.5, 0.95, 1)


def main() -> int:
    parser = command_parser(__doc__)
    parser.add_argument("folder", metavar="DIR", help="folder with train/ and val/")
    parser.add_argument("--workers", type=int, metavar="N", help="processes (default: one a core)")
    parser.add_argument("--json", metavar="FILE", help="write everything that was found there")
    arguments = parser.parse_args()
    if arguments.workers is not None and arguments.workers < 1:
        raise UserError(f"--workers: must be at least 1, not {arguments.workers}")
    root = Path(arguments.folder).expanduser()
    for folder in (root, *(root / split for split in SPLITS)):
        if not folder.is_dir():
            raise UserError(f"{folder}: no such folder; DIR must hold train/CLASS/*.jpg and val/CLASS/*.jpg")
    if arguments.json:
        check_target(Path(arguments.json))
    listings = {split: list_split(root, split) for split in SPLITS}
    paths = np.concatenate([listings[split].paths for split in SPLITS])
    records, reasons = inspect_all(root, paths, arguments.workers or count_cores())
    report = summarise(root, listings, paths, records, reasons)
    print_report(report, arguments.json)
    if arguments.json:
        try:
            Path(arguments.json).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        except OSError as error:
            raise UserError(f"--json {arguments.json}: cannot be written ({error.strerror})") from None
        print(f"wrote {arguments.json}")
    return int(any(report["problems"].values()))


def check_target(path: Path) -> None:
    """A UserError now rather than after the work when the report cannot be written."""
    folder = path.resolve().parent
    if path.is_dir() or not folder.is_dir() or not os.access(path if path.exists() else folder, os.W_OK):
        raise UserError(f"--json {path}: cannot be written; name a file in a folder that exists")


def count_cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# ---------------------------------------------------------------------------------------------------------
# Which files there are


@dataclass
class Listing:
    """What lies below train/ or val/. Paths begin with train/ or val/."""

    paths: np.ndarray  # of the pictures, as bytes: a million Python strings would take ten times the memory
    classes: dict[str, int]  # name → number of pictures
    loose: list[str] = field(default_factory=list)  # pictures outside class folders
    ignored: list[str] = field(default_factory=list)  # other files
    unreadable: dict[str, str] = field(default_factory=dict)  # folder → reason


def list_split(root: Path, split: str) -> Listing:
    """The pictures that training would read, by the rules of data.folder, without stopping at anything."""
    listing = Listing(np.empty(0, "S1"), {})
    found: list[bytes] = []
    entries = sorted(os.scandir(root / split), key=lambda entry: entry.name)
    for entry in entries:
        if not is_folder(entry):
            picture = entry.name.lower().endswith(EXTENSIONS)
            (listing.loose if picture else listing.ignored).append(f"{split}/{entry.name}")
            continue
        pictures = sorted(walk(root, f"{split}/{entry.name}", (), listing))
        listing.classes[entry.name] = len(pictures)
        found += pictures
    if found:
        listing.paths = np.array(found)
    return listing


def walk(root: Path, folder: str, above: tuple, listing: Listing) -> Iterator[bytes]:
    """Pictures in `folder` and below; `above` are the folders on the way, for links that lead back."""
    try:
        status = os.stat(root / folder)
        entries = list(os.scandir(root / folder))
    except OSError as error:
        listing.unreadable[folder] = f"cannot be read ({error.strerror})"
        return
    if (status.st_dev, status.st_ino) in above:
        listing.unreadable[folder] = "is a link to a folder above it; remove the link"
        return
    for entry in entries:
        path = f"{folder}/{entry.name}"
        if is_folder(entry):
            yield from walk(root, path, (*above, (status.st_dev, status.st_ino)), listing)
        elif entry.name.lower().endswith(EXTENSIONS):
            yield os.fsencode(path)
        else:
            listing.ignored.append(path)


def is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


# ---------------------------------------------------------------------------------------------------------
# One file after another, in other processes


def inspect(root: Path, paths: np.ndarray) -> tuple[np.ndarray, dict[int, str]]:
    """A RECORD of each file, and the reasons why some are broken."""
    records = np.zeros(len(paths), RECORD)
    reasons = {}
    for number, path in enumerate(paths):
        name = os.fsdecode(path)
        try:
            records[number] = inspect_file(root / name, name)
        except UserError as error:
            reasons[number] = str(error).removeprefix(f"{name}: ")
    return records, reasons


def inspect_file(path: Path, name: str) -> tuple:
    """The fields of a RECORD; a UserError for a broken file."""
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):  # a pipe would be waited for
            raise UserError("not a file")
        if status.st_size > LARGEST_FILE:
            raise UserError("over 1 GiB, too large for a picture")
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot be read ({error.strerror})") from None
    if not content:
        raise UserError("empty")
    height, width, _ = decode(content, name).shape
    digest = np.frombuffer(hashlib.blake2b(content, digest_size=16).digest(), "u8")
    short, long = sorted((height, width))
    odd = {"small": short < 32, "large": long > 10_000, "aspect": long > 5 * short}
    odd |= look_at_header(content, name)
    flags = sum(1 << bit for bit, kind in enumerate(ODD) if odd.get(kind))
    return True, width, height, len(content), flags, digest


def look_at_header(content: bytes, name: str) -> dict[str, bool]:
    """What decoding makes equal: kind of pixels, format, orientation."""
    try:
        with Image.open(io.BytesIO(content)) as image:
            mode, kind = image.mode, image.format
            orientation = image.getexif().get(274, 1)
    except Exception:  # the pixels were decoded; EXIF data may still be damaged in any way
        orientation = 1
    # Pillow opens 16-bit colour PNGs as 8-bit ones: their header tells.
    deep = mode.startswith("I") or (kind == "PNG" and content[24:25] == b"\x10")
    return {
        "gray": mode in ("1", "L", "LA", "La") or mode.startswith("I"),
        "cmyk": mode == "CMYK",
        "deep": deep,
        "format": not name.lower().endswith(FORMATS.get(kind, ())),
        "orientation": orientation not in (0, 1),
    }


def inspect_all(root: Path, paths: np.ndarray, workers: int) -> tuple[np.ndarray, dict[int, str]]:
    """RECORDs of all files and why some are broken, whatever happens to the processes that look at them."""
    records = np.zeros(len(paths), RECORD)
    reasons: dict[int, str] = {}
    with Progress("decoding", len(paths), "pictures") as progress:

        def store(start: int, found: np.ndarray, why: dict[int, str]) -> None:
            records[start : start + len(found)] = found
            reasons.update({start + number: reason for number, reason in why.items()})
            progress.advance(len(found))

        spans = list(range(0, len(paths), CHUNK))[::-1]
        running: dict[Future, int] = {}
        while spans or running:
            try:
                with worker_pool(workers) as pool:
                    while spans or running:
                        while spans and len(running) < 2 * workers:
                            future = pool.submit(inspect, root, paths[spans[-1] : spans[-1] + CHUNK])
                            running[future] = spans.pop()
                        for future in wait(running, return_when=FIRST_COMPLETED).done:
                            result = future.result()
                            store(running.pop(future), *result)
            except BrokenProcessPool:  # a process has died: find the file that does it
                for start in running.values():
                    inspect_singly(root, paths, range(start, min(start + CHUNK, len(paths))), store)
                running.clear()
    return records, reasons


def inspect_singly(root: Path, paths: np.ndarray, numbers: range, store: Callable) -> None:
    """One file at a time, so that one that kills its process takes no other along."""
    left = list(numbers)[::-1]
    while left:
        with worker_pool(1) as pool:
            try:
                pool.submit(int).result()
            except BrokenProcessPool:
                raise UserError("worker processes die as they start; is there enough memory?") from None
            try:
                while left:
                    store(left[-1], *pool.submit(inspect, root, paths[left[-1] : left[-1] + 1]).result())
                    left.pop()
            except BrokenProcessPool:
                reason = "the process that decoded it died (a decoder's crash, or out of memory)"
                store(left.pop(), np.zeros(1, RECORD), {0: reason})


class WorkerPool(ProcessPoolExecutor):
    """Processes that never see Ctrl-C, from their first instruction on: it is for their parent."""

    def submit(self, *arguments):
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # processes are started here
        try:
            return super().submit(*arguments)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def worker_pool(workers: int) -> Iterator[WorkerPool]:
    """Processes that end at once when the block is left by a signal, or when this process is killed."""
    before = set(multiprocessing.active_children())
    handler = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    pool = WorkerPool(workers, multiprocessing.get_context("spawn"), initializer=start_worker)
    try:
        yield pool
    except BaseException:
        for child in set(multiprocessing.active_children()) - before:
            child.kill()
        raise
    finally:
        pool.shutdown(cancel_futures=True)
        signal.signal(signal.SIGTERM, handler)


def start_worker() -> None:
    """In a new process of the pool."""

    def follow_parent() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=follow_parent, daemon=True).start()


class Progress:
    """A bar on a terminal; elsewhere a line now and then."""

    def __init__(self, title: str, total: int, unit: str, seconds: float = 30):
        self.title, self.total, self.seconds = title, total, seconds
        self.done, self.said = 0, time.monotonic()
        self.bar = None
        if sys.stdout.isatty():
            from tqdm import tqdm

            options = {"unit": f" {unit}"} if unit != "B" else {"unit": unit, "unit_scale": True}
            self.bar = tqdm(
                total=total, desc=title, leave=False, file=sys.stdout, dynamic_ncols=True, **options
            )

    def advance(self, amount: int) -> None:
        self.done += amount
        if self.bar is not None:
            self.bar.update(amount)
        elif time.monotonic() - self.said >= self.seconds:
            self.said = time.monotonic()
            print(f"{self.title}: {100 * self.done / self.total:.1f} %", flush=True)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_) -> None:
        if self.bar is not None:
            self.bar.close()


# ---------------------------------------------------------------------------------------------------------
# What it means


def summarise(
    root: Path,
    listings: dict[str, Listing],
    paths: np.ndarray,
    records: np.ndarray,
    reasons: dict[int, str],
) -> dict:
    """Everything that was found, as plain values for JSON."""

    def names(numbers: Iterable[int]) -> list[str]:
        return [os.fsdecode(paths[number]) for number in numbers]

    classes = {split: listing.classes for split, listing in listings.items()}
    broken = dict(zip(names(sorted(reasons)), (reasons[number] for number in sorted(reasons)), strict=True))
    for listing in listings.values():
        broken |= listing.unreadable
    groups: dict[str, list] = {"train_and_val": [], "train": [], "val": []}
    for group in sorted(same_files(records), key=lambda group: group[0]):
        found = names(group)
        splits = {name.partition("/")[0] for name in found}
        groups["train_and_val" if len(splits) == 2 else splits.pop()].append(found)
    empty = [f"{split}/{name}" for split in SPLITS for name, count in classes[split].items() if not count]
    problems = {
        "broken": broken,
        "only_train": sorted(classes["train"].keys() - classes["val"].keys()),
        "only_val": sorted(classes["val"].keys() - classes["train"].keys()),
        "empty": empty if any(classes.values()) else ["train/", "val/"],
        "loose": [path for listing in listings.values() for path in listing.loose],
        "train_and_val": groups.pop("train_and_val"),
    }
    odd = {kind: names(np.flatnonzero(records["flags"] & (1 << bit))) for bit, kind in enumerate(ODD)}
    sizes, start = {}, 0
    for split, listing in listings.items():
        part = records[start : start + len(listing.paths)]
        start += len(listing.paths)
        sizes[split] = quantiles(part[part["decoded"]])
    return {
        "folder": str(root),
        "pictures": {split: len(listing.paths) for split, listing in listings.items()},
        "problems": problems,
        "odd": odd,
        "duplicates": groups,
        "ignored": [path for listing in listings.values() for path in listing.ignored],
        "sizes": sizes,
        "classes": classes,
    }


def same_files(records: np.ndarray) -> Iterator[np.ndarray]:
    """Groups of two and more files of the same content, as numbers of files."""
    known = np.flatnonzero(records["decoded"])
    order = known[np.lexsort(records["hash"][known].T)]  # stable: numbers ascend within a group
    hashes = records["hash"][order]
    borders = np.flatnonzero((hashes[1:] != hashes[:-1]).any(axis=1)) + 1
    starts, stops = np.r_[0, borders], np.r_[borders, len(order)]
    several = stops - starts > 1
    for start, stop in zip(starts[several], stops[several], strict=True):
        yield order[start:stop]


def quantiles(records: np.ndarray) -> dict[str, dict[str, int]]:
    """Width, height and bytes: minimum, 5 %, median, 95 %, maximum."""
    return {
        key: {f"{q:g}": int(v) for q, v in zip(QUANTILES, np.quantile(records[key], QUANTILES), strict=True)}
        for key in ("width", "height", "bytes")
        if len(records)
    }


def print_report(report: dict, json_file: str | None) -> None:
    """A page for people."""
    for split in SPLITS:
        counts = report["classes"][split]
        print(f"{split}: {report['pictures'][split]:,} pictures in {len(counts):,} classes", end="")
        if counts:
            low, high = min(counts, key=counts.get), max(counts, key=counts.get)
            middle = np.median(list(counts.values()))
            print(f", {counts[low]:,} ({plain(low)}) to {counts[high]:,} ({plain(high)}) each", end="")
            print(f", median {middle:,g}", end="")
        print()
    if any(report["sizes"].values()):
        print(f"\n{'':14}" + "".join(f"{text:>12}" for text in ("least", "5 %", "median", "95 %", "most")))
    for split, table in report["sizes"].items():
        for key, row in table.items():
            print(f"{split + ' ' + key:14}" + "".join(f"{value:>12,}" for value in row.values()))

    more = f"in {json_file}" if json_file else "with --json FILE"
    print_lists("Problems", PROBLEMS, report["problems"], 10, more)
    within = {split: f"the same file several times in {split}/" for split in SPLITS}
    ignored = {"ignored": f"ignored, as not {', '.join(EXTENSIONS)}"}
    remarks = report["odd"] | report["duplicates"] | {"ignored": report["ignored"]}
    print_lists("Odd, but no obstacle", ODD | within | ignored, remarks, 3, more)
    if any(path.startswith("val/") for path in report["problems"]["loose"]):
        print(
            "\nFor pictures of ImageNet's validation set outside class folders, with the devkit in TARS:\n"
            f"python scripts/prepare_imagenet.py TARS {report['folder']} --flat-val {report['folder']}/val"
        )
    bad = any(report["problems"].values())
    print("\nnot fit for training: see Problems" if bad else "\nfit for training")


def print_lists(title: str, kinds: dict[str, str], found: dict, limit: int, more: str) -> None:
    """The first of each kind."""
    if any(found[kind] for kind in kinds):
        print(f"\n{title}")
    for kind, text in kinds.items():
        items = found[kind]
        if not items:
            continue
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
    """A file's name as it can be printed, whatever bytes it is made of."""
    return name if name.isprintable() else ascii(name)


if __name__ == "__main__":
    run_command(main)
