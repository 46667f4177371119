"""Host geometry: which part of a picture, at which size; `fast` antialiased, `torch7` the original's.

Both follow the original (datasets/transforms.lua): training crops of random area and shape, evaluation
at a fixed shorter side and central crop, rounded as there. They differ in the resampling alone: `torch7`
is image.scale's bicubic, without antialiasing, in float32 and not clamped; `fast` is torch's antialiased
resize of 8-bit pictures. How far they are apart is in docs/results.md.
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

ATTEMPTS = 10  # of RandomSizedCrop
CROP_DRAWS = 3 * ATTEMPTS + 2


# ---------------------------------------------------------------------------- geometry


def random_sized_box(width: int, height: int, draws: Sequence[float], min_area: float) -> Box | None:
    """RandomSizedCrop's box; None when ten attempts do not fit.

    `draws` are CROP_DRAWS uniforms: area, aspect (uniform in 3/4...4/3) and swap of each attempt,
    then the offsets, y ahead of x. min_area is 0.08 in the original.
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
    """(width, height) with the shorter side so long, the other truncated (Scale)."""
    if width < height:
        return shorter, int(height / width * shorter)
    return int(width / height * shorter), shorter


def crop_places(width: int, height: int, size: int, ten: bool) -> list[tuple[int, int, bool]]:
    """(left, top, mirrored) of the centre crop, or of the ten crops in the original's order."""
    centre = (math.ceil((width - size) / 2), math.ceil((height - size) / 2))
    if not ten:
        return [(*centre, False)]
    right, bottom = width - size, height - size
    places = [centre, (0, 0), (right, 0), (0, bottom), (right, bottom)]
    return [(x, y, mirrored) for mirrored in (False, True) for x, y in places]


# ---------------------------------------------------------------------------- whole pictures


def train_image(
    content: bytes, path: Path | str, draws: Sequence[float], data: DataConfig, min_area: float
) -> np.ndarray:
    """One training crop of an image file: (S, S, 3), uint8 (fast) or float32 (torch7), in 0...255."""
    size, fallback = data.train_size, False

    def region(width: int, height: int) -> Box:
        nonlocal fallback
        box = random_sized_box(width, height, draws, min_area)
        fallback = box is None
        if box is None and data.pipeline == "fast":
            side = min(width, height)
            box = (math.ceil((width - side) / 2), math.ceil((height - side) / 2), side, side)
        return box or (0, 0, width, height)

    if data.pipeline == "fast":
        crop = decode(content, path, data.decoder, region, size, data.max_pixels)
        return resize(crop, size, size, data.interpolation)
    crop = decode(content, path, data.decoder, region, None, data.max_pixels).astype(np.float32)
    if fallback:
        check_shape(crop, size, path)
        return _crops(torch7_shorter_side(crop, size), size, ten=False)[0]
    return torch7_resize(crop, size, size)


def eval_images(content: bytes, path: Path | str, data: DataConfig, ten: bool) -> list[np.ndarray]:
    """The evaluation crop of an image file, or its ten; each (S, S, 3) as in `train_image`."""
    image = decode(content, path, data.decoder, max_pixels=data.max_pixels)
    check_shape(image, data.resize, path)
    if data.pipeline == "torch7":
        image = torch7_shorter_side(image.astype(np.float32), data.resize)
    else:
        height, width = image.shape[:2]
        new_width, new_height = scaled_size(width, height, data.resize)
        image = resize(image, new_width, new_height, data.interpolation)
    return _crops(image, data.image_size, ten)


def check_shape(image: np.ndarray, shorter: int, path: Path | str) -> None:
    """A UserError for a picture so thin that scaling its shorter side would take gigabytes."""
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


# ---------------------------------------------------------------------------- resampling


def resize(image: np.ndarray, width: int, height: int, interpolation: str) -> np.ndarray:
    """uint8 (H, W, 3) to another size, antialiased (torch; what torchvision's Resize does)."""
    if image.shape[:2] == (height, width):
        return image
    # In this order, and contiguous: by the strides of a batch of 1 torch tells planes from pixels.
    pixels = torch.from_numpy(np.ascontiguousarray(image))[None].permute(0, 3, 1, 2)
    pixels = F.interpolate(pixels, (height, width), mode=interpolation, antialias=True)
    return pixels.permute(0, 2, 3, 1)[0].numpy()


def torch7_shorter_side(image: np.ndarray, shorter: int) -> np.ndarray:
    """Scale: left alone when the shorter side is right already."""
    height, width = image.shape[:2]
    if min(width, height) == shorter:
        return image
    return torch7_resize(image, *scaled_size(width, height, shorter))


def torch7_resize(image: np.ndarray, width: int, height: int) -> np.ndarray:
    """image.scale(…, 'bicubic') of float32 (H, W, 3): rows first, then columns; not clamped."""
    rows, columns = bicubic_matrix(image.shape[0], height), bicubic_matrix(image.shape[1], width)
    # torch's product: NumPy's takes a thread for each core in every worker.
    pixels = torch.from_numpy(image).permute(1, 0, 2)
    narrow = torch.from_numpy(columns) @ pixels.reshape(len(pixels), -1)  # (width, H * 3)
    narrow = narrow.reshape(width, -1, 3).permute(1, 0, 2)
    resized = torch.from_numpy(rows) @ narrow.reshape(len(narrow), -1)  # (height, width * 3)
    return resized.reshape(height, width, 3).numpy()


def bicubic_matrix(source: int, target: int) -> np.ndarray:
    """float32 (target, source): the original's bicubic in one dimension as weights of the source.

    Corners are aligned; Catmull-Rom (a = -0.5); beyond a border the line through the last two samples.
    """
    weights = np.zeros((target, source), np.float32)
    if source == 1:
        weights[:] = 1
        return weights
    step = np.float32(source - 1) / np.float32(max(target - 1, 1))
    position = np.arange(target, dtype=np.float32) * step
    position[-1] = source - 1  # the last sample is the source's last
    left = np.minimum(position.astype(np.int64), source - 2)
    x = (position - left).astype(np.float64)
    taps = np.stack(
        [
            x * (-0.5 + x * (1 - 0.5 * x)),
            1 + x * x * (-2.5 + 1.5 * x),
            x * (0.5 + x * (2 - 1.5 * x)),
            x * x * (-0.5 + 0.5 * x),
        ]
    )
    row = np.arange(target)
    for offset, tap in zip((-1, 0, 1, 2), taps, strict=True):
        at = left + offset
        inside = (at >= 0) & (at < source)
        np.add.at(weights, (row[inside], at[inside]), tap[inside])
        for border, inner in ((0, 1), (source - 1, source - 2)):
            beyond = (at < 0) if border == 0 else (at >= source)
            np.add.at(weights, (row[beyond], border), 2 * tap[beyond])
            np.add.at(weights, (row[beyond], inner), -tap[beyond])
    return weights


# ---------------------------------------------------------------------------- policies

POLICIES = {"randaugment": v2.RandAugment, "trivialaugment": v2.TrivialAugmentWide}


def apply_policy(image: np.ndarray, policy: str, seed: int) -> np.ndarray:
    """torchvision's RandAugment or TrivialAugmentWide on uint8 (S, S, 3), drawn from a seed."""
    with seeded(seed):
        pixels = POLICIES[policy]()(torch.from_numpy(image).permute(2, 0, 1))
    return pixels.permute(1, 2, 0).numpy()
