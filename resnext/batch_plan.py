"""How a global batch is divided among micro-batches, ranks and ghost batches of BatchNorm.

A micro-batch is what all ranks together compute at once: one accumulation step of the global batch.
"""

from dataclasses import replace

import numpy as np

from .config import Config, TrainConfig
from .distributed import rank, world_size
from .errors import UserError


def split_evenly(images: int, slices: int) -> list[int]:
    """Return the sizes of near-equal contiguous slices, larger ones first: (5, 3) → [2, 2, 1]."""
    small, larger = divmod(images, slices)
    return [small + 1] * larger + [small] * (slices - larger)


def micro_batch_size(train: TrainConfig) -> int:
    """Return the number of images in one accumulation step of a full batch."""
    return train.batch_size // train.accumulation_steps


def ghost_batches(train: TrainConfig, ranks: int) -> int:
    """Return the number of slices of a micro-batch with their own BatchNorm statistics, over all ranks."""
    return ranks if train.bn_group is None else micro_batch_size(train) // train.bn_group


def split_batch(images: int, train: TrainConfig, ranks: int) -> list[list[int]]:
    """Return the number of images of a global batch per micro-batch and rank: [micro-batch][rank].

    These are near-equal contiguous slices of the batch, one micro-batch after another, in the order of the
    ranks. They end where ghost batches end.
    """
    per_rank = ghost_batches(train, ranks) // ranks
    slices = train.accumulation_steps * ranks * per_rank
    sizes = split_evenly(images, slices)
    flat = [sum(sizes[start : start + per_rank]) for start in range(0, slices, per_rank)]
    return [flat[start : start + ranks] for start in range(0, len(flat), ranks)]


def local_indices(images: int, train: TrainConfig) -> np.ndarray:
    """Return the positions in a global batch of this rank's images, int64."""
    sizes = np.array(split_batch(images, train, world_size()))
    ends = np.cumsum(sizes).reshape(sizes.shape)[:, rank()]
    own = sizes[:, rank()]
    return np.concatenate([np.arange(end - size, end) for end, size in zip(ends, own, strict=True)])


def check_world_size(train: TrainConfig, ranks: int) -> None:
    """Raise UserError if this number of processes cannot share a global batch."""
    if _can_be_shared(train, ranks):
        return
    micro_batch = micro_batch_size(train)
    if train.bn_group is None:
        raise UserError(
            f"train.batch_size: {micro_batch} images at a time are too few for {ranks} processes; raise it, "
            "or start fewer processes (--nproc-per-node)"
        )
    groups = ghost_batches(train, ranks)
    valid = ", ".join(str(n) for n in range(1, groups + 1) if groups % n == 0)
    raise UserError(
        f"train.bn_group: {train.bn_group} makes {groups} groups of {micro_batch} images, which {ranks} "
        f"processes cannot share; start {valid} processes (--nproc-per-node), or choose another bn_group"
    )


def check_last_batch(config: Config, images: int, ranks: int) -> None:
    """Raise UserError if the smaller last batch of an epoch is too small for BatchNorm.

    BatchNorm needs two values per channel. SyncBatchNorm needs an image on every rank.
    """
    train = config.train
    last = (images - 1) % train.batch_size + 1
    if train.sync_bn and any(0 in sizes for sizes in split_batch(last, train, ranks) if any(sizes)):
        raise UserError(
            f"train.sync_bn: the last batch of an epoch has {last} images, too few for {ranks} processes; "
            "choose another train.batch_size"
        )
    if _batchnorm_works(config, images, ranks):
        return
    remedy = "add images"
    for size in sorted(range(2, 2 * train.batch_size + 1), key=lambda size: abs(size - train.batch_size)):
        other = replace(train, batch_size=size)
        if _can_be_shared(other, ranks) and _batchnorm_works(replace(config, train=other), images, ranks):
            remedy = f"choose another, such as train.batch_size={size}"
            break
    raise UserError(
        f"train.batch_size: with {images:,} training images and batches of {train.batch_size} the last has "
        f"{last}, and BatchNorm somewhere a single value per channel (one image, of 1x1 at the end of the "
        f"network), which has no variance; {remedy}, or a larger data.image_size"
    )


def _can_be_shared(train: TrainConfig, ranks: int) -> bool:
    micro_batch, rest = divmod(train.batch_size, train.accumulation_steps)
    if train.bn_group is None:
        return not rest and micro_batch >= ranks
    return not rest and micro_batch % (train.bn_group * ranks) == 0


def _batchnorm_works(config: Config, images: int, ranks: int) -> bool:
    """Return whether BatchNorm gets at least two values per channel in every batch of an epoch."""
    train, model = config.train, config.model
    strides = 32 if model.stem == "imagenet" else 4
    if config.data.train_size > strides or train.frozen_stages == len(model.stages):
        return True
    slices = train.accumulation_steps * (1 if train.sync_bn else ghost_batches(train, ranks))
    last = (images - 1) % train.batch_size + 1
    return all(max(1, batch // slices) > 1 for batch in {last, min(images, train.batch_size)})
