"""The loader of a dataset: in memory, or of files.

A batch is a function of (seed, epoch, step) alone. Each rank prepares only its own part of a global batch.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import torch

from resnext.config import Config, DataConfig
from resnext.errors import UserError

from .datasets import ImageDataset
from .in_memory import ArrayDataset
from .memory_loaders import InMemoryEvalLoader, InMemoryTrainLoader
from .sampler import LocalIndices

if TYPE_CHECKING:
    from .file_loaders import FileEvalLoader, FileTrainLoader

AnyTrainLoader: TypeAlias = "InMemoryTrainLoader | FileTrainLoader"
AnyEvalLoader: TypeAlias = "InMemoryEvalLoader | FileEvalLoader"


def make_train_loader(
    image_set: ImageDataset,
    config: Config,
    device: torch.device,
    warn: Callable[[str], None] = print,
    share: LocalIndices = np.arange,
) -> AnyTrainLoader:
    """Return the training batches of a dataset; `warn` gets a line for each broken file that is skipped."""
    if isinstance(image_set, ArrayDataset):
        return InMemoryTrainLoader(image_set, config, device, share)
    from .file_loaders import FileTrainLoader

    return FileTrainLoader(image_set, config, device, warn, share)


def make_eval_loader(
    image_set: ImageDataset,
    data: DataConfig,
    batch_size: int,
    device: torch.device,
    ten_crop: bool = False,
    rank: int = 0,
    ranks: int = 1,
) -> AnyEvalLoader:
    """Return batches of every image once, in order; with `ten_crop`, the ten crops of an image are adjacent.

    Each rank gets the images rank, rank + ranks, … and the same number of batches; its last may be empty.
    """
    own = np.arange(rank, len(image_set), ranks)
    steps = -(-len(image_set) // (ranks * batch_size))
    parts = [own[step * batch_size : (step + 1) * batch_size] for step in range(steps)]
    if not isinstance(image_set, ArrayDataset):
        from .file_loaders import FileEvalLoader

        return FileEvalLoader(image_set, data, parts, device, ten_crop)
    if ten_crop:
        raise UserError("--ten-crop: images in memory have the size of a crop; remove the option")
    return InMemoryEvalLoader(image_set, data, parts, device)
