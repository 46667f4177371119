"""CIFAR augmentation of whole batches against one picture at a time in numpy.

The numbers of the original's transforms are compared in test_oracle.py.
"""

import numpy as np
import pytest
import torch

from data.augment import cifar_crop, cifar_draws, normalise
from resnext.config import STATISTICS

MEAN, STD = STATISTICS["cifar10"]


def pictures(count, size, seed=0):
    return np.random.default_rng(seed).integers(256, size=(count, size, size, 3)).astype(np.uint8)


def normalised(picture, mean=MEAN, std=STD):
    """float32 (3, S, S)"""
    channels = picture.transpose(2, 0, 1).astype(np.float32)
    return np.stack(
        [(c - np.float32(m)) / np.float32(s) for c, m, s in zip(channels, mean, std, strict=True)]
    )


def reference(picture, mirrored, x, y, padding):
    """Normalise, mirror, pad with zeros, crop: in this order, one picture."""
    image = normalised(picture)
    if mirrored:
        image = image[:, :, ::-1]
    size = image.shape[1]
    padded = np.zeros((3, size + 2 * padding, size + 2 * padding), np.float32)
    padded[:, padding : padding + size, padding : padding + size] = image
    return padded[:, y : y + size, x : x + size]


def crop(images, mirrored, x, y, padding):
    mean, std = torch.tensor(MEAN), torch.tensor(STD)
    arrays = (torch.from_numpy(np.asarray(a)) for a in (images, mirrored, x, y))
    return cifar_crop(*arrays, padding, mean, std)


def check(images, mirrored, x, y, padding):
    ours = crop(images, mirrored, x, y, padding)
    theirs = np.stack([reference(*one, padding) for one in zip(images, mirrored, x, y, strict=True)])
    assert ours.dtype == torch.float32 and ours.shape == theirs.shape
    np.testing.assert_array_equal(ours.numpy(), theirs)


@pytest.mark.parametrize("padding, size", [(0, 32), (2, 20), (4, 32), (7, 8)])
def test_every_offset_and_both_mirrors(padding, size):
    places = range(2 * padding + 1)
    cases = [(m, x, y) for m in (False, True) for x in places for y in places]
    mirrored, x, y = (np.array(values) for values in zip(*cases, strict=True))
    check(pictures(len(cases), size), mirrored, x, y, padding)


@pytest.mark.parametrize("mirror, padding", [(0.5, 4), (0.5, 0), (0.0, 4), (1.0, 1)])
def test_drawn_crops(mirror, padding):
    draws = cifar_draws(3, 5, np.arange(40), mirror, padding)
    check(pictures(40, 32, seed=1), *draws, padding)


def test_no_padding_and_no_mirror_is_plain_normalisation():
    images = pictures(5, 16)
    zeros = np.zeros(5, np.int64)
    ours = crop(images, zeros > 0, zeros, zeros, 0)
    plain = normalise(torch.from_numpy(images), torch.tensor(MEAN), torch.tensor(STD))
    assert torch.equal(ours, plain)


@pytest.mark.parametrize("name", STATISTICS)
def test_normalisation(name):
    mean, std = STATISTICS[name]
    images = np.stack([np.arange(192, dtype=np.uint8).reshape(8, 8, 3), pictures(1, 8)[0]])
    ours = normalise(torch.from_numpy(images), torch.tensor(mean), torch.tensor(std))
    expected = np.stack([normalised(image, mean, std) for image in images])
    assert ours.dtype == torch.float32
    np.testing.assert_array_equal(ours.numpy(), expected)
    exact = (images.astype(np.float64) - mean) / std
    np.testing.assert_allclose(ours.numpy().transpose(0, 2, 3, 1), exact, rtol=1e-5, atol=1e-6)


def test_the_border_has_the_mean_colour():
    """Padding comes after normalising: zero there is the mean, not black."""
    images = np.full((1, 8, 8, 3), 255, np.uint8)
    ours = crop(images, np.array([False]), np.array([0]), np.array([8]), 4)
    assert (ours[0, :, 4:, :] == 0).all() and (ours[0, :, :, :4] == 0).all()
    assert (ours[0, :, :4, 4:] > 1).all()


def test_x_moves_columns_and_y_moves_rows():
    images = np.zeros((1, 8, 8, 3), np.uint8)
    images[0, 2, 5] = 255
    for mirrored, column in ((False, 5), (True, 2)):
        ours = crop(images, np.array([mirrored]), np.array([1]), np.array([3]), 2)
        bright = (ours[0, 0] > 0).nonzero().tolist()
        assert bright == [[2 + 2 - 3, column + 2 - 1]]


def test_layout_is_channels_last():
    images = pictures(4, 8)
    zeros = np.zeros(4, np.int64)
    for batch in (
        crop(images, zeros > 0, zeros, zeros, 1),
        normalise(torch.from_numpy(images), torch.tensor(MEAN), torch.tensor(STD)),
    ):
        assert batch.is_contiguous(memory_format=torch.channels_last)


def test_the_stored_pictures_are_left_alone():
    images = pictures(6, 12)
    before = images.copy()
    crop(images, np.ones(6, bool), np.zeros(6, np.int64), np.arange(6), 3)
    np.testing.assert_array_equal(images, before)
