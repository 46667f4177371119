"""Learning rates: where they drop, how they warm up and end, and torch.optim.lr_scheduler's.

The original's own numbers, epoch by epoch, are compared in test_oracle.py.
"""

import itertools
import random

import pytest
import torch
from torch.optim import lr_scheduler

from resnext.config import ScheduleConfig
from resnext.schedule import learning_rate

IMAGENET = ScheduleConfig(name="imagenet_step")
CIFAR = ScheduleConfig(name="cifar_step")
MULTISTEP = ScheduleConfig(name="multistep", milestones=(150, 225))
COSINE = ScheduleConfig(name="cosine")


def rates(schedule, base, epochs, steps=1):
    """The rate of every step of a training."""
    return [
        learning_rate(schedule, base, epochs, epoch, step, steps)
        for epoch in range(1, epochs + 1)
        for step in range(steps)
    ]


def first_epochs(schedule, epochs):
    """Epochs, from 1, whose rate is below that of the epoch before."""
    values = rates(schedule, 0.1, epochs)
    return [i + 1 for i in range(1, epochs) if values[i] < values[i - 1]]


@pytest.mark.parametrize(
    "schedule, epochs, expected",
    [
        (IMAGENET, 30, []),
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
    assert first_epochs(schedule, epochs) == expected


@pytest.mark.parametrize("schedule", [IMAGENET, CIFAR, MULTISTEP])
def test_each_drop_is_a_tenth(schedule):
    values = sorted(set(rates(schedule, 0.1, 300)), reverse=True)
    assert values == [0.1 * 0.1**n for n in range(len(values))] and len(values) > 2


def test_gamma_multiplies_at_each_milestone():
    schedule = ScheduleConfig(name="multistep", milestones=(1, 3), gamma=0.5)
    assert rates(schedule, 0.8, 5) == [0.8, 0.4, 0.4, 0.2, 0.2]


@pytest.mark.parametrize("schedule", [IMAGENET, CIFAR, MULTISTEP])
def test_steps_hold_one_rate_within_an_epoch(schedule):
    for epoch in (1, 31, 148, 151, 223, 226):
        whole = learning_rate(schedule, 0.1, 300, epoch)
        assert {learning_rate(schedule, 0.1, 300, epoch, step, 7) for step in range(7)} == {whole}


# ---------------------------------------------------------------------------- torch's schedulers


def torch_rates(make, base, count):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=base)
    scheduler = make(optimizer)
    values = []
    for _ in range(count):
        values.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return values


@pytest.mark.parametrize("gamma", [0.1, 0.2])
def test_multistep_is_torchs(gamma):
    schedule = ScheduleConfig(name="multistep", milestones=(150, 225), gamma=gamma)
    theirs = torch_rates(lambda o: lr_scheduler.MultiStepLR(o, [150, 225], gamma), 0.1, 300)
    assert rates(schedule, 0.1, 300) == pytest.approx(theirs, rel=1e-14)


def test_imagenet_step_is_torchs():
    theirs = torch_rates(lambda o: lr_scheduler.StepLR(o, 30), 0.1, 100)
    assert rates(IMAGENET, 0.1, 100) == pytest.approx(theirs, rel=1e-14)


@pytest.mark.parametrize("min_lr", [0.0, 0.003])
@pytest.mark.parametrize("epochs, steps", [(90, 1), (6, 17)])
def test_cosine_is_torchs(epochs, steps, min_lr):
    count = epochs * steps
    theirs = torch_rates(lambda o: lr_scheduler.CosineAnnealingLR(o, count, min_lr), 0.4, count)
    ours = rates(ScheduleConfig(name="cosine", min_lr=min_lr), 0.4, epochs, steps)
    assert ours == pytest.approx(theirs, rel=1e-9)


def test_warmup_and_cosine_are_torchs():
    warm, count = 2 * 5, 8 * 5
    schedule = ScheduleConfig(name="cosine", min_lr=0.01, warmup_epochs=2)

    def sequence(optimizer):
        linear = lr_scheduler.LinearLR(optimizer, 1 / warm, 1.0, warm - 1)
        cosine = lr_scheduler.CosineAnnealingLR(optimizer, count - warm, 0.01)
        return lr_scheduler.SequentialLR(optimizer, [linear, cosine], [warm])

    theirs = torch_rates(sequence, 0.4, count)
    assert rates(schedule, 0.4, 8, 5) == pytest.approx(theirs, rel=1e-9)


# ---------------------------------------------------------------------------- warm-up and ends


@pytest.mark.parametrize("name", ["imagenet_step", "cifar_step", "multistep", "cosine"])
def test_warmup_rises_evenly_to_the_base_rate(name):
    schedule = ScheduleConfig(name=name, milestones=(150,), warmup_epochs=5)
    values = rates(schedule, 0.2, 300, 4)[:20]
    assert values == pytest.approx([0.2 * k / 20 for k in range(1, 21)], rel=1e-15)
    assert values[-1] == 0.2
    assert learning_rate(schedule, 0.2, 300, 6, 0, 4) == 0.2


@pytest.mark.parametrize("schedule", [IMAGENET, CIFAR, MULTISTEP])
def test_warmup_does_not_move_the_drops(schedule):
    warmed = ScheduleConfig(name=schedule.name, milestones=schedule.milestones, warmup_epochs=5)
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


@pytest.mark.parametrize("schedule", [IMAGENET, CIFAR, MULTISTEP, COSINE])
def test_rates_scale_with_the_base(schedule):
    small, large = rates(schedule, 0.125, 30, 2), rates(schedule, 0.25, 30, 2)
    assert [2 * value for value in small] == large


@pytest.mark.parametrize("name", ["imagenet_step", "cifar_step", "multistep", "cosine"])
def test_rates_depend_on_nothing_but_the_arguments(name):
    """Asked in any order, any number of times, the answers are the same doubles."""
    schedule = ScheduleConfig(name=name, milestones=(4, 8), warmup_epochs=2)
    places = [(epoch, step) for epoch in range(1, 13) for step in range(5)]
    before = {place: learning_rate(schedule, 0.1, 12, *place, 5) for place in places}
    shuffled = places * 2
    random.Random(1).shuffle(shuffled)
    assert all(learning_rate(schedule, 0.1, 12, *place, 5) == before[place] for place in shuffled)
