"""study.py, plot_curves.py, benchmark.py and gpu.py as command lines."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import ROOT, Result, call, message, run_script, tiny
from PIL import Image
from torchrun import rows

from resnext.device import has_instructions

sys.path.insert(0, str(ROOT / "scripts"))
import plot_curves
import study
from benchmark_layers import convolve


def script(name: str, *arguments: object, status: int = 0) -> Result:
    done = run_script(f"scripts/{name}", *arguments, cwd=ROOT)
    assert done.status == status, done.output + done.error
    return done


# ---------------------------------------------------------------------------- study and plot_curves


@pytest.fixture(scope="module")
def finished_study(tmp_path_factory):
    """A study of two networks with two seeds: its folder, its arguments, and what it printed."""
    output = tmp_path_factory.mktemp("study") / "pair"
    keys = [key for key in tiny(train__batch_size="32") if not key.startswith("model.") or "depth" in key]
    configs = ["demo.yaml", "cifar10_resnext29_2x40d.yaml"]
    arguments = [*configs, "--seeds", 2, "--output", output, *keys, "schedule.warmup_epochs=0"]
    return output, arguments, script("study.py", *arguments).output


def test_table_of_a_study(finished_study):
    output, _, printed = finished_study
    table = (output / "table.md").read_text()
    assert table in printed
    cells = [[c.strip() for c in line.split("|")[1:-1]] for line in table.splitlines() if line[:1] == "|"]
    assert [line[0] for line in cells[2:]] == ["demo", "cifar10_resnext29_2x40d"]
    errors = [rows(output / f"demo-seed{seed}")[-1]["val"]["top1_error"] for seed in (0, 1)]
    assert cells[2][3] == f"{np.mean(errors):.2f} ± {np.std(errors, ddof=1):.2f}"
    assert cells[2][1] == "831,562" and cells[2][5] == "2"


def test_study_skips_finished_runs(finished_study):
    output, arguments, _ = finished_study
    last = output / "demo-seed1" / "checkpoints" / "last.pt"
    before = last.read_bytes()
    assert call(study.main, *arguments).output.count("finished already") == 4
    assert last.read_bytes() == before


def test_study_refuses_another_recipe(finished_study):
    error = message(call(study.main, *finished_study[1], "optimizer.lr=0.02"))
    assert "optimizer.lr=0.01, not 0.02" in error and "--output" in error


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_curves(finished_study, tmp_path, suffix):
    runs, target = [finished_study[0] / f"demo-seed{seed}" for seed in (0, 1)], tmp_path / f"curves.{suffix}"
    assert call(plot_curves.main, *runs, "--output", target).status == 0
    if suffix == "svg":
        assert "<svg" in target.read_text()
        return
    image = np.asarray(Image.open(target).convert("RGB")).astype(int)
    for color in ((31, 119, 180), (255, 127, 14)):  # matplotlib's first two
        assert (np.abs(image - color).sum(2) < 10).sum() > 100


def test_curves_need_a_run(tmp_path):
    assert f"{tmp_path}: not a run" in message(call(plot_curves.main, tmp_path))


# ---------------------------------------------------------------------------- benchmark


@pytest.fixture
def jpegs(tmp_path) -> Path:
    """Two classes of three JPEGs below train/."""
    generator = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (tmp_path / "train" / name).mkdir(parents=True)
        for number in range(3):
            noise = generator.integers(0, 256, (260, 300, 3), np.uint8)
            Image.fromarray(noise).save(tmp_path / "train" / name / f"{number}.jpg")
    return tmp_path


def benchmark(tmp_path: Path, what: str, *arguments: object) -> list[dict]:
    """The tables of one round, which are also on the console."""
    target = tmp_path / "result.json"
    printed = script("benchmark.py", what, *arguments, "--rounds", 1, "--json", target).output
    result = json.loads(target.read_text())
    assert "torch" in result["environment"]
    for table in result["tables"]:
        first = table["rows"][0]["images_per_second"]
        for row in table["rows"]:
            assert f"| {row['name']} | {row['images_per_second']:,.0f} |" in printed
            assert len(row["seconds"]) == 1
            assert row["images_per_second"] == pytest.approx(row["images"] / row["seconds"][0])
            assert row["ratio"] == pytest.approx(row["images_per_second"] / first)
    return result["tables"]


def test_benchmark_of_batchnorm(tmp_path):
    keys = ["model.cardinality=2", "model.base_width=4", "data.dataset=glyphs", "data.image_size=8"]
    tables = benchmark(tmp_path, "batchnorm", *keys)
    native = has_instructions(torch.device("cpu"), "bf16")
    assert [table["title"].split(", ")[-1] for table in tables] == (["fp32", "bf16"] if native else ["fp32"])
    assert all([r["name"] for r in t["rows"]] == ["plain BatchNorm", "groups of 16"] for t in tables)


def test_benchmark_of_input_and_its_chart(tmp_path, jpegs):
    chart = tmp_path / "chart.png"
    tables = benchmark(tmp_path, "data", "--data", jpegs, "--chart", chart)
    assert all(row["images"] == 6 for table in tables for row in table["rows"])
    assert {"fast", "torch7"} <= {row["name"] for table in tables for row in table["rows"]}
    with Image.open(chart) as image:
        assert image.format == "PNG" and min(image.size) > 300


def test_benchmark_end_to_end_waits(tmp_path, jpegs):
    keys = ["model.stages=[1,1,1,1]", "model.cardinality=1", "model.base_width=1", "train.batch_size=3"]
    keys += ["data.image_size=64", "data.workers=1"]
    (table,) = benchmark(tmp_path, "end-to-end", "--data", jpegs, *keys)
    assert len(table["rows"]) == 3 and all("waits" in row["note"] for row in table["rows"])


@pytest.mark.parametrize("what", ["train", "eval"])
def test_benchmark_of_networks(tmp_path, what):
    keys = ["model.cardinality=2", "model.base_width=4", "data.image_size=32", "train.batch_size=2"]
    found = [row for table in benchmark(tmp_path, what, *keys) for row in table["rows"]]
    assert {row["name"].split(",")[0] for row in found} - {"timm"} == {"torchvision", "ours"}
    assert all(" GB at " in row["note"] for row in found)


def test_benchmark_of_layers(tmp_path):
    keys = ["model.cardinality=4", "model.base_width=2", "data.image_size=32", "train.batch_size=16"]
    tables = benchmark(tmp_path, "convolutions", *keys)
    assert len(tables) == 7 and all(len(table["rows"]) == 4 for table in tables)  # a stride of 2 in 3 stages
    tables = benchmark(tmp_path, "norms", *keys)
    assert all(len(table["rows"]) == 3 for table in tables)
    times = [int(table["title"].split(", ")[-1].split()[0]) for table in tables]
    assert sum(times) == 49  # of 53: without those of the 4 shortcuts


@pytest.mark.parametrize(("groups", "merged"), [(4, 2), (8, 4), (4, 4)])
def test_merged_groups_are_the_same_convolution(groups, merged):
    x = torch.randn(2, 8 * groups, 6, 6, dtype=torch.float64)
    weight = torch.randn(8 * groups, 8, 3, 3, dtype=torch.float64)
    outputs = [convolve(x, weight, 1, groups, k, torch.channels_last) for k in (1, merged)]
    torch.testing.assert_close(*outputs)


# ---------------------------------------------------------------------------- gpu


def test_gpu_measurements_continue(tmp_path):
    """One part here on the CPU, in tiny shapes; `make gpu` runs them all."""
    arguments = ["norms", "--output", tmp_path]
    assert "written to" in script("gpu.py", *arguments).output
    (target,) = tmp_path.glob("tiny-*.json")
    assert list(json.loads(target.read_text())["parts"]) == ["norms"]
    assert "| torch: BatchNorm, addition, ReLU |" in target.with_suffix(".md").read_text()
    done = script("gpu.py", "--output", tmp_path, "--minutes", 0.01, status=2)
    assert "norms: measured already" in done.output and "tests, demo, train" in done.error
    for text in (target.read_text().replace('"torch": "', '"torch": "0'), "{"):  # another version, damaged
        target.write_text(text)
        assert "kept as" in script("gpu.py", *arguments, "--minutes", 0.001, status=2).output
        assert not target.exists()


@pytest.mark.parametrize(
    ("name", "arguments", "words"),
    [
        ("gpu.py", ["norm"], "norm: no part of that name"),
        ("gpu.py", ["files"], "--data is missing"),
        ("gpu.py", ["--data", "nowhere"], "--data nowhere: has no folder train/"),
        ("gpu.py", ["--minutes", "nan"], "--minutes nan: must be above 0"),
        ("benchmark.py", ["data"], "--data"),
        ("benchmark.py", ["cifar", "--rounds", "0"], "--rounds"),
        ("benchmark.py", ["cifar", "--json", "no/such/x"], "no/such/x"),
    ],
)
def test_errors(name, arguments, words):
    error = script(name, *arguments, status=2).error
    assert error.startswith("error: ") and words in error
