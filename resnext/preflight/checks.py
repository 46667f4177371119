"""The single checks of train.py --check: what they find, as one line each."""

import math
import shlex
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from ..config import Config
from ..distributed import all_gather_objects, world_size
from ..engine.logger import duration
from ..engine.run_directory import existing_part
from ..engine.train_state import TrainState
from ..models.resnext import build_model
from ..schedule import learning_rate
from .measure import DataTimings, LoaderTiming, StepTiming, median_seconds

WARNING = "warning: "  # how a warning begins in the log; other lines only inform


class CheckResult(NamedTuple):
    """One line of the report. The text of a warning or an error names the fix."""

    kind: str  # ok, warning or error
    text: str


class Dataset(Protocol):
    """What the checks read of a dataset."""

    @property
    def labels(self) -> np.ndarray: ...
    @property
    def classes(self) -> tuple[str, ...]: ...
    @property
    def notes(self) -> tuple[str, ...]: ...  # warnings
    def __len__(self) -> int: ...


# ---------------------------------------------------------------------------- data


def warnings(lines: Iterable[str]) -> list[CheckResult]:
    """Return the warnings that a run would write to its log."""
    return [CheckResult("warning", line.removeprefix(WARNING)) for line in lines]


def datasets(config: Config, train_set: Dataset, val_set: Dataset) -> list[CheckResult]:
    """Return the numbers of images and classes, and a warning if a limit leaves a class without images."""
    classes, data = train_set.classes, config.data
    train, val = (np.bincount(part.labels, minlength=len(classes)) for part in (train_set, val_set))
    each = f"{train.min():,} to {train.max():,}" if train.min() < train.max() else f"{train.max():,}"
    text = (
        f"data: {data.dataset}, {len(train_set):,} training and {len(val_set):,} validation images, "
        f"{count(len(classes), 'class', 'es')} with {each} training images each"
    )
    results = [CheckResult("ok", text)]
    limits = (("train_images", data.train_images, train), ("val_images", data.val_images, val))
    for key, limit, images in limits:
        empty = np.flatnonzero(images == 0)
        if limit is not None and len(empty):  # without a limit, the dataset itself warns of them
            text = f"{count(len(empty), 'class', 'es')} without any ({classes[empty[0]]})"
            results.append(CheckResult("warning", f"data.{key}: {limit} images leave {text}; raise it"))
    return results


def first_batch(name: str, timing: LoaderTiming, config: Config) -> CheckResult | None:
    """Return the shape, time, and statistics of the first training or validation batch (`name`)."""
    images, folder = timing.images, config.data.dir
    if not len(images):  # a rank may have none
        return None
    values = images.double()
    mean, deviation = values.mean().item(), values.std().item()
    workers = count(timing.workers, "worker") if timing.workers else "no workers"
    text = (
        f"first {name} batch: {' x '.join(map(str, images.shape))} in {time_text(timing.first)}, {workers}; "
    )
    if not math.isfinite(mean) or not math.isfinite(deviation):
        return CheckResult("error", f"{text}some values are not finite; correct data.mean and data.std")
    text += f"mean {mean:.2f}, deviation {deviation:.2f}"
    if abs(mean) > 3:
        advice = "give data.mean and data.std in pixel values 0...255"
        return CheckResult("warning", f"{text}: far from 0 and 1; {advice}")
    if images.min() == images.max():
        look = shlex.join(["python", "scripts/check_data.py", folder]) if folder else "data.mean, data.std"
        return CheckResult("warning", f"{text}: all pixels are equal; look at the images ({look})")
    return CheckResult("ok", text)


def shared_memory(workers: int) -> CheckResult:
    """Report that there is room for the batches of `workers`, which have been started."""
    try:
        free = f", {size_text(shutil.disk_usage('/dev/shm').free)} free in /dev/shm"
    except OSError:
        free = ""
    return CheckResult("ok", f"shared memory: enough for {count(workers, 'worker')} per process{free}")


# ---------------------------------------------------------------------------- disk


def checkpoint_bytes(config: Config, classes: int) -> int:
    """Return the bytes of the tensors in a checkpoint: weights, buffers, momentum, EMA."""
    with torch.device("meta"):  # shapes only
        model = build_model(config.model, classes)
    weights = sum(parameter.nbytes for parameter in model.parameters())
    buffers = sum(buffer.nbytes for buffer in model.buffers())
    ema = config.train.ema_decay is not None
    return weights * (1 + (config.optimizer.momentum > 0) + ema) + buffers * (1 + ema)


def disk(config: Config, classes: int, output: Path) -> CheckResult:
    """Report whether there is room for all checkpoints that a run in `output` keeps at once.

    Checkpoints that are there already count as room.
    """
    each = int(checkpoint_bytes(config, classes) * 1.02) + (1 << 20)  # as write_checkpoint requires
    every, folder = config.run.keep_every, existing_part(output)
    kept = config.train.epochs // every if every else 0
    found = [path.stat() for path in (output / "checkpoints").glob("*.pt")]
    stored = sum({file.st_ino: file.st_size for file in found}.values())  # hard links to a file count once
    needed = max(each, (4 + kept) * each - stored)
    free = shutil.disk_usage(folder).free
    names = "last, previous, best, one being written" + (f", {kept} of run.keep_every" if kept else "")
    exist = f", {size_text(stored)} of them exist" if stored else ""
    text = f"disk: {4 + kept} checkpoints of {size_text(each)} ({names}){exist}"
    text += f": {size_text(needed)} needed, {size_text(free)} free"
    if free >= needed:
        return CheckResult("ok", text)
    raising = f", raise run.keep_every ({every})" if kept else ""
    advice = f"make room{raising}, or choose another disk with --output"
    return CheckResult("error", f"{text} in {folder}; {advice}")


# ---------------------------------------------------------------------------- steps and collectives


def step(timing: StepTiming, loss: float, total: int, real: bool) -> CheckResult:
    """Report the time and memory of a step; `real` says whether it ran on images of the dataset."""
    images = f"{count(total, 'image')}{'' if real else ' of noise'}"
    text = f"step: {images}, loss {loss:.3f} before training, {time_text(timing.seconds)}"
    if not timing.available:
        return CheckResult("ok", text)
    text += f"; peak {size_text(timing.peak)} of {size_text(timing.available)} GPU memory"
    if timing.peak > 0.95 * timing.available:
        advice = "raise train.accumulation_steps or close other programs"
        return CheckResult("warning", f"{text}, little is left; {advice}")
    return CheckResult("ok", text)


def ranks(training: TrainState | None, device: torch.device, same_data: bool) -> CheckResult:
    """Report that all ranks answer, and the time of an all-reduce of all gradients."""
    group, numbers = None, 1
    if training is not None and isinstance(training.forward, DistributedDataParallel):
        group = training.forward.process_group
        numbers = sum(parameter.numel() for parameter in training.model.parameters())
    values = torch.zeros(numbers, device=device if group is not None else "cpu")
    seconds = time_text(median_seconds(lambda: dist.all_reduce(values, group=group), 3, device))
    text = f"ranks: all {world_size()} answer; an all-reduce of {size_text(values.nbytes)} takes {seconds}"
    return CheckResult("ok", f"{text}, all have the same data" if same_data else text)


# ---------------------------------------------------------------------------- learning rate and time


def learning_rates(config: Config, steps: int) -> CheckResult:
    """Report the learning rate at the start, after the warm-up, at each drop and at the end."""
    schedule, epochs = config.schedule, config.train.epochs

    def rate(epoch: int, step: int = 0) -> float:
        return learning_rate(schedule, config.optimizer.lr, epochs, epoch, step, steps)

    first = min(schedule.warmup_epochs, epochs - 1) + 1  # epoch after the warm-up
    points = [f"{rate(1):.3g} at the start"]
    if first > 1:
        points.append(f"{rate(first):.3g} after {count(first - 1, 'epoch')} of warm-up")
    if schedule.name != "cosine":
        drops = (epoch for epoch in range(first + 1, epochs + 1) if rate(epoch) != rate(epoch - 1))
        points += [f"{rate(epoch):.3g} from epoch {epoch}" for epoch in drops]
    points.append(f"{rate(epochs, steps - 1):.3g} at the end")
    return CheckResult("ok", f"learning rate: {schedule.name}; {', '.join(points)}")


def remaining_time(
    epochs: int, data: DataTimings, step: StepTiming | None, val_seconds: float | None
) -> CheckResult:
    """Report the time of the remaining `epochs`, at the pace of the slowest rank."""
    own, training, validation = None, data.training, data.validation
    if step and training and validation and val_seconds is not None:
        own = epoch_seconds(step.seconds, training), epoch_seconds(val_seconds, validation)
    all_ranks = all_gather_objects(own)
    if not step or not training or None in all_ranks:
        return CheckResult("warning", "time: no estimate because a measurement failed; fix the errors above")
    train_time, val_time = (max(times) for times in zip(*all_ranks, strict=True))
    total = duration(epochs * (train_time + val_time))
    paces = f"{training.steps:,} x step {time_text(step.seconds)}, data {time_text(training.each)}"
    return CheckResult(
        "ok",
        f"time: about {total} for {count(epochs, 'epoch')} of {time_text(train_time)} training ({paces}) and "
        f"{time_text(val_time)} validation; an estimate without startup and saving",
    )


def epoch_seconds(work: float, timing: LoaderTiming) -> float:
    """Estimate the seconds of an epoch from those of the network (`work`) and of the loader per batch.

    A GPU computes while workers prepare the next batch: the slower of the two counts. On a CPU both use the
    same cores, and without workers one waits for the other: there the times add up.
    """
    overlapped = timing.workers > 0 and timing.images.is_cuda
    each = max(work, timing.each) if overlapped else work + timing.each
    return timing.first + max(0, timing.steps - 1) * each + work


# ---------------------------------------------------------------------------- numbers as text


def count(number: int, noun: str, plural: str = "s") -> str:
    return f"{number:,} {noun}{'' if number == 1 else plural}"


def time_text(seconds: float) -> str:
    if seconds < 0.1:
        return f"{1000 * seconds:.3g} ms"
    return f"{seconds:.3g} s" if seconds < 100 else f"{seconds:,.0f} s"


def size_text(size: float) -> str:
    if size < 2**20:
        return f"{size / 2**10:.3g} KiB" if size >= 2**10 else f"{size} bytes"
    return f"{size / 2**20:,.3g} MiB" if size < 1000 * 2**20 else f"{size / 2**30:,.1f} GiB"
