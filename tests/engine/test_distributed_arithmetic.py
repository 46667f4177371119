"""Training on several ranks computes what one process and a plain loop compute, in float64."""

import re
from collections.abc import Callable

import numpy as np
import pytest
import torch
from float64_training import BATCHES, configuration
from torch import Tensor

from resnext.batch_plan import split_batch


@pytest.fixture(scope="module")
def trained(processes, tmp_path_factory) -> Callable[..., dict[str, Tensor]]:
    """Return a function of float64_training's results, each computed once."""
    folder = tmp_path_factory.mktemp("float64")

    def results(function: str, ranks: int, accumulation: int, bn_group: int) -> dict[str, Tensor]:
        target = folder / f"{function}-{ranks}-{accumulation}-{bn_group}"
        if not target.exists():
            what = f"float64_training:{function}"
            processes.run(ranks, what, accumulation, bn_group, str(target)).finished()
        return torch.load(target, weights_only=True)

    return results


def assert_close(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    for name, tensor in theirs.items():
        scale = tensor.abs().max().clamp_min(1e-3)
        error = ((ours[name] - tensor).abs().max() / scale).item()
        assert error < 1e-10, f"{name}: {error}"


@pytest.mark.parametrize(("accumulation", "bn_group"), [(1, 16), (2, 8)])
def test_one_process_trains_as_a_plain_loop(accumulation, bn_group, trained):
    ours = trained("train_by_program", 1, accumulation, bn_group)
    theirs = trained("train_by_hand", 1, accumulation, bn_group)
    extra = {name for name in ours.keys() - theirs.keys() if not re.search("num_batches|n_averaged", name)}
    assert all(name.startswith("ema/") and "running" in name for name in extra)
    assert_close(ours, theirs)


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("ranks", "accumulation", "bn_group"),
    [
        (4, 1, 16),
        (2, 1, 16),
        (4, 2, 8),
        pytest.param(2, 2, 8, marks=SLOW),
        pytest.param(4, 1, 8, marks=SLOW),
    ],
)
def test_ranks_train_as_one(ranks, accumulation, bn_group, trained):
    """Loss, hits, weights, momentum, EMA and running statistics; of 3 images, some ranks have none."""
    last = np.sum(split_batch(BATCHES[-1], configuration(accumulation, bn_group).train, ranks), 0)
    assert (last.min() == 0) == (ranks == 4)
    ours = trained("train_by_program", ranks, accumulation, bn_group)
    alone = trained("train_by_program", 1, accumulation, bn_group)
    assert ours.keys() == alone.keys()
    assert_close(ours, alone)
    assert_close(ours, trained("train_by_hand", 1, accumulation, bn_group))
    assert torch.equal(ours["results"][:, 1:], alone["results"][:, 1:])
