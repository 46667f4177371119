"""A run that was stopped or killed and resumed ends with the bits of one that never was.

Command lines in subprocesses: SIGTERM in mid-epoch, SIGKILL at a random step, and no stop at all
must agree in weights, optimiser, average, counters and rows of metrics.jsonl.
"""

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from commands import call

import train

ROOT = Path(__file__).resolve().parents[2]
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
SETTINGS = [
    (precision, ema, accumulation)
    for precision in ("fp32", "bf16")
    for ema in ("null", "0.9")
    for accumulation in (1, 2)
]
QUICK = [("fp32", "0.9", 2)]


def command(output: Path, *arguments: str) -> list[str]:
    script = [sys.executable, str(ROOT / "train.py"), "--config", "demo.yaml"]
    return [*script, "--output", str(output), *arguments]


def run(output: Path, *arguments: str) -> str:
    done = subprocess.run(command(output, *arguments), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def start_and_signal(output: Path, arguments: list[str], number: signal.Signals, row: int) -> int:
    """Start a run, send it a signal once it has written `row` rows; its exit status."""
    process = subprocess.Popen(command(output, *arguments), stdout=subprocess.PIPE, text=True)
    metrics = output / "metrics.jsonl"
    deadline = time.monotonic() + 120
    try:
        while time.monotonic() < deadline and process.poll() is None:
            if metrics.exists() and metrics.read_bytes().count(b"\n") >= row:
                process.send_signal(number)
                break
            time.sleep(0.005)
        process.communicate(timeout=60)
        return process.returncode
    finally:
        process.kill()


def rows(output: Path) -> list[dict]:
    """Rows without the times, the only part that may differ."""
    text = (output / "metrics.jsonl").read_text()
    return [{k: v for k, v in json.loads(line).items() if k != "time"} for line in text.splitlines()]


def final_state(output: Path) -> dict:
    content = torch.load(output / "checkpoints" / "last.pt", weights_only=True)
    progress = {k: v for k, v in content["progress"].items() if k != "seconds"}
    names = ("model", "optimizer", "scaler", "ema", "classes", "preprocessing", "rng")
    return {name: content[name] for name in names} | {"progress": progress}


def assert_same(a, b, where: str = "") -> None:
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_same(a[key], b[key], f"{where}/{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{where}/{i}")
    else:
        assert a == b, where


def check_resumes(folder: Path, precision: str, ema: str, accumulation: int) -> None:
    settings = [
        *TINY,
        f"train.precision={precision}",
        f"train.ema_decay={ema}",
        f"train.accumulation_steps={accumulation}",
    ]
    whole, stopped, killed = folder / "whole", folder / "stopped", folder / "killed"
    run(whole, *settings)
    assert len(rows(whole)) == 3 * (4 + 1)

    assert start_and_signal(stopped, settings, signal.SIGTERM, 6) == 0
    progress = torch.load(stopped / "checkpoints" / "last.pt", weights_only=True)["progress"]
    assert (progress["epoch"], progress["global_step"]) < (4, 48), "must have stopped early"
    run(stopped, *settings, "--resume")

    # Steps between saves are lost and done again; rows beyond the checkpoint are cut off.
    saving = [*settings, "run.save_interval=3"]
    row = random.randint(1, 12)
    assert start_and_signal(killed, saving, signal.SIGKILL, row) == -signal.SIGKILL
    run(killed, *saving, "--resume")

    for other in (stopped, killed):
        assert rows(other) == rows(whole)
        assert_same(final_state(other), final_state(whole))
        best = [torch.load(o / "checkpoints" / "best.pt", weights_only=True) for o in (other, whole)]
        assert_same(best[0]["model"], best[1]["model"])


@pytest.mark.parametrize(("precision", "ema", "accumulation"), QUICK)
def test_stopped_and_killed_runs_end_with_the_same_bits(tmp_path, precision, ema, accumulation):
    check_resumes(tmp_path, precision, ema, accumulation)


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "ema", "accumulation"), [s for s in SETTINGS if s not in QUICK])
def test_stopped_and_killed_runs_end_with_the_same_bits_in_every_setting(
    tmp_path, precision, ema, accumulation
):
    check_resumes(tmp_path, precision, ema, accumulation)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGUSR1])
def test_other_stop_signals_save_and_end_with_status_0(tmp_path, number):
    assert start_and_signal(tmp_path / "run", TINY, number, 2) == 0
    log = (tmp_path / "run" / "log.txt").read_text()
    assert f"stopped by {number.name}" in log
    assert "next: python train.py --resume" in log
    assert (tmp_path / "run" / "checkpoints" / "last.pt").exists()


def inside(output: Path, *arguments: str) -> str:
    """Like `run`, quickly in this process."""
    result = call(train.main, *command(output, *arguments)[2:])
    assert result.status == 0, result.error
    return result.output


def test_a_finished_run_is_extended_by_more_epochs(tmp_path):
    inside(tmp_path / "run", *TINY, "train.epochs=2")
    out = inside(tmp_path / "run", "--resume", *TINY, "train.epochs=3")
    assert "changed since the checkpoint: train.epochs 2 → 3" in out
    assert [r["epoch"] for r in rows(tmp_path / "run") if r["kind"] == "epoch"] == [1, 2, 3]


def test_resume_of_a_finished_run_changes_nothing(tmp_path):
    inside(tmp_path / "run", *TINY, "train.epochs=2")
    before = final_state(tmp_path / "run"), rows(tmp_path / "run")
    result = call(train.main, "--resume", tmp_path / "run")
    assert result.status == 0 and "finished: 2 epochs" in result.output
    assert_same((final_state(tmp_path / "run"), rows(tmp_path / "run")), before)
