"""Runs and evaluations on tar shards have the bits of those on the class folders of the same images."""

import csv
import itertools
import json
from pathlib import Path

import pytest
from commands import call
from rank_runs import on_files
from run_files import assert_same_run, read
from shard_files import make, to_parquet

import evaluate


@pytest.fixture(scope="module")
def shards(images, tmp_path_factory) -> dict[str, Path]:
    """The same images in shards, made from folders and from Parquet files."""
    folder = tmp_path_factory.mktemp("shards")
    parquet = to_parquet(images, folder / "parquet")
    return {
        "folders": make(images, folder / "one", "--images", 7),
        "parquet": make(parquet, folder / "two", "--images", 30),
    }


CASES = [("folders", 2, 3), ("parquet", 1, 0)]
ALL = itertools.product(("folders", "parquet"), (1, 2, 3), (0, 1, 3))


@pytest.mark.parametrize(
    ("source", "ranks", "workers"),
    [*CASES, *(pytest.param(*case, marks=pytest.mark.slow) for case in ALL if case not in CASES)],
)
def test_runs_are_equal(source, ranks, workers, shards, runs, images, tmp_path):
    """Also if stopped in mid-epoch, and resumed with another number of workers, or begun on class folders."""
    output = tmp_path / "run"
    here = [*on_files(images), f"data.dir={shards[source]}", "data.dataset=shards", f"data.workers={workers}"]
    stop = {"rank": ranks - 1, "signal": "SIGTERM", "step": 7}
    begun = on_files(images) if source == "parquet" else here
    ended = runs.start(ranks, output, *begun, watch={"stop": stop})
    assert set(ended.statuses) == {0}, ended  # torch may warn of more workers than cores
    stopped = read(output)["progress"]
    assert (2, 1) <= (stopped["epoch"], stopped["step"]) < (2, 5)
    ended = runs.train(ranks, output, *here, "--resume", f"data.workers={1 - min(workers, 1)}")
    assert "the bits may differ" not in ended.outputs[0]
    whole = runs.whole(ranks, on_files(images))
    assert_same_run(output, whole)
    assert read(output)["versions"]["data"] == read(whole)["versions"]["data"]


@pytest.mark.parametrize(("source", "ranks"), [("folders", 3), ("parquet", 1)])
def test_evaluations_are_equal(source, ranks, shards, processes, runs, images, tmp_path):
    """Whatever the run was trained on; every image counts once."""
    run = runs.whole(2, on_files(images))
    found = []
    for name, data in (("folder", images), ("shards", shards[source])):
        files = [tmp_path / f"{name}.json", tmp_path / f"{name}.csv"]
        options = ["--data", data, "--device", "cpu", "--json", files[0], "--csv", files[1], "--ten-crop"]
        if name == "folder":
            assert call(evaluate.main, run, *options).status == 0
        else:
            processes.run(ranks, "evaluate", run, *options, "--batch-size", 4, "--workers", 1).finished()
        with open(files[1], newline="") as file:
            rows = [(row["path"], row["label"], row["top1"], row["correct"]) for row in csv.DictReader(file)]
        result = json.loads(files[0].read_text())
        found.append((rows, result["top1_error"], result["images"]))
    assert found[0] == found[1] and len({path for path, *_ in found[0][0]}) == 101
