"""Ghost batch norm compared with one plain BatchNorm, or one whole network, per group.

The original trained on several GPUs. Each GPU normalized its own slice of the batch, gradients were
those of the mean loss over the whole batch, and running statistics were the first GPU's. These tests
rebuild that from separate copies and compare in float64.
"""

import contextlib
import copy
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from resnext.batch_plan import split_batch, split_evenly
from resnext.config import parse_config
from resnext.engine.train_state import build_train_state, init_momentum
from resnext.engine.trainer import train_step
from resnext.models.ghost_batchnorm import (
    GhostBatchNorm2d,
    frozen_running_statistics,
    kernels_work,
    use_ghost_batchnorm,
)
from resnext.models.resnext import ResNeXt

CPU = torch.device("cpu")


def error(ours, theirs):
    """Return the largest difference, relative to the largest value."""
    assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
    return ((ours - theirs).abs().max() / theirs.abs().max().clamp_min(1e-30)).item()


def random_images(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def nonempty(images, slices):
    """Return the sizes of the slices that have images."""
    return [size for size in split_evenly(images, slices) if size]


# ---------------------------------------------------------------------------- slices


def test_slice_sizes():
    assert split_evenly(64, 4) == [16] * 4
    assert split_evenly(50, 4) == [13, 13, 12, 12]
    assert split_evenly(83, 8) == [11, 11, 11, 10, 10, 10, 10, 10]
    assert split_evenly(3, 4) == [1, 1, 1, 0]
    assert split_evenly(0, 2) == [0, 0]
    assert split_evenly(7, 1) == [7]


def test_micro_batches_end_where_groups_do():
    """The groups are the slices of the whole batch for any number of micro-batches."""
    for groups in (1, 2, 4, 8):
        for steps in [n for n in (1, 2, 4, 8) if n <= groups]:
            text = f"train: {{batch_size: {4 * groups}, bn_group: 4, accumulation_steps: {steps}}}"
            train = parse_config(text, "test").train
            for images in range(1, 4 * groups + 1):
                parts = [n for [n] in split_batch(images, train, 1) if n]
                found = [size for part in parts for size in nonempty(part, groups // steps)]
                assert found == nonempty(images, groups)


def test_micro_batches_without_groups():
    train = parse_config("train: {batch_size: 64, accumulation_steps: 4}", "test").train
    for images, expected in ((64, [16] * 4), (50, [13, 13, 12, 12]), (2, [1, 1])):
        assert [n for [n] in split_batch(images, train, 1) if n] == expected


# ---------------------------------------------------------------------------- the layer


def grouped_and_replicas(groups, used):
    """Return a GhostBatchNorm2d and `used` plain copies of it."""
    norm = GhostBatchNorm2d(5, groups).double()
    with torch.no_grad():
        norm.weight.copy_(torch.linspace(0.5, 1.5, 5))
        norm.bias.copy_(torch.linspace(-1, 1, 5))
        norm.running_mean.copy_(torch.linspace(-0.2, 0.3, 5))
        norm.running_var.copy_(torch.linspace(0.7, 2, 5))
    plain = nn.BatchNorm2d(5).double()
    plain.load_state_dict(norm.state_dict())
    return norm, [copy.deepcopy(plain) for _ in range(used)]


@pytest.mark.parametrize("images, groups", [(64, 4), (50, 4), (17, 8), (3, 4), (1, 2), (12, 1)])
def test_groups_are_replicas(images, groups):
    sizes = nonempty(images, groups)
    norm, replicas = grouped_and_replicas(groups, len(sizes))
    x = (2 + 3 * random_images(images, 5, 4, 3)).requires_grad_()
    weights = random_images(images, 5, 4, 3, seed=1)
    output = norm(x)
    (output * weights).sum().backward()
    parts = [p.clone().requires_grad_() for p in x.detach().split(sizes)]
    expected = [replica(part) for replica, part in zip(replicas, parts, strict=True)]
    (torch.cat(expected) * weights).sum().backward()
    assert error(output, torch.cat(expected)) < 1e-14
    assert error(x.grad, torch.cat([p.grad for p in parts])) < 1e-13
    for name in ("weight", "bias"):
        theirs = sum(getattr(replica, name).grad for replica in replicas)
        assert error(getattr(norm, name).grad, theirs) < 1e-13
    for name in ("running_mean", "running_var"):
        assert error(getattr(norm, name), getattr(replicas[0], name)) < 1e-14
    assert norm.num_batches_tracked == replicas[0].num_batches_tracked == 1


def test_running_statistics_of_several_steps_follow_the_first_group():
    norm, (replica,) = grouped_and_replicas(4, 1)
    for step, images in enumerate((64, 64, 50, 6)):
        x = random_images(images, 5, 3, 3, seed=step)
        norm(x)
        replica(x[: split_evenly(images, 4)[0]])
    assert error(norm.running_mean, replica.running_mean) < 1e-14
    assert error(norm.running_var, replica.running_var) < 1e-14
    assert norm.num_batches_tracked == 4


def test_other_groups_do_not_change_the_running_statistics():
    first, second = (grouped_and_replicas(2, 1)[0] for _ in range(2))
    x = random_images(8, 5, 3, 3)
    first(x)
    second(torch.cat([x[:4], 100 + 7 * x[4:]]))
    assert torch.equal(first.running_mean, second.running_mean)
    assert torch.equal(first.running_var, second.running_var)


@pytest.mark.parametrize("images", [8, 3, 1])
def test_evaluation_is_plain(images):
    norm, (replica,) = grouped_and_replicas(4, 1)
    before = {k: v.clone() for k, v in norm.state_dict().items()}
    x = random_images(images, 5, 3, 3)
    assert torch.equal(norm.eval()(x), replica.eval()(x))
    assert all(torch.equal(v, before[k]) for k, v in norm.state_dict().items())


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_bf16_input(layout):
    """As under autocast: half-precision images, float32 parameters and statistics."""
    norm, replicas = grouped_and_replicas(4, 4)
    norm.float()
    x = random_images(50, 5, 4, 4).bfloat16().to(memory_format=layout)
    output = norm(x)
    parts = x.split([13, 13, 12, 12])
    expected = [r.float()(p) for r, p in zip(replicas, parts, strict=True)]
    assert output.dtype == torch.bfloat16 and norm.running_mean.dtype == torch.float32
    assert torch.equal(output, torch.cat(expected))
    assert torch.equal(norm.running_mean, replicas[0].running_mean)
    assert torch.equal(norm.running_var, replicas[0].running_var)


def test_channels_last_stays():
    norm, _ = grouped_and_replicas(4, 1)
    x = random_images(16, 5, 4, 4)
    output = norm(x.to(memory_format=torch.channels_last))
    assert output.is_contiguous(memory_format=torch.channels_last)
    assert error(output, norm(x)) < 1e-14


@pytest.mark.parametrize("form", "ABC")
@pytest.mark.parametrize("preactivation", [False, True])
def test_every_norm_of_a_network_is_replaced(form, preactivation):
    def network():
        torch.manual_seed(0)
        return ResNeXt((1, 1, 1), 2, 4, 5, stem="cifar", form=form, preactivation=preactivation).double()

    model, plain = network(), network()
    parameters = list(model.parameters())
    use_ghost_batchnorm(model, 4)
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert norms and all(type(m) is GhostBatchNorm2d and m.groups == 4 for m in norms)
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    state, expected = model.state_dict(), plain.state_dict()
    assert state.keys() == expected.keys()
    assert all(v.dtype == expected[k].dtype and torch.equal(v, expected[k]) for k, v in state.items())


# ---------------------------------------------------------------------------- frozen statistics


@pytest.mark.parametrize("groups", [1, 4])
def test_frozen_running_statistics(groups):
    norm, (replica,) = grouped_and_replicas(groups, 1)
    model, x = nn.Sequential(norm, nn.ReLU()), random_images(12, 5, 3, 3)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with frozen_running_statistics(model), frozen_running_statistics(model):
        inside = model(x)
    with pytest.raises(ZeroDivisionError), frozen_running_statistics(model):
        raise ZeroDivisionError
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert torch.equal(model(x), inside)  # batch statistics, inside as outside
    replica(x[: split_evenly(12, groups)[0]])
    assert error(norm.running_mean, replica.running_mean) < 1e-14
    assert norm.num_batches_tracked == 1 and norm.momentum == 0.1


# ---------------------------------------------------------------------------- a whole training step

LR, MOMENTUM, DECAY = 0.05, 0.9, 1e-3
BATCHES = (64, 50, 3)  # whole, smaller, fewer images than groups


def labeled(images, step):
    labels = torch.arange(images) * 3 % 7
    return random_images(images, 3, 6, 6, seed=step), labels


def start(train, model=""):
    """Return a float64 training state for images of 6 pixels and 7 classes."""
    config = parse_config(
        f"""
        model: {{stem: cifar, stages: [1, 1, 1], cardinality: 2, base_width: 4{model}}}
        data: {{dataset: glyphs}}
        train: {{batch_size: 64, {train}}}
        optimizer: {{lr: {LR}, momentum: {MOMENTUM}, weight_decay: {DECAY}}}
        """,
        "test",
    )
    training = build_train_state(config, tuple("abcdefg"), CPU, {})
    training.model.double()
    init_momentum(training.optimizer)
    return training


def run_steps(training, batches=BATCHES):
    """Return ([mean loss, top-1 hits, top-5 hits] of each step, state after them)."""
    training.model.train()
    results = [train_step(training, *labeled(n, i), LR) for i, n in enumerate(batches)]
    return torch.stack(results), {k: v.clone() for k, v in training.model.state_dict().items()}


def replica_steps(sizes_of, batches=BATCHES, model=""):
    """Return the same for a network per slice: gradients are added, statistics are the first one's."""
    network = start("precision: fp32", model).model.train()
    momenta = [torch.zeros_like(p) for p in network.parameters()]
    results = []
    for step, images in enumerate(batches):
        x, labels = labeled(images, step)
        sizes = sizes_of(images)
        replicas = [copy.deepcopy(network) for _ in sizes]
        loss, top1, top5 = 0.0, 0, 0
        for replica, part, targets in zip(replicas, x.split(sizes), labels.split(sizes), strict=True):
            logits = replica(part)
            part_loss = F.cross_entropy(logits, targets, reduction="sum") / images
            part_loss.backward()
            loss += part_loss.item()
            places = (logits > logits.gather(1, targets[:, None])).sum(1)
            top1, top5 = top1 + (places < 1).sum().item(), top5 + (places < 5).sum().item()
        results.append([loss, top1, top5])
        gradients = [sum(g) for g in zip(*([p.grad for p in r.parameters()] for r in replicas), strict=True)]
        network.load_state_dict(replicas[0].state_dict())
        with torch.no_grad():
            for p, g, v in zip(network.parameters(), gradients, momenta, strict=True):
                g = g + DECAY * p
                v.copy_(MOMENTUM * v + g)
                p -= LR * (g + MOMENTUM * v)
    return torch.tensor(results, dtype=torch.float64), network.state_dict()


def assert_same(ours, theirs):
    assert ours[0][:, 1:].equal(theirs[0][:, 1:])
    assert error(ours[0][:, 0], theirs[0][:, 0]) < 1e-11
    assert ours[1].keys() == theirs[1].keys()
    for key, value in theirs[1].items():
        assert error(ours[1][key].double(), value.double()) < 1e-9, key


@pytest.mark.parametrize(
    "model, batches",
    [
        ("", BATCHES),
        (", preactivation: true", BATCHES),
        (", block: B", BATCHES),
        *(("", (images,)) for images in BATCHES),
    ],
)
def test_grouped_steps_are_those_of_replicas(model, batches):
    expected = replica_steps(lambda n: nonempty(n, 4), batches, model)
    assert_same(run_steps(start("bn_group: 16", model), batches), expected)


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_accumulation_with_groups_changes_nothing(steps):
    """Compare losses, counts, weights, and running statistics, also of smaller batches."""
    expected = run_steps(start("bn_group: 16"))
    ours = run_steps(start(f"bn_group: 16, accumulation_steps: {steps}"))
    assert_same(ours, expected)
    counts = [v for k, v in ours[1].items() if k.endswith("num_batches_tracked")]
    assert counts and all(c == len(BATCHES) for c in counts)


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_micro_batches_without_groups_are_normalized_separately(steps):
    expected = replica_steps(lambda n: nonempty(n, steps))
    assert_same(run_steps(start(f"accumulation_steps: {steps}")), expected)
    if steps == 1:  # groups make a difference
        grouped = run_steps(start("bn_group: 16"))
        assert error(grouped[1]["conv1.weight"], expected[1]["conv1.weight"]) > 1e-4


@pytest.mark.parametrize("steps", [1, 2])
def test_recomputed_activations_change_no_bit_of_grouped_steps(steps):
    text = f"bn_group: 16, accumulation_steps: {steps}"
    plain = run_steps(start(text))
    recomputed = run_steps(start(f"{text}, activation_checkpointing: true"))
    assert torch.equal(plain[0], recomputed[0])
    assert all(torch.equal(recomputed[1][k], v) for k, v in plain[1].items())


# ---------------------------------------------------------------------------- kernels


@pytest.mark.parametrize("broken", ["no C compiler", "too old", "a CPU", None])
def test_kernels_are_used_where_triton_works(broken, monkeypatch):
    class Driver:
        @property
        def utils(self):
            if broken == "no C compiler":
                raise RuntimeError("Failed to find C compiler.\nPlease specify via CC")

    runtime = pytest.importorskip("triton").runtime
    monkeypatch.setattr(runtime.driver, "_active", Driver())
    major = 7 if broken == "too old" else 9
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(major=major))
    device = torch.device("cpu" if broken == "a CPU" else "cuda")
    warned = pytest.warns(UserWarning, match=r"\(Failed to find C compiler\.\).*install triton, gcc and")
    with warned if broken == "no C compiler" else contextlib.nullcontext():
        assert kernels_work(device) == (broken is None)
