"""Augmentation of whole batches against one picture at a time in numpy, and against torchvision.

The numbers of the original's transforms are compared in test_oracle.py and test_transforms.py.
"""

import itertools

import numpy as np
import pytest
import torch
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from data.augment import (
    cifar_crop,
    erase,
    jitter,
    mirror,
    mix,
    normalize,
    sample_cifar_crops,
    sample_color_params,
    sample_flips,
)
from data.rng import RngStream, random_uniform
from data.transforms import apply_policy
from resnext.config import STATISTICS, AugmentConfig

MEAN, STD = STATISTICS["cifar10"]


def pictures(count, size, seed=0):
    return np.random.default_rng(seed).integers(256, size=(count, size, size, 3)).astype(np.uint8)


def normalized(picture, mean=MEAN, std=STD):
    """float32 (3, S, S)"""
    channels = picture.transpose(2, 0, 1).astype(np.float32)
    return np.stack(
        [(c - np.float32(m)) / np.float32(s) for c, m, s in zip(channels, mean, std, strict=True)]
    )


def reference(picture, mirrored, x, y, padding):
    """Normalise, mirror, pad with zeros, crop: in this order, one picture."""
    image = normalized(picture)
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
    draws = sample_cifar_crops(3, 5, np.arange(40), mirror, padding)
    check(pictures(40, 32, seed=1), *draws, padding)


def test_no_padding_and_no_mirror_is_plain_normalisation():
    images = pictures(5, 16)
    zeros = np.zeros(5, np.int64)
    ours = crop(images, zeros > 0, zeros, zeros, 0)
    plain = normalize(torch.from_numpy(images), torch.tensor(MEAN), torch.tensor(STD))
    assert torch.equal(ours, plain)


@pytest.mark.parametrize("name", STATISTICS)
def test_normalisation(name):
    mean, std = STATISTICS[name]
    images = np.stack([np.arange(192, dtype=np.uint8).reshape(8, 8, 3), pictures(1, 8)[0]])
    ours = normalize(torch.from_numpy(images), torch.tensor(mean), torch.tensor(std))
    expected = np.stack([normalized(image, mean, std) for image in images])
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
        normalize(torch.from_numpy(images), torch.tensor(MEAN), torch.tensor(STD)),
    ):
        assert batch.is_contiguous(memory_format=torch.channels_last)


def test_the_stored_pictures_are_left_alone():
    images = pictures(6, 12)
    before = images.copy()
    crop(images, np.ones(6, bool), np.zeros(6, np.int64), np.arange(6), 3)
    np.testing.assert_array_equal(images, before)


# ---------------------------------------------------------------------------- ImageNet's colours

NOTHING, WHITE = torch.zeros(3), torch.full((3,), 255.0)
IMAGENET = tuple(torch.tensor(values) for values in STATISTICS["folder"])
GRAY = np.array([0.299, 0.587, 0.114])
EIGENVALUES = np.array([0.2175, 0.0188, 0.0045])
EIGENVECTORS = np.array([[-0.5675, 0.7192, 0.4009], [-0.5808, -0.0045, -0.8140], [-0.5836, -0.6948, 0.4203]])
FULL = AugmentConfig(jitter=0.4, lighting=0.1)


def colour_reference(image, row, mean, std):
    """One picture, one operation after another, in float64; pixels in 0...1 as in the original."""
    pixels = image.astype(np.float64) / 255
    for operation in row[:3].astype(int):
        alpha = row[3 + operation]
        gray = pixels @ GRAY
        other = {0: 0.0, 1: gray.mean(), 2: gray[:, :, None]}[operation]
        pixels = alpha * pixels + (1 - alpha) * other
    pixels = pixels + EIGENVECTORS @ (row[6:] * EIGENVALUES)
    return (pixels - np.asarray(mean) / 255) / (np.asarray(std) / 255)


@pytest.mark.parametrize("kind", [np.uint8, np.float32])
@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_colours_are_the_operations_one_after_another(order, kind):
    images = pictures(6, 24, seed=2).astype(kind)
    if kind is np.float32:
        images = images * 1.1 - 12  # bicubic overshoots, and nothing is clamped
    draws = sample_color_params(1, 1, np.arange(6), FULL)
    draws[:, :3] = order
    ours = jitter(torch.from_numpy(images), torch.from_numpy(draws), *IMAGENET)
    assert ours.dtype == torch.float32 and ours.shape == (6, 3, 24, 24)
    for image, row, our in zip(images, draws, ours, strict=True):
        expected = colour_reference(image, row, *STATISTICS["folder"])
        np.testing.assert_allclose(our.permute(1, 2, 0), expected, atol=3e-6)


def test_colours_of_drawn_rows():
    images = pictures(30, 9, seed=3)
    draws = sample_color_params(5, 2, np.arange(30), FULL)
    assert len({tuple(row[:3]) for row in draws}) == 6
    ours = jitter(torch.from_numpy(images), torch.from_numpy(draws), *IMAGENET).permute(0, 2, 3, 1)
    expected = [colour_reference(*one, *STATISTICS["folder"]) for one in zip(images, draws, strict=True)]
    np.testing.assert_allclose(ours, np.stack(expected), atol=3e-6)


def test_colours_do_not_depend_on_the_batch():
    images, draws = (
        torch.from_numpy(pictures(5, 16)),
        torch.from_numpy(sample_color_params(1, 1, np.arange(5), FULL)),
    )
    whole = jitter(images, draws, *IMAGENET)
    for i in range(5):
        assert torch.equal(jitter(images[i : i + 1], draws[i : i + 1], *IMAGENET)[0], whole[i])


def test_colours_without_change_are_plain_normalisation():
    images = torch.from_numpy(pictures(3, 16))
    row = torch.tensor([[2.0, 0, 1, 1, 1, 1, 0, 0, 0]]).repeat(3, 1).double()
    np.testing.assert_allclose(jitter(images, row, *IMAGENET), normalize(images, *IMAGENET), atol=2e-6)


@pytest.mark.parametrize("operation", range(3))
@pytest.mark.parametrize("alpha", [0.8, 0.95, 1.05, 1.2])
def test_each_operation_is_torchvisions(operation, alpha):
    """Where nothing reaches the ends that torchvision clamps to; its gray has 0.2989 for 0.299."""
    images = 100 + pictures(2, 20, seed=4) // 6
    row = np.array([[0, 1, 2, 1, 1, 1, 0, 0, 0]] * 2, float)
    row[:, 3 + operation] = alpha
    ours = jitter(torch.from_numpy(images), torch.from_numpy(row), NOTHING, WHITE)
    adjust = (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation)[operation]
    theirs = adjust(torch.from_numpy(images).permute(0, 3, 1, 2) / 255, alpha)
    assert theirs.min() > 0 and theirs.max() < 1
    np.testing.assert_allclose(ours, theirs, atol=3e-5 if operation else 1e-6)


def test_colour_draws():
    rows = sample_color_params(0, 1, np.arange(24_000), FULL)
    orders, counts = np.unique(rows[:, :3], axis=0, return_counts=True)
    assert len(orders) == 6
    assert np.abs(counts - 4000).max() < 5 * (24_000 * 5 / 36) ** 0.5
    alphas = rows[:, 3:6]
    assert 0.6 <= alphas.min() < 0.601 and 1.399 < alphas.max() <= 1.4
    assert np.abs(alphas.mean(0) - 1).max() < 5 * 0.4 / (3 * 24_000) ** 0.5
    assert np.abs(alphas.var(0) / (0.16 / 3) - 1).max() < 5 * (0.8 / 24_000) ** 0.5
    lights = rows[:, 6:] / 0.1
    assert np.abs(lights.mean(0)).max() < 5 / 24_000**0.5
    assert np.abs(lights.var(0) - 1).max() < 5 * (2 / 24_000) ** 0.5
    assert np.abs((lights**3).mean(0)).max() < 5 * (15 / 24_000) ** 0.5
    assert np.abs((lights**4).mean(0) - 3).max() < 5 * (96 / 24_000) ** 0.5
    assert np.abs((np.abs(lights) < 1.959964).mean(0) - 0.95).max() < 5 * (0.0475 / 24_000) ** 0.5
    correlations = np.corrcoef(rows[:, 3:].T) - np.eye(6)
    assert np.abs(correlations).max() < 5 / 24_000**0.5
    squares = np.corrcoef((rows[:, 3:] - rows[:, 3:].mean(0)).T ** 2) - np.eye(6)
    assert np.abs(squares).max() < 5 / 24_000**0.5


def test_colour_draws_follow_their_strength():
    none = sample_color_params(0, 1, np.arange(50), AugmentConfig(jitter=0.0, lighting=0.0))
    assert (none[:, 3:6] == 1).all() and (none[:, 6:] == 0).all()
    half = sample_color_params(0, 1, np.arange(50), AugmentConfig(jitter=0.2, lighting=0.05))
    full = sample_color_params(0, 1, np.arange(50), FULL)
    np.testing.assert_allclose(2 * (half[:, 3:6] - 1), full[:, 3:6] - 1, atol=1e-15)
    np.testing.assert_allclose(2 * half[:, 6:], full[:, 6:])


def test_draws_are_functions_of_seed_epoch_and_image():
    ids = np.arange(200)
    base = sample_color_params(1, 2, ids, FULL)
    assert np.array_equal(sample_color_params(1, 2, ids[50:60], FULL), base[50:60])
    for other in (sample_color_params(2, 2, ids, FULL), sample_color_params(1, 3, ids, FULL)):
        assert not (other[:, 3:] == base[:, 3:]).any()


def test_streams_are_independent():
    """Crop, colour, policy, erasing and mixing of an image have nothing to do with each other."""
    streams = [random_uniform(1, 1, np.arange(20_000), 3, stream) for stream in RngStream]
    columns = np.concatenate(streams, axis=1).T
    correlations = np.corrcoef(columns) - np.eye(len(columns))
    assert np.abs(correlations).max() < 5 / 20_000**0.5


# ---------------------------------------------------------------------------- mirror


@pytest.mark.parametrize("kind", [np.uint8, np.float32])
@pytest.mark.parametrize("which", [[], [0], [3, 1], [0, 1, 2, 3, 4]])
def test_mirror(kind, which):
    images = pictures(5, 7).astype(kind)
    ours = torch.from_numpy(images.copy())
    mirror(ours, torch.tensor(which, dtype=torch.int64))
    expected = images.copy()
    expected[which] = images[which][:, :, ::-1]
    assert np.array_equal(ours, expected)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.5, 1.0])
def test_share_of_the_mirrored(share):
    augment = AugmentConfig(mirror=share)
    which = sample_flips(1, 1, np.arange(10_000), augment)
    assert abs(len(which) - 10_000 * share) <= 5 * (10_000 * share * (1 - share)) ** 0.5
    assert np.array_equal(sample_flips(1, 1, np.arange(5000, 10_000), augment) + 5000, which[which >= 5000])


# ---------------------------------------------------------------------------- erasing


def ones(count, size=16):
    return torch.ones(count, 3, size, size)


def erased(ids, probability=1.0, seed=1, epoch=1):
    images = ones(len(ids))
    erase(images, seed, epoch, np.asarray(ids), probability)
    return images


def test_erased_rectangles():
    """Rectangles of the mean colour (0 after normalising), each its own; 2 to 33 % of the picture."""
    images = erased(np.arange(300))
    areas, corners = [], set()
    for image in images:
        assert set(image.unique().tolist()) <= {0.0, 1.0}
        assert torch.equal(image[0], image[1]) and torch.equal(image[0], image[2])
        rows, columns = (image[0] == 0).nonzero(as_tuple=True)
        if len(rows):
            top, bottom, left, right = rows.min(), rows.max() + 1, columns.min(), columns.max() + 1
            assert len(rows) == (bottom - top) * (right - left), "a rectangle"
            areas.append(len(rows) / 256)
            corners.add((int(top), int(left), int(bottom), int(right)))
    assert len(areas) > 280 and len(corners) > 200
    assert 0.005 < min(areas) < 0.04 and 0.28 < max(areas) < 0.36


@pytest.mark.parametrize("probability", [0.0, 0.25, 1.0])
def test_erasing_is_a_probability(probability):
    images = erased(np.arange(1000), probability)
    share = (images == 0).flatten(1).any(1).double().mean()
    assert abs(share - probability) < 5 * (0.25 / 1000) ** 0.5 * (0 < probability < 1) + 0.02


def test_the_others_are_not_touched():
    images = torch.randn(200, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    before = images.clone()
    erase(images, 1, 1, np.arange(200), 0.5)
    changed = (images != before).flatten(1).any(1)
    assert 60 < changed.sum() < 140
    assert (images[images != before] == 0).all()


def test_erasing_belongs_to_the_image():
    """Not to its place in a batch, nor to other images; to seed and epoch."""
    whole = erased(np.arange(40), 0.7)
    for part in (np.arange(10), np.arange(39, 4, -7), np.array([17])):
        assert torch.equal(erased(part, 0.7), whole[part])
    assert torch.equal(erased(np.arange(40), 0.7), whole)
    assert not torch.equal(erased(np.arange(40), 0.7, seed=2), whole)
    assert not torch.equal(erased(np.arange(40), 0.7, epoch=2), whole)


def test_channels_last_images_are_erased_too():
    images = ones(20).to(memory_format=torch.channels_last)
    erase(images, 1, 1, np.arange(20), 1.0)
    assert torch.equal(images, erased(np.arange(20)))


# ---------------------------------------------------------------------------- mixing

CLASSES = 12


def mixed(step, seed=1, epoch=1, count=8, **augment):
    """A batch of pictures that are told apart by their values, and of as many classes."""
    images = torch.arange(1, count + 1).float()[:, None, None, None].expand(count, 3, 16, 16).contiguous()
    return images, *mix(
        images.clone(), torch.arange(count), AugmentConfig(**augment), CLASSES, seed, epoch, step
    )


def split_batch(labels, count=8):
    """The share of each image's own label, after a check of the two."""
    assert labels.shape == (count, CLASSES) and labels.dtype == torch.float32
    np.testing.assert_allclose(labels.sum(1), 1, atol=1e-6)
    own = labels[range(count), range(count)]
    partner = labels[range(count), np.roll(range(count), 1)]
    np.testing.assert_allclose(own + partner, 1, atol=1e-6)
    return own


@pytest.mark.parametrize("step", range(10))
def test_mixup(step):
    images, out, labels = mixed(step, mixup=0.4)
    share = split_batch(labels)
    assert len(set(share.tolist())) == 1
    expected = share[0] * images + (1 - share[0]) * images.roll(1, 0)
    np.testing.assert_allclose(out, expected, rtol=1e-5)


@pytest.mark.parametrize("step", range(10))
def test_cutmix(step):
    """The labels have the shares of the area, to the pixel."""
    images, out, labels = mixed(step, cutmix=1.0)
    share = split_batch(labels)
    own, other = out == images, out == images.roll(1, 0)
    assert (own ^ other).all()
    np.testing.assert_allclose(own[:, 0].double().mean((1, 2)), share, atol=1e-6)
    rows, columns = other[0, 0].nonzero(as_tuple=True)
    if len(rows):
        assert len(rows) == (rows.max() - rows.min() + 1) * (columns.max() - columns.min() + 1)


@pytest.mark.parametrize("name, alpha", [("mixup", 0.2), ("mixup", 1.0), ("cutmix", 1.0)])
def test_shares_have_the_beta_distribution(name, alpha):
    found = np.array([float(split_batch(mixed(step, **{name: alpha})[2])[0]) for step in range(600)])
    variance = 1 / (4 * (2 * alpha + 1))
    if name == "mixup":
        assert abs(found.mean() - 0.5) < 5 * (variance / 600) ** 0.5
        assert abs(found.var() - variance) < 0.02
    else:  # the box is cut off at the border, so that more is kept
        assert 0.5 < found.mean() < 0.75


def test_one_of_the_two_for_each_batch():
    batches = [mixed(step, mixup=0.8, cutmix=1.0)[1] for step in range(400)]
    between = sum(not torch.equal(out, out.round()) for out in batches)
    assert abs(between - 200) < 5 * 10


def test_mixing_belongs_to_the_step():
    _, out, labels = mixed(3, mixup=0.4, cutmix=1.0)
    again = mixed(3, mixup=0.4, cutmix=1.0)
    assert torch.equal(out, again[1]) and torch.equal(labels, again[2])
    others = [mixed(4, mixup=0.4), mixed(3, seed=2, mixup=0.4), mixed(3, epoch=2, mixup=0.4)]
    found = {float(split_batch(one[2])[0]) for one in (*others, mixed(3, mixup=0.4))}
    assert len(found) == 4


def test_a_batch_of_one_is_mixed_with_itself():
    images, out, labels = mixed(1, count=1, mixup=0.4)
    np.testing.assert_allclose(out, images)
    np.testing.assert_allclose(labels[0, 0], 1, atol=1e-6)


# ---------------------------------------------------------------------------- policies


@pytest.mark.parametrize("policy", ["randaugment", "trivialaugment"])
def test_policies(policy):
    """A function of the seed; torchvision's, at its default strength."""
    image = pictures(1, 32, seed=5)[0]
    results = [apply_policy(image, policy, seed) for seed in range(60)]
    for seed, result in enumerate(results):
        assert result.shape == (32, 32, 3) and result.dtype == np.uint8
        assert np.array_equal(result, apply_policy(image, policy, seed))
    assert len({result.tobytes() for result in results}) > 30
    kind = {"randaugment": v2.RandAugment, "trivialaugment": v2.TrivialAugmentWide}[policy]
    with torch.random.fork_rng():
        torch.manual_seed(7)
        theirs = kind()(torch.from_numpy(image).permute(2, 0, 1)).permute(1, 2, 0)
    assert np.array_equal(results[7], theirs)


@pytest.mark.parametrize("policy", ["randaugment", "trivialaugment"])
def test_policies_leave_the_picture_alone(policy):
    image = pictures(1, 32, seed=5)[0]
    before = image.copy()
    for seed in range(30):
        apply_policy(image, policy, seed)
    assert np.array_equal(image, before)


def test_torchs_random_numbers_are_left_alone():
    """What else draws from them, the weights say, does not depend on augmentation, nor the reverse."""
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    first = (
        erased(np.arange(9)),
        *mixed(1, mixup=0.4)[1:],
        apply_policy(pictures(1, 8)[0], "randaugment", 3),
    )
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(2)
    second = (
        erased(np.arange(9)),
        *mixed(1, mixup=0.4)[1:],
        apply_policy(pictures(1, 8)[0], "randaugment", 3),
    )
    assert all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))
