"""Augmentation and normalisation of whole batches on the device, with per-image draws."""

import numpy as np
import torch
from torch import Tensor

from .draws import Stream, uniforms


def normalise(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """uint8 (N, H, W, 3) → float32 (N, 3, H, W) in channels_last: (x - mean) / std."""
    return ((images.float() - mean) / std).permute(0, 3, 1, 2)


def cifar_draws(
    seed: int, epoch: int, images: np.ndarray, mirror: float, padding: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(mirrored bool, x int64, y int64) of each image; offsets are uniform in 0...2·padding."""
    draws = uniforms(seed, epoch, images, 3, Stream.CIFAR_AUGMENT)
    offsets = (draws[:, 1:] * (2 * padding + 1)).astype(np.int64)
    return draws[:, 0] < mirror, offsets[:, 0], offsets[:, 1]


def cifar_crop(
    images: Tensor, mirrored: Tensor, x: Tensor, y: Tensor, padding: int, mean: Tensor, std: Tensor
) -> Tensor:
    """Normalise, mirror, pad with zeros (so with the mean colour), crop (fb.resnet.torch, cifar10.lua).

    `images` is uint8 (N, S, S, 3); `mirrored` bool, `x` and `y` int64 offsets, each (N,).
    Returns float32 (N, 3, S, S) in channels_last.
    """
    size = images.shape[1]
    span = torch.arange(size, device=images.device)
    rows = y[:, None] + span - padding
    columns = x[:, None] + span - padding
    inside = ((rows >= 0) & (rows < size))[:, :, None] & ((columns >= 0) & (columns < size))[:, None]
    rows, columns = rows.clamp(0, size - 1), columns.clamp(0, size - 1)
    columns = torch.where(mirrored[:, None], size - 1 - columns, columns)
    image = torch.arange(len(images), device=images.device)[:, None, None]
    crops = normalise(images[image, rows[:, :, None], columns[:, None]], mean, std)
    return crops * inside[:, None]
