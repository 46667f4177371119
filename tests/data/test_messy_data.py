"""Class folders as people have them: what is read, what is skipped with a warning, what is refused.

Training, --check, evaluation, prediction and check_data read the same images and report the same messages.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from commands import ROOT, Result, call, draw_folders, message, run_script, tiny
from PIL import Image

import evaluate
import train
from data.image_folder import list_set
from data.walk import walk
from resnext.config import parse_config
from resnext.errors import UserError
from resnext.weights.load import load_weights

sys.path.insert(0, str(ROOT / "scripts"))
import check_data
import export
import predict

FORMATS = "JPEG, PNG, WebP, GIF, TIFF, BMP, PNM, JPEG 2000, AVIF"
FAST = {"data__pipeline": "fast", "augment__padding": None, "data__workers": "0"}  # files, in this process
COSINE = {"schedule__name": "cosine", "train__epochs": "2", "optimizer__lr": "0.1", "train__batch_size": "5"}


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """data/ with three classes, in the current directory."""
    monkeypatch.chdir(tmp_path)
    return draw_folders(tmp_path / "data", {"cat": 4, "dog": 5, "ship": 6})


def shell(folder: Path, script: str) -> None:
    subprocess.run(["sh", "-e", "-c", script], cwd=folder, check=True)


def settings(**changes: str | None) -> list[str]:
    files = {"data__dataset": "folder", "data__train_images": None, "data__val_images": None}
    return tiny(**({"train__epochs": "1"} | files | changes))


def trained(*more: str, data: str = "data", output: str = "run", **changes: str | None) -> Result:
    Path("tiny.yaml").touch()
    options = ["--config", "tiny.yaml", "--data", data, "--output", output]
    return call(train.main, *options, *settings(**changes), *more)


def resumed(run: str, *changes: str) -> Result:
    return call(train.main, f"--resume={run}", *changes, "run.device=cpu")


def warnings(text: str) -> list[str]:
    """Return warnings without the word, with paths below data/."""
    found = re.findall(r"^(?:warning:?) +(.*)$", text, re.MULTILINE)
    return [re.sub(r"\S*/data/", "data/", line) for line in found]


def checked(*options: str) -> tuple[int, dict]:
    """Return exit status and report of check_data."""
    done = call(check_data.main, "data", "--json", "report.json", "--workers", "1", *options)
    return done.status, json.loads(Path("report.json").read_text()) if done.status < 2 else {
        "error": done.error
    }


# ---------------------------------------------------------------------------- skipped

ALL = "folder: 15 training and 15 validation images, 3 classes"
HIDDEN = """
for place in train train/cat val val/cat; do
    for name in .ipynb_checkpoints @eaDir __MACOSX lost+found .Trash-1000 '$RECYCLE.BIN'; do
        mkdir $place/$name; cp train/cat/0.png $place/$name/copy.png
    done
    for name in ._0.png .DS_Store Thumbs.db desktop.ini .hidden.png; do echo no image > $place/$name; done
done"""
ABSENT = "data/val: has no images of 2 of 3 classes (cat, dog); errors are computed on the other classes"
LOOSE = "data/train: skipped images outside class folders: 1 (loose.png)"
UNSUPPORTED = "data/train: skipped files of unsupported formats: 4 (.heic 2, .psd 1, no extension 1), such as"
AGREED = {  # name: (change, validation images, start of the warning)
    "hidden and system entries": (HIDDEN, 15, None),
    "unsupported formats": (
        "cd train/cat; touch 1.heic 2.heic 3.psd without a.txt a.csv a.json",
        15,
        UNSUPPORTED,
    ),
    "images outside class folders": ("cp train/cat/0.png train/loose.png", 15, LOOSE),
    "empty and missing classes in val/": ("rm val/cat/* ; rm -r val/dog", 6, ABSENT),
}


@pytest.mark.parametrize("name", AGREED)
def test_all_commands_agree(name, folder):
    """They read the same images and print the same warnings."""
    change, images, warning = AGREED[name]
    shell(folder, change)
    result = trained()
    assert ALL.replace("15 val", f"{images} val") in result.output, result.output + result.error
    expected = warnings(result.output)
    assert len(expected) == (warning is not None) and all(line.startswith(warning) for line in expected)
    assert warnings(trained("--check", output="check").output) == expected
    result = call(evaluate.main, "run", "--per-class", "--json", "result.json")
    assert f"{images} images" in result.output
    assert warnings(result.error) == [line for line in expected if line.startswith("data/val")]
    counts = [row["images"] for row in json.loads(Path("result.json").read_text())["per_class"]]
    assert sum(counts) == images and len(counts) == 3
    status, report = checked()
    assert status == 0 and report["pictures"] == {"train": 15, "val": images}
    assert [re.sub(r"\S*/data/|^data/", "data/", line) for line in report["warnings"]] == expected
    for names in ("data/train", "data/train/*"):
        result = call(predict.main, "run", names, "--top", "1", "--format", "csv")
        assert result.status == 0 and len(result.output.splitlines()) >= 16, result.error


def test_all_formats(folder):
    for split in ("train", "val"):
        for number, extension in enumerate((".webp", ".tif", ".gif", ".JFIF", ".pgm", ".TIFF")):
            path = folder / split / "ship" / f"{number}.png"
            image = Image.open(path).convert("L" if extension == ".pgm" else "RGB")
            kind = {"format": "JPEG"} if extension == ".JFIF" else {}
            image.save(path.with_suffix(extension), **kind)
            path.unlink()
    result = trained()
    assert ALL in result.output and warnings(result.output) == []


def test_evaluation_of_a_present_class_has_no_warning(folder):
    shell(folder, "rm -r val/cat")
    assert trained().status == 0
    Path("ships.txt").write_text("ship\n")
    assert warnings(call(evaluate.main, "run", "--classes", "ships.txt").error) == []
    assert call(export.main, "run", "bare.pth").status == 0  # a file without class names
    result = call(evaluate.main, "bare.pth", "--data", "data", "--json", "r.json")
    assert json.loads(Path("r.json").read_text())["images"] == 11, result.error
    assert warnings(result.error)[-1].startswith("data/val: has no images of 1 of 3 classes (cat)")


# ---------------------------------------------------------------------------- links and pipes

LINKS = "skipped links to files or folders that are included already"
TWICE = """
mkdir -p links/train links/val
for i in 1 2; do for class in train/cat train/dog train/ship val/cat val/dog val/ship; do
    ln -s $PWD/$class links/$class
done; done
ln -s $PWD/train/dog/1.png train/cat/again.png"""


def test_links_created_twice(folder):
    """`ln -s` puts the second link into the target of the first."""
    shell(folder, TWICE)
    result = trained(data="data/links")
    assert ALL in result.output
    assert [re.sub(r".*?/(train|val): ", r"\1: ", line) for line in warnings(result.output)] == [
        f"train: {LINKS}: 4, such as cat/cat to cat",
        f"val: {LINKS}: 3, such as cat/cat to cat",
    ]


def test_a_real_folder_has_priority_over_a_link(tmp_path):
    """Whichever comes first in the list: images belong to the class where they really are."""
    draw_folders(tmp_path, {"a": 1, "b": 2})
    shell(tmp_path, f"ln -s ../b train/a/link; ln -s {tmp_path}/val/a train/a/outside")
    files = list_set(str(tmp_path), "train")
    assert [path.decode() for path in files.paths] == ["a/0.png", "a/outside/0.png", "b/0.png", "b/1.png"]
    assert files.labels.tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize("target", ["..", "../..", "../../.."])
def test_a_link_to_a_folder_above(folder, target):
    """Neither val/ nor what lies beside the classes is read through it."""
    shell(folder, f"ln -s {target} train/cat/up; cp train/cat/0.png loose.png")
    result = trained()
    assert ALL in result.output
    (warning,) = warnings(result.output)
    assert f"{LINKS}: 1, such as cat/up to " in warning


def test_pipes_are_not_images(folder):
    shell(folder, "cd train/cat; mkfifo pipe.png; ln -s pipe.png link.png")
    result = trained()
    assert ALL in result.output and "2 (.png 2)" in result.output


def test_two_links_to_one_file_count_once(tmp_path):
    shell(tmp_path, "mkdir class; touch x.png; cd class; ln -s ../x.png 1.png; ln -s ../x.png 2.png")
    shell(tmp_path, "ln -s nowhere class/broken.png")
    found = walk([os.fsencode(tmp_path / "class")])
    names = [Path(os.fsdecode(path)).name for path in found.images[0]]
    assert names == ["1.png", "broken.png"], "reading a broken link reports it"
    assert [Path(os.fsdecode(path)).name for path, _ in found.repeated] == ["2.png"]


def test_train_and_val_that_are_one_folder(folder):
    """Validation on training images causes a warning. Only val/ may lack a class, also with cached lists."""
    shell(folder, "rm -r val; ln -s train val")
    (warning,) = warnings(trained().output)
    assert warning.startswith("data/val: is the same folder as train/")
    (folder / "train" / "new").mkdir()
    for place in (folder / "train", *(folder / "train").iterdir()):
        os.utime(place, (1, 1))
    classes = ("cat", "dog", "new", "ship")
    assert len(list_set("data", "val", classes=classes)) == 15
    for _ in range(2):
        with pytest.raises(UserError, match="new: contains no images"):
            list_set("data", "train", classes=classes)


# ---------------------------------------------------------------------------- refused

ONE_DOWN = "for split in train val; do mkdir new; mv $split new/{}; mv new $split; done"
ONE_CLASS = "data/train: has one class, '{}' (expected at least two); "
INSIDE = "did you mean cat, dog, ship inside it? Move them up into"
UNKNOWN = "data/val: class folder 'images' is not a training class; did you mean cat, dog, ship inside it?"
RENAMED = "has no val/; did you mean {0}/? Rename it, or create a link: ln -s {0} "
SAME = "data/train/{}: is the same folder as data/train/{}; remove one of the two"
REFUSED = [  # (change, error)
    (
        "mkdir -p train/dog/sub val/ant; touch train/dog/sub/0.png; ln -s dog/sub train/ant",
        SAME.format("ant", "dog/sub"),
    ),
    ("ln -s cat train/zebra; mkdir val/zebra", SAME.format("zebra", "cat")),
    (
        "mkdir train/ant val/ant; ln -s ../cat/0.png train/ant",
        "train/ant: contains only links to images of other",
    ),
    ("mkdir train/new", f"data/train/new: contains no images ({FORMATS})"),
    (ONE_DOWN.format("images"), ONE_CLASS.format("images") + INSIDE),
    (ONE_DOWN.format("$split"), ONE_CLASS.format("train") + INSIDE),
    ("mkdir new; mv val new/images; mv new val", UNKNOWN),
    ("rm -r */dog */ship", ONE_CLASS.format("cat") + "put the images of each class into"),
    *((f"mv val {name}", RENAMED.format(name)) for name in ("valid", "validation", "test")),
    ("mv val Val", "data.dir data: has no val/; did you mean Val/? Rename it"),
    ("mkdir 'my data'; mv train val 'my data'", "has no train/; did you mean --data '"),
]


@pytest.mark.parametrize(("change", "expected"), REFUSED)
def test_all_commands_refuse(change, expected, folder):
    """Training and --check end with this error, and check_data reports it."""
    shell(folder, change)
    here = f"{Path.cwd()}/"
    assert expected in message(trained()).replace(here, "")
    assert expected in trained("--check", output="check").output.replace(here, "")
    status, report = checked()
    assert status in (1, 2) and not Path("run").exists()
    assert expected in (report["error"] if status == 2 else "\n".join(report["problems"]["refused"]))


def test_other_data_folders(folder):
    """Evaluation of nested folders, training on a single split and on an archive."""
    assert trained().status == 0
    shell(folder, "mkdir new; mv val new/images; mv new val")
    error = message(call(evaluate.main, "run", "--data", "data"))
    assert "such as 'images'; did you mean cat, dog, ship inside it?" in error
    assert "if cat, dog, ship are classes, split their images" in message(
        trained(data="data/train", output="other")
    )
    Path("data.zip").touch()
    assert "is a file; unpack it" in message(trained(data="data.zip", output="other"))


# ---------------------------------------------------------------------------- names and paths


def test_names_of_any_bytes(folder):
    """Names that are not UTF-8, from training to CSV, JSON and console, whatever the locale."""
    strange = b"caf\xe9"
    for split in ("train", "val"):
        place = os.fsencode(folder / split)
        os.rename(place + b"/cat", place + b"/" + strange)
        os.rename(place + b"/" + strange + b"/0.png", place + b"/" + strange + b"/\xff 0.png")
    Path("tiny.yaml").touch()
    ascii = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    results = {}
    for name, run in {
        "utf8": lambda script, *arguments: call(
            {"train": train, "evaluate": evaluate}[script].main, *arguments
        ),
        "ascii": lambda script, *arguments: run_script(f"{script}.py", *arguments, cwd=".", **ascii),
    }.items():
        done = run("train", "--config", "tiny.yaml", "--data", "data", "--output", name, *settings())
        assert done.status == 0, done.error
        done = run("evaluate", name, "--csv", f"{name}.csv", "--json", f"{name}.json")
        assert (done.status, done.error) == (0, "") and "15 images" in done.output
        results[name] = load_weights(name)[1].classes, Path(f"{name}.csv").read_bytes()
    assert results["utf8"] == results["ascii"]
    classes, rows = results["utf8"]
    assert classes == (strange.decode("utf-8", "surrogateescape"), "dog", "ship")
    assert b"\n" + strange + b"/\xff 0.png," + strange + b"," in rows
    report = json.loads(Path("utf8.json").read_text())
    assert {row["class"] for row in report["per_class"]} == set(classes)
    assert checked()[0] == 0


def test_paths_are_valid_in_every_directory(folder, monkeypatch):
    assert trained().status == 0
    assert parse_config(Path("run/config.yaml").read_text(), "config.yaml").data.dir == str(folder)
    monkeypatch.chdir(folder)
    assert "15 images" in call(evaluate.main, "../run").output
    assert "finished: 2 epochs" in resumed("../run", "train.epochs=2").output


def test_home_folder_in_every_option(folder, monkeypatch):
    home = folder.parent
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir("/")
    (home / "tiny.yaml").touch()
    (home / "names.txt").write_text("cat\ndog\n")
    options = ("--config=~/tiny.yaml", "data.dir=~/data", "--output=~/run one")
    result = call(train.main, *options, *settings(data__dir=None))
    assert result.status == 0, result.error
    assert result.output.rstrip().endswith(f"next: python evaluate.py '{home}/run one'")
    options = ("--data=~/data", "--classes=~/names.txt", "--json=~/r.json", "--csv=~/r.csv")
    result = call(evaluate.main, "~/run one", *options)
    assert result.status == 0 and "9 images" in result.output, result.error
    assert call(predict.main, "~/run one", "~/data/val/cat", "--output=~/p.csv").status == 0
    assert all((home / name).exists() for name in ("r.json", "r.csv", "p.csv"))
    assert "finished: 2 epochs" in resumed("~/run one", "train.epochs=2").output


# ---------------------------------------------------------------------------- pixels and broken files


def test_large_images_are_named_and_can_be_allowed(folder):
    for split in ("train", "val"):
        Image.new("RGB", (60, 40)).save(folder / split / "cat" / "large.png")
    text = (
        "has 60x40 = 2,400 pixels, and the limit is 2,000; raise data.max_pixels (of a script, --max-pixels)"
    )
    for changes in ({}, FAST):
        assert text in message(trained(data__max_pixels="2000", output=f"refused{len(changes)}", **changes))
    assert trained(data__max_pixels="2400").status == 0
    assert text in message(call(evaluate.main, "run", "--max-pixels", "2000"))
    result = call(predict.main, "run", "data/val/cat", "--max-pixels", "2000")
    assert result.status == 2 and text in result.error
    status, report = checked("--max-pixels", "2000")
    assert status == 1 and text in report["problems"]["broken"]["val/cat/large.png"]


@pytest.mark.parametrize("skip", ["false", "true"])
def test_broken_validation_files_are_found_before_the_first_step(folder, skip):
    broken = folder / "val" / "ship" / "5.png"
    broken.write_bytes(broken.read_bytes()[:100])
    result = trained(**FAST, data__skip_broken=skip)
    assert f"{broken}: cannot be decoded" in message(result)
    assert "step 1/" not in result.output and "step" not in Path("run/metrics.jsonl").read_text()
    check = trained("--check", output="check", **FAST, data__skip_broken=skip)
    assert f"{broken}: cannot be decoded" in check.output


def test_validation_files_are_tried_once_per_run(folder, monkeypatch):
    """A resumed run has read them in its first epoch."""
    tried = []
    name = "resnext.engine.trainer.read_through"
    monkeypatch.setattr(name, lambda batches, *_: tried.append(batches.images))
    assert trained(**FAST).status == 0 and tried == [15]
    assert resumed("run", "train.epochs=2").status == 0 and tried == [15]


# ---------------------------------------------------------------------------- last batch, longer schedule

IMAGENET = FAST | {"model__stem": "imagenet", "model__depth": None, "model__stages": "[1,1,1,1]"}
SIZES = ("data__image_size", "data__resize")


def test_a_last_batch_of_one_image(folder):
    """15 images in batches of 14 leave one, whose last feature maps are single pixels."""
    small = IMAGENET | dict.fromkeys(SIZES, "32")
    result = trained(**small, train__batch_size="14")
    text = message(result)
    assert text.startswith("train.batch_size: with 15 training images and batches of 14 the last has 1")
    assert "train.batch_size=13, or a larger data.image_size" in text
    assert "step" not in Path("run/metrics.jsonl").read_text()
    check = trained("--check", output="check", **small, train__batch_size="14")
    assert f"error    {text}" in check.output and check.status == 2
    assert trained(output="b", **small, train__batch_size="13").status == 0
    assert trained(output="c", **IMAGENET, **dict.fromkeys(SIZES, "48"), train__batch_size="14").status == 0


def test_a_longer_cosine_reports_the_jump_of_the_rate(folder):
    assert trained(**COSINE).status == 0  # 3 steps per epoch
    longer = resumed("run", "train.epochs=4").output
    # cos² at 5/6 of a quarter turn of the old length, at half of the new one
    last = 0.1 * np.cos(np.pi / 2 * 5 / 6) ** 2
    assert f"the learning rate jumps from {last:.3g} at the last step to 0.05" in longer.splitlines()
    assert "train.epochs 2 → 4" in longer
    assert "jumps" not in resumed("run", "run.log_interval=7").output
