"""What a run leaves behind and prints, as a user sees it."""

import fcntl
import json
import math
import os
import pty
import shutil
import signal
import subprocess
import sys
import termios
from pathlib import Path

import pytest
import torch
from commands import ROOT, Result, call
from run_files import assert_same, read, rows, tensors
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import evaluate
import resnext.engine.trainer
import train
from resnext.stop_signal import StopSignal
from resnext.weights.load import load_weights

RUN = [
    "--config",
    "demo.yaml",
    "model.stem=cifar",
    "model.depth=11",
    "model.cardinality=2",
    "model.base_width=4",
    "data.image_size=8",
    "data.train_images=100",
    "data.val_images=37",
    "train.batch_size=16",
    "train.epochs=2",
    "train.ema_decay=0.5",
    "run.log_interval=3",
]


def run(*arguments: object, status: int = 0) -> Result:
    """Run train.py with these arguments."""
    result = call(train.main, *arguments)
    assert result.status == status, result.output + result.error
    return result


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> tuple[Path, str]:
    """A run directory that keeps every epoch, to be looked at only; and what the run printed."""
    folder = tmp_path_factory.mktemp("run") / "small"
    return folder, run(*RUN, "run.keep_every=1", "--output", folder).output


@pytest.fixture
def demo_copy(demo, tmp_path) -> Path:
    return shutil.copytree(demo[0], tmp_path / "copy")


def test_a_run_directory_holds_what_the_docs_say(demo):
    folder, _ = demo
    names = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.parent.name != "tensorboard"}
    assert names == {
        *("config.yaml", "metrics.jsonl", "log.txt", "tensorboard", "checkpoints"),
        *(f"checkpoints/{name}.pt" for name in ("last", "previous", "best", "epoch_001", "epoch_002")),
    }
    header = (folder / "config.yaml").read_text().split("model:")[0]
    assert all(f"# {name}: " in header for name in ("torch", "commit", "device", "data", "started"))
    steps = [r for r in rows(folder) if r["kind"] == "step"]
    assert [(r["epoch"], r["step"]) for r in steps] == [(1, 3), (1, 6), (1, 7), (2, 3), (2, 6), (2, 7)]
    assert [r["images"] for r in steps] == [48, 48, 4] * 2
    epochs = [r for r in rows(folder) if r["kind"] == "epoch"]
    assert [(r["train"]["images"], r["val"]["images"]) for r in epochs] == [(100, 37)] * 2


def test_a_pipe_gets_plain_lines(demo):
    _, output = demo
    assert "\r" not in output and "\x1b" not in output
    assert "epoch 1/2  step 3/7  time " in output and "img/s" in output
    assert "finished: 2 epochs" in output and "next: python evaluate.py" in output


def test_a_terminal_gets_a_bar(tmp_path):
    master, slave = pty.openpty()
    termios.tcsetwinsize(slave, (24, 100))
    command = [sys.executable, "train.py", *RUN, "--output", str(tmp_path / "r")]
    process = subprocess.Popen(command, stdout=slave, stderr=slave, cwd=ROOT)
    os.close(slave)
    output = b""
    while True:
        try:
            chunk = os.read(master, 65536)
        except OSError:  # the other side has closed
            break
        if not chunk:
            break
        output += chunk
    assert process.wait(timeout=60) == 0
    assert b"epoch 1/2:" in output and b"\r" in output


def test_evaluate_prints_the_integers_of_the_log(demo, tmp_path):
    folder, _ = demo
    done = call(evaluate.main, folder, "--json", tmp_path / "result.json")
    assert done.status == 0, done.error
    result, best = (
        json.loads((tmp_path / "result.json").read_text()),
        read(folder, "best.pt")["progress"]["best"],
    )
    assert f"({best['top1_errors']}/37)" in done.output and f"({best['top5_errors']}/37)" in done.output
    assert "averaged weights" in done.output
    assert all(result[name] == best[name] for name in ("images", "top1_errors", "top5_errors"))
    errors = [r["val"]["top1_error"] for r in rows(folder) if r["kind"] == "epoch"]
    assert best["top1_error"] == min(errors)


def test_evaluation_does_not_depend_on_the_batch_size(demo):
    outputs = [
        call(evaluate.main, demo[0], "--precision", "fp32", "--batch-size", size).output for size in (1, 37)
    ]
    first, second = (output.splitlines()[1].split("loss")[0] for output in outputs)
    assert first == second


def test_the_evaluated_weights_are_the_average(demo):
    model, _ = load_weights(demo[0] / "checkpoints" / "last.pt")
    content = read(demo[0])
    for name, value in model.state_dict().items():
        assert torch.equal(value, content["ema"][f"module.{name}"])
    assert not torch.equal(model.fc.weight, content["model"]["fc.weight"])


def test_tensorboard_has_each_step_once_after_a_resume(demo_copy):
    run("--resume", demo_copy, "train.epochs=3")
    events = EventAccumulator(str(demo_copy / "tensorboard"))
    events.Reload()
    assert [e.step for e in events.Scalars("train/loss")] == [3, 6, 7, 10, 13, 14, 17, 20, 21]
    assert [e.step for e in events.Scalars("epoch/val_top1_error")] == [7, 14, 21]
    losses = [r["loss"] for r in rows(demo_copy) if r["kind"] == "step"]
    assert [e.value for e in events.Scalars("train/loss")] == pytest.approx(losses, rel=1e-6)


def test_a_non_finite_loss_stops_the_run_before_anything_is_saved(demo_copy):
    last = demo_copy / "checkpoints" / "last.pt"
    before = last.read_bytes()
    done = run("--resume", demo_copy, "train.epochs=9", "optimizer.lr=1e30", status=2)
    assert "the loss is nan at epoch 3, step " in done.error and "lower optimizer.lr" in done.error
    assert f"last good checkpoint is {last}" in done.error
    assert last.read_bytes() == before
    assert all(math.isfinite(r["loss"]) for r in rows(demo_copy) if r["kind"] == "step")


def test_a_run_can_branch_off_a_kept_checkpoint(demo, tmp_path):
    trunk, branch = demo[0], tmp_path / "branch"
    kept = trunk / "checkpoints" / "epoch_001.pt"
    assert "--output" in run("--resume", kept, status=2).error
    run("--resume", kept, "--output", branch)
    assert [(r["kind"], r["epoch"]) for r in rows(branch)][-1] == ("epoch", 2)
    assert_same(tensors(read(branch)), tensors(read(trunk)))


def test_a_stop_during_validation_is_resumed_with_the_validation(demo, tmp_path, monkeypatch):
    calls = []

    def stop_after_eight(request):
        calls.append(1)
        request.signal = signal.SIGTERM
        return len(calls) == 8  # 7 steps, then a batch of the validation

    folder = tmp_path / "r"
    with monkeypatch.context() as patch:
        patch.setattr(StopSignal, "requested", stop_after_eight)
        run(*RUN, "--output", folder)
    progress = read(folder)["progress"]
    assert (progress["epoch"], progress["step"], progress["last"]) == (1, 7, None)
    assert len(rows(folder)) == 3
    run(*RUN, "--output", folder, "--resume")
    assert rows(folder) == rows(demo[0])


def test_a_branch_is_saved_before_its_first_step_and_has_its_own_best(demo, tmp_path):
    source, branch = demo[0] / "checkpoints" / "best.pt", tmp_path / "branch"
    diverging = ["run.log_interval=1", "optimizer.lr=1e30"]  # it ends in its first epoch
    run("--resume", source, "--output", branch, "train.epochs=9", *diverging, status=2)
    content = read(branch)
    assert_same(content["model"], read(demo[0], "best.pt")["model"])
    assert content["progress"]["best"] is None and content["progress"]["rows"] == 0


@pytest.mark.filterwarnings("error")  # about files that stay open
def test_a_directory_is_not_shared_by_two_processes(demo):
    with open(demo[0] / "log.txt", "a") as log:
        fcntl.flock(log, fcntl.LOCK_EX)
        done = run("--resume", demo[0], "train.epochs=3", status=2)
    assert str(demo[0]) in done.error and "another process" in done.error


def test_too_little_memory_names_the_keys_that_save_some(tmp_path, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(resnext.engine.trainer, "train_step", full)
    done = run(*RUN, "--output", tmp_path / "run", status=2)
    assert "train.accumulation_steps" in done.error and "train.activation_checkpointing" in done.error
