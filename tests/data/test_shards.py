"""Tar shards as a dataset: equal to class folders, other programs' conventions, and what is refused."""

import gc
import json
import os
import shutil
import tarfile
import threading
from pathlib import Path

import numpy as np
import pytest
from archives import header
from batches import COUNTS, CPU, IMAGES, configure, joined
from commands import call, message
from images import encode, noise
from shard_files import make, pack, sample

import train
from data import image_folder, shard_files, shards, subsets
from data.datasets import load_set
from data.evaluation import evaluation_data
from data.imagenet_archives import imagenet_classes
from data.loaders import make_train_loader
from resnext.config import parse_config
from resnext.errors import UserError

IMAGE = encode(noise(10, 12, 3), "JPEG")
FOREIGN = [(f"{number:06}", number % 2) for number in range(4)]  # (key, label)


@pytest.fixture(scope="module")
def made(shared_root, tmp_path_factory) -> Path:
    """Shards of the class folders `shared_root`."""
    return make(shared_root, tmp_path_factory.mktemp("made") / "shards", "--images", 6)


def foreign(root: Path, *more, split: str = "train", **details: object) -> Path:
    """Write a shard with four samples without class names, and `more` members."""
    members = [part for key, label in FOREIGN for part in sample(key, label, IMAGE, **details)]
    pack(root / f"x-{split}-0000.tar", [*members, *more])
    return root


def paths(root: Path | str, split: str = "train", **options) -> list[str]:
    files = shards.list_set(str(root), split, **options)
    assert [files.read(i) for i in range(len(files))] == [IMAGE] * len(files)
    return [os.fsdecode(path) for path in files.paths]


# ---------------------------------------------------------------------------- equal to class folders


@pytest.mark.parametrize("limit", [None, 7])
@pytest.mark.parametrize("split", ["train", "val"])
def test_a_set_equals_its_folders(split, limit, made, shared_root):
    ours, theirs = (source.list_set(str(root), split, limit)
                    for source, root in ((shards, made), (image_folder, shared_root)))  # fmt: skip
    assert ours.fingerprint() == theirs.fingerprint() and ours.classes == theirs.classes
    assert (ours.paths == theirs.paths).all() and (ours.labels == theirs.labels).all()
    assert all(ours.read(i) == theirs.read(i) for i in range(len(theirs)))
    assert ours.notes == theirs.notes == ()


def test_batches_equal_those_of_folders(made, shared_root):
    """In memory too; the matrix of ranks and workers is in tests/engine."""
    found = []
    for root, dataset in ((shared_root, "folder"), (made, "shards")):
        config = configure(root, dataset=dataset)
        loader = make_train_loader(load_set(config.data, "train"), config, CPU)
        whole = load_set(configure(root, dataset=dataset, pipeline="memory").data, "train")
        found.append((*joined(loader.epoch(2)), whole.images, whole.fingerprint()))
    assert all((np.asarray(ours) == np.asarray(theirs)).all() for ours, theirs in zip(*found, strict=True))
    assert len(found[0][0]) == IMAGES


@pytest.mark.parametrize(
    ("names", "order"),
    [(("10", "2", "a"), None), (("10", "2", "a"), "natural"), (("0", "1", "10", "2"), "string")],
)
def test_class_order(names, order, tmp_path):
    """Numbers in the shards are those of the folders' default order; keys and resumed runs change it."""
    for split in ("train", "val"):
        for name in names:
            path = tmp_path / "folders" / split / name / "1.jpg"
            path.parent.mkdir(parents=True)
            path.write_bytes(IMAGE)
    root = make(tmp_path / "folders", tmp_path / "shards")
    for options in ({"order": order}, {"classes": names[::-1]}):
        ours, theirs = (source.list_set(str(at), "val", **options)
                        for source, at in ((shards, root), (image_folder, tmp_path / "folders")))  # fmt: skip
        assert ours.classes == theirs.classes and ours.fingerprint() == theirs.fingerprint()


def test_parts_of_a_validation_set(made, shared_root):
    """Some classes, as evaluate.py --classes selects them."""
    found = []
    for root, dataset in ((shared_root, "folder"), (made, "shards")):
        val_set, names = subsets.load_val(configure(root, dataset=dataset).data, tuple(COUNTS))
        val_set, names = subsets.restrict(val_set, names, [0, 2], "--classes")
        found.append((names, val_set.labels.tolist(), [val_set.read(i) for i in range(len(val_set))]))
    assert found[0] == found[1] and len(found[0][0]) == COUNTS["ant"] + COUNTS["cow"]


def test_evaluation_recognizes_shards(made, shared_root, tmp_path):
    class Options:
        ten_crop = image_size = resize = interpolation = workers = class_order = max_pixels = None
        val_list = None

    def found(root: Path, dataset: str, known: bool) -> str:
        Options.data = str(root)
        config = parse_config(
            "", "test", [f"data.dataset={dataset}", "data.pipeline=fast"][: 1 + (dataset[0] in "fs")]
        )
        return evaluation_data(config, known, Options).dataset

    for known in (True, False):
        for dataset in ("folder", "shards"):
            assert found(made, dataset, known) == "shards" and found(shared_root, dataset, known) == "folder"
    Options.val_list = "val.txt"  # names files
    assert found(made, "folder", True) == "folder"


# ---------------------------------------------------------------------------- other programs' shards


def test_foreign_shards(tmp_path):
    """Labels come from .cls; classes are numbers, and val/ may lack some; json may have the original name."""
    foreign(tmp_path)
    pack(tmp_path / "x-validation-00.tar", sample("./d/7", 1, IMAGE, filename="old/7.JPEG", width=3))
    assert paths(tmp_path) == ["0/000000.jpg", "0/000002.jpg", "1/000001.jpg", "1/000003.jpg"]
    assert paths(tmp_path, "val") == ["1/7.JPEG"]
    assert shards.class_names(str(tmp_path)) == ("0", "1")
    (note,) = shards.list_set(str(tmp_path), "val").notes
    assert "has no images of 1 of 2 classes (0)" in note
    (tmp_path / "classes.txt").write_text("dog\ncat\n")
    assert paths(tmp_path) == ["dog/000000.jpg", "dog/000002.jpg", "cat/000001.jpg", "cat/000003.jpg"]
    assert paths(tmp_path, order="string")[0] == "cat/000001.jpg"


def test_what_a_sample_may_be(tmp_path):
    """Extensions in capitals, dots in folders, labels in json, other members, tar formats, long names."""
    long = "d.x/" + "n" * 150 + "/" + "k" * 150
    for number, form in enumerate((tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)):
        members = [
            *sample("a.b/one", 0, IMAGE, "JPEG"),
            *sample("two", None, IMAGE, "png", label=1),
            ("three.txt", b"neither image nor label"),
            ("README", b"no extension"),
            ("._one.jpg", b"junk"), ("__MACOSX/._one.jpg", b"junk"), ("d/.foo.jpg", b"junk"),
            ("__meta__/x.jpg", b"junk"),
            *sample("é" if number < 2 else long, 1, IMAGE, "webp"),
        ]  # fmt: skip
        folder = tarfile.TarInfo("d")
        folder.type = tarfile.DIRTYPE
        root = tmp_path / str(number)
        pack(root / "train" / "0.tar", [(folder, b""), *members], format=form)
        last = "é" if number < 2 else "k" * 150
        assert paths(root) == ["0/one.JPEG", *sorted(["1/two.png", f"1/{last}.webp"])]


def test_names_that_repeat_in_other_shards(tmp_path):
    pack(tmp_path / "train-0.tar", sample("0", 0, IMAGE) + sample("1", 1, IMAGE))
    pack(tmp_path / "train-1.tar", sample("0", 0, IMAGE))
    assert paths(tmp_path) == ["0/train-0/0.jpg", "0/train-1/0.jpg", "1/train-0/1.jpg"]
    pack(tmp_path / "train-1.tar", sample("0", 0, IMAGE) + sample("1", 1, IMAGE) + sample("0", 0, IMAGE))
    with pytest.raises(UserError, match=r"two images are train-1/0.jpg with one label"):
        paths(tmp_path)


def test_wnids_in_names(tmp_path):
    """They name the classes of a subset, and classes.txt must not contradict them."""
    wnids = ("n02107683", "n01440764")
    members = [part for label, wnid in enumerate(wnids) for part in sample(f"{wnid}_1", label, IMAGE)]
    pack(tmp_path / "train.tar", members)
    expected = [f"{wnid}/{wnid}_1.jpg" for wnid in wnids]
    assert paths(tmp_path) == expected
    file = tmp_path / "classes.txt"
    file.write_bytes(b"\xef\xbb\xbf" + "\r\n".join([*wnids, "", ""]).encode())
    assert paths(tmp_path) == expected
    file.write_text("\n".join(wnids[::-1]))
    with pytest.raises(UserError, match="an image of n02107683 has the label of 'n01440764'"):
        paths(tmp_path)
    pack(tmp_path / "train.tar", [*members, *sample("n01440764_2", 0, IMAGE)])
    file.unlink()
    assert shards.class_names(str(tmp_path)) == ("0", "1")  # a label with two of them


@pytest.mark.parametrize("numbers", ["sorted", "other"])
def test_imagenet(numbers, tmp_path):
    """1000 labels with wnids in the names are ImageNet's classes, if they are numbered in their order."""
    wnids = imagenet_classes()
    members = []
    for label, wnid in enumerate(wnids):
        wnid = wnid if numbers == "sorted" or label else wnids[7]
        members += [(f"{wnid}_{label}.jpg", IMAGE), (f"{wnid}_{label}.cls", b"%d" % label)]
    pack(tmp_path / "imagenet1k-train-0000.tar", members)
    pack(tmp_path / "imagenet1k-validation-00.tar", sample("ILSVRC2012_val_00000001", 999, IMAGE))
    if numbers == "other":
        with pytest.raises(UserError, match="n01514668 has label 0, not the number among the sorted wnids"):
            shards.class_names(str(tmp_path))
        return
    assert shards.class_names(str(tmp_path)) == wnids
    assert paths(tmp_path, "val") == [f"{wnids[-1]}/ILSVRC2012_val_00000001.jpg"]
    data = parse_config("", "test", [f"data.dir={tmp_path}", "data.dataset=shards"]).data
    assert subsets.known_classes(data, 1000, "torchvision") == (wnids, [])
    (tmp_path / "imagenet1k-train-0000.tar").unlink()  # numbers are those of the outputs
    assert subsets.known_classes(data, 1000, "torchvision") == (wnids, [])
    val_set, names = subsets.load_val(data, wnids)
    assert (val_set.classes, val_set.labels.tolist()) == (wnids, [999])
    assert names == ["999/ILSVRC2012_val_00000001.jpg"]


# ---------------------------------------------------------------------------- what are the shards?


@pytest.mark.parametrize(
    ("train_names", "val_names"),
    [
        (["train/0.tar", "train/1.tar"], ["val/0.tar"]),
        (["training/a.tar"], ["valid/a.tar"]),
        (["imagenet1k-train-0000.tar"], ["imagenet1k-validation-00.tar"]),
        (["x_Train_0.tar"], ["x.val.0.tar"]),
        (["train-0.tar"], ["test/0.tar"]),
        (["crash-test-train-0.tar"], ["crash-test-val-0.tar"]),
    ],
)  # fmt: skip
def test_names_of_splits(train_names, val_names, tmp_path):
    others = ["a.txt", ".train-9.tar", "extra/deep/train-0.tar"] + ["test-0.tar"] * (
        val_names != ["test/0.tar"]
    )
    for name in (*train_names, *val_names, *others):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    found = {split: [str(p.relative_to(tmp_path)) for p in files]
             for split, files in shard_files.split_files(str(tmp_path)).items()}  # fmt: skip
    assert found == {"train": train_names, "val": val_names}


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("x", ["x"]),
        ("x-{08..11}", ["x-08", "x-09", "x-10", "x-11"]),
        ("{a,b}{1..2}", ["a1", "a2", "b1", "b2"]),
        ("{t-{0..1},v-{00..01}}", ["t-0", "t-1", "v-00", "v-01"]),
    ],
)
def test_braces(pattern, names):
    assert sorted(shard_files.expand_braces(pattern)) == names


def test_a_pattern(tmp_path):
    for number in range(3):
        pack(tmp_path / f"x-train-{number:02}.tar", sample(str(number), number, IMAGE))
    pack(tmp_path / "x-val-0.tar", sample("0", 0, IMAGE))
    pattern = f"{tmp_path}/x-{{train-{{00..01}},val-0}}.tar"
    assert paths(pattern) == ["0/0.jpg", "1/1.jpg"] and paths(pattern, "val") == ["0/0.jpg"]
    for wrong, text in (
        ("x-train-{00..03}.tar", r"/x-train-03.tar does not exist \(1 of 4 files are missing\)"),
        ("x-train-{00}.tar", "has braces without alternatives"),
        ("x-{train.tar", "has braces without alternatives"),
        ("y.tar", "/y.tar does not exist; name a local folder"),
        ("x-*.tar", r"does not exist; .*local files as in 'x-\{train,val\}"),
        ("x-train-{00..02}.tar", "has no shards of val"),
    ):
        with pytest.raises(UserError, match=text):
            paths(tmp_path / wrong, "val")


# ---------------------------------------------------------------------------- refused


def special(kind: bytes, name: str = "a.jpg") -> tuple:
    return header(name, 0, type=kind, linkname="b"), b""


REFUSED = {
    "no label": ([("a.jpg", IMAGE)], "sample 'a' has no class number"),
    "label not adjacent": ([("a.jpg", IMAGE), ("b.txt", b""), ("a.cls", b"1")], "has no class number"),
    "negative label": (sample("a", -1, IMAGE), "has no class number (got '-1'"),
    "name as label": (sample("a", "cat", IMAGE), "has no class number (got 'cat'"),
    "no image": ([("a.heic", b""), ("a.cls", b"1")], "sample 'a' has 0 images"),
    "no image, label in json": ([("a.heic", b""), ("a.json", b'{"label": 1}')], "sample 'a' has 0 images"),
    "two images": ([*sample("a", 1, IMAGE), ("a.png", IMAGE)], "sample 'a' has 2 images"),
    "dots in the name": (sample("a.v2", 1, IMAGE), "sample 'a' has 0 images (got 'v2.jpg' 'v2.cls'"),
    "twice": ([("a.jpg", IMAGE), ("a.jpg", IMAGE)], "two members with one extension"),
    "link": ([special(tarfile.SYMTYPE)], "member 'a.jpg' is not a plain file"),
    "hard link": ([special(tarfile.LNKTYPE)], "member 'a.jpg' is not a plain file"),
    "damaged json": ([*sample("a", 1, IMAGE), ("a.json", b"{")], "sample 'a': its .json cannot be read"),
    "deep json": ([*sample("a", 1, IMAGE), ("a.json", b"[" * 99_999)], "its .json cannot be read"),
    "odd text": ([*sample("a", 1, IMAGE), ("a.json", b'{"filename": "\\ud800"}')], "cannot be read"),
    "long label": (sample("a", "1" * 2000, IMAGE), "has a .cls of 2,001 bytes"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused_samples(case, tmp_path):
    members, text = REFUSED[case]
    foreign(tmp_path, *members)
    with pytest.raises(UserError) as error:
        paths(tmp_path)
    message = str(error.value)
    assert message.startswith(f"{tmp_path}/x-train-0000.tar: ") and text in message and "\n" not in message


def test_cut_off_shards(tmp_path):
    """Wherever a shard ends too early, reading its headers fails with its name."""
    shard = foreign(tmp_path) / "x-train-0000.tar"
    content = shard.read_bytes()
    size = content.rstrip(b"\0").__len__() // 512 * 512 + 512  # before the end mark
    for end in [*range(0, size, 512), *range(100, size, 700), size]:
        shard.write_bytes(content[:end])
        with pytest.raises(UserError, match=r"x-train-0000.tar: (is )?cut off or damaged"):
            paths(tmp_path)
    second = 512 + -(-len(IMAGE) // 512) * 512  # its header
    shard.write_bytes(content[:second] + b"junk" * 128 + content[second + 512 :])
    with pytest.raises(UserError, match=r"x-train-0000.tar: is cut off or damaged after 1 members"):
        paths(tmp_path)


def test_a_shard_that_changes_while_it_is_used(tmp_path):
    files = shards.list_set(str(foreign(tmp_path)), "train")
    os.truncate(tmp_path / "x-train-0000.tar", 3000)
    with pytest.raises(UserError, match=r"x-train-0000.tar: 0/000002.jpg: the shard is cut off"):
        files.read(1)
    (tmp_path / "x-train-0000.tar").rename(tmp_path / "away")
    shards._opened.cache_clear()
    with pytest.raises(UserError, match=r"x-train-0000.tar: 1/000003.jpg: cannot be read \(No such file"):
        files.read(3)


def test_a_broken_image_is_named(tmp_path):
    members = sample("good", 0, IMAGE) + sample("bad", 1, IMAGE[:-40])
    for split in ("train", "val"):
        pack(tmp_path / f"{split}.tar", members)
    config = configure(tmp_path, dataset="shards")
    loader = make_train_loader(load_set(config.data, "train"), config, CPU)
    with pytest.raises(UserError, match=r"train.tar: 1/bad.jpg: cannot be decoded"):
        list(loader.epoch(1))


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda root: (root / "train").mkdir(), "has no shards of train; name them train-0000.tar"),
        (lambda root: (root / "train" / "cat").mkdir(parents=True), "set data.dataset=folder"),
        (lambda root: pack(root / "ILSVRC2012_img_train.tar", []), "is ImageNet's archive; unpack it with"),
        (lambda root: pack(root / "train.tar", sample("a", 1, IMAGE) + sample("b", 2, IMAGE)),
         "have no images of 0; number the labels from 0"),
        (lambda root: pack(root / "x-train-0.tar.gz", []),
         "decompress x-train-0.tar.gz (gunzip)"),
        (lambda root: pack(root / "train.tar", [("a.txt", b"")]), "has no images with labels"),
        (lambda root: (root / "train.tar").write_bytes(b"\x1f\x8b" + bytes(999)), "compressed with gzip"),
        (lambda root: (foreign(root), (root / "classes.txt").write_text("a\na\n")), "has a class twice"),
        (lambda root: (foreign(root), (root / "classes.txt").write_text("a\n\nb\n")), "an empty line"),
        (lambda root: (foreign(root), (root / "classes.txt").write_text("a\nb\nc\n")), "have no images of c"),
        (lambda root: (foreign(root), (root / "classes.txt").write_text("a\n")), "has one class, 'a'"),
        (lambda root: pack(root / "train.tar", sample("a", 0, IMAGE)), "has one class, '0'"),
        (lambda root: (foreign(root), info(root, "x-train-0000.tar", "x-train-0001.tar")),
         "_info.json: lists x-train-0001.tar, which does not exist (missing files: 1)"),
        (lambda root: (info(root, "x-train-0000.tar"), copies(root, 0, 1)),
         "x-train-0001.tar: is not listed in _info.json"),
        (lambda root: (foreign(root), info(root, "x-train-0000.tar", images=5)),
         "have 4 images (got _info.json"),
        (lambda root: copies(root, 0, 1, 3), "number 2 is missing (1 of 4 files); get the missing files"),
        (lambda root: copies(root, "0-of-00003", "2-of-00003"), "number 1 is missing (1 of 3 files)"),
        (lambda root: copies(root, 0, "0 (1)"), "x-train-0000.tar: has the same images as"),
        (lambda root: (foreign(root), pack(root / "training-1.tar", [])), "has two sets of train files"),
        (lambda root: (foreign(root), foreign(root / "b")), "has two sets of train files"),
        (lambda root: pack(root / "train-val-0.tar", []), "train-val-0.tar: names two splits, train and val"),
    ],
)  # fmt: skip
def test_refused_folders(change, text, tmp_path):
    change(tmp_path)
    with pytest.raises(UserError) as error:
        shards.list_set(str(tmp_path), "train")
    assert text in str(error.value)


def info(root: Path, *names: str, images: int | None = None) -> None:
    content = {"filenames": names, "num_samples": images}
    (root / "_info.json").write_text(json.dumps({"splits": {"train": content}}))


def copies(root: Path, *ends: object) -> None:
    """Write a shard under several names."""
    for end in ends:
        shutil.move(foreign(root / "new") / "x-train-0000.tar", root / f"x-train-000{end}.tar")


def test_unused_files_are_named(tmp_path):
    foreign(tmp_path)
    pack(tmp_path / "x-validation-0.tar", sample("0", 0, IMAGE) + sample("1", 1, IMAGE))
    for name in ("extra-1.tar", "x-train-0001.tar.gz", "x-test-0.tar"):
        (tmp_path / name).touch()
    (note,) = shards.list_set(str(tmp_path), "val").notes
    assert "have no split in their name: 2 (extra-1.tar, x-train-0001.tar.gz)" in note


def test_a_label_of_val_that_train_lacks(tmp_path):
    foreign(tmp_path)
    pack(tmp_path / "val.tar", sample("a", 2, IMAGE))
    with pytest.raises(UserError, match="have label 2, and there are 2 classes; number the labels from 0"):
        shards.list_set(str(tmp_path), "val")


def test_the_missing_key_is_named(made, shared_root, tmp_path):
    """For shards without data.dataset=shards; archives beside class folders cause nothing."""
    pack(tmp_path / "train" / "0.tar", sample("a", 0, IMAGE))
    for root in (made, tmp_path, f"{made}/{{train,validation}}-0000.tar"):
        options = ["--config", "resnext50_32x4d.yaml", "--output", tmp_path / "run"]
        text = message(call(train.main, *options, "--data", root))
        assert "for tar shards, set data.dataset=shards" in text
    for name, hint in (
        ("x-train-0.tar.gz", "decompress tar shards (gunzip)"),
        ("train/0.tgz", "decompress tar shards (gunzip)"),
        ("ILSVRC2012_img_val.tar", "unpack ImageNet's archives with scripts/prepare_imagenet.py"),
    ):
        root = pack(tmp_path / name[:3] / name, []).parents[name.count("/")]
        with pytest.raises(UserError) as error:
            image_folder.class_names(str(root))
        assert hint in str(error.value)
    both = shutil.copytree(shared_root, tmp_path / "both")
    for name in ("ILSVRC2012_img_train.tar", "weights.pth.tar", "val/x.tar"):
        (both / name).write_bytes(b"no tar")
    assert len(image_folder.list_set(str(both), "train")) == IMAGES and not shard_files.is_sharded(str(both))


# ---------------------------------------------------------------------------- index and descriptors


def test_the_index_is_cached(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    root = foreign(tmp_path / "set")
    shard = root / "x-train-0000.tar"
    os.utime(shard, (1e9, 1e9))
    before = shards.list_set(str(root), "train")
    calls = []
    monkeypatch.setattr(shards, "read_samples", lambda path: calls.append(path) or [])
    after = shards.list_set(str(root), "train")
    assert after.fingerprint() == before.fingerprint() and (after.places == before.places).all() and not calls
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    foreign(root, *sample("new", 1, IMAGE))
    assert "1/new.jpg" in paths(root)
    pack(root / "x-train-0001.tar", sample("000000", 0, IMAGE))
    assert len(paths(root)) == 6  # the names of the shards became part of those of the images


def test_large_sets_are_indexed_by_several_processes(made, monkeypatch):
    here = shards.list_set(str(made), "train")
    monkeypatch.setattr(shards, "LARGE", 0)
    monkeypatch.setattr(shards, "cached", lambda *_: None)
    assert (shards.list_set(str(made), "train").places == here.places).all()


def test_few_shards_stay_open(made, monkeypatch):
    """Whatever threads and forked processes read them."""

    def descriptors() -> int:
        links = [f"/proc/self/fd/{name}" for name in os.listdir("/proc/self/fd")]
        return sum(os.path.realpath(link).endswith(".tar") for link in links)

    files = shards.list_set(str(made), "train")
    expected = [files.read(i) for i in range(len(files))]
    opened = shards.lru_cache(2)(shards._opened.__wrapped__)
    shards._opened.cache_clear()
    gc.collect()
    before = descriptors()
    monkeypatch.setattr(shards, "_opened", opened)
    found: list[list[bytes]] = []
    read = lambda: found.append([files.read(i) for i in range(len(files))])  # noqa: E731
    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    if os.fork() == 0:
        os._exit([files.read(i) for i in range(len(files))] != expected)
    assert os.wait()[1] == 0
    for thread in threads:
        thread.join()
    assert found == [expected] * 4 and descriptors() - before <= 2
