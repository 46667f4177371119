"""evaluate.py as a user types it, against networks run by hand on images cropped by hand."""

import csv
import errno
import json
import math
import os
import shutil
import sys
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
from data.evaluation import evaluation_data
from resnext.config import parse_config
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
    """A run on twelve classes of drawn images of many shapes; do not modify."""

    run: Path
    images: Path

    @cache  # noqa: B019
    def outputs(self, size: int = 32, resize: int = 48, ten: bool = False) -> tuple[np.ndarray, np.ndarray]:
        """(logits summed over the crops, labels) without the program's loader and transforms."""
        model, info = load_weights(self.run)
        mean, std = (torch.tensor(v).view(3, 1, 1) for v in (info.config.data.mean, info.config.data.std))
        outputs, labels = [], []
        for path in self.paths():
            with Image.open(self.images / "val" / path) as image:
                pixels = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
            pixels = tv.resize(pixels, [resize], tv.InterpolationMode.BICUBIC, antialias=True)
            _, height, width = pixels.shape
            corners = [(math.ceil((height - size) / 2), math.ceil((width - size) / 2))]
            if ten:
                corners += [(y, x) for y in (0, height - size) for x in (0, width - size)]
            crops = [pixels[:, y : y + size, x : x + size] for y, x in corners]
            # The five crops of the mirrored image; its center may be another, by a pixel.
            crops += [pixels.flip(2)[:, y : y + size, x : x + size] for y, x in corners] if ten else []
            with torch.inference_mode():
                outputs.append(model((torch.stack(crops).float() - mean) / std).double().sum(0).numpy())
            labels.append(CLASSES.index(path.split("/")[0]))
        return np.stack(outputs), np.array(labels)

    def paths(self) -> list[str]:
        val = self.images / "val"
        return sorted(str(path.relative_to(val)) for path in val.rglob("*.jpg"))


def expected(outputs, labels, crops=1):
    """Counts by sorting, and the loss in float64."""
    mean = outputs / crops
    shifted = mean - mean.max(1, keepdims=True)
    losses = np.log(np.exp(shifted).sum(1)) - shifted[np.arange(len(labels)), labels]
    ranks = (outputs > outputs[np.arange(len(labels)), labels][:, None]).sum(1)
    loss = pytest.approx(losses.mean(), rel=1e-4)
    return len(labels), int((ranks >= 1).sum()), int((ranks >= 5).sum()), loss


def counts(result):
    return tuple(result[key] for key in ("images", "top1_errors", "top5_errors", "loss"))


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Trained:
    folder = tmp_path_factory.mktemp("trained")
    generator = np.random.default_rng(0)
    for split, count in (("train", 3), ("val", 4)):
        for name, color in zip(CLASSES, np.random.default_rng(1).integers(60, 196, (12, 3)), strict=True):
            place = folder / "images" / split / name
            place.mkdir(parents=True)
            for number in range(count):
                height, width = generator.integers(40, 80, 2)
                blots = generator.normal(color, 50, (height // 8 + 1, width // 8 + 1, 3))
                pixels = blots.repeat(8, 0).repeat(8, 1)[:height, :width].clip(0, 255).astype(np.uint8)
                # The name 0.jpg is that of several images, the others are unique.
                Image.fromarray(pixels).save(place / (f"{name}_{number}.jpg" if number else "0.jpg"))
    (folder / "tiny.yaml").touch()
    settings = tiny(**SETTINGS, data__dir=str(folder / "images"))
    result = call(train.main, "--config", folder / "tiny.yaml", "--output", folder / "run", *settings)
    assert result.status == 0, result.error
    return Trained(folder / "run", folder / "images")


def run(tmp_path, *arguments, warning=""):
    """Return (JSON, CSV rows, console) of an evaluation with one warning that has these words, or none."""
    files = ("--json", tmp_path / "out.json", "--csv", tmp_path / "out.csv")
    result = call(evaluate.main, *arguments, *files)
    assert result.status == 0, result.error
    assert len(result.error.splitlines()) == bool(warning) and warning in result.error
    with open(tmp_path / "out.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    return json.loads((tmp_path / "out.json").read_text()), rows, result.output


def check_rows(rows, outputs, labels, names, classes):
    """Compare the CSV file with logits whose softmax is the confidence."""
    shares = np.exp(outputs - outputs.max(1, keepdims=True))
    shares /= shares.sum(1, keepdims=True)
    places = [f"top{place}" for place in range(1, min(5, len(classes)) + 1)]
    assert list(rows[0]) == ["path", "label", *places, "confidence", "correct"]
    assert [row["path"] for row in rows] == names
    for row, output, share, label in zip(rows, outputs, shares, labels, strict=True):
        order = np.argsort(-output, kind="stable")[: len(places)]
        assert [row[place] for place in places] == [classes[c] for c in order]
        assert (row["label"], row["correct"]) == (classes[label], str(int(order[0] == label)))
        assert float(row["confidence"]) == pytest.approx(share.max(), abs=1e-4)


# ---------------------------------------------------------------------------- counts, crops, sizes


def test_counts_are_those_of_the_training_log(trained, tmp_path):
    content = torch.load(trained.run / "checkpoints" / "best.pt", weights_only=True)
    best = {key: value for key, value in content["progress"]["best"].items() if key != "epoch"}
    result, _, console = run(tmp_path, trained.run)
    assert {key: result[key] for key in best} == best
    assert counts(result) == expected(*trained.outputs())
    assert 0 < result["top5_errors"] < result["top1_errors"] < 48, "the tests need all kinds of images"
    first, second, *_ = console.splitlines()
    view = "one crop of 32 from 48 pixels, fp32"
    assert first == f"{result['checkpoint']}: weights after {result['global_step']} steps; {view}"
    assert second.split("  loss")[0] == (
        f"48 images  top-1 error {result['top1_error']:.3f} ({result['top1_errors']}/48) [%.2f, %.2f]  "
        f"top-5 error {result['top5_error']:.3f} ({result['top5_errors']}/48) [%.2f, %.2f]"
        % (*result["top1_interval"], *result["top5_interval"])
    )


@pytest.mark.parametrize("crops", [[], ["--ten-crop"]])
def test_batches_and_workers_change_nothing(crops, trained, tmp_path):
    plain, rows, _ = run(tmp_path, trained.run, *crops)
    for more in (["--batch-size", "1"], ["--batch-size", "7", "--workers", "1"]):
        result, same_rows, _ = run(tmp_path, trained.run, *crops, *more)
        assert {**result, "loss": 0} == {**plain, "loss": 0}
        assert result["loss"] == pytest.approx(plain["loss"], rel=1e-5)
        for row, other in zip(rows, same_rows, strict=True):
            assert {**row, "confidence": 0} == {**other, "confidence": 0}


@pytest.mark.parametrize(
    ("options", "size", "resize"),
    [
        (["--ten-crop"], 32, 48),
        (["--image-size", "64"], 64, 96),  # 48/32, the run's
        (["--image-size", "64", "--resize", "64"], 64, 64),
        (["--image-size", "33"], 33, 49),
        (["--resize", "36"], 32, 36),
        (["--image-size", "40", "--resize", "41", "--ten-crop"], 40, 41),
    ],
)
def test_crops_and_sizes(options, size, resize, trained, tmp_path):
    result, rows, console = run(tmp_path, trained.run, *options)
    crops = 10 if "--ten-crop" in options else 1
    outputs, labels = trained.outputs(size, resize, crops == 10)
    assert counts(result) == expected(outputs, labels, crops)
    assert (result["image_size"], result["resize"], result["crops"]) == (size, resize, crops)
    assert f"{'10 crops' if crops == 10 else 'one crop'} of {size} from {resize} pixels" in console
    check_rows(rows, outputs / crops, labels, trained.paths(), CLASSES)
    assert (trained.outputs()[0].argmax(1) != outputs.argmax(1)).any(), "the images tell the two apart"


def test_ratio_of_imagenet(monkeypatch):
    """320 pixels come from 365 as 224 come from 256."""
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "RUN", "--image-size", "320"])
    data = evaluation_data(parse_config("", "default"), True, evaluate.parse_arguments())
    assert (data.image_size, data.resize) == (320, 365)
    assert parse_config("data: {image_size: 320}", "larger").data.resize == 365


# ---------------------------------------------------------------------------- files of results


def test_all_results(trained, tmp_path):
    result, rows, console = run(tmp_path, trained.run, "--per-class")
    outputs, labels = trained.outputs()
    first = outputs.argmax(1)
    check_rows(rows, outputs, labels, trained.paths(), CLASSES)
    for c, row in enumerate(result["per_class"]):
        predicted, correct = (first == c).sum(), ((labels == c) & (first == c)).sum()
        assert row["class"] == CLASSES[c]
        assert (row["images"], row["predicted"], row["top1_errors"]) == (4, predicted, 4 - correct)
        assert row["recall"] == 100 * correct / 4 == 100 - row["top1_error"]
        assert row["precision"] == pytest.approx(100 * correct / max(1, predicted))
    for key in ("precision", "recall", "f1"):
        mean = np.mean([row[key] for row in result["per_class"]])
        assert result["macro_average"][key] == pytest.approx(mean)
    for key in ("top1_errors", "top5_errors", "images"):
        assert sum(row[key] for row in result["per_class"]) == result[key]
    assert sum(row["images"] for row in result["confusions"]) == result["top1_errors"]
    worst = result["confusions"][0]
    pairs = [(CLASSES[a], CLASSES[b]) for a, b in zip(labels, first, strict=True)]
    assert worst["images"] == pairs.count((worst["true"], worst["predicted"]))
    assert f"{worst['true']} -> {worst['predicted']}: {worst['images']}" in console.splitlines()
    table = [line.split() for line in console.splitlines() if line.startswith("n")][:12]
    errors = [int(row[2]) for row in table]
    assert errors == sorted(errors, reverse=True) and sum(errors) == result["top1_errors"]
    assert {row[0] for row in table} == set(CLASSES)


def test_result_files_are_replaced(trained, tmp_path):
    (tmp_path / "out.json").write_text("old " * 10_000)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out.csv").symlink_to(tmp_path / "elsewhere" / "rows.csv")
    run(tmp_path, trained.run)
    assert (tmp_path / "out.csv").is_symlink()
    assert sorted(os.listdir(tmp_path)) == ["elsewhere", "out.csv", "out.json"]
    assert os.listdir(tmp_path / "elsewhere") == ["rows.csv"]


def test_full_disk_leaves_the_old_file(trained, tmp_path, monkeypatch):
    (tmp_path / "out.json").write_text("old")

    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    before = snapshot(tmp_path)
    result = call(evaluate.main, trained.run, "--json", tmp_path / "out.json")
    assert "--json" in message(result) and "No space left" in result.error
    assert "48 images" in result.output, "the console has the result all the same"
    assert snapshot(tmp_path) == before


def test_pipe_is_written_to(trained, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    received = []
    reader = threading.Thread(target=lambda: received.append((tmp_path / "pipe").read_text()), daemon=True)
    reader.start()
    assert call(evaluate.main, trained.run, "--csv", tmp_path / "pipe").status == 0
    reader.join(timeout=60)
    assert len(received[0].splitlines()) == 49
    assert (tmp_path / "pipe").is_fifo()


def test_broken_image_writes_nothing(trained, tmp_path):
    data = shutil.copytree(trained.images, tmp_path / "data")
    (data / "val" / "n07" / "n07_2.jpg").write_bytes(b"\xff\xd8\xff" + b"0" * 100)
    before = snapshot(tmp_path)
    for workers in ("0", "1"):
        files = ("--json", tmp_path / "a.json", "--csv", tmp_path / "a.csv", "--workers", workers)
        text = message(call(evaluate.main, trained.run, "--data", data, *files))
        assert "n07_2.jpg: cannot be decoded" in text
        assert snapshot(tmp_path) == before


# ---------------------------------------------------------------------------- classes and splits


def write(path, *lines):
    path.write_text("".join(line + "\n" for line in lines))
    return path


@pytest.mark.parametrize(
    ("chosen", "options"),
    [([8, 1, 3, 10, 7], []), ([8, 1, 3, 10, 7], ["--ten-crop"]), ([6], []), (list(range(11, 0, -1)), [])],
)
def test_only_the_named_classes_compete(chosen, options, trained, tmp_path):
    """As for an ImageNet-5K network scored among 1,000 classes: all other outputs are masked."""
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
        shutil.copytree(trained.images / "val" / name, data / "val" / name)
    outputs, labels = trained.outputs()
    warning = "9 of 12 classes (n00, n01, n05, n06, …)"
    result, rows, _ = run(tmp_path, trained.run, "--data", data, warning=warning)
    keep = np.isin(labels, [2, 3, 4])
    assert counts(result) == expected(outputs[keep], labels[keep])
    assert {row["label"] for row in rows} == {"n02", "n03", "n04"}
    chosen = ("--classes", write(tmp_path / "classes.txt", *CLASSES[:4]))
    warning = "2 of 4 classes (n00, n01)"
    result, rows, console = run(tmp_path, trained.run, "--data", data, *chosen, warning=warning)
    keep = np.isin(labels, [2, 3])
    assert counts(result) == expected(outputs[keep][:, :4], labels[keep])
    assert {row["label"] for row in rows} == {"n02", "n03"}
    assert "4 of the network's 12 classes compete, 2 of them without images" in console
    empty, *_, present = result["per_class"]
    assert empty["images"] == 0 and empty["top1_error"] is empty["recall"] is empty["f1"] is None
    assert present["images"] == 4
    recalls = [row["recall"] for row in result["per_class"][2:]]
    assert result["macro_average"]["recall"] == pytest.approx(np.mean(recalls))


def test_splits(trained, tmp_path):
    """By path and by file name; an image in two splits, three in none, a line of another image."""
    paths = trained.paths()
    members = {"clean": list(range(20)), "corrupted": list(range(20, 45)), "blurred": [21, 30, 44]}
    lines = ["split,quality,path"]
    for split, images in members.items():
        bases = {i: os.path.basename(paths[i]) for i in images if split == "corrupted"}
        lines += [f"{split},5,{paths[i] if bases.get(i, '0.jpg') == '0.jpg' else bases[i]}" for i in images]
    lines += ["", 'clean,5,"elsewhere, and not here.jpg"']
    file = tmp_path / "splits.csv"
    file.write_text("\ufeff" + "\r\n".join(lines), encoding="utf-8")
    result, _, console = run(tmp_path, trained.run, "--splits", file)
    outputs, labels = trained.outputs()
    assert counts(result) == expected(outputs, labels)
    assert list(result["splits"]) == list(members)
    for split, images in members.items():
        assert counts(result["splits"][split]) == expected(outputs[images], labels[images])
        assert len(result["splits"][split]["top1_interval"]) == 2
    assert (result["images_in_no_split"], result["unused_split_lines"]) == (3, 1)
    scores = [line for line in console.splitlines() if "  loss " in line]
    titles = [["all", "48"], ["clean", "20"], ["corrupted", "25"], ["blurred", "3"]]
    assert [line.split()[:2] for line in scores] == titles
    assert len({line.index("top-1 error") for line in scores}) == 1, "aligned"
    assert f"{file}: images in no split: 3" in console
    assert f"{file}: lines that name no scored image: 1" in console


def test_splits_among_some_classes(trained, tmp_path):
    lines = (f"{path},s{i % 2}" for i, path in enumerate(trained.paths()))
    file = write(tmp_path / "splits.csv", "path,split", *lines)
    classes = write(tmp_path / "classes.txt", *CLASSES[6:])
    result, _, _ = run(tmp_path, trained.run, "--splits", file, "--classes", classes)
    outputs, labels = trained.outputs()
    for split in (0, 1):
        keep = (labels >= 6) & (np.arange(48) % 2 == split)
        assert counts(result["splits"][f"s{split}"]) == expected(outputs[keep][:, 6:], labels[keep] - 6)
    assert (result["images_in_no_split"], result["unused_split_lines"]) == (0, 24)


# ---------------------------------------------------------------------------- datasets in memory


def test_two_classes_in_memory(folder_run, tmp_path):
    """Class folders show their rates without --per-class, and their rows have paths."""
    splits = write(tmp_path / "splits.csv", "path,split", "cat/0.png,a", "dog/2.png,b")
    result, rows, console = run(tmp_path, folder_run, "--splits", splits)
    assert [row["path"] for row in rows] == [f"{name}/{i}.png" for name in ("cat", "dog") for i in range(3)]
    assert list(rows[0]) == ["path", "label", "top1", "top2", "confidence", "correct"]
    assert result["top5_errors"] == 0 and "top-2 error 0.000" in console
    assert [row["label"] == row["top1"] for row in rows] == [row["correct"] == "1" for row in rows]
    assert {s: row["images"] for s, row in result["splits"].items()} == {"a": 1, "b": 1}
    for name in ("cat", "dog"):
        mine = [row for row in rows if name in (row["label"], row["top1"])]
        correct = sum(row["correct"] == "1" for row in mine)
        (row,) = (row for row in result["per_class"] if row["class"] == name)
        assert row["f1"] == pytest.approx(200 * correct / (3 + sum(r["top1"] == name for r in mine)))
        assert any(line.split()[:2] == [name, "3"] for line in console.splitlines())
    assert f"accuracy {result['accuracy']:.3f}%" in console
    assert result["accuracy"] == pytest.approx(100 - result["top1_error"])


def test_images_without_names(finished_run, tmp_path):
    """Drawn digits have their indices as names, also if only some classes are scored."""
    plain, all_rows, console = run(tmp_path, finished_run)
    assert [row["index"] for row in all_rows] == [str(i) for i in range(20)]
    assert "accuracy" not in console, "ten classes that are not folders"
    chosen = sorted({row["label"] for row in all_rows})[:3]
    result, rows, _ = run(tmp_path, finished_run, "--classes", write(tmp_path / "classes.txt", *chosen))
    assert [row["index"] for row in rows] == [row["index"] for row in all_rows if row["label"] in chosen]
    assert result["images"] == len(rows) < plain["images"] == 20
    assert result["resize"] == result["image_size"] == 8


# ---------------------------------------------------------------------------- wrong input

BAD_ARGUMENTS = {
    "MEMORY --ten-crop": "--ten-crop: works on files",
    "MEMORY --image-size 16": "--image-size: works on files",
    "MEMORY --resize 16": "--resize: works on files",
    "MEMORY --data other": "--data other: this run draws its images",
    "RUN --image-size 0": "--image-size: must be from 8 to 4096 (got 0)",
    "RUN --image-size 5000": "--image-size: must be from 8 to 4096 (got 5000)",
    "RUN --image-size 31": "--image-size: 31 is less than the network's stride",
    "RUN --resize 31": "--resize: 31 is less than the crop of 32",
    "RUN --image-size 64 --resize 48": "--resize: 48 is less than the crop of 64",
    "RUN --workers -1": "--workers: must be from 0 to 256 (got -1)",
    "RUN --json a --csv ./a": "--csv ./a: is also --json",
    "RUN --splits s --csv s": "--csv s: is also an input",
    "RUN --csv RUN/checkpoints/best.pt": "--csv RUN/checkpoints/best.pt: ",
    "RUN/checkpoints/best.pt --json RUN/checkpoints/best.pt": "--json RUN/checkpoints/best.pt: ",
    "RUN --csv nowhere/a.csv": "--csv nowhere/a.csv: cannot be written",
    "RUN --csv .": "--csv .: cannot be written",
    "RUN --classes nowhere": "--classes nowhere: cannot be read",
    "RUN --classes RUN": "'checkpoints' is unknown",
    "RUN --splits nowhere": "--splits nowhere: cannot be read",
    "RUN --data other": "--data other: its classes (2)",
    "MEMORY --val-list s": "--val-list: names image files, and this run reads glyphs",
    "RUN --data empty": "data.dir empty: has no val/",
    "RUN --data nowhere": "nowhere: no such folder",
    "RUN --data flat": "outside class folders",
}
BAD_FILES = [  # option, content of the file, message
    ("--classes", b"# n01\n\n", "--classes file: names no class"),
    ("--classes", b"n01\n\nn100\n", "--classes file, line 3: 'n100' is unknown to the network; did you mean"),
    ("--classes", b"n03 tench, Tinca tinca\n", "did you mean 'n03'?"),
    ("--classes", b"zebra\n", "'zebra' is unknown to the network"),
    ("--classes", b"n01\nn02\nn01 # \n", "--classes file, line 3: 'n01' is"),
    ("--classes", b"\xff\xfe\x00n" * 900, "file, line 1"),
    ("--splits", b"", "--splits file: the first line must be path,split"),
    ("--splits", b"a.jpg,clean\n", "the first line must be path,split"),
    ("--splits", b"path,split\n", "write a line path,split for each"),
    ("--splits", b"path,split\n0.jpg,\n", "file, line 2: needs"),
    ("--splits", b"path,split\na,b\n0.jpg,all\n", "file, line 3: needs"),
    ("--splits", b"path,split\n0.jpg\n", "--splits file, line 2: "),
    ("--splits", b'path,split\n"0.jpg\n', "write path,split"),
    ("--splits", b"split,path\n" + b"".join(b"%d.jpg,clean\n" % i for i in range(51)), "more than 50 splits"),
    ("--splits", b"path,split\nn01_1.jpg,a\n0.jpg,b\n", "below val/, CLASS/NAME"),
    ("--splits", b"path,split\nn01/n01_1.jpg,a\nn01/n01_1.jpg,b\nn01_1.jpg,a\n", "--splits file, line 4: "),
    ("--splits", b"path,split\nx.jpg,a\nval/n01/n01_1.jpg,b\n", "--splits file: none of its 2 "),
    ("--data other --classes", b"n01\n", "such as 'zebra'"),
    ("--data partial --classes", b"n05\nn06\n", "--classes file: the data has no "),
]


@pytest.mark.parametrize(
    ("line", "content", "fragment"),
    [(line, b"", fragment) for line, fragment in BAD_ARGUMENTS.items()]
    + [(f"RUN {option} file", content, fragment) for option, content, fragment in BAD_FILES],
)
def test_wrong_input(line, content, fragment, trained, finished_run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "s", "path,split", "n01/n01_1.jpg,a")
    (tmp_path / "file").write_bytes(content)
    for folder in ("other/val/zebra", "other/val/n01", "empty", "flat/val", "partial/val/n01"):
        (tmp_path / folder).mkdir(parents=True)
    for place in ("flat/val", "partial/val/n01"):
        shutil.copy(trained.images / "val" / "n01" / "n01_1.jpg", tmp_path / place)
    os.symlink(trained.run, "RUN")
    os.symlink(finished_run, "MEMORY")
    arguments = line.split()
    results = [] if {"--json", "--csv"} & set(arguments) else ["--json", "out.json", "--csv", "out.csv"]
    before = snapshot(tmp_path, folders=True), snapshot(trained.run)
    result = call(evaluate.main, *arguments, *results)
    assert fragment in message(result)
    assert result.output == ""
    assert (snapshot(tmp_path, folders=True), snapshot(trained.run)) == before


def test_early_errors_come_without_torch(tmp_path):
    (tmp_path / "classes.txt").write_text("# none\n")
    code = (
        "import sys; sys.argv[1:] = ['.', '--classes', 'classes.txt']\nimport evaluate\n"
        "try: evaluate.main()\nexcept Exception as error: print(error, 'torch' in sys.modules)"
    )
    result = run_python("-c", code, cwd=tmp_path, PYTHONPATH=str(ROOT))
    assert result.output.startswith("--classes classes.txt: names no class; ")
    assert result.output.endswith(" False\n")
