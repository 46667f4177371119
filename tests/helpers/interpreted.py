"""The kernels on a CPU in triton's interpreter; test_kernels.py runs this file with TRITON_INTERPRET=1."""

import copy
import os
from functools import partial

import pytest
import torch
from kernel_cases import SMALL, check
from torch import nn

from resnext.models import fused_norm, ghost_batchnorm, resnext
from resnext.models.ghost_batchnorm import GhostBatchNorm2d, norm_relu, use_ghost_batchnorm
from resnext.models.resnext import ResNeXt

assert os.environ["TRITON_INTERPRET"] == "1"


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_case(case):
    check(case, "cpu")


def test_cases_have_several_parts():
    for tile in (fused_norm.FORWARD, fused_norm.BACKWARD):
        shapes = [(case.groups, *case.shape) for case in SMALL]
        assert len({fused_norm.blocks_of(n, g, h * w, c, tile)[2] for g, n, c, h, w in shapes}) > 1


def test_nan_stays():
    """NaN stays visible, so that a diverged run does not look finite; other slices have none."""
    x = torch.randn(4, 8, 2, 2).contiguous(memory_format=torch.channels_last)
    x[0, 3, 0, 0] = torch.nan
    x.requires_grad_()
    affine, running = (torch.ones(8), torch.zeros(8)), (torch.zeros(8), torch.ones(8))
    y, _ = fused_norm.norm_relu(x, None, *affine, *running, None, 2, 0.1, 1e-5, True)
    y.sum().backward()
    for found in (y, x.grad):
        assert found[:2, 3].isnan().all() and not found[2:].isnan().any()
        assert not found[:, [0, 1, 2, 4, 5, 6, 7]].isnan().any()


# ---------------------------------------------------------------------------- networks


def pretend_gpu(patch: pytest.MonkeyPatch) -> None:
    for module in (ghost_batchnorm, resnext):
        patch.setattr(module, "on_gpu", lambda x: True)


@pytest.fixture
def calls(monkeypatch):
    """Treat the CPU as a GPU; return the shapes that the kernels are called with."""
    found = []
    forward = GhostBatchNorm2d.run_kernels

    def recorded(self, x, shortcut, relu):
        found.append(tuple(x.shape))
        return forward(self, x, shortcut, relu)

    monkeypatch.setattr(GhostBatchNorm2d, "run_kernels", recorded)
    pretend_gpu(monkeypatch)
    return found


def network(short=False, groups=2, **options):
    """Return a network, only its first stage if `short`, and images."""
    torch.manual_seed(3)
    made = ResNeXt((2 if short else 1, 1, 1), 2, 4, None, stem="cifar", **options)
    if short:
        made.layer2, made.layer3 = nn.Sequential(), nn.Sequential()
        if made.final_bn:
            made.final_bn = nn.BatchNorm2d(256)
    use_ghost_batchnorm(made, groups, fused=True)
    x = torch.randn(5, 3, 5, 5).contiguous(memory_format=torch.channels_last)
    return made.to(memory_format=torch.channels_last), x


def step(made, x, run=None):
    """Return (loss, gradients, buffers) of a step of a copy."""
    made = copy.deepcopy(made)
    scores = (run(made) if run else made)(x)
    loss = (scores * torch.linspace(-1, 1, scores.numel()).view_as(scores)).sum()
    loss.backward()
    return loss.detach(), {k: p.grad for k, p in made.named_parameters()}, dict(made.named_buffers())


@pytest.fixture(scope="module")
def plain():
    """Return a step of the short network by the kernels."""
    with pytest.MonkeyPatch.context() as patch:
        pretend_gpu(patch)
        return step(*network(short=True))


def assert_close(ours, theirs, tolerance):
    for mine, other in zip(ours[1:], theirs[1:], strict=True):
        assert mine.keys() == other.keys()
        for key, value in other.items():
            assert (mine[key] - value).abs().max() <= tolerance * value.abs().max(), key
    assert (ours[0] - theirs[0]).abs() <= tolerance * theirs[0].abs()


def norms(made):
    return sum(isinstance(m, GhostBatchNorm2d) for m in made.modules())


@pytest.mark.parametrize(
    "options", [{"groups": 1}, {"short": True, "preactivation": True}, {"short": True, "form": "B"}], ids=str
)
def test_networks_are_those_of_torch(options, calls, monkeypatch):
    made, x = network(**options)
    ours = step(made, x)
    assert len(calls) == norms(made)
    monkeypatch.undo()
    theirs = step(made, x)
    assert len(calls) == norms(made)
    assert_close(ours, theirs, 1e-4)


def test_recomputed_activations_change_no_bit(calls, plain):
    made, x = network(short=True)
    made.activation_checkpointing = True
    recomputed = step(made, x)
    assert len(calls) == 2 * norms(made) - 1  # the stem is not recomputed
    assert_close(recomputed, plain, 0.0)


def test_compiled_in_one_graph(calls, plain):
    made, x = network(short=True)
    graphs = []

    def backend(graph, inputs):
        graphs.append(str(graph.graph))
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    compiled = step(made, x, lambda m: torch.compile(m, backend=backend, fullgraph=True, dynamic=False))
    assert len(graphs) == 1 and graphs[0].count("torch.ops.resnext.norm_relu") == norms(made)
    assert_close(compiled, plain, 0.0)


def test_what_the_kernels_leave_to_torch(calls):
    """Inputs and layers that the kernels do not support give torch's results without a call."""
    x = torch.randn(4, 8, 3, 3).contiguous(memory_format=torch.channels_last)
    kept = partial(GhostBatchNorm2d, 8, fused=True)
    for norm, given in (
        (kept().eval(), x),
        (kept(), x.contiguous()),
        (kept().double(), x.double()),
        (GhostBatchNorm2d(8), x),
        (nn.BatchNorm2d(8), x),
        (nn.Identity(), x),
    ):
        expected = copy.deepcopy(norm)(given).relu()
        y, y2 = norm_relu(norm, given.clone())
        assert y is y2 and torch.equal(y, expected)
    norm_relu(kept(), x, x.double())
    assert calls == [tuple(x.shape)]  # without the shortcut, which is of another dtype
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        norm_relu(kept(groups=4), x[:, :, :1, :1].contiguous(memory_format=torch.channels_last))
