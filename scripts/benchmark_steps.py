"""What benchmark.py measures of networks: steps of training and evaluation on pictures on the device."""

import contextlib
import time
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
import torchvision
from benchmark_data import CIFAR, Table, Variant
from torch import Tensor, nn
from traffic import Traffic

from resnext.config import Config, parse_config, to_yaml
from resnext.distributed import choose_device, has_instructions, set_numerics
from resnext.errors import UserError
from resnext.state import autocast, prepare
from resnext.trainer import train_step

CLASSES = 1000


def networks(overrides: list[str], training: bool) -> Iterator[Table]:
    """Ours, torchvision's and timm's network; precision by memory layout, on a GPU by torch.compile too."""
    config = parse_config("", "benchmark", ["data.dir=unused", "train.batch_size=32", *overrides])
    device = choose_device(config.run.device)
    set_numerics(config.train.precision, config.run.deterministic)
    bandwidth = memory_bandwidth(device)
    precisions = ("bf16", "fp16") if device.type == "cuda" else ("fp32", "bf16")
    for precision in (kind for kind in precisions if has_instructions(device, kind)):
        variants = []
        for compiled in (False, True) if device.type == "cuda" else (False,):
            for channels_last in (False, True):
                changes = [
                    f"train.precision={precision}",
                    f"train.channels_last={str(channels_last).lower()}",
                    f"train.compile={str(compiled).lower()}",
                ]
                varied = parse_config(to_yaml(config), "benchmark", changes)
                layout = "channels_last" if channels_last else "NCHW"
                suffix = f"{layout}{', compiled' if compiled else ''}"
                variants += contenders(varied, device, suffix, bandwidth, training)
        what = "training" if training else "evaluation"
        name = f"{config.model.architecture}-{config.model.depth}"
        yield f"{what} step, {name}, {precision}, batch {config.train.batch_size}", variants


def contenders(
    config: Config, device: torch.device, suffix: str, bandwidth: float, training: bool
) -> list[Variant]:
    """torchvision's network in its reference loop, timm's, ours."""
    size = config.train.batch_size
    pixels = config.data.image_size
    images = torch.randn(size, 3, pixels, pixels, device=device)
    if config.train.channels_last:
        images = images.contiguous(memory_format=torch.channels_last)
    labels = torch.arange(size, device=device) % CLASSES
    run = prepare(config, tuple(map(str, range(CLASSES))), device, {})
    loop = reference_step if training else evaluation_step
    steps = {
        f"{name}, {suffix}": loop(place(network, config, device), config, device, images, labels)
        for name, network in foreign_networks(config)
    }
    if training:
        run.model.train()
        steps[f"ours, {suffix}"] = lambda: train_step(run, images, labels, 1e-4)
    else:
        steps[f"ours, {suffix}"] = evaluation_step(run.forward, config, device, images, labels)
        run.model.eval()
    moved = bytes_moved(steps[f"ours, {suffix}"]) / size

    def share(seconds: float) -> str:
        return f"{100 * moved / bandwidth / seconds:.0f} % of memory bandwidth"

    return [Variant(name, size, step, share) for name, step in steps.items()]


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


def bytes_moved(step: Callable[[], object]) -> int:
    """Bytes of a step's convolutions and matrix products: what moves if all else were fused into them.

    Of a compiled step, which hides its operations, 0.
    """
    with contextlib.suppress(Exception), Traffic() as counter:
        step()
        return sum(counter.bytes[name] for name in ("convolution", "convolution_backward", "mm", "addmm"))
    return 0


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
    device = choose_device(config.run.device)
    set_numerics(config.train.precision, config.run.deterministic)
    size, pixels = config.train.batch_size, config.data.image_size
    images = torch.randn(size, 3, pixels, pixels, device=device)
    labels = torch.arange(size, device=device) % 10
    for precision in (kind for kind in ("fp32", "bf16") if has_instructions(device, kind)):
        variants = []
        for name, groups in (("plain BatchNorm", []), ("groups of 16", ["train.bn_group=16"])):
            varied = parse_config(to_yaml(config), "benchmark", [f"train.precision={precision}", *groups])
            training = prepare(varied, tuple("0123456789"), device, {})
            training.model.train()
            variants.append(
                Variant(name, size, lambda training=training: train_step(training, images, labels, 0.01))
            )
        yield f"training step, 11 layers 4x16d, batch {size} of 32x32, {precision}", variants
