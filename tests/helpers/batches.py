"""Class folders of small JPEGs, and the batches that loaders return for them."""

import weakref
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from data.file_loaders import FileTrainLoader
from data.image_folder import list_set
from data.loaders import make_train_loader
from resnext.config import Config, parse_config

CPU = torch.device("cpu")
COUNTS = {"ant": 9, "bee": 8, "cow": 6}
IMAGES = sum(COUNTS.values())
EVERYTHING = "augment: {policy: trivialaugment, erasing: 0.5, mixup: 0.2, cutmix: 1, repeats: 3}"

Batches = Iterable[tuple[torch.Tensor, torch.Tensor]]
OPEN = weakref.WeakSet[FileTrainLoader]()  # loaders with workers


def draw_jpegs(root: Path, counts: dict[str, int] = COUNTS) -> Path:
    """Draw JPEGs of 40x50 pixels below train/ and val/, all different."""
    generator = np.random.default_rng(0)
    for split in ("train", "val"):
        for name, count in counts.items():
            (root / split / name).mkdir(parents=True)
            for number in range(count):
                small = Image.fromarray(generator.integers(0, 256, (6, 5, 3), np.uint8))
                small.resize((40, 50)).save(root / split / name / f"{number}.jpg", quality=90)
    return root


def spoil(root: Path, *names: str) -> None:
    """Truncate files."""
    for name in names:
        path = root / name
        path.write_bytes(path.read_bytes()[:-300])


def configure(root: Path, more: str = "", workers: int = 0, batch_size: int = 5, **data: object) -> Config:
    """Return the configuration of a training on class folders; `data` are keys of its data section."""
    text = f"""
    data: {{dir: {root}, pipeline: fast, image_size: 16, workers: {workers}}}
    train: {{batch_size: {batch_size}}}
    run: {{seed: 3}}
    {more}
    """
    config = parse_config(text, "test")
    return replace(config, data=replace(config.data, **data))


def train_loader(config: Config, warn: Callable[[str], None] = print) -> FileTrainLoader:
    """Return the training batches of `config`; its workers end with the test."""
    loader = make_train_loader(list_set(config.data.dir, "train"), config, CPU, warn)
    assert isinstance(loader, FileTrainLoader)
    if config.data.workers:
        OPEN.add(loader)
    return loader


def end_workers() -> None:
    """End the workers of all loaders: an exception holds its iterator, and garbage is collected late."""
    for loader in list(OPEN):
        if loader.loader._iterator is not None:
            loader.loader._iterator._shutdown_workers()
    OPEN.clear()


def take(batches: Batches) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return copies of all batches."""
    return [(images.clone(), labels.clone()) for images, labels in batches]


def joined(batches: Batches) -> tuple[torch.Tensor, torch.Tensor]:
    """Return all images and all labels."""
    images, labels = (torch.cat(part) for part in zip(*batches, strict=True))
    return images, labels


def assert_same(ours: Batches, theirs: Batches) -> None:
    """Assert that batches agree in every bit."""
    ours, theirs = take(ours), take(theirs)
    assert len(ours) == len(theirs)
    for (images, labels), (other_images, other_labels) in zip(ours, theirs, strict=True):
        assert images.dtype == other_images.dtype == torch.float32
        assert torch.equal(images, other_images) and torch.equal(labels, other_labels)
