"""Tests that need a GPU: half precision, no waits in a step, the CPU's counts, exact resume, kernels."""

import copy
import signal
import subprocess
import sys
import time

import pytest
import torch
from commands import ROOT, draw_folders
from kernel_cases import LARGE, SMALL, check, results
from run_files import assert_same, read, row_count, rows

from data.datasets import load_set
from data.loaders import make_eval_loader, make_train_loader
from resnext.config import parse_config
from resnext.device import configure_backends
from resnext.engine.evaluator import evaluate
from resnext.engine.train_state import autocast, build_train_state
from resnext.engine.trainer import train_step

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
NETWORK = ("model.stem=cifar", "model.depth=11", "model.cardinality=8", "model.base_width=8")
DATA = ("data.dataset=glyphs", "data.train_images=512", "data.val_images=101", "train.batch_size=64")


def training_on(device: str, *overrides: str):
    config = parse_config("", "test", [*NETWORK, *DATA, *overrides])
    configure_backends(config.train.precision, config.run.deterministic)
    training = build_train_state(config, tuple("0123456789"), torch.device(device), {})
    training.model.train()
    return training


def batches_for(training, split: str = "train"):
    config = training.config
    images = load_set(config.data, split)
    if split == "val":
        return make_eval_loader(images, config.data, config.train.eval_batch_size, training.device)
    return make_train_loader(images, config, training.device)


@pytest.mark.parametrize("compiled", ["false", "true"])
@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16", "fp16"])
def test_training_lowers_the_loss(precision, compiled):
    training = training_on("cuda", f"train.precision={precision}", f"train.compile={compiled}")
    batches = batches_for(training)
    losses = [
        train_step(training, images, labels, 0.05)[0].item()
        for epoch in range(1, 9)
        for images, labels in batches.epoch(epoch)
    ]
    assert sum(losses[-8:]) < 0.8 * sum(losses[:8])


AUGMENTED = ("augment.erasing=0.5", "augment.mixup=0.2", "augment.cutmix=1")
FILES = ("data.dataset=folder", "data.pipeline=fast", "data.image_size=32", "data.workers=2")


@pytest.mark.parametrize(
    "extra",
    [
        (),
        AUGMENTED,
        (*FILES, *AUGMENTED),
        ("train.accumulation_steps=2", "train.bn_group=16"),
        ("train.compile=true",),
    ],
    ids=["plain", "augmented", "files", "parts", "compiled"],
)
def test_a_step_never_waits_for_the_device(extra, tmp_path):
    draw_folders(tmp_path, dict.fromkeys("0123456789", 20), size=50)
    extra = (*extra, f"data.dir={tmp_path}")
    training = training_on("cuda", "train.precision=bf16", "train.ema_decay=0.9", *extra)
    batches = batches_for(training)
    for images, labels in batches.epoch(1):
        train_step(training, images, labels, 0.01)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for images, labels in batches.epoch(2):
            train_step(training, images, labels, 0.01)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_evaluation_counts_are_those_of_the_cpu():
    on_gpu, on_cpu = training_on("cuda"), training_on("cpu")
    for images, labels in batches_for(on_gpu).epoch(1):
        train_step(on_gpu, images, labels, 0.05)
    on_cpu.model.load_state_dict(copy.deepcopy(on_gpu.model.state_dict()))
    scores = [
        evaluate(t.model, batches_for(t, "val"), lambda t=t: autocast(t.device, "fp32"))
        for t in (on_gpu, on_cpu)
    ]
    assert scores[0].images == scores[1].images == 101
    assert (scores[0].top1_errors, scores[0].top5_errors) == (scores[1].top1_errors, scores[1].top5_errors)


@pytest.mark.parametrize(
    "mode",
    [
        ("train.precision=fp32",),
        ("train.precision=fp16",),
        ("train.precision=bf16",),
        ("train.precision=bf16", "train.compile=true"),
    ],
    ids=["fp32", "fp16", "bf16", "bf16-compiled"],
)
def test_resume_is_bit_exact_in_deterministic_mode(tmp_path, mode):
    settings = [*NETWORK, *DATA, *mode, "train.epochs=4", "run.device=cuda"]
    settings += ["run.deterministic=true", "run.log_interval=2"]

    def command(name: str, *arguments: str) -> list[str]:
        script = [sys.executable, str(ROOT / "train.py"), "--config", "demo.yaml", *settings, *arguments]
        return [*script, "--output", str(tmp_path / name)]

    subprocess.run(command("whole"), check=True, timeout=300)
    process = subprocess.Popen(command("stopped"))
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if row_count(tmp_path / "stopped") >= 3:
            process.send_signal(signal.SIGTERM)
            break
        time.sleep(0.005)
    assert process.wait(timeout=60) == 0
    subprocess.run(command("stopped", "--resume"), check=True, timeout=300)
    assert rows(tmp_path / "whole") == rows(tmp_path / "stopped")
    assert_same(*(read(tmp_path / name)["model"] for name in ("whole", "stopped")))


def test_batches_of_files_are_those_of_the_cpu(tmp_path):
    """Copies on a side stream, flips, colors, and mixing give the CPU's pixels to rounding."""
    draw_folders(tmp_path, {"cat": 20, "dog": 20}, size=50)
    keys = ("data.pipeline=fast", "data.image_size=32", "data.workers=2", "train.batch_size=8", *AUGMENTED)
    config = parse_config("", "test", [*keys, f"data.dir={tmp_path}"])
    files = load_set(config.data, "train")
    devices = (torch.device("cpu"), torch.device("cuda"))
    training = [list(make_train_loader(files, config, device, print).epoch(1)) for device in devices]
    for (images, labels), (images_there, labels_there) in zip(*training, strict=True):
        torch.testing.assert_close(images_there.cpu(), images, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(labels_there.cpu(), labels)
    evaluation = [list(make_eval_loader(files, config.data, 8, device)) for device in devices]
    for (images, labels), (images_there, labels_there) in zip(*evaluation, strict=True):
        assert torch.equal(images_there.cpu(), images) and torch.equal(labels_there.cpu(), labels)


# ---------------------------------------------------------------------------- kernels


@pytest.mark.parametrize("case", (*SMALL, *LARGE), ids=str)
def test_kernels(case):
    check(case, "cuda")


@pytest.mark.parametrize("case", LARGE[::3], ids=str)
def test_kernels_give_the_same_bits_again(case):
    first, second = (results(case, "cuda")[0] for _ in range(2))
    assert all(torch.equal(second[k], v) for k, v in first.items())


def test_kernels_on_a_batch_beyond_32_bit_offsets():
    """Among 2.2e9 values, the last slice has the outputs and gradients of the slice alone."""
    from resnext.models.fused_norm import norm_relu

    if torch.cuda.get_device_properties(0).total_memory < 40 * 2**30:
        pytest.skip("needs 40 GiB")
    x = torch.randn(84, 64, 640, 640, device="cuda", dtype=torch.bfloat16)
    x = x.contiguous(memory_format=torch.channels_last).requires_grad_()
    weight = torch.linspace(0.5, 1.5, 64, device="cuda", requires_grad=True)
    bias = torch.linspace(-1, 1, 64, device="cuda", requires_grad=True)

    def step(images, groups):
        mean, var = torch.zeros(64, device="cuda"), torch.ones(64, device="cuda")
        y, _ = norm_relu(images, None, weight, bias, mean, var, None, groups, 0.1, 1e-5, True)
        (dx,) = torch.autograd.grad(y[-2:].float().square().sum(), images)
        return y[-2:].detach(), dx[-2:]

    whole = step(x, 42)
    alone = step(x[-2:].detach().requires_grad_(), 1)
    for ours, theirs in zip(whole, alone, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0.02, atol=0.02)


GROUPS = "train.bn_group=16"
BASIC = ("model.architecture=resnet", "model.depth=14", "model.cardinality=1", "model.base_width=16")
PREACTIVATION = "model.preactivation=true"


@pytest.mark.parametrize(
    "extra",
    [
        (),
        (GROUPS,),
        (GROUPS, "train.compile=true"),
        (GROUPS, "train.compile=true", "train.accumulation_steps=2"),
        ("train.bn_group=32", PREACTIVATION),
        (GROUPS, *BASIC),
        (GROUPS, *BASIC, PREACTIVATION),
    ],
)
def test_a_step_is_that_of_the_cpu(extra):
    """Compare loss, gradients, and running statistics of the kernels and torch in fp32 without TF32."""
    keys = ("train.precision=fp32", "train.channels_last=true", *extra)
    on_gpu, on_cpu = training_on("cuda", *keys), training_on("cpu", *keys, "train.compile=false")
    images, labels = next(iter(batches_for(on_cpu).epoch(1)))
    images = images.contiguous(memory_format=torch.channels_last)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        ours = train_step(on_gpu, images.cuda(), labels.cuda(), 0.05)
    operators = {event.key: event.count for event in profile.key_averages()}
    norms = sum(isinstance(m, torch.nn.BatchNorm2d) for m in on_gpu.model.modules())
    if "train.compile=true" not in extra:
        assert operators["resnext::norm_forward"] == operators["resnext::norm_backward"] == norms
    theirs = train_step(on_cpu, images, labels, 0.05)
    torch.testing.assert_close(ours.cpu(), theirs, rtol=1e-4, atol=0)
    there = dict(on_gpu.model.named_parameters())
    for name, parameter in on_cpu.model.named_parameters():
        difference = (there[name].grad.cpu() - parameter.grad).norm()
        # Some ReLUs have an input of 0 to rounding: on a CPU, float32 differs from float64 as much (0.004).
        assert difference < 2e-2 * parameter.grad.norm(), name
    buffers = dict(on_gpu.model.named_buffers())
    for name, buffer in on_cpu.model.named_buffers():
        torch.testing.assert_close(buffers[name].cpu(), buffer, rtol=1e-4, atol=1e-5)


def test_a_bf16_step_gives_the_same_bits_again():
    steps = []
    for _ in range(2):
        training = training_on("cuda", "train.precision=bf16", GROUPS, "run.deterministic=true")
        images, labels = next(iter(batches_for(training).epoch(1)))
        train_step(training, images, labels, 0.05)
        steps.append(training.model.state_dict())
    assert all(torch.equal(steps[1][k], v) for k, v in steps[0].items())


def test_the_compiled_network_is_one_graph():
    training = training_on("cuda", "train.precision=bf16", GROUPS)
    images, _ = next(iter(batches_for(training).epoch(1)))
    compiled = torch.compile(training.model, backend="aot_eager", fullgraph=True, dynamic=False)
    with training.autocast():
        compiled(images).float().sum().backward()
    assert all(p.grad.isfinite().all() for p in training.model.parameters())
