"""Cropping and resizing of single images on the CPU, and augmentation policies.

Both pipelines follow the original (fb.resnet.torch, datasets/transforms.lua). Training uses crops of random
area and shape; evaluation a fixed shorter side and a center crop, rounded as there. They differ only in the
resampling. `torch7` uses the original's bicubic (torch7_resize.py); `fast` uses torch's antialiased resize
of 8-bit images. docs/results.md shows how much they differ.
"""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torchvision.transforms import v2

from resnext.config import DataConfig
from resnext.errors import UserError

from .augment import seeded
from .decode import Box, decode
from .torch7_resize import torch7_resize

ATTEMPTS = 10  # of RandomSizedCrop
CROP_DRAWS = 3 * ATTEMPTS + 2

POLICIES = {"randaugment": v2.RandAugment, "trivialaugment": v2.TrivialAugmentWide}


def random_sized_box(width: int, height: int, draws: Sequence[float], min_area: float) -> Box | None:
    """Return the box of RandomSizedCrop, or None if none of the ten attempts fits.

    `draws` are CROP_DRAWS uniforms: area, aspect (uniform in 3/4...4/3), and swap of each attempt, then the
    offsets in y and x. min_area is 0.08 in the original.
    """
    for attempt in range(ATTEMPTS):
        area, aspect, swap = draws[3 * attempt : 3 * attempt + 3]
        target = width * height * (min_area + area * (1 - min_area))
        aspect = 3 / 4 + aspect * (4 / 3 - 3 / 4)
        w = max(1, math.floor(math.sqrt(target * aspect) + 0.5))
        h = max(1, math.floor(math.sqrt(target / aspect) + 0.5))
        if swap < 0.5:
            w, h = h, w
        if w <= width and h <= height:
            top = int(draws[-2] * (height - h + 1))
            left = int(draws[-1] * (width - w + 1))
            return left, top, w, h
    return None


def scaled_size(width: int, height: int, shorter: int) -> tuple[int, int]:
    """Return (width, height) after scaling the shorter side to `shorter`; the other is truncated (Scale)."""
    if width < height:
        return shorter, int(height / width * shorter)
    return int(width / height * shorter), shorter


def crop_places(width: int, height: int, size: int, ten: bool) -> list[tuple[int, int, bool]]:
    """Return (left, top, mirrored) of the center crop, or of the ten crops in the original's order."""
    center = (math.ceil((width - size) / 2), math.ceil((height - size) / 2))
    if not ten:
        return [(*center, False)]
    right, bottom = width - size, height - size
    places = [center, (0, 0), (right, 0), (0, bottom), (right, bottom)]
    return [(x, y, mirrored) for mirrored in (False, True) for x, y in places]


def train_image(
    content: bytes, path: Path | str, draws: Sequence[float], data: DataConfig, min_area: float
) -> np.ndarray:
    """Return a training crop of an image file: (S, S, 3), uint8 (fast) or float32 (torch7), in 0...255."""
    size = data.train_size
    if data.pipeline == "fast":

        def region(width: int, height: int) -> Box:
            side = min(width, height)
            center = (math.ceil((width - side) / 2), math.ceil((height - side) / 2), side, side)
            return random_sized_box(width, height, draws, min_area) or center

        crop = decode(content, path, data.decoder, region, size, data.max_pixels)
        return resize(crop, size, size, data.interpolation)
    image = decode(content, path, data.decoder, max_pixels=data.max_pixels)
    box = random_sized_box(image.shape[1], image.shape[0], draws, min_area)
    if box is None:
        check_shape(image, size, path)
        return _crops(torch7_shorter_side(image.astype(np.float32), size), size, ten=False)[0]
    left, top, w, h = box
    return torch7_resize(image[top : top + h, left : left + w].astype(np.float32), size, size)


def eval_images(content: bytes, path: Path | str, data: DataConfig, ten: bool) -> list[np.ndarray]:
    """Return the evaluation crop of an image file, or its ten; each (S, S, 3) as from `train_image`."""
    image = decode(content, path, data.decoder, max_pixels=data.max_pixels)
    check_shape(image, data.resize, path)
    if data.pipeline == "torch7":
        image = torch7_shorter_side(image.astype(np.float32), data.resize)
    else:
        width, height = scaled_size(image.shape[1], image.shape[0], data.resize)
        image = resize(image, width, height, data.interpolation)
    return _crops(image, data.image_size, ten)


def check_shape(image: np.ndarray, shorter: int, path: Path | str) -> None:
    """Raise UserError if an image is so thin that scaling its shorter side would take gigabytes."""
    height, width = image.shape[:2]
    if max(scaled_size(width, height, shorter)) * max(width, height) > 2**28:
        raise UserError(
            f"{path}: {width}x{height} pixels are too thin to scale the shorter side to {shorter}; "
            "replace or remove the file"
        )


def _crops(image: np.ndarray, size: int, ten: bool) -> list[np.ndarray]:
    height, width = image.shape[:2]
    flipped = image[:, ::-1]
    return [
        (flipped if mirrored else image)[y : y + size, x : x + size]
        for x, y, mirrored in crop_places(width, height, size, ten)
    ]


def resize(image: np.ndarray, width: int, height: int, interpolation: str) -> np.ndarray:
    """Return uint8 (H, W, 3) in another size, antialiased as by torchvision's Resize."""
    if image.shape[:2] == (height, width):
        return image
    # Contiguous, and permuted in a batch of 1: torch recognizes the layout by the strides.
    pixels = torch.from_numpy(np.ascontiguousarray(image))[None].permute(0, 3, 1, 2)
    pixels = F.interpolate(pixels, (height, width), mode=interpolation, antialias=True)
    return pixels.permute(0, 2, 3, 1)[0].numpy()


def torch7_shorter_side(image: np.ndarray, shorter: int) -> np.ndarray:
    """Return float32 (H, W, 3) with its shorter side scaled, unchanged if that is right already (Scale)."""
    height, width = image.shape[:2]
    if min(width, height) == shorter:
        return image
    return torch7_resize(image, *scaled_size(width, height, shorter))


def apply_policy(image: np.ndarray, policy: str, seed: int) -> np.ndarray:
    """Return torchvision's RandAugment or TrivialAugmentWide of uint8 (S, S, 3), drawn from a seed."""
    with seeded(seed):
        pixels = POLICIES[policy]()(torch.from_numpy(image).permute(2, 0, 1))
    return pixels.permute(1, 2, 0).numpy()
