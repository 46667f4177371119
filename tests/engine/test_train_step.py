"""One optimizer step against plain PyTorch: precision, EMA, memory layout, the fused step, torch.compile."""

import contextlib
import copy
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from functorch.compile import make_boxed_func
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.profiler import ProfilerActivity, profile

from resnext.config import TrainConfig, parse_config
from resnext.engine import train_state
from resnext.engine.logger import NullLogger
from resnext.engine.resume import restore
from resnext.engine.train_state import TrainState, build_train_state, checkpoint_content
from resnext.engine.trainer import train_step, validate, zero_loss
from resnext.preflight import measure


@pytest.mark.parametrize(
    ("device", "ranks", "accumulation", "mode"),
    [
        ("cuda", 1, 1, "reduce-overhead"),
        ("cuda", 2, 1, "default"),
        ("cuda", 1, 2, "default"),
        ("cpu", 1, 1, "default"),
    ],
)
def test_cuda_graphs_where_gradients_live_for_one_pass(device, ranks, accumulation, mode, monkeypatch):
    monkeypatch.setattr(train_state, "world_size", lambda: ranks)
    train = TrainConfig(accumulation_steps=accumulation)
    assert train_state.compile_mode(train, torch.device(device)) == mode


SMALL = [
    "model.stem=cifar",
    "model.depth=11",
    "model.cardinality=2",
    "model.base_width=4",
    "data.dataset=glyphs",
    "data.image_size=8",
    "train.batch_size=16",
]


def state_of(*overrides: str) -> TrainState:
    config = parse_config("", "test", [*SMALL, *overrides])
    training = build_train_state(config, tuple("0123456789"), torch.device("cpu"), {})
    training.model.train()
    return training


def resumed(training: TrainState, *overrides: str, without: str = "") -> TrainState:
    """Return another state that was restored from this one's checkpoint.

    `without`: "momenta", as a checkpoint written before the first step, by a program that did not yet start
    momenta at 0; "momentum", as a run with optimizer.momentum=0.
    """
    content = copy.deepcopy(checkpoint_content(training))
    if without == "momenta":
        content["optimizer"]["state"] = {}
    elif without == "momentum":
        for state in content["optimizer"]["state"].values():
            state["momentum_buffer"] = None
    other = state_of("run.seed=5", *overrides)
    restore(other, content, Path("x"))
    return other


def batch(size: int = 16) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(size, 3, 8, 8, generator=generator), torch.arange(size) % 10


def step(*states: TrainState, rate: float = 0.1, size: int = 16) -> None:
    for training in states:
        train_step(training, *batch(size), rate)


def reference_step(
    model: nn.Module, clip: float | None = None, decay: Callable[[str], float] = lambda name: 1e-4
) -> None:
    """Take the first Nesterov step of optim.sgd, written out: w ← w - lr·(g + wd·w + m·v), v = g + wd·w."""
    images, labels = batch()
    F.cross_entropy(model(images).float(), labels).backward()
    norm = torch.sqrt(sum((p.grad.double() ** 2).sum() for p in model.parameters()))
    factor = 1.0 if clip is None or norm <= clip else clip / (norm + 1e-6)
    with torch.no_grad():
        for name, p in model.named_parameters():
            d = p.grad * factor + decay(name) * p
            p -= 0.1 * (d + 0.9 * d)


def assert_close(model: nn.Module, reference: nn.Module, tolerance: float = 1e-6) -> None:
    for (name, a), b in zip(model.named_parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


def assert_same_bits(ours: TrainState, theirs: TrainState) -> None:
    assert all(map(torch.equal, ours.model.state_dict().values(), theirs.model.state_dict().values()))


@pytest.mark.parametrize(
    ("overrides", "clip"),
    [
        ((), None),
        (("train.channels_last=false",), None),
        (("train.activation_checkpointing=true",), None),
        (("train.clip_grad_norm=0.5",), 0.5),
        (("train.clip_grad_norm=1e6",), 1e6),
    ],
)
def test_a_step_is_the_written_out_one(overrides, clip):
    training = state_of(*overrides)
    reference = copy.deepcopy(training.model)
    step(training)
    reference_step(reference, clip)
    assert_close(training.model, reference)
    for (name, a), b in zip(training.model.named_buffers(), reference.buffers(), strict=True):
        torch.testing.assert_close(a, b, msg=lambda m, n=name: f"{n}: {m}")


def test_batchnorm_may_have_its_own_weight_decay():
    training = state_of("optimizer.norm_weight_decay=0", "optimizer.weight_decay=0.01")
    groups = training.optimizer.param_groups
    assert [group["weight_decay"] for group in groups] == [0.01, 0]
    assert sum(len(group["params"]) for group in groups) == len(list(training.model.parameters()))
    names = {id(p): name for name, p in training.model.named_parameters()}
    norms = {names[id(p)] for p in groups[1]["params"]}
    assert norms == {name for name in names.values() if "bn" in name or ".downsample.1." in name}
    reference = copy.deepcopy(training.model)
    step(training)
    reference_step(reference, decay=lambda name: 0.0 if name in norms else 0.01)
    assert_close(training.model, reference)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_step_in_half_precision_is_near_the_exact_one(precision):
    training = state_of(f"train.precision={precision}")
    reference, before = copy.deepcopy(training.model), copy.deepcopy(training.model)
    step(training)
    reference_step(reference)
    moved, expected = (
        torch.cat(
            [(p - b).detach().flatten() for p, b in zip(m.parameters(), before.parameters(), strict=True)]
        )
        for m in (training.model, reference)
    )
    assert 0.9 < moved.norm() / expected.norm() < 1.1, "a doubled or unscaled step would be far off"
    assert F.cosine_similarity(moved, expected, 0) > 0.98
    assert all(p.dtype == torch.float32 for p in training.model.parameters())


def overflow(training: TrainState) -> None:
    """Take a step whose gradients are infinite, which the loss scaler skips."""
    state = training.scaler.state_dict()
    training.scaler.load_state_dict(state | {"scale": 2.0**60})
    step(training)
    assert training.scaler.get_scale() == 2.0**59
    training.scaler.load_state_dict(state)


def test_an_overflowing_gradient_skips_the_step_and_lowers_the_scale():
    training = state_of("train.precision=fp16")
    before = copy.deepcopy(training.model)
    overflow(training)
    assert all(map(torch.equal, training.model.parameters(), before.parameters()))


def test_the_average_has_the_bits_of_torch_s_and_needs_few_kernels():
    training = state_of("train.ema_decay=0.75")
    theirs = AveragedModel(training.model, multi_avg_fn=get_ema_multi_avg_fn(0.75), use_buffers=True)
    expected: dict[str, Tensor] = {}
    for _ in range(3):
        step(training)
        theirs.update_parameters(training.model)
        now = {k: t.clone() for k, t in training.model.state_dict().items() if t.is_floating_point()}
        expected = {k: 0.75 * t + 0.25 * now[k] for k, t in (expected or now).items()}
    states = (training.ema.state_dict(), theirs.state_dict())
    assert list(states[0]) == list(states[1])
    assert all(torch.equal(t, states[1][k]) for k, t in states[0].items() if t.is_floating_point())
    for name, tensor in expected.items():
        torch.testing.assert_close(states[0][f"module.{name}"], tensor)
    counters = [t for t in training.ema.module.buffers() if not t.is_floating_point()]
    assert counters and all(t == 3 for t in counters), "of the latest weights"
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        training.ema.update_parameters(training.model)
    names = {event.key for event in profiled.key_averages()}
    assert "aten::_foreach_lerp_" in names and not names & {"aten::to", "aten::mul", "aten::add"}


def test_a_step_reports_the_mean_loss_and_the_hits():
    training = state_of("train.accumulation_steps=2", "train.bn_group=4")
    images, labels = batch()
    model = copy.deepcopy(training.model)
    loss, top1, top5 = train_step(training, images, labels, 0.1).tolist()
    with torch.no_grad():
        output = torch.cat([model(images[:8]), model(images[8:])])
    order = output.argsort(1, descending=True)
    assert loss == pytest.approx(F.cross_entropy(output, labels).item(), rel=1e-5)
    assert top1 == (order[:, 0] == labels).sum() and top5 == (order[:, :5] == labels[:, None]).sum()


def test_a_restored_state_continues_identically():
    overrides = ("train.ema_decay=0.9", "train.precision=fp16")
    training = state_of(*overrides)
    step(training, training)
    other = resumed(training, *overrides)
    step(training, other, rate=0.05)
    assert_same_bits(other, training)
    assert other.scaler.state_dict() == training.scaler.state_dict()


LAYOUTS = {"true": torch.channels_last, "false": torch.contiguous_format}


class Batches(list):
    steps = property(len)  # as those of a loader


@pytest.mark.parametrize("arriving", LAYOUTS.values())
@pytest.mark.parametrize("channels_last", LAYOUTS)
def test_every_convolution_sees_the_configured_layout(channels_last, arriving):
    """In any layout of images: a loader's are NCHW if augment.jitter is on, else channels_last."""
    training, wanted = state_of(f"train.channels_last={channels_last}"), LAYOUTS[channels_last]
    seen = []

    def note(convolution, inputs, output) -> None:
        tensors = (*inputs, convolution.weight, output)
        seen.append(all(tensor.is_contiguous(memory_format=wanted) for tensor in tensors))

    convolutions = [m for m in training.model.modules() if isinstance(m, nn.Conv2d)]
    for convolution in convolutions:
        convolution.register_forward_hook(note)
    images, labels = batch()
    images = images.to(memory_format=arriving)
    for work in (
        lambda: train_step(training, images, labels, 0.1),
        lambda: zero_loss(training, images),
        lambda: measure.try_micro_batch(training, images, labels, len(images)),
        lambda: measure.measure_validation(training, images),
        lambda: validate(training, Batches([(images, labels)]), NullLogger(), lambda: False),
    ):
        seen.clear()
        work()
        assert len(seen) >= len(convolutions) and all(seen)


@pytest.fixture
def fused(monkeypatch):
    """Let SGD take its fused step, as on a GPU; new memory is NaN."""
    plain = torch.optim.SGD
    monkeypatch.setattr(torch.optim, "SGD", lambda *args, **more: plain(*args, **more | {"fused": True}))
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def two_nesterov_steps(training: TrainState) -> list[Tensor]:
    """Return weights after two steps from momenta of 0: v ← 0.9 v + d, w ← w - lr·(d + 0.9 v)."""
    model = copy.deepcopy(training.model)
    momenta = [torch.zeros_like(p) for p in model.parameters()]
    images, labels = batch()
    for _ in range(2):
        with training.autocast():
            output = model(images)
        loss = F.cross_entropy(output.float(), labels) * 1024
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        with torch.no_grad():
            for p, g, v in zip(model.parameters(), gradients, momenta, strict=True):
                d = g / 1024 + 1e-4 * p
                v.mul_(0.9).add_(d)
                p -= 0.1 * (d + 0.9 * v)
    return [p.detach() for p in model.parameters()]


@pytest.mark.parametrize("without", [None, "momenta", "momentum"])
def test_steps_after_a_first_one_that_was_skipped(fused, without):
    training = state_of("train.precision=fp16")
    if without:
        training = resumed(training, "train.precision=fp16", without=without)
    assert training.scaler.get_scale() == 1024, "at which ResNeXt-50's first gradients do not overflow"
    expected = two_nesterov_steps(training)
    overflow(training)
    step(training, training)
    for p, e in zip(training.model.parameters(), expected, strict=True):
        torch.testing.assert_close(p.detach(), e, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("first", "second"), [("true", "false"), ("false", "true")])
def test_a_run_resumes_in_the_other_layout(fused, first, second):
    training = state_of(f"train.channels_last={first}")
    step(training)
    other = resumed(training, f"train.channels_last={second}")
    step(training, other)
    assert_close(other.model, training.model, 1e-4)
    for p in other.model.parameters():
        assert other.optimizer.state[p]["momentum_buffer"].stride() == p.stride()


def test_momenta_that_start_at_zero_give_the_bits_of_torch_s_first_step():
    training, plain = state_of(), state_of()
    plain.optimizer.state.clear()
    step(training, plain, training, plain)
    assert all(map(torch.equal, training.model.parameters(), plain.model.parameters()))


class Graphs:
    """A backend of torch.compile that runs the graphs as they are, and records them."""

    def __init__(self) -> None:
        self.compiled: list[torch.fx.GraphModule] = []
        self.runs = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        self.compiled.append(graph)

        def run(*arguments: Any) -> Any:
            self.runs += 1
            return graph.forward(*arguments)

        return run


@pytest.fixture
def compiler(monkeypatch):
    """Return a function that sets the backend of torch.compile."""
    torch._dynamo.reset()
    original = torch.compile
    yield lambda backend: monkeypatch.setattr(torch, "compile", partial(original, backend=backend))
    torch._dynamo.reset()


@pytest.mark.parametrize("extra", [(), ("train.bn_group=4",)])
def test_each_batch_size_has_its_own_graph(compiler, extra):
    """Shapes are static: with dynamic ones, a resume just before the smaller last batch has other bits."""
    compiler(graphs := Graphs())
    training = state_of("train.compile=true", *extra)
    for size in (16, 16, 10, 16, 10, 16):
        graphs.runs = 0
        step(training, rate=0.01, size=size)
        assert graphs.runs == 1, "the whole network"
    assert len(graphs.compiled) == 2
    for graph in graphs.compiled:
        placeholders = [node.meta["example_value"] for node in graph.graph.nodes if node.op == "placeholder"]
        assert all(isinstance(n, int) for value in placeholders for n in value.shape)


@pytest.mark.slow
@pytest.mark.parametrize("extra", [(), ("train.accumulation_steps=2", "train.bn_group=4")])
def test_a_compiled_step_is_the_same_to_rounding(extra):
    plain, compiled = state_of(*extra), state_of("train.compile=true", *extra)
    for _ in range(2):
        results = [train_step(t, *batch(), 0.01) for t in (plain, compiled)]
    torch.testing.assert_close(*results, rtol=1e-3, atol=1e-3)
    assert_close(compiled.model, plain.model, 1e-3)
    assert list(checkpoint_content(compiled)["model"]) == list(checkpoint_content(plain)["model"])


@pytest.mark.slow
@pytest.mark.parametrize("extra", [(), ("train.bn_group=4",)])
def test_a_compiled_run_resumed_before_its_last_batch_has_the_same_bits(extra):
    whole = state_of("train.compile=true", *extra)
    step(whole, whole, rate=0.05)
    other = resumed(whole, "train.compile=true", *extra)
    for training in (whole, other):
        for size in (10, 16):
            step(training, rate=0.05, size=size)
        torch._dynamo.reset()
    assert_same_bits(other, whole)


@contextlib.contextmanager
def group_of_one() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def test_compiled_gradients_arrive_during_the_backward_pass(compiler):
    """In DistributedDataParallel, the last layers' gradients arrive before the first ones are computed."""
    events = []

    def noted(graph, inputs):
        def backward(*arguments):
            events.append("graph")
            return graph.forward(*arguments)

        return make_boxed_func(backward)

    def plain(graph, inputs):
        return make_boxed_func(graph.forward)

    compiler(aot_autograd(fw_compiler=plain, bw_compiler=noted))
    with group_of_one():
        training = state_of("train.compile=true", "model.cardinality=8", "model.base_width=64")
        assert training.exchanges
        training.model.conv1.weight.register_post_accumulate_grad_hook(lambda _: events.append("first"))
        training.model.fc.weight.register_post_accumulate_grad_hook(lambda _: events.append("last"))
        step(training, rate=0.01, size=2)
        events.clear()
        step(training, rate=0.01, size=2)
    assert events.index("last") < events.index("first")
    assert "graph" in events[events.index("last") : events.index("first")], events
