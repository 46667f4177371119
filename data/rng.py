"""Random numbers as a function of (seed, epoch, image, stream): no state to save, no worker seeds.

A counter-based hash, the finaliser of SplitMix64 (Steele, Lea, Flood 2014), applied to each
coordinate in turn. Any image's draws can be computed anywhere, in any order, for many images at
once, and are the same whatever the batch size, the workers or the ranks.
"""

from enum import IntEnum

import numpy as np

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


class RngStream(IntEnum):
    """What draws are for; different streams are independent."""

    ORDER = 0
    CIFAR_AUGMENT = 1
    GLYPHS_TRAIN = 2
    GLYPHS_VAL = 3
    CROP = 4
    COLOUR = 5
    POLICY = 6
    ERASING = 7
    MIXING = 8


def _mix(x: np.ndarray) -> np.ndarray:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def random_uint64(seed: int, epoch: int, images: np.ndarray, count: int, stream: RngStream) -> np.ndarray:
    """uint64 (len(images), count): `count` independent 64-bit draws of each image."""
    with np.errstate(over="ignore"):  # arithmetic is meant modulo 2**64
        state = np.zeros(1, np.uint64)
        for coordinate in (seed, int(stream), epoch):
            state = _mix(state * _GOLDEN + np.uint64(coordinate) + _GOLDEN)
        per_image = _mix(state * _GOLDEN + np.asarray(images).astype(np.uint64) + _GOLDEN)
        number = np.arange(1, count + 1, dtype=np.uint64)
        return _mix(per_image[:, None] + number * _GOLDEN)


def random_uniform(seed: int, epoch: int, images: np.ndarray, count: int, stream: RngStream) -> np.ndarray:
    """float64 (len(images), count), uniform in [0, 1)."""
    return (random_uint64(seed, epoch, images, count, stream) >> np.uint64(11)) * 2.0**-53


def epoch_order(seed: int, epoch: int, images: int, repeats: int = 1) -> np.ndarray:
    """int64 (images,): the random permutation of an epoch.

    With `repeats` its first pictures alone, each so many times in a row (repeated augmentation: Hoffer et
    al. 2020). Version v of picture i is i + v * images: the number that its draws are made for.
    """
    keys = random_uint64(seed, epoch, np.arange(images), 1, RngStream.ORDER)[:, 0]
    order = np.argsort(keys, kind="stable")
    versions = np.arange(images) % repeats
    return order[np.arange(images) // repeats] + versions * images
