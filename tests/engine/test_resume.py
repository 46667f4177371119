"""A run that was stopped or killed and resumed ends with the bits of one that never was.

Processes that get SIGTERM in mid-epoch, SIGKILL at a random step, and no signal at all must agree in weights,
optimizer, EMA, counters and rows of metrics.jsonl.
"""

import itertools
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from commands import ROOT, call
from run_files import assert_same, assert_same_run, read, row_count, rows, state
from torchrun import wait_for

import train

TINY = [
    "model.cardinality=2",
    "model.base_width=4",
    "data.train_images=250",
    "data.val_images=64",
    "data.image_size=8",
    "train.batch_size=16",
    "train.epochs=3",
    "schedule.warmup_epochs=1",
    "run.deterministic=true",
    "run.log_interval=5",
    "run.tensorboard=false",
]
QUICK = ("fp32", "0.9", 2)
SETTINGS = [
    pytest.param(*setting, marks=() if setting == QUICK else pytest.mark.slow)
    for setting in itertools.product(("fp32", "bf16"), ("null", "0.9"), (1, 2))
]


def command(output: Path, *arguments: str) -> list[str]:
    return ["--config", "demo.yaml", "--output", str(output), *arguments]


def run(output: Path, *arguments: str) -> str:
    """Train in this process; return its output."""
    result = call(train.main, *command(output, *arguments))
    assert result.status == 0, result.error
    return result.output


def train_and_signal(output: Path, arguments: list[str], number: signal.Signals, count: int) -> int:
    """Train in a process that gets a signal once it has written `count` rows; return its exit status."""
    script = [sys.executable, str(ROOT / "train.py"), *command(output, *arguments)]
    process = subprocess.Popen(script, stdout=subprocess.DEVNULL)
    try:
        wait_for(lambda: row_count(output) >= count or process.poll() is not None, 120)
        process.send_signal(number)
        return process.wait(60)
    finally:
        process.kill()


@pytest.mark.parametrize(("precision", "ema", "accumulation"), SETTINGS)
def test_stopped_and_killed_runs_end_with_the_same_bits(tmp_path, precision, ema, accumulation):
    settings = [*TINY, f"train.precision={precision}", f"train.ema_decay={ema}"]
    settings += [f"train.accumulation_steps={accumulation}"]
    whole, stopped, killed = tmp_path / "whole", tmp_path / "stopped", tmp_path / "killed"
    run(whole, *settings)
    assert len(rows(whole)) == 3 * (4 + 1)

    assert train_and_signal(stopped, settings, signal.SIGTERM, 6) == 0
    progress = read(stopped)["progress"]
    assert (progress["epoch"], progress["global_step"]) < (4, 48), "must have stopped early"
    run(stopped, *settings, "--resume")

    # Steps after the last save are lost and repeated; rows after it are removed.
    saving = [*settings, "run.save_interval=3"]
    assert train_and_signal(killed, saving, signal.SIGKILL, random.randint(1, 12)) == -signal.SIGKILL
    run(killed, *saving, "--resume")

    for other in (stopped, killed):
        assert_same_run(other, whole)
        assert_same(state(other), state(whole))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGUSR1])
def test_other_stop_signals_save_and_end_with_status_0(tmp_path, number):
    assert train_and_signal(tmp_path / "run", TINY, number, 2) == 0
    log = (tmp_path / "run" / "log.txt").read_text()
    assert f"stopped by {number.name}" in log
    assert "next: python train.py --resume" in log
    assert (tmp_path / "run" / "checkpoints" / "last.pt").exists()


def test_a_finished_run_is_extended_by_more_epochs(tmp_path):
    run(tmp_path / "run", *TINY, "train.epochs=2")
    out = run(tmp_path / "run", "--resume", *TINY, "train.epochs=3")
    assert "changed since the checkpoint: train.epochs 2 → 3" in out
    assert [r["epoch"] for r in rows(tmp_path / "run") if r["kind"] == "epoch"] == [1, 2, 3]


def test_resume_of_a_finished_run_changes_nothing(tmp_path):
    run(tmp_path / "run", *TINY, "train.epochs=2")
    before = [state(tmp_path / "run"), rows(tmp_path / "run")]
    result = call(train.main, "--resume", tmp_path / "run")
    assert result.status == 0 and "finished: 2 epochs" in result.output
    assert_same([state(tmp_path / "run"), rows(tmp_path / "run")], before)
