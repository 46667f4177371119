"""DataLoader workers: how they start, how they end, and how their batches reach the device."""

import atexit
import contextlib
import ctypes
import mmap
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from resnext.config import DataConfig
from resnext.distributed import STOP_SIGNALS
from resnext.errors import UserError

from .augment import on_device

TIMEOUT = 300  # seconds to wait for a batch
PREFETCH = 2  # batches that each worker prepares in advance


class WorkerBatch(NamedTuple):
    """A batch as a worker returns it; arrays are pickled, so only the images need shared memory."""

    images: Tensor = torch.empty(0)  # (N, S, S, 3), uint8 or float32
    labels: np.ndarray = np.empty(0, np.int64)  # (N,)
    mirrored: np.ndarray = np.empty(0, np.int64)  # positions of the images to flip
    colors: np.ndarray = np.empty(0)  # float64 (N, 9), see augment.sample_color_params
    skipped: tuple[str, ...] = ()  # why files were skipped
    error: UserError | None = None


class DeviceBatch(NamedTuple):
    """A WorkerBatch on the device."""

    images: Tensor
    labels: Tensor
    mirrored: Tensor
    colors: Tensor
    skipped: tuple[str, ...]


def collate_images(images: list[np.ndarray], size: int) -> Tensor:
    """Return (N, S, S, 3) of N images; in a worker, default_collate writes it straight to shared memory."""
    if not images:
        return torch.empty(0, size, size, 3)
    return default_collate([torch.from_numpy(np.ascontiguousarray(image)) for image in images])


class BatchDataset(Dataset[WorkerBatch]):
    """Dataset whose items are whole batches: the results of `load`."""

    def __init__(self, load: Callable[..., WorkerBatch]):
        self.load = load

    def __getitem__(self, task: object) -> WorkerBatch:
        try:
            return self.load(task)
        except UserError as error:  # DataLoader would rewrap it
            return WorkerBatch(error=error)


def make_loader(
    load: Callable[..., WorkerBatch],
    tasks: Iterable[object],
    data: DataConfig,
    images: int,
    size: int,
    device: torch.device,
    persistent: bool,
) -> DataLoader[WorkerBatch]:
    """Return a DataLoader of load(task) for each task, in order: batches of up to `images` images.

    If `persistent`, the workers live on for the next epoch. Raise UserError if shared memory is too small.
    """
    local_world_size = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # set by torchrun
    workers = data.workers
    if workers is None:
        workers = max(1, len(os.sched_getaffinity(0)) // local_world_size)
    if workers:
        batch_bytes = images * size * size * 3 * (1 if data.pipeline == "fast" else 4)
        check_shared_memory(workers * local_world_size, batch_bytes)
    else:
        disable_malloc_trim()
    exiting = mmap.mmap(-1, 1)  # shared with the workers; set before multiprocessing's exit handler ends them
    atexit.register(exiting.write_byte, 1)
    return DataLoader(
        BatchDataset(load),
        batch_size=None,
        sampler=tasks,
        collate_fn=lambda batch: batch,  # the default turns arrays into tensors
        num_workers=workers,
        pin_memory=device.type == "cuda",
        # Forked workers share the list of files; they use neither CUDA nor torch's thread pools.
        multiprocessing_context="fork" if workers else None,
        prefetch_factor=PREFETCH if workers else None,
        persistent_workers=persistent and workers > 0,
        timeout=TIMEOUT if workers else 0,
        worker_init_fn=partial(init_worker, exiting),
    )


def check_shared_memory(workers: int, batch_bytes: int) -> None:
    """Raise UserError if shared memory is too small; a worker would die of a bus error."""
    needed = (workers * PREFETCH + 1) * batch_bytes
    try:
        free = shutil.disk_usage("/dev/shm").free
    except OSError:
        return
    if needed > free:
        raise UserError(
            f"data.workers: {workers} workers need {needed / 2**20:.0f} MiB of shared memory, /dev/shm has "
            f"{free / 2**20:.0f} MiB free; lower data.workers, or enlarge it (docker run --shm-size)"
        )


def disable_malloc_trim() -> None:
    """Stop glibc from returning freed memory: new pages for each image take up to a tenth of the time."""
    with contextlib.suppress(AttributeError, OSError):  # other C libraries
        for parameter in (-1, -3):  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
            ctypes.CDLL(None).mallopt(parameter, 1 << 30)


def init_worker(exiting: mmap.mmap, _: int) -> None:
    """Ignore stop signals in a worker: they reach the whole process group, but the main process stops it.

    The main process also ends its workers by SIGTERM when it exits, after it has set `exiting`.
    """
    disable_malloc_trim()
    for number in set(STOP_SIGNALS) - {signal.SIGTERM}:
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0) if exiting[0] else None)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)


@contextlib.contextmanager
def block_stop_signals() -> Iterator[None]:
    """Delay stop signals, so that a worker started here gets none before it ignores them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def raise_if_worker_died() -> Iterator[None]:
    """Raise RuntimeError if a worker died before or dies here.

    torch's own signal handler would raise it anywhere, even during a step or while a checkpoint is written.
    """

    def check(*_: object) -> None:
        torch._C._error_if_any_worker_fails()

    signal.signal(signal.SIGCHLD, check)
    try:
        check()
        yield
    except (EOFError, OSError):  # the batch is lost with its worker, whose death is noticed in a moment
        time.sleep(1)
        check()
        raise
    finally:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)


def prefetch_to_device(loader: DataLoader[WorkerBatch], device: torch.device) -> Iterator[DeviceBatch]:
    """Yield batches on the device; the copy runs while the device still computes the previous step.

    Raise UserError if a worker reports one, dies, or takes longer than TIMEOUT.
    """
    stream = torch.cuda.Stream(device) if device.type == "cuda" else None
    batches = None
    while True:
        try:
            with raise_if_worker_died():
                if batches is None:
                    with block_stop_signals():
                        batches = iter(loader)
                batch = next(batches, None)
        except RuntimeError as error:
            first = str(error).partition("\n")[0].rstrip(" .")
            if not first.startswith(
                "DataLoader"
            ):  # torch raises no class of its own for dead and slow workers
                raise
            raise UserError(f"data.workers: {first}; if memory is short, lower data.workers") from error
        if batch is None:
            return
        if batch.error:
            raise UserError(str(batch.error))  # a new one: a traceback keeps its batch, and the workers
        yield to_device(batch, device, stream)


def to_device(batch: WorkerBatch, device: torch.device, stream: torch.cuda.Stream | None) -> DeviceBatch:
    """Copy a batch to the device on `stream`, ready for the device's current stream."""
    with contextlib.nullcontext() if stream is None else torch.cuda.stream(stream):
        images = batch.images.to(device, non_blocking=True)  # pinned by the loader
        arrays = (batch.labels, batch.mirrored, batch.colors)
        labels, mirrored, colors = (on_device(array, device) for array in arrays)
    if stream is not None:
        current = torch.cuda.current_stream(device)
        current.wait_stream(stream)
        for tensor in (images, labels, mirrored, colors):
            tensor.record_stream(current)
    return DeviceBatch(images, labels, mirrored, colors, batch.skipped)
