"""Random numbers as a function of (seed, epoch, image), and the batches made from them.

The hash against a second implementation in Python integers and against fixed values; its
statistics against what uniform numbers would show; the batches against what was promised of them:
every image once an epoch, and step k the same however the epoch was entered.
"""

import itertools

import numpy as np
import pytest
import torch

from data.augment import sample_cifar_crops
from data.in_memory import ArrayDataset
from data.loaders import InMemoryTrainLoader, make_eval_loader
from data.rng import RngStream, random_uint64, random_uniform
from data.sampler import epoch_order
from resnext.config import AugmentConfig, Config, DataConfig, RunConfig, TrainConfig

IMAGES = np.arange(1000)
WORD = 2**64
GOLDEN_HASHES = [[865603088310788892, 3166613197469005110], [14995697084979492102, 1837383967237912389]]
GOLDEN_ORDER = [5, 9, 6, 7, 2, 0, 4, 3, 8, 1]
GOLDEN_MIRRORED = [False, True, False, True, True, False, False, True]
GOLDEN_X, GOLDEN_Y = [7, 5, 4, 1, 6, 1, 2, 8], [2, 3, 3, 3, 4, 6, 0, 3]


# ---------------------------------------------------------------------------- the hash


def mix(x):
    """SplitMix64's finaliser, in Python integers."""
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
    theirs = [[one_hash(seed, epoch, int(i), n, stream) for n in range(4)] for i in images]
    assert ours.tolist() == theirs


def test_draws_never_change():
    """Fixed values: another result here would silently change every run and break every resume."""
    assert random_uint64(0, 1, np.arange(2), 2, RngStream.CIFAR_AUGMENT).tolist() == GOLDEN_HASHES
    assert epoch_order(0, 1, 10).tolist() == GOLDEN_ORDER
    mirrored, x, y = sample_cifar_crops(7, 3, np.arange(8), 0.5, 4)
    assert mirrored.tolist() == GOLDEN_MIRRORED
    assert (x.tolist(), y.tolist()) == (GOLDEN_X, GOLDEN_Y)
    assert [int(s) for s in RngStream] == list(range(9))


def test_splitmix64_is_the_published_one():
    """The first outputs of the published generator with seed 0 (Steele, Lea, Flood 2014)."""
    published = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    assert [mix((n + 1) * 0x9E3779B97F4A7C15 % WORD) for n in range(3)] == published


def test_no_warnings_and_no_shared_state():
    with np.errstate(all="raise"):
        first = random_uniform(5, 2, IMAGES, 3, RngStream.CIFAR_AUGMENT)
    np.random.seed(0)
    torch.manual_seed(0)
    assert np.array_equal(random_uniform(5, 2, IMAGES, 3, RngStream.CIFAR_AUGMENT), first)


# ---------------------------------------------------------------------------- independence


def test_draws_of_an_image_do_not_depend_on_the_others():
    whole = random_uniform(1, 2, IMAGES, 3, RngStream.CIFAR_AUGMENT)
    for size in (1, 7, 64, 999):
        parts = [
            random_uniform(1, 2, IMAGES[i : i + size], 3, RngStream.CIFAR_AUGMENT)
            for i in range(0, 1000, size)
        ]
        assert np.array_equal(np.concatenate(parts), whole)
    order = np.random.default_rng(0).permutation(1000)
    assert np.array_equal(random_uniform(1, 2, order, 3, RngStream.CIFAR_AUGMENT), whole[order])
    assert np.array_equal(random_uniform(1, 2, IMAGES[::3], 3, RngStream.CIFAR_AUGMENT), whole[::3])
    assert np.array_equal(random_uniform(1, 2, IMAGES, 2, RngStream.CIFAR_AUGMENT), whole[:, :2])


@pytest.mark.parametrize("kind", [np.int32, np.int64, np.uint64])
def test_the_type_of_indices_does_not_matter(kind):
    expected = random_uniform(1, 2, IMAGES, 3, RngStream.CIFAR_AUGMENT)
    assert np.array_equal(random_uniform(1, 2, IMAGES.astype(kind), 3, RngStream.CIFAR_AUGMENT), expected)


def test_all_coordinates_matter():
    """No value is met twice over seeds, epochs, streams, images and numbers; nor are the axes alike."""
    values = np.concatenate(
        [
            random_uint64(seed, epoch, np.arange(50), 3, stream).ravel()
            for seed, epoch, stream in itertools.product(range(8), range(8), RngStream)
        ]
    )
    assert len(np.unique(values)) == values.size


def correlation_bound(n):
    return 5 / np.sqrt(n)


@pytest.mark.parametrize("axis", ["seed", "epoch", "image", "number", "stream"])
def test_neighbours_are_uncorrelated(axis):
    images = np.arange(20_000)

    def draws(seed=3, epoch=4, shift=0, number=0, stream=RngStream.CIFAR_AUGMENT):
        return random_uniform(seed, epoch, images + shift, 3, stream)[:, number]

    other = {
        "seed": {"seed": 4},
        "epoch": {"epoch": 5},
        "image": {"shift": 1},
        "number": {"number": 1},
        "stream": {"stream": RngStream.ORDER},
    }[axis]
    assert abs(np.corrcoef(draws(), draws(**other))[0, 1]) < correlation_bound(len(images))


def test_epochs_and_seeds_are_not_shifts_of_each_other():
    """Draws of one image over epochs, and of epoch 1 over seeds, are uniform and uncorrelated too."""
    for series in (
        [random_uniform(0, e, np.array([17]), 1, RngStream.CIFAR_AUGMENT)[0, 0] for e in range(3000)],
        [random_uniform(s, 1, np.array([17]), 1, RngStream.CIFAR_AUGMENT)[0, 0] for s in range(3000)],
    ):
        assert chi_square(np.array(series) * 10, 10) < 30
        assert abs(np.corrcoef(series[:-1], series[1:])[0, 1]) < correlation_bound(3000)


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
    # Every one of the 53 bits is set half the time.
    bits = (values.ravel() * 2**53).astype(np.uint64)
    for bit in range(53):
        share = ((bits >> np.uint64(bit)) & np.uint64(1)).mean()
        assert abs(share - 0.5) < 5 / (2 * np.sqrt(bits.size))


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


# ---------------------------------------------------------------------------- order


@pytest.mark.parametrize("images", [1, 2, 10, 1000, 50_000])
def test_order_is_a_permutation(images):
    order = epoch_order(3, 7, images)
    assert order.dtype == np.int64 and np.array_equal(np.sort(order), np.arange(images))
    assert np.array_equal(order, epoch_order(3, 7, images))


def test_orders_differ():
    orders = {tuple(epoch_order(s, e, 100).tolist()) for s in range(10) for e in range(1, 31)}
    assert len(orders) == 300


def test_all_permutations_are_equally_likely():
    orders = [tuple(epoch_order(0, epoch, 4).tolist()) for epoch in range(4800)]
    numbers = {p: n for n, p in enumerate(itertools.permutations(range(4)))}
    assert chi_square(np.array([numbers[o] for o in orders]), 24) < 24 + 5 * np.sqrt(48)


def test_order_has_no_trend():
    order = epoch_order(0, 1, 20_000)
    assert abs(np.corrcoef(order, np.arange(20_000))[0, 1]) < correlation_bound(20_000)
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < correlation_bound(20_000)


# ---------------------------------------------------------------------------- batches


DATA = DataConfig(dataset="cifar10", mean=(120.0, 110.0, 100.0), std=(60.0, 61.0, 62.0))


def numbered(images=50, size=8):
    """Random pictures, labelled with their own number."""
    pixels = np.random.default_rng(0).integers(256, size=(images, size, size, 3)).astype(np.uint8)
    return ArrayDataset(pixels, np.arange(images), tuple(map(str, range(images))))


def normalized(image_set):
    """float32 (N, 3, S, S), by the definition."""
    pixels = torch.from_numpy(image_set.images).float()
    return ((pixels - torch.tensor(DATA.mean)) / torch.tensor(DATA.std)).permute(0, 3, 1, 2)


def make_train_loader(batch_size, seed=0, augment=None, images=50):
    augment = augment or AugmentConfig(mirror=0.5, padding=2)
    config = Config(
        data=DATA, augment=augment, train=TrainConfig(batch_size=batch_size), run=RunConfig(seed=seed)
    )
    return InMemoryTrainLoader(numbered(images), config, torch.device("cpu"))


@pytest.mark.parametrize("batch_size, last", [(16, 2), (10, 10), (50, 50), (64, 50), (49, 1)])
def test_every_image_once_an_epoch(batch_size, last):
    batches = make_train_loader(batch_size)
    found = list(batches.epoch(1))
    assert batches.images == 50 and batches.steps == len(found) == -(-50 // batch_size)
    assert [len(labels) for _, labels in found] == [batch_size] * (len(found) - 1) + [last]
    assert all(len(images) == len(labels) for images, labels in found)
    assert sorted(torch.cat([labels for _, labels in found]).tolist()) == list(range(50))


@pytest.mark.parametrize("first", range(5))
def test_a_step_is_the_same_wherever_the_epoch_was_entered(first):
    batches = make_train_loader(12)
    whole, rest = list(batches.epoch(3)), list(make_train_loader(12).epoch(3, first))
    assert len(rest) == 5 - first
    for (images, labels), (again, labels_again) in zip(whole[first:], rest, strict=True):
        assert torch.equal(images, again) and torch.equal(labels, labels_again)


def test_nothing_is_left_of_a_finished_epoch():
    assert list(make_train_loader(12).epoch(1, 5)) == []


def epoch_by_label(batches, epoch):
    """The pictures of an epoch in the order of their labels, and the labels as they came."""
    images, labels = (torch.cat(part) for part in zip(*batches.epoch(epoch), strict=True))
    return images[labels.argsort()], labels


def test_pictures_do_not_depend_on_the_batch_size():
    pictures, order = epoch_by_label(make_train_loader(50), 2)
    for batch_size in (1, 7, 16):
        others, other_order = epoch_by_label(make_train_loader(batch_size), 2)
        assert torch.equal(pictures, others) and torch.equal(order, other_order)


def test_epochs_and_seeds_differ():
    base, order = epoch_by_label(make_train_loader(16, seed=0), 1)
    for seed, epoch in ((0, 2), (1, 1)):
        pictures, other = epoch_by_label(make_train_loader(16, seed=seed), epoch)
        assert not torch.equal(order, other)
        assert (pictures != base).flatten(1).any(1).float().mean() > 0.8


def test_pictures_belong_to_their_labels_and_draws():
    """A batch holds the pictures of its labels, with the mirroring that cifar_draws gives them."""
    expected_images = normalized(numbered())
    batches = make_train_loader(16, 4, AugmentConfig(mirror=0.5, padding=0))
    for images, labels in batches.epoch(6):
        mirrored, _, _ = sample_cifar_crops(4, 6, labels.numpy(), 0.5, 0)
        assert 0 < mirrored.sum() < len(mirrored) or len(mirrored) < 8
        for image, label, flip in zip(images, labels, mirrored, strict=True):
            expected = expected_images[label]
            assert torch.equal(image, expected.flip(2) if flip else expected)


def test_a_picture_is_met_in_all_mirrors_and_offsets():
    batches = make_train_loader(4, images=4, augment=AugmentConfig(mirror=0.5, padding=1))
    seen = {
        tuple(image[0].flatten().tolist())
        for epoch in range(1, 201)
        for images, labels in batches.epoch(epoch)
        for image in images[labels == 2]
    }
    assert len(seen) == 2 * 3 * 3


@pytest.mark.parametrize("batch_size", [1, 16, 50, 64])
def test_evaluation_batches_keep_the_order_of_the_set(batch_size):
    batches = make_eval_loader(numbered(), DATA, batch_size, torch.device("cpu"))
    for _ in range(2):
        images, labels = (torch.cat(part) for part in zip(*batches, strict=True))
        assert batches.images == 50 and labels.tolist() == list(range(50))
        assert torch.equal(images, normalized(numbered()))
