"""DataLoader workers: signals, deaths, timeouts, shared memory, and the end of a run."""

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from batches import CPU, IMAGES, assert_same, configure, spoil, take, train_loader
from commands import ROOT, call
from run_files import assert_same_run, read, rows
from torchrun import wait_for

import data.file_loaders
import data.workers
import train
from data.file_loaders import FileTrainLoader
from data.image_folder import list_set
from data.loaders import make_eval_loader
from resnext.errors import UserError


def pids(loader: FileTrainLoader) -> list[int]:
    return [process.pid for process in loader.loader._iterator._workers]


def ended(pid: int) -> bool:
    """Whether a process does not exist, or waits to be reaped."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except FileNotFoundError:
        return True


def all_end(processes: list[int]) -> bool:
    return wait_for(lambda: all(map(ended, processes)), 100)


# ---------------------------------------------------------------------------- deaths


def test_a_killed_worker_is_an_error(shared_root, monkeypatch):
    """As by the kernel if memory is short, while the main process waits for the batch."""
    monkeypatch.setattr(data.file_loaders, "train_image", lambda *_: time.sleep(1))
    loader = train_loader(configure(shared_root, workers=2, batch_size=3))

    def kill() -> None:
        assert wait_for(lambda: loader.loader._iterator is not None)
        os.kill(pids(loader)[0], signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    start = time.monotonic()
    with pytest.raises(UserError, match=r"^data\.workers: DataLoader worker \(pid.*lower data\.workers$"):
        next(loader.epoch(1))
    assert time.monotonic() - start < 100
    killer.join()


@pytest.mark.parametrize("when", ["during a step", "between epochs"])
def test_a_worker_killed_meanwhile_is_an_error_at_the_next_batch(when, shared_root):
    """Not during the step or while a checkpoint is written, and not only after a timeout."""
    loader = train_loader(configure(shared_root, workers=2, batch_size=1))
    epoch = loader.epoch(1)
    next(epoch)
    if when == "between epochs":
        take(epoch)
        epoch = loader.epoch(2)
    pid = pids(loader)[0]
    os.kill(pid, signal.SIGKILL)
    assert wait_for(lambda: ended(pid))
    before = time.monotonic()
    # torch words it by where it notices: "(pid N) is killed by signal" or "(pid(s) N) exited unexpectedly"
    with pytest.raises(UserError, match=rf"^data\.workers: DataLoader worker .*\b{pid}\).*lower data"):
        take(epoch)
    assert time.monotonic() - before < 100


def test_a_slow_worker_is_an_error(shared_root, monkeypatch):
    monkeypatch.setattr(data.workers, "TIMEOUT", 1)
    monkeypatch.setattr(data.file_loaders, "train_image", lambda *_: time.sleep(2.5))
    loader = train_loader(configure(shared_root, workers=1, batch_size=1))
    with pytest.raises(UserError, match=r"data\.workers: DataLoader timed out after 1 seconds"):
        next(loader.epoch(1))


def test_too_little_shared_memory(shared_root, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(100, 0, 100_000))
    take(train_loader(configure(shared_root, workers=0)).epoch(1))
    with pytest.raises(UserError, match=r"data\.workers: 2 workers need .*lower data\.workers"):
        train_loader(configure(shared_root, workers=2, batch_size=100))


# ---------------------------------------------------------------------------- from epoch to epoch


def test_workers_ignore_the_signals_that_stop_a_run(shared_root):
    """A batch system and a terminal send them to all processes, but the run still finishes its step."""
    loader, expected = (train_loader(configure(shared_root, workers=workers)) for workers in (2, 0))
    epoch = loader.epoch(1)
    found = [next(epoch)]
    before = pids(loader)
    for pid in before:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
            os.kill(pid, number)
    assert_same([*found, *epoch], expected.epoch(1))
    assert_same(loader.epoch(2), expected.epoch(2))
    assert pids(loader) == before and len(before) == 2 and not any(map(ended, before)), "they stay"


def test_workers_end_with_the_loader(shared_root):
    loader = train_loader(configure(shared_root, workers=2))
    take(loader.epoch(1))
    before = pids(loader)
    del loader
    assert all_end(before)
    children = {process.pid for process in torch.multiprocessing.active_children()}
    files = list_set(str(shared_root), "val")
    take(make_eval_loader(files, configure(shared_root, workers=2).data, 4, CPU))
    assert {process.pid for process in torch.multiprocessing.active_children()} <= children


@pytest.mark.parametrize("workers", [0, 2])
def test_an_abandoned_epoch(workers, shared_root):
    """A stopped run leaves an epoch halfway; the next one is right."""
    expected = train_loader(configure(shared_root))
    loader = train_loader(configure(shared_root, workers=workers))
    epoch = loader.epoch(1)
    next(epoch)
    epoch.close()
    assert_same(loader.epoch(2), expected.epoch(2))
    epoch = loader.epoch(3, 2)
    next(epoch)
    del epoch
    assert_same(loader.epoch(1), expected.epoch(1))


# ---------------------------------------------------------------------------- the end of a run

WITH_WORKERS = """
import sys, time
import torch
from data.image_folder import list_set
from data.loaders import make_train_loader
from resnext.config import parse_config

text = f"data: {{dir: {sys.argv[1]}, image_size: 16, workers: 2}}"
config = parse_config(text, "text", ["train.batch_size=1"])
loader = make_train_loader(list_set(sys.argv[1], "train"), config, torch.device("cpu"))
epoch = loader.epoch(1)
next(epoch)
print(*(process.pid for process in loader.loader._iterator._workers), flush=True)
"""


@pytest.mark.parametrize("leave", ["pass", "raise ValueError", "time.sleep(600)"])
def test_no_worker_outlives_its_run(leave, shared_root):
    """Whatever still refers to the batches at exit; the run that sleeps is killed."""
    parent = subprocess.Popen(
        [sys.executable, "-c", f"{WITH_WORKERS}\n{leave}", str(shared_root)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        workers = [int(pid) for pid in parent.stdout.readline().split()]
        assert len(workers) == 2
        if "sleep" in leave:
            assert not any(map(ended, workers))
            parent.kill()
        parent.wait(300)
        assert all_end(workers)
    finally:
        parent.kill()
        parent.stdout.close()


TRAINING = """
model: {depth: null, stages: [1, 1, 1, 1], cardinality: 1, base_width: 1}
data: {image_size: 32, workers: 2}
augment: {policy: trivialaugment, erasing: 0.5, mixup: 0.2, cutmix: 1, repeats: 3}
train: {epochs: 3, batch_size: 4, label_smoothing: 0.1}
optimizer: {lr: 0.01}
run: {device: cpu, log_interval: 1, tensorboard: false}
"""


def arguments(output: Path, root: Path, *more: str) -> list[str]:
    config = output.with_suffix(".yaml")
    config.write_text(TRAINING)
    return ["--config", str(config), "--data", str(root), "--output", str(output), *more]


def run(*arguments: str) -> None:
    result = call(train.main, *arguments)
    assert result.status == 0, result.error


def test_a_stopped_training_on_files_ends_with_the_same_bits(shared_root, tmp_path):
    """Stopped within an epoch and resumed with other workers; no worker is left."""
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    run(*arguments(whole, shared_root))
    assert len(rows(whole)) == 3 * (6 + 1)
    command = [sys.executable, str(ROOT / "train.py"), *arguments(stopped, shared_root)]
    process = subprocess.Popen(command, start_new_session=True)
    try:
        metrics = stopped / "metrics.jsonl"
        assert wait_for(lambda: metrics.exists() and metrics.read_bytes().count(b"\n") >= 9, 300)
        os.killpg(process.pid, signal.SIGTERM)  # as a batch system does: the workers get it too
        assert process.wait(300) == 0
        with pytest.raises(ProcessLookupError):
            os.killpg(process.pid, 0)
    finally:
        process.kill()
    progress = read(stopped)["progress"]
    assert progress["epoch"] < 4 and progress["step"] > 0, "within an epoch"
    run(*arguments(stopped, shared_root, "--resume", "data.workers=1"))
    assert_same_run(stopped, whole)


def test_warnings_of_skipped_files_reach_the_log(root, tmp_path):
    spoil(root, "train/bee/3.jpg")
    more = ("data.skip_broken=true", "train.epochs=2", "augment.repeats=1")
    run(*arguments(tmp_path / "run", root, *more))
    log = (tmp_path / "run" / "log.txt").read_text()
    assert log.count("bee/3.jpg: cannot be decoded") == 1
    assert "warning: broken files skipped so far: 1, " in log
    images = [row["train"]["images"] for row in rows(tmp_path / "run") if row["kind"] == "epoch"]
    assert images == [IMAGES] * 2
