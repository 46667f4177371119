"""The cached file list: used if nothing has changed, never stale, harmless if damaged."""

import io
import os
import pickle
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import numpy as np
import pytest

from data.image_folder import list_files, list_set
from resnext.errors import UserError

CLASSES = ("cat", "dog")
BEFORE = [
    ("cat/1.png", 0),
    ("cat/2.jpg", 0),
    ("dog/1.PNG", 1),
    ("dog/deep/4.png", 1),
    ("dog/deep/er/3.png", 1),
]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    """A cache for this test alone."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def root(tmp_path) -> Path:
    """train/ with the five files of BEFORE, an hour old."""
    return touch(tmp_path / "train", *(name for name, _ in BEFORE))


def touch(root: Path, *names: str) -> Path:
    """Create empty files below `root`, an hour old."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    age(root)
    return root


def age(root: Path, seconds: float = 3600) -> None:
    """Set the modification times of all folders, each to another nanosecond."""
    for number, folder in enumerate(sorted(p for p in [root, *root.rglob("*")] if p.is_dir())):
        then = time.time_ns() - int(seconds * 1e9) + number
        os.utime(folder, ns=(then, then))


def listed(root: Path, classes: tuple[str, ...] = CLASSES) -> list[tuple[str, int]]:
    paths, labels, _ = list_files(root, classes)
    assert paths.dtype.kind == "S" and labels.dtype == np.int64
    return [(os.fsdecode(path), label) for path, label in zip(paths, labels.tolist(), strict=True)]


def forbid_listing(monkeypatch) -> None:
    monkeypatch.setattr(os, "scandir", lambda *_: pytest.fail("a folder was listed"))


def entries(cache: Path) -> list[Path]:
    """Return the cache's files, all of which must be complete lists."""
    found = sorted(path for path in cache.rglob("*") if path.is_file())
    assert all(path.suffix == ".npz" and not path.name.startswith(".") for path in found)
    return found


def test_the_second_listing_reads_no_folder(root, cache, monkeypatch):
    """By any name of the folder."""
    (root.parent / "up").symlink_to(root.parent)
    assert listed(root) == BEFORE and len(entries(cache)) == 1
    forbid_listing(monkeypatch)
    monkeypatch.chdir(root.parent)
    for name in (root, Path("train"), Path("up/train"), root / ".." / "train"):
        assert listed(name) == BEFORE


def elsewhere(root: Path) -> Path:
    """Return a folder with a file, outside `root`."""
    return touch(root.parent / "elsewhere", "5.png")


def exchange(root: Path) -> None:
    for a, b in (("cat", "x"), ("dog", "cat"), ("x", "dog")):
        (root / a).rename(root / b)


def replace_root(root: Path) -> None:
    """Put another folder in its place."""
    root.rename(root.parent / "old")
    age(touch(root, "cat/a.png", "dog/b.png"), 7200)


CHANGES: dict[str, Callable[[Path], object]] = {
    "file added": lambda root: (root / "cat/3.png").touch(),
    "file added deep below": lambda root: (root / "dog/deep/er/9.png").touch(),
    "file removed": lambda root: (root / "dog/1.PNG").unlink(),
    "file renamed": lambda root: (root / "cat/1.png").rename(root / "cat/0.png"),
    "file moved": lambda root: (root / "cat/1.png").rename(root / "dog/deep/1.png"),
    "folder added": lambda root: ((root / "cat/more").mkdir(), (root / "cat/more/7.png").touch()),
    "folder renamed": lambda root: (root / "dog/deep").rename(root / "dog/below"),
    "folder linked": lambda root: (root / "cat/link").symlink_to(elsewhere(root)),
    "folders exchanged": exchange,
    "another folder": replace_root,
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_seen(change, root, monkeypatch):
    listed(root)
    CHANGES[change](root)
    found = listed(root)
    assert found != BEFORE
    if change == "another folder":
        assert listed(root.parent / "old") == BEFORE
    monkeypatch.setenv("XDG_CACHE_HOME", str(root.parent / "empty cache"))
    assert found == listed(root)


def test_a_file_added_behind_a_linked_folder_is_seen(root):
    linked = elsewhere(root)
    (root / "cat" / "link").symlink_to(linked)
    age(root)
    assert ("cat/link/5.png", 0) in listed(root)
    (linked / "6.png").touch()
    assert ("cat/link/6.png", 0) in listed(root)


def test_added_and_removed_classes_are_seen(root):
    listed(root)
    (root / "zebra").mkdir()
    with pytest.raises(UserError, match="'zebra' is not a training class"):
        listed(root)
    (root / "zebra").rmdir()
    (root / "cat").rename(root.parent / "aside")
    with pytest.raises(UserError, match="cat: contains no images"):
        listed(root)
    assert listed(root, ("dog",)) == [(path, 0) for path, label in BEFORE if label == 1]


def test_lists_are_kept_apart(root):
    """By folder and by the order of classes."""
    other = touch(root.with_name("val"), "cat/8.png", "dog/9.png")
    for _ in range(2):
        assert listed(root) == BEFORE
        assert listed(root, ("dog", "cat")) == [(path, 1 - label) for path, label in BEFORE[2:] + BEFORE[:2]]
        assert listed(other) == [("cat/8.png", 0), ("dog/9.png", 1)]


def test_warnings_are_cached(root, cache, monkeypatch):
    (root / "cat" / "back").symlink_to(root / "dog" / "deep")
    touch(root, "cat/x.heic")
    expected = list_files(root, CLASSES)[2]
    links, formats = expected
    assert "skipped links" in links and links.endswith(": 1, such as cat/back to dog/deep")
    assert "skipped files of unsupported formats: 1 (.heic 1), such as cat/x.heic" in formats
    assert len(entries(cache)) == 1
    forbid_listing(monkeypatch)
    assert list_files(root, CLASSES)[2] == expected


def test_only_val_may_lack_classes(root):
    """Also with a cached list of other classes."""
    val = touch(root.with_name("val"), *(name for name, _ in BEFORE))
    for _ in range(2):
        with pytest.raises(UserError, match=r"train/bird: contains no images"):
            list_set(str(root.parent), "train", None, ("bird", *CLASSES))
        assert listed(root) == listed(val) == BEFORE
        files = list_set(str(root.parent), "val", None, ("bird", *CLASSES))
        assert files.labels.tolist() == [1, 1, 2, 2, 2]
        assert len(files.notes) == 1 and "has no images of 1 of 3 classes (bird)" in files.notes[0]
        assert list_set(str(root.parent), "val", None, CLASSES).notes == ()


@pytest.mark.parametrize("seconds", [0, 1, 2.5, -1000])
def test_fresh_folders_are_not_cached(seconds, root, cache):
    """They could change again within the same tick of a coarse clock. Nor are those from the future."""
    age(root / "dog" / "deep", seconds)
    assert listed(root) == BEFORE and entries(cache) == []
    age(root, 10)
    assert listed(root) == BEFORE and len(entries(cache)) == 1


def test_the_limit_applies_after_the_cache(root):
    for limit in (2, None, 3):
        files = list_set(str(root.parent), "train", limit)
        keep = np.arange(limit or 5) * 5 // (limit or 5)
        assert [os.fsdecode(path) for path in files.paths] == [BEFORE[i][0] for i in keep]


def test_names_that_are_not_utf8(tmp_path, cache, monkeypatch):
    classes = (os.fsdecode(b"cat\xe9"), "dög")
    root = touch(tmp_path / "train", f"{classes[0]}/{os.fsdecode(bytes([99, 0xE9]))}.png", "dög/日本.png")
    found = listed(root, classes)
    assert len(entries(cache)) == 1
    forbid_listing(monkeypatch)
    assert listed(root, classes) == found
    assert len(found) == 2 and all((root / path).is_file() for path, _ in found)


# ---------------------------------------------------------------------------- damaged or missing cache files


class Hostile:
    """Creates a folder if it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def as_npz(**arrays) -> bytes:
    content = io.BytesIO()
    np.savez(content, **arrays)
    return content.getvalue()


@pytest.fixture
def place(root, cache) -> Path:
    """The cache's file of `root`."""
    listed(root)
    (place,) = entries(cache)
    return place


def changed_bytes(good: bytes) -> Iterator[bytes]:
    draw = np.random.default_rng(0)
    for number in range(300):
        damaged = bytearray(good)
        for at in draw.integers(len(good), size=1 + number % 3):
            damaged[at] = draw.integers(256)
        yield bytes(damaged[: draw.integers(len(good))] if number % 5 == 0 else damaged)


def changed_shapes(good: bytes) -> Iterator[bytes]:
    """Array headers that claim more or fewer files than there are."""
    assert good.count(b"(5,)") >= 3
    for wrong in (b"(4,)", b"(6,)", b"(1,)", b"(0,)", b"()  ", b"(5,5)"):
        yield good.replace(b"(5,)", wrong[:4])


def other_files(good: bytes) -> Iterator[bytes]:
    yield from (b"", b"not an archive\n", np.random.default_rng(0).bytes(5000), as_npz(a=np.zeros(3)))
    yield pickle.dumps(np.zeros(3))
    yield as_npz(classes="x", paths=b"a", labels=1, directories=b"/", changed=1)


def pickles(good: bytes) -> Iterator[bytes]:
    hostile = Hostile(Path("pwned"))
    with np.load(io.BytesIO(good)) as stored:
        arrays = dict(stored)
    yield from (as_npz(**arrays | {name: np.array([hostile] * 5, dtype=object)}) for name in arrays)
    yield pickle.dumps(hostile)


@pytest.mark.parametrize("damage", [changed_bytes, changed_shapes, other_files, pickles])
def test_damaged_files(damage, root, place, tmp_path, monkeypatch):
    """The list is right, and nothing is unpickled. Other files are replaced."""
    monkeypatch.chdir(tmp_path)
    good = place.read_bytes()
    for content in damage(good):
        place.write_bytes(content)
        assert listed(root) == BEFORE
        assert damage is not other_files or place.read_bytes() != content
    assert not Path("pwned").exists()


@pytest.mark.parametrize("value", [None, ""])
def test_default_place(root, place, cache, tmp_path, monkeypatch, value):
    assert place.parent == cache / "resnext"
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("XDG_CACHE_HOME")
    if value is not None:
        monkeypatch.setenv("XDG_CACHE_HOME", value)
    assert listed(root) == BEFORE
    assert (tmp_path / "home" / ".cache" / "resnext" / place.name).is_file()


def test_places_that_cannot_be_written(root, place, tmp_path, monkeypatch):
    place.unlink()
    place.mkdir()
    assert listed(root) == BEFORE
    assert list(place.parent.iterdir()) == [place], "no temporary file is left"
    (tmp_path / "file").touch()
    for value in (tmp_path / "file", tmp_path / "file" / "below", "/proc/nowhere", "/dev/null"):
        monkeypatch.setenv("XDG_CACHE_HOME", str(value))
        assert listed(root) == listed(root) == BEFORE


def test_disk_full(root, cache, monkeypatch):
    """The list is right, and no partial file is left."""

    def fail(file, **_):
        file.write(b"PK\3\4 half a list")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", fail)
    assert listed(root) == BEFORE and entries(cache) == []


def test_no_home(root, monkeypatch):
    """As in a container that runs under a user number without a name."""
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", mock.Mock(side_effect=RuntimeError("no home directory")))
    assert listed(root) == BEFORE
