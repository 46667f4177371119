"""ImageNet's official archives (ILSVRC 2012): the members of the tars, the classes in the devkit."""

import contextlib
import gzip
import io
import re
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from tarfile import TarInfo

from resnext.errors import UserError

TRAIN, VAL = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"
DEVKIT = "ILSVRC2012_devkit_t12.tar.gz"
OFFICIAL = {"train": (1000, 1_281_167), "val": (1000, 50_000)}  # classes, images
WNID = "n[0-9]{8}"
VAL_NAME = r"ILSVRC2012_val_[0-9]{8}\.JPEG"
META = "ILSVRC2012_devkit_t12/data/meta.mat"
TRUTH = "ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt"
IMAGENET_WNIDS = Path(__file__).with_name("imagenet_wnids.txt")  # in the order of the outputs
AGAIN = "download the archive again"
COPY = "replace it with a complete copy"

Targets = list[tuple[TarInfo, Path]]  # members of an archive, and their paths in train/ or val/


def val_name(number: int) -> str:
    """Return the name of a validation image, 1 to 50,000."""
    return f"ILSVRC2012_val_{number:08}.JPEG"


def find_wnids(name: str) -> list[str]:
    """Return the wnids in the name of a file."""
    return re.findall(rf"(?<![0-9A-Za-z]){WNID}(?![0-9])", name)


def imagenet_classes() -> tuple[str, ...]:
    """Return ImageNet's wnids in the order of the outputs."""
    return tuple(IMAGENET_WNIDS.read_text().split())


@contextlib.contextmanager
def reading(archive: Path | str) -> Iterator[None]:
    """Name the archive in errors about its content."""
    try:
        yield
    except (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{archive}: cut off or damaged ({error}); {COPY}") from None
    except OSError as error:
        if error.filename is not None:
            raise
        raise UserError(f"{archive}: cannot be read ({error.strerror}); check the disk") from None


def read_members(tar: tarfile.TarFile, where: str, pattern: str) -> Iterator[TarInfo]:
    """Yield the members of a tar; each must be a plain file, appear once, and have a name like `pattern`."""
    names = set()
    for member in tar:
        name = member.name = member.name.removeprefix("./")
        text = f"{where}: member {ascii(name)[:100]}"
        if member.isdir() and name in (".", ""):
            continue
        if not member.isreg() or member.issparse():
            raise UserError(f"{text} is not a plain file; {AGAIN}, or pack it without")
        if not re.fullmatch(pattern, name):
            raise UserError(f"{text} has an unexpected name; {AGAIN}, or pack it without")
        if name in names:
            raise UserError(f"{text} appears twice; {AGAIN}")
        names.add(name)
        yield member
    check_end(tar, where, len(names))
    if not names:
        raise UserError(f"{where}: is empty; {AGAIN}")


def check_end(tar: tarfile.TarFile, where: str, count: int) -> None:
    """Raise UserError if a tar, read to its end of `count` members, lacks its end mark."""
    tar.fileobj.seek(tar.offset)
    if tar.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):  # tarfile takes anything for the end
        raise UserError(f"{where}: is cut off or damaged after {count:,} members; {COPY}")


def train_targets(archive: Path) -> Targets:
    """Return the class tars of the train archive with their class folders."""
    with reading(archive), tarfile.open(archive, "r:") as tar:
        members = list(read_members(tar, str(archive), rf"{WNID}\.tar"))
    return [(member, Path(member.name).with_suffix("")) for member in members]


def val_targets(archive: Path, devkit: Path) -> Targets:
    """Return the images of the val archive with their WNID/NAME."""
    truth = read_devkit(devkit)
    with reading(archive), tarfile.open(archive, "r:") as tar:
        members = list(read_members(tar, str(archive), VAL_NAME))
    classes = match_truth({member.name for member in members}, truth, str(archive))
    return [(member, Path(classes[member.name], member.name)) for member in members]


def read_devkit(archive: Path) -> list[str]:
    """Return the WNID of each validation image, in the order of their numbers."""
    with reading(archive):
        content = io.BytesIO(gzip.decompress(archive.read_bytes()))
        with tarfile.open(fileobj=content, mode="r:") as tar:
            members = [member for member in tar if member.isreg() and member.name in (META, TRUTH)]
            opened = {member.name: tar.extractfile(member) for member in members}
            files = {name: file.read() for name, file in opened.items() if file}
    for name in (META, TRUTH):
        if name not in files:
            raise UserError(f"{archive}: has no {name}; {AGAIN}")
    return decode_truth(files[META], files[TRUTH].decode("latin-1"), str(archive))


def decode_truth(meta: bytes, truth: str, where: str) -> list[str]:
    """Return the WNID of each line of the devkit's ground truth, whose class numbers meta.mat explains."""
    try:
        from scipy.io import loadmat
    except ImportError:
        raise UserError("the devkit is a MATLAB file, and scipy reads it: pip install scipy") from None
    try:
        synsets = loadmat(io.BytesIO(meta), squeeze_me=True, variable_names=["synsets"])["synsets"]
        leaves = [s for s in synsets.reshape(-1) if s["num_children"] == 0]
        wnids = {int(s["ILSVRC2012_ID"]): str(s["WNID"]) for s in leaves}
        if len(set(wnids.values())) < len(leaves) or not all(re.fullmatch(WNID, w) for w in wnids.values()):
            raise ValueError("its WNIDs are not unique or not of the form n01234567")
    except Exception as error:  # loadmat raises many types on damaged files
        reason = str(error)[:100] or type(error).__name__
        raise UserError(f"{where}: meta.mat cannot be read ({reason!a}); {AGAIN}") from None
    numbers = truth.split()
    for line, number in enumerate(numbers, 1):
        if not re.fullmatch("[1-9][0-9]{0,8}", number, re.ASCII) or int(number) not in wnids:
            text = f"line {line}: {number[:40]!a} is not the number of a class"
            raise UserError(f"{where}: {Path(TRUTH).name}: {text}; {AGAIN}")
    return [wnids[int(number)] for number in numbers]


def match_truth(names: set[str], truth: list[str], where: str) -> dict[str, str]:
    """Return {name of an image: WNID}; the numbers in the names must be 1 to the length of `truth`."""
    classes = {val_name(number): wnid for number, wnid in enumerate(truth, 1)}
    if names != classes.keys():
        odd = min(names ^ classes.keys())
        what = f"has {odd}, which is not in the ground truth" if odd in names else f"lacks {odd}"
        raise UserError(
            f"{where}: {what}; {len(names):,} images, {len(truth):,} lines of ground truth: "
            f"get images and {DEVKIT} of the same year"
        )
    return classes
