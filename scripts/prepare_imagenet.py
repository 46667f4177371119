"""Make class folders of ImageNet's official archives (ILSVRC 2012): OUTPUT/train/WNID/, OUTPUT/val/WNID/.

    python scripts/prepare_imagenet.py TARS OUTPUT
    python scripts/prepare_imagenet.py TARS OUTPUT --max-side 500       less to store and decode
    python scripts/prepare_imagenet.py TARS ROOT --flat-val ROOT/val    sort a val/ that was unpacked flat

TARS holds ILSVRC2012_img_train.tar, and ILSVRC2012_img_val.tar with ILSVRC2012_devkit_t12.tar.gz; one of
the two sets is enough. Stopped anywhere, the same command goes on. train/ and val/ appear when they are
whole; OUTPUT/.prepare_imagenet holds what is not, and what is known about the rest.

--max-side scales pictures with a longer side down to it (Lanczos) and saves them as RGB JPEGs (4:2:0).
Of the others, RGB JPEGs are copied unchanged; gray, CMYK and PNG pictures become RGB JPEGs. What that costs
in accuracy is not measured.
"""

import argparse
import contextlib
import fcntl
import gzip
import hashlib
import io
import json
import os
import re
import shlex
import shutil
import sys
import tarfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]  # its own folder too, for python -P
from check_data import process_pool, progress
from PIL import Image

from data.decode import decode
from resnext.errors import UserError, command_parser, run_command

TRAIN, VAL = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"
DEVKIT = "ILSVRC2012_devkit_t12.tar.gz"
NEEDS = {"train": {TRAIN}, "val": {VAL, DEVKIT}}
OFFICIAL = {"train": (1000, 1_281_167), "val": (1000, 50_000)}
WNID = "n[0-9]{8}"
VAL_NAME = r"ILSVRC2012_val_[0-9]{8}\.JPEG"
DEVKIT_FILES = r"ILSVRC2012_devkit_t12/data/(?:meta\.mat|ILSVRC2012_validation_ground_truth\.txt)"
WORK = ".prepare_imagenet"
BLOCK = 512
LARGEST_PICTURE = 1 << 28  # bytes; what is larger is not read into memory
LARGEST_DEVKIT = 1 << 26  # bytes, unpacked
LARGEST_EXTENSION = 1 << 16  # bytes of an extended header
AGAIN = "get the archive again"
CHUNK = 100  # validation pictures a task

Encoding = tuple[int, int]  # longer side, JPEG quality


def main() -> None:
    arguments = parse_arguments()
    tars, output = Path(arguments.tars).expanduser(), Path(arguments.output).expanduser()
    if not tars.is_dir():
        raise UserError(f"{tars}: no such folder; TARS is where the archives are")
    there = {name for name in (TRAIN, VAL, DEVKIT) if (tars / name).is_file()}
    encoding = (arguments.max_side, arguments.quality or 90) if arguments.max_side else None
    if arguments.flat_val and DEVKIT not in there:
        raise UserError(f"{tars}: has no {DEVKIT}; it tells the classes of the pictures")
    check_output(output, arguments.flat_val is not None)
    if (
        not arguments.flat_val
        and not any(files <= there for files in NEEDS.values())
        and not Work(output / WORK).state["complete"]
    ):
        raise UserError(f"{tars}: nothing to do, has neither {TRAIN} nor {VAL} with {DEVKIT}; get them first")
    with open_work(output) as work:
        if not arguments.hash:
            print("--no-hash: whether the archives are the official ones is not checked", flush=True)
        try:
            if arguments.flat_val:
                verify(tars / DEVKIT, work, arguments.hash)
                sort_flat(Path(arguments.flat_val).expanduser(), tars / DEVKIT, output, work)
            else:
                prepare(tars, there, output, work, encoding, arguments.hash)
        except KeyboardInterrupt:
            print("stopped; the same command goes on from here", file=sys.stderr)
            raise


def parse_arguments() -> argparse.Namespace:
    parser = command_parser(__doc__)
    parser.add_argument("tars", metavar="TARS", help="folder with the archives")
    parser.add_argument("output", metavar="OUTPUT", help="folder to make, or to go on with")
    parser.add_argument("--max-side", type=int, metavar="N", help="scale larger pictures down; e.g. 500")
    parser.add_argument("--quality", type=int, metavar="Q", help="of JPEGs that are made (default: 90)")
    parser.add_argument(
        "--flat-val", metavar="DIR", help="move the validation pictures from DIR to OUTPUT/val/WNID/; no more"
    )
    parser.add_argument(
        "--no-hash",
        dest="hash",
        action="store_false",
        help="do not compare archives with the official md5: for tars of your own in the same layout",
    )
    arguments = parser.parse_args()
    if arguments.max_side is not None and arguments.max_side < 1:
        raise UserError(f"--max-side: must be at least 1, not {arguments.max_side}")
    if arguments.quality is not None and not arguments.max_side:
        raise UserError("--quality: needs --max-side; without it pictures are copied unchanged")
    if arguments.quality is not None and not 1 <= arguments.quality <= 95:
        raise UserError(f"--quality: must be between 1 and 95, not {arguments.quality}")
    if arguments.flat_val and arguments.max_side:
        raise UserError("--flat-val moves pictures as they are; leave out --max-side")
    return arguments


def prepare(
    tars: Path, there: set[str], output: Path, work: "Work", encoding: Encoding | None, check: bool
) -> None:
    """Both sets, or the one there is an archive of. Everything that can be checked quickly comes first."""
    work.check_encoding(encoding)
    complete = {split for split in NEEDS if work.is_complete(split) and (output / split).is_dir()}
    for split, files in NEEDS.items():
        missing = sorted(files - there)
        if missing and split not in complete:
            print(f"{split}: left out, {' and '.join(missing)} missing in {tars}", flush=True)
    plans = {}
    if NEEDS["val"] <= there:
        root = split_root("val", output, work)
        verify(tars / DEVKIT, work, check)
        truth = read_devkit(tars / DEVKIT)
        verify(tars / VAL, work, check)
        plans["val"] = plan_val(tars / VAL, truth, root, work, encoding)
    if NEEDS["train"] <= there:
        root = split_root("train", output, work)
        verify(tars / TRAIN, work, check)
        plans["train"] = plan_train(tars / TRAIN, root, work, encoding)
    if plans:
        work.state["encoding"] = encoding
        work.save()
    for split in NEEDS:
        if split in plans:
            carry_out(split, plans[split], output, work, encoding)
        elif split in complete:
            print(f"{split}: complete already{totals(split, work)}")
    if encoding:
        print(
            f"pictures: longer side at most {encoding[0]}, JPEG quality {encoding[1]}; "
            "what that costs in accuracy is not measured"
        )
    print(f"to check them: {shlex.join(['python', 'scripts/check_data.py', str(output)])}")


# ---------------------------------------------------------------------------------------------------------
# OUTPUT, and what is known about it


def check_output(output: Path, flat: bool) -> None:
    """Refuse a folder that is in use by something else; --flat-val is for just that."""
    if output.exists() and not output.is_dir():
        raise UserError(f"{output}: is not a folder; name one to make, or to go on with")
    if not output.exists() or (output / WORK).is_dir() or flat:
        return
    ours = {TRAIN, VAL, DEVKIT, "train", "val", "lost+found"}
    strangers = sorted({entry.name for entry in os.scandir(output)} - ours)
    if strangers:
        raise UserError(
            f"{output}: holds {strangers[0]!r}, which this program did not put there; name a new folder"
        )


class Work:
    """OUTPUT/.prepare_imagenet: sets that are not whole yet, and what is known about finished ones."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.unfinished = folder / "unfinished"  # emptied when the program starts
        self.path = folder / "state.json"
        self.state = {"verified": {}, "classes": {}, "complete": {}}
        if self.path.exists():
            try:
                state = json.loads(self.path.read_bytes())
                if not all(isinstance(state[key], dict) for key in self.state):
                    raise ValueError("other entries than expected")
            except (ValueError, TypeError, KeyError) as error:
                raise UserError(
                    f"{self.path}: damaged ({error}); delete {folder} and move train/, val/ away"
                ) from None
            self.state = state

    def save(self) -> None:
        temporary = self.path.with_name("state.json.new")
        write(temporary, json.dumps(self.state).encode(), sync=True)
        os.replace(temporary, self.path)

    def check_encoding(self, encoding: Encoding | None) -> None:
        """One OUTPUT holds pictures of one kind."""
        now = list(encoding) if encoding else None
        before = self.state.get("encoding", now)
        if before != now:
            was = "without --max-side"
            if before:
                was = f"with --max-side {before[0]} --quality {before[1]}"
            raise UserError(f"{self.folder.parent}: was begun {was}; repeat that, or name a new folder")

    def is_complete(self, split: str) -> bool:
        return split in self.state["complete"]

    def complete(self, split: str, classes: int, pictures: int) -> None:
        self.state["complete"][split] = [classes, pictures]
        self.save()


@contextlib.contextmanager
def open_work(output: Path) -> Iterator[Work]:
    """The one process that works on `output`."""
    folder = output / WORK
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{output}: another process is preparing it; wait, or stop it first") from None
        work = Work(folder)
        shutil.rmtree(work.unfinished, ignore_errors=True)
        yield work
        shutil.rmtree(work.unfinished, ignore_errors=True)


def split_root(split: str, output: Path, work: Work) -> Path:
    """Where the class folders of a set belong now: they move to OUTPUT together when all are whole."""
    final = output / split
    if final.exists() and not work.is_complete(split):
        hint = f", or sort its pictures with --flat-val {final}" if split == "val" else ""
        raise UserError(f"{final}: exists, and this program did not make it; move it away{hint}")
    return final if final.exists() else work.folder / split


def verify(archive: Path, work: Work, check: bool) -> None:
    """Compare with the official md5, once for each archive: it takes long."""
    status = archive.stat()
    stamp = [status.st_size, status.st_mtime_ns]
    if not check or work.state["verified"].get(archive.name) == stamp:
        return
    from torchvision.datasets.imagenet import ARCHIVE_META  # takes seconds: it imports torch

    expected = dict(ARCHIVE_META.values())[archive.name]
    digest = hashlib.md5(usedforsecurity=False)
    with (
        progress(f"hash of {archive.name}", status.st_size, "B") as bar,
        reading(archive),
        open(archive, "rb") as file,
    ):
        while content := file.read(1 << 23):
            digest.update(content)
            bar.update(len(content))
    if digest.hexdigest() != expected:
        raise UserError(
            f"{archive}: md5 is {digest.hexdigest()}, the official archive has {expected}; {AGAIN}, "
            "or add --no-hash if it is one of your own"
        )
    work.state["verified"][archive.name] = stamp
    work.save()


def totals(split: str, work: Work) -> str:
    """Number of pictures and classes of a finished set."""
    classes, pictures = work.state["complete"][split]
    text = f", {pictures:,} pictures in {classes:,} classes"
    if (classes, pictures) != OFFICIAL[split]:
        text += f" (the official set has {OFFICIAL[split][1]:,} in {OFFICIAL[split][0]:,})"
    return text


# ---------------------------------------------------------------------------------------------------------
# Archives. tarfile's own reader takes a damaged header for the end and reads headers of any size into memory,
# so only its parser of one header is used.


@dataclass(frozen=True)
class Member:
    """A file in a tar."""

    name: str
    offset: int
    size: int


KINDS = {
    tarfile.SYMTYPE: "a symbolic link",
    tarfile.LNKTYPE: "a hard link",
    tarfile.DIRTYPE: "a folder",
    tarfile.CHRTYPE: "a device",
    tarfile.BLKTYPE: "a device",
    tarfile.FIFOTYPE: "a pipe",
}


def read_members(
    file: io.BufferedIOBase, start: int, end: int, where: str, pattern: str, others: bool = False
) -> Iterator[Member]:
    """The files of the tar between two offsets of `file`; a UserError at the first thing that is amiss.

    Names must match `pattern`; with `others`, members that do not are passed over.
    """
    names = set()
    offset = start
    while True:
        file.seek(offset)
        block = file.read(min(BLOCK, max(0, end - offset)))
        if len(block) < BLOCK:
            raise UserError(f"{where}: is cut off after {len(names):,} members, without an end mark; {AGAIN}")
        if not any(block):
            return
        try:
            header = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        except (tarfile.HeaderError, ValueError):
            raise UserError(f"{where}: has a damaged header after {len(names):,} members; {AGAIN}") from None
        name, data = header.name.removeprefix("./"), offset + BLOCK
        member = f"{where}: member {ascii(name)[:100]}"
        size = 0 if header.type in KINDS else header.size  # links may claim their target's
        if size < 0 or data + size > end:
            raise UserError(
                f"{member} claims {size:,} bytes where {end - data:,} are left: cut off or damaged; {AGAIN}"
            )
        offset = data + -(-size // BLOCK) * BLOCK
        plain_file = header.type in (tarfile.REGTYPE, tarfile.AREGTYPE)
        if header.type in (tarfile.XHDTYPE, tarfile.XGLTYPE) and not others:
            check_extension(file, size, member)
        elif plain_file and re.fullmatch(pattern, name):
            if name in names:
                raise UserError(f"{member} is there twice; {AGAIN}")
            names.add(name)
            yield Member(name, data, size)
        elif not others and not (header.isdir() and name in (".", "")):
            kind = "is not a name that belongs there" if plain_file else ""
            kind = kind or f"is {KINDS.get(header.type, 'of an unknown kind')}, not a plain file"
            raise UserError(f"{member} {kind}; {AGAIN}, or pack it without")


def check_extension(file: io.BufferedIOBase, size: int, member: str) -> None:
    """Extended headers may hold times and such, but not change what the header after them says."""
    content = file.read(size) if size <= LARGEST_EXTENSION else b" path="
    if re.search(rb" (path|linkpath|size|GNU\.sparse[^=]*)=", content):
        raise UserError(f"{member} is an extended header that changes name or size; {AGAIN}")


def read_picture(file: io.BufferedIOBase, member: Member, where: str, encoding: Encoding | None) -> bytes:
    """A member's content, encoded anew where that is asked for."""
    if member.size > LARGEST_PICTURE:
        raise UserError(f"{where}: member {member.name!r} has {member.size:,} bytes, no picture has; {AGAIN}")
    file.seek(member.offset)
    content = file.read(member.size)
    if len(content) < member.size:
        raise UserError(f"{where}: ends within {member.name!r}; {AGAIN}")
    return encode(content, f"{where}: {member.name}", *encoding) if encoding else content


def encode(content: bytes, where: str, max_side: int, quality: int) -> bytes:
    """A picture as an RGB JPEG with no side longer than `max_side`; unchanged if it is one already."""
    try:
        with Image.open(io.BytesIO(content)) as image:
            if image.format == "JPEG" and image.mode == "RGB" and max(image.size) <= max_side:
                return content
    except Exception:  # decode says what is wrong
        pass
    image = Image.fromarray(decode(content, where))
    scale = max_side / max(image.size)
    if scale < 1:
        size = [max(1, round(side * scale)) for side in image.size]
        image = image.resize(size, Image.Resampling.LANCZOS)
    target = io.BytesIO()
    image.save(target, "JPEG", quality=quality, subsampling="4:2:0")
    return target.getvalue()


def read_devkit(archive: Path) -> list[str]:
    """The class of each validation picture, in the order of their numbers."""
    try:
        from scipy.io import loadmat
    except ImportError:
        raise UserError("the devkit is a MATLAB file, and scipy reads it: pip install scipy") from None
    meta, truth = read_devkit_files(archive)
    where = f"{archive}: meta.mat"
    check_matlab(meta, where)
    try:
        synsets = loadmat(io.BytesIO(meta), squeeze_me=True, variable_names=["synsets"])["synsets"]
        synsets = [s for s in synsets.reshape(-1) if s["num_children"] == 0]
        wnids = {int(s["ILSVRC2012_ID"]): str(s["WNID"]) for s in synsets}
    except Exception as error:  # loadmat raises many kinds on damaged files
        reason = str(error)[:100] or type(error).__name__
        raise UserError(f"{where} cannot be read ({reason!a}); {AGAIN}") from None
    wrong = [wnid for wnid in wnids.values() if not re.fullmatch(WNID, wnid)]
    if wrong or len(set(wnids.values())) < len(synsets):
        found = f"{ascii(wrong[0])[:100]} for a WNID" if wrong else "a class twice"
        raise UserError(f"{where} has {found}; {AGAIN}")
    where = f"{archive}: ILSVRC2012_validation_ground_truth.txt"
    classes = []
    for number, word in enumerate(truth.split(), 1):
        index = int(word) if re.fullmatch(rb"[0-9]{1,9}", word) else None
        if index not in wnids:
            shown = ascii(word[:40].decode("latin-1"))
            raise UserError(f"{where}: line {number}: {shown} is not the number of a class; {AGAIN}")
        classes.append(wnids[index])
    return classes


def read_devkit_files(archive: Path) -> tuple[bytes, bytes]:
    """meta.mat and the ground truth, out of the archive without unpacking it."""
    try:
        with reading(archive), gzip.open(archive) as file:
            content = file.read(LARGEST_DEVKIT + 1)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{archive}: cut off or damaged ({error}); {AGAIN}") from None
    if len(content) > LARGEST_DEVKIT:
        raise UserError(f"{archive}: unpacks to more than {LARGEST_DEVKIT:,} bytes; {AGAIN}")
    members = read_members(io.BytesIO(content), 0, len(content), str(archive), DEVKIT_FILES, others=True)
    found = {Path(m.name).suffix: content[m.offset : m.offset + m.size] for m in members}
    if len(found) < 2:
        missing = "ILSVRC2012_validation_ground_truth.txt" if ".mat" in found else "meta.mat"
        raise UserError(f"{archive}: has no ILSVRC2012_devkit_t12/data/{missing}; {AGAIN}")
    return found[".mat"], found[".txt"]


def check_matlab(content: bytes, where: str) -> None:
    """Refuse compressed parts that would fill the memory, ahead of loadmat."""
    order = "little" if content[126:128] == b"IM" else "big"
    offset = 128
    while offset + 8 <= len(content):
        kind, size = (int.from_bytes(content[offset + i : offset + i + 4], order) for i in (0, 4))
        offset += 8
        if kind == 15:
            unpacker = zlib.decompressobj()
            with contextlib.suppress(zlib.error):  # loadmat finds that, too
                unpacker.decompress(content[offset : offset + size], LARGEST_DEVKIT)
            if unpacker.unconsumed_tail:
                raise UserError(f"{where} unpacks to more than {LARGEST_DEVKIT:,} bytes; {AGAIN}")
        offset += size


# ---------------------------------------------------------------------------------------------------------
# From archives to class folders


@dataclass
class Plan:
    """What is left to do for a set."""

    root: Path
    run: Callable  # with a task's arguments, in any process
    tasks: list[tuple]
    sizes: list[int]  # bytes of each task, in the archive
    finish: Callable  # with a task and its result, here
    verify: Callable[[], tuple[int, int]]  # classes and pictures; a UserError where files are missing


def plan_train(archive: Path, root: Path, work: Work, encoding: Encoding | None) -> Plan:
    """A task a class.

    A class is written to a folder of its own that is renamed when it is whole: so going on takes a look at a
    thousand folders, not one at a million files and headers, and no file needs a temporary name.
    """
    with reading(archive), open(archive, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        tars = list(read_members(file, 0, size, str(archive), rf"{WNID}\.tar"))
    if not tars:
        raise UserError(f"{archive}: holds no class; {AGAIN}")
    classes = work.state["classes"]
    todo = []
    for tar in tars:
        name = tar.name.removesuffix(".tar")
        if classes.get(name, [0, 0, tar.size])[2] != tar.size:
            raise UserError(f"{root / name}: was made of another {tar.name}; name a new OUTPUT folder")
        if not is_whole(root / name, classes.get(name), root.parent == work.folder):
            todo.append((archive, tar, work.unfinished, encoding))

    def finish(task: tuple, result: tuple[int, int]) -> None:
        name = task[1].name.removesuffix(".tar")
        classes[name] = [*result, task[1].size]
        work.save()
        root.mkdir(exist_ok=True)
        os.rename(work.unfinished / name, root / name)

    def verify() -> tuple[int, int]:
        names = {tar.name.removesuffix(".tar") for tar in tars}
        check_names(root, names, {entry.name for entry in os.scandir(root)})
        for name in names:
            if not is_whole(root / name, classes[name], False):
                raise UserError(f"{root / name}: has gone; start the same command again")
        return len(names), sum(classes[name][0] for name in names)

    return Plan(root, extract_class, todo, [task[1].size for task in todo], finish, verify)


def is_whole(folder: Path, known: list[int] | None, discard: bool) -> bool:
    """Whether a class has the number of files and bytes it was made with; if not, `discard` it."""
    if not folder.exists():
        return False
    sizes = [entry.stat().st_size for entry in os.scandir(folder)]
    if known and [len(sizes), sum(sizes)] == known[:2]:
        return True
    if not discard:
        made = f"{known[0]:,} with {known[1]:,} were made" if known else "it was not made by this program"
        raise UserError(
            f"{folder}: holds {len(sizes):,} files with {sum(sizes):,} bytes, {made}; "
            "delete that folder and start the same command again"
        )
    shutil.rmtree(folder)  # a power cut has taken files along
    return False


def extract_class(archive: Path, tar: Member, unfinished: Path, encoding: Encoding | None) -> tuple[int, int]:
    """All pictures of a class tar; returns their number and bytes."""
    folder = unfinished / tar.name.removesuffix(".tar")
    folder.mkdir(parents=True)
    where = f"{archive}: {tar.name}"
    count = total = 0
    with reading(archive), open(archive, "rb") as file:
        for member in read_members(file, tar.offset, tar.offset + tar.size, where, rf"{WNID}_[0-9]+\.JPEG"):
            content = read_picture(file, member, where, encoding)
            write(folder / member.name, content)
            count, total = count + 1, total + len(content)
    if not count:
        raise UserError(f"{where}: holds no pictures; {AGAIN}")
    return count, total


def plan_val(archive: Path, truth: list[str], root: Path, work: Work, encoding: Encoding | None) -> Plan:
    """Tasks of some pictures each, which get their final names one by one when they are whole."""
    with reading(archive), open(archive, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        members = list(read_members(file, 0, size, str(archive), VAL_NAME))
    classes = match_truth({member.name for member in members}, truth, str(archive))
    done = val_files(root)
    todo = []
    for member in members:
        path = f"{classes[member.name]}/{member.name}"
        size = done.get(path)
        if size is None or (
            root.parent == work.folder and (size != member.size if not encoding else not size)
        ):
            todo.append((member, root / path))
    chunks = [todo[start : start + CHUNK] for start in range(0, len(todo), CHUNK)]
    for wnid in set(classes.values()):
        (root / wnid).mkdir(parents=True, exist_ok=True)

    return Plan(
        root=root,
        run=extract_pictures,
        tasks=[(archive, chunk, work.unfinished, encoding) for chunk in chunks],
        sizes=[sum(member.size for member, _ in chunk) for chunk in chunks],
        finish=lambda task, result: None,
        verify=lambda: verify_val(root, classes),
    )


def val_files(root: Path) -> dict[str, int]:
    """WNID/NAME → bytes of the official pictures in the class folders of a val/."""
    folders = [entry for entry in os.scandir(root) if entry.is_dir()] if root.is_dir() else []
    return {
        f"{folder.name}/{file.name}": file.stat(follow_symlinks=False).st_size
        for folder in folders
        for file in os.scandir(folder)
        if re.fullmatch(VAL_NAME, file.name)
    }


def match_truth(names: set[str], truth: list[str], where: str) -> dict[str, str]:
    """The class of each picture's name; the numbers in the names must be 1 … length of `truth`."""
    classes = {f"ILSVRC2012_val_{number:08}.JPEG": wnid for number, wnid in enumerate(truth, 1)}
    if names != classes.keys():
        odd = min(names ^ classes.keys())
        what = f"has {odd}, which the ground truth has no class for" if odd in names else f"lacks {odd}"
        raise UserError(
            f"{where}: {what}; {len(names):,} pictures, {len(truth):,} lines of ground truth: "
            f"get pictures and {DEVKIT} of the same year"
        )
    return classes


def verify_val(root: Path, classes: dict[str, str]) -> tuple[int, int]:
    """Number of classes and pictures; a UserError unless the class folders hold just these."""
    check_names(root, {f"{wnid}/{name}" for name, wnid in classes.items()}, set(val_files(root)))
    return len(set(classes.values())), len(classes)


def check_names(root: Path, expected: set[str], found: set[str]) -> None:
    if expected - found:
        raise UserError(f"{root / min(expected - found)}: has gone; start the same command again")
    if found - expected:
        raise UserError(f"{root / min(found - expected)}: is not in the archive; move it away")


def extract_pictures(
    archive: Path, chunk: list[tuple[Member, Path]], unfinished: Path, encoding: Encoding | None
) -> None:
    """Some pictures of a flat tar."""
    unfinished.mkdir(parents=True, exist_ok=True)
    with reading(archive), open(archive, "rb") as file:
        for member, target in chunk:
            content = read_picture(file, member, str(archive), encoding)
            write(unfinished / member.name, content)
            os.replace(unfinished / member.name, target)


def carry_out(split: str, plan: Plan, output: Path, work: Work, encoding: Encoding | None) -> None:
    """Run what is to be done, look at the result, and give it its final name."""
    final = output / split
    was_complete = not plan.tasks and plan.root == final
    if plan.tasks and not encoding:
        free = shutil.disk_usage(work.folder).free
        if free < sum(plan.sizes):
            print(f"{split}: needs {sum(plan.sizes) / 1e9:.1f} GB, {free / 1e9:.1f} are free", flush=True)
    with progress(f"{split}: unpacking", sum(plan.sizes), "B") as bar:
        for number, result in run_tasks(
            plan.run, plan.tasks, len(os.sched_getaffinity(0)) if encoding else 0
        ):
            plan.finish(plan.tasks[number], result)
            bar.update(plan.sizes[number])
    classes, pictures = plan.verify()
    if not was_complete:
        os.sync()  # a power cut after "complete" must not leave empty files
        work.complete(split, classes, pictures)
        if plan.root != final:
            os.rename(plan.root, final)
    print(f"{split}: complete{' already' if was_complete else ''}{totals(split, work)}", flush=True)


def run_tasks(function: Callable, tasks: Iterable[tuple], workers: int) -> Iterator[tuple[int, object]]:
    """Number and result of each task, in any order. Copying is the disk's work: no workers are needed."""
    if not workers:
        yield from ((number, function(*task)) for number, task in enumerate(tasks))
        return
    try:
        with process_pool(workers) as pool:
            futures = {pool.submit(function, *task): number for number, task in enumerate(tasks)}
            for future in as_completed(futures):
                yield futures[future], future.result()
    except BrokenProcessPool:
        raise UserError(
            "a worker process died (killed, or out of memory); the same command goes on from here"
        ) from None


def write(path: Path, content: bytes, sync: bool = False) -> None:
    """A file whose reasons not to be written the user can mend."""
    try:
        with open(path, "wb") as file:
            file.write(content)
            if sync:
                file.flush()
                os.fsync(file.fileno())
    except OSError as error:
        raise UserError(
            f"{path}: cannot be written ({error.strerror}); mend that, and the same command goes on from here"
        ) from None


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Name the file in errors that do not."""
    try:
        yield
    except OSError as error:
        if error.filename is None and not isinstance(error, gzip.BadGzipFile):
            raise UserError(f"{path}: cannot be read ({error.strerror}); check the disk") from None
        raise


# ---------------------------------------------------------------------------------------------------------
# A flat val/


def sort_flat(source: Path, devkit: Path, output: Path, work: Work) -> None:
    """Move pictures from `source` to OUTPUT/val/WNID/. What is moved already tells how far it has got."""
    if not source.is_dir():
        raise UserError(f"--flat-val {source}: no such folder; name the one with the validation pictures")
    if (work.folder / "val").exists():
        raise UserError(
            f"{work.folder / 'val'}: the archive is being unpacked; go on without --flat-val, or delete that"
        )
    root = output / "val"
    truth = read_devkit(devkit)
    entries = {e.name: e for e in os.scandir(source) if re.fullmatch(VAL_NAME, e.name)}
    for entry in entries.values():
        if not entry.is_file(follow_symlinks=False):
            raise UserError(f"{entry.path}: is not a plain file; replace it with the picture")
    moved = val_files(root)
    names = {path.rpartition("/")[2] for path in moved}
    classes = match_truth(entries.keys() | names, truth, str(source))
    for path in moved:
        name = path.rpartition("/")[2]
        if path != f"{classes[name]}/{name}" or name in entries:
            reason = f"is also in {source}" if name in entries else f"belongs to class {classes[name]}"
            raise UserError(f"{root / path}: {reason}; nothing is overwritten, look which is right")
    with progress("val: moving", len(entries), " pictures") as bar:
        # Class by class: a val/ that is sorted in part lacks classes, and no training takes it for whole.
        for name in sorted(entries, key=lambda name: (classes[name], name)):
            target = root / classes[name] / name
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                os.rename(source / name, target)
            except OSError as error:
                raise UserError(
                    f"{source / name}: cannot be moved to {target.parent} ({error.strerror}); "
                    "both must be on one disk, and writable"
                ) from None
            bar.update(1)
    work.complete("val", *verify_val(root, classes))
    print(f"val: complete{'' if entries else ' already'}{totals('val', work)}")


if __name__ == "__main__":
    run_command(main)
