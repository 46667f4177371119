"""Random numbers as a function of (seed, epoch, image, stream): no state to save, no worker seeds.

A counter-based hash, the finalizer of SplitMix64 (Steele, Lea, Flood 2014), is applied to each
coordinate in turn. The draws of an image can be computed anywhere, in any order, for many images at
once. They do not depend on the batch size, the workers, or the ranks.
"""

from enum import IntEnum

import numpy as np

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


class RngStream(IntEnum):
    """Purpose of draws; streams are independent of each other."""

    ORDER = 0
    CIFAR_AUGMENT = 1
    GLYPHS_TRAIN = 2
    GLYPHS_VAL = 3
    CROP = 4
    COLOR = 5
    POLICY = 6
    ERASING = 7
    MIXING = 8


def _mix(x: np.ndarray) -> np.ndarray:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def random_uint64(seed: int, epoch: int, images: np.ndarray, count: int, stream: RngStream) -> np.ndarray:
    """Return uint64 (len(images), count): `count` independent 64-bit draws for each image."""
    with np.errstate(over="ignore"):  # the arithmetic is modulo 2**64
        state = np.zeros(1, np.uint64)
        for coordinate in (seed, int(stream), epoch):
            state = _mix(state * _GOLDEN + np.uint64(coordinate) + _GOLDEN)
        per_image = _mix(state * _GOLDEN + np.asarray(images).astype(np.uint64) + _GOLDEN)
        number = np.arange(1, count + 1, dtype=np.uint64)
        return _mix(per_image[:, None] + number * _GOLDEN)


def random_uniform(seed: int, epoch: int, images: np.ndarray, count: int, stream: RngStream) -> np.ndarray:
    """Return float64 (len(images), count), uniform in [0, 1)."""
    return (random_uint64(seed, epoch, images, count, stream) >> np.uint64(11)) * 2.0**-53
