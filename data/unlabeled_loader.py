"""Batches of unlabeled images on the device, preprocessed as in evaluation. Broken files are reported."""

import os
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from resnext.config import DataConfig
from resnext.errors import UserError

from .augment import normalize
from .decode import check_decoder, decode
from .image_folder import LARGEST_FILE, read_file, resize_and_center_crop
from .memory_loaders import pixel_statistics
from .transforms import eval_images
from .workers import WorkerBatch, collate_images, make_loader, prefetch_to_device


class Batch(NamedTuple):
    """Paths and normalized float32 (N, 3, S, S) of the images that could be read; errors of the others."""

    paths: list[str]
    images: Tensor
    problems: list[str]


def unlabeled_batches(
    paths: list[str], data: DataConfig, batch_size: int, device: torch.device
) -> Iterator[Batch]:
    """Yield all images in order, `batch_size` at a time. At most a few batches are in memory.

    `data` gives the preprocessing (pipeline, image_size, resize, mean, std) and the number of workers.
    """
    if data.pipeline != "memory":
        check_decoder(data.decoder)
    tasks = [paths[start : start + batch_size] for start in range(0, len(paths), batch_size)]
    workers = data.workers
    if workers is None:  # without a GPU, the network needs most of the cores
        workers = len(os.sched_getaffinity(0)) // (1 if device.type == "cuda" else 4)
    # A single batch is faster without starting a worker.
    workers = min(workers, len(tasks)) if len(tasks) > 1 else 0
    load = partial(load_images, data)
    size = min(batch_size, len(paths))
    loader = make_loader(load, tasks, replace(data, workers=workers), size, data.image_size, device, False)
    statistics = pixel_statistics(data, device)
    for names, batch in zip(tasks, prefetch_to_device(loader, device), strict=True):
        read = [name for name, problem in zip(names, batch.skipped, strict=True) if not problem]
        yield Batch(read, normalize(batch.images, *statistics), list(filter(None, batch.skipped)))


def load_images(data: DataConfig, paths: list[str]) -> WorkerBatch:
    """Load a batch in a worker; `skipped` has an entry per path, empty if the file could be read."""
    images, problems = [], []
    for path in paths:
        try:
            images.append(load_image(path, data))
            problems.append("")
        except UserError as error:
            problems.append(str(error))
    return WorkerBatch(collate_images(images, data.image_size), skipped=tuple(problems))


def load_image(path: str, data: DataConfig) -> np.ndarray:
    """Return an image as evaluation sees it: (S, S, 3), uint8 or (torch7) float32, in 0...255."""
    content = read_file(path, LARGEST_FILE)
    if data.pipeline != "memory":
        return eval_images(content, path, data, ten=False)[0]
    pixels = decode(content, path, max_pixels=data.max_pixels)
    return np.array(resize_and_center_crop(pixels, data.image_size))
