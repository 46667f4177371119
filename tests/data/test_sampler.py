"""The order of an epoch, and how ranks share its steps."""

import itertools

import numpy as np
import pytest

from data.sampler import EpochSampler, epoch_order
from resnext.config import AugmentConfig, Config, TrainConfig


@pytest.mark.parametrize("images", [1, 2, 10, 1000, 50_000])
def test_order_is_a_permutation(images):
    order = epoch_order(3, 7, images)
    assert order.dtype == np.int64 and np.array_equal(np.sort(order), np.arange(images))
    assert np.array_equal(order, epoch_order(3, 7, images))


def test_order_never_changes():
    """Another result would silently change every run and break every resume."""
    assert epoch_order(0, 1, 10).tolist() == [5, 9, 6, 7, 2, 0, 4, 3, 8, 1]


def test_orders_differ():
    assert len({tuple(epoch_order(s, e, 100).tolist()) for s in range(10) for e in range(1, 31)}) == 300


def test_all_permutations_are_equally_likely():
    orders = [tuple(epoch_order(0, epoch, 4).tolist()) for epoch in range(4800)]
    counts = np.array([orders.count(p) for p in itertools.permutations(range(4))])
    assert counts.sum() == 4800
    assert ((counts - 200) ** 2 / 200).sum() < 24 + 5 * np.sqrt(48)


def test_order_has_no_trend():
    order = epoch_order(0, 1, 20_000)
    for first, second in ((order, np.arange(20_000)), (order[:-1], order[1:])):
        assert abs(np.corrcoef(first, second)[0, 1]) < 5 / np.sqrt(20_000)


@pytest.mark.parametrize("mixup", [0.0, 0.2])
def test_ranks_share_every_step(mixup):
    """Together they train on each image once; to mix, each also prepares the previous image of the batch."""
    config = Config(augment=AugmentConfig(mixup=mixup), train=TrainConfig(batch_size=8))
    samplers = [
        EpochSampler(30, config, lambda images, rank=rank: np.arange(rank, images, 3)) for rank in range(3)
    ]
    for sampler in samplers:
        sampler.set_epoch(2, first_step=1)
    order = epoch_order(config.run.seed, 2, 30)
    found = list(zip(*samplers, strict=True))
    assert len(found) == len(samplers[0]) == 3
    for number, parts in enumerate(found, 1):
        batch = order[8 * number : 8 * number + 8]
        for rank, part in enumerate(parts):
            assert (part.epoch, part.step) == (2, number)
            kept = np.arange(len(part.ids)) if part.kept is None else part.kept
            assert np.array_equal(part.ids[kept], batch[rank::3])
            if mixup:
                assert np.array_equal(part.ids[kept - 1], np.roll(batch, 1)[rank::3])
            else:
                assert part.kept is None
