"""One optimiser step against plain PyTorch, and what a run leaves behind, as a user sees it."""

import contextlib
import copy
import fcntl
import json
import math
import os
import pty
import signal
import subprocess
import sys
import termios
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from commands import call
from functorch.compile import make_boxed_func
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.profiler import ProfilerActivity, profile

import evaluate
import resnext.engine.trainer
import train
from resnext.batch_plan import split_batch
from resnext.config import parse_config
from resnext.engine.checkpoint import read_checkpoint
from resnext.engine.logger import NullLogger
from resnext.engine.train_state import build_train_state, checkpoint_content, restore
from resnext.engine.trainer import train_step, validate, zero_loss
from resnext.preflight import measure
from resnext.stop_signal import StopSignal
from resnext.weights.load import load_weights

ROOT = Path(__file__).resolve().parents[2]
CLASSES = tuple("0123456789")
SMALL = [
    "model.stem=cifar",
    "model.depth=11",
    "model.cardinality=2",
    "model.base_width=4",
    "data.dataset=glyphs",
    "data.image_size=8",
    "train.batch_size=16",
]
RUN = [*SMALL, "data.train_images=100", "data.val_images=37", "train.epochs=2", "run.log_interval=3"]


def training_of(*overrides: str):
    config = parse_config("", "test", [*SMALL, *overrides])
    training = build_train_state(config, CLASSES, torch.device("cpu"), {})
    training.model.train()
    return training


def batch(size: int = 16):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(size, 3, 8, 8, generator=generator), torch.arange(size) % 10


def reference_step(model, images, labels, rate, clip=None, momentum=0.9, decay=1e-4):
    """The first Nesterov step of optim.sgd, written out: w ← w - lr·(g + wd·w + m·v), v = g + wd·w."""
    F.cross_entropy(model(images).float(), labels).backward()
    gradients = [p.grad for p in model.parameters()]
    norm = torch.sqrt(sum((g.double() ** 2).sum() for g in gradients))
    factor = 1.0 if clip is None or norm <= clip else clip / (norm + 1e-6)
    with torch.no_grad():
        for p, g in zip(model.parameters(), gradients, strict=True):
            d = g * factor + decay * p
            p -= rate * (d + momentum * d)


def assert_close(model, reference, tolerance=1e-6):
    for (name, a), b in zip(model.named_parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


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
    training = training_of(*overrides)
    reference = copy.deepcopy(training.model)
    images, labels = batch()
    train_step(training, images, labels, 0.1)
    reference_step(reference, images, labels, 0.1, clip)
    assert_close(training.model, reference)
    for (name, a), b in zip(training.model.named_buffers(), reference.buffers(), strict=True):
        torch.testing.assert_close(a, b, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_makes_one_step_near_the_exact_one(precision):
    training = training_of(f"train.precision={precision}")
    before = [p.detach().clone() for p in training.model.parameters()]
    reference = copy.deepcopy(training.model)
    images, labels = batch()
    train_step(training, images, labels, 0.1)
    reference_step(reference, images, labels, 0.1)
    moved = [p.detach() - b for p, b in zip(training.model.parameters(), before, strict=True)]
    expected = [p.detach() - b for p, b in zip(reference.parameters(), before, strict=True)]
    flat, flat_expected = (torch.cat([t.flatten() for t in ts]) for ts in (moved, expected))
    assert 0.9 < flat.norm() / flat_expected.norm() < 1.1, "a doubled or unscaled step would be far off"
    assert F.cosine_similarity(flat, flat_expected, 0) > 0.98
    assert all(p.dtype == torch.float32 for p in training.model.parameters())


def test_an_overflowing_gradient_skips_the_step_and_lowers_the_scale():
    training = training_of("train.precision=fp16")
    training.scaler.load_state_dict(training.scaler.state_dict() | {"scale": 2.0**60})
    before = [p.detach().clone() for p in training.model.parameters()]
    train_step(training, *batch(), 0.1)
    assert all(torch.equal(p, b) for p, b in zip(training.model.parameters(), before, strict=True))
    assert training.scaler.get_scale() == 2.0**59


def test_the_average_is_the_written_out_one():
    training = training_of("train.ema_decay=0.75")
    expected = None
    for _ in range(3):
        train_step(training, *batch(), 0.1)
        now = [t.detach().clone() for t in training.model.state_dict().values() if t.is_floating_point()]
        expected = (
            now if expected is None else [0.75 * e + 0.25 * n for e, n in zip(expected, now, strict=True)]
        )
    got = [t for t in training.ema.module.state_dict().values() if t.is_floating_point()]
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)
    counters = [t for t in training.ema.module.buffers() if not t.is_floating_point()]
    assert counters and all(t == 3 for t in counters), "of the latest weights"


def test_the_average_has_the_bits_of_torch_s_and_takes_few_kernels():
    training = training_of("train.ema_decay=0.75")
    theirs = AveragedModel(training.model, multi_avg_fn=get_ema_multi_avg_fn(0.75), use_buffers=True)
    for _ in range(3):
        train_step(training, *batch(), 0.1)
        theirs.update_parameters(training.model)
    states = (training.ema.state_dict(), theirs.state_dict())
    assert list(states[0]) == list(states[1])
    assert all(torch.equal(t, states[1][k]) for k, t in states[0].items() if t.is_floating_point())
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        training.ema.update_parameters(training.model)
    names = {event.key for event in profiled.key_averages()}
    assert "aten::_foreach_lerp_" in names
    assert not names & {"aten::to", "aten::mul", "aten::add"}, (
        "nothing goes to the device, or counter by counter"
    )


def test_parts_of_an_accumulated_batch_end_where_groups_do():
    config = parse_config("", "t", ["train.batch_size=64", "train.accumulation_steps=4", "train.bn_group=8"])
    assert [n for [n] in split_batch(64, config.train, 1) if n] == [16, 16, 16, 16]
    assert [n for [n] in split_batch(51, config.train, 1) if n] == [14, 13, 12, 12]  # slices 7 7 7 6 6 6 6 6
    assert [n for [n] in split_batch(3, config.train, 1) if n] == [2, 1]


def test_a_step_reports_the_mean_loss_and_the_hits():
    training = training_of("train.accumulation_steps=2", "train.bn_group=4")
    images, labels = batch()
    model = copy.deepcopy(training.model)
    loss, top1, top5 = train_step(training, images, labels, 0.1).tolist()
    with torch.no_grad():
        output = torch.cat([model(images[:8]), model(images[8:])])
    order = output.argsort(1, descending=True)
    assert loss == pytest.approx(F.cross_entropy(output, labels).item(), rel=1e-5)
    assert top1 == (order[:, 0] == labels).sum() and top5 == (order[:, :5] == labels[:, None]).sum()


def test_restored_state_goes_on_identically():
    training = training_of("train.ema_decay=0.9", "train.precision=fp16")
    for _ in range(2):
        train_step(training, *batch(), 0.1)
    content = checkpoint_content(training)
    other = training_of("train.ema_decay=0.9", "train.precision=fp16", "run.seed=5")
    restore(other, copy.deepcopy(content), Path("x"))
    for t in (training, other):
        train_step(t, *batch(), 0.05)
    for a, b in zip(training.model.state_dict().values(), other.model.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    assert other.scaler.state_dict() == training.scaler.state_dict()


@pytest.mark.slow
@pytest.mark.parametrize("extra", [(), ("train.accumulation_steps=2", "train.bn_group=4")])
def test_a_compiled_step_is_the_same_to_rounding(extra):
    plain, compiled = training_of(*extra), training_of("train.compile=true", *extra)
    for _ in range(2):
        results = [train_step(t, *batch(), 0.01) for t in (plain, compiled)]
    torch.testing.assert_close(*results, rtol=1e-3, atol=1e-3)
    assert_close(compiled.model, plain.model, 1e-3)
    assert list(checkpoint_content(compiled)["model"]) == list(checkpoint_content(plain)["model"])


LAYOUTS = {"true": torch.channels_last, "false": torch.contiguous_format}


@pytest.mark.parametrize("arriving", LAYOUTS.values())
@pytest.mark.parametrize("channels_last", LAYOUTS)
def test_every_convolution_sees_the_configured_layout(channels_last, arriving):
    """However images arrive: a loader's are NCHW where augment.jitter is on, else channels_last."""
    training, wanted = training_of(f"train.channels_last={channels_last}"), LAYOUTS[channels_last]
    seen = []

    def note(convolution, inputs, output) -> None:
        tensors = (*inputs, convolution.weight, output)
        seen.append(all(tensor.is_contiguous(memory_format=wanted) for tensor in tensors))

    convolutions = [m for m in training.model.modules() if isinstance(m, torch.nn.Conv2d)]
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


class Batches(list):
    """Validation batches."""

    steps = property(len)


# ---------------------------------------------------------------------------- the fused step, as on a GPU


@pytest.fixture
def fused(monkeypatch):
    """SGD takes its fused step, as on a GPU; new memory is NaN."""
    plain = torch.optim.SGD
    monkeypatch.setattr(
        torch.optim, "SGD", lambda *args, **options: plain(*args, **options | {"fused": True})
    )
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def overflow(training) -> None:
    """A step whose gradients are infinite, which the loss scaler skips."""
    state = training.scaler.state_dict()
    training.scaler.load_state_dict(state | {"scale": 2.0**60})
    train_step(training, *batch(), 0.1)
    training.scaler.load_state_dict(state)


def two_nesterov_steps(training) -> list[torch.Tensor]:
    """Weights after two steps on the batch, from momenta of 0: v ← 0.9 v + d, w ← w - lr·(d + 0.9 v)."""
    model = copy.deepcopy(training.model)
    momenta = [torch.zeros_like(p) for p in model.parameters()]
    for _ in range(2):
        with training.autocast():
            output = model(batch()[0])
        gradients = torch.autograd.grad(
            F.cross_entropy(output.float(), batch()[1]) * 1024, model.parameters()
        )
        with torch.no_grad():
            for p, g, v in zip(model.parameters(), gradients, momenta, strict=True):
                d = g / 1024 + 1e-4 * p
                v.mul_(0.9).add_(d)
                p -= 0.1 * (d + 0.9 * v)
    return list(model.parameters())


def start_anew(training):
    return training


def resume_without_momenta(training):
    """As from a checkpoint that was written ahead of the first step, before momenta started at 0."""
    content = copy.deepcopy(checkpoint_content(training))
    content["optimizer"]["state"] = {}
    other = training_of("train.precision=fp16", "run.seed=5")
    restore(other, content, Path("x"))
    return other


def resume_without_any_momentum(training):
    """As of a run that had optimizer.momentum=0."""
    content = copy.deepcopy(checkpoint_content(training))
    for state in content["optimizer"]["state"].values():
        state["momentum_buffer"] = None
    other = training_of("train.precision=fp16", "run.seed=5")
    restore(other, content, Path("x"))
    return other


@pytest.mark.parametrize("begin", [start_anew, resume_without_momenta, resume_without_any_momentum])
def test_steps_after_a_first_one_that_was_skipped(fused, begin):
    training = begin(training_of("train.precision=fp16"))
    assert training.scaler.get_scale() == 1024, "at which ResNeXt-50's first gradients do not overflow"
    expected = two_nesterov_steps(training)
    overflow(training)
    for _ in range(2):
        train_step(training, *batch(), 0.1)
    for p, e in zip(training.model.parameters(), expected, strict=True):
        torch.testing.assert_close(p.detach(), e.detach(), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("layouts", [("true", "false"), ("false", "true")])
def test_a_run_goes_on_in_the_other_layout(fused, layouts):
    first, second = (f"train.channels_last={layout}" for layout in layouts)
    training, unbroken = training_of(first), training_of(first)
    for t in (training, unbroken):
        train_step(t, *batch(), 0.1)
    resumed = training_of(second, "run.seed=5")
    restore(resumed, copy.deepcopy(checkpoint_content(training)), Path("x"))
    for t in (resumed, unbroken):
        train_step(t, *batch(), 0.1)
    assert_close(resumed.model, unbroken.model, 1e-4)
    for p in resumed.model.parameters():
        assert resumed.optimizer.state[p]["momentum_buffer"].stride() == p.stride()


def test_momenta_that_start_at_zero_give_the_bits_of_torch_s_first_step():
    training, plain = training_of(), training_of()
    plain.optimizer.state.clear()
    for _ in range(2):
        for t in (training, plain):
            train_step(t, *batch(), 0.1)
    assert all(map(torch.equal, training.model.parameters(), plain.model.parameters()))


# ---------------------------------------------------------------------------- compiled


class Graphs:
    """A backend of torch.compile that runs the graphs as they are, and notes them."""

    def __init__(self):
        self.compiled: list[torch.fx.GraphModule] = []
        self.run: list[int] = []  # operators of each graph that ran

    def __call__(self, graph: torch.fx.GraphModule, inputs: list):
        self.compiled.append(graph)
        operators = sum(node.op == "call_function" for node in graph.graph.nodes)

        def run(*arguments):
            self.run.append(operators)
            return graph.forward(*arguments)

        return run


@pytest.fixture
def compiler(monkeypatch):
    """Sets the backend of torch.compile."""
    torch._dynamo.reset()
    original = torch.compile
    yield lambda backend: monkeypatch.setattr(torch, "compile", partial(original, backend=backend))
    torch._dynamo.reset()


@pytest.mark.parametrize("extra", [(), ("train.bn_group=4",)])
def test_each_batch_size_has_a_graph_of_its_own(compiler, extra):
    """No dynamic shapes, in which a resume just ahead of the last, smaller batch has other bits."""
    compiler(graphs := Graphs())
    training = training_of("train.compile=true", *extra)
    for size in (16, 16, 10, 16, 10, 16):
        graphs.run.clear()
        images, labels = batch(size)
        train_step(training, images, labels, 0.01)
        assert len(graphs.run) == 1, "the whole network"
    assert len(graphs.compiled) == 2
    for graph in graphs.compiled:
        placeholders = [node.meta["example_value"] for node in graph.graph.nodes if node.op == "placeholder"]
        assert all(isinstance(n, int) for value in placeholders for n in value.shape)


@pytest.mark.slow
@pytest.mark.parametrize("extra", [(), ("train.bn_group=4",)])
def test_a_compiled_run_resumed_ahead_of_its_last_batch_has_the_same_bits(extra):
    sizes = (16, 16, 10, 16)

    def steps(training, sizes):
        for size in sizes:
            train_step(training, *batch(size), 0.05)

    whole = training_of("train.compile=true", *extra)
    steps(whole, sizes[:2])
    content = copy.deepcopy(checkpoint_content(whole))
    steps(whole, sizes[2:])
    torch._dynamo.reset()
    resumed = training_of("train.compile=true", *extra)
    restore(resumed, content, Path("last.pt"))
    steps(resumed, sizes[2:])
    assert all(map(torch.equal, resumed.model.state_dict().values(), whole.model.state_dict().values()))


def test_compiled_gradients_arrive_during_the_backward_pass(compiler):
    """In DistributedDataParallel: those of the last layers before those of the first are computed."""
    from torch._dynamo.backends.common import aot_autograd

    events = []

    def noted(graph, inputs):
        def backward(*arguments):
            events.append("graph")
            return graph.forward(*arguments)

        return make_boxed_func(backward)

    def plain(graph, inputs):
        return make_boxed_func(graph.forward)

    compiler(aot_autograd(fw_compiler=plain, bw_compiler=noted))
    with alone():
        training = training_of("train.compile=true", "model.cardinality=8", "model.base_width=64")
        assert training.exchanges
        training.model.conv1.weight.register_post_accumulate_grad_hook(lambda _: events.append("first"))
        training.model.fc.weight.register_post_accumulate_grad_hook(lambda _: events.append("last"))
        train_step(training, *batch(2), 0.01)
        events.clear()
        train_step(training, *batch(2), 0.01)
    assert events.index("last") < events.index("first")
    assert "graph" in events[events.index("last") : events.index("first")], events


@contextlib.contextmanager
def alone():
    """A group of this process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


# ---------------------------------------------------------------------------- whole runs


def python(script: str, *arguments: str, status: int = 0) -> SimpleNamespace:
    """A command line, quickly in this process."""
    result = call({"train.py": train.main, "evaluate.py": evaluate.main}[script], *arguments)
    assert result.status == status, result.output + result.error
    return SimpleNamespace(stdout=result.output, stderr=result.error)


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "small"
    done = python("train.py", "--config", "demo.yaml", "--output", str(folder), *RUN, "train.ema_decay=0.5")
    return folder, done.stdout


def read_rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_run_directory_holds_what_the_docs_say(finished_run):
    folder, _ = finished_run
    names = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.parent.name != "tensorboard"}
    assert names == {
        *("config.yaml", "metrics.jsonl", "log.txt", "tensorboard", "checkpoints"),
        *("checkpoints/last.pt", "checkpoints/previous.pt", "checkpoints/best.pt"),
    }
    header = (folder / "config.yaml").read_text().split("model:")[0]
    assert all(f"# {name}: " in header for name in ("torch", "commit", "device", "data", "started"))
    steps = [r for r in read_rows(folder) if r["kind"] == "step"]
    assert [(r["epoch"], r["step"]) for r in steps] == [(1, 3), (1, 6), (1, 7), (2, 3), (2, 6), (2, 7)]
    assert [r["images"] for r in steps] == [48, 48, 4] * 2
    epochs = [r for r in read_rows(folder) if r["kind"] == "epoch"]
    assert [r["train"]["images"] for r in epochs] == [100, 100]
    assert [r["val"]["images"] for r in epochs] == [37, 37]


def test_a_pipe_gets_plain_lines(finished_run):
    _, output = finished_run
    assert "\r" not in output and "\x1b" not in output
    assert "epoch 1/2  step 3/7  time " in output and "img/s" in output
    assert "finished: 2 epochs" in output and "next: python evaluate.py" in output


def test_a_terminal_gets_a_bar(tmp_path):
    master, slave = pty.openpty()
    termios.tcsetwinsize(slave, (24, 100))
    command = [sys.executable, "train.py", "--config", "demo.yaml", "--output", str(tmp_path / "r"), *RUN]
    process = subprocess.Popen(command, stdout=slave, stderr=slave, cwd=ROOT)
    os.close(slave)
    output = b""
    while True:
        try:
            chunk = os.read(master, 65536)
        except OSError:  # the other side has closed
            break
        if not chunk:
            break
        output += chunk
    assert process.wait(timeout=60) == 0
    assert b"epoch 1/2:" in output and b"\r" in output


def test_evaluate_prints_the_integers_of_the_log(finished_run, tmp_path):
    folder, _ = finished_run
    done = python("evaluate.py", str(folder), "--json", str(tmp_path / "result.json"))
    result = json.loads((tmp_path / "result.json").read_text())
    content = torch.load(folder / "checkpoints" / "best.pt", weights_only=True)
    best = content["progress"]["best"]
    assert f"({best['top1_errors']}/37)" in done.stdout and f"({best['top5_errors']}/37)" in done.stdout
    assert "averaged weights" in done.stdout
    assert {k: result[k] for k in ("images", "top1_errors", "top5_errors")} == {
        k: best[k] for k in ("images", "top1_errors", "top5_errors")
    }
    epochs = [r for r in read_rows(folder) if r["kind"] == "epoch"]
    assert best["top1_error"] == min(r["val"]["top1_error"] for r in epochs)


def test_evaluation_does_not_depend_on_the_batch_size(finished_run):
    folder, _ = finished_run
    lines = [
        python("evaluate.py", str(folder), "--precision", "fp32", "--batch-size", size).stdout.splitlines()[1]
        for size in ("1", "37")
    ]
    assert lines[0].split("loss")[0] == lines[1].split("loss")[0]


def test_the_evaluated_weights_are_the_average(finished_run):
    folder, _ = finished_run
    path = folder / "checkpoints" / "last.pt"
    (model, _), content = load_weights(path), read_checkpoint(path)
    for name, value in model.state_dict().items():
        assert torch.equal(value, content["ema"][f"module.{name}"])
    assert not torch.equal(model.fc.weight, content["model"]["fc.weight"])


def test_tensorboard_has_each_step_once_after_a_resume(finished_run, tmp_path):
    folder = tmp_path / "board"
    arguments = ["train.py", "--config", "demo.yaml", "--output", str(folder), *RUN]
    python(*arguments)
    python(*arguments, "--resume", "train.epochs=3")
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    assert [e.step for e in events.Scalars("train/loss")] == [3, 6, 7, 10, 13, 14, 17, 20, 21]
    assert [e.step for e in events.Scalars("epoch/val_top1_error")] == [7, 14, 21]
    losses = [r["loss"] for r in read_rows(folder) if r["kind"] == "step"]
    assert [e.value for e in events.Scalars("train/loss")] == pytest.approx(losses, rel=1e-6)


def test_a_non_finite_loss_stops_the_run_before_anything_is_saved(tmp_path):
    folder = tmp_path / "diverging"
    arguments = ["train.py", "--config", "demo.yaml", "--output", str(folder), *RUN]
    python(*arguments, "schedule.warmup_epochs=0", "schedule.name=multistep", "schedule.milestones=[9]")
    before = (folder / "checkpoints" / "last.pt").read_bytes()
    done = python(
        *("train.py", "--resume", str(folder), "train.epochs=9", "optimizer.lr=1e30"),
        status=2,
    )
    assert "the loss is nan at epoch 3, step " in done.stderr
    assert f"last good checkpoint is {folder}/checkpoints/last.pt" in done.stderr
    assert "lower optimizer.lr" in done.stderr
    assert (folder / "checkpoints" / "last.pt").read_bytes() == before
    assert all(math.isfinite(r["loss"]) for r in read_rows(folder) if r["kind"] == "step")


def test_a_run_can_branch_off_a_kept_checkpoint(tmp_path):
    trunk, branch = tmp_path / "trunk", tmp_path / "branch"
    python("train.py", "--config", "demo.yaml", "--output", str(trunk), *RUN, "run.keep_every=1")
    kept = trunk / "checkpoints" / "epoch_001.pt"
    done = python("train.py", "--resume", str(kept), status=2)
    assert "--output" in done.stderr
    python("train.py", "--resume", str(kept), "--output", str(branch))
    assert [(r["kind"], r["epoch"]) for r in read_rows(branch)][-1] == ("epoch", 2)
    last = [torch.load(f / "checkpoints" / "last.pt", weights_only=True) for f in (trunk, branch)]
    for name, value in last[0]["model"].items():
        assert torch.equal(value, last[1]["model"][name])


def test_a_stop_during_validation_is_resumed_with_the_validation(finished_run, tmp_path, monkeypatch):
    folder, _ = finished_run
    calls = []

    def stop_after_eight(request):
        calls.append(1)
        request.signal = signal.SIGTERM
        return len(calls) == 8  # 7 steps, then a batch of the validation

    arguments = ["--config", "demo.yaml", "--output", str(tmp_path / "r"), *RUN, "train.ema_decay=0.5"]
    with monkeypatch.context() as patch:
        patch.setattr(StopSignal, "requested", stop_after_eight)
        patch.setattr(sys, "argv", ["train.py", *arguments])
        train.main()
    progress = torch.load(tmp_path / "r" / "checkpoints" / "last.pt", weights_only=True)["progress"]
    assert (progress["epoch"], progress["step"], progress["last"]) == (1, 7, None)
    assert len(read_rows(tmp_path / "r")) == 3
    monkeypatch.setattr(sys, "argv", ["train.py", *arguments, "--resume"])
    train.main()
    without_time = [{k: v for k, v in row.items() if k != "time"} for row in read_rows(tmp_path / "r")]
    assert without_time == [{k: v for k, v in row.items() if k != "time"} for row in read_rows(folder)]


def test_a_branch_is_saved_before_its_first_step_and_has_its_own_best(finished_run, tmp_path):
    folder, _ = finished_run
    branch, source = tmp_path / "branch", str(folder / "checkpoints" / "best.pt")
    stopped = ["run.log_interval=1", "optimizer.lr=1e30"]  # dies in its first epoch
    python("train.py", "--resume", source, "--output", str(branch), "train.epochs=9", *stopped, status=2)
    parent = torch.load(source, weights_only=True)
    content = torch.load(branch / "checkpoints" / "last.pt", weights_only=True)
    assert all(torch.equal(value, content["model"][name]) for name, value in parent["model"].items())
    assert content["progress"]["best"] is None and content["progress"]["rows"] == 0


@pytest.mark.filterwarnings("error")  # of files that stay open
def test_a_directory_is_not_shared_by_two_processes(finished_run):
    folder, _ = finished_run
    with open(folder / "log.txt", "a") as log:
        fcntl.flock(log, fcntl.LOCK_EX)
        done = python("train.py", "--resume", str(folder), "train.epochs=3", status=2)
    assert str(folder) in done.stderr and "another process" in done.stderr


def test_another_decay_on_batchnorm():
    training = training_of("optimizer.norm_weight_decay=0", "optimizer.weight_decay=0.01")
    groups = training.optimizer.param_groups
    assert [group["weight_decay"] for group in groups] == [0.01, 0]
    assert sum(len(group["params"]) for group in groups) == len(list(training.model.parameters()))
    names = {id(p): name for name, p in training.model.named_parameters()}
    theirs = {names[id(p)] for p in groups[1]["params"]}
    assert theirs == {name for name in names.values() if "bn" in name or ".downsample.1." in name}
    reference = copy.deepcopy(training.model)
    images, labels = batch()
    train_step(training, images, labels, 0.1)
    F.cross_entropy(reference(images), labels).backward()
    with torch.no_grad():
        for name, p in reference.named_parameters():
            p -= 0.1 * 1.9 * (p.grad + (0 if name in theirs else 0.01) * p)
    assert_close(training.model, reference)


def test_too_little_memory_names_the_keys_that_save_some(tmp_path, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(resnext.engine.trainer, "train_step", full)
    (tmp_path / "tiny.yaml").touch()
    result = call(train.main, "--config", tmp_path / "tiny.yaml", "--output", tmp_path / "run", *RUN)
    assert result.status == 2
    assert "train.accumulation_steps" in result.error and "train.activation_checkpointing" in result.error
