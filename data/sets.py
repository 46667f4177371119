"""The choice of a data set: what `data.dataset` stands for."""

from resnext.config import Data
from resnext.errors import UserError

from . import cifar, folder, glyphs
from .folder import FileSet
from .images import ImageSet, take_evenly


def load_set(config: Data, split: str, classes: tuple[str, ...] | None = None) -> ImageSet | FileSet:
    """The "train" or "val" part of the configured data set.

    A folder's classes are those of train/, or the given ones, of which val/ may lack some.
    """
    limit = config.train_images if split == "train" else config.val_images
    if config.dataset == "glyphs":
        return glyphs.draw_set(split, limit, config.image_size, config.characters or glyphs.DIGITS)
    if config.dir is None:
        raise UserError(f"data.dir: {config.dataset} needs a folder; give --data DIR")
    if config.dataset == "folder":
        if config.pipeline == "memory":
            return folder.read_set(config.dir, split, config.image_size, limit, classes)
        return folder.list_set(config.dir, split, limit, classes)
    return take_evenly(cifar.read_set(config.dataset, config.dir, split, config.download), limit)


def check_classes(model_classes: int | None, image_set: ImageSet | FileSet) -> int:
    """The number of classes; a UserError where model.classes says another."""
    found = len(image_set.classes)
    if model_classes not in (None, found):
        raise UserError(
            f"model.classes: {model_classes}, but the data has {found} classes; remove the key or "
            "give the data that it was meant for"
        )
    return found
