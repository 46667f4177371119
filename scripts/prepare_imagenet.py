"""Make class folders of ImageNet's official archives (ILSVRC 2012): OUTPUT/train/WNID/, OUTPUT/val/WNID/.

    python scripts/prepare_imagenet.py TARS OUTPUT
    python scripts/prepare_imagenet.py TARS OUTPUT --max-side 500       less to store and decode
    python scripts/prepare_imagenet.py TARS ROOT --flat-val ROOT/val    sort a val/ that was unpacked flat

TARS holds ILSVRC2012_img_train.tar, and ILSVRC2012_img_val.tar with ILSVRC2012_devkit_t12.tar.gz; one of
the two sets is enough. If the program is stopped, run the same command again to resume. train/ and val/
appear when they are complete; OUTPUT/.prepare_imagenet holds unfinished sets and the state.

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
from collections.abc import Callable, Iterator
from concurrent.futures import BrokenExecutor, as_completed
from pathlib import Path
from tarfile import TarInfo

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]  # its own folder too, for python -P
from check_data import process_pool, progress
from PIL import Image

from data.decode import decode
from resnext.errors import UserError, command_parser, run_main

TRAIN, VAL = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"
DEVKIT = "ILSVRC2012_devkit_t12.tar.gz"
NEEDS = {"train": {TRAIN}, "val": {VAL, DEVKIT}}
OFFICIAL = {"train": (1000, 1_281_167), "val": (1000, 50_000)}
WNID = "n[0-9]{8}"
VAL_NAME = r"ILSVRC2012_val_[0-9]{8}\.JPEG"
META = "ILSVRC2012_devkit_t12/data/meta.mat"
TRUTH = "ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt"
WORK = ".prepare_imagenet"
LARGEST_PICTURE = 1 << 28  # bytes; larger files are not read into memory
AGAIN = "get the archive again"
CHUNK = 100  # validation pictures per task

Encoding = tuple[int, int] | None  # longer side and JPEG quality; None: copy unchanged


def main() -> None:
    arguments = parse_arguments()
    tars, output = Path(arguments.tars).expanduser(), Path(arguments.output).expanduser()
    if not tars.is_dir():
        raise UserError(f"{tars}: no such folder; TARS is the folder with the archives")
    present = {name for name in (TRAIN, VAL, DEVKIT) if (tars / name).is_file()}
    encoding = (arguments.max_side, arguments.quality or 90) if arguments.max_side else None
    if arguments.flat_val and DEVKIT not in present:
        raise UserError(f"{tars}: has no {DEVKIT}; it holds the classes of the pictures")
    ours = {WORK, TRAIN, VAL, DEVKIT, "train", "val", "lost+found"}
    if output.exists() and not output.is_dir():
        raise UserError(f"{output}: is not a folder; name a new one, or one to resume")
    if output.exists() and not (output / WORK).is_dir() and not arguments.flat_val:
        for name in sorted(set(os.listdir(output)) - ours):
            raise UserError(f"{output}: holds {name!r}, which this program did not create; name a new folder")
    useful = arguments.flat_val or any(files <= present for files in NEEDS.values())
    if not useful and not Work(output).complete:
        raise UserError(f"{tars}: nothing to do, has neither {TRAIN} nor {VAL} with {DEVKIT}; get them first")
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
    add("--max-side", type=int, metavar="N", help="scale larger pictures down; e.g. 500")
    add("--quality", type=int, metavar="Q", help="JPEG quality of re-encoded pictures (default: 90)")
    add("--flat-val", metavar="DIR", help="only move the validation pictures from DIR to OUTPUT/val/WNID/")
    text = "do not compare archives with the official md5: for tars of your own in the same layout"
    add("--no-hash", dest="hash", action="store_false", help=text)
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


def prepare(tars: Path, present: set[str], work: "Work", encoding: Encoding, check: bool) -> None:
    """Make both sets, or the one whose archives are present, after all quick checks."""
    now, before = list(encoding) if encoding else None, work.state.get("encoding", "none yet")
    if before not in ("none yet", now):
        was = f"with --max-side {before[0]} --quality {before[1]}" if before else "without --max-side"
        raise UserError(f"{work.output}: was started {was}; repeat that, or name a new folder")
    for split, needed in NEEDS.items():
        missing = sorted(needed - present)
        if missing and split in work.complete and (work.output / split).is_dir():
            print(f"{split}: complete already{totals(split, work)}")
        elif missing:
            print(f"{split}: skipped, {' and '.join(missing)} missing in {tars}", flush=True)
    val, train = NEEDS["val"] <= present, NEEDS["train"] <= present
    if val:
        val_root = work.root("val")
        verify(tars / DEVKIT, work, check)
        truth = read_devkit(tars / DEVKIT)
        verify(tars / VAL, work, check)
        pictures = list_members(tars / VAL, VAL_NAME)
        classes = match_truth({picture.name for picture in pictures}, truth, str(tars / VAL))
    if train:
        train_root = work.root("train")
        verify(tars / TRAIN, work, check)
        class_tars = list_members(tars / TRAIN, rf"{WNID}\.tar")
    if train or val:
        work.state["encoding"] = now
        work.save()
    if train:
        make_train(tars / TRAIN, class_tars, train_root, work, encoding)
    if val:
        make_val(tars / VAL, pictures, classes, val_root, work, encoding)
    if encoding:
        print(
            f"pictures: longer side at most {encoding[0]}, JPEG quality {encoding[1]}; "
            "what that costs in accuracy is not measured"
        )
    print(f"to check them: {shlex.join(['python', 'scripts/check_data.py', str(work.output)])}")


class Work:
    """OUTPUT/.prepare_imagenet: unfinished sets, and state.json, which says what was done.

    Its keys: "verified", archive → [bytes, time] of those with the official md5; "classes", WNID → [files,
    bytes, bytes of the tar] of unpacked classes; "complete", split → [classes, pictures]; "encoding".
    """

    def __init__(self, output: Path):
        self.output, self.folder = output, output / WORK
        self.unfinished = self.folder / "unfinished"  # emptied when the program starts
        self.state = {"verified": {}, "classes": {}, "complete": {}}
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
        write(self.folder / "state.json.new", json.dumps(self.state).encode(), sync=True)
        os.replace(self.folder / "state.json.new", self.folder / "state.json")

    def root(self, split: str) -> Path:
        """Return where the class folders of a set are now: they move to OUTPUT when all are complete."""
        final = self.output / split
        if final.exists() and split not in self.complete:
            hint = f", or sort its pictures with --flat-val {final}" if split == "val" else ""
            raise UserError(f"{final}: exists, and this program did not create it; move it away{hint}")
        return final if final.exists() else self.folder / split

    def finish(self, split: str, root: Path, counts: tuple[int, int], changed: bool) -> None:
        """Record a set as complete and give it its final name."""
        final = self.output / split
        new = changed or root != final or split not in self.complete
        if new:
            os.sync()  # after a power cut, no file of a complete set may be empty
            self.complete[split] = list(counts)
            self.save()
            if root != final:
                os.rename(root, final)
        print(f"{split}: complete{'' if new else ' already'}{totals(split, self)}", flush=True)


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
    """Compare with the official md5, once per archive: it takes long."""
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
        raise UserError(
            f"{archive}: md5 is {digest.hexdigest()}, the official archive has {expected}; {AGAIN}, "
            "or add --no-hash if it is one of your own"
        )
    work.state["verified"][archive.name] = stamp
    work.save()


def totals(split: str, work: Work) -> str:
    """Return the numbers of pictures and classes of a complete set, as text."""
    classes, pictures = work.complete[split]
    text = f", {pictures:,} pictures in {classes:,} classes"
    if (classes, pictures) != OFFICIAL[split]:
        text += f" (the official set has {OFFICIAL[split][1]:,} in {OFFICIAL[split][0]:,})"
    return text


@contextlib.contextmanager
def reading(archive: Path | str) -> Iterator[None]:
    """Name the archive in errors about its content."""
    try:
        yield
    except (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{archive}: cut off or damaged ({error}); {AGAIN}") from None
    except OSError as error:
        if error.filename is not None:
            raise
        raise UserError(f"{archive}: cannot be read ({error.strerror}); check the disk") from None


def read_members(tar: tarfile.TarFile, where: str, pattern: str) -> Iterator[TarInfo]:
    """Yield the members of a tar: only plain files, each once, with names that match `pattern`."""
    names = set()
    for member in tar:
        name = member.name = member.name.removeprefix("./")
        text = f"{where}: member {ascii(name)[:100]}"
        if member.isdir() and name in (".", ""):
            continue
        if not member.isreg() or member.issparse():
            raise UserError(f"{text} is not a plain file; {AGAIN}, or pack it without")
        if not re.fullmatch(pattern, name):
            raise UserError(f"{text} is not a name that belongs there; {AGAIN}, or pack it without")
        if name in names:
            raise UserError(f"{text} is there twice; {AGAIN}")
        names.add(name)
        yield member
    tar.fileobj.seek(tar.offset)
    if tar.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):  # tarfile takes anything for the end
        raise UserError(f"{where}: is cut off or damaged after {len(names):,} members; {AGAIN}")


def list_members(archive: Path, pattern: str) -> list[TarInfo]:
    """Return the members of an archive, which are checked as in read_members."""
    with reading(archive), tarfile.open(archive, "r:") as tar:
        members = list(read_members(tar, str(archive), pattern))
    if not members:
        raise UserError(f"{archive}: holds no {'class' if archive.name == TRAIN else 'pictures'}; {AGAIN}")
    return members


def read_picture(tar: tarfile.TarFile, member: TarInfo, where: str, encoding: Encoding) -> bytes:
    """Return the content of a member, re-encoded if `encoding` says so."""
    if member.size > LARGEST_PICTURE:
        raise UserError(f"{where}: member {member.name!r} has {member.size:,} bytes, no picture has; {AGAIN}")
    content = tar.extractfile(member).read()
    return encode(content, f"{where}: {member.name}", *encoding) if encoding else content


def encode(content: bytes, where: str, max_side: int, quality: int) -> bytes:
    """Return a picture as an RGB JPEG with sides of at most `max_side`; unchanged if it is one already."""
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


def read_devkit(archive: Path) -> list[str]:
    """Return the class of each validation picture, in the order of their numbers."""
    try:
        from scipy.io import loadmat
    except ImportError:
        raise UserError("the devkit is a MATLAB file, and scipy reads it: pip install scipy") from None
    with reading(archive):
        content = io.BytesIO(gzip.decompress(archive.read_bytes()))
        with tarfile.open(fileobj=content, mode="r:") as tar:
            files = {m.name: tar.extractfile(m).read() for m in tar if m.isreg() and m.name in (META, TRUTH)}
    for name in (META, TRUTH):
        if name not in files:
            raise UserError(f"{archive}: has no {name}; {AGAIN}")
    where = f"{archive}: meta.mat"
    try:
        synsets = loadmat(io.BytesIO(files[META]), squeeze_me=True, variable_names=["synsets"])["synsets"]
        synsets = [s for s in synsets.reshape(-1) if s["num_children"] == 0]
        wnids = {int(s["ILSVRC2012_ID"]): str(s["WNID"]) for s in synsets}
    except Exception as error:  # loadmat raises many kinds on damaged files
        reason = str(error)[:100] or type(error).__name__
        raise UserError(f"{where} cannot be read ({reason!a}); {AGAIN}") from None
    wrong = [wnid for wnid in wnids.values() if not re.fullmatch(WNID, wnid)]
    if wrong or len(set(wnids.values())) < len(synsets):
        found = f"{ascii(wrong[0])[:100]} for a WNID" if wrong else "a class twice"
        raise UserError(f"{where} has {found}; {AGAIN}")
    classes = []
    for number, word in enumerate(files[TRUTH].split(), 1):
        index = int(word) if re.fullmatch(rb"[0-9]{1,9}", word) else None
        if index not in wnids:
            text = f"line {number}: {word[:40].decode('latin-1')!a} is not the number of a class"
            raise UserError(f"{archive}: {Path(TRUTH).name}: {text}; {AGAIN}")
        classes.append(wnids[index])
    return classes


def match_truth(names: set[str], truth: list[str], where: str) -> dict[str, str]:
    """Return the class of each picture's name; the numbers in the names must be 1 … length of `truth`."""
    classes = {f"ILSVRC2012_val_{number:08}.JPEG": wnid for number, wnid in enumerate(truth, 1)}
    if names != classes.keys():
        odd = min(names ^ classes.keys())
        what = f"has {odd}, which the ground truth has no class for" if odd in names else f"lacks {odd}"
        raise UserError(
            f"{where}: {what}; {len(names):,} pictures, {len(truth):,} lines of ground truth: "
            f"get pictures and {DEVKIT} of the same year"
        )
    return classes


def make_train(archive: Path, tars: list[TarInfo], root: Path, work: Work, encoding: Encoding) -> None:
    """Unpack one class per task, to a folder that is renamed when it is complete.

    So resuming looks at a thousand folders, not at a million files, and no file needs a temporary name.
    """
    classes, names = work.state["classes"], {tar.name.removesuffix(".tar") for tar in tars}
    root.mkdir(exist_ok=True)
    for extra in sorted(set(os.listdir(root)) - names):
        raise UserError(f"{root / extra}: is not in the archive; move it away")
    todo = []
    for tar in tars:
        name = tar.name.removesuffix(".tar")
        if classes.get(name, [0, 0, tar.size])[2] != tar.size:
            raise UserError(f"{root / name}: was made of another {tar.name}; name a new OUTPUT folder")
        if not is_whole(root / name, classes.get(name), discard=root.parent == work.folder):
            todo.append((tar.size, (archive, tar, work.unfinished, encoding)))
    for (size, task), result in unpack("train", extract_class, todo, work, encoding):
        name = task[1].name.removesuffix(".tar")
        classes[name] = [*result, size]
        work.save()
        os.rename(work.unfinished / name, root / name)
    work.finish("train", root, (len(names), sum(classes[name][0] for name in names)), bool(todo))


def is_whole(folder: Path, known: list[int] | None, discard: bool) -> bool:
    """Return whether a class has as many files and bytes as were written; if not, `discard` it or raise."""
    if not folder.exists():
        return False
    sizes = [entry.stat().st_size for entry in os.scandir(folder)]
    if known and [len(sizes), sum(sizes)] == known[:2]:
        return True
    if not discard:
        made = f"{known[0]:,} with {known[1]:,} were written" if known else "not made by this program"
        raise UserError(
            f"{folder}: holds {len(sizes):,} files with {sum(sizes):,} bytes, {made}; "
            "delete that folder and run the same command again"
        )
    shutil.rmtree(folder)  # a power cut has damaged files
    return False


def extract_class(archive: Path, tar: TarInfo, unfinished: Path, encoding: Encoding) -> tuple[int, int]:
    """Extract all pictures of a class; return their number and bytes."""
    folder = unfinished / tar.name.removesuffix(".tar")
    folder.mkdir(parents=True)
    where = f"{archive}: {tar.name}"
    count = total = 0
    with (
        reading(where),
        tarfile.open(archive, "r:") as outer,
        tarfile.open(fileobj=outer.extractfile(tar), mode="r:") as inner,
    ):
        for member in read_members(inner, where, rf"{WNID}_[0-9]+\.JPEG"):
            content = read_picture(inner, member, where, encoding)
            write(folder / member.name, content)
            count, total = count + 1, total + len(content)
    if not count:
        raise UserError(f"{where}: holds no pictures; {AGAIN}")
    return count, total


def make_val(
    archive: Path,
    pictures: list[TarInfo],
    classes: dict[str, str],
    root: Path,
    work: Work,
    encoding: Encoding,
) -> None:
    """Unpack some pictures per task; each gets its final name when it is complete."""
    done = val_files(root)
    for extra in sorted(done.keys() - {f"{wnid}/{name}" for name, wnid in classes.items()}):
        raise UserError(f"{root / extra}: is not in the archive; move it away")
    todo = []
    for picture in pictures:
        path = f"{classes[picture.name]}/{picture.name}"
        damaged = done.get(path) != picture.size if not encoding else not done.get(path)  # by a power cut
        if path not in done or (root.parent == work.folder and damaged):
            todo.append((picture, root / path))
    for wnid in set(classes.values()):
        (root / wnid).mkdir(parents=True, exist_ok=True)
    chunks = [todo[start : start + CHUNK] for start in range(0, len(todo), CHUNK)]
    tasks = [(sum(p.size for p, _ in chunk), (archive, chunk, work.unfinished, encoding)) for chunk in chunks]
    for _ in unpack("val", extract_pictures, tasks, work, encoding):
        pass
    work.finish("val", root, (len(set(classes.values())), len(classes)), bool(todo))


def val_files(root: Path) -> dict[str, int]:
    """Return WNID/NAME → bytes of the official pictures in the class folders of a val/."""
    folders = [entry for entry in os.scandir(root) if entry.is_dir()] if root.is_dir() else []
    return {
        f"{folder.name}/{file.name}": file.stat(follow_symlinks=False).st_size
        for folder in folders
        for file in os.scandir(folder)
        if re.fullmatch(VAL_NAME, file.name)
    }


def extract_pictures(
    archive: Path, chunk: list[tuple[TarInfo, Path]], folder: Path, encoding: Encoding
) -> None:
    """Extract some pictures of the validation set, by way of `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    with reading(archive), tarfile.open(archive, "r:") as tar:
        for member, target in chunk:
            write(folder / member.name, read_picture(tar, member, str(archive), encoding))
            os.replace(folder / member.name, target)


def unpack(
    split: str, function: Callable, tasks: list[tuple[int, tuple]], work: Work, encoding: Encoding
) -> Iterator[tuple[tuple[int, tuple], tuple | None]]:
    """Call `function` for each (bytes, arguments); yield these and the result, in any order."""
    total, free = sum(size for size, _ in tasks), shutil.disk_usage(work.folder).free
    if not encoding and free < total:
        print(f"{split}: needs {total / 1e9:.1f} GB, {free / 1e9:.1f} are free", flush=True)
    workers = len(os.sched_getaffinity(0)) if encoding else 0  # copying is limited by the disk
    with progress(f"{split}: unpacking", total, "B") as bar:
        if not workers:
            for task in tasks:
                yield task, function(*task[1])
                bar.update(task[0])
            return
        try:
            with process_pool(workers) as pool:
                futures = {pool.submit(function, *task[1]): task for task in tasks}
                for future in as_completed(futures):
                    yield futures[future], future.result()
                    bar.update(futures[future][0])
        except BrokenExecutor:
            text = "a worker process died (killed, or out of memory); run the same command again to resume"
            raise UserError(text) from None


def write(path: Path, content: bytes, sync: bool = False) -> None:
    """Write a file. Raise UserError if that fails."""
    try:
        with open(path, "wb") as file:
            file.write(content)
            if sync:
                file.flush()
                os.fsync(file.fileno())
    except OSError as error:
        text = f"cannot be written ({error.strerror}); fix that and run the same command again to resume"
        raise UserError(f"{path}: {text}") from None


def sort_flat(source: Path, devkit: Path, work: Work) -> None:
    """Move pictures from `source` to OUTPUT/val/WNID/; those moved before need no other record."""
    if not source.is_dir():
        raise UserError(f"--flat-val {source}: no such folder; name the one with the validation pictures")
    if (work.folder / "val").exists():
        text = "the archive is being unpacked; continue without --flat-val, or delete that folder"
        raise UserError(f"{work.folder / 'val'}: {text}")
    root = work.output / "val"
    truth = read_devkit(devkit)
    entries = {e.name: e for e in os.scandir(source) if re.fullmatch(VAL_NAME, e.name)}
    for entry in entries.values():
        if not entry.is_file(follow_symlinks=False):
            raise UserError(f"{entry.path}: is not a plain file; replace it with the picture")
    moved = val_files(root)
    classes = match_truth(entries.keys() | {path.rpartition("/")[2] for path in moved}, truth, str(source))
    for path in moved:
        name = path.rpartition("/")[2]
        if path != f"{classes[name]}/{name}" or name in entries:
            reason = f"is also in {source}" if name in entries else f"belongs to class {classes[name]}"
            raise UserError(f"{root / path}: {reason}; nothing is overwritten, decide which is right")
    with progress("val: moving", len(entries), " pictures") as bar:
        # Class by class: a val/ that is sorted in part lacks classes, and no training takes it for complete.
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
            bar.update()
    work.finish("val", root, (len(set(classes.values())), len(classes)), bool(entries))


if __name__ == "__main__":
    run_main(main)
