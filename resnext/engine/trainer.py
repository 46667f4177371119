"""The training loop: SGD as the original's train.lua, stoppable and resumable at any step.

`train` reads as the recipe. Batches come from anything with `images` (of all processes), `steps` and
`epoch(number, first_step)`, which yields this process's (images, labels) of each global batch, on the
device; labels are classes, or shares of all classes where pictures were mixed.
"""

import contextlib
import math
import shlex
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..batch_plan import check_last_batch, split_batch
from ..distributed import rank, sum_over_ranks, world_size
from ..errors import UserError
from ..models.ghost_batchnorm import frozen_running_statistics
from ..schedule import learning_rate
from .checkpoint import write_checkpoint
from .evaluator import EvalResult, count_correct, evaluate, promote_to_float32
from .logger import RunLogger, duration
from .train_state import MetricSums, TrainState, checkpoint_content


class InMemoryTrainLoader(Protocol):
    images: int
    steps: int

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[tuple[Tensor, Tensor]]: ...


# ---------------------------------------------------------------------------- the loop


def train(
    training: TrainState,
    make_train_loader: InMemoryTrainLoader,
    val_batches: Any,
    folder: Path,
    reporter: RunLogger,
    should_stop: Callable[[], bool],
) -> bool:
    """Train to the configured number of epochs, or until told to stop; saved either way.

    Returns whether the end was reached.
    """
    progress, config = training.progress, training.config
    check_last_batch(config, make_train_loader.images, world_size())
    warm_up_ddp(training)
    clock = Timer(progress.seconds, progress.epoch - 1 + progress.step / make_train_loader.steps)
    while progress.epoch <= config.train.epochs:
        done = train_epoch(training, make_train_loader, folder, reporter, should_stop, clock)
        score = done and validate(training, val_batches, reporter, should_stop)
        progress.seconds = clock.total()
        if not score:
            save(training, folder, reporter)
            return False
        finish_epoch(training, score, reporter, clock)
        save(training, folder, reporter, checkpoint_names(training))
    return True


class Timer:
    """Time of a run over all its sessions, and what is left at the pace of this one."""

    def __init__(self, seconds_before: float, epochs_before: float):
        self.seconds_before, self.epochs_before = seconds_before, epochs_before
        self.start = time.perf_counter()

    def total(self) -> float:
        """Seconds of this and all earlier sessions."""
        return self.seconds_before + time.perf_counter() - self.start

    def remaining(self, epochs_done: float, epochs: int) -> str:
        """Time to the end of the training, as text."""
        done = epochs_done - self.epochs_before
        if not done:  # resumed just ahead of a validation
            return "?"
        return duration((time.perf_counter() - self.start) / done * (epochs - epochs_done))


def train_epoch(
    training: TrainState,
    batches: InMemoryTrainLoader,
    folder: Path,
    reporter: RunLogger,
    should_stop: Callable[[], bool],
    clock: Timer,
) -> bool:
    """The rest of an epoch; False when told to stop before its end."""
    progress, config = training.progress, training.config
    steps, epochs, size = batches.steps, config.train.epochs, config.train.batch_size
    training.model.train()
    meter = StepMetrics(training)
    reporter.open_bar(f"epoch {progress.epoch}/{epochs}", steps, progress.step)
    try:
        for images, labels in meter.timed(batches.epoch(progress.epoch, progress.step)):
            rate = learning_rate(
                config.schedule, config.optimizer.lr, epochs, progress.epoch, progress.step, steps
            )
            total = min(size, batches.images - progress.step * size)
            meter.add(train_step(training, images, labels, rate, total), total)
            progress.step += 1
            progress.global_step += 1
            reporter.advance()
            last = progress.step == steps
            if last or progress.step % config.run.log_interval == 0:
                meter.collect(folder)
                report_step(training, reporter, meter, clock, rate, steps)
            if should_stop():
                meter.collect(folder)
                return False
            interval = config.run.save_interval
            if interval and not last and progress.step % interval == 0:
                meter.collect(folder)
                progress.seconds = clock.total()
                save(training, folder, reporter)
    finally:
        reporter.close_bar()
    return True


def train_step(
    training: TrainState, images: Tensor, labels: Tensor, rate: float, total: int | None = None
) -> Tensor:
    """One optimiser step on a global batch; [mean loss, top-1 hits, top-5 hits], float64 (3,).

    `images` and `labels` are this process's share of the `total` (None: they are all), and the result is
    its share of the sums. The batch is cut into accumulation parts whose gradients, over all parts and
    processes, add up to that of the mean loss over the whole batch; running statistics follow the first
    part, as on the original's first GPU. Nothing here waits for the device.
    """
    train, ranks = training.config.train, world_size()
    total = len(labels) if total is None else total
    images = images.to(memory_format=training.layout)
    for group in training.optimizer.param_groups:
        group["lr"] = rate * group["lr_scale"]
    training.optimizer.zero_grad(set_to_none=True)
    sizes = [part[rank()] for part in split_batch(total, train, ranks) if any(part)]
    results = []
    for number, (part, targets) in enumerate(zip(images.split(sizes), labels.split(sizes), strict=True), 1):
        statistics = frozen_running_statistics(training.model) if number > 1 else contextlib.nullcontext()
        with statistics, training.exchange(last=number == len(sizes)):
            if len(part):
                with training.autocast():
                    output = training.forward(part)
                output = promote_to_float32(output)
                loss = F.cross_entropy(output, targets, label_smoothing=train.label_smoothing)
                loss = loss * (len(part) / total)
                if targets.ndim == 2:  # mixed: a hit is the label with the larger share
                    targets = targets.argmax(1)
                results.append(
                    torch.cat([loss.detach().double()[None], count_correct(output, targets).double()])
                )
            else:
                loss = zero_loss(training, part)
            # DDP takes the mean over the processes, and the sum is wanted.
            training.scaler.scale(loss * ranks).backward()
    if train.clip_grad_norm is not None:
        training.scaler.unscale_(training.optimizer)
        nn.utils.clip_grad_norm_(training.model.parameters(), train.clip_grad_norm)
    training.scaler.step(training.optimizer)
    training.scaler.update()
    if training.ema:
        training.ema.update_parameters(training.model)
    return sum(results) if results else torch.zeros(3, dtype=torch.float64, device=images.device)


def zero_loss(training: TrainState, images: Tensor) -> Tensor:
    """The loss of a process without an image in the last batch: 0, with gradients of 0 for the exchange."""
    with training.autocast():
        pixels = images.new_zeros(2, *images.shape[1:]).to(memory_format=training.layout)
        return training.forward(pixels).sum() * 0.0


def warm_up_ddp(training: TrainState) -> None:
    """Of several processes, one step whose gradient is thrown away.

    After its first step DDP sorts gradients into other buckets, and sums are rounded otherwise. Now the
    first steps of a run, and the first after a resume, find the final ones.
    """
    if not training.exchanges:
        return
    config = training.config
    images = max(2, split_batch(config.train.batch_size, config.train, world_size())[0][rank()])
    size = config.data.train_size
    training.model.train()
    pixels = torch.zeros(images, 3, size, size, device=training.device).to(memory_format=training.layout)
    with frozen_running_statistics(training.model), training.autocast():
        output = training.forward(pixels)
    output.float().sum().backward()
    training.optimizer.zero_grad(set_to_none=True)


class StepMetrics:
    """Losses and counts of steps, left on the device until a row or a checkpoint needs them.

    Then the processes add up their shares.
    """

    def __init__(self, training: TrainState):
        self.training = training
        self.pending: list[tuple[Tensor, int]] = []
        self.waited = 0.0  # seconds spent waiting for data since the last row
        self.since = time.perf_counter()
        self.images = 0

    def timed(self, batches: Iterator) -> Iterator:
        """The batches, with the time waited for them added up."""
        while True:
            start = time.perf_counter()
            batch = next(batches, None)
            self.waited += time.perf_counter() - start
            if batch is None:
                return
            yield batch

    def add(self, result: Tensor, images: int) -> None:
        self.pending.append((result, images))
        self.images += images

    def collect(self, folder: Path) -> None:
        """Bring what is pending to the host; a UserError at the first non-finite loss."""
        if not self.pending:
            return
        progress = self.training.progress
        shared = torch.stack([result for result, _ in self.pending]).cpu()
        results = sum_over_ranks(shared).tolist()
        first = progress.step - len(results) + 1
        for step, ((loss, top1, top5), (_, images)) in enumerate(
            zip(results, self.pending, strict=True), first
        ):
            if not math.isfinite(loss):
                raise UserError(non_finite(loss, progress.epoch, step, folder))
            progress.interval.add(loss, top1, top5, images)
            progress.epoch_sums.add(loss, top1, top5, images)
        self.pending.clear()

    def restart(self) -> None:
        self.waited, self.images, self.since = 0.0, 0, time.perf_counter()


def non_finite(loss: float, epoch: int, step: int, folder: Path) -> str:
    last = folder / "checkpoints" / "last.pt"
    good = f"the last good checkpoint is {last}" if last.exists() else "nothing was saved yet"
    return (
        f"the loss is {loss} at epoch {epoch}, step {step}; {good}; lower optimizer.lr, add "
        "schedule.warmup_epochs or train.clip_grad_norm, or use train.precision bf16 or fp32"
    )


def report_step(
    training: TrainState, reporter: RunLogger, meter: StepMetrics, clock: Timer, rate: float, steps: int
) -> None:
    """Row, line and scalars of the steps since the last row."""
    progress, epochs = training.progress, training.config.train.epochs
    taken = max(time.perf_counter() - meter.since, 1e-9)
    values = progress.interval.as_row()
    speed = meter.images / taken
    batches = max(1, round(meter.images / training.config.train.batch_size))
    left = clock.remaining(progress.epoch - 1 + progress.step / steps, epochs)
    row = {
        "kind": "step",
        "epoch": progress.epoch,
        "step": progress.step,
        "global_step": progress.global_step,
        "lr": rate,
        **values,
    }
    timing = {"seconds": taken, "data_seconds": meter.waited, "images_per_second": speed}
    reporter.row(row | {"time": timing})
    reporter.scalars(
        "train",
        {"lr": rate, "images_per_second": speed}
        | {name: values[name] for name in ("loss", "top1_error", "top5_error")},
        progress.global_step,
    )
    errors = error_text(values, len(training.classes))
    reporter.step_line(
        f"epoch {progress.epoch}/{epochs}  step {progress.step}/{steps}  "
        f"time {taken / batches:.3f}  data {meter.waited / batches:.3f}  "
        f"loss {values['loss']:.4f}  {errors}  lr {rate:.4g}  {speed:.0f} img/s  "
        f"ETA {left}",
        f"loss {values['loss']:.3f}, top-1 {values['top1_error']:.2f}, ETA {left}",
    )
    progress.interval = MetricSums()
    meter.restart()


def error_text(row: dict[str, Any], classes: int) -> str:
    """The two errors in percent; the second is top-5, or top-n of fewer classes."""
    return f"top-1 {row['top1_error']:6.3f}  top-{min(5, classes)} {row['top5_error']:6.3f}"


def validate(
    training: TrainState, batches: Any, reporter: RunLogger, should_stop: Callable[[], bool]
) -> EvalResult | None:
    """Exact validation errors of the weights that the run is about; None when told to stop.

    What is evaluated is what is saved: the running statistics of the first process.
    """
    training.broadcast_buffers()
    shown = with_bar("validation", batches, reporter)
    return evaluate(training.evaluated_model, shown, training.autocast, should_stop, layout=training.layout)


def read_through(batches: Any, reporter: RunLogger, should_stop: Callable[[], bool]) -> None:
    """Decode all validation files once, so that a broken one is found now and not after the first epoch."""
    for _ in with_bar("trying the validation files", batches, reporter):
        if should_stop():
            return


def with_bar(title: str, batches: Any, reporter: RunLogger) -> Iterator:
    """The batches, with a progress bar on a terminal."""
    reporter.open_bar(title, batches.steps)
    try:
        for batch in batches:
            yield batch
            reporter.advance()
    finally:
        reporter.close_bar()


def finish_epoch(training: TrainState, score: EvalResult, reporter: RunLogger, clock: Timer) -> None:
    """Row, line and scalars of a finished epoch; then the next one is in progress."""
    progress, epochs = training.progress, training.config.train.epochs
    progress.last = {"epoch": progress.epoch, **score.as_row()}
    if progress.best is None or score.top1_error < progress.best["top1_error"]:
        progress.best = progress.last
    training_row = progress.epoch_sums.as_row()
    reporter.row(
        {
            "kind": "epoch",
            "epoch": progress.epoch,
            "global_step": progress.global_step,
            "train": training_row,
            "val": score.as_row(),
            "weights": "ema" if training.ema else "model",
            "best_epoch": progress.best["epoch"],
            "best_top1_error": progress.best["top1_error"],
            "time": {"total_seconds": clock.total()},
        }
    )
    for name in ("loss", "top1_error", "top5_error"):
        reporter.scalars("epoch", {f"train_{name}": training_row[name]}, progress.global_step)
        reporter.scalars("epoch", {f"val_{name}": score.as_row()[name]}, progress.global_step)
    reporter.say(
        f" * epoch {progress.epoch}/{epochs}  train top-1 {training_row['top1_error']:6.3f}  "
        f"val {error_text(score.as_row(), len(training.classes))}  "
        f"loss {score.loss:.4f}  best {progress.best['top1_error']:.3f} "
        f"(epoch {progress.best['epoch']})  ETA {clock.remaining(progress.epoch, epochs)}"
    )
    progress.epoch += 1
    progress.step = 0
    progress.epoch_sums = MetricSums()
    progress.seconds = clock.total()


def checkpoint_names(training: TrainState) -> tuple[str, ...]:
    """The names under which the state is saved after an epoch."""
    progress, every = training.progress, training.config.run.keep_every
    finished = progress.epoch - 1
    best = ("best.pt",) if progress.best["epoch"] == finished else ()
    kept = (f"epoch_{finished:03d}.pt",) if every and finished % every == 0 else ()
    return ("last.pt", *best, *kept)


def save(
    training: TrainState, folder: Path, reporter: RunLogger, names: tuple[str, ...] = ("last.pt",)
) -> None:
    """Write the state under checkpoints/, last.pt and others."""
    if rank() == 0:
        training.progress.rows = reporter.rows
        reporter.sync()
        write_checkpoint(checkpoint_content(training), folder / "checkpoints", list(names))


def summary(training: TrainState, folder: Path, signal: Any) -> str:
    """The end of a run's session: result, time, where things are, the next command."""
    progress, epochs = training.progress, training.config.train.epochs
    finished = progress.epoch > epochs
    weights = " (averaged weights)" if training.ema else ""
    k = min(5, len(training.classes))
    if finished:
        lines = [f"finished: {epochs} epochs in {duration(progress.seconds)}"]
    else:
        lines = [f"stopped by {signal.name} in epoch {progress.epoch}, after {progress.step} of its steps"]
    for title, row in (("last", progress.last), ("best", progress.best)):
        if row:
            lines.append(
                f"{title} validation error{weights}: top-1 {row['top1_error']:.3f} "
                f"({row['top1_errors']}/{row['images']}), top-{k} {row['top5_error']:.3f} "
                f"({row['top5_errors']}/{row['images']}), epoch {row['epoch']}"
            )
    lines.append(f"checkpoints: {folder / 'checkpoints'}; log, metrics and curves: {folder}")
    following = ["evaluate.py"] if finished else ["train.py", "--resume"]
    return "\n".join([*lines, f"next: {shlex.join(['python', *following, str(folder)])}"])
