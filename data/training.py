"""The data of a training: both sets, the same in all processes, and the batches of this process."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from resnext.batch_plan import local_indices
from resnext.config import Config
from resnext.distributed import all_gather_objects, local_rank0_first, rank, world_size
from resnext.errors import UserError

from .datasets import check_classes, load_set, training_classes
from .image_folder import ImageFolderDataset
from .in_memory import ArrayDataset
from .loaders import make_eval_loader, make_train_loader


def load_sets(
    config: Config, start: Any
) -> tuple[ArrayDataset | ImageFolderDataset, ArrayDataset | ImageFolderDataset, str]:
    """(training set, validation set, fingerprint of both), the same in all processes, as is an error.

    A run that goes on, from the `start` of resnext.engine.resume.read_start, keeps the order of its classes.
    """
    before = start["classes"] if isinstance(start, dict) else None
    data = config.data
    if start is not None and not isinstance(start, dict | tuple) and data.class_order is None:  # a LuaState
        data = replace(data, class_order="string")
    with local_rank0_first():  # which downloads what is missing
        classes = training_classes(data, before)
        train_set = load_set(data, "train", classes)
        check_classes(config.model.classes, train_set)
        val_set = load_set(data, "val", classes)
    fingerprint = f"{train_set.fingerprint()} {val_set.fingerprint()}"
    for number, other in enumerate(all_gather_objects(fingerprint)):
        if other != fingerprint:
            raise UserError(
                f"data.dir: process {number} has other files in {config.data.dir} than this one; give all "
                "machines the same data"
            )
    return train_set, val_set, fingerprint


def make_batches(
    config: Config,
    train_set: ArrayDataset | ImageFolderDataset,
    val_set: ArrayDataset | ImageFolderDataset,
    device: torch.device,
    warn: Callable[[str], None],
) -> tuple[Any, Any]:
    """(training batches, validation batches) of this process."""
    train = config.train
    return (
        make_train_loader(train_set, config, device, warn, partial(local_indices, train=train)),
        make_eval_loader(
            val_set, config.data, train.eval_batch_size, device, rank=rank(), ranks=world_size()
        ),
    )
