"""Order and batches.

Small sets live on the device as one uint8 tensor: no workers, no copies. Of large ones, workers read,
decode, crop and resize whole batches to uint8, which are pinned, copied on a side stream and finished on
the device. What step k of an epoch sees is a function of (seed, epoch, k) alone, whatever the workers; of
several processes each makes only its `share` of it.
"""

import atexit
import contextlib
import ctypes
import mmap
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from resnext.config import AugmentConfig, Config, DataConfig
from resnext.errors import UserError

from .augment import (
    cifar_crop,
    erase,
    jitter,
    mirror,
    mix,
    normalize,
    on_device,
    sample_cifar_crops,
    sample_color_params,
    sample_flips,
)
from .decode import check_decoder
from .image_folder import ImageFolderDataset
from .in_memory import ArrayDataset
from .rng import RngStream, epoch_order, random_uint64, random_uniform
from .transforms import CROP_DRAWS, apply_policy, eval_images, train_image

TIMEOUT = 300  # seconds without a batch from the workers
PREFETCH = 2  # batches that each worker makes ahead
MAX_SKIPPED = 100  # broken files in a row
STOP_SIGNALS = {signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP}


Share = Callable[[int], np.ndarray]  # where in a global batch of so many images are this process's


def make_train_loader(
    image_set: ArrayDataset | ImageFolderDataset,
    config: Config,
    device: torch.device,
    warn: Callable[[str], None] = print,
    share: Share = np.arange,
) -> "InMemoryTrainLoader | FileTrainLoader":
    """Training batches of a set in memory or of files; `warn` hears of files left out."""
    if isinstance(image_set, ImageFolderDataset):
        return FileTrainLoader(image_set, config, device, warn, share)
    return InMemoryTrainLoader(image_set, config, device, share)


def make_eval_loader(
    image_set: ArrayDataset | ImageFolderDataset,
    data: DataConfig,
    batch_size: int,
    device: torch.device,
    ten_crop: bool = False,
    rank: int = 0,
    ranks: int = 1,
) -> "InMemoryEvalLoader | FileEvalLoader":
    """Every image once, in the set's order; with `ten_crop` the ten crops of an image are adjacent.

    Of several processes each has the images rank, rank + ranks, …, and as many batches as the others: the
    last may be empty.
    """
    own = np.arange(rank, len(image_set), ranks)
    steps = -(-len(image_set) // (ranks * batch_size))
    parts = [own[step * batch_size : (step + 1) * batch_size] for step in range(steps)]
    if isinstance(image_set, ImageFolderDataset):
        return FileEvalLoader(image_set, data, parts, device, ten_crop)
    if ten_crop:
        raise UserError("--ten-crop: a set in memory has no more than the crop; leave the option out")
    return InMemoryEvalLoader(image_set, data, parts, device)


class Normalization:
    """Mean and standard deviation in pixel values 0...255, float32 (3,) on the device."""

    def __init__(self, data: DataConfig, device: torch.device):
        self.mean = torch.tensor(data.mean, dtype=torch.float32, device=device)
        self.std = torch.tensor(data.std, dtype=torch.float32, device=device)


class StepIndices(NamedTuple):
    """What a process makes of a global batch."""

    ids: np.ndarray  # int64: the pictures
    kept: np.ndarray | None  # int64: those of its share; None: all


def split_epoch(
    order: np.ndarray, batch_size: int, share: Share, augment: AugmentConfig
) -> list[StepIndices]:
    """This process's part of each step of an epoch's order.

    Mixing pairs a picture with the one ahead of it in the global batch, which another process may have:
    then it is made here too, and left out at the end.
    """
    found = []
    for start in range(0, len(order), batch_size):
        ids = order[start : start + batch_size]
        own = share(len(ids))
        kept = None
        if len(own) < len(ids) and (augment.mixup or augment.cutmix):
            starts = np.flatnonzero(np.diff(own, prepend=-2) != 1)
            kept = np.flatnonzero(np.insert(np.ones(len(own), bool), starts, False))
            own = np.insert(own, starts, (own[starts] - 1) % len(ids))
        found.append(StepIndices(ids[own], kept))
    return found


def erase_and_mix(
    images: Tensor,
    labels: Tensor,
    part: StepIndices,
    augment: AugmentConfig,
    classes: int,
    seed: int,
    epoch: int,
    step: int,
) -> tuple[Tensor, Tensor]:
    """What comes after normalisation: erasing and mixing."""
    if augment.erasing:
        erase(images, seed, epoch, part.ids, augment.erasing)
    if len(images) and (augment.mixup or augment.cutmix):
        images, labels = mix(images, labels, augment, classes, seed, epoch, step)
    if part.kept is not None:
        kept = on_device(part.kept, images.device)
        images, labels = images[kept], labels[kept]
    return images, labels


# ---------------------------------------------------------------------------- sets in memory


class InMemoryTrainLoader:
    """Training batches: a fresh permutation each epoch, CIFAR augmentation, the last one smaller."""

    def __init__(
        self, image_set: ArrayDataset, config: Config, device: torch.device, share: Share = np.arange
    ):
        self.pixels = torch.from_numpy(image_set.images).to(device)
        self.labels = torch.from_numpy(image_set.labels).to(device)
        self.normalisation = Normalization(config.data, device)
        self.augment, self.seed, self.share = config.augment, config.run.seed, share
        self.batch_size, self.classes = config.train.batch_size, len(image_set.classes)
        self.images = len(image_set)
        self.steps = -(-self.images // self.batch_size)

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """The steps from `first_step`, on the device: float32 (N, 3, S, S), labels (N,) or (N, classes)."""
        augment, device = self.augment, self.pixels.device
        order = epoch_order(self.seed, epoch, self.images)
        steps = split_epoch(order, self.batch_size, self.share, augment)
        ids = np.concatenate([part.ids for part in steps])
        draws = sample_cifar_crops(self.seed, epoch, ids, augment.mirror, augment.padding)
        # One copy an epoch: the steps then touch the host for nothing.
        order, mirrored, x, y = (on_device(np.ascontiguousarray(a), device) for a in (ids, *draws))
        ends = np.cumsum([len(part.ids) for part in steps])
        for step in range(first_step, self.steps):
            part = slice(ends[step] - len(steps[step].ids), ends[step])
            picked = order[part]
            images = cifar_crop(
                self.pixels[picked],
                mirrored[part],
                x[part],
                y[part],
                augment.padding,
                self.normalisation.mean,
                self.normalisation.std,
            )
            labels = self.labels[picked]
            yield erase_and_mix(images, labels, steps[step], augment, self.classes, self.seed, epoch, step)


class InMemoryEvalLoader:
    """The images of each part, normalised only."""

    crops = 1

    def __init__(
        self, image_set: ArrayDataset, data: DataConfig, parts: list[np.ndarray], device: torch.device
    ):
        own = np.concatenate(parts) if parts else np.empty(0, np.int64)
        self.pixels = torch.from_numpy(image_set.images[own]).to(device)
        self.labels = torch.from_numpy(image_set.labels[own]).to(device)
        self.normalisation = Normalization(data, device)
        self.sizes, self.images, self.steps = [len(part) for part in parts], len(image_set), len(parts)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for pixels, labels in zip(self.pixels.split(self.sizes), self.labels.split(self.sizes), strict=True):
            yield normalize(pixels, self.normalisation.mean, self.normalisation.std), labels


# ---------------------------------------------------------------------------- files, through workers


class WorkerBatch(NamedTuple):
    """What a worker makes of a batch. Arrays come through the pipe: only the images need shared memory."""

    images: Tensor  # (N, S, S, 3), uint8 or float32
    labels: np.ndarray  # int64 (N,)
    mirrored: np.ndarray  # int64: which images to flip
    colors: np.ndarray  # float64 (N, 9), see augment.colour_draws
    skipped: tuple[str, ...]  # why files were left out
    error: str | None  # of a UserError; an exception would lose its form on the way


class FileTrainLoader:
    """Training batches of files, with the original's ImageNet augmentation and what is added to it."""

    def __init__(
        self,
        files: ImageFolderDataset,
        config: Config,
        device: torch.device,
        warn: Callable[[str], None],
        share: Share = np.arange,
    ):
        data, train = config.data, config.train
        check_decoder(data.decoder)
        self.device, self.warn, self.share = device, warn, share
        self.augment, self.seed = config.augment, config.run.seed
        self.batch_size, self.classes = train.batch_size, len(files.classes)
        self.normalisation = Normalization(data, device)
        self.images = len(files)
        self.steps = -(-self.images // self.batch_size)
        self.skipped: set[str] = set()
        self.tasks = EpochSampler()
        load = partial(load_train, files, data, config.augment, self.seed)
        images = len(share(self.batch_size))
        self.loader = make_loader(load, self.tasks, data, images, data.train_size, device, True)

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """As TrainBatches.epoch."""
        order = epoch_order(self.seed, epoch, self.images, self.augment.repeats)
        steps = split_epoch(order, self.batch_size, self.share, self.augment)
        self.tasks.tasks = [(epoch, part.ids) for part in steps[first_step:]]
        mean, std = self.normalisation.mean, self.normalisation.std
        for step, batch in enumerate(prefetch_to_device(self.loader, self.device), first_step):
            self.report(batch)
            mirror(batch.images, batch.mirrored)
            if self.augment.jitter or self.augment.lighting:
                images = jitter(batch.images, batch.colors, mean, std)
            else:
                images = normalize(batch.images, mean, std)
            yield erase_and_mix(
                images, batch.labels, steps[step], self.augment, self.classes, self.seed, epoch, step
            )

    def report(self, batch: WorkerBatch) -> None:
        """Log each broken file once; they are skipped again in every epoch."""
        for line in batch.skipped:
            if line not in self.skipped:
                self.skipped.add(line)
                self.warn(f"warning: {len(self.skipped)} broken files skipped so far: {line}")


class FileEvalLoader:
    """The files of each part, cropped and normalised only."""

    def __init__(
        self,
        files: ImageFolderDataset,
        data: DataConfig,
        parts: list[np.ndarray],
        device: torch.device,
        ten_crop: bool,
    ):
        check_decoder(data.decoder)
        self.device, self.images, self.steps = device, len(files), len(parts)
        self.crops = 10 if ten_crop else 1
        self.normalisation = Normalization(data, device)
        tasks = EpochSampler()
        tasks.tasks = [(part,) for part in parts]
        load = partial(load_eval, files, data, ten_crop)
        images = max(map(len, parts), default=0) * self.crops
        self.loader = make_loader(load, tasks, data, images, data.image_size, device, False)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for batch in prefetch_to_device(self.loader, self.device):
            yield normalize(batch.images, self.normalisation.mean, self.normalisation.std), batch.labels


def load_train(
    files: ImageFolderDataset,
    data: DataConfig,
    augment: AugmentConfig,
    seed: int,
    epoch: int,
    ids: np.ndarray,
) -> WorkerBatch:
    """A training batch, in a worker."""
    draws = random_uniform(seed, epoch, ids, CROP_DRAWS, RngStream.CROP)
    seeds = random_uint64(seed, epoch, ids, 1, RngStream.POLICY)[:, 0]
    images, shown, skipped = [], [], []
    try:
        for id, draw, policy_seed in zip(ids.tolist(), draws.tolist(), seeds.tolist(), strict=True):
            image, index = read_or_skip(files, id % len(files), draw, data, augment, skipped)
            if augment.policy:
                image = apply_policy(image, augment.policy, policy_seed)
            images.append(image)
            shown.append(index)
    except UserError as error:
        return failed(error)
    return WorkerBatch(
        collate_images(images, data.train_size),
        files.labels[shown],
        sample_flips(seed, epoch, ids, augment),
        sample_color_params(seed, epoch, ids, augment),
        tuple(skipped),
        None,
    )


def read_or_skip(
    files: ImageFolderDataset,
    index: int,
    draw: list[float],
    data: DataConfig,
    augment: AugmentConfig,
    skipped: list[str],
) -> tuple[np.ndarray, int]:
    """(crop, number) of a picture; with data.skip_broken of the next one in the list that can be decoded."""
    for _ in range(MAX_SKIPPED):
        try:
            return train_image(files.read(index), files.path(index), draw, data, augment.min_area), index
        except UserError as error:
            if not data.skip_broken:
                raise
            skipped.append(str(error))
            index = (index + 1) % len(files)
    raise UserError(
        f"data.skip_broken: {MAX_SKIPPED} files in a row cannot be decoded, the last: {skipped[-1]}"
    )


def load_eval(
    files: ImageFolderDataset, data: DataConfig, ten_crop: bool, indices: np.ndarray
) -> WorkerBatch:
    """An evaluation batch, in a worker; ten crops of an image follow each other."""
    images = []
    try:
        for index in indices.tolist():
            images += eval_images(files.read(index), files.path(index), data, ten_crop)
    except UserError as error:
        return failed(error)
    nothing = np.empty(0)
    return WorkerBatch(
        collate_images(images, data.image_size), files.labels[indices], nothing, nothing, (), None
    )


def collate_images(images: list[np.ndarray], size: int) -> Tensor:
    """(N, S, S, 3) of N pictures; in a worker right in shared memory, which default_collate takes care of."""
    if not images:
        return torch.empty(0, size, size, 3)
    return default_collate([torch.from_numpy(np.ascontiguousarray(image)) for image in images])


def failed(error: UserError) -> WorkerBatch:
    nothing = np.empty(0)
    return WorkerBatch(torch.empty(0), nothing, nothing, nothing, (), str(error))


class EpochSampler(Sampler):
    """The arguments of each batch's `load`, exchanged for every epoch."""

    def __init__(self):
        self.tasks: list[tuple] = []

    def __iter__(self) -> Iterator[tuple]:
        return iter(self.tasks)

    def __len__(self) -> int:
        return len(self.tasks)


class BatchDataset(Dataset):
    """DataLoader's view of `load`: an item is a whole batch."""

    def __init__(self, load: Callable[..., WorkerBatch]):
        self.load = load

    def __getitem__(self, task: tuple) -> WorkerBatch:
        return self.load(*task)


def make_loader(
    load: Callable[..., WorkerBatch],
    tasks: EpochSampler,
    data: DataConfig,
    images: int,
    size: int,
    device: torch.device,
    persistent: bool,
) -> DataLoader:
    """torch's DataLoader over whole batches of `images` pictures, in order."""
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # of torchrun, on this machine
    workers = data.workers
    if workers is None:
        workers = max(1, len(os.sched_getaffinity(0)) // processes)
    if workers:
        check_shared_memory(
            workers * processes, images * size * size * 3 * (1 if data.pipeline == "fast" else 4)
        )
    else:
        disable_malloc_trim()
    leaving = mmap.mmap(-1, 1)  # shared with the workers; set ahead of multiprocessing's own exit handler
    atexit.register(leaving.write_byte, 1)
    return DataLoader(
        BatchDataset(load),
        batch_size=None,
        sampler=tasks,
        collate_fn=identity,
        num_workers=workers,
        pin_memory=device.type == "cuda",
        # Forked, they share the index; they touch neither CUDA nor torch's thread pools.
        multiprocessing_context="fork" if workers else None,
        prefetch_factor=PREFETCH if workers else None,
        persistent_workers=persistent and workers > 0,
        timeout=TIMEOUT if workers else 0,
        worker_init_fn=partial(init_worker, leaving),
    )


def disable_malloc_trim() -> None:
    """glibc shall keep what is freed: taken anew for each picture, pages cost up to a tenth of the time."""
    with contextlib.suppress(AttributeError, OSError):  # other C libraries
        for parameter in (-1, -3):  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
            ctypes.CDLL(None).mallopt(parameter, 1 << 30)


def identity(batch: WorkerBatch) -> WorkerBatch:
    return batch


def init_worker(leaving: mmap.mmap, _: int) -> None:
    """Signals go to the whole group of processes, and whoever stops the run decides about its workers.

    SIGTERM is also how they are ended when the run exits, which then says so.
    """
    disable_malloc_trim()
    for number in STOP_SIGNALS - {signal.SIGTERM}:
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0) if leaving[0] else None)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)


@contextlib.contextmanager
def block_stop_signals() -> Iterator[None]:
    """Stop signals come later: a worker that is started here has none before it can handle them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def check_shared_memory(workers: int, batch_bytes: int) -> None:
    """A UserError now rather than a bus error in a worker."""
    needed = (workers * PREFETCH + 1) * batch_bytes
    try:
        free = shutil.disk_usage("/dev/shm").free
    except OSError:
        return
    if needed > free:
        raise UserError(
            f"data.workers: {workers} workers need {needed / 2**20:.0f} MiB of shared memory, /dev/shm has "
            f"{free / 2**20:.0f} free; lower data.workers, or enlarge it (docker run --shm-size)"
        )


def prefetch_to_device(loader: DataLoader, device: torch.device) -> Iterator[WorkerBatch]:
    """Batches on the device. A copy is begun while the device still works on the step before."""
    stream = torch.cuda.Stream(device) if device.type == "cuda" else None
    batches = None
    while True:
        try:
            with raise_if_worker_died():
                if batches is None:
                    with block_stop_signals():
                        batches = iter(loader)
                batch = next(batches, None)
        except RuntimeError as error:  # DataLoader: a worker was killed, or gave nothing in time
            first = str(error).partition("\n")[0].rstrip(" .")
            if not first.startswith("DataLoader"):
                raise
            raise UserError(f"data.workers: {first}; if memory is short, lower data.workers") from error
        if batch is None:
            return
        if batch.error:
            raise UserError(batch.error)
        yield to_device(batch, device, stream)


@contextlib.contextmanager
def raise_if_worker_died() -> Iterator[None]:
    """Where a worker's death is an error: torch's signal handler would raise it anywhere, in the middle
    of a step or of writing a checkpoint too."""

    def check(*_: object) -> None:
        torch._C._error_if_any_worker_fails()

    signal.signal(signal.SIGCHLD, check)
    try:
        check()  # of those that died meanwhile
        yield
    except (EOFError, OSError):  # of a batch that went with its worker, whose end is about to be known
        time.sleep(1)
        check()
        raise
    finally:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)


def to_device(batch: WorkerBatch, device: torch.device, stream: Any) -> WorkerBatch:
    """The same as tensors on the device, ready for its current stream."""
    with contextlib.nullcontext() if stream is None else torch.cuda.stream(stream):
        tensors = {name: on_device(getattr(batch, name), device) for name in ("labels", "mirrored", "colors")}
        tensors["images"] = batch.images.to(device, non_blocking=True)  # pinned by the loader
    if stream is not None:
        current = torch.cuda.current_stream(device)
        current.wait_stream(stream)
        for tensor in tensors.values():
            tensor.record_stream(current)
    return batch._replace(**tensors)
