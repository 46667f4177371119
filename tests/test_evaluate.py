"""evaluate.py as a user types it, against networks run by hand on pictures cropped by hand."""

import csv
import errno
import json
import math
import os
import shutil
import threading
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import ROOT, call, message, run_python, snapshot, tiny
from PIL import Image
from torchvision.transforms.v2 import functional as tv

import evaluate
import train
from resnext.weights.load import load_weights

CLASSES = [f"n{number:02d}" for number in range(12)]
SETTINGS = {
    "model__stem": "imagenet",
    "model__depth": None,
    "model__stages": "[1, 1, 1, 1]",
    "model__shortcut": None,
    "data__dataset": "folder",
    "data__decoder": "pillow",
    "data__image_size": "32",
    "data__resize": "48",
    "data__workers": "0",
    "data__train_images": None,
    "data__val_images": None,
    "augment__padding": None,
    "augment__jitter": "0",
    "augment__lighting": "0",
    "train__epochs": "6",
    "train__batch_size": "12",
}


@dataclass(frozen=True)
class Trained:
    """A run on twelve classes of drawn pictures of many shapes; look, don't touch."""

    run: Path
    pictures: Path

    @cache  # noqa: B019
    def outputs(self, size: int = 32, resize: int = 48, ten: bool = False) -> tuple[np.ndarray, np.ndarray]:
        """(raw scores summed over the crops, labels) without the program's loader and transforms."""
        model, info = load_weights(self.run)
        config = info.config
        mean, std = (torch.tensor(v).view(3, 1, 1) for v in (config.data.mean, config.data.std))
        outputs, labels = [], []
        for path in self.paths():
            with Image.open(self.pictures / "val" / path) as image:
                pixels = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
            pixels = tv.resize(pixels, [resize], tv.InterpolationMode.BICUBIC, antialias=True)
            _, height, width = pixels.shape
            corners = [(math.ceil((height - size) / 2), math.ceil((width - size) / 2))]
            if ten:
                corners += [(y, x) for y in (0, height - size) for x in (0, width - size)]
            crops = [pixels[:, y : y + size, x : x + size] for y, x in corners]
            # The five crops of the mirrored picture; its centre may be another, by a pixel.
            crops += [pixels.flip(2)[:, y : y + size, x : x + size] for y, x in corners] if ten else []
            with torch.inference_mode():
                outputs.append(model((torch.stack(crops).float() - mean) / std).double().sum(0).numpy())
            labels.append(CLASSES.index(path.split("/")[0]))
        return np.stack(outputs), np.array(labels)

    def paths(self) -> list[str]:
        val = self.pictures / "val"
        return sorted(str(path.relative_to(val)) for path in val.rglob("*.jpg"))


def expected(outputs, labels, crops=1):
    """Counts and loss by sorting and in float64."""
    mean = outputs / crops
    shifted = mean - mean.max(1, keepdims=True)
    losses = np.log(np.exp(shifted).sum(1)) - shifted[np.arange(len(labels)), labels]
    ranks = (outputs > outputs[np.arange(len(labels)), labels][:, None]).sum(1)
    return {
        "images": len(labels),
        "top1_errors": int((ranks >= 1).sum()),
        "top5_errors": int((ranks >= 5).sum()),
        "loss": pytest.approx(losses.mean(), rel=1e-4),
    }


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Trained:
    folder = tmp_path_factory.mktemp("trained")
    generator = np.random.default_rng(0)
    for split, count in (("train", 3), ("val", 4)):
        for name, color in zip(CLASSES, np.random.default_rng(1).integers(60, 196, (12, 3)), strict=True):
            place = folder / "pictures" / split / name
            place.mkdir(parents=True)
            for number in range(count):
                height, width = generator.integers(40, 80, 2)
                blots = generator.normal(color, 50, (height // 8 + 1, width // 8 + 1, 3))
                pixels = blots.repeat(8, 0).repeat(8, 1)[:height, :width].clip(0, 255).astype(np.uint8)
                # The number alone is the name of several pictures, the rest is not.
                Image.fromarray(pixels).save(place / (f"{name}_{number}.jpg" if number else "0.jpg"))
    (folder / "tiny.yaml").touch()
    settings = tiny(**SETTINGS, data__dir=str(folder / "pictures"))
    result = call(train.main, "--config", folder / "tiny.yaml", "--output", folder / "run", *settings)
    assert result.status == 0, result.error
    return Trained(folder / "run", folder / "pictures")


def run(tmp_path, *arguments, told=""):
    """(JSON, rows of the CSV file, console) of an evaluation; `told` are its warnings."""
    files = ("--json", tmp_path / "out.json", "--csv", tmp_path / "out.csv")
    result = call(evaluate.main, *arguments, *files)
    assert result.status == 0, result.error
    assert result.error == told
    with open(tmp_path / "out.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    return json.loads((tmp_path / "out.json").read_text()), rows, result.output


def counts(result):
    return {key: result[key] for key in ("images", "top1_errors", "top5_errors", "loss")}


# ---------------------------------------------------------------------------- the plain call


def test_the_integers_of_the_training_log(trained, tmp_path):
    content = torch.load(trained.run / "checkpoints" / "best.pt", weights_only=True)
    best = content["progress"]["best"]
    result, _, console = run(tmp_path, trained.run)
    assert {key: result[key] for key in best if key != "epoch"} == {
        k: v for k, v in best.items() if k != "epoch"
    }
    assert counts(result) == expected(*trained.outputs())
    assert 0 < result["top5_errors"] < result["top1_errors"] < 48, (
        "the cases below need all kinds of pictures"
    )
    first, second, *_ = console.splitlines()
    assert first == f"{result['checkpoint']}: weights after {result['global_step']} steps; " + (
        "one crop of 32 from 48 pixels, fp32"
    )
    assert second.split("  loss")[0] == (
        f"48 images  top-1 error {result['top1_error']:.3f} ({result['top1_errors']}/48) [%.2f, %.2f]  "
        f"top-5 error {result['top5_error']:.3f} ({result['top5_errors']}/48) [%.2f, %.2f]"
        % (*result["top1_interval"], *result["top5_interval"])
    )


@pytest.mark.parametrize("more", [["--batch-size", "1"], ["--batch-size", "7", "--workers", "1"]])
def test_batches_and_workers_change_nothing(more, trained, tmp_path):
    for options in ([], ["--ten-crop"]):
        plain, rows, _ = run(tmp_path, trained.run, *options)
        result, same_rows, _ = run(tmp_path, trained.run, *options, *more)
        assert {**result, "loss": 0} == {**plain, "loss": 0}
        assert result["loss"] == pytest.approx(plain["loss"], rel=1e-5)
        for row, other in zip(rows, same_rows, strict=True):
            assert {**row, "confidence": 0} == {**other, "confidence": 0}


# ---------------------------------------------------------------------------- crops


def test_ten_crops(trained, tmp_path):
    result, rows, console = run(tmp_path, trained.run, "--ten-crop")
    outputs, labels = trained.outputs(ten=True)
    assert counts(result) == expected(outputs, labels, crops=10)
    assert result["crops"] == 10 and "10 crops of 32 from 48 pixels" in console
    check_rows(rows, outputs / 10, labels, trained.paths(), CLASSES)
    single, _ = trained.outputs()
    assert (single.argmax(1) != outputs.argmax(1)).any(), "the pictures tell the two apart"


@pytest.mark.parametrize(
    ("options", "size", "resize"),
    [
        (["--image-size", "64"], 64, 96),  # 48/32, the run's
        (["--image-size", "64", "--resize", "64"], 64, 64),
        (["--image-size", "33"], 33, 49),
        (["--resize", "36"], 32, 36),
        (["--image-size", "40", "--resize", "41", "--ten-crop"], 40, 41),
    ],
)
def test_image_size(options, size, resize, trained, tmp_path):
    result, _, console = run(tmp_path, trained.run, *options)
    ten = "--ten-crop" in options
    outputs, labels = trained.outputs(size, resize, ten)
    assert counts(result) == expected(outputs, labels, 10 if ten else 1)
    assert (result["image_size"], result["resize"]) == (size, resize)
    assert f"of {size} from {resize} pixels" in console


def test_the_ratio_of_imagenet():
    """320 pixels come from 365 where 224 came from 256."""
    from argparse import Namespace

    from resnext.config import parse_config

    config = parse_config("", "default")
    options = Namespace(
        image_size=320,
        resize=None,
        data=None,
        workers=None,
        precision=None,
        ten_crop=False,
        interpolation=None,
        class_order=None,
        max_pixels=None,
    )
    data = evaluate.adapt(config, options).data
    assert (data.image_size, data.resize) == (320, 365)
    assert parse_config("data: {image_size: 320}", "larger").data.resize == 365


# ---------------------------------------------------------------------------- files of results


def check_rows(rows, outputs, labels, names, classes, key="path"):
    """The CSV file, against scores whose softmax is the confidence."""
    split_batch = np.exp(outputs - outputs.max(1, keepdims=True))
    split_batch /= split_batch.sum(1, keepdims=True)
    assert [row[key] for row in rows] == names
    places = min(5, len(classes))
    assert list(rows[0]) == [
        key,
        "label",
        *(f"top{i}" for i in range(1, places + 1)),
        "confidence",
        "correct",
    ]
    for row, output, share, label in zip(rows, outputs, split_batch, labels, strict=True):
        order = np.argsort(-output, kind="stable")[:places]
        assert [row[f"top{i + 1}"] for i in range(places)] == [classes[c] for c in order]
        assert row["label"] == classes[label]
        assert row["correct"] == str(int(order[0] == label))
        assert float(row["confidence"]) == pytest.approx(share.max(), abs=1e-4)


def test_results_in_full(trained, tmp_path):
    result, rows, console = run(tmp_path, trained.run, "--per-class")
    outputs, labels = trained.outputs()
    first = outputs.argmax(1)
    check_rows(rows, outputs, labels, trained.paths(), CLASSES)
    for c, row in enumerate(result["per_class"]):
        of, taken, right = labels == c, first == c, (labels == c) & (first == c)
        assert row["class"] == CLASSES[c]
        assert (row["images"], row["predicted"], row["top1_errors"]) == (4, taken.sum(), 4 - right.sum())
        assert row["recall"] == 100 * right.sum() / of.sum() == 100 - row["top1_error"]
        assert row["precision"] == pytest.approx(100 * right.sum() / max(1, taken.sum()))
    for key in ("precision", "recall", "f1"):
        mean = np.mean([row[key] for row in result["per_class"]])
        assert result["macro_average"][key] == pytest.approx(mean)
    for key in ("top1_errors", "top5_errors", "images"):
        assert sum(row[key] for row in result["per_class"]) == result[key]
    assert sum(row["images"] for row in result["confusions"]) == result["top1_errors"]
    worst = result["confusions"][0]
    assert worst["images"] == sum(
        CLASSES[a] == worst["true"] and CLASSES[b] == worst["predicted"]
        for a, b in zip(labels, first, strict=True)
    )
    assert f"{worst['true']} -> {worst['predicted']}: {worst['images']}" in console.splitlines()
    table = [line.split() for line in console.splitlines() if line.startswith("n")][:12]
    errors = [int(row[2]) for row in table]
    assert errors == sorted(errors, reverse=True) and sum(errors) == result["top1_errors"]
    assert {row[0] for row in table} == set(CLASSES)


def test_result_files_are_replaced_whole(trained, tmp_path):
    (tmp_path / "out.json").write_text("old " * 10_000)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out.csv").symlink_to(tmp_path / "elsewhere" / "rows.csv")
    run(tmp_path, trained.run)
    assert (tmp_path / "out.csv").is_symlink()
    assert sorted(os.listdir(tmp_path)) == ["elsewhere", "out.csv", "out.json"]
    assert os.listdir(tmp_path / "elsewhere") == ["rows.csv"]


def test_a_full_disk_leaves_what_was_there(trained, tmp_path, monkeypatch):
    (tmp_path / "out.json").write_text("old")

    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    before = snapshot(tmp_path)
    result = call(evaluate.main, trained.run, "--json", tmp_path / "out.json")
    assert "--json" in message(result) and "No space left" in result.error
    assert "48 images" in result.output, "the console has the result all the same"
    assert snapshot(tmp_path) == before


def test_a_pipe_is_written_to(trained, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    received = []
    reader = threading.Thread(target=lambda: received.append((tmp_path / "pipe").read_text()), daemon=True)
    reader.start()
    assert call(evaluate.main, trained.run, "--csv", tmp_path / "pipe").status == 0
    reader.join(timeout=60)
    assert len(received[0].splitlines()) == 49
    assert (tmp_path / "pipe").is_fifo()


def test_a_broken_picture_writes_nothing(trained, tmp_path):
    data = shutil.copytree(trained.pictures, tmp_path / "data")
    (data / "val" / "n07" / "n07_2.jpg").write_bytes(b"\xff\xd8\xff" + b"0" * 100)
    before = snapshot(tmp_path)
    for workers in ("0", "1"):
        files = ("--json", tmp_path / "a.json", "--csv", tmp_path / "a.csv", "--workers", workers)
        text = message(call(evaluate.main, trained.run, "--data", data, *files))
        assert "n07_2.jpg: cannot be decoded" in text
        assert snapshot(tmp_path) == before


# ---------------------------------------------------------------------------- some of the classes


def write(path, *lines):
    path.write_text("".join(line + "\n" for line in lines))
    return path


@pytest.mark.parametrize("options", [[], ["--ten-crop"]])
@pytest.mark.parametrize("chosen", [[8, 1, 3, 10, 7], [4, 11], [6], list(range(11, 0, -1))])
def test_some_classes_compete(chosen, options, trained, tmp_path):
    """What an ImageNet-5K network says among 1,000 classes: all other outputs are masked."""
    file = write(tmp_path / "classes.txt", "# chosen", "", *(f" {CLASSES[c]}  # no {c}" for c in chosen))
    result, rows, console = run(tmp_path, trained.run, "--classes", file, *options)
    outputs, labels = trained.outputs(ten=bool(options))
    crops, columns = (10 if options else 1), sorted(chosen)
    masked = np.full_like(outputs, -1e9)
    masked[:, columns] = outputs[:, columns]
    keep = np.isin(labels, columns)
    assert counts(result) == expected(masked[keep], labels[keep], crops)
    names = [path for path, kept in zip(trained.paths(), keep, strict=True) if kept]
    positions = np.searchsorted(columns, labels[keep])
    check_rows(rows, outputs[keep][:, columns] / crops, positions, names, [CLASSES[c] for c in columns])
    assert (result["classes"], result["network_classes"]) == (len(chosen), 12)
    assert result["classes_file"] == str(file)
    assert f"{len(chosen)} of the network's 12 classes compete, 0 of them without images" in console
    assert f"top-{min(5, len(chosen))} error" in console


def test_data_of_some_classes_and_without_train(trained, tmp_path):
    data = tmp_path / "data"
    for name in CLASSES[2:5]:
        shutil.copytree(trained.pictures / "val" / name, data / "val" / name)
    outputs, labels = trained.outputs()

    def told(absent, names):
        absent = f"{data / 'val'}: has no pictures of {absent} classes ({names})"
        return f"warning: {absent}; errors are over the others\n"

    whole = told("9 of 12", "n00, n01, n05, n06, …")
    result, rows, _ = run(tmp_path, trained.run, "--data", data, told=whole)
    keep = np.isin(labels, [2, 3, 4])
    assert counts(result) == expected(outputs[keep], labels[keep])
    assert {row["label"] for row in rows} == {"n02", "n03", "n04"}
    file = write(tmp_path / "classes.txt", *CLASSES[:4])
    part = told("2 of 4", "n00, n01")
    result, rows, console = run(tmp_path, trained.run, "--data", data, "--classes", file, told=part)
    keep = np.isin(labels, [2, 3])
    assert counts(result) == expected(outputs[keep][:, :4], labels[keep])
    assert {row["label"] for row in rows} == {"n02", "n03"}
    assert "4 of the network's 12 classes compete, 2 of them without images" in console
    absent, *_, present = result["per_class"]
    assert absent["images"] == 0 and absent["top1_error"] is absent["recall"] is absent["f1"] is None
    assert present["images"] == 4
    recalls = [row["recall"] for row in result["per_class"][2:]]
    assert result["macro_average"]["recall"] == pytest.approx(np.mean(recalls))


def test_whole_data_without_train(trained, tmp_path):
    shutil.copytree(trained.pictures / "val", tmp_path / "data" / "val")
    result, _, _ = run(tmp_path, trained.run, "--data", tmp_path / "data")
    assert counts(result) == expected(*trained.outputs())


# ---------------------------------------------------------------------------- splits


def test_splits(trained, tmp_path):
    """By path and by file name, a picture in two splits, one in none, lines of other pictures."""
    paths = trained.paths()
    clean, corrupted, blurred = list(range(20)), list(range(20, 45)), [21, 30, 44]
    file = tmp_path / "splits.csv"
    lines = ["split,quality,path"]
    lines += [f"clean,5,{paths[i]}" for i in clean]
    for i in corrupted:
        base = os.path.basename(paths[i])
        lines.append(f"corrupted,1,{paths[i] if base == '0.jpg' else base}")
    lines += [f"blurred,1,{paths[i]}" for i in blurred]
    lines += ["", 'clean,5,"elsewhere, and not here.jpg"']
    file.write_text("\ufeff" + "\r\n".join(lines), encoding="utf-8")
    result, _, console = run(tmp_path, trained.run, "--splits", file)
    outputs, labels = trained.outputs()
    assert counts(result) == expected(outputs, labels)
    members = {"clean": clean, "corrupted": corrupted, "blurred": blurred}
    assert list(result["splits"]) == list(members)
    for split, numbers in members.items():
        assert counts(result["splits"][split]) == expected(outputs[numbers], labels[numbers])
        assert len(result["splits"][split]["top1_interval"]) == 2
    assert (result["images_in_no_split"], result["unused_split_lines"]) == (3, 1)
    scores = [line for line in console.splitlines() if "  loss " in line]
    assert [line.split()[:2] for line in scores] == [
        ["all", "48"],
        ["clean", "20"],
        ["corrupted", "25"],
        ["blurred", "3"],
    ]
    assert len({line.index("top-1 error") for line in scores}) == 1, "aligned"
    assert f"{file}: images in no split: 3" in console
    assert f"{file}: lines that name no scored image: 1" in console


def test_splits_among_some_classes(trained, tmp_path):
    file = write(
        tmp_path / "splits.csv", "path,split", *(f"{path},s{i % 2}" for i, path in enumerate(trained.paths()))
    )
    classes = write(tmp_path / "classes.txt", *CLASSES[6:])
    result, _, _ = run(tmp_path, trained.run, "--splits", file, "--classes", classes)
    outputs, labels = trained.outputs()
    for split in (0, 1):
        keep = (labels >= 6) & (np.arange(48) % 2 == split)
        assert counts(result["splits"][f"s{split}"]) == expected(outputs[keep][:, 6:], labels[keep] - 6)
    assert (result["images_in_no_split"], result["unused_split_lines"]) == (0, 24)


# ---------------------------------------------------------------------------- sets in memory


def test_two_classes_in_memory(folder_run, tmp_path):
    """Class folders show their rates unasked, and their rows carry paths."""
    splits = write(tmp_path / "splits.csv", "path,split", "cat/0.png,a", "dog/2.png,b")
    result, rows, console = run(tmp_path, folder_run, "--splits", splits)
    assert [row["path"] for row in rows] == [f"{name}/{i}.png" for name in ("cat", "dog") for i in range(3)]
    assert list(rows[0]) == ["path", "label", "top1", "top2", "confidence", "correct"]
    assert result["top5_errors"] == 0 and "top-2 error 0.000" in console
    assert [row["label"] == row["top1"] for row in rows] == [row["correct"] == "1" for row in rows]
    assert {s: row["images"] for s, row in result["splits"].items()} == {"a": 1, "b": 1}
    for name in ("cat", "dog"):
        mine = [row for row in rows if name in (row["label"], row["top1"])]
        right = sum(row["correct"] == "1" for row in mine)
        (row,) = (row for row in result["per_class"] if row["class"] == name)
        assert row["f1"] == pytest.approx(200 * right / (3 + sum(r["top1"] == name for r in mine)))
        assert any(line.split()[:2] == [name, "3"] for line in console.splitlines())
    assert f"accuracy {result['accuracy']:.3f}" in console
    assert result["accuracy"] == pytest.approx(100 - result["top1_error"])


def test_pictures_without_names(finished_run, tmp_path):
    """Drawn digits are known by their numbers, also where some classes are left out."""
    plain, all_rows, console = run(tmp_path, finished_run)
    assert [row["index"] for row in all_rows] == [str(i) for i in range(20)]
    assert "accuracy" not in console, "ten classes that are no folders"
    chosen = sorted({row["label"] for row in all_rows})[:3]
    file = write(tmp_path / "classes.txt", *chosen)
    result, rows, _ = run(tmp_path, finished_run, "--classes", file)
    assert [row["index"] for row in rows] == [row["index"] for row in all_rows if row["label"] in chosen]
    assert result["images"] == len(rows) < plain["images"] == 20
    assert result["resize"] == result["image_size"] == 8


# ---------------------------------------------------------------------------- wrong input

BAD = {
    "crops of a set in memory": (
        ["MEMORY", "--ten-crop"],
        ["--ten-crop: works on files", "leave the option out"],
    ),
    "size of a set in memory": (
        ["MEMORY", "--image-size", "16"],
        ["--image-size: works on files", "8 pixels"],
    ),
    "resize of a set in memory": (["MEMORY", "--resize", "16"], ["--resize: works on files"]),
    "no pixels": (["RUN", "--image-size", "0"], ["--image-size: must be at least 8, not 0"]),
    "too many pixels": (["RUN", "--image-size", "5000"], ["--image-size: must be at most 4096"]),
    "less than the stride": (["RUN", "--image-size", "31"], ["--image-size: 31", "use 32 or more"]),
    "resize below the crop": (["RUN", "--resize", "31"], ["--resize: 31 is less than the crop of 32"]),
    "resize below a new crop": (["RUN", "--image-size", "64", "--resize", "48"], ["48", "crop of 64"]),
    "negative workers": (["RUN", "--workers", "-1"], ["--workers: must be at least 0, not -1"]),
    "the same file twice": (["RUN", "--json", "a", "--csv", "./a"], ["--csv ./a: is --json too", "another"]),
    "result over an input": (["RUN", "--splits", "s", "--csv", "s"], ["--csv s: is --splits too"]),
    "result over the best checkpoint": (
        ["RUN", "--csv", "RUN/checkpoints/best.pt"],
        ["the name of a run file"],
    ),
    "result over the checkpoint": (
        ["RUN/checkpoints/best.pt", "--json", "RUN/checkpoints/best.pt"],
        ["checkpoint"],
    ),
    "result in no folder": (["RUN", "--csv", "nowhere/a.csv"], ["--csv nowhere/a.csv: cannot be written"]),
    "result that is a folder": (["RUN", "--csv", "."], ["--csv .: cannot be written"]),
    "no such classes": (
        ["RUN", "--classes", "nowhere"],
        ["--classes nowhere: cannot be read", "check the path"],
    ),
    "classes that are a folder": (["RUN", "--classes", "RUN"], ["--classes", "cannot be read"]),
    "no classes": (["RUN", "--classes", "file"], ["--classes file: names no class"], "# n01\n\n"),
    "unknown class": (
        ["RUN", "--classes", "file"],
        ["--classes file, line 3: 'n100' is unknown to the network", "did you mean 'n10'?"],
        "n01\n\nn100\n",
    ),
    "class and description": (
        ["RUN", "--classes", "file"],
        ["did you mean 'n03'?"],
        "n03 tench, Tinca tinca\n",
    ),
    "quite another class": (
        ["RUN", "--classes", "file"],
        ["'zebra'", "the first that it knows is 'n00'"],
        "zebra\n",
    ),
    "a class twice": (
        ["RUN", "--classes", "file"],
        ["file, line 3: 'n01' is on line 1 too"],
        "n01\nn02\nn01 # \n",
    ),
    "binary classes": (["RUN", "--classes", "file"], ["file, line 1", "unknown"], b"\xff\xfe\x00n" * 900),
    "no such splits": (["RUN", "--splits", "nowhere"], ["--splits nowhere: cannot be read"]),
    "no splits": (["RUN", "--splits", "file"], ["--splits file: the first line must be path,split"], ""),
    "splits without a header": (
        ["RUN", "--splits", "file"],
        ["must be path,split, not 'a.jpg,clean'"],
        "a.jpg,clean\n",
    ),
    "splits of a header only": (["RUN", "--splits", "file"], ["names no picture"], "path,split\n"),
    "split without a name": (["RUN", "--splits", "file"], ["file, line 2: needs"], "path,split\n0.jpg,\n"),
    "split called all": (
        ["RUN", "--splits", "file"],
        ["line 3", "all is taken"],
        "path,split\na,b\n0.jpg,all\n",
    ),
    "line of one column": (["RUN", "--splits", "file"], ["line 2: too few columns"], "path,split\n0.jpg\n"),
    "open quotation": (
        ["RUN", "--splits", "file"],
        ["--splits file, line", "write path,split"],
        'path,split\n"0.jpg\n',
    ),
    "exchanged columns": (
        ["RUN", "--splits", "file"],
        ["more than 50 splits", "exchanged"],
        "split,path\n" + "".join(f"{i}.jpg,clean\n" for i in range(51)),
    ),
    "several of this name": (
        ["RUN", "--splits", "file"],
        ["line 3: there are several '0.jpg'", "CLASS/NAME"],
        "path,split\nn01_1.jpg,a\n0.jpg,b\n",
    ),
    "a picture twice": (
        ["RUN", "--splits", "file"],
        ["line 4: 'n01_1.jpg' is in 'a' since line 2", "keep one"],
        "path,split\nn01/n01_1.jpg,a\nn01/n01_1.jpg,b\nn01_1.jpg,a\n",
    ),
    "other pictures": (
        ["RUN", "--splits", "file"],
        ["none of its 2 pictures, such as 'x.jpg', is scored", "such as 'n00/0.jpg'"],
        "path,split\nx.jpg,a\nval/n01/n01_1.jpg,b\n",
    ),
    "data of other classes": (
        ["RUN", "--data", "other"],
        ["--data other: its classes (2)", "trained on (12), such as 'zebra'", "give the data of the run"],
    ),
    "some classes of other data": (
        ["RUN", "--data", "other", "--classes", "file"],
        ["such as 'zebra'"],
        "n01\n",
    ),
    "data without val": (["RUN", "--data", "empty"], ["data.dir empty: has no val/"]),
    "no data": (["RUN", "--data", "nowhere"], ["nowhere: no such folder", "--data DIR"]),
    "val without folders": (["RUN", "--data", "flat"], ["flat/val: holds pictures outside class folders"]),
    "no picture of the classes": (
        ["RUN", "--data", "partial", "--classes", "file"],
        ["--classes file: the data has no picture of these classes"],
        "n05\nn06\n",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_wrong_input(name, trained, finished_run, tmp_path, monkeypatch):
    arguments, fragments, *content = BAD[name]
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "s", "path,split", "n01/n01_1.jpg,a")
    for text in content:
        (tmp_path / "file").write_bytes(text.encode() if isinstance(text, str) else text)
    for folder in ("other/val/zebra", "other/val/n01", "empty", "flat/val", "partial/val/n01"):
        (tmp_path / folder).mkdir(parents=True)
    for place in ("flat/val", "partial/val/n01"):
        shutil.copy(trained.pictures / "val" / "n01" / "n01_1.jpg", tmp_path / place)
    os.symlink(trained.run, "RUN")
    os.symlink(finished_run, "MEMORY")
    results = [] if {"--json", "--csv"} & set(arguments) else ["--json", "out.json", "--csv", "out.csv"]
    before = snapshot(tmp_path, folders=True), snapshot(trained.run)
    result = call(evaluate.main, *arguments, *results)
    text = message(result)
    for fragment in fragments:
        assert fragment in text, text
    assert result.output == ""
    assert (snapshot(tmp_path, folders=True), snapshot(trained.run)) == before


def test_what_is_wrong_at_once_costs_no_torch(tmp_path):
    (tmp_path / "classes.txt").write_text("# none\n")
    code = (
        "import sys; sys.argv[1:] = ['.', '--classes', 'classes.txt']\nimport evaluate\n"
        "try: evaluate.main()\nexcept Exception as error: print(error, 'torch' in sys.modules)"
    )
    result = run_python("-c", code, cwd=tmp_path, PYTHONPATH=str(ROOT))
    assert result.output == "--classes classes.txt: names no class; write one name a line False\n"
