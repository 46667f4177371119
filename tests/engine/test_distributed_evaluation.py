"""Evaluation on several ranks: the same integers and the same files as on one."""

import csv
import json
import re
import shutil
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from commands import ROOT, call
from rank_runs import on_files, settings, settings_of
from run_files import rows
from torchrun import Processes, Torchrun

import evaluate


@pytest.fixture(scope="module")
def parts(images, tmp_path_factory) -> dict[str, list[object]]:
    """Options of evaluate.py that choose images and classes."""
    folder = tmp_path_factory.mktemp("parts")
    (folder / "classes.txt").write_text("cow\nant\n")
    names = sorted(str(path.relative_to(images / "val")) for path in (images / "val").rglob("*.jpg"))
    lines = [f"{name},{'odd' if number % 3 else 'even'}\n" for number, name in enumerate(names[:-5])]
    (folder / "splits.csv").write_text("path,split\n" + "".join(lines) + f"{names[0]},first\n")
    return {"classes": ["--classes", folder / "classes.txt"], "splits": ["--splits", folder / "splits.csv"]}


class Evaluations:
    """Evaluations with the same options on several ranks; all results are equal, except for rounding."""

    def __init__(self, processes: Processes, folder: Path, *arguments: object):
        self.processes, self.folder = processes, folder
        files = ("--json", folder / "all.json", "--csv", folder / "rows.csv")
        self.arguments = [*arguments, "--device", "cpu", *files]
        result = call(evaluate.main, *self.arguments)
        assert result.status == 0, result.error
        self.console = result.output
        self.json, self.csv = self.read()

    def read(self) -> tuple[dict[str, Any], list[dict[str, str]]]:
        """Return what was written, and remove the files."""
        with open(self.folder / "rows.csv", newline="") as file:
            table = list(csv.DictReader(file))
        result = json.loads((self.folder / "all.json").read_text())
        for name in ("all.json", "rows.csv"):
            (self.folder / name).unlink()
        return result, table

    def check(self, ranks: int, *more: object) -> None:
        """Evaluate on several ranks, of which only rank 0 prints something."""
        ended = self.processes.run(ranks, "evaluate", *self.arguments, *more).finished()
        self.check_results(ended.outputs[0])
        assert not any(ended.outputs[1:])

    def check_results(self, console: str) -> None:
        result, table = self.read()
        assert_same_results(result, self.json)
        assert_same_results(table, self.csv)
        # Printed losses are rounded; one may be rounded to the other side.
        assert re.sub(r"loss [0-9.]+", "loss", console) == re.sub(r"loss [0-9.]+", "loss", self.console)


def assert_same_results(ours: Any, theirs: Any, where: str = "") -> None:
    if isinstance(theirs, dict):
        assert list(ours) == list(theirs), where
        for key in theirs:
            assert_same_results(ours[key], theirs[key], f"{where}/{key}")
    elif isinstance(theirs, list):
        assert len(ours) == len(theirs), where
        for number, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            assert_same_results(a, b, f"{where}/{number}")
    elif where.rsplit("/", 1)[-1] in ("loss", "confidence"):
        assert float(ours) == pytest.approx(float(theirs), rel=0, abs=1e-5), where
    else:
        assert ours == theirs and type(ours) is type(theirs), where


def test_evaluation_of_a_set_in_memory(processes, runs, tmp_path):
    run = runs.whole(2, settings())
    ours = Evaluations(processes, tmp_path, run, "--per-class")
    assert ours.json["images"] == len(ours.csv) == 101
    assert [row["index"] for row in ours.csv] == [str(number) for number in range(101)]
    assert ours.json["top1_error"] == rows(run)[-1]["best_top1_error"]
    ours.check(2, "--batch-size", 1)
    ours.check(3, "--batch-size", 34)


@pytest.fixture(scope="module")
def files_run(runs, images) -> Path:
    """A run on JPEG files in class folders."""
    return runs.whole(2, on_files(images))


def test_evaluation_of_files(processes, files_run, parts, tmp_path):
    """On one process without workers, on several with some."""
    ours = Evaluations(processes, tmp_path, files_run, *parts["splits"], "--per-class", "--workers", 0)
    assert ours.json["images"] == len(ours.csv) == 101
    counts = {name: split["images"] for name, split in ours.json["splits"].items()}
    assert counts == {"even": 32, "odd": 64, "first": 1}
    names = [row["path"] for row in ours.csv]
    assert names == sorted(names) and len(set(names)) == 101
    ours.check(2, "--batch-size", 7, "--workers", 2)
    ours.check(3, "--batch-size", 50, "--workers", 1)


def test_evaluation_of_ten_crops_among_some_classes_under_torchrun(processes, files_run, parts, tmp_path):
    options = [files_run, *parts["splits"], *parts["classes"], "--ten-crop", "--per-class", "--workers", 0]
    ours = Evaluations(processes, tmp_path, *options)
    assert ours.json["images"] == len(ours.csv) == 68 and ours.json["crops"] == 10
    ours.check(3, "--batch-size", 9)
    with Torchrun(tmp_path, 2, ROOT / "evaluate.py", *ours.arguments, keep_status=False) as job:
        assert job.wait() == 0, job.error
        ours.check_results(job.output)


def test_more_ranks_than_images(processes, files_run, images, parts, tmp_path):
    for name in ("ant", "cow"):
        (tmp_path / "few" / "val" / name).mkdir(parents=True)
        shutil.copy(images / "val" / name / "3.jpg", tmp_path / "few" / "val" / name)
    options = ["--data", tmp_path / "few", *parts["classes"], "--ten-crop", "--workers", 0]
    ours = Evaluations(processes, tmp_path, files_run, *options)
    assert ours.json["images"] == 2
    ours.check(3)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("crops", [[], ["--ten-crop"]], ids=["1", "10"])
@pytest.mark.parametrize("part", ["all", "classes", "splits"])
def test_every_evaluation_of_files(part, crops, ranks, processes, files_run, parts, tmp_path):
    ours = Evaluations(processes, tmp_path, files_run, *parts.get(part, []), "--per-class", *crops)
    for batch_size, workers in product((1, 10, 34, 300), (0, 1, 2)):
        ours.check(ranks, "--batch-size", batch_size, "--workers", workers)


@pytest.mark.parametrize("setting", [("fp32", "null", 2), ("fp32", "0.9", 1)], ids=["model", "ema"])
def test_validation_in_training_is_evaluate_py(setting, runs, tmp_path):
    """The running statistics of three ranks differ; those that are saved are those that were validated."""
    run = runs.whole(3, settings_of(*setting))
    last = rows(run)[-1]
    assert last["weights"] == ("model" if setting[1] == "null" else "ema")
    source = run / "checkpoints" / "last.pt"
    result = call(evaluate.main, source, "--json", tmp_path / "all.json", "--device", "cpu")
    assert result.status == 0, result.error
    found = json.loads((tmp_path / "all.json").read_text())
    for name in ("images", "top1_errors", "top5_errors", "top1_error", "top5_error"):
        assert found[name] == last["val"][name]
    assert found["loss"] == pytest.approx(last["val"]["loss"], rel=1e-5)
