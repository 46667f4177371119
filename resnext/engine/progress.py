"""What a run reports: its introduction, metrics of steps and epochs, times, and its summary."""

import math
import shlex
import signal
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from ..config import network_name
from ..distributed import sum_over_ranks
from ..errors import UserError
from ..models.complexity import complexity
from .evaluator import EvalResult, Row
from .logger import Logger, duration
from .train_state import MetricSums, TrainProgress, TrainState

METRICS = ("loss", "top1_error", "top5_error")


def introduction(
    training: TrainState, train_images: int, val_images: int, output: Path, source: Path | None, resumed: bool
) -> str:
    """Describe the network, the dataset, the recipe, and where the run goes and starts from."""
    config, progress, versions = training.config, training.progress, training.versions
    train, data = config.train, config.data
    parameters, macs = complexity(training.model, data.image_size)
    images = f"{data.image_size} pixels"
    if data.pipeline != "memory":
        size = f" ({data.train_size} in training)" if data.train_size != data.image_size else ""
        images += f"{size} from {data.resize}, {data.pipeline}, {data.decoder}"
    processes = "" if versions["processes"] == "1" else f" across {versions['processes']} processes"
    lines = [
        f"{network_name(config.model)}: {parameters:,} parameters, "
        f"{macs / 1e6:,.0f} M multiply-adds per image",
        f"{data.dataset}: {train_images:,} training and {val_images:,} validation images, "
        f"{len(training.classes)} classes, {images}",
        f"global batch {train.batch_size}{processes}, lr {config.optimizer.lr}, "
        f"{train.epochs} epochs, {train.precision} on {versions['device']}",
        f"run directory: {output}; top-1 and top-5 below are errors in percent",
    ]
    if source:
        lines.append(f"continuing from {source}: epoch {progress.epoch}, {progress.step} steps done")
    elif resumed:
        lines.append("nothing was saved in the run directory yet: starting from the beginning")
    return "\n".join(lines)


class Timer:
    """The time of a run, resumed or not, and of the steps since the last row."""

    def __init__(self, seconds_before: float, epochs_before: float):
        self.seconds_before, self.epochs_before = seconds_before, epochs_before
        self.start = time.perf_counter()
        self.start_row()

    def start_row(self) -> None:
        """Start the time of the next row."""
        self.row_start = time.perf_counter()
        self.data_seconds = 0.0  # spent waiting for data
        self.images = 0  # added by the trainer

    def wait_for(self, batches: Iterator[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the batches, and add up the time spent waiting for them."""
        while True:
            start = time.perf_counter()
            batch = next(batches, None)
            self.data_seconds += time.perf_counter() - start
            if batch is None:
                return
            yield batch

    def total(self) -> float:
        """Return the seconds of the run, those before a resume included."""
        return self.seconds_before + time.perf_counter() - self.start

    def remaining(self, epochs_done: float, epochs: int) -> str:
        """Return the time to the end of the run at the pace since it started or resumed, as text."""
        done = epochs_done - self.epochs_before
        if not done:  # resumed just before a validation
            return "?"
        return duration((time.perf_counter() - self.start) / done * (epochs - epochs_done))


class StepMetrics:
    """Losses and counts of steps, left on the device until a row or a checkpoint needs them."""

    def __init__(self, progress: TrainProgress, folder: Path):
        self.progress, self.folder = progress, folder
        self.pending: list[tuple[Tensor, int]] = []

    def add(self, result: Tensor, images: int) -> None:
        """Add this rank's part of a step's result, see train_step, and the step's number of images."""
        self.pending.append((result, images))

    def collect(self) -> None:
        """Add the pending steps of all ranks to the progress; raise UserError at a non-finite loss."""
        if not self.pending:
            return
        own = torch.stack([result for result, _ in self.pending]).cpu()
        results = sum_over_ranks(own).tolist()
        first = self.progress.step - len(results) + 1
        steps = zip(results, self.pending, strict=True)
        for step, ((loss, top1, top5), (_, images)) in enumerate(steps, first):
            if not math.isfinite(loss):
                last = self.folder / "checkpoints" / "last.pt"
                good = f"the last good checkpoint is {last}" if last.exists() else "nothing was saved yet"
                raise UserError(
                    f"the loss is {loss} at epoch {self.progress.epoch}, step {step}; {good}; lower "
                    "optimizer.lr, add schedule.warmup_epochs or train.clip_grad_norm, or (if "
                    "train.precision is fp16) use bf16 or fp32"
                )
            for sums in (self.progress.interval, self.progress.epoch_sums):
                sums.add(loss, top1, top5, images)
        self.pending.clear()


def report_step(training: TrainState, logger: Logger, timer: Timer, rate: float, steps: int) -> None:
    """Write the row, the line and the scalars of the steps since the last row."""
    progress, train = training.progress, training.config.train
    seconds = max(time.perf_counter() - timer.row_start, 1e-9)
    speed = timer.images / seconds
    left = timer.remaining(progress.epoch - 1 + progress.step / steps, train.epochs)
    values = progress.interval.as_row()
    position = {"epoch": progress.epoch, "step": progress.step, "global_step": progress.global_step}
    times = {"seconds": seconds, "data_seconds": timer.data_seconds, "images_per_second": speed}
    logger.row({"kind": "step", **position, "lr": rate, **values, "time": times})
    scalars = {"lr": rate, "images_per_second": speed} | {name: values[name] for name in METRICS}
    logger.scalars("train", scalars, progress.global_step)
    batches = max(1, round(timer.images / train.batch_size))
    logger.step_line(
        f"epoch {progress.epoch}/{train.epochs}  step {progress.step}/{steps}  "
        f"time {seconds / batches:.3f}  data {timer.data_seconds / batches:.3f}  "
        f"loss {values['loss']:.4f}  {error_text(values, len(training.classes))}  lr {rate:.4g}  "
        f"{speed:.0f} img/s  ETA {left}",
        f"loss {values['loss']:.3f}, top-1 {values['top1_error']:.2f}, ETA {left}",
    )
    progress.interval = MetricSums()
    timer.start_row()


def report_epoch(training: TrainState, result: EvalResult, best: Row, logger: Logger, timer: Timer) -> None:
    """Write the row, the line and the scalars of a finished epoch."""
    progress, epochs = training.progress, training.config.train.epochs
    train, val = progress.epoch_sums.as_row(), result.as_row()
    logger.row(
        {
            "kind": "epoch",
            "epoch": progress.epoch,
            "global_step": progress.global_step,
            "train": train,
            "val": val,
            "weights": "ema" if training.ema else "model",
            "best_epoch": best["epoch"],
            "best_top1_error": best["top1_error"],
            "time": {"total_seconds": timer.total()},
        }
    )
    for name in METRICS:
        logger.scalars(
            "epoch",
            {f"train_{name}": train[name], f"val_{name}": getattr(result, name)},
            progress.global_step,
        )
    logger.say(
        f" * epoch {progress.epoch}/{epochs}  train top-1 {train['top1_error']:6.3f}  "
        f"val {error_text(val, len(training.classes))}  loss {result.loss:.4f}  "
        f"best {best['top1_error']:.3f} (epoch {best['epoch']})  "
        f"ETA {timer.remaining(progress.epoch, epochs)}"
    )


def error_text(row: Mapping[str, float | None], classes: int) -> str:
    """Return the two errors in percent; with fewer than 5 classes the second is top-n."""
    return f"top-1 {row['top1_error']:6.3f}  top-{min(5, classes)} {row['top5_error']:6.3f}"


def summary(training: TrainState, folder: Path, stopped_by: signal.Signals | None) -> str:
    """Return the end of a log: result, time, where the files are, the next command."""
    progress, epochs = training.progress, training.config.train.epochs
    weights = " (averaged weights)" if training.ema else ""
    k = min(5, len(training.classes))
    if progress.epoch > epochs:
        lines, following = [f"finished: {epochs} epochs in {duration(progress.seconds)}"], ["evaluate.py"]
    else:
        name = stopped_by.name if stopped_by else "request"
        lines = [f"stopped by {name} in epoch {progress.epoch}, after step {progress.step}"]
        following = ["train.py", "--resume"]
    for title, row in (("last", progress.last), ("best", progress.best)):
        if row:
            lines.append(
                f"{title} validation error{weights}: top-1 {row['top1_error']:.3f} "
                f"({row['top1_errors']}/{row['images']}), top-{k} {row['top5_error']:.3f} "
                f"({row['top5_errors']}/{row['images']}), epoch {row['epoch']}"
            )
    lines.append(f"checkpoints: {folder / 'checkpoints'}; log, metrics and TensorBoard data: {folder}")
    return "\n".join([*lines, f"next: {shlex.join(['python', *following, str(folder)])}"])
