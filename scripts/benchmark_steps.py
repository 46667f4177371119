"""What benchmark.py measures of networks: steps of training and evaluation on pictures on the device."""

import copy
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
import torchvision
from benchmark_data import CIFAR, Table, Variant
from count_step import Traffic
from torch import Tensor, nn

from resnext.config import Config, parse_config, to_yaml
from resnext.device import choose_precision, configure_backends, has_instructions, select_device
from resnext.engine.train_state import autocast, build_train_state
from resnext.engine.trainer import train_step
from resnext.errors import UserError

CLASSES = 1000
GROUP = 32  # images, the recipe's bn_group


def networks(overrides: list[str], training: bool) -> Iterator[Table]:
    """torchvision's network in its reference loop, timm's, ours: each as its users run it."""
    base = ["data.dir=unused", "train.precision=auto", "train.batch_size=32", *overrides]
    config = parse_config("", "benchmark", base)
    device = select_device(config.run.device)
    config = replace(
        config, train=replace(config.train, precision=choose_precision(config.train.precision, device))
    )
    configure_backends(config.train.precision, config.run.deterministic, training)
    size, pixels = config.train.batch_size, config.data.image_size
    images = torch.randn(size, 3, pixels, pixels, device=device)
    labels = torch.arange(size, device=device) % CLASSES
    loop = reference_step if training else evaluation_step
    steps: dict[str, Callable[[], object]] = {}
    for name, network in foreign_networks(config):
        for channels_last in (False, True) if name == "torchvision" else (True,):
            compiled = name == "timm" and device.type == "cuda"
            place_as = [f"train.channels_last={channels_last}".lower(), f"train.compile={compiled}".lower()]
            varied = parse_config(to_yaml(config), "benchmark", place_as)
            placed = place(copy.deepcopy(network), varied, device)
            layout = "channels_last" if channels_last else "NCHW"
            pictures = images.contiguous(memory_format=torch.channels_last) if channels_last else images
            name_of_row = f"{name}, {layout}{', compiled' if compiled else ''}"
            steps[name_of_row] = loop(placed, config, device, pictures, labels)
    own = {"ours": []}
    if training and size % GROUP == 0 and size > GROUP:
        own[f"ours, train.bn_group={GROUP}"] = [f"train.bn_group={GROUP}"]
    if device.type == "cuda":
        own["ours, train.compile=true"] = ["train.compile=true"]
    for name, changes in own.items():
        run = build_train_state(
            parse_config(to_yaml(config), "benchmark", changes), tuple(map(str, range(CLASSES))), device, {}
        )
        run.model.train(training)
        pictures = images.to(memory_format=run.layout)
        if training:
            steps[name] = partial(train_step, run, pictures, labels, 1e-4)
        else:
            steps[name] = evaluation_step(run.forward, config, device, pictures, labels)
    model = config.model
    network = f"{model.architecture}-{model.depth} {model.cardinality}x{model.base_width}d"
    what = "training" if training else "evaluation"
    copies = memory_bandwidth(device) / 1e12
    yield (
        f"{what} step, {network}, {config.train.precision}, batch {size}; copies run at {copies:.3g} TB/s",
        [
            Variant(name, size, step, traffic_note(step, size, device, "compile" in name))
            for name, step in steps.items()
        ],
    )


def traffic_note(
    step: Callable[[], object], images: int, device: torch.device, compiled: bool
) -> Callable[[float], str]:
    """What a step moves through memory, counted (not if it is compiled), and its peak."""
    if device.type == "cuda":
        step()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    moved = 0
    if not compiled:  # which hides its operations, and would be compiled anew inside the counter
        with Traffic() as counter:
            step()
        moved = sum(counter.bytes.values())
    peak = f", {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB" if device.type == "cuda" else ""

    def note(seconds: float) -> str:
        speed = (
            f"{moved / 1e9:.3g} GB at {moved / images / seconds / 1e12:.2g} TB/s" if moved else "not counted"
        )
        return speed + peak

    return note


def foreign_networks(config: Config) -> Iterator[tuple[str, nn.Module]]:
    """torchvision's network of the same configuration, and timm's if it is installed."""
    model = config.model
    arguments = {"groups": model.cardinality, "width_per_group": model.base_width}
    if model.stem != "imagenet" or model.depth not in (50, 101, 152):
        raise UserError("model: torchvision has no such network to compare with; use depth 50, 101 or 152")
    yield "torchvision", getattr(torchvision.models, f"resnet{model.depth}")(**arguments)
    try:
        from timm.models.resnet import Bottleneck, ResNet
    except ImportError:
        return
    yield (
        "timm",
        ResNet(Bottleneck, list(model.stages), cardinality=model.cardinality, base_width=model.base_width),
    )


def place(network: nn.Module, config: Config, device: torch.device) -> nn.Module:
    layout = torch.channels_last if config.train.channels_last else torch.contiguous_format
    network = network.to(device=device, memory_format=layout)
    return torch.compile(network) if config.train.compile else network


def reference_step(
    network: nn.Module, config: Config, device: torch.device, images: Tensor, labels: Tensor
) -> Callable[[], None]:
    """A step as in torchvision's references/classification/train.py, its meters included."""
    optimizer = torch.optim.SGD(network.parameters(), 1e-4, momentum=0.9, weight_decay=1e-4)
    scaler = torch.amp.GradScaler(device.type, enabled=config.train.precision == "fp16")
    network.train()

    def step() -> None:
        with autocast(device, config.train.precision):
            output = network(images)
            loss = F.cross_entropy(output, labels)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        with torch.inference_mode():
            found = output.topk(5, dim=1).indices == labels[:, None]
            loss.item(), found[:, 0].sum().item(), found.sum().item()

    return step


def evaluation_step(
    network: Callable, config: Config, device: torch.device, images: Tensor, labels: Tensor
) -> Callable[[], None]:
    if isinstance(network, nn.Module):
        network.eval()

    def step() -> None:
        with torch.inference_mode(), autocast(device, config.train.precision):
            network(images)

    return step


# ---------------------------------------------------------------------------- the limit


def memory_bandwidth(device: torch.device) -> float:
    """Bytes a second of copying 256 MiB, read and written; the best of 10."""
    source = torch.ones(1 << 26, device=device)
    target = torch.empty_like(source)
    times = []
    for _ in range(10):
        start = time.perf_counter()
        target.copy_(source)
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return 2 * source.nbytes / min(times)


# ---------------------------------------------------------------------------- BatchNorm groups


def batchnorm(overrides: list[str]) -> Iterator[Table]:
    """A training step on CIFAR-size noise, with and without groups of 16."""
    config = parse_config("", "benchmark", [*CIFAR, *overrides])
    device = select_device(config.run.device)
    configure_backends(config.train.precision, config.run.deterministic)
    size, pixels = config.train.batch_size, config.data.image_size
    images = torch.randn(size, 3, pixels, pixels, device=device)
    labels = torch.arange(size, device=device) % 10
    for precision in (kind for kind in ("fp32", "bf16") if has_instructions(device, kind)):
        variants = []
        for name, groups in (("plain BatchNorm", []), ("groups of 16", ["train.bn_group=16"])):
            varied = parse_config(to_yaml(config), "benchmark", [f"train.precision={precision}", *groups])
            training = build_train_state(varied, tuple("0123456789"), device, {})
            training.model.train()
            variants.append(
                Variant(name, size, lambda training=training: train_step(training, images, labels, 0.01))
            )
        yield f"training step, 11 layers 4x16d, batch {size} of 32x32, {precision}", variants
