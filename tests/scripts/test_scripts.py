"""plot_curves.py, study.py and benchmark.py, as command lines."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from resnext.device import has_instructions

ROOT = Path(__file__).resolve().parents[2]
TINY = [
    "model.depth=11",
    "data.dataset=glyphs",
    "data.image_size=8",
    "data.train_images=32",
    "data.val_images=20",
    "augment.padding=1",
    "train.batch_size=16",
    "train.epochs=2",
    "schedule.warmup_epochs=0",
    "run.tensorboard=false",
]


def script(name: str, *arguments: str, status: int = 0) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "scripts" / name), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == status, done.stdout + done.stderr
    return done


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """A finished study of two networks with two seeds, and how to ask for it again."""
    output = tmp_path_factory.mktemp("study") / "pair"
    configs = ["demo.yaml", "cifar10_resnext29_2x40d.yaml"]
    arguments = [*configs, "--seeds", "2", "--output", str(output), *TINY]
    return output, arguments, script("study.py", *arguments).stdout


def test_study_writes_a_table_of_the_final_errors(study):
    output, _, printed = study
    table = (output / "table.md").read_text()
    assert table in printed
    lines = [
        [c.strip() for c in line.split("|")[1:-1]] for line in table.splitlines() if line.startswith("|")
    ]
    assert [line[0] for line in lines[2:]] == ["demo", "cifar10_resnext29_2x40d"]
    errors = []
    for seed in (0, 1):
        rows = [
            json.loads(x) for x in (output / f"demo-seed{seed}" / "metrics.jsonl").read_text().splitlines()
        ]
        errors.append(rows[-1]["val"]["top1_error"])
    assert lines[2][3] == f"{np.mean(errors):.2f} ± {np.std(errors, ddof=1):.2f}"
    assert lines[2][1] == "831,562" and lines[2][5] == "2"


def test_study_does_not_repeat_finished_runs(study):
    output, arguments, _ = study
    before = (output / "demo-seed1" / "checkpoints" / "last.pt").read_bytes()
    printed = script("study.py", *arguments).stdout
    assert printed.count("finished already") == 4
    assert (output / "demo-seed1" / "checkpoints" / "last.pt").read_bytes() == before


def test_study_refuses_to_mix_recipes(study):
    _, arguments, _ = study
    done = script("study.py", *arguments, "optimizer.lr=0.02", status=2)
    assert "optimizer.lr" in done.stderr and "--output" in done.stderr


@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_curves_are_drawn(study, tmp_path, suffix):
    output, _, _ = study
    target = tmp_path / f"curves{suffix}"
    runs = [str(output / "demo-seed0"), str(output / "demo-seed1")]
    script("plot_curves.py", *runs, "--output", str(target))
    if suffix == ".png":
        picture = np.asarray(Image.open(target).convert("RGB"))
        blue, orange = (31, 119, 180), (255, 127, 14)  # matplotlib's first two colours
        assert all((np.abs(picture.astype(int) - c).sum(2) < 10).sum() > 100 for c in (blue, orange))
    else:
        assert "<svg" in target.read_text()


def test_curves_need_a_run(tmp_path):
    done = script("plot_curves.py", str(tmp_path), status=2)
    assert str(tmp_path) in done.stderr and "train.py" in done.stderr


def pictures(folder: Path) -> Path:
    """Two classes of three JPEGs below train/."""
    generator = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (folder / "train" / name).mkdir(parents=True)
        for number in range(3):
            noise = generator.integers(0, 256, (260, 300, 3), np.uint8)
            Image.fromarray(noise).save(folder / "train" / name / f"{number}.jpg")
    return folder


SMALL_NETWORK = ["model.stages=[1,1,1,1]", "model.cardinality=1", "model.base_width=1", "train.batch_size=3"]


def benchmark(tmp_path, *arguments: str) -> dict:
    """The JSON of a benchmark of one round; its tables must be on the console too."""
    target = tmp_path / "result.json"
    done = script("benchmark.py", *arguments, "--rounds", "1", "--json", str(target))
    result = json.loads(target.read_text())
    assert "torch" in result["environment"]
    for table in result["tables"]:
        first = table["rows"][0]["images_per_second"]
        for row in table["rows"]:
            assert f"| {row['name']} | {row['images_per_second']:,.0f} |" in done.stdout
            assert len(row["seconds"]) == 1
            assert row["images_per_second"] == pytest.approx(row["images"] / row["seconds"][0])
            assert row["ratio"] == pytest.approx(row["images_per_second"] / first)
    return result


def test_benchmark_of_batchnorm(tmp_path):
    keys = ["model.cardinality=2", "model.base_width=4", "data.dataset=glyphs", "data.image_size=8"]
    tables = benchmark(tmp_path, "batchnorm", *keys)["tables"]
    native = has_instructions(torch.device("cpu"), "bf16")
    assert [table["title"].split(", ")[-1] for table in tables] == (["fp32", "bf16"] if native else ["fp32"])
    assert all([r["name"] for r in t["rows"]] == ["plain BatchNorm", "groups of 16"] for t in tables)


def test_benchmark_of_input_and_its_chart(tmp_path):
    folder, chart = pictures(tmp_path / "data"), tmp_path / "chart.png"
    tables = benchmark(tmp_path, "data", "--data", str(folder), "--chart", str(chart))["tables"]
    assert all(row["images"] == 6 for table in tables for row in table["rows"])
    assert {"fast", "torch7"} <= {row["name"] for table in tables for row in table["rows"]}
    with Image.open(chart) as image:
        assert image.format == "PNG" and min(image.size) > 300


def test_benchmark_end_to_end_waits(tmp_path):
    folder = pictures(tmp_path / "data")
    (table,) = benchmark(
        tmp_path, "end-to-end", "--data", str(folder), *SMALL_NETWORK, "data.image_size=64", "data.workers=1"
    )["tables"]
    assert len(table["rows"]) == 3 and all("waits" in row["note"] for row in table["rows"])


@pytest.mark.parametrize("what", ["train", "eval"])
def test_benchmark_of_networks(tmp_path, what):
    keys = ["model.cardinality=2", "model.base_width=4", "data.image_size=32", "train.batch_size=2"]
    tables = benchmark(tmp_path, what, *keys)["tables"]
    names = {row["name"].split(",")[0] for table in tables for row in table["rows"]}
    assert names - {"timm"} == {"torchvision", "ours"}
    assert all(" GB at " in row["note"] for table in tables for row in table["rows"])


def test_benchmark_of_layers(tmp_path):
    keys = ["model.cardinality=4", "model.base_width=2", "data.image_size=32", "train.batch_size=16"]
    tables = benchmark(tmp_path, "convolutions", *keys)["tables"]
    assert len(tables) == 7 and all(len(table["rows"]) == 4 for table in tables)  # a stride of 2 in 3 stages
    tables = benchmark(tmp_path, "norms", *keys)["tables"]
    assert all(len(table["rows"]) == 3 for table in tables)
    times = [int(table["title"].split(", ")[-1].split()[0]) for table in tables]
    assert sum(times) == 49  # of 53: without those of the 4 shortcuts


@pytest.mark.parametrize(("groups", "merged"), [(4, 2), (8, 4), (4, 4)])
def test_merged_groups_are_the_same_convolution(groups, merged):
    sys.path.append(str(ROOT / "scripts"))
    from benchmark_layers import convolve

    x = torch.randn(2, 8 * groups, 6, 6, dtype=torch.float64)
    weight = torch.randn(8 * groups, 8, 3, 3, dtype=torch.float64)
    outputs = [convolve(x, weight, 1, groups, k, torch.channels_last) for k in (1, merged)]
    torch.testing.assert_close(*outputs)


def test_gpu_measurements_go_on_where_they_ended(tmp_path):
    """One part here on the CPU, in little; `make gpu` runs them all."""
    arguments = ["norms", "--output", str(tmp_path)]
    assert "written to" in script("gpu.py", *arguments).stdout
    (results,) = tmp_path.glob("tiny-*.json")
    assert list(json.loads(results.read_text())["parts"]) == ["norms"]
    assert "| torch: BatchNorm, addition, ReLU |" in results.with_suffix(".md").read_text()
    done = script("gpu.py", "--output", str(tmp_path), "--minutes", "0.01", status=2)
    assert "norms: measured already" in done.stdout and "tests, demo, train" in done.stderr
    for text in (results.read_text().replace('"torch": "', '"torch": "0'), "{"):  # another version, damaged
        results.write_text(text)
        assert "kept as" in script("gpu.py", *arguments, "--minutes", "0.001", status=2).stdout
        assert not results.exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["norm"], "norm: no part of that name; there are tests, demo"),
        (["files"], "--data is missing"),
        (["--data", "nowhere"], "--data nowhere: has no folder train/"),
        (["--minutes", "nan"], "--minutes nan: must be above 0"),
    ],
)
def test_gpu_refuses(arguments, words):
    assert words in script("gpu.py", *arguments, status=2).stderr


@pytest.mark.parametrize(
    "arguments", [["data"], ["cifar", "--rounds", "0"], ["cifar", "--json", "no/such/x"]]
)
def test_benchmark_refuses(arguments):
    command = [sys.executable, str(ROOT / "scripts" / "benchmark.py"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and done.stderr.startswith("error: ")
