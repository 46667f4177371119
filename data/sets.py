"""The choice of a data set: what `data.dataset` stands for; and the batches of a training."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from resnext.batch_plan import share_positions
from resnext.config import Config, Data
from resnext.distributed import first_on_machine, gather, rank, world_size
from resnext.errors import UserError

from . import cifar, folder, glyphs
from .folder import FileSet
from .images import ImageSet, take_evenly
from .loader import eval_batches, train_batches


def load_set(config: Data, split: str, classes: tuple[str, ...] | None = None) -> ImageSet | FileSet:
    """The "train" or "val" part of the configured data set.

    A folder's classes are those of train/, or the given ones.
    """
    limit = config.train_images if split == "train" else config.val_images
    if config.dataset == "glyphs":
        return glyphs.draw_set(split, limit, config.image_size, config.characters or glyphs.DIGITS)
    if config.dir is None:
        raise UserError(f"data.dir: {config.dataset} needs a folder; give --data DIR")
    if config.dataset == "folder":
        files = folder.list_set(config.dir, split, limit, classes, config.class_order)
        if config.pipeline == "memory":
            return folder.read_set(files, config.image_size, config.max_pixels)
        return files
    return take_evenly(cifar.read_set(config.dataset, config.dir, split, config.download), limit)


def training_classes(config: Data, before: Sequence[str] | None) -> tuple[str, ...] | None:
    """The class folders of train/; those of a run that goes on in its order. None for other sets."""
    if config.dataset != "folder" or config.dir is None:
        return None
    names = folder.class_names(config.dir, config.class_order)
    return tuple(before) if before and set(before) == set(names) else names


def check_classes(model_classes: int | None, image_set: ImageSet | FileSet) -> int:
    """The number of classes; a UserError where model.classes says another."""
    found = len(image_set.classes)
    if model_classes not in (None, found):
        raise UserError(
            f"model.classes: {model_classes}, but the data has {found} classes; remove the key or "
            "give the data that it was meant for"
        )
    return found


def load_sets(config: Config, start: Any) -> tuple[ImageSet | FileSet, ImageSet | FileSet, str]:
    """(training set, validation set, fingerprint of both), the same in all processes, as is an error.

    A run that goes on, from the `start` of resnext.start.read_start, keeps the order of its classes.
    """
    before = start["classes"] if isinstance(start, dict) else None
    data = config.data
    if start is not None and not isinstance(start, dict | tuple) and data.class_order is None:  # a LuaState
        data = replace(data, class_order="string")
    with first_on_machine():  # which downloads what is missing
        classes = training_classes(data, before)
        train_set = load_set(data, "train", classes)
        check_classes(config.model.classes, train_set)
        val_set = load_set(data, "val", classes)
    fingerprint = f"{train_set.fingerprint()} {val_set.fingerprint()}"
    for number, other in enumerate(gather(fingerprint)):
        if other != fingerprint:
            raise UserError(
                f"data.dir: process {number} has other files in {config.data.dir} than this one; give all "
                "machines the same data"
            )
    return train_set, val_set, fingerprint


def make_batches(
    config: Config,
    train_set: ImageSet | FileSet,
    val_set: ImageSet | FileSet,
    device: torch.device,
    warn: Callable[[str], None],
) -> tuple[Any, Any]:
    """(training batches, validation batches) of this process."""
    train = config.train
    return (
        train_batches(train_set, config, device, warn, partial(share_positions, train=train)),
        eval_batches(val_set, config.data, train.eval_batch_size, device, rank=rank(), ranks=world_size()),
    )
