"""make_shards.py: class folders and Parquet files to shards; stopped, killed, resumed; what is refused."""

import json
import os
import re
import shutil
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from commands import call, expect, message, refused, snapshot
from failures import fail_at, run_killed
from images import encode, noise
from shard_files import make, make_shards, to_parquet

from data import image_folder, shard_files, shards
from data.imagenet_archives import imagenet_classes
from resnext.errors import UserError

NAMES = {  # in train/ and val/, in the order of their list
    "ant": ["a-b.jpg", "a.JPEG", "a.jpeg", "a.png", "b.c.jpg", "deep/er/x.jpg", "deep/é.webp", "z.jfif"],
    "b.e e": ["1.jpg", "10.jpg", os.fsdecode(b"2\xff.jpg"), "b.bmp"],
    "__cow__": ["1.jpg"],
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    """Class folders with awkward names."""
    root = tmp_path_factory.mktemp("folders")
    for split in ("train", "val"):
        for name, files in NAMES.items():
            for number, file in enumerate(files):
                path = root / split / name / file
                path.parent.mkdir(parents=True, exist_ok=True)
                seed = [number, *os.fsencode(name), len(split)]
                kind = {".png": "PNG", ".webp": "WEBP", ".bmp": "BMP"}.get(path.suffix, "JPEG")
                path.write_bytes(encode(noise(8, 9, 3, seed=seed), kind))
    return root


def assert_equal(root: Path, folders: Path) -> None:
    """Assert that shards and class folders are the same dataset."""
    for split in ("train", "val"):
        ours, theirs = shards.list_set(str(root), split), image_folder.list_set(str(folders), split)
        assert ours.classes == theirs.classes and ours.fingerprint() == theirs.fingerprint()
        assert [ours.read(i) for i in range(len(ours))] == [theirs.read(i) for i in range(len(theirs))]


@pytest.mark.parametrize("images", [1, 5, 1250])
def test_class_folders(images, folders, tmp_path):
    root = make(folders, tmp_path / "out", "--images", images)
    assert_equal(root, folders)
    counts = [len(list(root.glob(f"{name}-*.tar"))) for name in ("train", "validation")]
    assert counts == [-(-13 // images)] * 2
    before = snapshot(root)
    assert call(make_shards.main, folders, root, "--images", images).status == 0
    assert snapshot(root) == before, "a second run changes nothing"


def test_form(folders, tmp_path):
    """Members as WebDataset and timm read them: one dot, .jpg, .cls, and .json; timm's _info.json."""
    root = make(folders, tmp_path / "out", "--images", 8)
    info = json.loads((root / "_info.json").read_text())["splits"]
    assert set(info) == {"train", "validation"}
    for name, split in info.items():
        assert split["name"] == name and split["num_samples"] == sum(split["shard_lengths"]) == 13
        assert split["filenames"] == [f"{name}-0000.tar", f"{name}-0001.tar"]
        assert split["shard_lengths"] == [8, 5]
    members = []
    for name in info["train"]["filenames"]:
        with tarfile.open(root / name) as tar:
            members += [(member.name, tar.extractfile(member).read()) for member in tar]
    keys = [name.rpartition("/")[2].partition(".") for name, _ in members]
    assert {ending for *_, ending in keys} == {"jpg", "png", "webp", "bmp", "cls", "json"}
    assert len({name for name, _ in members}) == 39 and not any(name.startswith("__") for name, _ in members)
    details = [json.loads(content) for name, content in members if name.endswith(".json")]
    assert details[0] == {"filename": "__cow__/1.jpg", "label": 0, "class": "__cow__"}
    assert (root / "classes.txt").read_text() == "__cow__\nant\nb.e e\n"


def test_killed_anywhere(folders, tmp_path):
    """Before any file is complete: the same command ends with the files of a run that was never stopped."""
    whole = make(folders, tmp_path / "whole", "--images", 5)
    output, number = tmp_path / "out", 0

    def work() -> None:
        assert call(make_shards.main, folders, output, "--images", 5).status == 0

    while True:
        number += 1
        shutil.rmtree(output, ignore_errors=True)
        if not run_killed(work, os, "fsync", number):
            break
        with pytest.raises(
            UserError, match=r"_info.json: lists .*tar, which does not exist|has no shards of"
        ):
            [shard_files.find_shards(str(output), split) for split in ("train", "val")]
        work()
        assert contents(output) == contents(whole)
    assert number == 2 + 6 + 1  # _info.json, classes.txt, six shards


def contents(root: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(root.iterdir())}


def test_a_missing_shard_is_written_again(folders, tmp_path):
    root = make(folders, tmp_path / "out", "--images", 4)
    before = contents(root)
    (root / "train-0001.tar").unlink()
    (root / ".1.partial.tar").write_text("of a run that was killed")
    make(folders, root, "--images", 4)
    assert contents(root) == before


def test_a_full_disk(folders, tmp_path, monkeypatch):
    fail_at(monkeypatch, os, "fsync", 3, OSError(28, "No space left on device"))
    text = message(call(make_shards.main, folders, tmp_path / "out"))
    expect(text, ["train-0000.tar: cannot be written (No space left on device)"])
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["_info.json", "classes.txt"]
    monkeypatch.undo()
    assert_equal(make(folders, tmp_path / "out"), folders)


def test_refused(folders, tmp_path):
    root = make(folders, tmp_path / "out")
    changed = shutil.copytree(folders, tmp_path / "changed", symlinks=True)
    (changed / "train" / "ant" / "new.jpg").touch()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").touch()
    (tmp_path / "lines" / "train" / "a\nb").mkdir(parents=True)
    for name in ("train/a\nb", "val/a\nb", "train/c", "val/c"):
        shutil.copytree(folders / "val" / "__cow__", tmp_path / "lines" / name, dirs_exist_ok=True)
    for arguments, text in (
        ((folders, root, "--images", 6), "was made from other images, or with another --images"),
        ((changed, root), "was made from other images"),
        ((folders, tmp_path / "other"), "holds 'file'"),
        ((folders, tmp_path / "other" / "file"), "File exists"),
        ((folders, tmp_path / "new", "--images", 0), "--images: must be at least 1"),
        ((tmp_path / "none", tmp_path / "new"), "no such folder"),
        ((tmp_path / "lines", tmp_path / "new"), "has a line end"),
        ((folders, tmp_path / "new", "--label", "x"), "--label: is for Parquet files"),
    ):
        expect(refused(tmp_path, make_shards.main, *arguments), [text])
    with open(root / "train-0000.tar", "r+b") as file:
        file.truncate(3000)
    expect(refused(tmp_path, make_shards.main, folders, root), ["train-0000.tar: is cut off; delete it"])


# ---------------------------------------------------------------------------- Parquet


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    """Class folders with names that are unique in their class."""
    root = tmp_path_factory.mktemp("plain")
    for split, count in (("train", 7), ("val", 3)):
        for name in ("cat", "dog"):
            (root / split / name).mkdir(parents=True)
            for number in range(count):
                content = encode(noise(8, 9, 3, seed=[number, len(name + split)]), "PNG")
                (root / split / name / f"{number}.png").write_bytes(content)
    return root


@pytest.mark.parametrize("label", ["label", "fine_label"])
@pytest.mark.parametrize("files", [1, 3])
def test_parquet(files, label, plain, tmp_path):
    assert_equal(make(to_parquet(plain, tmp_path / "hub" / "data", files, label), tmp_path / "out"), plain)


def test_parquet_killed(plain, tmp_path):
    parquet = to_parquet(plain, tmp_path / "hub")
    whole = contents(make(parquet, tmp_path / "whole", "--images", 3))

    def work() -> None:
        assert call(make_shards.main, parquet, tmp_path / "out", "--images", 3).status == 0

    assert run_killed(work, os, "fsync", 5)
    (tmp_path / "out" / "train-0000.tar").unlink()
    work()
    assert contents(tmp_path / "out") == whole


def test_odd_class_names_in_parquet(plain, tmp_path):
    """As member names they would be hidden, or folders."""
    for number, names in enumerate((["__cat__/.net", "AC/DC"], ["../../x", "/abs"])):
        root = make(to_parquet(plain, tmp_path / f"{number}", names=names), tmp_path / f"out{number}")
        files = shards.list_set(str(root), "val")
        assert files.classes == tuple(names)
        assert [os.fsdecode(path) for path in files.paths[2:4]] == [f"{names[0]}/2.png", f"{names[1]}/0.png"]
        with tarfile.open(root / "train-0000.tar") as tar:
            assert not any(re.search(r"(^|/)(\.|/)", name) for name in tar.getnames())


def test_parquet_without_names(plain, tmp_path):
    """Neither of classes nor of images: numbers."""
    root = make(to_parquet(plain, tmp_path / "hub", 1, unnamed=True, names=[]), tmp_path / "out")
    files = shards.list_set(str(root), "train")
    assert files.classes == ("0", "1")
    assert [os.fsdecode(path) for path in files.paths[:2]] == ["0/00000000.png", "0/00000002.png"]


def test_imagenet_in_parquet(tmp_path):
    """The names of its classes are phrases; the names of its images have the wnids."""
    wnids, image = imagenet_classes(), encode(noise(4, 4, 3), "JPEG")
    metadata = {"info": {"features": {"label": {"names": [f"thing {n}" for n in range(1000)]}}}}
    for split in ("train", "validation"):
        rows = [{"bytes": image, "path": f"{split}_{n:08}_{wnid}.JPEG"} for n, wnid in enumerate(wnids)]
        table = pa.table({"image": rows, "label": list(range(1000))})
        table = table.replace_schema_metadata({"huggingface": json.dumps(metadata)})
        pq.write_table(table, tmp_path / f"{split}-00000-of-00001.parquet")
    root = make(tmp_path, tmp_path / "out")
    assert shards.class_names(str(root)) == wnids
    assert (
        os.fsdecode(shards.list_set(str(root), "val").paths[0])
        == "n01440764/validation_00000000_n01440764.JPEG"
    )


def two_labels(plain: Path, root: Path) -> None:
    to_parquet(plain, root)
    for path in root.iterdir():
        table = pq.read_table(path)
        table = table.rename_columns(["img", "coarse_label"]).append_column("fine_label", table["label"])
        pq.write_table(table.replace_schema_metadata({}), path)


def other_names(plain: Path, root: Path) -> None:
    to_parquet(plain, root)
    (path,) = root.glob("train-00001*")
    content = {"info": {"features": {"label": {"names": ["dog", "cat"]}}}}
    pq.write_table(pq.read_table(path).replace_schema_metadata({"huggingface": json.dumps(content)}), path)


def edit(plain: Path, root: Path, change: Callable[[pa.Table], pa.Table]) -> None:
    for path in to_parquet(plain, root, 1).iterdir():
        pq.write_table(change(pq.read_table(path)), path)


def rename(root: Path, old: str, new: str) -> None:
    for path in list(root.iterdir()):
        path.rename(root / path.name.replace(old, new))


REFUSED = {
    "several labels": (two_labels, "coarse_label int64, fine_label int64); choose one with --label"),
    "unlabeled": (lambda plain, root: to_parquet(plain, root, shift=-1), "have no class number"),
    "labels without names": (lambda plain, root: to_parquet(plain, root, names=["cat"]), "has label 1, and"),
    "no validation": (
        lambda plain, root: (to_parquet(plain, root), [p.unlink() for p in root.glob("val*")]),
        "has no Parquet files of val",
    ),
    "a file missing": (
        lambda plain, root: next(to_parquet(plain, root).glob("train-00001*")).unlink(),
        "number 1 is missing (1 of 2 files)",
    ),
    "partial": (
        lambda plain, root: (to_parquet(plain, root), rename(root, "train-", "partial-train-")),
        "has only a part of the split",
    ),
    "damaged": (
        lambda plain, root: os.truncate(next(to_parquet(plain, root).glob("train-00001*")), 200),
        "cannot be read (",
    ),
    "two configurations": (
        lambda plain, root: [to_parquet(plain, root / size / "data", 1) for size in ("160px", "320px")],
        "has two sets of train files",
    ),
    "no rows": (lambda plain, root: edit(plain, root, lambda table: table.slice(0, 0)), "has no images"),
    "no images": (
        lambda plain, root: edit(plain, root, lambda table: table.drop("img")),
        "one column of images",
    ),
    "labels from 1": (lambda plain, root: to_parquet(plain, root, shift=1, names=[]), "no images of class 0"),
    "labels as text": (
        lambda plain, root: edit(
            plain, root, lambda table: table.set_column(1, "label", pa.array(["cat"] * len(table)))
        ),
        "needs a column of class numbers (got img ",
    ),
    "an empty name": (
        lambda plain, root: to_parquet(plain, root, names=["", "cat"]),
        "a class name is empty",
    ),
    "other names": (other_names, "names other classes than the files before"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_parquet(case, plain, tmp_path):
    prepare, text = REFUSED[case]
    prepare(plain, tmp_path / "hub")
    error = refused(tmp_path, make_shards.main, tmp_path / "hub", tmp_path / "out")
    expect(error, [text])
    assert case not in ("damaged", "other names") or "train-00001-of-00002-0123abcd.parquet: " in error


def test_columns_of_any_order(plain, tmp_path):
    """The image's parts in another order, and large binaries, in one of the files."""
    (path,) = to_parquet(plain, tmp_path / "hub").glob("train-00001*")
    table = pq.read_table(path)
    parts = pa.struct({"path": pa.string(), "bytes": pa.large_binary()})
    rows = [{"path": row["path"], "bytes": row["bytes"]} for row in table["img"].to_pylist()]
    images = pa.array(rows, parts)
    columns = {"label": table["label"], "image": images}
    pq.write_table(pa.table(columns).replace_schema_metadata(table.schema.metadata), path)
    assert_equal(make(tmp_path / "hub", tmp_path / "out"), plain)


def test_a_damaged_page(plain, tmp_path):
    """What is only noticed while images are copied names the Parquet file, not the shard."""
    (path,) = to_parquet(plain, tmp_path / "hub").glob("train-00001*")
    column = pq.ParquetFile(path).metadata.row_group(0).column(0)  # img.bytes
    assert column.path_in_schema == "img.bytes"
    with open(path, "r+b") as file:
        file.seek(column.dictionary_page_offset or column.data_page_offset)
        file.write(b"\xff" * 16)
    error = message(call(make_shards.main, tmp_path / "hub", tmp_path / "out"))
    expect(error, [f"{path}: cannot be read (", "download it again"])


def test_wnids_of_another_order(tmp_path):
    """The metadata names the classes of labels that are not those of the sorted wnids."""
    wnids, image = imagenet_classes()[::-1], encode(noise(4, 4, 3), "JPEG")
    metadata = {"info": {"features": {"label": {"names": wnids}}}}
    for split in ("train", "validation"):
        rows = [{"bytes": image, "path": f"{n}_{wnid}.JPEG"} for n, wnid in enumerate(wnids)]
        table = pa.table({"image": rows, "label": list(range(1000))})
        pq.write_table(
            table.replace_schema_metadata({"huggingface": json.dumps(metadata)}),
            tmp_path / f"{split}.parquet",
        )
    assert shards.class_names(str(make(tmp_path, tmp_path / "out"))) == wnids


def test_a_chosen_label(plain, tmp_path):
    two_labels(plain, tmp_path / "hub")
    for arguments, text in (
        ((tmp_path / "hub", tmp_path / "no", "--label", "nope"), "no column 'nope' (got img, coarse_label, "),
        ((next((tmp_path / "hub").iterdir()), tmp_path / "no"), "is a file; name the folder"),
    ):
        expect(refused(tmp_path, make_shards.main, *arguments), [text])
    root = make(tmp_path / "hub", tmp_path / "out", "--label", "fine_label")
    assert shards.class_names(str(root)) == ("0", "1")


def test_pyarrow_is_missing(plain, tmp_path, monkeypatch):
    to_parquet(plain, tmp_path / "hub")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    expect(refused(tmp_path, make_shards.main, tmp_path / "hub", tmp_path / "out"), ["pip install pyarrow"])
