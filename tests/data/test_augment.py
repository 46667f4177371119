"""Augmentation of whole batches, compared with one image at a time in NumPy, and with torchvision.

test_oracle.py and test_transforms.py compare with numbers of the original's transforms.
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
from data.transforms import apply_policy
from resnext.config import STATISTICS, AugmentConfig

MEAN, STD = STATISTICS["cifar10"]


def noise(count, size, seed=0):
    return np.random.default_rng(seed).integers(256, size=(count, size, size, 3)).astype(np.uint8)


def normalized(image, mean=MEAN, std=STD):
    """float32 (3, S, S)"""
    channels = zip(image.transpose(2, 0, 1).astype(np.float32), mean, std, strict=True)
    return np.stack([(c - np.float32(m)) / np.float32(s) for c, m, s in channels])


def reference(pixels, mirrored, x, y, padding):
    """Normalize, mirror, pad with zeros, and crop one image, in this order."""
    image = normalized(pixels)
    if mirrored:
        image = image[:, :, ::-1]
    padded = np.pad(image, ((0, 0), (padding, padding), (padding, padding)))
    size = image.shape[1]
    return padded[:, y : y + size, x : x + size]


def crop(images, mirrored, x, y, padding):
    arrays = (torch.from_numpy(np.asarray(a)) for a in (images, mirrored, x, y))
    return cifar_crop(*arrays, padding, torch.tensor(MEAN), torch.tensor(STD))


@pytest.mark.parametrize("padding, size", [(0, 32), (2, 20), (4, 32), (7, 8)])
def test_every_offset_and_both_mirrors(padding, size):
    places = range(2 * padding + 1)
    cases = [(m, x, y) for m in (False, True) for x in places for y in places]
    mirrored, x, y = (np.array(values) for values in zip(*cases, strict=True))
    images = noise(len(cases), size)
    before = images.copy()
    ours = crop(images, mirrored, x, y, padding)
    theirs = np.stack([reference(*one, padding) for one in zip(images, mirrored, x, y, strict=True)])
    assert ours.dtype == torch.float32 and ours.is_contiguous(memory_format=torch.channels_last)
    np.testing.assert_array_equal(ours.numpy(), theirs)
    np.testing.assert_array_equal(images, before)


@pytest.mark.parametrize("mirror, padding", [(0.5, 4), (0.5, 0), (0.0, 4), (1.0, 1)])
def test_drawn_crops(mirror, padding):
    images, draws = noise(40, 32, seed=1), sample_cifar_crops(3, 5, np.arange(40), mirror, padding)
    theirs = np.stack([reference(*one, padding) for one in zip(images, *draws, strict=True)])
    np.testing.assert_array_equal(crop(images, *draws, padding).numpy(), theirs)


@pytest.mark.parametrize("name", STATISTICS)
def test_normalization(name):
    mean, std = STATISTICS[name]
    images = np.stack([np.arange(192, dtype=np.uint8).reshape(8, 8, 3), noise(1, 8)[0]])
    ours = normalize(torch.from_numpy(images), torch.tensor(mean), torch.tensor(std))
    expected = np.stack([normalized(image, mean, std) for image in images])
    assert ours.dtype == torch.float32 and ours.is_contiguous(memory_format=torch.channels_last)
    np.testing.assert_array_equal(ours.numpy(), expected)
    exact = (images.astype(np.float64) - mean) / std
    np.testing.assert_allclose(ours.numpy().transpose(0, 2, 3, 1), exact, rtol=1e-5, atol=1e-6)


def test_the_border_has_the_mean_color():
    """Padding follows normalization: zero there is the mean, not black."""
    images = np.full((1, 8, 8, 3), 255, np.uint8)
    ours = crop(images, np.array([False]), np.array([0]), np.array([8]), 4)
    assert (ours[0, :, 4:, :] == 0).all() and (ours[0, :, :, :4] == 0).all()
    assert (ours[0, :, :4, 4:] > 1).all()


def test_x_moves_columns_and_y_moves_rows():
    images = np.zeros((1, 8, 8, 3), np.uint8)
    images[0, 2, 5] = 255
    for mirrored, column in ((False, 5), (True, 2)):
        ours = crop(images, np.array([mirrored]), np.array([1]), np.array([3]), 2)
        assert (ours[0, 0] > 0).nonzero().tolist() == [[2 + 2 - 3, column + 2 - 1]]


# ---------------------------------------------------------------------------- ImageNet's colors

NOTHING, WHITE = torch.zeros(3), torch.full((3,), 255.0)
IMAGENET = tuple(torch.tensor(values) for values in STATISTICS["folder"])
GRAY = np.array([0.299, 0.587, 0.114])
EIGENVALUES = np.array([0.2175, 0.0188, 0.0045])
EIGENVECTORS = np.array([[-0.5675, 0.7192, 0.4009], [-0.5808, -0.0045, -0.8140], [-0.5836, -0.6948, 0.4203]])
FULL = AugmentConfig(jitter=0.4, lighting=0.1)


def jittered(images, draws, mean=IMAGENET[0], std=IMAGENET[1]):
    return jitter(torch.from_numpy(images), torch.from_numpy(draws), mean, std)


def color_reference(image, row):
    """One image, one operation after another, in float64; pixels in 0...1 as in the original."""
    mean, std = STATISTICS["folder"]
    pixels = image.astype(np.float64) / 255
    for operation in row[:3].astype(int):
        alpha = row[3 + operation]
        gray = pixels @ GRAY
        other = {0: 0.0, 1: gray.mean(), 2: gray[:, :, None]}[operation]
        pixels = alpha * pixels + (1 - alpha) * other
    pixels = pixels + EIGENVECTORS @ (row[6:] * EIGENVALUES)
    return (pixels - np.asarray(mean) / 255) / (np.asarray(std) / 255)


@pytest.mark.parametrize("kind", [np.uint8, np.float32])
@pytest.mark.parametrize("order", [*itertools.permutations(range(3)), None], ids=str)
def test_colors_are_the_operations_one_after_another(order, kind):
    images = noise(30, 9, seed=3).astype(kind)
    if kind is np.float32:
        images = images * 1.1 - 12  # bicubic overshoots, and nothing is clamped
    draws = sample_color_params(5, 2, np.arange(30), FULL)
    assert len({tuple(row[:3]) for row in draws}) == 6
    if order:
        draws[:, :3] = order
    ours = jittered(images, draws)
    assert ours.dtype == torch.float32 and ours.shape == (30, 3, 9, 9)
    expected = [color_reference(*one) for one in zip(images, draws, strict=True)]
    np.testing.assert_allclose(ours.permute(0, 2, 3, 1), np.stack(expected), atol=3e-6)


def test_colors_do_not_depend_on_the_batch():
    images, draws = noise(5, 16), sample_color_params(1, 1, np.arange(5), FULL)
    whole = jittered(images, draws)
    for i in range(5):
        assert torch.equal(jittered(images[i : i + 1], draws[i : i + 1])[0], whole[i])


def test_colors_without_change_are_plain_normalization():
    images, draws = noise(3, 16), np.array([[2.0, 0, 1, 1, 1, 1, 0, 0, 0]] * 3)
    plain = normalize(torch.from_numpy(images), *IMAGENET)
    np.testing.assert_allclose(jittered(images, draws), plain, atol=2e-6)


@pytest.mark.parametrize("operation", range(3))
@pytest.mark.parametrize("alpha", [0.8, 0.95, 1.05, 1.2])
def test_each_operation_is_torchvisions(operation, alpha):
    """If nothing reaches the ends that torchvision clamps to; its gray has 0.2989 for 0.299."""
    images = 100 + noise(2, 20, seed=4) // 6
    row = np.array([[0, 1, 2, 1, 1, 1, 0, 0, 0]] * 2, float)
    row[:, 3 + operation] = alpha
    adjust = (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation)[operation]
    theirs = adjust(torch.from_numpy(images).permute(0, 3, 1, 2) / 255, alpha)
    assert theirs.min() > 0 and theirs.max() < 1
    ours = jittered(images, row, NOTHING, WHITE)
    np.testing.assert_allclose(ours, theirs, atol=3e-5 if operation else 1e-6)


def test_distribution_of_color_params():
    rows = sample_color_params(0, 1, np.arange(24_000), FULL)
    orders, counts = np.unique(rows[:, :3], axis=0, return_counts=True)
    assert np.array_equal(orders, list(itertools.permutations(range(3))))
    assert np.abs(counts - 4000).max() < 5 * (24_000 * 5 / 36) ** 0.5
    alphas = rows[:, 3:6]
    assert 0.6 <= alphas.min() < 0.601 and 1.399 < alphas.max() <= 1.4
    assert np.abs(alphas.mean(0) - 1).max() < 5 * 0.4 / (3 * 24_000) ** 0.5
    assert np.abs(alphas.var(0) / (0.16 / 3) - 1).max() < 5 * (0.8 / 24_000) ** 0.5
    lights = rows[:, 6:] / 0.1
    for moment, expected, variance in ((lights, 0, 1), (lights**3, 0, 15), (lights**4, 3, 96)):
        assert np.abs(moment.mean(0) - expected).max() < 5 * (variance / 24_000) ** 0.5
    assert np.abs(lights.var(0) - 1).max() < 5 * (2 / 24_000) ** 0.5
    assert np.abs((np.abs(lights) < 1.959964).mean(0) - 0.95).max() < 5 * (0.0475 / 24_000) ** 0.5
    for values in (rows[:, 3:], (rows[:, 3:] - rows[:, 3:].mean(0)) ** 2):
        assert np.abs(np.corrcoef(values.T) - np.eye(6)).max() < 5 / 24_000**0.5


def test_color_params_follow_their_strength():
    none, half, full = (
        sample_color_params(0, 1, np.arange(50), AugmentConfig(jitter=jitter, lighting=lighting))
        for jitter, lighting in ((0.0, 0.0), (0.2, 0.05), (0.4, 0.1))
    )
    assert (none[:, 3:6] == 1).all() and (none[:, 6:] == 0).all()
    np.testing.assert_allclose(2 * (half[:, 3:6] - 1), full[:, 3:6] - 1, atol=1e-15)
    np.testing.assert_allclose(2 * half[:, 6:], full[:, 6:])


def test_color_params_are_functions_of_seed_epoch_and_image():
    ids = np.arange(200)
    base = sample_color_params(1, 2, ids, FULL)
    assert np.array_equal(sample_color_params(1, 2, ids[50:60], FULL), base[50:60])
    for other in (sample_color_params(2, 2, ids, FULL), sample_color_params(1, 3, ids, FULL)):
        assert not (other[:, 3:] == base[:, 3:]).any()


# ---------------------------------------------------------------------------- mirror


@pytest.mark.parametrize("kind", [np.uint8, np.float32])
@pytest.mark.parametrize("which", [[], [0], [3, 1], [0, 1, 2, 3, 4]])
def test_mirror(kind, which):
    images = noise(5, 7).astype(kind)
    ours, expected = torch.from_numpy(images.copy()), images.copy()
    mirror(ours, torch.tensor(which, dtype=torch.int64))
    expected[which] = images[which][:, :, ::-1]
    assert np.array_equal(ours, expected)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.5, 1.0])
def test_share_of_the_mirrored(share):
    augment = AugmentConfig(mirror=share)
    which = sample_flips(1, 1, np.arange(10_000), augment)
    assert abs(len(which) - 10_000 * share) <= 5 * (10_000 * share * (1 - share)) ** 0.5
    assert np.array_equal(sample_flips(1, 1, np.arange(5000, 10_000), augment) + 5000, which[which >= 5000])


# ---------------------------------------------------------------------------- erasing


def erased(ids, probability=1.0, seed=1, epoch=1):
    images = torch.ones(len(ids), 3, 16, 16)
    erase(images, seed, epoch, np.asarray(ids), probability)
    return images


def test_erased_rectangles():
    """Rectangles of the mean color (0 after normalization), different ones; 2 to 33% of the image."""
    areas, corners = [], set()
    for image in erased(np.arange(300)):
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
    share = (erased(np.arange(1000), probability) == 0).flatten(1).any(1).double().mean()
    assert abs(share - probability) < 5 * (0.25 / 1000) ** 0.5 * (0 < probability < 1) + 0.02


def test_only_the_chosen_are_erased_in_either_layout():
    images = torch.randn(200, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    ours, other = images.clone(), images.to(memory_format=torch.channels_last, copy=True)
    for batch in (ours, other):
        erase(batch, 1, 1, np.arange(200), 0.5)
    assert 60 < (ours != images).flatten(1).any(1).sum() < 140
    assert (ours[ours != images] == 0).all() and torch.equal(ours, other)


def test_erasing_belongs_to_the_image():
    """To seed, epoch, and image, not to its place in a batch."""
    whole = erased(np.arange(40), 0.7)
    for part in (np.arange(40), np.arange(10), np.arange(39, 4, -7), np.array([17])):
        assert torch.equal(erased(part, 0.7), whole[part])
    assert not torch.equal(erased(np.arange(40), 0.7, seed=2), whole)
    assert not torch.equal(erased(np.arange(40), 0.7, epoch=2), whole)


# ---------------------------------------------------------------------------- mixing

CLASSES = 12


def mixed(step, seed=1, epoch=1, count=8, **augment):
    """Return a batch of constant images, the same mixed, and the shares that their own labels keep."""
    images = torch.arange(1, count + 1).float()[:, None, None, None].expand(count, 3, 16, 16).contiguous()
    augment = AugmentConfig(**augment)
    out, labels = mix(images.clone(), torch.arange(count), augment, CLASSES, seed, epoch, step)
    assert labels.shape == (count, CLASSES) and labels.dtype == torch.float32
    np.testing.assert_allclose(labels.sum(1), 1, atol=1e-6)
    own = labels[range(count), range(count)]
    if count > 1:
        np.testing.assert_allclose(own + labels[range(count), np.roll(range(count), 1)], 1, atol=1e-6)
    return images, out, own


@pytest.mark.parametrize("step", range(10))
def test_mixup(step):
    images, out, share = mixed(step, mixup=0.4)
    assert len(set(share.tolist())) == 1
    np.testing.assert_allclose(out, share[0] * images + (1 - share[0]) * images.roll(1, 0), rtol=1e-5)


@pytest.mark.parametrize("step", range(10))
def test_cutmix(step):
    """The labels have the shares of the area, to the pixel."""
    images, out, share = mixed(step, cutmix=1.0)
    own, other = out == images, out == images.roll(1, 0)
    assert (own ^ other).all()
    np.testing.assert_allclose(own[:, 0].double().mean((1, 2)), share, atol=1e-6)
    rows, columns = other[0, 0].nonzero(as_tuple=True)
    if len(rows):
        assert len(rows) == (rows.max() - rows.min() + 1) * (columns.max() - columns.min() + 1)


@pytest.mark.parametrize("name, alpha", [("mixup", 0.2), ("mixup", 1.0), ("cutmix", 1.0)])
def test_shares_have_the_beta_distribution(name, alpha):
    found = np.array([float(mixed(step, **{name: alpha})[2][0]) for step in range(600)])
    variance = 1 / (4 * (2 * alpha + 1))
    if name == "mixup":
        assert abs(found.mean() - 0.5) < 5 * (variance / 600) ** 0.5
        assert abs(found.var() - variance) < 0.02
    else:  # the box is cut off at the border, so more is kept
        assert 0.5 < found.mean() < 0.75


def test_each_batch_gets_one_of_the_two():
    batches = [mixed(step, mixup=0.8, cutmix=1.0)[1] for step in range(400)]
    between = sum(not torch.equal(out, out.round()) for out in batches)
    assert abs(between - 200) < 5 * 10


def test_mixing_belongs_to_the_step():
    for first, again in zip(mixed(3, mixup=0.4, cutmix=1.0), mixed(3, mixup=0.4, cutmix=1.0), strict=True):
        assert torch.equal(first, again)
    places = [{"step": 3}, {"step": 4}, {"step": 3, "seed": 2}, {"step": 3, "epoch": 2}]
    assert len({float(mixed(**place, mixup=0.4)[2][0]) for place in places}) == 4


def test_a_batch_of_one_is_mixed_with_itself():
    images, out, share = mixed(1, count=1, mixup=0.4)
    np.testing.assert_allclose(out, images)
    np.testing.assert_allclose(share, 1, atol=1e-6)


# ---------------------------------------------------------------------------- policies


@pytest.mark.parametrize(
    "policy, kind", [("randaugment", v2.RandAugment), ("trivialaugment", v2.TrivialAugmentWide)]
)
def test_policies(policy, kind):
    """A function of the seed; torchvision's, at its default strength."""
    image = noise(1, 32, seed=5)[0]
    before = image.copy()
    results = [apply_policy(image, policy, seed) for seed in range(60)]
    for seed, result in enumerate(results):
        assert result.shape == (32, 32, 3) and result.dtype == np.uint8
        assert np.array_equal(result, apply_policy(image, policy, seed))
    assert np.array_equal(image, before)
    assert len({result.tobytes() for result in results}) > 30
    with torch.random.fork_rng():
        torch.manual_seed(7)
        theirs = kind()(torch.from_numpy(image).permute(2, 0, 1)).permute(1, 2, 0)
    assert np.array_equal(results[7], theirs)


def test_torchs_random_numbers_are_left_alone():
    """What else draws from them, such as the weights, does not depend on augmentation, nor the reverse."""
    results = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        before = torch.random.get_rng_state()
        policy = apply_policy(noise(1, 8)[0], "randaugment", 3)
        results.append((erased(np.arange(9)), *mixed(1, mixup=0.4)[1:], policy))
        assert torch.equal(torch.random.get_rng_state(), before)
    assert all(np.array_equal(a, b) for a, b in zip(*results, strict=True))
