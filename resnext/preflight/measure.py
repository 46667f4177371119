"""Measure loaders, training steps, and validation for train.py --check."""

import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..batch_plan import split_batch
from ..device import device_name, explain_out_of_memory, explain_step_errors
from ..distributed import all_gather_objects, rank, world_size
from ..engine.evaluator import promote_to_float32
from ..engine.train_state import TrainState
from ..engine.trainer import TrainLoader, ValLoader, train_step
from ..errors import UserError
from ..models.ghost_batchnorm import frozen_running_statistics

MEASURING = 10.0  # seconds that the repetitions of one measurement may take


class CollectiveError(UserError):
    """An error of one rank while the others wait for it in a collective: all ranks must end."""


def rank_error() -> type[UserError]:
    """Return the class of an error that one rank raises while the others, if any, wait for it."""
    return CollectiveError if world_size() > 1 else UserError


# ---------------------------------------------------------------------------- loaders


class LoaderTiming(NamedTuple):
    """The first batch of a loader, and its pace in seconds."""

    images: Tensor  # float32 (N, 3, S, S)
    labels: Tensor
    first: float  # until the first batch
    each: float  # per further batch
    workers: int
    steps: int  # batches per epoch


class DataTimings(NamedTuple):
    """What is known of the data; a timing is None if its loader failed, or without data."""

    images: int | None = None  # in the training set
    training: LoaderTiming | None = None
    validation: LoaderTiming | None = None
    resident: object = None  # loaders of sets in memory, which keep the images on the device


def time_loader(loader: TrainLoader | ValLoader, device: torch.device) -> LoaderTiming:
    """Read the first training or validation batch, and measure the pace of those that follow.

    Each worker prepares batches on its own: the pace is known once each has delivered another one.
    """
    workers = loader.loader.num_workers if hasattr(loader, "loader") else 0
    start = time.perf_counter()
    batches = loader.epoch(1) if hasattr(loader, "epoch") else iter(loader)
    images, labels = next(batches)
    synchronize(device)
    first = now = time.perf_counter() - start
    count = 1
    while count <= max(1, workers) and now - first < MEASURING and next(batches, None) is not None:
        synchronize(device)
        now = time.perf_counter() - start
        count += 1
    each = (now - first) / (count - 1) if count > max(1, workers) else now / count
    return LoaderTiming(images, labels, first, each, workers, loader.steps)


# ---------------------------------------------------------------------------- steps


class StepTiming(NamedTuple):
    """A measured step: the time of the slowest rank, and the memory of the one closest to its limit."""

    seconds: float
    peak: int = 0  # bytes on the GPU
    available: int = 0  # bytes on the GPU that other programs do not use


def random_batch(training: TrainState, images: int) -> tuple[Tensor, Tensor]:
    """Return noise in place of this rank's share of a global batch: (images, labels)."""
    config, device = training.config, training.device
    own = sum(part[rank()] for part in split_batch(images, config.train, world_size()))
    size = config.data.train_size
    labels = torch.arange(own, device=device) % len(training.classes)
    return torch.randn(own, 3, size, size, device=device), labels


def try_micro_batch(training: TrainState, images: Tensor, labels: Tensor, total: int) -> float:
    """Run forward and backward on this rank's first micro-batch; return its loss in nats, 0 without images.

    Weights and running statistics do not change, and ranks exchange nothing. `images` is this rank's share of
    `total` images. Raise UserError if it does not fit into memory, or if the loss is not finite.
    """
    device = training.device
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    size = split_batch(total, training.config.train, world_size())[0][rank()]
    if not size:
        return 0.0
    training.model.train()
    images, labels = images[:size].to(memory_format=training.layout), labels[:size]
    with (
        explain_step_errors(training.config, device),
        training.exchange(last=False),
        frozen_running_statistics(training.model),
    ):
        with training.autocast():
            output = training.forward(images)
        loss = F.cross_entropy(promote_to_float32(output), labels)
        loss.backward()
    training.optimizer.zero_grad(set_to_none=True)
    if not loss.isfinite():
        raise UserError(
            f"train.precision: the loss of the first batch is {loss.item()} before any step; use bf16 or "
            "fp32, and check data.mean and data.std"
        )
    return loss.item()


def measure_step(training: TrainState, images: Tensor, labels: Tensor, total: int) -> StepTiming:
    """Measure optimizer steps on a global batch of `total` images, which change the weights."""
    device, rate = training.device, training.config.optimizer.lr
    cuda = device.type == "cuda"

    def step() -> Tensor:
        return train_step(training, images, labels, rate, total)

    with explain_step_errors(training.config, device, rank_error()):
        warm_up = max(all_gather_objects(time_once(step, device)))
        repetitions = 5 if cuda else max(1, min(5, int(MEASURING / warm_up)))
        seconds = statistics.median(time_once(step, device) for _ in range(repetitions))
    peak, available = 0, 0
    if cuda:
        free, _ = torch.cuda.mem_get_info(device)
        peak = torch.cuda.max_memory_reserved(device)
        available = free + torch.cuda.memory_reserved(device)
    figures = all_gather_objects(StepTiming(seconds, peak, available))
    fullest = max(figures, key=lambda figure: figure.peak / max(1, figure.available))
    return fullest._replace(seconds=max(figure.seconds for figure in figures))


def measure_validation(training: TrainState, images: Tensor) -> float:
    """Return the seconds of the network's forward pass on a validation batch."""
    if not len(images):
        return 0.0
    model, device = training.evaluated_model, training.device
    images = images.to(memory_format=training.layout)
    model.eval()

    def forward() -> None:
        with torch.inference_mode(), training.autocast():
            model(images)

    with explain_out_of_memory(
        f"train.eval_batch_size: {len(images)} validation images at once do not fit into the memory of "
        f"{device_name(device)}; lower it"
    ):
        return median_seconds(forward, 1, device)


def median_seconds(work: Callable[[], object], repetitions: int, device: torch.device) -> float:
    """Return the median time of `work`, after one run that does not count."""
    return statistics.median([time_once(work, device) for _ in range(repetitions + 1)][1:])


def time_once(work: Callable[[], object], device: torch.device) -> float:
    """Return the seconds of one run of `work`."""
    start = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - start


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
