"""ImageNet's archives: members in hostile and truncated tars, and the classes in the devkit."""

import hashlib
import io
import sys
import tarfile
from pathlib import Path

import archives
import pytest
from torchvision.datasets import imagenet

from data.imagenet_archives import (
    DEVKIT,
    META,
    TRUTH,
    read_devkit,
    read_members,
    reading,
    train_targets,
    val_targets,
)
from resnext.errors import UserError

CLASS = "n01443537"


def read_class(content: bytes) -> list[tuple[str, bytes]]:
    """Return the names and contents of a class tar, each read before the next header."""
    with reading("class.tar"), tarfile.open(fileobj=io.BytesIO(content), mode="r:") as archive:
        members = read_members(archive, "class.tar", rf"{CLASS}_[0-9]+\.JPEG")
        return [(member.name, archive.extractfile(member).read()) for member in members]


def read_train(content: bytes, folder: Path) -> list[str]:
    (folder / "train.tar").write_bytes(content)
    return [f"{path}.tar" for _, path in train_targets(folder / "train.tar")]


def read_val(folder: Path, images: bytes, kit: bytes) -> dict[str, str]:
    """Return {name: WNID}."""
    (folder / "val.tar").write_bytes(images)
    (folder / DEVKIT).write_bytes(kit)
    return {path.name: str(path.parent) for _, path in val_targets(folder / "val.tar", folder / DEVKIT)}


@pytest.mark.parametrize("case", archives.CASES)
def test_hostile_members(case):
    phrase, extra = archives.hostile(f"{CLASS}_99.JPEG", f"{CLASS}_0.JPEG")[case]
    with pytest.raises(UserError, match=rf"^class\.tar: .*{phrase}"):
        read_class(archives.tar([*archives.class_members(CLASS, 3), *extra]))


@pytest.mark.parametrize("where", ["train", "class", "val"])
def test_cut_off_anywhere(tmp_path, where):
    """Cut at each block's border, beside it, and within it. The first empty block completes a tar."""
    kit = archives.devkit()
    members, expected, read = {
        "train": (
            archives.train_members(),
            [f"{wnid}.tar" for wnid in archives.COUNTS],
            lambda x: read_train(x, tmp_path),
        ),
        "class": (archives.class_members(CLASS, 3), archives.class_members(CLASS, 3), read_class),
        "val": (archives.val_members(), archives.VAL_CLASSES, lambda x: read_val(tmp_path, x, kit)),
    }[where]
    whole, complete = archives.tar(members), len(archives.tar(members, end=False)) + 512
    borders = set(range(0, complete + 1024, 2560 if where == "train" else 512))
    offset = 0
    for _, content in members:  # the borders of each member
        offset += 512 + -(-len(content) // 512) * 512
        borders |= {offset, offset + 512}
    for cut in sorted({max(0, border + aside) for border in borders for aside in (-1, 0, 1, 200)}):
        if cut < complete:
            with pytest.raises(UserError, match="cut off"):
                read(whole[:cut])
        else:
            assert read(whole[:cut]) == expected


def test_empty_archives(tmp_path):
    for read in (read_class, lambda content: read_train(content, tmp_path)):
        with pytest.raises(UserError, match=r"\.tar: is empty"):
            read(archives.tar([]))


# ---------------------------------------------------------------------------- the devkit


def test_torchvision_reads_the_same_classes(tmp_path, monkeypatch):
    (tmp_path / DEVKIT).write_bytes(content := archives.devkit())
    md5 = hashlib.md5(content).hexdigest()
    monkeypatch.setitem(imagenet.ARCHIVE_META, "devkit", (DEVKIT, md5))
    imagenet.parse_devkit_archive(tmp_path)
    wnids = imagenet.load_meta_file(tmp_path)[1]
    assert (
        read_devkit(tmp_path / DEVKIT) == wnids == [archives.SYNSETS[number] for number in archives.VAL_IDS]
    )


def test_devkit_cut_off(tmp_path):
    whole = archives.devkit()
    for cut in range(0, len(whole), 37):
        (tmp_path / DEVKIT).write_bytes(whole[:cut])
        with pytest.raises(UserError, match=f"{DEVKIT}: cut off"):
            read_devkit(tmp_path / DEVKIT)
    (tmp_path / DEVKIT).write_bytes(b"not gzip at all, but long enough for it")
    with pytest.raises(UserError, match="damaged"):
        read_devkit(tmp_path / DEVKIT)


LINK = (archives.header(META, 0, type=tarfile.SYMTYPE, linkname="/etc/passwd"), b"")
BAD_DEVKITS = [  # phrase of the message, meta.mat, ground truth
    (f"has no {META}", None, archives.truth()),
    (f"has no {META}", LINK, archives.truth()),
    (f"has no {TRUTH}", archives.meta(), None),
    ("meta.mat cannot be read", b"rubbish" * 99, archives.truth()),
    ("meta.mat cannot be read", archives.meta()[:-20], archives.truth()),
    ("not unique or not of the form", archives.meta(archives.SYNSETS | {2: "../../evil"}), archives.truth()),
    (
        "not unique or not of the form",
        archives.meta(archives.SYNSETS | {2: archives.SYNSETS[1]}),
        archives.truth(),
    ),
    ("line 7: '5' is not", archives.meta(), archives.truth(1, 1, 1, 1, 1, 1, 5)),
    ("line 7: '4' is not", archives.meta(), archives.truth(1, 1, 1, 1, 1, 1, 4)),
    ("line 2: '0' is not", archives.meta(), archives.truth(1, 0, 1, 1, 1, 1, 1)),
    ("line 1: '-1' is not", archives.meta(), archives.truth(-1)),
    (r"line 1: '\\x00one' is not", archives.meta(), b"\0one\n"),
    ("7 images, 6 lines", archives.meta(), archives.truth(*archives.VAL_IDS[:-1])),
    ("7 images, 8 lines", archives.meta(), archives.truth(*archives.VAL_IDS, 1)),
    ("7 images, 0 lines", archives.meta(), b""),
]


@pytest.mark.parametrize("phrase, synsets, numbers", BAD_DEVKITS, ids=range(len(BAD_DEVKITS)))
def test_bad_devkits(tmp_path, phrase, synsets, numbers):
    files = [(META, synsets) if isinstance(synsets, bytes) else synsets, (TRUTH, numbers)]
    members = [file for file in files if file is not None and file[1] is not None]
    with pytest.raises(UserError, match=rf"\.(gz|tar): .*{phrase}"):
        read_val(tmp_path, archives.tar(archives.val_members()), archives.devkit(*members))


def test_devkit_may_hold_other_things(tmp_path):
    link = archives.header("ILSVRC2012_devkit_t12/link", 4000, type=tarfile.LNKTYPE, linkname="/etc/passwd")
    readme = ("ILSVRC2012_devkit_t12/readme.txt", b"x")
    lines = archives.truth().replace(b"\n", b"\r\n") + b"\n"  # and other line ends
    kit = archives.devkit(
        (link, b""),
        archives.pax("path=a"),
        readme,
        (archives.header("../up", 0), b""),
        (META, archives.meta()),
        (TRUTH, lines),
    )
    assert read_val(tmp_path, archives.tar(archives.val_members()), kit) == archives.VAL_CLASSES
    assert not (tmp_path.parent / "up").exists()


def test_without_scipy(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.io", None)
    with pytest.raises(UserError, match="pip install scipy"):
        read_val(tmp_path, archives.tar(archives.val_members()), archives.devkit())
