"""The input benchmarks of benchmark.py: files to batches on one core, and to optimizer steps."""

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import make_shards
import numpy as np
import torch
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder

from data import shards
from data.augment import EIGENVALUES, EIGENVECTORS
from data.datasets import load_set
from data.image_folder import ImageFolderDataset, list_set
from data.loaders import make_train_loader
from resnext.config import parse_config
from resnext.device import choose_precision, configure_backends, select_device
from resnext.engine.train_state import TrainState, build_train_state
from resnext.engine.trainer import train_step

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SHARDS = "data.dataset=shards"
PLAIN = ("augment.jitter=0", "augment.lighting=0")


@dataclass(frozen=True)
class Variant:
    """A row of a table: `run`, after `prepare`, processes `images` images; `note` gets seconds per image."""

    name: str
    images: int
    run: Callable[[], object]
    note: Callable[[float], str] = lambda seconds: ""
    prepare: Callable[[], object] = lambda: None


Table = tuple[str, list[Variant]]


def pipelines(folder: str, overrides: list[str]) -> Iterator[Table]:
    """Compare reading, training input in one DataLoader worker on its own core, and in process."""
    with TemporaryDirectory() as packed:
        files = list_set(folder, "train")
        make_shards.write_shards(Path(packed), files.classes, {"train": make_shards.folder_split(files)}, 100)
        yield from readings({"class folders": files, "tar shards": shards.list_set(packed, "train")})
        yield from pipelines_of(folder, packed, overrides)


def readings(sets: dict[str, ImageFolderDataset]) -> Iterator[Table]:
    """Compare reading images at random, from the page cache and after eviction from it."""
    for place in ("page cache", "disk"):
        variants = []
        for name, files in sets.items():
            numbers = np.random.default_rng(0).permutation(len(files)).tolist()
            paths = files.shards if isinstance(files, shards.ShardDataset) else map(files.path, numbers)
            prepare = partial(evict, list(paths) if place == "disk" else [])
            variants.append(Variant(name, len(files), partial(read_all, files, numbers), prepare=prepare))
        yield f"reading at random from the {place}", variants


def read_all(files: ImageFolderDataset, numbers: list[int]) -> None:
    for number in numbers:
        files.read(number)


def evict(paths: list[str]) -> None:
    for path in paths:
        with open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def pipelines_of(folder: str, packed: str, overrides: list[str]) -> Iterator[Table]:
    cores = sorted(os.sched_getaffinity(0))
    torch.set_num_threads(1)
    base = ["data.workers=0", "train.batch_size=32", *overrides]
    os.sched_setaffinity(0, cores[:1])
    if len(cores) > 1:  # before the variants in process: workers inherit their settings
        one = [*base, "data.workers=1"]
        variants = [
            Reference(folder, workers=1).variant("torchvision: PIL, ImageFolder"),
            ours("fast", folder, [*one, *PLAIN]),
            Reference(folder, photometric=True, workers=1).variant("torchvision, color and lighting"),
            ours("fast, color and lighting", folder, one),
            ours("the same from tar shards", packed, [*one, SHARDS]),
        ]
        for variant in variants:  # forks the worker, which stays on this first core
            variant.run()
        os.sched_setaffinity(0, cores[1:])
        yield "one DataLoader worker on its own core", variants
        os.sched_setaffinity(0, cores[:1])
    yield (
        "in process, one core",
        [
            Reference(folder).variant("torchvision: PIL, ImageFolder"),
            ours("fast", folder, [*base, *PLAIN]),
            ours("fast, bilinear", folder, [*base, *PLAIN, "data.interpolation=bilinear"]),
            ours("fast, Pillow decoder", folder, [*base, *PLAIN, "data.decoder=pillow"]),
            ours("torch7", folder, [*base, *PLAIN, "data.pipeline=torch7"]),
            Reference(folder, photometric=True).variant("torchvision, color and lighting"),
            ours("fast, color and lighting", folder, base),
            ours("the same from tar shards", packed, [*base, SHARDS]),
        ],
    )
    os.sched_setaffinity(0, cores)


def ours(name: str, folder: str, overrides: list[str]) -> Variant:
    config = parse_config("", "benchmark", [f"data.dir={folder}", *overrides])
    files = load_set(config.data, "train")
    loader = make_train_loader(files, config, torch.device("cpu"), print)
    return Variant(name, len(files), lambda: [None for _ in loader.epoch(1)])


class Reference:
    """The training input of torchvision's references/classification/presets.py, optionally with color."""

    def __init__(self, folder: str, photometric: bool = False, workers: int = 0, batch_size: int = 32):
        steps = [
            transforms.RandomResizedCrop(224),
            transforms.RandomHorizontalFlip(),
            *([transforms.ColorJitter(0.4, 0.4, 0.4)] if photometric else []),
            transforms.PILToTensor(),
            transforms.ConvertImageDtype(torch.float),
            *([Lighting()] if photometric else []),
            transforms.Normalize(MEAN, STD),
        ]
        self.files = ImageFolder(Path(folder) / "train", transforms.Compose(steps))
        self.loader = DataLoader(
            self.files,
            batch_size,
            shuffle=True,
            num_workers=workers,
            pin_memory=torch.cuda.is_available(),
            persistent_workers=workers > 0,
        )

    def variant(self, name: str) -> Variant:
        return Variant(name, len(self.files), lambda: [None for _ in self.loader])


class Lighting:
    """The original's PCA color shift, per image."""

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        alphas = torch.randn(3) * 0.1 * torch.tensor(EIGENVALUES)
        return image + (torch.tensor(EIGENVECTORS) @ alphas)[:, None, None]


def end_to_end(folder: str, overrides: list[str]) -> Iterator[Table]:
    """Compare training on one batch held on the device, on files, and with torchvision's input."""
    base = [f"data.dir={folder}", "train.precision=auto", "train.batch_size=32", *overrides]
    config = parse_config("", "benchmark", base)
    device = select_device(config.run.device)
    precision = choose_precision(config.train.precision, device)
    config = replace(config, train=replace(config.train, precision=precision))
    configure_backends(precision, config.run.deterministic)
    files = list_set(folder, "train")
    training = build_train_state(config, files.classes, device, {})
    training.model.train()
    loader = make_train_loader(files, config, device, print)
    workers = loader.loader.num_workers
    reference = Reference(folder, workers=workers, batch_size=config.train.batch_size).loader
    held = next(loader.epoch(1))

    def from_reference() -> Iterator:
        for images, labels in reference:
            yield images.to(device, non_blocking=True), labels.to(device, non_blocking=True)

    sources = {
        "one batch, held on the device": lambda: iter([held] * loader.steps),
        f"files, fast, {workers} workers": lambda: loader.epoch(1),
        f"files, torchvision, {workers} workers": from_reference,
    }
    yield (
        f"{config.model.depth} layers, batch {config.train.batch_size}, files to steps",
        [steps_over(name, source, training, len(files)) for name, source in sources.items()],
    )


def steps_over(name: str, source: Callable[[], Iterator], training: TrainState, images: int) -> Variant:
    waits: list[float] = []

    def run() -> None:
        waited, begun = 0.0, time.perf_counter()
        batches = source()
        while True:
            start = time.perf_counter()
            batch = next(batches, None)
            waited += time.perf_counter() - start
            if batch is None:
                break
            train_step(training, *batch, 1e-4)
        if training.device.type == "cuda":
            torch.cuda.synchronize()
        waits.append(waited / (time.perf_counter() - begun))

    return Variant(name, images, run, lambda _: f"waits {100 * median(waits):.1f}% of the time")
