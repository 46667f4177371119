"""Bytes and kernels of a step against sums made by hand."""

import sys

import pytest
import torch
from commands import ROOT
from torch import nn

from resnext.config import parse_config
from resnext.errors import UserError

sys.path.append(str(ROOT / "scripts"))
from count_step import Traffic, count, counts, extra_bytes, make_fake, pretended_gpu, size

IN, OUT, WEIGHT, CHANNELS = 2 * 3 * 16 * 4, 2 * 8 * 16 * 4, 8 * 3 * 4, 8 * 4  # bytes


def network() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True))


def images(**options) -> torch.Tensor:
    return torch.ones(2, 3, 4, 4, **options).contiguous(memory_format=torch.channels_last)


def counted(step) -> Traffic:
    with Traffic() as traffic:
        step()
    return traffic


def test_a_step_by_hand():
    model, x = network(), images()
    traffic = counted(lambda: model(x).sum().backward())
    assert traffic.bytes == {
        "convolution": IN + WEIGHT + OUT,
        "add_": 2 * 8,  # the number of batches
        "native_batch_norm": 2 * OUT + 4 * CHANNELS + OUT + 2 * CHANNELS,
        "relu_": 2 * OUT,
        "sum": OUT + 4,
        "ones_like": 4,
        "threshold_backward": 4 + OUT + OUT,  # the sum's gradient is one number
        "native_batch_norm_backward": 4 * OUT + 5 * CHANNELS + OUT + 2 * CHANNELS,
        "convolution_backward": OUT + IN + WEIGHT + WEIGHT,
    }
    once = dict.fromkeys(traffic.bytes, 1)
    assert traffic.calls == once
    assert traffic.kernels == once | {"native_batch_norm": 3, "native_batch_norm_backward": 2}


def test_only_tensors_count():
    with pretended_gpu(), Traffic() as traffic, torch.profiler.record_function("a name"):
        torch.empty(2).device.type  # noqa: B018
    assert not traffic.calls


def test_both_gradients_of_a_convolution():
    layer, x = network()[0], images(requires_grad=True)
    traffic = counted(lambda: layer(x).backward(torch.ones(2, 8, 4, 4)))
    assert traffic.bytes["convolution_backward"] == 2 * OUT + IN + WEIGHT + IN + WEIGHT
    assert traffic.kernels["convolution_backward"] == 2


def test_bytes_of_operators():
    for work, expected in (
        (lambda x: x.view(4, 2)[1:].t().unsqueeze(0).expand(5, -1, -1).detach(), 0),
        (lambda x: torch.empty_like(x), 0),
        (lambda x: torch.zeros_like(x), 32),
        (lambda x: x + 1, 64),
        (lambda x: x + x, 64),
        (lambda x: x.add_(1), 64),
        (lambda x: x.zero_(), 32),
        (lambda x: x[:4].copy_(x[4:]), 32),
        (lambda x: x.double(), 32 + 64),
        (lambda x: x[:1].expand(8) + x, 4 + 64),
        (lambda x: torch.add(x, 1, out=torch.empty(8)), 64),
    ):
        traffic = counted(lambda work=work: work(torch.empty(8)))
        assert traffic.bytes.total() == expected, traffic.bytes


def test_kernels_over_lists():
    for tensors, elements, kernels in ((1, 5, 1), (65, 5, 2), (200, 5, 4), (2, 25_000_000, 3)):
        lists = [[torch.empty(elements, device="meta") for _ in range(tensors)] for _ in range(2)]
        traffic = counted(lambda lists=lists: torch._foreach_add_(*lists))
        assert traffic.kernels.total() == kernels
        assert traffic.bytes.total() == 3 * tensors * elements * 4


def test_passes_of_the_fused_kernels():
    x = torch.empty(2, 8, 4, 4)
    assert size(x) == OUT and extra_bytes("norm_forward", (x, None)) == OUT
    for dy2, shortcut, passes in ((None, False, 2), (None, True, 2), (x, True, 2), (x, False, 3)):
        assert extra_bytes("norm_backward", (x, dy2, x, None, *[x[0]] * 3, shortcut, True)) == passes * OUT


def test_what_is_saved():
    """The convolution's input, BatchNorm's, its statistics and its output, which ReLU changed in place."""
    model = network()
    with pretended_gpu():
        make_fake(model)
        x = images()
        assert x.is_cuda and next(model.parameters()).is_cuda
        found = count(lambda: model(x).sum().backward(), model, 2)
    assert found["saved"] == (IN + OUT + 2 * CHANNELS + OUT) / 2
    state = 3 * (WEIGHT + 2 * CHANNELS)
    assert found["largest batch"] == int((80e9 - state) / found["saved"])


def test_networks():
    keys = ["data.dir=unused", "train.batch_size=64", "train.precision=bf16", "data.image_size=64"]
    found = dict(counts(parse_config("", "test", keys)))
    ours, theirs, groups = found["ours"], found["torchvision"], found["ours, bn_group=32"]
    assert ours["saved"] == pytest.approx(theirs["saved"], rel=0.01)
    assert 0.7 < ours["moved"] / theirs["moved"] < 1.05
    assert groups["moved"] >= ours["moved"] and groups["kernels"] >= ours["kernels"]


@pytest.mark.parametrize("key", ["train.precision=fp16", "train.ema_decay=0.9", "train.compile=true"])
def test_what_cannot_be_counted(key):
    config = parse_config("", "test", ["data.dir=unused", "train.precision=bf16", key])
    with pytest.raises(UserError, match=r"^(train|model)\.\w+: "):
        next(counts(config))
