"""What can be known before a training is begun: space, memory, time, the learning rates (train.py --check).

A day on a busy machine should not end with a full disk or the last batch that does not fit. Each function
looks at one thing and tells a `Finding`; nothing here writes a file. Of several processes all call the
same functions in the same order, and the first one prints.
"""

import math
import os
import shlex
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from .batch_plan import check_last_batch, check_world_size, split_batch
from .config import Config
from .device import (
    choose_precision,
    configure_backends,
    device_name,
    explain_out_of_memory,
    explain_step_errors,
    select_device,
)
from .distributed import all_gather_objects, broadcast_from_rank0, rank, world_size
from .engine.evaluator import promote_to_float32
from .engine.logger import environment
from .engine.resume import make_training, read_start
from .engine.run_directory import existing_part, resume_source
from .engine.train_state import TrainProgress, TrainState
from .engine.trainer import train_step
from .errors import UserError
from .models.ghost_batchnorm import frozen_running_statistics
from .models.resnext import build_model
from .schedule import learning_rate
from .weights.load import LuaCheckpoint

LONG_STEP = 20.0  # seconds: on a CPU a longer step is estimated from a part of the batch
MEASURING = 10.0  # seconds that repetitions of a measurement may take
CURVE_ROWS, CURVE_COLUMNS = 8, 72
USUAL_CLASSES = {"cifar10": 10, "cifar100": 100, "glyphs": 10, "folder": 1000}


# ---------------------------------------------------------------------------- findings


class CheckResult(NamedTuple):
    """One line: `kind` is ok, warning or error; of the last two the text names the remedy."""

    kind: str
    text: str
    block: tuple[str, ...] = ()  # lines drawn below


class CollectiveError(UserError):
    """Of one process, while others wait for it in an exchange: all must end."""


def error_of_one() -> type[UserError]:
    """What a process raises for which the others, if there are any, wait."""
    return CollectiveError if world_size() > 1 else UserError


class CheckReport:
    """Prints findings as they come, and counts them; the same count in all processes."""

    def __init__(self):
        self.found: list[CheckResult] = []

    def add(self, *own: CheckResult) -> None:
        """Findings of this process; of the others only what is wrong is told, and nothing twice."""
        for number, findings in enumerate(all_gather_objects(own)):
            for finding in findings:
                if (number and finding.kind == "ok") or finding in self.found:
                    continue
                self.found.append(finding)
                print_safe(f"{finding.kind:<8} {f'process {number}: ' if number else ''}{finding.text}")
                for line in finding.block:
                    print_safe(f"{'':<8} {line}")

    def attempt(self, function: Callable[[], Any]) -> Any:
        """What `function` returns; None where it raises a UserError, which becomes a finding.

        The function may wait for other processes only if its errors are those of all of them.
        """
        value, problems = None, []
        try:
            value = function()
        except CollectiveError:
            raise
        except UserError as error:
            problems = [CheckResult("error", str(error))]
        self.add(*problems)
        return value

    def finish(self, command: str) -> int:
        """The last line; returns the exit status: 0, or 2 after an error."""
        kinds = [finding.kind for finding in self.found]
        errors, warnings = kinds.count("error"), kinds.count("warning")
        counts = f"{_count(errors, 'error')}, {_count(warnings, 'warning')}"
        advice = "mend the errors, then check again" if errors else f"start with: {command}"
        print_safe(f"{'not ready' if errors else 'ready'}: {counts}; {advice}")
        return 2 if errors else 0


def print_safe(text: str) -> None:
    """A line on the first process's console."""
    if rank() == 0:
        print(" ".join(text.splitlines()), flush=True)


def run_on_all_ranks(function: Callable[[], Any]) -> list[Any]:
    """The results of a `function` that waits for no other process; a UserError of any is raised in all."""
    value, problem = None, None
    try:
        value = function()
    except UserError as error:
        problem = str(error)
    results = all_gather_objects((value, problem))
    for number, (_, problem) in enumerate(results):
        if problem is not None:
            raise UserError(f"process {number}: {problem}" if number else problem)
    return [value for value, _ in results]


def start_command(arguments: Sequence[str]) -> str:
    """The command line that begins the training: the one of the check, without --check."""
    # argparse takes --che for --check; --c could be --config.
    kept = [word for word in arguments if not (len(word) > 3 and "--check".startswith(word))]
    program = ["python"]
    if dist.is_initialized():
        nodes, processes = int(os.environ.get("GROUP_WORLD_SIZE", "1")), os.environ["LOCAL_WORLD_SIZE"]
        program = ["torchrun", *([f"--nnodes={nodes}"] if nodes > 1 else []), f"--nproc-per-node={processes}"]
    return shlex.join([*program, "train.py", *kept])


# ---------------------------------------------------------------------------- data


class LoaderTiming(NamedTuple):
    """What came out of a loader; times in seconds."""

    images: Tensor
    labels: Tensor
    first: float  # until the first batch
    each: float  # for every further one
    workers: int
    steps: int  # batches of an epoch


class Data(NamedTuple):
    """What is known of the data; `readings` are None where a loader failed."""

    images: int | None  # of the training set
    training: LoaderTiming | None
    validation: LoaderTiming | None
    resident: Any  # loaders of sets in memory, which keep these on the device
    shortage: str | None  # why workers cannot be started


def load_present(report: CheckReport, config: Config, load: Callable[[Config], Any]) -> Any:
    """`load` of a configuration that downloads nothing; a missing download is a warning, and None."""
    data = config.data
    try:
        return load(replace(config, data=replace(data, download=False)))
    except UserError:
        if not (data.download and data.dir and data.dataset.startswith("cifar")):
            raise
    text = f"data.dir {data.dir}: {data.dataset} is missing or not whole, the training will download it; "
    report.add(CheckResult("warning", f"{text}give --data DIR where it is to have its pictures checked now"))
    return None


def check_data(
    report: CheckReport, config: Config, sets: tuple | None, make: Callable[..., tuple], device: torch.device
) -> Data:
    """Report on the sets, as load_sets of train.py found them, and on the first batches of their loaders."""
    if sets is None:
        return Data(None, None, None, None, None)
    train_set, val_set, _ = sets
    report.add(*sets_findings(config, train_set, val_set))
    report_notes(report, [*train_set.notes, *val_set.notes])
    shareable = config
    try:
        check_world_size(config.train, world_size())
    except UserError:  # told when the network is made
        shareable = replace(config, train=replace(config.train, bn_group=None))
    broken: list[str] = []

    def loaders(config: Config) -> tuple[Any, Any]:
        return make(config, train_set, val_set, device, broken.append)

    made, shortage = report.attempt(lambda: make_anyhow(loaders, shareable)) or ((None, None), None)
    readings = []
    for name, batches in zip(("training", "validation"), made, strict=True):
        reading = report.attempt(lambda batches=batches: batches and read_batches(batches, device))
        report.add(*(batch_findings(name, reading, config) if reading else ()))
        readings.append(reading)
    if config.data.pipeline != "memory":
        decoded = report.attempt(lambda: made[1] and decode_all(made[1]))
        if all(all_gather_objects(decoded)):  # each process has its share of the files
            report.add(CheckResult("ok", f"validation files: all {len(val_set):,} can be decoded"))
    report_notes(report, broken[-1:])  # the last counts them
    resident = made if config.data.pipeline == "memory" else None  # of others the workers end here
    return Data(len(train_set), *readings, resident, shortage)


def report_notes(report: CheckReport, lines: list[str]) -> None:
    """Warnings among the lines that a training would write into its log."""
    prefix = "warning: "
    report.add(
        *(CheckResult("warning", line.removeprefix(prefix)) for line in lines if line.startswith(prefix))
    )


def likely_classes(config: Config, start: Any) -> tuple[str, ...]:
    """Names of as many classes as there probably are, where there is no data."""
    if isinstance(start, dict):
        return tuple(start["classes"])
    if isinstance(start, LuaCheckpoint):
        return tuple(map(str, range(start.model.fc.out_features)))
    usual = len(config.data.characters or "") or USUAL_CLASSES[config.data.dataset]
    return tuple(map(str, range(config.model.classes or usual)))


def make_anyhow(make: Callable[[Config], Any], config: Config) -> tuple[Any, str | None]:
    """(loaders, None), or where workers find no room (loaders without workers, the error)."""
    try:
        return make(config), None
    except UserError as error:
        if not str(error).startswith("data.workers"):
            raise
        return make(replace(config, data=replace(config.data, workers=0))), str(error)


def read_batches(batches: Any, device: torch.device) -> LoaderTiming:
    """The first training or validation batch, and the pace of those that follow.

    Each worker makes a batch by itself: the pace is known once each has made another one.
    """
    workers = batches.loader.num_workers if hasattr(batches, "loader") else 0
    start = time.perf_counter()
    iterator = batches.epoch(1) if hasattr(batches, "epoch") else iter(batches)
    images, labels = next(iterator)
    synchronise(device)
    first = now = time.perf_counter() - start
    count = 1
    while count <= max(1, workers) and now - first < MEASURING and next(iterator, None) is not None:
        synchronise(device)
        now = time.perf_counter() - start
        count += 1
    each = (now - first) / (count - 1) if count > max(1, workers) else now / count
    return LoaderTiming(images, labels, first, each, workers, batches.steps)


def decode_all(batches: Any) -> bool:
    """True where every validation file can be decoded; a UserError for the first that cannot."""
    for _ in batches:
        pass
    return True


def sets_findings(config: Config, train_set: Any, val_set: Any) -> list[CheckResult]:
    """How many images and classes there are, and whether some class is left without."""
    counts = [np.bincount(part.labels, minlength=len(train_set.classes)) for part in (train_set, val_set)]
    fewest, most = counts[0].min(), counts[0].max()
    each = f"{fewest:,} to {most:,}" if most > fewest else f"{most:,}"
    text = (
        f"data: {config.data.dataset}, {len(train_set):,} training and {len(val_set):,} validation images, "
        f"{_count(len(train_set.classes), 'class', 'es')} of {each} for training"
    )
    findings = [CheckResult("ok", text)]
    for count, key in zip(counts, ("train_images", "val_images"), strict=True):
        empty = np.flatnonzero(count == 0)
        if len(empty) and getattr(config.data, key) is not None:  # else the data set itself has said so
            text = f"{_count(len(empty), 'class', 'es')} without any ({train_set.classes[empty[0]]})"
            limit = getattr(config.data, key)
            findings.append(CheckResult("warning", f"data.{key}: {limit} images leave {text}; raise it"))
    return findings


def batch_findings(name: str, reading: LoaderTiming, config: Config) -> list[CheckResult]:
    """Shape, time and values of the first batch; `name` is training or validation."""
    images = reading.images
    if not len(images):  # of several processes one may have none
        return []
    shape = " x ".join(map(str, images.shape))
    workers = f"{_count(reading.workers, 'worker')}" if reading.workers else "no workers"
    values = images.double()
    mean, deviation = values.mean().item(), values.std().item()
    text = f"first {name} batch: {shape} in {_seconds(reading.first)}, {workers}"
    if not math.isfinite(mean) or not math.isfinite(deviation):
        return [
            CheckResult("error", f"{text}; it has values that are not finite: correct data.mean and data.std")
        ]
    text += f"; mean {mean:.2f}, deviation {deviation:.2f}"
    if abs(mean) > 3:
        return [
            CheckResult(
                "warning", f"{text}: far from 0 and 1; data.mean and data.std are in pixel values 0...255"
            )
        ]
    if images.min() == images.max():
        folder = config.data.dir
        look = shlex.join(["python", "scripts/check_data.py", folder]) if folder else "data.mean, data.std"
        return [CheckResult("warning", f"{text}: all pixels are the same; look at the pictures ({look})")]
    return [CheckResult("ok", text)]


def shared_memory_finding(config: Config, data: Data) -> CheckResult:
    """Whether the workers have found room for their batches."""
    if data.shortage:
        return CheckResult("error", data.shortage)
    if data.images is None and config.data.pipeline != "memory" and config.data.workers != 0:
        return CheckResult("warning", "shared memory: not checked without data; mend data.dir first")
    workers = max((reading.workers for reading in (data.training, data.validation) if reading), default=0)
    if not workers:
        return CheckResult("ok", "shared memory: not needed, there are no workers")
    try:
        free = f", {_size(shutil.disk_usage('/dev/shm').free)} free in /dev/shm"
    except OSError:
        free = ""
    return CheckResult("ok", f"shared memory: enough for {_count(workers, 'worker')} of each process{free}")


# ---------------------------------------------------------------------------- disk


def checkpoint_bytes(config: Config, classes: int) -> int:
    """Bytes of the tensors in a checkpoint: weights, buffers, momentum, average."""
    with torch.device("meta"):  # shapes only
        model = build_model(config.model, classes)
    weights = sum(parameter.nbytes for parameter in model.parameters())
    buffers = sum(buffer.nbytes for buffer in model.buffers())
    average = config.train.ema_decay is not None
    return weights * (1 + (config.optimizer.momentum > 0) + average) + buffers * (1 + average)


def output_finding(output: Path, source: Path | None) -> CheckResult:
    """Where the run goes, once that was found possible."""
    return CheckResult(
        "ok", f"output: {output}, " + (f"going on from {source}" if source else "starting anew")
    )


def space(config: Config, classes: int, output: Path, existing: Path) -> CheckResult:
    """Room for all checkpoints that a run in `output` will have at once.

    `existing` is the folder, itself or above it, that is there. Checkpoints of a run that goes on count.
    """
    # The margin of checkpoint.write_checkpoint.
    each = int(checkpoint_bytes(config, classes) * 1.02) + (1 << 20)
    every = config.run.keep_every
    kept = config.train.epochs // every if every else 0
    stored = {
        (status.st_dev, status.st_ino): status.st_size  # names of the same file count once
        for status in (path.stat() for path in (output / "checkpoints").glob("*.pt"))
    }
    needed = max(each, (4 + kept) * each - sum(stored.values()))
    free = shutil.disk_usage(existing).free
    files = f"{4 + kept} checkpoints of {_size(each)} (last, previous, best, one being written"
    files += f", {kept} of run.keep_every)" if kept else ")"
    if stored:
        files += f", of which {_size(sum(stored.values()))} are there"
    if free < needed:
        raising = f", raise run.keep_every ({every})" if kept else ""
        return CheckResult(
            "error",
            f"disk: {files}: {_size(needed)} needed, {_size(free)} free in {existing}; make room{raising}, "
            "or choose another disk with --output",
        )
    return CheckResult("ok", f"disk: {files}: {_size(needed)} needed, {_size(free)} free")


# ---------------------------------------------------------------------------- a step


def check_training(
    report: CheckReport, config: Config, training: TrainState | None, data: Data, device: torch.device
) -> None:
    """Report on steps of a training made for that, on the exchange between processes, on rates and time."""
    progress = training.progress if training else TrainProgress()
    steps = -(-data.images // config.train.batch_size) if data.images else 100
    step, seconds = None, None
    if training and data.images:
        report.attempt(lambda: check_last_batch(config, data.images, world_size()))
    if training:
        epochs, epoch = config.train.epochs, min(progress.epoch, config.train.epochs)
        rate = learning_rate(config.schedule, config.optimizer.lr, epochs, epoch, progress.step, steps)
        total = min(config.train.batch_size, data.images or config.train.batch_size)
        images, labels = data.training[:2] if data.training else noise(training, total)
        step = report.attempt(lambda: measure_step(training, images, labels, total, rate))
        report.add(*([step_finding(step, total, data.training is not None)] if step else []))
        seconds = report.attempt(
            lambda: data.validation and measure_validation(training, data.validation.images)
        )
    if dist.is_initialized():
        report.add(exchange_finding(training, device, data.images is not None))
    report.add(curve_finding(config, steps))
    report.add(time_finding(config, step, seconds, data, progress.epoch - 1))


class Step(NamedTuple):
    """A measured step; the slowest process's figures."""

    seconds: float
    loss: float  # nats, of the first images, before any step
    part: int | None  # estimated from so many images; None: measured
    peak: int  # bytes on the GPU
    available: int  # bytes of it that are not another program's


def noise(training: TrainState, images: int) -> tuple[Tensor, Tensor]:
    """A stand-in for this process's share of a batch: (images, labels)."""
    config, device = training.config, training.device
    own = sum(part[rank()] for part in split_batch(images, config.train, world_size()))
    size = config.data.train_size
    labels = torch.arange(own, device=device) % len(training.classes)
    return torch.randn(own, 3, size, size, device=device), labels


def measure_step(training: TrainState, images: Tensor, labels: Tensor, total: int, rate: float) -> Step:
    """The time of an optimiser step on this process's share of a batch of `total` images, and its memory.

    The weights of `training` are changed. What does not fit is a UserError.
    """
    device = training.device
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    training.model.train()
    # Alone first: a process that runs out of memory inside an exchange would keep the others waiting.
    tried = run_on_all_ranks(lambda: try_part(training, images, labels, total))
    loss = next((loss for loss, _, _ in tried if loss is not None), math.nan)
    if not math.isfinite(loss):
        raise UserError(
            f"the loss of the first batch is {loss}, before any step; use train.precision bf16 or fp32, and "
            "check data.mean and data.std"
        )
    part, seconds = max(part for _, part, _ in tried), max(seconds for _, _, seconds in tried)
    if not cuda and seconds > LONG_STEP:
        return Step(seconds, loss, part, 0, 0)
    repetitions = 5 if cuda else max(1, min(5, int(MEASURING / max(seconds, 1e-3))))
    with explain_step_errors(training.config, device, error_of_one()):
        times = repeated(lambda: train_step(training, images, labels, rate, total), repetitions, device)
    peak, available = 0, 0
    if cuda:
        free, _ = torch.cuda.mem_get_info(device)
        peak = torch.cuda.max_memory_reserved(device)
        available = free + torch.cuda.memory_reserved(device)
    figures = all_gather_objects((statistics.median(times), peak, available))
    _, peak, available = max(figures, key=lambda figure: figure[1] / max(1, figure[2]))
    return Step(max(seconds for seconds, _, _ in figures), loss, None, peak, available)


def try_part(
    training: TrainState, images: Tensor, labels: Tensor, total: int
) -> tuple[float | None, int, float]:
    """(loss, number of images, seconds for all of this process's images) of a forward and backward pass.

    On a GPU with as many images as are there at once; on a CPU with as many as take a few seconds.
    Gradients are not exchanged. Loss is None of a process without images.
    """
    train, ranks = training.config.train, world_size()
    images = images.to(memory_format=training.layout)
    most = split_batch(total, train, ranks)[0][rank()]
    if not most:
        return None, 0, 0.0
    losses = []

    def work(number: int) -> None:
        with training.exchange(last=False), frozen_running_statistics(training.model):
            with training.autocast():
                output = training.forward(images[:number])
            loss = F.cross_entropy(promote_to_float32(output), labels[:number])
            loss.backward()
        training.optimizer.zero_grad(set_to_none=True)
        losses.append(loss.detach())

    # Each BatchNorm group needs two images; a compiled network is compiled for each number of them.
    groups = train.batch_size // train.accumulation_steps // train.bn_group // ranks if train.bn_group else 1
    few = most if train.compile else min(most, max(4, 2 * groups))
    with explain_step_errors(training.config, training.device):
        number, seconds = grow(work, few, most, training.device)
    return losses[0].item(), number, seconds / number * len(images)


def measure_validation(training: TrainState, images: Tensor) -> float:
    """Seconds of the network's forward pass over a validation batch; on a CPU perhaps estimated."""
    if not len(images):
        return 0.0
    model, device = training.evaluated_model, training.device
    images = images.to(memory_format=training.layout)
    model.eval()

    def work(number: int) -> None:
        with torch.inference_mode(), training.autocast():
            model(images[:number])

    with explain_out_of_memory(
        f"train.eval_batch_size: {len(images)} validation images at once do not fit into the memory of "
        f"{device_name(device)}; lower it"
    ):
        number, seconds = grow(work, min(4, len(images)), len(images), device)
    return seconds / number * len(images)


def grow(work: Callable[[int], object], few: int, most: int, device: torch.device) -> tuple[int, float]:
    """(images, seconds) of `work` on ever more images, from few to most or until they take a few seconds.

    On a GPU on all of them at once. The first time prepares memory and kernels, or compiles, and is not
    counted; unless it takes so long that fewer images have to do.
    """
    number = few if device.type == "cpu" else most
    first, seconds = timed(work, number, device), 0.0
    while first < MEASURING or number == most:
        seconds = timed(work, number, device)
        if number == most or seconds > MEASURING / 4:
            break
        number = min(most, 2 * number)
    return number, seconds or first


def step_finding(step: Step, total: int, real: bool) -> CheckResult:
    """Time and memory of a step; `real` says whether it was on pictures."""
    what = f"step: {_count(total, 'image')}{'' if real else ' of noise'}, loss {step.loss:.3f} at the start, "
    if step.part is not None:
        what += f"about {_seconds(step.seconds)}, estimated from {_count(step.part, 'image')}"
    else:
        what += _seconds(step.seconds)
    if not step.available:
        return CheckResult("ok", what)
    what += f"; {_size(step.peak)} of {_size(step.available)} GPU memory at most"
    if step.peak > 0.95 * step.available:
        return CheckResult(
            "warning", f"{what}, little is left: raise train.accumulation_steps or close other programs"
        )
    return CheckResult("ok", what)


def repeated(work: Callable[[], object], times: int, device: torch.device) -> list[float]:
    """Seconds of each of so many runs of `work`; after one that does not count where there are several."""
    return [timed(lambda _: work(), 0, device) for _ in range(times + (times > 1))][-times:]


def timed(work: Callable[[int], object], number: int, device: torch.device) -> float:
    """Seconds of `work(number)`."""
    start = time.perf_counter()
    work(number)
    synchronise(device)
    return time.perf_counter() - start


def synchronise(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# ---------------------------------------------------------------------------- processes


def exchange_finding(training: TrainState | None, device: torch.device, same_data: bool) -> CheckResult:
    """That all processes answer, and how long an exchange of as many numbers as there are weights takes."""
    group, numbers = None, 1
    if training is not None and training.exchanges:
        group = training.forward.process_group
        numbers = sum(parameter.numel() for parameter in training.model.parameters())
    values = torch.zeros(numbers, device=device if group is not None else "cpu")
    seconds = statistics.median(repeated(lambda: dist.all_reduce(values, group=group), 3, device))
    text = f"processes: all {world_size()} answer; a sum of {_size(values.nbytes)} takes {_seconds(seconds)}"
    return CheckResult("ok", f"{text}, each has the same data" if same_data else text)


# ---------------------------------------------------------------------------- learning rate


def curve_finding(config: Config, steps: int) -> CheckResult:
    """The learning rate over the whole training of `steps` an epoch, drawn in plain characters."""
    schedule, base, epochs = config.schedule, config.optimizer.lr, config.train.epochs

    def rate(done: int) -> float:
        return learning_rate(schedule, base, epochs, done // steps + 1, done % steps, steps)

    total = epochs * steps
    ends = [rate(step) for epoch in range(epochs) for step in (epoch * steps, (epoch + 1) * steps - 1)]
    lowest, highest = min(ends), max(ends)
    labels = [f"{highest:.3g}", *[""] * (CURVE_ROWS - 2), f"{lowest:.3g}" if lowest < highest else ""]
    margin = max(map(len, labels))
    width = CURVE_COLUMNS - margin - 2
    rates = [rate(column * (total - 1) // (width - 1)) for column in range(width)]
    rows = draw(rates, lowest, highest)
    first, last = "epoch 1", f"epoch {epochs}"
    block = [f"{label:>{margin}} |{row}".rstrip() for label, row in zip(labels, rows, strict=True)]
    block.append(f"{'':>{margin}} +{'-' * width}")
    block.append(f"{'':>{margin}}  {first}{last:>{width - len(first)}}")
    warmup = f", {_count(schedule.warmup_epochs, 'epoch')} of warm-up" if schedule.warmup_epochs else ""
    text = f"learning rate: {schedule.name}{warmup}; {ends[0]:.3g} at the start, {highest:.3g} at most, "
    return CheckResult("ok", f"{text}{ends[-1]:.3g} at the end", tuple(block))


def draw(values: Sequence[float], lowest: float, highest: float) -> list[str]:
    """Values as CURVE_ROWS rows of characters, the highest first; a jump is joined by a line."""
    span = (highest - lowest) or 1.0
    levels = [round((value - lowest) / span * (CURVE_ROWS - 1)) for value in values]
    if highest == lowest:
        levels = [CURVE_ROWS - 1] * len(values)
    grid = [[" "] * len(values) for _ in range(CURVE_ROWS)]
    for column, level in enumerate(levels):
        before = levels[max(0, column - 1)]
        for between in range(min(before, level) + 1, max(before, level)):
            grid[between][column] = "|"
        grid[level][column] = "*"
    return ["".join(row) for row in reversed(grid)]


# ---------------------------------------------------------------------------- time


def time_finding(
    config: Config, step: Step | None, validation: float | None, data: Data, done: int
) -> CheckResult:
    """The time of the epochs that are not `done` yet, in h:mm:ss, from what was measured in all processes.

    A GPU works while workers make the next batch: the slower of the two counts. On a CPU both want the
    same cores, and without workers one waits for the other: there the times add up.
    """
    epochs = config.train.epochs - done
    readings, own = (data.training, data.validation), None
    if step and validation is not None and all(readings):
        overlapped = [reading.workers > 0 and reading.images.is_cuda for reading in readings]
        pairs = zip((step.seconds, validation), readings, overlapped, strict=True)
        own = [
            reading.first
            + max(0, reading.steps - 1) * (max(work, reading.each) if side_by_side else work + reading.each)
            + work
            for work, reading, side_by_side in pairs
        ]
    everyones = all_gather_objects(own)
    if None in everyones:
        return CheckResult(
            "warning", "time: not estimated, as not all of it could be measured; mend what is said above"
        )
    training, validating = (max(times) for times in zip(*everyones, strict=True))
    seconds = epochs * (training + validating)
    return CheckResult(
        "ok",
        f"time: about {hours(seconds)} for {_count(epochs, 'epoch')} of {_seconds(training)} training "
        f"({readings[0].steps:,} x step {_seconds(step.seconds)}, data {_seconds(readings[0].each)}) and "
        f"{_seconds(validating)} validation; an estimate, without start-up and saving",
    )


def hours(seconds: float) -> str:
    """Seconds as h:mm:ss, however many hours."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"


# ---------------------------------------------------------------------------- numbers as text


def _count(number: int, noun: str, plural: str = "s") -> str:
    return f"{number:,} {noun}{'' if number == 1 else plural}"


def _seconds(seconds: float) -> str:
    if seconds < 0.1:
        return f"{1000 * seconds:.3g} ms"
    return f"{seconds:.3g} s" if seconds < 100 else f"{seconds:,.0f} s"


def _size(count: float) -> str:
    if count < 2**20:
        return f"{count / 2**10:.3g} KiB" if count >= 2**10 else f"{count} bytes"
    return f"{count / 2**20:,.3g} MiB" if count < 1000 * 2**20 else f"{count / 2**30:,.1f} GiB"


def check(
    config: Config, output: Path, resume: str | None, load_sets: Callable, make_batches: Callable
) -> int:
    """Try all that a training needs, and begin none; returns the exit status.

    `resume` is --resume; the other two are data.training's functions.
    """
    device = select_device(config.run.device)
    report = CheckReport()

    def beginning() -> tuple[Path | None, Config, Any, list[str]]:
        source = broadcast_from_rank0(lambda: resume_source(resume, output))
        return source, *read_start(config, source, device)

    found = report.attempt(beginning)
    source, config, start, notes = found or (None, config, None, [])
    precision = choose_precision(config.train.precision, device)
    config = replace(config, train=replace(config.train, precision=precision))
    configure_backends(precision, config.run.deterministic)
    sets = report.attempt(lambda: load_present(report, config, lambda config: load_sets(config, start)))
    data = check_data(report, config, sets, make_batches, device)
    classes = sets[0].classes if sets else likely_classes(config, start)
    if found:
        report.add(output_finding(output, source))
    place = existing_part(output)
    report.attempt(
        lambda: report.add(broadcast_from_rank0(lambda: space(config, len(classes), output, place)))
    )
    report.add(shared_memory_finding(config, data))
    versions = environment(device) | {"data": sets[2] if sets else "unknown"}

    def made() -> tuple[Any, list[str]]:
        with explain_step_errors(config, device, error_of_one()):
            return make_training(config, classes, data.images, device, versions, source, start)

    training, changes = report.attempt(made) or (None, [])
    report_notes(report, notes + changes)
    check_training(report, config, training, data, device)
    return report.finish(start_command(sys.argv[1:]))
