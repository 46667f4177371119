"""Augmentation and normalization of whole batches on the device, with draws per image.

The input is pixels in 0...255, uint8 or float32 (N, H, W, 3). The output is normalized float32 (N, 3, H, W).
"""

import contextlib
import functools
import itertools
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms import v2

from resnext.config import AugmentConfig

from .rng import RngStream, random_uint64, random_uniform


def on_device(array: np.ndarray, device: torch.device) -> Tensor:
    """Copy a batch's draws or labels to the device without waiting.

    A GPU copies from pinned memory, which torch does not reuse before the copy is done.
    """
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


# ---------------------------------------------------------------------------- normalization, CIFAR


def normalize(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Return (x - mean) / std of (N, H, W, 3) as float32 (N, 3, H, W) in channels_last."""
    count, height, width, _ = images.shape
    # Flatten width and channels, so that the arithmetic vectorizes.
    pixels = images.reshape(count, height, width * 3).to(torch.float32, copy=True)
    pixels.sub_(mean.repeat(width)).div_(std.repeat(width))
    return pixels.view(count, height, width, 3).permute(0, 3, 1, 2)


def sample_cifar_crops(
    seed: int, epoch: int, images: np.ndarray, mirror: float, padding: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return (mirrored bool, x int64, y int64), each (N,); offsets are uniform in 0...2·padding."""
    draws = random_uniform(seed, epoch, images, 3, RngStream.CIFAR_AUGMENT)
    offsets = (draws[:, 1:] * (2 * padding + 1)).astype(np.int64)
    return draws[:, 0] < mirror, offsets[:, 0], offsets[:, 1]


def cifar_crop(
    images: Tensor, mirrored: Tensor, x: Tensor, y: Tensor, padding: int, mean: Tensor, std: Tensor
) -> Tensor:
    """Normalize, mirror, pad with zeros (the mean color), and crop (fb.resnet.torch, datasets/cifar10.lua).

    `images` is uint8 (N, S, S, 3); `mirrored` bool, and the offsets `x` and `y` int64, each (N,).
    Return float32 (N, 3, S, S) in channels_last.
    """
    size = images.shape[1]
    span = torch.arange(size, device=images.device)
    rows = y[:, None] + span - padding
    columns = x[:, None] + span - padding
    inside = ((rows >= 0) & (rows < size))[:, :, None] & ((columns >= 0) & (columns < size))[:, None]
    rows, columns = rows.clamp(0, size - 1), columns.clamp(0, size - 1)
    columns = torch.where(mirrored[:, None], size - 1 - columns, columns)
    image = torch.arange(len(images), device=images.device)[:, None, None]
    crops = normalize(images[image, rows[:, :, None], columns[:, None]], mean, std)
    return crops * inside[:, None]


# ---------------------------------------------------------------------------- ImageNet's colors

GRAY = (0.299, 0.587, 0.114)
ORDERS = tuple(itertools.permutations(range(3)))  # of brightness (0), contrast (1), saturation (2)

# Principal components of ImageNet's colors (fb.resnet.torch, datasets/imagenet.lua).
EIGENVALUES = (0.2175, 0.0188, 0.0045)
EIGENVECTORS = ((-0.5675, 0.7192, 0.4009), (-0.5808, -0.0045, -0.8140), (-0.5836, -0.6948, 0.4203))


def sample_color_params(seed: int, epoch: int, images: np.ndarray, augment: AugmentConfig) -> np.ndarray:
    """Return float64 (N, 9): the order of the three operations, their α, and the α of lighting."""
    draws = random_uniform(seed, epoch, images, 8, RngStream.COLOR)
    order = np.array(ORDERS)[(draws[:, 0] * len(ORDERS)).astype(np.int64)]
    alphas = 1 + (2 * draws[:, 1:4] - 1) * augment.jitter
    radius = np.sqrt(-2 * np.log1p(-draws[:, 4:6]))  # Box and Muller: two uniforms give two normals
    angle = 2 * np.pi * draws[:, 6:8]
    normals = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=2).reshape(-1, 4)
    return np.concatenate([order, alphas, normals[:, :3] * augment.lighting], axis=1)


def sample_flips(seed: int, epoch: int, images: np.ndarray, augment: AugmentConfig) -> np.ndarray:
    """Return int64: the positions of the images to mirror."""
    return np.flatnonzero(random_uniform(seed, epoch, images, 9, RngStream.COLOR)[:, 8] < augment.mirror)


def mirror(images: Tensor, which: Tensor) -> None:
    """Flip the images (N, H, W, 3) at the positions `which` left to right, in place."""
    planes = images.permute(0, 3, 1, 2)  # in this layout, flipping vectorizes
    for i in [which] if images.is_cuda else which.tolist():
        planes[i] = planes[i].flip(-1)


def jitter(images: Tensor, draws: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Apply ColorJitter, Lighting, and ColorNormalize (fb.resnet.torch, datasets/transforms.lua) in one pass.

    The original clamps nothing. So each operation, and all of them together, is an affine map of an image's
    colors, which depends on the pixels only through their mean. `draws` are from sample_color_params.
    With train.precision=tf32, the product has the 10 bits of TF32.
    """
    planes = images.permute(0, 3, 1, 2).flatten(2)
    size = len(planes) if planes.is_cuda else 1  # a single image stays in a CPU's cache
    colors = torch.cat([part.float().mean(2) for part in planes.split(size)])
    matrices, offsets = color_map(colors, draws, mean, std)
    out = torch.empty(planes.shape, device=planes.device)
    parts = (tensor.split(size) for tensor in (planes, matrices, offsets[:, :, None], out))
    for part, matrix, offset, result in zip(*parts, strict=True):
        torch.baddbmm(offset, matrix, part.float(), out=result)
    return out.unflatten(2, images.shape[1:3])


@functools.cache
def color_constants(device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Return gray (3,), the scaled axes of lighting (3, 3), and identity, float64; cached per device."""
    axes = np.array(EIGENVECTORS) * np.array(EIGENVALUES)
    gray, axes, identity = (on_device(array, device) for array in (np.array(GRAY), axes, np.eye(3)))
    return gray, axes, identity


def color_map(colors: Tensor, draws: Tensor, mean: Tensor, std: Tensor) -> tuple[Tensor, Tensor]:
    """Return (matrix (N, 3, 3), offset (N, 3)) of the map from a pixel to its jittered, normalized value.

    `colors` (N, 3) are the mean colors of the images, which contrast depends on.
    """
    draws, colors = draws.double(), colors.double()
    order, alphas, lights = draws[:, :3].long(), draws[:, 3:6], draws[:, 6:9]
    gray, axes, identity = color_constants(draws.device)
    matrix, offset = identity.expand(len(draws), 3, 3), torch.zeros_like(colors)
    for operation in order.unbind(1):
        alpha = alphas.gather(1, operation[:, None])
        blend = alpha[:, :, None] * identity
        to_gray = (1 - alpha[:, :, None]) * gray.expand(3, 3)
        blend = torch.where((operation == 2)[:, None, None], blend + to_gray, blend)
        average = ((matrix @ colors[:, :, None])[:, :, 0] + offset) @ gray
        constant = torch.where((operation == 1)[:, None], (1 - alpha) * average[:, None], 0.0)
        matrix = blend @ matrix
        offset = (blend @ offset[:, :, None])[:, :, 0] + constant
    offset = offset + 255 * lights @ axes.T
    return (matrix / std[:, None]).float(), ((offset - mean) / std).float()


# ---------------------------------------------------------------------------- erasing and mixing


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed torch's generator, from which torchvision's transforms draw, and restore it afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


def erase(images: Tensor, seed: int, epoch: int, ids: np.ndarray, probability: float) -> None:
    """Apply torchvision's RandomErasing with the mean color to each of (N, 3, H, W), normalized, in place."""
    boxes = erased_boxes(images, seed, epoch, ids, probability)
    if images.is_cuda:  # all images in a few launches
        images.masked_fill_(box_mask(on_device(boxes, images.device), *images.shape[2:]), 0.0)
        return
    for image, (top, bottom, left, right) in zip(images, boxes.tolist(), strict=True):
        image[:, top:bottom, left:right] = 0.0


def erased_boxes(images: Tensor, seed: int, epoch: int, ids: np.ndarray, probability: float) -> np.ndarray:
    """Return int64 (N, 4): top, bottom, left, and right of what RandomErasing erases; zeros: nothing."""
    chosen = random_uniform(seed, epoch, ids, 1, RngStream.ERASING)[:, 0] < probability
    seeds = random_uint64(seed, epoch, ids, 2, RngStream.ERASING)[:, 1]
    boxes = np.zeros((len(ids), 4), np.int64)
    erasing = v2.RandomErasing(p=1.0)
    with torch.random.fork_rng(devices=[]):
        for i in np.flatnonzero(chosen):
            torch.default_generator.manual_seed(int(seeds[i]))
            torch.rand(1)  # the transform itself draws this first, to decide whether to erase
            box = erasing.make_params([images])
            if box["v"] is not None:  # a box fit in 10 trials
                boxes[i] = box["i"], box["i"] + box["h"], box["j"], box["j"] + box["w"]
    return boxes


def box_mask(boxes: Tensor, height: int, width: int) -> Tensor:
    """Return bool (N, 1, H, W): whether a pixel lies in the box of its image, from erased_boxes."""
    top, bottom, left, right = boxes[:, :, None].unbind(1)
    rows, columns = (torch.arange(size, device=boxes.device) for size in (height, width))
    rows, columns = (rows >= top) & (rows < bottom), (columns >= left) & (columns < right)
    return rows[:, None, :, None] & columns[:, None, None]


def mix(
    images: Tensor, labels: Tensor, augment: AugmentConfig, classes: int, seed: int, epoch: int, step: int
) -> tuple[Tensor, Tensor]:
    """Return a batch after torchvision's MixUp or CutMix, one of the two if both are on.

    Labels int64 (N,) become float32 (N, classes).
    """
    kinds = [
        kind(alpha=alpha, num_classes=classes)
        for kind, alpha in ((v2.MixUp, augment.mixup), (v2.CutMix, augment.cutmix))
        if alpha
    ]
    draws = random_uint64(seed, epoch, np.array([step]), 2, RngStream.MIXING)[0]
    with seeded(int(draws[1])):
        return kinds[int(draws[0] % np.uint64(len(kinds)))](images, labels)
