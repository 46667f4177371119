"""What a run writes: console, progress bar, log.txt, metrics.jsonl, TensorBoard."""

import contextlib
import datetime
import fcntl
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import torch
from tqdm import tqdm

from ..distributed import rank, world_size
from ..errors import UserError

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

Batch = TypeVar("Batch")


def environment(device: torch.device) -> dict[str, str]:
    """Return the programs and hardware that are needed to repeat a run."""
    versions = {"python": platform.python_version()}
    for package in ("torch", "torchvision", "numpy", "pillow", "simplejpeg"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):  # simplejpeg may be missing
            versions[package] = importlib.metadata.version(package)
    versions["commit"] = _commit() or "unknown"
    if device.type == "cuda":
        versions["device"] = torch.cuda.get_device_name(device)
        versions["cudnn"] = str(torch.backends.cudnn.version())
    else:
        threads = torch.get_num_threads()
        versions["device"] = f"{_cpu_name()}, {threads} thread{'s' * (threads > 1)}"
    versions["processes"] = str(world_size())
    versions["started"] = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
    return versions


def _commit() -> str:
    command = ["git", "-C", str(Path(__file__).resolve().parents[1])]
    command += ["describe", "--always", "--dirty", "--abbrev=12"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.split(":")[1].strip() for line in file if line.startswith("model name"))
    except (OSError, IndexError, StopIteration):
        return platform.processor() or platform.machine()


def duration(seconds: float) -> str:
    """Return seconds as h:mm:ss."""
    return str(datetime.timedelta(seconds=round(seconds)))


class RunLogger:
    """Rank 0's logger: everything a run writes but its checkpoints.

    `rows` is the number of rows of metrics.jsonl that the checkpoint recorded. Later rows are removed: a
    killed run wrote them, and their steps are repeated. `global_step` does the same for TensorBoard.
    """

    def __init__(self, folder: Path, rows: int, global_step: int, tensorboard: bool):
        self.bar: tqdm | None = None
        with contextlib.ExitStack() as files:
            try:
                self.log_file = files.enter_context(
                    open(folder / "log.txt", "a", encoding="utf-8", errors="backslashreplace")
                )
                fcntl.flock(self.log_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                self.rows = _keep_rows(folder / "metrics.jsonl", rows)
                self.metrics = files.enter_context(open(folder / "metrics.jsonl", "a", encoding="utf-8"))
            except BlockingIOError:
                raise UserError(f"{folder}: another process is training there; stop it first") from None
            except OSError as error:
                raise UserError(f"{error.filename}: cannot be written ({error.strerror})") from None
            self.files = files.pop_all()
        self.board: SummaryWriter | None = None
        if tensorboard:
            from torch.utils import tensorboard as writers

            purge = global_step + 1 if global_step else None
            with self.board_may_fail():
                self.board = writers.SummaryWriter(str(folder / "tensorboard"), purge_step=purge)

    def warn(self, text: str) -> None:
        """Log a warning that any rank may have."""
        self.say(text)

    def say(self, text: str, console: bool = True) -> None:
        """Write lines to the console and log.txt."""
        stamp = time.strftime("%Y-%m-%d %H:%M:%S")
        print(*(f"{stamp} {line}" for line in text.splitlines()), sep="\n", file=self.log_file)
        self.log_file.flush()
        if console:
            try:
                tqdm.write(text, file=sys.stdout)
                sys.stdout.flush()
            except BrokenPipeError:  # the reader of the pipe has left; the run continues
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

    def row(self, row: Mapping[str, object]) -> None:
        """Write a row to metrics.jsonl."""
        self.metrics.write(json.dumps(row) + "\n")
        self.metrics.flush()
        self.rows += 1

    def scalars(self, prefix: str, values: Mapping[str, float], global_step: int) -> None:
        """Write scalars for TensorBoard."""
        with self.board_may_fail():
            if self.board:
                for name, value in values.items():
                    self.board.add_scalar(f"{prefix}/{name}", value, global_step)

    @contextlib.contextmanager
    def board_may_fail(self) -> Iterator[None]:
        """Turn errors of TensorBoard into a warning: the run continues without its files."""
        try:
            yield
        except Exception as error:  # TensorBoard's file systems have their own kinds
            self.board = None
            self.say(f"warning: TensorBoard's files cannot be written ({error}); continuing without them")

    def with_bar(self, batches: Iterable[Batch], title: str, steps: int, done: int = 0) -> Iterator[Batch]:
        """Yield the batches of the remaining steps, with a progress bar on a terminal."""
        if not sys.stdout.isatty():
            yield from batches
            return
        self.bar = tqdm(
            batches, title, steps, False, sys.stdout, initial=done, dynamic_ncols=True, mininterval=0.25
        )
        try:
            yield from self.bar
        finally:
            self.bar.close()
            self.bar = None

    def step_line(self, text: str, status: str) -> None:
        """Write a step's metrics to log.txt, and to the bar or, if there is none, the console."""
        self.say(text, console=self.bar is None)
        if self.bar is not None:
            self.bar.set_postfix_str(status)

    def sync(self) -> None:
        """Flush the rows to the disk, before the checkpoint that counts them."""
        os.fsync(self.metrics.fileno())
        with self.board_may_fail():
            if self.board:
                self.board.flush()

    def close(self) -> None:
        """Close all files."""
        with self.board_may_fail():
            if self.board:
                self.board.close()
        self.files.close()


class NullLogger:
    """The logger of the other ranks, which discards everything but warnings."""

    rows = 0

    def discard(self, *_: object, **__: object) -> None:
        """Do nothing."""

    say = row = scalars = step_line = sync = close = discard

    def with_bar(self, batches: Iterable[Batch], title: str, steps: int, done: int = 0) -> Iterator[Batch]:
        """Return the batches."""
        return iter(batches)

    def warn(self, text: str) -> None:
        """Print a warning of this rank, which does not reach log.txt."""
        print(f"process {rank()}: {text}", flush=True)


def _keep_rows(path: Path, rows: int) -> int:
    """Cut metrics.jsonl to its first `rows` whole lines; return how many there are."""
    if not path.exists():
        return 0
    with open(path, "rb") as file:
        kept = [line for _, line in zip(range(rows), file, strict=False) if line.endswith(b"\n")]
        if not file.read(1) and len(kept) == rows:
            return rows
    temporary = path.with_name(".metrics.jsonl")
    with open(temporary, "wb") as file:
        file.writelines(kept)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    return len(kept)


Logger = RunLogger | NullLogger
