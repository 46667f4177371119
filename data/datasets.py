"""The datasets that `data.dataset` names. Importing this module does not import torch."""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, TypeAlias

from resnext.config import IMAGE_FILES, DataConfig
from resnext.errors import UserError

from .in_memory import ArrayDataset, subsample

if TYPE_CHECKING:
    from .image_folder import ImageFolderDataset

ImageDataset: TypeAlias = "ArrayDataset | ImageFolderDataset"


def load_set(config: DataConfig, split: str, classes: tuple[str, ...] | None = None) -> ImageDataset:
    """Return the "train" or "val" split of the configured dataset.

    The classes of an image folder are the given ones, or those of train/.
    """
    limit = config.train_images if split == "train" else config.val_images
    if config.dataset == "glyphs":
        from . import glyphs

        return glyphs.render_glyphs(split, limit, config.image_size, config.characters or glyphs.DIGITS)
    if config.dir is None:
        raise UserError(f"data.dir: missing; data.dataset={config.dataset} needs --data DIR")
    if config.dataset in IMAGE_FILES:
        from .image_folder import read_set

        classes = classes or training_classes(config, None)
        if classes and (config.train_list if split == "train" else config.val_list):
            from .lists import compare_lists, load_list

            files = load_list(config, split, classes)
            if config.train_list and config.val_list and split == "val":
                notes = compare_lists(config.train_list, config.val_list, classes)
                files = replace(files, notes=(*files.notes, *notes))
        else:
            if config.dataset == "shards":
                from .shards import list_set
            else:
                from .image_folder import list_set

            files = list_set(config.dir, split, limit, classes, config.class_order)
        return read_set(files, config.image_size, config.max_pixels) if config.pipeline == "memory" else files
    from . import cifar

    return subsample(cifar.read_set(config.dataset, config.dir, split, config.download), limit)


def training_classes(config: DataConfig, before: Sequence[str] | None) -> tuple[str, ...] | None:
    """Return the classes of image files, in the order `before` of a resumed run, or None for others."""
    if config.dataset not in IMAGE_FILES or config.dir is None:
        return None
    if config.dataset == "shards":
        from .shards import class_names
    else:
        from .image_folder import class_names

    if config.train_list:
        from .lists import list_classes, read_list

        names = list_classes(read_list(config.train_list, "train"), config.class_order)
    else:
        names = class_names(config.dir, config.class_order)
    return tuple(before) if before and set(before) == set(names) else names


def check_classes(model_classes: int | None, image_set: ImageDataset) -> None:
    """Raise UserError if model.classes is set and differs from the dataset."""
    found = len(image_set.classes)
    if model_classes not in (None, found):
        raise UserError(
            f"model.classes: {model_classes}, but the data has {found} classes; remove the key or use the "
            "data that it was meant for"
        )
