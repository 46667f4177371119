"""How a global batch is shared: by processes, accumulation parts and groups of BatchNorm."""

from dataclasses import replace

import numpy as np

from .config import Config, TrainConfig
from .distributed import rank, world_size
from .errors import UserError


def split_evenly(images: int, slices: int) -> list[int]:
    """Sizes of near-equal contiguous slices, the larger first: (83, 8) → 11 three times, 10 five."""
    small, larger = divmod(images, slices)
    return [small + 1] * larger + [small] * (slices - larger)


def split_batch(images: int, train: TrainConfig, ranks: int) -> list[list[int]]:
    """How many images of a global batch each process has: [accumulation part][rank].

    Contiguous near-equal slices of the batch, a part after the other, in the order of the ranks; they end
    where BatchNorm's groups do.
    """
    parts = train.accumulation_steps
    groups = _groups(train, ranks)
    sizes = split_evenly(images, parts * groups)
    each = groups // ranks
    starts = range(0, parts * groups, each)
    flat = [sum(sizes[start : start + each]) for start in starts]
    return [flat[part * ranks : (part + 1) * ranks] for part in range(parts)]


def local_indices(images: int, train: TrainConfig) -> np.ndarray:
    """int64: where in a global batch the images of this process are."""
    sizes = np.array(split_batch(images, train, world_size()))
    ends = np.cumsum(sizes).reshape(sizes.shape)[:, rank()]
    own = sizes[:, rank()]
    return np.concatenate([np.arange(end - size, end) for end, size in zip(ends, own, strict=True)])


def check_world_size(train: TrainConfig, ranks: int) -> None:
    """A UserError where a global batch cannot be shared by so many processes."""
    part = train.batch_size // train.accumulation_steps
    groups = part if train.bn_group is None else part // train.bn_group
    if train.bn_group is not None and groups % ranks:
        valid = ", ".join(str(n) for n in range(1, groups + 1) if groups % n == 0)
        raise UserError(
            f"train.bn_group: {train.bn_group} makes {groups} groups of {part} images, which {ranks} "
            f"processes cannot share; start {valid} (--nproc-per-node), or choose another bn_group"
        )
    if ranks > groups:
        raise UserError(
            f"train.batch_size: {part} images at a time are too few for {ranks} processes; raise it, or "
            "start fewer (--nproc-per-node)"
        )


def check_last_batch(config: Config, images: int, ranks: int) -> None:
    """A UserError where BatchNorm cannot work on the batches of an epoch, of which the last is smaller.

    It needs two values per channel; and SyncBN an image in each process.
    """
    train = config.train
    last = (images - 1) % train.batch_size + 1
    if train.sync_bn and any(0 in part for part in split_batch(last, train, ranks) if any(part)):
        raise UserError(
            f"train.sync_bn: the last batch of an epoch has {last} images, too few for {ranks} processes; "
            "choose another train.batch_size"
        )
    if _batchnorm_works(config, images, ranks):
        return
    others = sorted(range(2, 2 * train.batch_size + 1), key=lambda size: abs(size - train.batch_size))
    works = (
        size
        for size in others
        if _can_be_shared(replace(train, batch_size=size), ranks)
        and _batchnorm_works(replace(config, train=replace(train, batch_size=size)), images, ranks)
    )
    remedy = next((f"choose another, such as train.batch_size={size}" for size in works), "add images")
    raise UserError(
        f"train.batch_size: with {images:,} training images and batches of {train.batch_size} the last has "
        f"{last}, and BatchNorm somewhere a single value per channel (one image, of 1x1 at the end of the "
        f"network), which has no variance; {remedy}, or a larger data.image_size"
    )


def _batchnorm_works(config: Config, images: int, ranks: int) -> bool:
    """Whether BatchNorm has two values per channel or more in all batches of an epoch of so many images."""
    train, model = config.train, config.model
    strides = 32 if model.stem == "imagenet" else 4
    if config.data.train_size > strides or train.frozen_stages == len(model.stages):
        return True
    slices = train.accumulation_steps * (1 if train.sync_bn else _groups(train, ranks))
    last = (images - 1) % train.batch_size + 1
    return all(max(1, batch // slices) > 1 for batch in {last, min(images, train.batch_size)})


def _can_be_shared(train: TrainConfig, ranks: int) -> bool:
    part, rest = divmod(train.batch_size, train.accumulation_steps)
    if rest or (train.bn_group and (part < train.bn_group or part % train.bn_group)):
        return False
    try:
        check_world_size(train, ranks)
    except UserError:
        return False
    return True


def _groups(train: TrainConfig, ranks: int) -> int:
    """Into how many slices with statistics of their own BatchNorm cuts an accumulation part."""
    if train.bn_group is None:
        return ranks
    return train.batch_size // train.accumulation_steps // train.bn_group
