"""plot_curves.py and study.py, as command lines."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

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
