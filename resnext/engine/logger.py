"""What a run says: console, progress bar, log.txt, metrics.jsonl, TensorBoard."""

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
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from ..distributed import rank, world_size
from ..errors import UserError


def environment(device: torch.device) -> dict[str, str]:
    """Programs and hardware, to repeat a run: plain texts."""
    versions = {"python": platform.python_version()}
    for package in ("torch", "torchvision", "numpy", "pillow", "simplejpeg"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):  # simplejpeg may be missing
            versions[package] = importlib.metadata.version(package)
    folder = Path(__file__).resolve().parents[1]
    versions["commit"] = _git(folder, "describe", "--always", "--dirty", "--abbrev=12") or "unknown"
    if device.type == "cuda":
        versions["device"] = torch.cuda.get_device_name(device)
        versions["cudnn"] = str(torch.backends.cudnn.version())
    else:
        versions["device"] = f"{_cpu_name()}, {torch.get_num_threads()} threads"
    versions["processes"] = str(world_size())
    versions["started"] = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
    return versions


def _git(folder: Path, *arguments: str) -> str:
    try:
        command = ["git", "-C", str(folder), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            names = [line.split(":")[1].strip() for line in file if line.startswith("model name")]
        return names[0]
    except (OSError, IndexError):
        return platform.processor() or platform.machine()


def duration(seconds: float) -> str:
    """Seconds as h:mm:ss."""
    return str(datetime.timedelta(seconds=round(seconds)))


class RunLogger:
    """Everything a run writes but its checkpoints.

    `rows` is how many rows of metrics.jsonl the run has a right to: those that a checkpoint
    counts. Later ones, written after it by a run that was killed, are cut off, as the steps they
    tell of are done again. `global_step` does the same for TensorBoard.
    """

    def __init__(self, folder: Path, rows: int, global_step: int, tensorboard: bool):
        self.terminal = sys.stdout.isatty()
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
        self.board: Any = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            purge = global_step + 1 if global_step else None
            with self.board_may_fail():
                self.board = SummaryWriter(str(folder / "tensorboard"), purge_step=purge)

    def warn(self, text: str) -> None:
        """A warning that any of several processes may have."""
        self.say(text)

    def say(self, text: str, console: bool = True) -> None:
        """A line for the console and log.txt."""
        stamp = time.strftime("%Y-%m-%d %H:%M:%S")
        print(*(f"{stamp} {line}" for line in text.splitlines()), sep="\n", file=self.log_file)
        self.log_file.flush()
        if console:
            try:
                tqdm.write(text, file=sys.stdout)
                sys.stdout.flush()
            except BrokenPipeError:  # the reader of the pipe has gone; the run goes on
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

    def row(self, row: dict[str, Any]) -> None:
        """A row for metrics.jsonl."""
        self.metrics.write(json.dumps(row) + "\n")
        self.metrics.flush()
        self.rows += 1

    def scalars(self, prefix: str, values: dict[str, float], global_step: int) -> None:
        """Scalars for TensorBoard."""
        with self.board_may_fail():
            for name, value in values.items() if self.board else ():
                self.board.add_scalar(f"{prefix}/{name}", value, global_step)

    @contextlib.contextmanager
    def board_may_fail(self) -> Iterator[None]:
        """TensorBoard's files are a convenience: the run goes on without them."""
        try:
            yield
        except Exception as error:  # of its file system's own kinds
            self.board = None
            self.say(f"warning: TensorBoard's files cannot be written ({error}); going on without them")

    def open_bar(self, title: str, total: int, done: int = 0) -> None:
        """A progress bar, on a terminal only."""
        if self.terminal:
            self.bar = tqdm(
                total=total,
                initial=done,
                desc=title,
                leave=False,
                file=sys.stdout,
                dynamic_ncols=True,
                mininterval=0.25,
            )

    def advance(self) -> None:
        """One step of the bar."""
        if self.bar is not None:
            self.bar.update()

    def close_bar(self) -> None:
        """Take the bar away."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None

    def step_line(self, text: str, status: str) -> None:
        """A step's numbers: on a terminal behind the bar, else as a line; always in log.txt."""
        self.say(text, console=self.bar is None)
        if self.bar is not None:
            self.bar.set_postfix_str(status)

    def sync(self) -> None:
        """Rows onto the disk, ahead of the checkpoint that counts them."""
        os.fsync(self.metrics.fileno())
        with self.board_may_fail():
            if self.board:
                self.board.flush()

    def close(self) -> None:
        self.close_bar()
        with self.board_may_fail():
            if self.board:
                self.board.close()
        self.files.close()


class NullLogger:
    """The reporter of all processes but the first: what they would say it says."""

    rows = 0

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *arguments, **options: None

    def warn(self, text: str) -> None:
        """A warning is theirs alone, and log.txt is out of reach."""
        print(f"process {rank()}: {text}", flush=True)


def _keep_rows(path: Path, rows: int) -> int:
    """Cut metrics.jsonl to its first `rows` whole lines; returns how many there are."""
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
