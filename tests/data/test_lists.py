"""Labeled lists in the layouts that people have: what they name, wrong class orders, missing files."""

import json
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from archives import META, TRUTH, VAL_CLASSES, VAL_IDS, devkit, meta, truth
from commands import ROOT, call, draw_folders, message, refused, tiny
from PIL import Image

import evaluate
import train
from data.datasets import load_set, training_classes
from data.image_folder import known_list
from data.imagenet_archives import imagenet_classes
from data.lists import label_images, read_list
from resnext.config import parse_config
from resnext.errors import UserError

sys.path.insert(0, str(ROOT / "scripts"))
import check_data

WNIDS = ("n01440764", "n01443537", "n01484850")  # outputs 0, 1, 2 of ImageNet
VAL = "ILSVRC2012_val_{:08}"
NOISY = "path,noisy_labels_0,noisy_labels_50,is_valid"
FOLDERS = {"data__dataset": "folder", "data__train_images": None, "data__val_images": None}


def draw(path: Path, seed: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (9, 9, 3), np.uint8)
    Image.fromarray(pixels).save(path, "PNG")


@pytest.fixture
def kaggle(tmp_path, monkeypatch) -> Path:
    """Kaggle's ILSVRC layout, in the current directory: LOC_val_solution.csv next to ILSVRC/, a flat val/."""
    monkeypatch.chdir(tmp_path)
    root = tmp_path / "ILSVRC/Data/CLS-LOC"
    for wnid in WNIDS:
        for number in (10, 9, 100):
            draw(root / f"train/{wnid}/{wnid}_{number}.JPEG", number)
    rows = ["ImageId,PredictionString"]
    for seed, (name, wnid) in enumerate(VAL_CLASSES.items()):
        draw(root / "val" / name, seed)
        rows.append(f"{name.removesuffix('.JPEG')},{wnid} 85 1 499 272 " + f"{wnid} 3 4 5 6 " * (seed % 2))
    (tmp_path / "LOC_val_solution.csv").write_text("\n".join([rows[0], *rows[:0:-1]]) + "\n")  # unsorted
    return root


def read(text: str, tmp_path: Path, split: str = "val", column: str = "") -> list[tuple[str, str]]:
    (tmp_path / "list").write_text(text)
    found = read_list(f"{tmp_path}/list{column}", split)
    return list(zip(found.paths, found.names, strict=True))


@pytest.mark.parametrize(
    ("text", "column", "expected"),
    [
        (
            "ImageId,PredictionString\r\n"
            f"{VAL.format(48981)},n03995372 85 1 499 272 \r\n"
            f"{VAL.format(3)},n01440764 1 2 3 4 n01440764 5 6 7 8 \r\n",
            "",
            [(f"{VAL.format(48981)}.JPEG", "n03995372"), (f"{VAL.format(3)}.JPEG", "n01440764")],
        ),
        ("val_0.JPEG\tn03444034\t0\t32\t44\t62\nval_1.JPEG\tn04067472\t52\t55\t57\t59\n", "",
         [("val_0.JPEG", "n03444034"), ("val_1.JPEG", "n04067472")]),
        (f"{VAL.format(1)}.JPEG 65\n{VAL.format(2)}.JPEG 970\n", "",
         [(f"{VAL.format(1)}.JPEG", "65"), (f"{VAL.format(2)}.JPEG", "970")]),
        ("./a/my dog.png dog\n\nb/x.png  cat\n", "", [("a/my dog.png", "dog"), ("b/x.png", "cat")]),
        ("\ufefffile_name,label\na.png,cat\n\"b, c.png\",dog\n", "", [("a.png", "cat"), ("b, c.png", "dog")]),
        (f"{NOISY}\ntrain/n1/n1_1.JPEG,n1,n2,False\nval/n2/n2_5.JPEG,n2,n2,True\n", ":noisy_labels_50",
         [("val/n2/n2_5.JPEG", "n2")]),
    ],
    ids=["kaggle", "tiny-imagenet", "caffe", "names", "csv", "imagenette"],
)  # fmt: skip
def test_kinds(text, column, expected, tmp_path):
    assert read(text, tmp_path, column=column) == expected


def test_rows_of_the_other_split_are_left_out(tmp_path):
    text = f"{NOISY}\ntrain/n1/n1_1.JPEG,n1,n2,False\nval/n2/n2_5.JPEG,n2,n2,True\n"
    assert read(text, tmp_path, "train", ":noisy_labels_50") == [("train/n1/n1_1.JPEG", "n2")]


@pytest.mark.parametrize(("header", "train", "val"), [
    ("is_valid", "0", "1"), ("is_valid", "FALSE", "true"), ("is_valid", "no", "yes"),
    ("split", "train", "valid"), ("split", "Training", "val"),
])  # fmt: skip
def test_how_a_column_tells_the_split(header, train, val, tmp_path):
    text = f"path,label,{header}\na.png,cat,{train}\nb.png,dog,{val}\n"
    assert read(text, tmp_path, "train") == [("a.png", "cat")] and read(text, tmp_path) == [("b.png", "dog")]


@pytest.mark.parametrize(
    ("text", "column", "phrase"),
    [
        ("", "", "names no image"),
        ("a.png\n", "", "line 1: must be a path and a class"),
        ("a.png 0\n../b.png 1\n", "", "line 2: '../b.png' is not below the data folder"),
        ("/a.png 0\n", "", "'/a.png' is not below the data folder"),
        ("a.png 0\n./a.png 1\n", "", "line 2: 'a.png' is also on line 1"),
        ("path,label\na.png,\n", "", "line 2: has no path or no class"),
        ("path,breed\na.png,cat\n", "", "no column 'label' (got path, breed); choose one with FILE:COLUMN"),
        (NOISY, ":noisy_labels_51", "no column 'noisy_labels_51'"),
        ("a.png 0\n", ":label", "remove :label"),
        ('path,label\n"a.png,cat\n', "", "unexpected end of data"),
        ("ImageId,PredictionString\na,n1 1 2 3 4 n2 1 2 3 4\n", "", "line 2: needs one class, with boxes"),
        ("ImageId,PredictionString\na,n1 1 2 3\n", "", "needs one class, with boxes"),
        (
            "path,label,is_valid\na.png,1,maybe\n",
            "",
            "line 2: unknown is_valid (got 'maybe', expected train, ",
        ),
        # ILSVRC/ImageSets/CLS-LOC/val.txt: the number is no class
        (f"{VAL.format(1)} 1\n{VAL.format(2)} 2\n{VAL.format(3)} 3\n", "", "numbers its images from 1 to 3"),
        ("490\n361\n171\n", "", "no meta.mat next to it"),
    ],
)
def test_refused_files(text, column, phrase, tmp_path):
    with pytest.raises(UserError, match=re.escape(phrase)):
        read(text, tmp_path, column=column)


# ---------------------------------------------------------------------------- class orders


def labels(text: str, classes: tuple[str, ...], tmp_path: Path) -> tuple[list[int], tuple[str, ...]]:
    """Return the labels of a list in the order of its lines, and the warnings."""
    (tmp_path / "list").write_text(text)
    found = read_list(str(tmp_path / "list"), "val")
    files = label_images(str(tmp_path), "val", found.file, classes)
    label = {path.decode(): int(label) for path, label in zip(files.paths, files.labels, strict=True)}
    return [label[path] for path in found.paths], files.notes


def caffe(*classes: int) -> str:
    return "".join(f"{VAL.format(number)}.JPEG {c}\n" for number, c in enumerate(classes, 1))


def test_numbers_are_outputs_from_0(tmp_path):
    assert labels("a.png 2\nb.png 0\n", ("cat", "dog", "ox"), tmp_path)[0] == [2, 0]
    note = labels("a.png 2\nb.png 0\n", ("cat", "dog", "ox"), tmp_path)[1][0]
    assert note.endswith("classes are interpreted as numbers of outputs: 0 is 'cat', 2 is 'ox'")
    # The first images of ImageNet's validation set confirm the order, so there is no warning.
    assert labels(caffe(65, 970, 230, 809, 516, 57), imagenet_classes(), tmp_path) == (
        [65, 970, 230, 809, 516, 57],
        (),
    )
    assert labels(f"a/{WNIDS[2]}_1.JPEG 2\nb/{WNIDS[0]}_7.JPEG 0\n", WNIDS, tmp_path) == ([2, 0], ())


@pytest.mark.parametrize(
    ("text", "classes", "phrase"),
    [
        ("a.png 1\nb.png 3\n", ("cat", "dog", "ox"), "line 2: class '3' is unknown (expected 0 to 2)"),
        ("a.png cat\nb.png 1\n", ("cat", "dog"), "line 2: class '1' is unknown (expected cat, dog)"),
        # numbers of the devkit, and those counted from 1, for images of the official validation set
        (caffe(490, 361, 171, 822, 297), imagenet_classes(), "line 2: class '361' is of another class order"),
        (caffe(66, 971, 231, 810, 517, 58), imagenet_classes(), ", output 970, and not "),
        (caffe(66, 971, 231, 810, 517), tuple(map(str, range(1000))), "another class order"),
        # names that contain the class
        (f"x/{WNIDS[0]}_1.JPEG 1\nx/{WNIDS[0]}_2.JPEG 1\n", WNIDS, "another class order"),
        ("cat/1.png 1\ndog/2.png 0\n", ("cat", "dog"), "cat/1.png is cat, output 0, and not dog"),
        (f"{WNIDS[0]}/1.JPEG 449\n", imagenet_classes(), "is n01440764, output 0, and not n0"),
    ],
)
def test_wrong_orders(text, classes, phrase, tmp_path):
    with pytest.raises(UserError, match=re.escape(phrase)):
        labels(text, classes, tmp_path)


def test_noisy_names_are_no_wrong_order(tmp_path):
    text = f"{WNIDS[0]}/a.png {WNIDS[1]}\n{WNIDS[1]}/b.png {WNIDS[2]}\n{WNIDS[2]}/c.png {WNIDS[2]}\n"
    found, notes = labels(text, WNIDS, tmp_path)
    assert found == [1, 2, 2] and "2 of 3 images have another class than in their path" in notes[0]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("".join(f"x{n} {n}\n" for n in (10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0)), "0 1 2 3 4 5 6 7 8 9 10"),
        ("a dog\nb cat\nc n10\nd n9\n", "cat dog n10 n9"),
        ("a dog\nb dog\n", "has one class, 'dog'"),
        ("a 1\nb 2\nc 3\nd 1\n", "0 is missing; number the classes from 0"),
        ("a 0\nb 2\nc 3\n", "1 is missing"),
    ],
)  # fmt: skip
def test_classes_of_a_training_list(text, expected, tmp_path):
    (tmp_path / "list").write_text(text)
    data = parse_config(f"data: {{dir: {tmp_path}, train_list: {tmp_path}/list}}", "x").data
    try:
        found = " ".join(training_classes(data, None) or ())
    except UserError as error:
        found = str(error)
    assert expected == found or expected in found.partition(": ")[2]


# ---------------------------------------------------------------------------- real layouts


def load(root: Path, split: str = "val", **keys: str):
    text = ", ".join(f"{key}: {json.dumps(str(value))}" for key, value in keys.items())
    data = parse_config(f"data: {{dir: {root}, {text}}}", "x").data
    return load_set(data, split, training_classes(data, None))


def test_a_flat_val_equals_its_class_folders(kaggle, tmp_path):
    """Kaggle's CSV, the devkit's truth file, and its archive give the images of val/WNID/ in their order."""
    (tmp_path / "sorted/train").parent.mkdir()
    (tmp_path / "sorted/train").symlink_to(kaggle / "train")
    for name, wnid in VAL_CLASSES.items():
        (tmp_path / "sorted/val" / wnid).mkdir(parents=True, exist_ok=True)
        shutil.copy(kaggle / "val" / name, tmp_path / "sorted/val" / wnid)
    expected = load(tmp_path / "sorted")
    for name, content in ((TRUTH, truth(*VAL_IDS)), (META, meta()), ("devkit.tar.gz", devkit())):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    for file in ("LOC_val_solution.csv", TRUTH, "devkit.tar.gz"):
        found = load(kaggle, val_list=tmp_path / file)
        assert found.classes == expected.classes == WNIDS and found.notes == ()
        assert found.labels.tolist() == expected.labels.tolist()
        contents = [[files.read(i) for i in range(len(files))] for files in (found, expected)]
        assert contents[0] == contents[1] and len(contents[0]) == 7


def test_a_list_of_class_folders_is_the_same_dataset(kaggle, tmp_path):
    """Same order and fingerprint, so the same batches, whatever the order of the lines."""
    paths = [path.relative_to(kaggle / "train") for path in kaggle.rglob("n*.JPEG")][::-1]
    for form in ("{0}/{1} {2}", "{0}/{1} {0}", "train/{0}/{1}\t{0}"):
        lines = [form.format(path.parent, path.name, WNIDS.index(path.parent.name)) for path in paths]
        (tmp_path / "list").write_text("\n".join(lines))
        data = parse_config(f"data: {{dir: {kaggle}, train_list: {tmp_path}/list}}", "x").data
        found, expected = load_set(data, "train", WNIDS), load(kaggle, "train")
        if not form.startswith("train"):
            assert found.fingerprint() == expected.fingerprint()
        assert [found.path(i) for i in range(9)] == [expected.path(i) for i in range(9)]


def test_tiny_imagenet(tmp_path):
    root = tmp_path / "tiny-imagenet-200"
    for wnid in ("n02124075", "n01443537"):
        draw(root / f"train/{wnid}/images/{wnid}_0.JPEG")
    for number in range(3):
        draw(root / f"val/images/val_{number}.JPEG", number)
    (root / "wnids.txt").write_text("n02124075\nn01443537\n")
    lines = [
        f"val_{n}.JPEG\t{wnid}\t0\t32\t44\t62\n" for n, wnid in enumerate(("n02124075", "n01443537") * 2)
    ]
    (root / "val/val_annotations.txt").write_text("".join(lines[:3]))
    with pytest.raises(UserError, match=r"data\.val_list=.*val_annotations\.txt"):
        load(root)
    found = load(root, val_list=root / "val/val_annotations.txt")
    assert found.classes == ("n01443537", "n02124075")
    assert found.paths.tolist() == [b"val_1.JPEG", b"val_0.JPEG", b"val_2.JPEG"]
    assert found.labels.tolist() == [0, 1, 1] and found.path(0) == f"{root}/val/images/val_1.JPEG"


def test_imagenette_with_noisy_labels(tmp_path):
    draw_folders(tmp_path / "d", {"n02979186": 2, "n03000684": 2})
    rows = [
        f"{split}/{wnid}/{number}.png,{wnid},{noisy if split == 'train' else wnid},{split == 'val'}"
        for split in ("val", "train")
        for wnid, noisy in (("n02979186", "n03000684"), ("n03000684", "n02979186"))
        for number in range(2)
    ]
    (tmp_path / "d/noisy_imagenette.csv").write_text("\n".join([NOISY, *rows[::-1]]))
    clean = load(tmp_path / "d", "train", train_list=f"{tmp_path}/d/noisy_imagenette.csv:noisy_labels_0")
    assert clean.labels.tolist() == [0, 0, 1, 1] == load(tmp_path / "d").labels.tolist()
    noisy = load(tmp_path / "d", "train", train_list=f"{tmp_path}/d/noisy_imagenette.csv:noisy_labels_50")
    assert noisy.paths[0] == b"train/n03000684/0.png" and "4 of 4 images have another class" in noisy.notes[0]
    val = load(tmp_path / "d", val_list=f"{tmp_path}/d/noisy_imagenette.csv:noisy_labels_50")
    assert val.paths.tolist()[0] == b"val/n02979186/0.png" and val.labels.tolist() == [0, 0, 1, 1]


def test_missing_files_are_named(kaggle, tmp_path):
    (kaggle / "val" / f"{VAL.format(2)}.JPEG").unlink()
    (kaggle / "val" / f"{VAL.format(5)}.JPEG").unlink()
    with pytest.raises(UserError, match=r"val_0000000[25]\.JPEG: is missing, but .* \(and 1 more"):
        load(kaggle, val_list=tmp_path / "LOC_val_solution.csv")


# ---------------------------------------------------------------------------- commands


def test_kaggle_layout(kaggle, tmp_path):
    """Train, check, resume and evaluate without class folders in val/."""
    options = ["--data", kaggle, "data.val_list=LOC_val_solution.csv", *tiny(**FOLDERS, train__epochs="1")]
    (tmp_path / "tiny.yaml").touch()
    start = ["--config", "tiny.yaml", "--output", "run"]
    text = refused(tmp_path, train.main, *start, "--data", kaggle, *tiny(**FOLDERS))
    assert f"use its list: data.val_list={tmp_path}/LOC_val_solution.csv" in text
    assert "ready" in call(train.main, *start, *options, "--check").output
    result = call(train.main, *start, *options)
    assert result.status == 0, result.error
    result = call(train.main, "--resume", "run", "train.epochs=2", "run.device=cpu")
    assert result.status == 0 and "the bits may differ" not in result.output, result.error
    own = call(evaluate.main, "run", "--json", "own.json")
    given = call(evaluate.main, "run", "--data", kaggle, "--val-list", "LOC_val_solution.csv")
    assert own.output == given.output and json.loads(Path("own.json").read_text())["images"] == 7, given.error
    assert "LOC_val_solution.csv" in message(call(evaluate.main, "run", "--data", kaggle))


def test_known_lists_are_near(tmp_path):
    """A val.txt far above val/ is another dataset's."""
    val = tmp_path / "a" / "b" / "val"
    draw(val / "x.png", 0)
    for name in ("val.txt", "a/val.txt", "a/b/val.txt", "val_annotations.txt", "LOC_val_solution.csv"):
        (tmp_path / name).touch()
        near = name in ("a/b/val.txt", "LOC_val_solution.csv")
        assert (f"data.val_list={tmp_path / name} " in known_list(val)) == near
        (tmp_path / name).unlink()


def test_lists_for_both_splits(tmp_path, monkeypatch):
    """One folder of images, and a list for each split, as for mmpretrain."""
    monkeypatch.chdir(tmp_path)
    for number in range(30):
        draw(tmp_path / f"images/{number}.png", number)
    lines = [f"images/{number}.png {number % 3}\n" for number in range(30)]
    Path("train.txt").write_text("".join(lines[:20]))
    Path("val.txt").write_text("".join(lines[20:]))
    Path("tiny.yaml").touch()
    lists = ["data.train_list=train.txt", "data.val_list=val.txt"]
    result = call(
        train.main, "--config", "tiny.yaml", "--data", ".", *lists, *tiny(**FOLDERS, train__epochs="1")
    )
    assert result.status == 0, result.error
    result = call(
        check_data.main, ".", "--train-list", "train.txt", "--val-list", "val.txt", "--json", "r.json"
    )
    report = json.loads(Path("r.json").read_text())
    assert report["pictures"] == {"train": 20, "val": 10} and result.status == 0, result.output


def test_numbers_of_another_order_than_in_training(tmp_path):
    """The class folders in both lists show it. Folders of several classes do not."""
    draw_folders(tmp_path, {"cat": 2, "dog": 2})
    numbers = {name: tmp_path / f"{name}.txt" for name in ("train", "same", "other")}
    numbers["train"].write_text("cat/0.png 1\ncat/1.png 1\ndog/0.png 0\ndog/1.png 0\n")
    numbers["same"].write_text("dog/0.png 0\ncat/0.png 1\n")
    numbers["other"].write_text("dog/0.png 1\ncat/0.png 0\n")
    assert load(tmp_path, train_list=numbers["train"], val_list=numbers["same"]).labels.tolist() == [0, 1]
    with pytest.raises(
        UserError, match=r"line 1: dog/0.png has class 1, and in .*train.txt its folder has 0"
    ):
        load(tmp_path, train_list=numbers["train"], val_list=numbers["other"])


def test_numbers_for_training_need_numbers_for_validation(tmp_path):
    draw_folders(tmp_path, {"cat": 2, "dog": 2})
    (tmp_path / "train.txt").write_text("cat/0.png 0\ndog/0.png 1\n")
    with pytest.raises(
        UserError, match=r"'cat' is not a training class; .*give both data\.train_list and data\.val_list"
    ):
        load(tmp_path, train_list=tmp_path / "train.txt")


def test_one_list_for_both_splits(tmp_path):
    draw_folders(tmp_path, {"cat": 2, "dog": 2})
    rows = [f"train/{name}/{number}.png,{name}" for name in ("cat", "dog") for number in range(2)]
    for header, ends, count in (("path,label", ("", ""), 1), ("path,label,split", (",train", ",val"), 0)):
        lines = [row + ends[number % 2] for number, row in enumerate(rows)]
        (tmp_path / "all.csv").write_text("\n".join([header, *lines]))
        notes = load(tmp_path, train_list=tmp_path / "all.csv", val_list=tmp_path / "all.csv").notes
        assert sum("the validation error is that of training images" in note for note in notes) == count


def test_lists_need_files():
    with pytest.raises(UserError, match=r"data\.val_list: names image files, and cifar10 has none"):
        parse_config("data: {dataset: cifar10, val_list: x.csv}", "x")
