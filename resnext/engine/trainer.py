"""The training loop: SGD as in the original's train.lua, stoppable and resumable at any step."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol, cast

import torch
from torch import Tensor, nn

from ..batch_plan import check_last_batch, split_batch
from ..distributed import rank, world_size
from ..models.ghost_batchnorm import frozen_running_statistics
from ..schedule import learning_rate
from .checkpoint import write_checkpoint
from .evaluator import EvalResult, count_correct, evaluate, promote_to_float32
from .logger import Logger
from .progress import StepMetrics, Timer, report_epoch, report_step
from .train_state import MetricSums, TrainState, checkpoint_content

Batch = tuple[Tensor, Tensor]  # this rank's images and labels, on the device


class TrainLoader(Protocol):
    """Training batches. Labels are class numbers, or the share of each class if images were mixed."""

    images: int  # of all ranks, per epoch
    steps: int  # per epoch

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[Batch]: ...


class ValLoader(Protocol):
    """Validation batches."""

    steps: int

    def __iter__(self) -> Iterator[Batch]: ...


def train(
    training: TrainState,
    train_loader: TrainLoader,
    val_loader: ValLoader,
    folder: Path,
    logger: Logger,
    should_stop: Callable[[], bool],
) -> bool:
    """Train for the configured number of epochs, or until told to stop; save in both cases.

    Return whether the training is complete.
    """
    progress, config = training.progress, training.config
    check_last_batch(config, train_loader.images, world_size())
    warm_up_ddp(training)
    timer = Timer(progress.seconds, progress.epoch - 1 + progress.step / train_loader.steps)
    while progress.epoch <= config.train.epochs:
        done = train_epoch(training, train_loader, folder, logger, should_stop, timer)
        result = validate(training, val_loader, logger, should_stop) if done else None
        progress.seconds = timer.total()
        if result is None:
            save(training, folder, logger)
            return False
        finish_epoch(training, result, logger, timer)
        save(training, folder, logger, checkpoint_names(training))
    return True


def train_epoch(
    training: TrainState,
    loader: TrainLoader,
    folder: Path,
    logger: Logger,
    should_stop: Callable[[], bool],
    timer: Timer,
) -> bool:
    """Train the rest of an epoch. Return False if told to stop before its end."""
    progress, config, steps = training.progress, training.config, loader.steps
    epochs, size = config.train.epochs, config.train.batch_size
    training.model.train()
    metrics = StepMetrics(progress, folder)
    timer.start_row()
    batches = timer.wait_for(loader.epoch(progress.epoch, progress.step))
    title = f"epoch {progress.epoch}/{epochs}"
    for images, labels in logger.with_bar(batches, title, steps, progress.step):
        position = progress.epoch, progress.step, steps
        rate = learning_rate(config.schedule, config.optimizer.lr, epochs, *position)
        total = min(size, loader.images - progress.step * size)
        metrics.add(train_step(training, images, labels, rate, total), total)
        timer.images += total
        progress.step += 1
        progress.global_step += 1
        last = progress.step == steps
        if last or progress.step % config.run.log_interval == 0:
            metrics.collect()
            report_step(training, logger, timer, rate, steps)
        if should_stop():
            metrics.collect()
            return False
        interval = config.run.save_interval
        if interval and not last and progress.step % interval == 0:
            metrics.collect()
            progress.seconds = timer.total()
            save(training, folder, logger)
    return True


def train_step(
    training: TrainState, images: Tensor, labels: Tensor, rate: float, total: int | None = None
) -> Tensor:
    """Take one optimizer step on a global batch; return [mean loss, top-1 hits, top-5 hits], float64 (3,).

    `images` and `labels` are this rank's share of `total` images (None: all of them), and the result is its
    share of the sums. Over all micro-batches and ranks, gradients add up to that of the mean loss over the
    global batch. Running statistics follow the first micro-batch, as on the original's first GPU. Nothing
    here waits for the device.
    """
    total = len(labels) if total is None else total
    images = images.to(memory_format=training.layout)
    for group in training.optimizer.param_groups:
        group["lr"] = rate * group["lr_scale"]
    training.optimizer.zero_grad(set_to_none=True)
    sizes = [part[rank()] for part in split_batch(total, training.config.train, world_size()) if any(part)]
    results = []
    for number, part in enumerate(zip(images.split(sizes), labels.split(sizes), strict=True), 1):
        statistics = frozen_running_statistics(training.model) if number > 1 else contextlib.nullcontext()
        with statistics, training.exchange(last=number == len(sizes)):
            loss, result = forward_loss(training, *part, total)
            # DDP averages gradients over the ranks; their sum is wanted.
            training.scaler.scale(loss * world_size()).backward()
        results.append(result)
    update_weights(training)
    return functools.reduce(torch.add, results)


def forward_loss(training: TrainState, images: Tensor, labels: Tensor, total: int) -> tuple[Tensor, Tensor]:
    """Return (loss, [loss, top-1 hits, top-5 hits]) of a micro-batch; its share of the mean over `total`."""
    if not len(images):
        return zero_loss(training, images), torch.zeros(3, dtype=torch.float64, device=images.device)
    with training.autocast():
        output = training.forward(images)
    output = promote_to_float32(output)
    loss = training.criterion(output, labels) * (len(images) / total)
    if labels.ndim == 2:  # mixed images: a hit is the class with the largest share
        labels = labels.argmax(1)
    return loss, torch.cat([loss.detach().double()[None], count_correct(output, labels).double()])


def zero_loss(training: TrainState, images: Tensor) -> Tensor:
    """Return a loss of 0 for a rank without images; its gradients of 0 take part in the exchange."""
    with training.autocast():
        pixels = images.new_zeros(2, *images.shape[1:]).to(memory_format=training.layout)
        return training.forward(pixels).sum() * 0.0


def update_weights(training: TrainState) -> None:
    """Clip the gradients if configured, update the weights, and then their average."""
    clip = training.config.train.clip_grad_norm
    if clip is not None:
        training.scaler.unscale_(training.optimizer)
        nn.utils.clip_grad_norm_(training.model.parameters(), clip)
    training.scaler.step(training.optimizer)
    training.scaler.update()
    if training.ema:
        training.ema.update_parameters(training.model)


def warm_up_ddp(training: TrainState) -> None:
    """Take one step on every rank and discard its gradients.

    After its first step DDP rebuilds its gradient buckets, which changes rounding. This way, the first steps
    of a new or resumed run already use the final buckets.
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


def validate(
    training: TrainState, loader: ValLoader, logger: Logger, should_stop: Callable[[], bool]
) -> EvalResult | None:
    """Return the exact validation result of the weights that the run saves; None if told to stop.

    What is evaluated is what is saved: all ranks use the running statistics of rank 0.
    """
    training.broadcast_buffers()
    batches = logger.with_bar(loader, "validation", loader.steps)
    return evaluate(training.evaluated_model, batches, training.autocast, should_stop, layout=training.layout)


def read_through(loader: ValLoader, logger: Logger, should_stop: Callable[[], bool]) -> None:
    """Decode all validation files once, to find a broken one now and not after the first epoch."""
    for _ in logger.with_bar(loader, "trying the validation files", loader.steps):
        if should_stop():
            return


def finish_epoch(training: TrainState, result: EvalResult, logger: Logger, timer: Timer) -> None:
    """Record and report the validation, and start the next epoch."""
    progress = training.progress
    progress.last = {"epoch": progress.epoch, **result.as_row()}
    best = progress.best
    if best is None or result.top1_error < cast(float, best["top1_error"]):
        best = progress.best = progress.last
    report_epoch(training, result, best, logger, timer)
    progress.epoch += 1
    progress.step = 0
    progress.epoch_sums = MetricSums()
    progress.seconds = timer.total()


def checkpoint_names(training: TrainState) -> tuple[str, ...]:
    """Return the names under which the state is saved after an epoch."""
    progress, every = training.progress, training.config.run.keep_every
    finished = progress.epoch - 1
    best = ("best.pt",) if progress.best and progress.best["epoch"] == finished else ()
    kept = (f"epoch_{finished:03d}.pt",) if every and finished % every == 0 else ()
    return ("last.pt", *best, *kept)


def save(training: TrainState, folder: Path, logger: Logger, names: tuple[str, ...] = ("last.pt",)) -> None:
    """Let rank 0 write the state under checkpoints/."""
    if rank() == 0:
        training.progress.rows = logger.rows
        logger.sync()
        write_checkpoint(checkpoint_content(training), folder / "checkpoints", list(names))
