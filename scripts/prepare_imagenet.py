"""Extract ImageNet's official archives (ILSVRC 2012) to class folders: OUTPUT/train/WNID/, OUTPUT/val/WNID/.

    python scripts/prepare_imagenet.py TARS OUTPUT
    python scripts/prepare_imagenet.py TARS OUTPUT --max-side 500       less to store and decode
    python scripts/prepare_imagenet.py TARS ROOT --flat-val ROOT/val    sort a val/ that was unpacked flat

TARS holds ILSVRC2012_img_train.tar, and ILSVRC2012_img_val.tar with ILSVRC2012_devkit_t12.tar.gz; one of
the two sets is enough. To resume after an interruption, run the same command again. train/ and val/
appear when they are complete; OUTPUT/.prepare_imagenet holds unfinished sets and the state.

--max-side scales images with a longer side down to it (Lanczos) and saves them as RGB JPEGs (4:2:0). It
copies smaller RGB JPEGs unchanged, and converts gray, CMYK and PNG images to RGB JPEGs. The effect on
accuracy was not measured.
"""

import argparse
import contextlib
import fcntl
import hashlib
import io
import json
import os
import re
import shlex
import shutil
import sys
import tarfile
from collections.abc import Callable, Iterator
from concurrent.futures import BrokenExecutor, as_completed
from functools import partial
from pathlib import Path
from tarfile import TarInfo

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from PIL import Image

from data.decode import decode
from data.imagenet_archives import (
    AGAIN,
    DEVKIT,
    OFFICIAL,
    TRAIN,
    VAL,
    VAL_NAME,
    WNID,
    Targets,
    match_truth,
    read_devkit,
    read_members,
    reading,
    train_targets,
    val_targets,
)
from data.process_pool import process_pool, progress
from resnext.errors import UserError, command_parser, run_main

NEEDS = {"train": {TRAIN}, "val": {VAL, DEVKIT}}
WORK = ".prepare_imagenet"
MAX_IMAGE_BYTES = 1 << 28
CHUNK = {"train": 1, "val": 100}  # members of the archive per task

Encoding = tuple[int, int] | None  # longer side and JPEG quality; None: copy unchanged
Task = Callable[[list[TarInfo]], list[TarInfo]]


def main() -> None:
    arguments = parse_arguments()
    tars, output = Path(arguments.tars).expanduser(), Path(arguments.output).expanduser()
    encoding = (arguments.max_side, arguments.quality or 90) if arguments.max_side else None
    if not tars.is_dir():
        raise UserError(f"{tars}: no such folder; give the folder with the archives")
    present = {name for name in (TRAIN, VAL, DEVKIT) if (tars / name).is_file()}
    if arguments.flat_val and DEVKIT not in present:
        raise UserError(f"{tars}: has no {DEVKIT}, which holds the classes of the images; download it")
    check_output(output, foreign_files=bool(arguments.flat_val))
    useful = arguments.flat_val or any(files <= present for files in NEEDS.values())
    if not useful and not Work(output).complete:
        raise UserError(f"{tars}: has neither {TRAIN} nor {VAL} with {DEVKIT}; download one of the sets")
    with open_work(output) as work:
        if not arguments.hash:
            print("--no-hash: the archives are not compared with the official ones", flush=True)
        try:
            if arguments.flat_val:
                verify(tars / DEVKIT, work, arguments.hash)
                sort_flat(Path(arguments.flat_val).expanduser(), tars / DEVKIT, work)
            else:
                prepare(tars, present, work, encoding, arguments.hash)
        except KeyboardInterrupt:
            print("stopped; run the same command again to resume", file=sys.stderr)
            raise


def parse_arguments() -> argparse.Namespace:
    parser = command_parser(__doc__)
    add = parser.add_argument
    add("tars", metavar="TARS", help="folder with the archives")
    add("output", metavar="OUTPUT", help="folder to create, or to resume")
    add("--max-side", type=int, metavar="N", help="scale larger images down; e.g. 500")
    add("--quality", type=int, metavar="Q", help="JPEG quality of re-encoded images (default: 90)")
    add("--flat-val", metavar="DIR", help="only move the validation images from DIR to OUTPUT/val/WNID/")
    text = "do not compare archives with the official md5: for tars of your own in the same layout"
    add("--no-hash", dest="hash", action="store_false", help=text)
    arguments = parser.parse_args()
    if arguments.max_side is not None and arguments.max_side < 1:
        raise UserError(f"--max-side: must be at least 1 (got {arguments.max_side}); raise it")
    if arguments.quality is not None and not arguments.max_side:
        raise UserError("--quality: re-encodes only with --max-side; add --max-side, or remove --quality")
    if arguments.quality is not None and not 1 <= arguments.quality <= 95:
        raise UserError(f"--quality: must be between 1 and 95 (got {arguments.quality}); change it")
    if arguments.flat_val and arguments.max_side:
        raise UserError("--flat-val: moves images unchanged; remove --max-side")
    return arguments


def check_output(output: Path, foreign_files: bool) -> None:
    """Raise UserError if `output` is not a folder, or holds other files and they are not allowed."""
    if output.exists() and not output.is_dir():
        raise UserError(f"{output}: is not a folder; name a new folder, or one to resume")
    if output.exists() and not (output / WORK).is_dir() and not foreign_files:
        for name in sorted(set(os.listdir(output)) - {TRAIN, VAL, DEVKIT, "train", "val", "lost+found"}):
            raise UserError(f"{output}: holds {name!r}, which this program did not create; name a new folder")


def prepare(tars: Path, present: set[str], work: "Work", encoding: Encoding, check: bool) -> None:
    """Extract both sets, or the one whose archives are present, after all quick checks."""
    now, before = list(encoding) if encoding else None, work.state.get("encoding", "none yet")
    if before not in ("none yet", now):
        was = f"with --max-side {before[0]} --quality {before[1]}" if before else "without --max-side"
        raise UserError(f"{work.output}: was started {was}; use the same options, or name a new folder")
    sets = [split for split in ("train", "val") if NEEDS[split] <= present]
    for split in sorted(NEEDS.keys() - set(sets)):
        if split in work.complete and (work.output / split).is_dir():
            print(f"{split}: already complete{totals(split, work)}")
        else:
            missing = " and ".join(sorted(NEEDS[split] - present))
            print(f"{split}: skipped, {missing} missing in {tars}", flush=True)
    targets: dict[str, Targets] = {}
    for split in reversed(sets):  # the small archives first
        work.root(split)
        for name in sorted(NEEDS[split]):
            verify(tars / name, work, check)
        if split == "train":
            targets[split] = train_targets(tars / TRAIN)
        else:
            targets[split] = val_targets(tars / VAL, tars / DEVKIT)
    if sets:
        work.state["encoding"] = now
        work.save()
    for split in sets:
        make_set(split, tars / (TRAIN if split == "train" else VAL), targets[split], work, encoding)
    if encoding:
        text = f"images: longer side at most {encoding[0]}, JPEG quality {encoding[1]}"
        print(f"{text}; the effect on accuracy was not measured")
    print(f"to check them: {shlex.join(['python', 'scripts/check_data.py', str(work.output)])}")


class Work:
    """The folder OUTPUT/.prepare_imagenet: unfinished sets, and state.json with what was done.

    Its keys: "verified", archive → [bytes, time] of those with the official md5; "complete", split →
    [classes, images]; "encoding".
    """

    def __init__(self, output: Path):
        self.output, self.folder = output, output / WORK
        self.unfinished = self.folder / "unfinished"  # emptied when the program starts
        self.state: dict = {"verified": {}, "complete": {}}
        path = self.folder / "state.json"
        if path.exists():
            try:
                state = json.loads(path.read_bytes())
                if not all(isinstance(state[key], dict) for key in self.state):
                    raise ValueError("unexpected entries")
            except (ValueError, TypeError, KeyError) as error:
                text = f"{path}: damaged ({error}); delete {self.folder} and move train/ and val/ away"
                raise UserError(text) from None
            self.state = state
        self.complete = self.state["complete"]

    def save(self) -> None:
        write(self.folder / "state.json.new", json.dumps(self.state).encode())
        os.sync()
        os.replace(self.folder / "state.json.new", self.folder / "state.json")

    def root(self, split: str) -> Path:
        """Return the folder of a set's class folders, which moves to OUTPUT once all are complete."""
        final = self.output / split
        if final.exists() and split not in self.complete:
            hint = f", or sort its images with --flat-val {final}" if split == "val" else ""
            raise UserError(f"{final}: exists, and this program did not create it; move it away{hint}")
        return final if final.exists() else self.folder / split

    def finish(self, split: str, root: Path, counts: tuple[int, int], changed: bool) -> None:
        """Record a set as complete and give it its final name."""
        final = self.output / split
        new = changed or root != final or split not in self.complete
        if new:
            self.complete[split] = list(counts)
            self.save()
            if root != final:
                os.rename(root, final)
        print(f"{split}: {'' if new else 'already '}complete{totals(split, self)}", flush=True)


@contextlib.contextmanager
def open_work(output: Path) -> Iterator[Work]:
    """Lock `output` against other processes."""
    (output / WORK).mkdir(parents=True, exist_ok=True)
    with open(output / WORK / "lock", "a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{output}: another process is preparing it; wait, or stop it first") from None
        work = Work(output)
        shutil.rmtree(work.unfinished, ignore_errors=True)
        yield work
        shutil.rmtree(work.unfinished, ignore_errors=True)


def verify(archive: Path, work: Work, check: bool) -> None:
    """Raise UserError if an archive lacks its official md5; hash it only once, as that takes minutes."""
    status = archive.stat()
    stamp = [status.st_size, status.st_mtime_ns]
    if not check or work.state["verified"].get(archive.name) == stamp:
        return
    from torchvision.datasets.imagenet import ARCHIVE_META  # takes seconds: it imports torch

    expected = dict(ARCHIVE_META.values())[archive.name]
    digest = hashlib.md5(usedforsecurity=False)
    title = f"md5 of {archive.name}"
    with progress(title, status.st_size, "B") as bar, reading(archive), open(archive, "rb") as file:
        while content := file.read(1 << 23):
            digest.update(content)
            bar.update(len(content))
    if digest.hexdigest() != expected:
        text = f"has another md5 than the official archive (got {digest.hexdigest()}, expected {expected})"
        raise UserError(f"{archive}: {text}; {AGAIN}, or add --no-hash if it is your own")
    work.state["verified"][archive.name] = stamp
    work.save()


def totals(split: str, work: Work) -> str:
    """Return the numbers of images and classes of a complete set as text."""
    classes, images = work.complete[split]
    text = f", {images:,} images in {classes:,} classes"
    if (classes, images) != OFFICIAL[split]:
        text += f" (the official set has {OFFICIAL[split][1]:,} in {OFFICIAL[split][0]:,})"
    return text


def encode(content: bytes, where: str, max_side: int, quality: int) -> bytes:
    """Return an image as an RGB JPEG with sides of at most `max_side`, unchanged if it is one already."""
    with contextlib.suppress(Exception), Image.open(io.BytesIO(content)) as image:  # decode names the error
        if image.format == "JPEG" and image.mode == "RGB" and max(image.size) <= max_side:
            return content
    image = Image.fromarray(decode(content, where))
    scale = max_side / max(image.size)
    if scale < 1:
        size = [max(1, round(side * scale)) for side in image.size]
        image = image.resize(size, Image.Resampling.LANCZOS)
    target = io.BytesIO()
    image.save(target, "JPEG", quality=quality, subsampling="4:2:0")
    return target.getvalue()


def make_set(split: str, archive: Path, targets: Targets, work: Work, encoding: Encoding) -> None:
    """Extract the missing members of an archive: class folders of train/, images of val/.

    Each goes to `work.unfinished` first and is renamed once it is on the disk, so that a path that exists
    is complete, even after a power cut.
    """
    root = work.root(split)
    root.mkdir(exist_ok=True)
    done = {Path(name) for name in os.listdir(root)} if split == "train" else val_files(root)
    for extra in sorted(done - {path for _, path in targets}):
        raise UserError(f"{root / extra}: is not in the archive; move it away")
    todo = {member: root / path for member, path in targets if path not in done}
    members, size = list(todo), CHUNK[split]
    chunks = [members[start : start + size] for start in range(0, len(members), size)]
    work.unfinished.mkdir(exist_ok=True)
    for chunk in extract_all(split, archive, chunks, work, encoding):
        os.sync()
        for member in chunk:
            todo[member].parent.mkdir(exist_ok=True)
            os.rename(work.unfinished / todo[member].name, todo[member])
    folders = [entry for entry in os.scandir(root) if entry.is_dir()]
    images = sum(len(os.listdir(folder)) for folder in folders)
    work.finish(split, root, (len(folders), images), bool(todo))


def extract_all(
    split: str, archive: Path, chunks: list[list[TarInfo]], work: Work, encoding: Encoding
) -> Iterator[list[TarInfo]]:
    """Extract each chunk to `work.unfinished`; yield the finished ones in any order."""
    total = sum(member.size for chunk in chunks for member in chunk)
    free = shutil.disk_usage(work.folder).free
    if not encoding and free < total:
        print(f"{split}: needs {total / 1e9:.1f} GB, {free / 1e9:.1f} are free", flush=True)
    workers = len(os.sched_getaffinity(0)) if encoding else 0  # the disk limits copying, not the CPU
    task = partial(extract, archive, work.unfinished, encoding)
    with progress(f"{split}: extracting", total, "B") as bar:
        for chunk in in_processes(task, chunks, workers) if workers else map(task, chunks):
            yield chunk
            bar.update(sum(member.size for member in chunk))


def in_processes(task: Task, chunks: list[list[TarInfo]], workers: int) -> Iterator[list[TarInfo]]:
    """Call `task` with each chunk in worker processes; yield the finished chunks in any order."""
    try:
        with process_pool(workers) as pool:
            futures = {pool.submit(task, chunk): chunk for chunk in chunks}
            for future in as_completed(futures):
                future.result()
                yield futures[future]
    except BrokenExecutor:
        text = "a worker process died (killed, or out of memory); run the same command again to resume"
        raise UserError(text) from None


def extract(archive: Path, folder: Path, encoding: Encoding, members: list[TarInfo]) -> list[TarInfo]:
    """Extract images to `folder`, and class tars to folders in it; return `members`."""
    with reading(archive), tarfile.open(archive, "r:") as tar:
        for member in members:
            if not member.name.endswith(".tar"):
                write_image(folder / member.name, tar, member, str(archive), encoding)
                continue
            target = folder / member.name.removesuffix(".tar")
            target.mkdir()
            where = f"{archive}: {member.name}"
            with reading(where), tarfile.open(fileobj=tar.extractfile(member), mode="r:") as inner:
                for image in read_members(inner, where, rf"{WNID}_[0-9]+\.JPEG"):
                    write_image(target / image.name, inner, image, where, encoding)
    return members


def write_image(path: Path, tar: tarfile.TarFile, member: TarInfo, where: str, encoding: Encoding) -> None:
    """Write a member of a tar to a file, re-encoded if `encoding` is given."""
    if member.size > MAX_IMAGE_BYTES:
        raise UserError(f"{where}: member {member.name!r} is too large ({member.size:,} bytes); {AGAIN}")
    content = tar.extractfile(member).read()
    write(path, encode(content, f"{where}: {member.name}", *encoding) if encoding else content)


def val_files(root: Path) -> set[Path]:
    """Return {WNID/NAME} of the official images in the class folders of a val/."""
    return {path.relative_to(root) for path in root.glob("*/*") if re.fullmatch(VAL_NAME, path.name)}


def write(path: Path, content: bytes) -> None:
    """Write a file; raise UserError if that fails."""
    try:
        path.write_bytes(content)
    except OSError as error:
        text = f"cannot be written ({error.strerror}); fix that, then run the same command again to resume"
        raise UserError(f"{path}: {text}") from None


def sort_flat(source: Path, devkit: Path, work: Work) -> None:
    """Move images from `source` to OUTPUT/val/WNID/; those moved before need no other record."""
    if not source.is_dir():
        raise UserError(f"--flat-val {source}: no such folder; name the one with the validation images")
    if (work.folder / "val").exists():
        text = f"holds a part of {VAL}; continue without --flat-val, or delete this folder"
        raise UserError(f"{work.folder / 'val'}: {text}")
    root = work.output / "val"
    truth = read_devkit(devkit)
    entries = {entry.name: entry for entry in os.scandir(source) if re.fullmatch(VAL_NAME, entry.name)}
    for entry in entries.values():
        if not entry.is_file(follow_symlinks=False):
            raise UserError(f"{entry.path}: is not a plain file; replace it with the image")
    moved = val_files(root)
    classes = match_truth(entries.keys() | {path.name for path in moved}, truth, str(source))
    for path in moved:
        if path.parent.name != classes[path.name] or path.name in entries:
            also = path.name in entries
            reason = f"is also in {source}" if also else f"belongs to class {classes[path.name]}"
            raise UserError(f"{root / path}: {reason}; nothing is overwritten, remove or move one")
    with progress("val: moving", len(entries), " images") as bar:
        # Class by class: a partly sorted val/ lacks classes, so that no training accepts it as complete.
        for name in sorted(entries, key=lambda name: (classes[name], name)):
            target = root / classes[name] / name
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                os.rename(source / name, target)
            except OSError as error:
                text = f"cannot be moved to {target.parent} ({error.strerror}); put both on one writable disk"
                raise UserError(f"{source / name}: {text}") from None
            bar.update()
    work.finish("val", root, (len(set(classes.values())), len(classes)), bool(entries))


if __name__ == "__main__":
    run_main(main)
