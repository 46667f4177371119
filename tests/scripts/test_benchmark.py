"""benchmark.py and gpu.py, as command lines."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import ROOT, message, run_python
from PIL import Image

LAYERS = ["model.cardinality=4", "model.base_width=2", "data.image_size=32", "train.batch_size=16"]
NETWORK = ["model.cardinality=2", "model.base_width=4", "data.image_size=32", "train.batch_size=2"]
SMALL = ["model.stages=[1,1,1,1]", "model.cardinality=1", "model.base_width=1", "train.batch_size=3"]


@pytest.fixture(scope="module")
def jpegs(tmp_path_factory) -> Path:
    """Two class folders of three JPEGs in train/."""
    folder = tmp_path_factory.mktemp("jpegs")
    generator = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (folder / "train" / name).mkdir(parents=True)
        for number in range(3):
            noise = generator.integers(0, 256, (260, 300, 3), np.uint8)
            Image.fromarray(noise).save(folder / "train" / name / f"{number}.jpg")
    return folder


def benchmark(tmp_path, *arguments: object) -> list[dict]:
    """Return the tables of a benchmark of one round, which must also be on the console."""
    target = tmp_path / "result.json"
    command = ROOT / "scripts/benchmark.py"
    done = run_python(command, *arguments, "--rounds", "1", "--json", target, cwd=tmp_path)
    assert done.status == 0, done.error
    result = json.loads(target.read_text())
    assert "torch" in result["environment"]
    for table in result["tables"]:
        first = table["rows"][0]["images_per_second"]
        for row in table["rows"]:
            assert f"| {row['name']} | {row['images_per_second']:,.0f} |" in done.output
            assert row["images_per_second"] == pytest.approx(row["images"] / row["seconds"][0])
            assert row["ratio"] == pytest.approx(row["images_per_second"] / first)
    return result["tables"]


def test_input(tmp_path, jpegs):
    tables = benchmark(tmp_path, "data", "--data", jpegs)
    assert all(row["images"] == 6 for table in tables for row in table["rows"])
    assert {"fast", "torch7", "the same from tar shards"} <= {
        row["name"] for table in tables for row in table["rows"]
    }


def test_end_to_end(tmp_path, jpegs):
    keys = [*SMALL, "data.image_size=64", "data.workers=1"]
    (table,) = benchmark(tmp_path, "end-to-end", "--data", jpegs, *keys)
    assert len(table["rows"]) == 3 and all("waits" in row["note"] for row in table["rows"])


@pytest.mark.parametrize("what", ["train", "eval"])
def test_networks(tmp_path, what):
    (table,) = benchmark(tmp_path, what, *NETWORK)
    assert {row["name"].split(",")[0] for row in table["rows"]} - {"timm"} == {"torchvision", "ours"}


def test_layers(tmp_path):
    tables = benchmark(tmp_path, "convolutions", *LAYERS)
    assert len(tables) == 7 and all(len(table["rows"]) == 4 for table in tables)  # 3 have stride 2
    tables = benchmark(tmp_path, "norms", *LAYERS)
    assert all(len(table["rows"]) == 3 for table in tables)
    counts = [int(table["title"].split(", ")[-1].split()[0]) for table in tables]
    assert sum(counts) == 49  # of 53: all but those of the 4 shortcuts


@pytest.mark.parametrize(("groups", "merged"), [(4, 2), (8, 4), (4, 4)])
def test_merged_groups_are_the_same_convolution(groups, merged, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path, str(ROOT / "scripts")])
    from benchmark_steps import convolve

    x = torch.randn(2, 8 * groups, 6, 6, dtype=torch.float64)
    weight = torch.randn(8 * groups, 8, 3, 3, dtype=torch.float64)
    outputs = [convolve(x, weight, 1, groups, k, torch.channels_last) for k in (1, merged)]
    torch.testing.assert_close(*outputs)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["data"], "--data: missing"),
        (["train", "--rounds", "0"], "--rounds: must be at least 1"),
        (["train", "--json", "no/such/x"], "--json no/such/x: cannot be written"),
    ],
)
def test_benchmark_refuses(arguments, words, tmp_path):
    assert words in message(run_python(ROOT / "scripts/benchmark.py", *arguments, cwd=tmp_path))


def test_gpu_measurements_continue(tmp_path):
    """Run one part, tiny and on the CPU."""
    command = [ROOT / "scripts/gpu.py", "--output", tmp_path]
    assert "written to" in run_python(*command, "norms", cwd=tmp_path).output
    (results,) = tmp_path.glob("tiny-*.json")
    assert list(json.loads(results.read_text())["parts"]) == ["norms"]
    assert "| torch: BatchNorm, addition, ReLU |" in results.with_suffix(".md").read_text()
    done = run_python(*command, "--minutes", "0.01", cwd=tmp_path)
    assert "norms: already measured" in done.output and "tests, demo, train" in message(done)
    for text in (results.read_text().replace('"torch": "', '"torch": "0'), "{"):  # another version, damaged
        results.write_text(text)
        assert "kept as" in run_python(*command, "norms", "--minutes", "0.001", cwd=tmp_path).output
        assert not results.exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["norm"], "norm: unknown part; choose from tests, demo"),
        (["files"], "--data: missing"),
        (["--data", "nowhere"], "--data nowhere: has no folder train/"),
        (["--minutes", "nan"], "--minutes nan: must be above 0"),
    ],
)
def test_gpu_refuses(arguments, words, tmp_path):
    assert words in message(run_python(ROOT / "scripts/gpu.py", *arguments, cwd=tmp_path))
