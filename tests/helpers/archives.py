"""Small ImageNet archives in the official layout, and members of tars that must be refused."""

import functools
import gzip
import io
import tarfile

import numpy as np
from PIL import Image
from scipy.io import savemat

from data.imagenet_archives import META, TRUTH

COUNTS = {"n01440764": 2, "n01443537": 3, "n01484850": 4}
# ILSVRC2012_ID → WNID: not sorted, and the last is no leaf, as in the official file.
SYNSETS = {1: "n01484850", 2: "n01440764", 3: "n01443537", 4: "n00001740"}
VAL_IDS = (3, 1, 1, 2, 3, 3, 2)
VAL_CLASSES = {f"ILSVRC2012_val_{n:08}.JPEG": SYNSETS[number] for n, number in enumerate(VAL_IDS, 1)}

Member = tuple[str | tarfile.TarInfo | bytes, bytes]  # name, or header, or encoded header; content


@functools.cache
def encoded(seed: int, size: tuple[int, int] = (9, 7), mode: str = "RGB", **options) -> bytes:
    """Return an image of noise as JPEG, or with the given options of Pillow."""
    noise = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)
    target = io.BytesIO()
    Image.fromarray(noise).convert(mode).save(target, **{"format": "JPEG"} | options)
    return target.getvalue()


def header(name: str, size: int, **fields) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.size = size
    for field, value in fields.items():
        setattr(info, field, value)
    return info


def tar(members: list[Member], end: bool = True) -> bytes:
    """Return a tar, without its end mark if not `end`."""
    blocks = []
    for head, content in members:
        if isinstance(head, str):
            head = header(head, len(content))
        if isinstance(head, tarfile.TarInfo):
            head = head.tobuf(tarfile.USTAR_FORMAT)
        blocks += [head, content, bytes(-len(content) % 512)]
    return b"".join([*blocks, bytes(10240) if end else b""])


def class_members(wnid: str, count: int) -> list[Member]:
    return [(f"{wnid}_{number * 7}.JPEG", encoded(int(wnid[1:]) + number)) for number in range(count)]


def train_members(counts: dict[str, int] = COUNTS) -> list[Member]:
    return [(f"{wnid}.tar", tar(class_members(wnid, count))) for wnid, count in counts.items()]


def val_members() -> list[Member]:
    """Return them in another order than that of their numbers, as in the official archive."""
    members = [(name, encoded(seed)) for seed, name in enumerate(VAL_CLASSES)]
    return members[3:] + members[:3]


def meta(synsets: dict[int, str] = SYNSETS) -> bytes:
    names = ("ILSVRC2012_ID", "WNID", "words", "gloss", "num_children", "children", "wordnet_height")
    rows = np.empty((len(synsets), 1), [(name, object) for name in (*names, "num_train_images")])
    for row, (number, wnid) in enumerate(synsets.items()):
        branch = wnid == "n00001740"
        rows[row, 0] = (number, wnid, "a thing, other name", "gloss", 3 * branch, np.arange(0.0), branch, 9)
    target = io.BytesIO()
    savemat(target, {"synsets": rows}, do_compression=True)
    return target.getvalue()


def truth(*ids: int) -> bytes:
    return "".join(f"{number}\n" for number in ids or VAL_IDS).encode()


def devkit(*members: Member) -> bytes:
    root = "ILSVRC2012_devkit_t12"
    folders = [(header(name, 0, type=tarfile.DIRTYPE), b"") for name in (root, f"{root}/data")]
    return gzip.compress(tar([*folders, *(members or ((META, meta()), (TRUTH, truth())))]))


def pax(text: str) -> Member:
    """Return an extended header for the next member."""
    content = f"{len(text) + 4} {text}\n".encode()
    return header("pax", len(content), type=tarfile.XHDTYPE), content


def hostile(name: str, first: str) -> dict[str, tuple[str, list[Member]]]:
    """Return {case: (phrase of the message, members)} for a valid `name`; the tar also holds `first`."""

    def special(kind: bytes, name: str = name, content: bytes = b"", **fields) -> tuple[str, list[Member]]:
        return "is not a plain file", [(header(name, len(content), type=kind, **fields), content)]

    def named(name: str, *before: Member) -> tuple[str, list[Member]]:
        return "has an unexpected name", [*before, (name, b"x")]

    damaged = header(name, 0).tobuf(tarfile.USTAR_FORMAT).replace(b"ustar", b"mustr")
    return {
        "symbolic link": special(tarfile.SYMTYPE, linkname="/etc/passwd"),
        "hard link": special(tarfile.LNKTYPE, linkname="../../evil"),
        "device": special(tarfile.CHRTYPE),
        "pipe": special(tarfile.FIFOTYPE),
        "folder": special(tarfile.DIRTYPE, "folder"),
        "unknown type": special(b"Z", content=b"abc"),
        "sparse": special(tarfile.GNUTYPE_SPARSE),
        "long name": named(name, (header("././@LongLink", 3, type=b"L"), b"/a\0")),
        "name in an extended header": named(name, pax("path=/evil.JPEG")),
        "absolute name": named(f"/{name}"),
        "name above": named(f"../{name}"),
        "name below": named(f"folder/{name}"),
        "other name": named("readme.txt"),
        "line end in the name": named(f"{name}\n"),
        "same name": ("appears twice", [(first, b"x")]),
        "size beyond the end": ("cut off or damaged", [(header(name, 10**8), b"x")]),
        "negative size": ("cut off or damaged", [(header(name, -1).tobuf(tarfile.GNU_FORMAT), b"x")]),
        "damaged header": ("cut off or damaged", [(damaged, b"")]),
    }


CASES = tuple(hostile("", ""))
