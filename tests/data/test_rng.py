"""Random numbers as a function of (seed, epoch, image, stream).

The hash is compared with a second implementation in Python integers and with fixed values, its statistics
with those of uniform numbers.
"""

import itertools

import numpy as np
import pytest
import torch

from data.augment import sample_cifar_crops
from data.rng import RngStream, random_uint64, random_uniform

IMAGES = np.arange(1000)
WORD = 2**64
GOLDEN_HASHES = [[865603088310788892, 3166613197469005110], [14995697084979492102, 1837383967237912389]]
GOLDEN_MIRRORED = [False, True, False, True, True, False, False, True]
GOLDEN_X, GOLDEN_Y = [7, 5, 4, 1, 6, 1, 2, 8], [2, 3, 3, 3, 4, 6, 0, 3]


def draws(images, count=3, seed=1, epoch=2, stream=RngStream.CIFAR_AUGMENT):
    return random_uniform(seed, epoch, images, count, stream)


# ---------------------------------------------------------------------------- the hash


def mix(x):
    """The finalizer of SplitMix64, in Python integers."""
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % WORD
    x = (x ^ x >> 27) * 0x94D049BB133111EB % WORD
    return x ^ x >> 31


def one_hash(seed, epoch, image, number, stream):
    golden, state = 0x9E3779B97F4A7C15, 0
    for coordinate in (seed, int(stream), epoch, image):
        state = mix((state * golden + coordinate + golden) % WORD)
    return mix((state + (number + 1) * golden) % WORD)


@pytest.mark.parametrize("stream", RngStream)
@pytest.mark.parametrize("seed, epoch", [(0, 1), (1, 0), (2**63 - 1, 300), (123456789, 2**31)])
def test_hashes_are_a_second_implementations(seed, epoch, stream):
    images = np.array([0, 1, 49_999, 1_281_166, 2**40])
    ours = random_uint64(seed, epoch, images, 4, stream)
    assert ours.dtype == np.uint64 and ours.shape == (5, 4)
    assert ours.tolist() == [[one_hash(seed, epoch, int(i), n, stream) for n in range(4)] for i in images]


def test_draws_never_change():
    """Another result would silently change every run and break every resume."""
    assert random_uint64(0, 1, np.arange(2), 2, RngStream.CIFAR_AUGMENT).tolist() == GOLDEN_HASHES
    mirrored, x, y = sample_cifar_crops(7, 3, np.arange(8), 0.5, 4)
    assert (mirrored.tolist(), x.tolist(), y.tolist()) == (GOLDEN_MIRRORED, GOLDEN_X, GOLDEN_Y)
    assert [int(s) for s in RngStream] == list(range(9))


def test_splitmix64_is_the_published_one():
    """The first outputs of the published generator with seed 0 (Steele, Lea, Flood 2014)."""
    published = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    assert [mix((n + 1) * 0x9E3779B97F4A7C15 % WORD) for n in range(3)] == published


# ---------------------------------------------------------------------------- independence


def test_draws_of_an_image_do_not_depend_on_anything_else():
    with np.errstate(all="raise"):  # no warnings
        whole = draws(IMAGES)
    np.random.seed(0)
    torch.manual_seed(0)
    assert np.array_equal(draws(IMAGES), whole), "no shared state"
    for size in (1, 7, 64, 999):
        parts = [draws(IMAGES[i : i + size]) for i in range(0, 1000, size)]
        assert np.array_equal(np.concatenate(parts), whole)
    order = np.random.default_rng(0).permutation(1000)
    assert np.array_equal(draws(order), whole[order])
    assert np.array_equal(draws(IMAGES[::3]), whole[::3])
    assert np.array_equal(draws(IMAGES, 2), whole[:, :2])
    for kind in (np.int32, np.int64, np.uint64):
        assert np.array_equal(draws(IMAGES.astype(kind)), whole)


def test_all_coordinates_matter():
    """No value occurs twice over seeds, epochs, streams, images, and numbers; nor are the axes alike."""
    axes = itertools.product(range(8), range(8), RngStream)
    values = [random_uint64(seed, epoch, np.arange(50), 3, stream) for seed, epoch, stream in axes]
    assert len(np.unique(values)) == np.size(values)


def assert_uncorrelated(first, second):
    assert abs(np.corrcoef(first, second)[0, 1]) < 5 / np.sqrt(len(first))


@pytest.mark.parametrize(
    "other",
    [{"seed": 4}, {"epoch": 5}, {"shift": 1}, {"number": 1}, {"stream": RngStream.ORDER}],
    ids=lambda other: next(iter(other)),
)
def test_neighbors_are_uncorrelated(other):
    def column(seed=3, epoch=4, shift=0, number=0, stream=RngStream.CIFAR_AUGMENT):
        return draws(np.arange(20_000) + shift, 3, seed, epoch, stream)[:, number]

    assert_uncorrelated(column(), column(**other))


@pytest.mark.parametrize("axis", ["seed", "epoch"])
def test_epochs_and_seeds_are_not_shifts_of_each_other(axis):
    """Draws of one image over epochs, and of epoch 1 over seeds, are uniform and uncorrelated too."""
    coordinates = {"seed": 0, "epoch": 1}
    series = [draws(np.array([17]), 1, **(coordinates | {axis: n}))[0, 0] for n in range(3000)]
    assert chi_square(np.array(series) * 10, 10) < 30
    assert_uncorrelated(series[:-1], series[1:])


# ---------------------------------------------------------------------------- distribution


def chi_square(values, cells):
    """Of values in 0...cells; about cells - 1, standard deviation sqrt(2 · cells)."""
    counts = np.bincount(values.astype(np.int64), minlength=cells)
    assert len(counts) == cells
    expected = len(values) / cells
    return ((counts - expected) ** 2 / expected).sum()


@pytest.mark.parametrize("stream", RngStream)
def test_uniforms_are_uniform(stream):
    values = random_uniform(0, 1, np.arange(50_000), 4, stream)
    assert values.dtype == np.float64 and values.min() >= 0 and values.max() < 1
    for column in values.T:
        assert chi_square(column * 100, 100) < 100 + 5 * np.sqrt(200)
        assert abs(column.mean() - 0.5) < 5 / np.sqrt(12 * len(column))
    bits = (values.ravel() * 2**53).astype(np.uint64)
    for bit in range(53):  # each is set half the time
        share = ((bits >> np.uint64(bit)) & np.uint64(1)).mean()
        assert abs(share - 0.5) < 5 / (2 * np.sqrt(bits.size))


def test_streams_are_independent():
    streams = [random_uniform(1, 1, np.arange(20_000), 3, stream) for stream in RngStream]
    columns = np.concatenate(streams, axis=1).T
    correlations = np.corrcoef(columns) - np.eye(len(columns))
    assert np.abs(correlations).max() < 5 / 20_000**0.5


@pytest.mark.parametrize("padding", [0, 1, 2, 4])
def test_offsets_are_uniform_and_independent(padding):
    places = 2 * padding + 1
    mirrored, x, y = sample_cifar_crops(0, 1, np.arange(50_000), 0.5, padding)
    assert mirrored.dtype == bool and x.dtype == y.dtype == np.int64
    for offsets in (x, y):
        assert set(offsets.tolist()) == set(range(places))
        assert chi_square(offsets, places) < places + 5 * np.sqrt(2 * places)
    cells = (mirrored * places + x) * places + y
    assert chi_square(cells, 2 * places**2) < 2 * places**2 + 5 * np.sqrt(4 * places**2)


@pytest.mark.parametrize("mirror", [0.0, 0.1, 0.5, 1.0])
def test_mirror_is_a_probability(mirror):
    share = sample_cifar_crops(0, 1, np.arange(50_000), mirror, 4)[0].mean()
    assert abs(share - mirror) <= 5 * np.sqrt(mirror * (1 - mirror) / 50_000)
