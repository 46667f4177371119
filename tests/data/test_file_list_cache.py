"""The cached list of files: used where nothing has changed, and never stale, whatever happened to it."""

import io
import os
import pickle
import time
from pathlib import Path

import numpy as np
import pytest

from data import file_list_cache
from data.image_folder import list_files, list_set
from resnext.errors import UserError

CLASSES = ("cat", "dog")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    """A cache of this test alone."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def root(tmp_path) -> Path:
    """train/ with five files, one of them nested, as if it had been there for an hour."""
    root = tmp_path / "train"
    for name in ("cat/1.png", "cat/2.jpg", "dog/1.PNG", "dog/deep/er/3.png", "dog/deep/4.png"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    age(root)
    return root


def age(root: Path, seconds: float = 3600) -> None:
    """Folders look as if they had last changed so long ago; each by another nanosecond."""
    for number, folder in enumerate(sorted(p for p in [root, *root.rglob("*")] if p.is_dir())):
        then = time.time_ns() - int(seconds * 1e9) + number
        os.utime(folder, ns=(then, then))


def listed(root: Path, classes: tuple[str, ...] = CLASSES) -> list[tuple[str, int]]:
    paths, labels, _ = list_files(root, classes)
    assert paths.dtype.kind == "S" and labels.dtype == np.int64
    return [(os.fsdecode(path), label) for path, label in zip(paths, labels.tolist(), strict=True)]


BEFORE = [
    ("cat/1.png", 0),
    ("cat/2.jpg", 0),
    ("dog/1.PNG", 1),
    ("dog/deep/4.png", 1),
    ("dog/deep/er/3.png", 1),
]


def no_walk(*_, **__):
    pytest.fail("the folders were listed")


def entries(cache: Path) -> list[Path]:
    return sorted(cache.rglob("*.npz"))


def test_second_listing_reads_no_folder(root, cache, monkeypatch):
    assert listed(root) == BEFORE
    assert len(entries(cache)) == 1
    assert [p for p in cache.rglob("*") if p.is_file()] == entries(cache), "no temporary files"
    monkeypatch.setattr(os, "walk", no_walk)
    monkeypatch.setattr(os, "scandir", no_walk)
    assert listed(root) == BEFORE


def test_the_list_is_found_by_any_name_of_the_folder(root, monkeypatch):
    listed(root)
    (root.parent / "link").symlink_to(root)
    monkeypatch.setattr(os, "walk", no_walk)
    monkeypatch.chdir(root.parent)
    assert listed(Path("train")) == listed(root.parent / "link") == listed(root / ".." / "train") == BEFORE


CHANGES = {
    "file added": lambda root: (root / "cat" / "3.png").touch(),
    "file added deep below": lambda root: (root / "dog" / "deep" / "er" / "9.png").touch(),
    "file removed": lambda root: (root / "dog" / "1.PNG").unlink(),
    "file renamed": lambda root: (root / "cat" / "1.png").rename(root / "cat" / "0.png"),
    "file moved": lambda root: (root / "cat" / "1.png").rename(root / "dog" / "deep" / "1.png"),
    "folder added": lambda root: (root / "cat" / "more").mkdir() or (root / "cat" / "more" / "7.png").touch(),
    "folder renamed": lambda root: (root / "dog" / "deep").rename(root / "dog" / "below"),
    "folder linked": lambda root: (root / "cat" / "link").symlink_to(elsewhere(root)),
    "folders exchanged": lambda root: [
        (root / a).rename(root / b) for a, b in (("cat", "x"), ("dog", "cat"), ("x", "dog"))
    ],
}


def elsewhere(root: Path) -> Path:
    """A folder of a file, outside of what is listed."""
    (root.parent / "elsewhere").mkdir()
    (root.parent / "elsewhere" / "5.png").touch()
    return root.parent / "elsewhere"


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_seen(change, root, monkeypatch):
    listed(root)
    CHANGES[change](root)
    found = listed(root)
    assert found != BEFORE
    monkeypatch.setattr(file_list_cache, "cached", lambda *_: None)
    monkeypatch.setattr(file_list_cache, "remember", lambda *_: None)
    monkeypatch.setenv("XDG_CACHE_HOME", str(root.parent / "another cache"))
    assert found == listed(root)


def test_a_file_added_behind_a_linked_folder_is_seen(root):
    linked = elsewhere(root)
    (root / "cat" / "link").symlink_to(linked)
    age(root)
    age(linked)
    assert ("cat/link/5.png", 0) in listed(root)
    (linked / "6.png").touch()
    assert ("cat/link/6.png", 0) in listed(root)


def test_an_added_class_is_refused_as_without_a_cache(root):
    listed(root)
    (root / "zebra").mkdir()
    with pytest.raises(UserError, match="'zebra' is not in train/"):
        listed(root)


def test_a_removed_class_is_seen(root):
    listed(root)
    for path in (root / "cat").iterdir():
        path.unlink()
    (root / "cat").rmdir()
    with pytest.raises(UserError, match="cat"):
        listed(root)
    assert listed(root, ("dog",)) == [(path, 0) for path, label in BEFORE if label == 1]


def test_another_class_list_has_other_labels(root):
    assert listed(root) == BEFORE
    assert listed(root, ("dog", "cat")) == sorted(
        ((path, 1 - label) for path, label in BEFORE), key=lambda entry: (entry[1], entry[0])
    )
    assert listed(root) == BEFORE


def test_warnings_are_remembered(root, cache, monkeypatch):
    (root / "cat" / "back").symlink_to(root / "dog" / "deep")
    (root / "cat" / "x.heic").touch()
    age(root)
    expected = list_files(root, CLASSES)[2]
    assert expected == (
        f"warning: {root}: left out are links to what is there already: 1, such as cat/back to dog/deep",
        f"warning: {root}: left out are files of no known format: 1 (.heic 1), such as "
        "cat/x.heic; convert them to JPEG or PNG",
    )
    assert len(entries(cache)) == 1
    monkeypatch.setattr(os, "scandir", no_walk)
    assert list_files(root, CLASSES)[2] == expected


def test_a_part_of_the_classes_is_not_mixed_up(root):
    """The classes of a trained model, some of which val/ may lack, also in the cache."""
    root = root.rename(root.with_name("val"))
    for number in range(2):
        files = list_set(str(root.parent), "val", None, ("bird", "cat", "dog"))
        assert files.labels.tolist() == [1, 1, 2, 2, 2], number
        absent = f"{root}: has no pictures of 1 of 3 classes (bird); errors are over the others"
        assert files.notes == (f"warning: {absent}",)
        files = list_set(str(root.parent), "val", None, CLASSES)
        assert (files.labels.tolist(), files.notes) == ([0, 0, 1, 1, 1], ())
    assert listed(root) == BEFORE


def test_a_training_set_lacks_no_class(root, cache):
    """Neither at first nor with a list from the cache of other classes."""
    for _ in range(2):
        with pytest.raises(UserError, match=r"train/bird: holds no pictures"):
            list_set(str(root.parent), "train", None, ("bird", *CLASSES))
        assert listed(root) == BEFORE


@pytest.mark.parametrize("seconds", [0, 1, 2.5])
def test_fresh_folders_are_not_remembered(seconds, root, cache):
    """They could change again within the same tick of a coarse clock."""
    age(root / "dog" / "deep", seconds)
    listed(root)
    assert entries(cache) == []
    age(root, 10)
    listed(root)
    assert len(entries(cache)) == 1


def test_folders_from_the_future_are_not_remembered(root, cache):
    age(root / "cat", -1000)
    assert listed(root) == BEFORE
    assert entries(cache) == []


def test_two_folders_do_not_mix(root, tmp_path):
    other = tmp_path / "val"
    for name in ("cat/8.png", "dog/9.png"):
        (other / name).parent.mkdir(parents=True)
        (other / name).touch()
    age(other)
    for _ in range(2):
        assert listed(root) == BEFORE
        assert listed(other) == [("cat/8.png", 0), ("dog/9.png", 1)]


def test_a_folder_put_in_the_place_of_another(root, tmp_path):
    """A copy with the times of the original, but in another place, and one with other files in this place."""
    listed(root)
    root.rename(tmp_path / "old")
    (tmp_path / "train" / "cat").mkdir(parents=True)
    (tmp_path / "train" / "dog").mkdir()
    for name in ("cat/a.png", "dog/b.png"):
        (tmp_path / "train" / name).touch()
    age(tmp_path / "train", 7200)
    assert listed(root) == [("cat/a.png", 0), ("dog/b.png", 1)]
    assert listed(tmp_path / "old") == BEFORE


def test_part_of_the_files_is_chosen_after_the_cache(root):
    for limit in (2, None, 3):
        files = list_set(str(root.parent), "train", limit)
        keep = np.arange(limit or 5) * 5 // (limit or 5)
        assert [os.fsdecode(p) for p in files.paths] == [BEFORE[i][0] for i in keep]


def test_names_that_are_not_utf8(tmp_path, cache, monkeypatch):
    root = tmp_path / "train"
    for name in (b"cat\xe9/caf\xe9.png", "dög/日本.png".encode()):
        path = os.path.join(os.fsencode(root), name)
        os.makedirs(os.path.dirname(path))
        open(path, "wb").close()
    age(root)
    classes = (os.fsdecode(b"cat\xe9"), "dög")
    found = listed(root, classes)
    assert len(entries(cache)) == 1
    monkeypatch.setattr(os, "walk", no_walk)
    assert listed(root, classes) == found
    assert all((root / path).is_file() for path, _ in found)


# ---------------------------------------------------------------------------- the cache's file


class Hostile:
    """Pickled, an order to make a folder."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def as_npz(**arrays) -> bytes:
    content = io.BytesIO()
    np.savez(content, **arrays)
    return content.getvalue()


def test_damaged_anywhere(root, cache):
    """A changed byte or a cut: the right list, and no error."""
    listed(root)
    (place,) = entries(cache)
    good = place.read_bytes()
    draw = np.random.default_rng(0)
    for number in range(300):
        damaged = bytearray(good)
        for at in draw.integers(len(good), size=1 + number % 3):
            damaged[at] = draw.integers(256)
        place.write_bytes(damaged[: draw.integers(len(good))] if number % 5 == 0 else damaged)
        assert listed(root) == BEFORE
    place.write_bytes(good)
    assert listed(root) == BEFORE


def test_another_shape_in_the_header(root, cache):
    """Two files more or fewer than there are: read to where the header says, no sum is checked."""
    listed(root)
    (place,) = entries(cache)
    good = place.read_bytes()
    assert good.count(b"(5,)") >= 3
    for wrong in (b"(4,)", b"(6,)", b"(1,)", b"(0,)", b"()  ", b"(5,5)"):
        place.write_bytes(good.replace(b"(5,)", wrong[:4]))
        assert listed(root) == BEFORE


CONTENTS = {
    "nothing": b"",
    "text": b"no archive\n",
    "noise": np.random.default_rng(0).bytes(5000),
    "an archive of other things": as_npz(a=np.zeros(3)),
    "an array": pickle.dumps(np.zeros(3)),
    "single numbers": as_npz(classes="x", paths=b"a", labels=1, directories=b"/", changed=1),
}


@pytest.mark.parametrize("content", CONTENTS)
def test_something_else_in_its_place(content, root, cache):
    listed(root)
    (place,) = entries(cache)
    place.write_bytes(CONTENTS[content])
    assert listed(root) == BEFORE
    assert listed(root) == BEFORE
    assert place.read_bytes() != CONTENTS[content], "made anew"


def test_pickles_are_not_loaded(root, cache, tmp_path):
    listed(root)
    (place,) = entries(cache)
    with np.load(place) as stored:
        arrays = dict(stored)
    for name in arrays:
        hostile = np.array([Hostile(tmp_path / "pwned")] * 5, dtype=object)
        place.write_bytes(as_npz(**arrays | {name: hostile}))
        assert listed(root) == BEFORE
    place.write_bytes(pickle.dumps(Hostile(tmp_path / "pwned")))
    assert listed(root) == BEFORE
    assert not (tmp_path / "pwned").exists()


def test_a_folder_in_its_place(root, cache):
    listed(root)
    (place,) = entries(cache)
    place.unlink()
    place.mkdir()
    assert listed(root) == BEFORE
    assert [p.name for p in place.parent.iterdir()] == [place.name], "no temporary file is left"


# ---------------------------------------------------------------------------- the cache's place


def test_place_of_the_cache(root, cache, tmp_path, monkeypatch):
    listed(root)
    (place,) = entries(cache)
    assert place.parent == cache / "resnext"
    for value in (None, ""):
        monkeypatch.setenv("HOME", str(tmp_path / "home"))
        if value is None:
            monkeypatch.delenv("XDG_CACHE_HOME")
        else:
            monkeypatch.setenv("XDG_CACHE_HOME", value)
        assert listed(root) == BEFORE
        assert (tmp_path / "home" / ".cache" / "resnext" / place.name).is_file()
        (tmp_path / "home" / ".cache" / "resnext" / place.name).unlink()


def test_cache_that_cannot_be_written(root, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    for value in (tmp_path / "file", tmp_path / "file" / "below", "/proc/nowhere", "/dev/null"):
        monkeypatch.setenv("XDG_CACHE_HOME", str(value))
        assert listed(root) == BEFORE
        assert listed(root) == BEFORE


def test_disk_full(root, cache, monkeypatch):
    """Neither an error nor half a list."""

    def fail(file, **_):
        file.write(b"PK\3\4 half a list")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(np, "savez", fail)
        assert listed(root) == BEFORE
    assert [p for p in cache.rglob("*") if p.is_file()] == []


def test_no_home_at_all(root, monkeypatch):
    """As in a container that is run under a number without a name."""
    monkeypatch.delenv("XDG_CACHE_HOME")

    def nobody(_):
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", classmethod(nobody))
    assert listed(root) == BEFORE
