"""The data of a training run: both datasets, the same on all ranks, and this rank's batches."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch

from resnext.batch_plan import local_indices
from resnext.config import Config
from resnext.distributed import all_gather_objects, local_rank0_first, rank, world_size
from resnext.errors import UserError

from .datasets import ImageDataset, check_classes, load_set, training_classes
from .loaders import AnyEvalLoader, AnyTrainLoader, make_eval_loader, make_train_loader


def load_sets(config: Config, start: object) -> tuple[ImageDataset, ImageDataset, str]:
    """Return (training set, validation set, fingerprint of both), the same on all ranks, as are errors.

    `start` is what resnext.engine.resume.read_start returned. A resumed run keeps the order of its classes.
    """
    before = start["classes"] if isinstance(start, dict) else None
    data = config.data
    if start is not None and not isinstance(start, dict | tuple) and data.class_order is None:
        data = replace(data, class_order="string")  # a LuaCheckpoint
    with local_rank0_first():  # which downloads what is missing
        classes = training_classes(data, before)
        train_set = load_set(data, "train", classes)
        check_classes(config.model.classes, train_set)
        val_set = load_set(data, "val", classes)
    fingerprint = f"{train_set.fingerprint()} {val_set.fingerprint()}"
    for number, other in enumerate(all_gather_objects(fingerprint)):
        if other != fingerprint:
            raise UserError(
                f"data.dir: rank {number} has other files in {config.data.dir} than this rank; copy the same "
                "data to all machines"
            )
    return train_set, val_set, fingerprint


def make_batches(
    config: Config,
    train_set: ImageDataset,
    val_set: ImageDataset,
    device: torch.device,
    warn: Callable[[str], None],
) -> tuple[AnyTrainLoader, AnyEvalLoader]:
    """Return this rank's training and validation batches."""
    share = partial(local_indices, train=config.train)
    batch_size = config.train.eval_batch_size
    return (
        make_train_loader(train_set, config, device, warn, share),
        make_eval_loader(val_set, config.data, batch_size, device, rank=rank(), ranks=world_size()),
    )
