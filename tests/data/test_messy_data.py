"""Class folders as people have them: what counts, what is left out and said, what is refused.

Training, --check, evaluation, prediction and check_data see the same pictures and use the same words.
"""

import contextlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import ROOT, Result, call, draw_folders, message, run_script, tiny
from PIL import Image

import evaluate
import train
from data.decode import decode
from data.image_folder import list_set
from data.walk import walk
from resnext.batch_plan import check_last_batch
from resnext.config import parse_config
from resnext.engine.train_state import build_train_state
from resnext.engine.trainer import train_step
from resnext.errors import UserError
from resnext.weights.load import load_weights

sys.path.insert(0, str(ROOT / "scripts"))
import predict

COUNTS = {"cat": 4, "dog": 5, "ship": 6}
TRAINED = "folder: 15 training and 15 validation images, 3 classes"


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """data/ with three classes, in the current directory."""
    monkeypatch.chdir(tmp_path)
    return draw_folders(tmp_path / "data", COUNTS)


def settings(**changes: str | None) -> list[str]:
    files = {"data__dataset": "folder", "data__train_images": None, "data__val_images": None}
    return tiny(**({"train__epochs": "1"} | files | changes))


def trained(*more: str, data: str = "data", output: str = "run", **changes: str | None) -> Result:
    Path("tiny.yaml").touch()
    return call(
        train.main, "--config", "tiny.yaml", "--data", data, "--output", output, *settings(**changes), *more
    )


def fast(**changes: str) -> dict[str, str | None]:
    """Settings of files that are read by workers' code, in this process."""
    return {"data__pipeline": "fast", "augment__padding": None, "data__workers": "0"} | changes


def warnings(text: str) -> list[str]:
    """Without the word, and with paths below data/."""
    found = re.findall(r"^(?:warning:?) +(.*)$", text, re.MULTILINE)
    return [re.sub(r"\S*/data/", "data/", line) for line in found]


def checked(data: str = "data") -> tuple[int, dict]:
    """Exit status and report of check_data."""
    done = run_script("scripts/check_data.py", data, "--json", "report.json", "--workers", "1", cwd=".")
    assert "Traceback" not in done.error, done.error
    return done.status, json.loads(Path("report.json").read_text()) if done.status < 2 else {
        "error": done.error
    }


def agree(count: str, *expected: str) -> None:
    """Training, --check, evaluation and check_data find the same pictures, and warn in these words."""
    result = trained()
    assert count in result.output, result.output + result.error
    assert warnings(result.output) == list(expected)
    assert warnings(trained("--check", output="check").output) == list(expected)
    images = int(re.search(r"and (\d+) validation", count)[1])
    result = call(evaluate.main, "run")
    assert f"{images} images" in result.output
    assert warnings(result.error) == [line for line in expected if line.startswith("data/val")]
    status, report = checked()
    assert status == 0 and sum(report["pictures"].values()) == images + int(re.search(r"\d+", count)[0])
    assert [re.sub(r"\S*/data/|^data/", "data/", line) for line in report["warnings"]] == list(expected)


def refused(expected: str) -> None:
    """Training and --check end with this error, and check_data says it."""
    text = message(trained()).replace(str(Path.cwd()) + "/", "")
    assert expected in text
    assert expected in trained("--check", output="check").output.replace(str(Path.cwd()) + "/", "")
    status, report = checked()
    said = report["error"] if status == 2 else "\n".join(report["problems"]["refused"])
    assert status in (1, 2) and expected in said
    assert not Path("run").exists()


# ---------------------------------------------------------------------------- what is left out


def test_hidden_and_system_entries_are_neither_classes_nor_pictures(folder):
    for part in ("train", "val"):
        for name in (".ipynb_checkpoints", "@eaDir", "__MACOSX", "lost+found", ".Trash-1000", "$RECYCLE.BIN"):
            for place in (folder / part / name, folder / part / "cat" / name):
                place.mkdir()
                shutil.copy(folder / part / "cat" / "0.png", place / "copy.png")
        for name in ("._0.png", ".DS_Store", "Thumbs.db", "desktop.ini", ".hidden.png"):
            (folder / part / "dog" / name).write_bytes(b"\0\5\x16\7 no picture")
            (folder / part / name).write_bytes(b"\0")
    agree(TRAINED)
    result = call(predict.main, "run", "data/val", "--top", "1", "--format", "csv")
    assert result.status == 0 and len(result.output.splitlines()) == 16, result.error
    result = call(predict.main, "run", "data/val/*", "--top", "1", "--format", "csv")
    assert result.status == 0 and len(result.output.splitlines()) == 16, result.error


def test_more_formats_and_those_that_are_left_out(folder):
    for part in ("train", "val"):
        for number, ending in enumerate((".webp", ".tif", ".gif", ".JFIF", ".pgm", ".TIFF")):
            image = Image.open(folder / part / "ship" / f"{number}.png")
            kind = {"format": "JPEG"} if ending == ".JFIF" else {}
            (image.convert("L") if ending == ".pgm" else image).save(
                folder / part / "ship" / f"{number}{ending}", **kind
            )
            (folder / part / "ship" / f"{number}.png").unlink()
    for name in ("1.heic", "2.heic", "3.psd", "without"):
        (folder / "train" / "cat" / name).touch()
    for name in ("boxes.txt", "labels.csv", "info.json"):
        (folder / "train" / "cat" / name).touch()
    agree(
        TRAINED,
        "data/train: left out are files of no known format: 4 (.heic 2, .psd 1, no ending "
        "1), such as cat/1.heic; convert them to JPEG or PNG",
    )
    result = call(predict.main, "run", "data/train/cat", "--top", "1", "--format", "csv")
    assert result.status == 0 and len(result.output.splitlines()) == 5
    assert "4 (.heic 2, .psd 1, no ending 1)" in result.error


def test_links_in_circles_and_to_what_is_there_already(folder):
    """Class folders as links, made twice: `ln -s` puts the second into the first's target."""
    Path("links/train").mkdir(parents=True)
    Path("links/val").mkdir()
    for _ in range(2):
        for part in ("train", "val"):
            for name in COUNTS:
                subprocess.run(["ln", "-s", folder / part / name, f"links/{part}/{name}"], check=True)
    shutil.move("links", "elsewhere")
    (folder / "train" / "cat" / "again.png").symlink_to(folder / "train" / "dog" / "1.png")
    result = trained(data="elsewhere")
    assert TRAINED in result.output
    lines = [line.split(": ", 1)[1] for line in warnings(result.output)]
    assert lines == [
        "left out are links to what is there already: 4, such as cat/cat to cat",
        "left out are links to what is there already: 3, such as cat/cat to cat",
    ]


def test_a_link_gives_way_to_the_real_folder(tmp_path):
    """Whichever comes first in the list: pictures belong to the class where they really are."""
    draw_folders(tmp_path, {"a": 1, "b": 2})
    (tmp_path / "train" / "a" / "link").symlink_to("../b")
    (tmp_path / "train" / "a" / "outside").symlink_to(tmp_path / "val" / "a")
    files = list_set(str(tmp_path), "train")
    assert [path.decode() for path in files.paths] == ["a/0.png", "a/outside/0.png", "b/0.png", "b/1.png"]
    assert files.labels.tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize("target", ["..", "../..", "../../.."])
def test_a_link_to_a_folder_above(folder, target):
    """Neither val/ nor what lies beside the classes comes in through it."""
    (folder / "train" / "cat" / "up").symlink_to(target)
    shutil.copy(folder / "train" / "cat" / "0.png", folder / "loose.png")
    result = trained()
    assert TRAINED in result.output
    assert len(warnings(result.output)) == 1 and ": 1, such as cat/up to " in warnings(result.output)[0]


def test_a_class_that_is_a_link_into_another(folder):
    (folder / "train" / "dog" / "sub").mkdir()
    shutil.copy(folder / "train" / "dog" / "0.png", folder / "train" / "dog" / "sub" / "0.png")
    (folder / "train" / "ant").symlink_to("dog/sub")
    (folder / "val" / "ant").mkdir()
    refused("data/train/ant: is the same folder as data/train/dog/sub; remove one of the two")


def test_a_class_of_links_to_another(folder):
    (folder / "train" / "ant").mkdir()
    (folder / "train" / "ant" / "0.png").symlink_to("../cat/0.png")
    (folder / "val" / "ant").mkdir()
    refused("data/train/ant: holds only links to pictures of other classes; add some")


def test_a_pipe_is_no_picture(folder):
    os.mkfifo(folder / "train" / "cat" / "pipe.png")
    (folder / "train" / "cat" / "link.png").symlink_to("pipe.png")
    result = trained()
    assert TRAINED in result.output and "2 (.png 2)" in result.output


def test_train_and_val_do_not_share_a_cached_list(folder):
    """val/ may lack a class and train/ must not, even where both are one folder."""
    shutil.rmtree(folder / "val")
    (folder / "val").symlink_to("train")
    (folder / "train" / "new").mkdir()
    for place in (folder / "train", *(folder / "train").iterdir()):
        os.utime(place, (1, 1))
    classes = ("cat", "dog", "new", "ship")
    assert len(list_set("data", "val", classes=classes)) == 15
    for _ in range(2):
        with pytest.raises(UserError, match="new: holds no pictures"):
            list_set("data", "train", classes=classes)


def test_weights_without_names_and_a_class_without_validation_pictures(folder):
    """The names are those of train/, where val/ lacks some."""
    assert trained().status == 0
    done = run_script("scripts/export.py", "run", "bare.pth", cwd=".")
    assert done.status == 0, done.error
    shutil.rmtree(folder / "val" / "cat")
    result = call(evaluate.main, "bare.pth", "--data", "data", "--json", "r.json")
    assert json.loads(Path("r.json").read_text())["images"] == 11, result.error
    assert warnings(result.error)[-1].startswith("data/val: has no pictures of 1 of 3 classes (cat)")


def test_two_links_to_one_file_count_once(tmp_path):
    (tmp_path / "store").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "store" / "x.png")
    (tmp_path / "class").mkdir()
    for name in ("1.png", "2.png", "nowhere.png"):
        (tmp_path / "class" / name).symlink_to(tmp_path / "store" / ("no" if "no" in name else "x.png"))
    found = walk([os.fsencode(tmp_path / "class")])
    names = [Path(os.fsdecode(path)).name for path in found.pictures[0]]
    assert names == ["1.png", "nowhere.png"], "a broken link is told when it is read"
    assert [Path(os.fsdecode(path)).name for path, _ in found.repeated] == ["2.png"]


def test_two_classes_that_are_one_folder(folder):
    (folder / "train" / "zebra").symlink_to("cat")
    (folder / "val" / "zebra").mkdir()
    refused("data/train/zebra: is the same folder as data/train/cat; remove one of the two")


def test_validation_on_the_training_folder_is_said(folder):
    shutil.rmtree(folder / "val")
    (folder / "val").symlink_to("train")
    assert warnings(trained().output) == [
        "data/val: is the same folder as train/; the error is that of training pictures"
    ]


def test_pictures_beside_the_classes(folder):
    shutil.copy(folder / "train" / "cat" / "0.png", folder / "train" / "loose.png")
    agree(TRAINED, "data/train: left out are pictures outside class folders: 1 (loose.png)")


# ---------------------------------------------------------------------------- what is missing or too deep


@pytest.mark.parametrize("inner", ["images", "train"])
def test_one_folder_too_many(folder, inner):
    for part in ("train", "val"):
        name = part if inner == "train" else inner
        os.rename(folder / part, folder / "moved")
        (folder / part).mkdir()
        os.rename(folder / "moved", folder / part / name)
    refused(
        f"data/train: has one class, '{inner}', where a classifier needs two; did you mean cat, dog, ship "
        "inside it? Move them up into"
    )


def test_one_folder_too_many_in_val(folder):
    assert trained().status == 0
    os.rename(folder / "val", folder / "moved")
    (folder / "val").mkdir()
    os.rename(folder / "moved", folder / "val" / "images")
    shutil.rmtree("run")
    refused("data/val: class folder 'images' is not in train/; did you mean cat, dog, ship inside it?")
    os.rename(folder / "val", folder / "moved")
    draw_folders(Path("other"), COUNTS)
    assert trained(data="other").status == 0
    os.rename(folder / "moved", folder / "val")
    said = message(call(evaluate.main, "run", "--data", "data"))
    assert "such as 'images'; did you mean cat, dog, ship inside it?" in said


def test_one_class(folder):
    for part in ("train", "val"):
        for name in ("dog", "ship"):
            shutil.rmtree(folder / part / name)
    refused("data/train: has one class, 'cat', where a classifier needs two; put the pictures of each class")


@pytest.mark.parametrize("name", ["valid", "validation", "test", "Val"])
def test_validation_under_another_name(folder, name):
    os.rename(folder / "val", folder / "aside")
    os.rename(folder / "aside", folder / name)
    if name == "Val":
        refused("data.dir data: has no val/; it must hold train/CLASS/*.jpg and val/CLASS/*.jpg")
    else:
        refused(f"has no val/; did you mean {name}/? Rename it, or make a link: ln -s {name} ")


def test_a_folder_above_and_below(folder):
    Path("up").mkdir()
    os.rename(folder, "up/my data")
    os.rename("up", "data")
    refused("has no train/; did you mean --data ")
    assert "/data/my data'?" in message(trained())
    os.rename("data/my data/train", "data/bare")
    said = message(trained(data="data/bare"))
    assert "if cat, dog, ship are classes, divide their pictures between the two" in said
    Path("data.zip").touch()
    assert "is a file; unpack it" in message(trained(data="data.zip"))


def test_a_class_without_validation_pictures(folder):
    """Its folder empty, or not there: a warning, and the error is over the others."""
    for picture in (folder / "val" / "cat").iterdir():
        picture.unlink()
    shutil.rmtree(folder / "val" / "dog")
    agree(
        "folder: 15 training and 6 validation images, 3 classes",
        "data/val: has no pictures of 2 of 3 classes (cat, dog); errors are over the others",
    )
    result = call(evaluate.main, "run", "--per-class", "--json", "result.json")
    rows = {row["class"]: row["images"] for row in json.loads(Path("result.json").read_text())["per_class"]}
    assert result.status == 0 and rows == {"cat": 0, "dog": 0, "ship": 6}
    Path("ships.txt").write_text("ship\n")
    assert warnings(call(evaluate.main, "run", "--classes", "ships.txt").error) == []


def test_a_class_without_training_pictures_is_refused(folder):
    (folder / "train" / "new").mkdir()
    refused("data/train/new: holds no pictures (JPEG, PNG, WebP, GIF, TIFF, BMP, PNM, JPEG 2000, AVIF)")


# ---------------------------------------------------------------------------- names and paths


def test_names_of_any_bytes(folder):
    """Classes and files that are not UTF-8 through training, checkpoint, CSV, JSON and console."""
    strange = b"caf\xe9"
    for part in ("train", "val"):
        place = os.fsencode(folder / part)
        os.rename(place + b"/cat", place + b"/" + strange)
        os.rename(place + b"/" + strange + b"/0.png", place + b"/" + strange + b"/\xff 0.png")
    results = {}
    for name, environment in {
        "utf8": {"LC_ALL": "C.UTF-8"},
        "ascii": {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    }.items():
        run = ["--config", "tiny.yaml", "--data", "data", "--output", name, *settings()]
        Path("tiny.yaml").touch()
        done = run_script("train.py", *run, cwd=".", **environment)
        assert done.status == 0 and "Traceback" not in done.error, done.error
        files = ("--csv", f"{name}.csv", "--json", f"{name}.json")
        done = run_script("evaluate.py", name, *files, cwd=".", **environment)
        assert done.status == 0 and done.error == "", done.error
        assert "15 images" in done.output
        results[name] = load_weights(name)[1].classes, Path(f"{name}.csv").read_bytes()
    assert results["utf8"] == results["ascii"]
    classes, rows = results["utf8"]
    assert classes == (strange.decode("utf-8", "surrogateescape"), "dog", "ship")
    assert b"\n" + strange + b"/\xff 0.png," + strange + b"," in rows
    report = json.loads(Path("utf8.json").read_text())
    assert {row["class"] for row in report["per_class"]} == set(classes)
    assert checked()[0] == 0


def test_paths_hold_in_every_directory(folder, monkeypatch):
    assert trained().status == 0
    config = parse_config(Path("run/config.yaml").read_text(), "config.yaml")
    assert config.data.dir == str(folder)
    (folder.parent / "elsewhere").mkdir()
    monkeypatch.chdir(folder.parent / "elsewhere")
    assert "15 images" in call(evaluate.main, "../run").output
    resumed = call(train.main, "--resume", "../run", "train.epochs=2", "run.device=cpu")
    assert "finished: 2 epochs" in resumed.output, resumed.error


def test_home_folder_in_every_option(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder.parent))
    monkeypatch.chdir("/")
    (folder.parent / "tiny.yaml").touch()
    result = call(
        train.main, "--config=~/tiny.yaml", "data.dir=~/data", "--output=~/run one", *settings(data__dir=None)
    )
    assert result.status == 0, result.error
    assert result.output.rstrip().endswith(f"next: python evaluate.py '{folder.parent}/run one'")
    (folder.parent / "names.txt").write_text("cat\ndog\n")
    result = call(
        evaluate.main,
        *("~/run one", "--data=~/data", "--classes=~/names.txt", "--json=~/r.json", "--csv=~/r.csv"),
    )
    assert result.status == 0 and "9 images" in result.output, result.error
    assert (folder.parent / "r.json").exists() and (folder.parent / "r.csv").exists()
    result = call(predict.main, "~/run one", "~/data/val/cat", "--output=~/p.csv")
    assert result.status == 0 and (folder.parent / "p.csv").exists(), result.error
    again = call(train.main, "--resume=~/run one", "train.epochs=2", "run.device=cpu")
    assert "finished: 2 epochs" in again.output, again.error


# ---------------------------------------------------------------------------- pixels


def saved(image: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, format=kind, **options)
    return file.getvalue()


def test_pixels_without_a_scale_are_refused():
    ramp = np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8)
    with pytest.raises(UserError, match=r"x\.tif: floating-point pixels, which have no scale of their own"):
        decode(saved(Image.fromarray(ramp), "TIFF"), "x.tif")
    integers = Image.fromarray((255 * ramp).astype(np.int32))
    with pytest.raises(UserError, match=r"x\.tif: 32-bit pixels"):
        decode(saved(integers, "TIFF"), "x.tif")
    deep = (65535 * ramp).astype(np.uint16)
    expected = ((deep.astype(np.uint32) + 128) // 257).astype(np.uint8)
    for kind in ("PNG", "TIFF"):
        assert np.array_equal(decode(saved(Image.fromarray(deep), kind), "x")[..., 0], expected)
    assert np.array_equal(decode(saved(Image.fromarray(deep.astype(np.int32)), "PPM"), "x")[..., 0], expected)


def test_transparency_and_several_pictures_are_told(folder):
    """Transparency is dropped, as Pillow's convert("RGB") does; of several pictures the first is taken."""
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 4), np.uint8)
    pixels[..., 3] = 0
    clear = Image.fromarray(pixels, "RGBA")
    assert np.array_equal(decode(saved(clear, "PNG"), "x"), np.asarray(clear.convert("RGB")))
    clear.save(folder / "train" / "cat" / "clear.png")
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
    frames[0].save(folder / "train" / "cat" / "two.gif", save_all=True, append_images=frames[1:])
    assert decode((folder / "train" / "cat" / "two.gif").read_bytes(), "x")[0, 0].tolist() == [255, 0, 0]
    _, report = checked()
    assert report["odd"]["alpha"] == ["train/cat/clear.png"]
    assert report["odd"]["frames"] == ["train/cat/two.gif"]


def test_large_photographs_are_named_and_can_be_allowed(folder):
    for part in ("train", "val"):
        Image.new("RGB", (60, 40)).save(folder / part / "cat" / "large.png")
    said = (
        "has 60x40 = 2,400 pixels, and the limit is 2,000; raise data.max_pixels (of a script, --max-pixels)"
    )
    for changes in ({}, fast()):
        result = trained(data__max_pixels="2000", **changes)
        assert said in message(result)
        shutil.rmtree("run", ignore_errors=True)
    assert trained(data__max_pixels="2400").status == 0
    assert said in message(call(evaluate.main, "run", "--max-pixels", "2000"))
    result = call(predict.main, "run", "data/val/cat", "--max-pixels", "2000")
    assert result.status == 2 and said in result.error
    done = run_script("scripts/check_data.py", "data", "--max-pixels", "2000", cwd=".")
    assert done.status == 1 and said in done.output


# ---------------------------------------------------------------------------- found at the start


@pytest.mark.parametrize("skip", ["false", "true"])
def test_broken_validation_file_is_found_before_the_first_step(folder, skip):
    broken = folder / "val" / "ship" / "5.png"
    broken.write_bytes(broken.read_bytes()[:100])
    said = f"{broken}: cannot be decoded"
    result = trained(**fast(data__skip_broken=skip))
    assert said in message(result)
    assert "step 1/" not in result.output
    assert "step" not in Path("run/metrics.jsonl").read_text()
    assert said in trained("--check", output="check", **fast(data__skip_broken=skip)).output


def test_validation_files_are_tried_once_a_run(folder, monkeypatch):
    """Not again by a run that goes on: it has read them in its first epoch."""
    tried = []
    monkeypatch.setattr(
        "resnext.engine.trainer.read_through", lambda batches, *_: tried.append(batches.images)
    )
    assert trained(**fast()).status == 0 and tried == [15]
    assert call(train.main, "--resume", "run", "train.epochs=2", "run.device=cpu").status == 0
    assert tried == [15]


IMAGENET = {
    "model__stem": "imagenet",
    "model__depth": None,
    "model__stages": "[1,1,1,1]",
    "data__image_size": "32",
    "data__resize": "32",
    "augment__padding": None,
    "data__pipeline": "fast",
    "data__workers": "0",
}


def test_a_last_batch_of_one_image(folder):
    """15 images in batches of 14 leave one, whose last maps are single pixels."""
    changes = IMAGENET | {"train__batch_size": "14"}
    said = (
        "train.batch_size: with 15 training images and batches of 14 the last has 1, and BatchNorm somewhere "
        "a single value per channel (one image, of 1x1 at the end of the network), which has no variance; "
        "choose another, such as train.batch_size=13, or a larger data.image_size"
    )
    result = trained(**changes)
    assert message(result) == said and "step" not in Path("run/metrics.jsonl").read_text()
    check = trained("--check", output="check", **changes)
    assert f"error    {said}" in check.output and check.status == 2
    assert trained(output="b", **(changes | {"train__batch_size": "13"})).status == 0
    assert trained(output="c", **(changes | {"data__image_size": "48", "data__resize": "48"})).status == 0


@pytest.mark.parametrize(
    ("images", "ranks", "keys", "works"),
    [
        (64, 1, "train.batch_size=16", True),
        (65, 1, "train.batch_size=16", False),
        (66, 1, "train.batch_size=16", True),
        (66, 2, "train.batch_size=16", False),  # a single image each
        (68, 2, "train.batch_size=16", True),
        (67, 2, "train.batch_size=16", False),  # two and one
        (66, 1, "train.batch_size=16 train.accumulation_steps=2", False),
        (68, 1, "train.batch_size=16 train.accumulation_steps=2", True),
        (70, 1, "train.batch_size=16 train.bn_group=4", False),  # of four groups two have one image
        (72, 1, "train.batch_size=16 train.bn_group=4", True),
        (65, 1, "train.batch_size=16 data.image_size=64", True),
        (65, 1, "train.batch_size=16 train.frozen_stages=4", True),  # no statistics are taken
        (65, 1, "train.batch_size=16 model.stem=cifar data.pipeline=memory", True),
        (1, 1, "train.batch_size=16", False),
    ],
)
def test_smallest_batches(images, ranks, keys, works):
    """Against BatchNorm itself, for one process: it refuses what is refused here."""
    base = ["data.image_size=32", "model.base_width=1", "model.cardinality=1"]
    config = parse_config("", "test", [*base, *keys.split()])
    problem = None
    try:
        check_last_batch(config, images, ranks)
    except UserError as error:
        problem = str(error)
    assert (problem is None) == works
    if problem and "such as" in problem:
        size = re.search(r"such as (train\.batch_size=\d+)", problem)[1]
        check_last_batch(parse_config("", "test", [*base, *keys.split(), size]), images, ranks)
    if ranks == 1 and images < 100:
        training = build_train_state(config, ("a", "b"), torch.device("cpu"), {})
        training.model.train()
        if config.train.frozen_stages is not None:
            training.model.freeze(config.train.frozen_stages)
        total = (images - 1) % config.train.batch_size + 1
        pixels, labels = torch.randn(total, 3, *[config.data.image_size] * 2), torch.arange(total) % 2
        with contextlib.nullcontext() if works else pytest.raises(ValueError, match="more than 1 value"):
            train_step(training, pixels, labels, 0.01)


# ---------------------------------------------------------------------------- going on


def test_a_longer_cosine_says_where_the_rate_jumps(folder):
    schedule = {"schedule__name": "cosine", "train__epochs": "2", "optimizer__lr": "0.1"}
    assert trained(train__batch_size="5", **schedule).status == 0  # 3 steps an epoch
    resumed = call(train.main, "--resume", "run", "train.epochs=4", "run.device=cpu")
    # cos² at 5/6 of a quarter turn, of the old length; at a half of the new one
    last = 0.1 * np.cos(np.pi / 2 * 5 / 6) ** 2
    assert (
        f"the learning rate jumps from {last:.3g}, of the last step, to 0.05" in resumed.output.splitlines()
    )
    assert "train.epochs 2 → 4" in resumed.output
    same = call(train.main, "--resume", "run", "run.device=cpu", "run.log_interval=7")
    assert "jumps" not in same.output
