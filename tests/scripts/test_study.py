"""study.py and plot_curves.py as command lines."""

import sys

import numpy as np
import pytest
from commands import ROOT, call, message, run_script, tiny
from PIL import Image
from run_files import rows

sys.path.insert(0, str(ROOT / "scripts"))
import plot_curves
import study


@pytest.fixture(scope="module")
def finished_study(tmp_path_factory):
    """A study of two networks with two seeds: its folder, its arguments, and what it printed."""
    output = tmp_path_factory.mktemp("study") / "pair"
    keys = [key for key in tiny(train__batch_size="32") if not key.startswith("model.") or "depth" in key]
    configs = ["demo.yaml", "cifar10_resnext29_2x40d.yaml"]
    arguments = [*configs, "--seeds", 2, "--output", output, *keys, "schedule.warmup_epochs=0"]
    result = run_script("scripts/study.py", *arguments, cwd=ROOT)
    assert result.status == 0, result.output + result.error
    return output, arguments, result.output


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
