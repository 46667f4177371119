"""Learning rates: where they drop, how they warm up and end, and that torch.optim.lr_scheduler agrees.

The original's own numbers, epoch by epoch, are compared in test_oracle.py.
"""

import itertools
import random
from dataclasses import replace

import pytest
import torch
from torch.optim import lr_scheduler

from resnext.config import ScheduleConfig, find_config, read_config
from resnext.schedule import learning_rate

IMAGENET = ScheduleConfig(name="imagenet_step")
CIFAR = ScheduleConfig(name="cifar_step")
MULTISTEP = ScheduleConfig(name="multistep", milestones=(150, 225))
COSINE = ScheduleConfig(name="cosine")
STEPWISE, ALL = [IMAGENET, CIFAR, MULTISTEP], [IMAGENET, CIFAR, MULTISTEP, COSINE]


def rates(schedule, base, epochs, steps=1):
    """Return the rate of every step of a training."""
    places = itertools.product(range(1, epochs + 1), range(steps))
    return [learning_rate(schedule, base, epochs, epoch, step, steps) for epoch, step in places]


@pytest.mark.parametrize(
    ("schedule", "epochs", "expected"),
    [
        (IMAGENET, 30, []),
        (read_config(find_config("cifar10_resnet20")).schedule, 164, [81, 122]),  # fb.resnet.torch
        (IMAGENET, 100, [31, 61, 91]),
        (IMAGENET, 125, [31, 61, 91, 121]),
        (CIFAR, 300, [148, 223]),
        (CIFAR, 200, [99, 149]),  # 98 / 200 and 148 / 200 are 0.49 and 0.74, not above
        (CIFAR, 100, [50, 75]),
        (CIFAR, 10, [5, 8]),
        (CIFAR, 4, [2, 3]),
        (CIFAR, 2, [2]),  # straight to the lowest
        (CIFAR, 1, []),
        (MULTISTEP, 300, [151, 226]),
        (MULTISTEP, 200, [151]),
        (MULTISTEP, 100, []),
    ],
)
def test_first_epochs_of_lower_rates(schedule, epochs, expected):
    pairs = itertools.pairwise(rates(schedule, 0.1, epochs))
    assert [epoch for epoch, (before, rate) in enumerate(pairs, 2) if rate < before] == expected


@pytest.mark.parametrize("schedule", STEPWISE)
def test_steps_are_tenths_and_hold_for_whole_epochs(schedule):
    values = sorted(set(rates(schedule, 0.1, 300)), reverse=True)
    assert values == [0.1 * 0.1**n for n in range(len(values))] and len(values) > 2
    for epoch in (1, 31, 148, 151, 223, 226):
        whole = learning_rate(schedule, 0.1, 300, epoch)
        assert {learning_rate(schedule, 0.1, 300, epoch, step, 7) for step in range(7)} == {whole}


def test_gamma_multiplies_at_each_milestone():
    schedule = ScheduleConfig(name="multistep", milestones=(1, 3), gamma=0.5)
    assert rates(schedule, 0.8, 5) == [0.8, 0.4, 0.4, 0.2, 0.2]


def warmed_cosine(optimizer):
    linear = lr_scheduler.LinearLR(optimizer, 1 / 10, 1.0, 9)
    cosine = lr_scheduler.CosineAnnealingLR(optimizer, 30, 0.01)
    return lr_scheduler.SequentialLR(optimizer, [linear, cosine], [10])


@pytest.mark.parametrize(
    ("schedule", "base", "epochs", "steps", "theirs", "rel"),
    [
        (IMAGENET, 0.1, 100, 1, lambda o: lr_scheduler.StepLR(o, 30), 1e-14),
        (MULTISTEP, 0.1, 300, 1, lambda o: lr_scheduler.MultiStepLR(o, [150, 225], 0.1), 1e-14),
        (
            *(replace(MULTISTEP, gamma=0.2), 0.1, 300, 1),
            *(lambda o: lr_scheduler.MultiStepLR(o, [150, 225], 0.2), 1e-14),
        ),
        (COSINE, 0.4, 90, 1, lambda o: lr_scheduler.CosineAnnealingLR(o, 90, 0.0), 1e-9),
        (
            *(replace(COSINE, min_lr=0.003), 0.4, 6, 17),
            *(lambda o: lr_scheduler.CosineAnnealingLR(o, 102, 0.003), 1e-9),
        ),
        (replace(COSINE, min_lr=0.01, warmup_epochs=2), 0.4, 8, 5, warmed_cosine, 1e-9),
    ],
)
@pytest.mark.filterwarnings("ignore:.*epoch parameter")
def test_torchs_schedulers_agree(schedule, base, epochs, steps, theirs, rel):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=base)
    scheduler, expected = theirs(optimizer), []
    for _ in range(epochs * steps):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert rates(schedule, base, epochs, steps) == pytest.approx(expected, rel=rel)


@pytest.mark.parametrize("schedule", ALL)
def test_warmup_rises_evenly_to_the_base_rate(schedule):
    warmed = replace(schedule, warmup_epochs=5)
    values = rates(warmed, 0.2, 300, 4)[:20]
    assert values == pytest.approx([0.2 * k / 20 for k in range(1, 21)], rel=1e-15)
    assert values[-1] == learning_rate(warmed, 0.2, 300, 6, 0, 4) == 0.2
    if schedule is not COSINE:  # the drops stay where they are
        assert rates(warmed, 0.1, 300)[5:] == rates(schedule, 0.1, 300)[5:]


@pytest.mark.parametrize("warmup", [0, 3])
@pytest.mark.parametrize("min_lr", [0.0, 0.02])
def test_cosine_ends(warmup, min_lr):
    epochs, steps, base = 9, 50, 0.5
    schedule = ScheduleConfig(name="cosine", min_lr=min_lr, warmup_epochs=warmup)
    values = rates(schedule, base, epochs, steps)[warmup * steps :]
    assert values[0] == base
    assert all(a > b for a, b in itertools.pairwise(values))
    assert values[len(values) // 2] == pytest.approx((base + min_lr) / 2, rel=1e-12)
    # One step past the last would be min_lr; the last is a step of the flat end above it.
    assert min_lr < values[-1] < min_lr + 1e-4 * base
    end = learning_rate(schedule, base, epochs, epochs + 1, 0, steps)
    assert end == pytest.approx(min_lr, abs=1e-15)


@pytest.mark.parametrize("schedule", ALL)
def test_rates_scale_with_the_base_and_depend_on_nothing_else(schedule):
    """In any order and any number of times, the answers are the same doubles."""
    small, large = rates(schedule, 0.125, 30, 2), rates(schedule, 0.25, 30, 2)
    assert [2 * value for value in small] == large
    schedule = replace(schedule, warmup_epochs=2)
    places = list(itertools.product(range(1, 13), range(5)))
    before = {place: learning_rate(schedule, 0.1, 12, *place, 5) for place in places}
    shuffled = places * 2
    random.Random(1).shuffle(shuffled)
    assert all(learning_rate(schedule, 0.1, 12, *place, 5) == before[place] for place in shuffled)
