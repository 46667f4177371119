"""What benchmark.py measures of the input: files to batches, on one core, and on to optimiser steps."""

import io
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms
from torchvision.datasets import ImageFolder

from data.image_folder import ImageFolderDataset, list_set
from data.in_memory import ArrayDataset
from data.loaders import FileTrainLoader, InMemoryTrainLoader, make_train_loader
from resnext.config import Config, parse_config
from resnext.device import choose_precision, configure_backends, select_device
from resnext.engine.train_state import build_train_state
from resnext.engine.trainer import train_step

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
PLAIN = ("augment.jitter=0", "augment.lighting=0")


@dataclass(frozen=True)
class Variant:
    """One row of a table: `run` handles `images` pictures; `note` is made from seconds per picture."""

    name: str
    images: int
    run: Callable[[], object]
    note: Callable[[float], str] = lambda seconds: ""


Table = tuple[str, list[Variant]]


# ---------------------------------------------------------------------------- files, on one core


def pipelines(folder: str, overrides: list[str]) -> Iterator[Table]:
    """In one loader worker on a core of its own; then in process on one core."""
    cores = sorted(os.sched_getaffinity(0))
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        small = reencode(Path(folder), Path(scratch))
        base = ["data.workers=0", "train.batch_size=32", *overrides]
        os.sched_setaffinity(0, cores[:1])
        if len(cores) > 1:  # ahead of what is done in process, whose settings workers would inherit
            variants = in_worker(folder, str(small), base)
            for variant in variants:  # forks the worker, which stays on this first core
                variant.run()
            os.sched_setaffinity(0, cores[1:])
            yield "one loader worker on a core of its own", variants
            os.sched_setaffinity(0, cores[:1])
        yield "in process, one core", in_process(folder, str(small), base)
        yield "reading and decoding alone, one core", decoding(folder)
        os.sched_setaffinity(0, cores)


def in_process(folder: str, small: str, base: list[str]) -> list[Variant]:
    reference = Reference(folder)
    colors = Reference(folder, photometric=True)
    variants = [
        reference.variant("torchvision's way: PIL, ImageFolder"),
        ours("fast", folder, [*base, *PLAIN]),
        ours("fast, bilinear", folder, [*base, *PLAIN, "data.interpolation=bilinear"]),
        ours("fast, Pillow decoder", folder, [*base, *PLAIN, "data.decoder=pillow"]),
        ours("torch7", folder, [*base, *PLAIN, "data.pipeline=torch7"]),
        Reference(small).variant("torchvision's way, files of 500 px, q90"),
        ours("fast, files of 500 px, q90", small, [*base, *PLAIN]),
        colors.variant("torchvision's way, colours and lighting"),
        ours("fast, colours and lighting", folder, base),
    ]
    return variants + timm_variants(folder)


def in_worker(folder: str, small: str, base: list[str]) -> list[Variant]:
    one = [*base, "data.workers=1"]
    return [
        Reference(folder, workers=1).variant("torchvision's way: PIL, ImageFolder"),
        ours("fast", folder, [*one, *PLAIN]),
        Reference(small, workers=1).variant("torchvision's way, files of 500 px, q90"),
        ours("fast, files of 500 px, q90", small, [*one, *PLAIN]),
        Reference(folder, photometric=True, workers=1).variant("torchvision's way, colours and lighting"),
        ours("fast, colours and lighting", folder, one),
    ]


def ours(name: str, folder: str, overrides: list[str]) -> Variant:
    config = parse_config("", "benchmark", [f"data.dir={folder}", *overrides])
    files = list_set(folder, "train")
    stream = FileTrainLoader(files, config, torch.device("cpu"), print)
    return Variant(name, len(files), lambda: [None for _ in stream.epoch(1)])


class Reference:
    """torchvision's reference training input (references/classification/presets.py), and with colours."""

    def __init__(self, folder: str, photometric: bool = False, workers: int = 0):
        colors = [transforms.ColorJitter(0.4, 0.4, 0.4)] if photometric else []
        lighting = [Lighting()] if photometric else []
        steps = [
            transforms.RandomResizedCrop(224),
            transforms.RandomHorizontalFlip(),
            *colors,
            transforms.PILToTensor(),
            transforms.ConvertImageDtype(torch.float),
            *lighting,
            transforms.Normalize(MEAN, STD),
        ]
        self.files = ImageFolder(Path(folder) / "train", transforms.Compose(steps))
        self.loader = DataLoader(
            self.files, 32, shuffle=True, num_workers=workers, persistent_workers=workers > 0
        )

    def variant(self, name: str) -> Variant:
        return Variant(name, len(self.files), lambda: [None for _ in self.loader])


class Lighting:
    """The original's colour shift, a picture at a time."""

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        from data.augment import EIGENVALUES, EIGENVECTORS

        alphas = torch.randn(3) * 0.1 * torch.tensor(EIGENVALUES)
        return image + (torch.tensor(EIGENVECTORS) @ alphas)[:, None, None]


def timm_variants(folder: str) -> list[Variant]:
    """timm's training input, if timm is installed."""
    try:
        from timm.data import create_transform
    except ImportError:
        return []
    files = ImageFolder(Path(folder) / "train", create_transform(224, is_training=True, color_jitter=None))
    loader = DataLoader(files, 32, shuffle=True)
    return [Variant("timm's transforms", len(files), lambda: [None for _ in loader])]


def decoding(folder: str) -> list[Variant]:
    """Whole pictures to RGB, by each library that is installed."""
    import simplejpeg

    files = list_set(folder, "train")
    indices = range(len(files))

    def pillow(content: bytes) -> None:
        np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))

    def half(content: bytes) -> None:
        image = Image.open(io.BytesIO(content))
        image.draft("RGB", (image.width // 2, image.height // 2))
        np.asarray(image.convert("RGB"))

    readers = {
        "Pillow": pillow,
        "Pillow, halved by draft": half,
        "simplejpeg": simplejpeg.decode_jpeg,
        "simplejpeg, halved": lambda content: simplejpeg.decode_jpeg(content, min_height=120, min_factor=2),
    }
    try:
        import cv2
    except ImportError:
        pass
    else:
        cv2.setNumThreads(0)
        flags = cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION
        readers["OpenCV"] = lambda content: cv2.imdecode(np.frombuffer(content, np.uint8), flags)
    return [
        Variant(name, len(files), lambda read=read: [read(files.read(i)) for i in indices])
        for name, read in readers.items()
    ]


def reencode(folder: Path, scratch: Path) -> Path:
    """The training pictures with their longer side at most 500, as JPEG of quality 90."""
    for path in sorted((folder / "train").rglob("*")):
        target = scratch / path.relative_to(folder)
        if path.is_dir():
            target.mkdir(parents=True)
            continue
        try:
            image = Image.open(path).convert("RGB")
        except OSError:
            shutil.copyfile(path, target)
            continue
        image.thumbnail((500, 500), Image.Resampling.LANCZOS)
        image.save(target.with_suffix(".jpg"), quality=90)
    return scratch


# ---------------------------------------------------------------------------- files to optimiser steps


def end_to_end(folder: str, overrides: list[str]) -> Iterator[Table]:
    """Training on files; the same on one batch that lies on the device; with torchvision's input."""
    base = [f"data.dir={folder}", "train.precision=auto", "train.batch_size=32", *overrides]
    config = parse_config("", "benchmark", base)
    device = select_device(config.run.device)
    precision = choose_precision(config.train.precision, device)
    config = replace(config, train=replace(config.train, precision=precision))
    configure_backends(precision, config.run.deterministic)
    files = list_set(folder, "train")
    training = build_train_state(config, files.classes, device, {})
    training.model.train()
    stream = make_train_loader(files, config, device, print)
    workers = stream.loader.num_workers
    reference = Reference(folder)
    loader = DataLoader(
        reference.files,
        config.train.batch_size,
        shuffle=True,
        num_workers=workers,
        pin_memory=device.type == "cuda",
        persistent_workers=workers > 0,
    )
    held = next(stream.epoch(1))

    def from_loader() -> Iterator:
        for images, labels in loader:
            yield images.to(device, non_blocking=True), labels.to(device, non_blocking=True)

    sources = {
        "one batch, held on the device": lambda: iter([held] * stream.steps),
        f"files, fast, {workers} workers": lambda: stream.epoch(1),
        f"files, torchvision's way, {workers} workers": from_loader,
    }
    yield (
        f"{config.model.depth} layers, batch {config.train.batch_size}, files to steps",
        [steps_over(name, source, training, len(files)) for name, source in sources.items()],
    )


def steps_over(name: str, source: Callable[[], Iterator], training, images: int) -> Variant:
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

    return Variant(name, images, run, lambda _: f"waits {100 * float(np.median(waits)):.1f} % of the time")


# ---------------------------------------------------------------------------- CIFAR


class PerPicture(Dataset):
    """The usual way: one PIL picture at a time through torchvision's transforms."""

    def __init__(self, images: ArrayDataset, config: Config):
        self.images = images
        mean, std = (tuple(v / 255 for v in values) for values in (config.data.mean, config.data.std))
        self.transform = transforms.Compose(
            [
                transforms.RandomCrop(32, padding=4),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize(mean, std),
            ]
        )

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int):
        return self.transform(Image.fromarray(self.images.images[index])), self.images.labels[index]


CIFAR = (
    "model.stem=cifar",
    "model.depth=11",
    "model.cardinality=4",
    "model.base_width=16",
    "data.dataset=cifar10",
    "data.dir=unused",
    "augment.padding=4",
    "train.batch_size=128",
)


def cifar(overrides: list[str]) -> Iterator[Table]:
    """An epoch of 25,600 random 32x32 pictures, delivered to the device."""
    config = parse_config("", "benchmark", [*CIFAR, *overrides])
    device = select_device(config.run.device)
    count = 25_600
    generator = np.random.default_rng(0)
    pictures = generator.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
    images = ArrayDataset(pictures, generator.integers(0, 10, count), tuple("0123456789"))
    batches = InMemoryTrainLoader(images, config, device)

    def loader(workers: int) -> Callable:
        per_picture = DataLoader(
            PerPicture(images, config),
            config.train.batch_size,
            shuffle=True,
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=device.type == "cuda",
        )

        def run() -> None:
            for x, y in per_picture:
                x.to(device, non_blocking=True), y.to(device, non_blocking=True)

        return run

    workers = len(os.sched_getaffinity(0))
    yield (
        "25,600 pictures of 32x32",
        [
            Variant(f"PIL loader, {workers} workers", count, loader(workers)),
            Variant("PIL loader in process", count, loader(0)),
            Variant("batches on the device", count, lambda: [None for _ in batches.epoch(1)]),
        ],
    )


# ---------------------------------------------------------------------------- memory of the file list


def memory(images: int = 1_281_167, workers: int = 2) -> None:
    """Memory of loader workers that have gone through a list of as many files as ImageNet's, no pictures."""
    classes = tuple(f"n{number:08d}" for number in range(1000))
    labels = np.arange(images) * len(classes) // images
    names = [f"{classes[label]}/{classes[label]}_{i}.JPEG" for i, label in enumerate(labels.tolist())]
    array = np.array([name.encode() for name in names])
    files = ImageFolderDataset(Path("datasets/imagenet/train"), array, labels, classes)
    samples = [
        (f"datasets/imagenet/train/{name}", int(label)) for name, label in zip(names, labels, strict=True)
    ]
    del names
    print(f"{images:,} files, {workers} workers, after a pass over all of them\n")
    print("| list | worker, private MiB | worker, resident MiB |\n|---|---|---|")
    lists = {
        "FileSet: one array": lambda i: (files.path(i), int(files.labels[i])),
        "ImageFolder: list of (path, label)": lambda i: samples[i],
    }
    for name, get in lists.items():
        loader = DataLoader(
            Names(get, images),
            8192,
            shuffle=True,
            num_workers=workers,
            multiprocessing_context="fork",
            collate_fn=last,
        )
        private, resident = max(loader)
        print(f"| {name} | {private / 1024:.0f} | {resident / 1024:.0f} |", flush=True)


class Names(Dataset):
    """Path and label of each file; an item is (private, resident) KiB of the process that made it."""

    def __init__(self, get: Callable[[int], tuple[str, int]], images: int):
        self.get, self.images = get, images

    def __len__(self) -> int:
        return self.images

    def __getitems__(self, indices: list[int]) -> tuple[int, int]:
        for i in indices:
            self.get(i)
        return resident_memory()


def last(item: tuple[int, int]) -> tuple[int, int]:
    return item


def resident_memory() -> tuple[int, int]:
    """(private, resident) KiB of this process (Linux)."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()[1:]
    sizes = {line.split(":")[0]: int(line.split()[1]) for line in lines}
    return sizes["Private_Clean"] + sizes["Private_Dirty"], sizes["Rss"]
