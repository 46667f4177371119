"""The network benchmarks of benchmark.py: whole steps, grouped convolutions, BatchNorm."""

from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
import torchvision
from benchmark_data import Table, Variant
from torch import Tensor, nn

from resnext.config import Config, network_name, parse_config, to_yaml
from resnext.device import choose_precision, configure_backends, select_device
from resnext.engine.train_state import autocast, build_train_state
from resnext.engine.trainer import train_step
from resnext.models.ghost_batchnorm import GhostBatchNorm2d, kernels_work, norm_relu
from resnext.models.resnext import build_model

CLASSES = 1000
GROUP = 32  # images, the recipe's bn_group
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def configured(overrides: list[str], training: bool = True) -> tuple[Config, torch.device]:
    base = ["data.dir=unused", "train.precision=auto", "train.batch_size=32", *overrides]
    config = parse_config("", "benchmark", base)
    device = select_device(config.run.device)
    precision = choose_precision(config.train.precision, device)
    configure_backends(precision, config.run.deterministic, training)
    return parse_config(to_yaml(config), "benchmark", [f"train.precision={precision}"]), device


# ---------------------------------------------------------------------------- steps


def networks(overrides: list[str], training: bool) -> Iterator[Table]:
    """Compare torchvision's network in its reference loop, timm's, and ours, each as its users run it."""
    config, device = configured(overrides, training)
    size, pixels = config.train.batch_size, config.data.image_size
    images = torch.randn(size, 3, pixels, pixels, device=device)
    labels = torch.arange(size, device=device) % CLASSES
    loop = reference_step if training else evaluation_step
    steps: dict[str, Callable[[], object]] = {}
    for name, make, layout, compiled in references(config, device):
        network = make().to(device=device, memory_format=layout)
        network = torch.compile(network) if compiled else network
        steps[name] = loop(network, config, device, images.contiguous(memory_format=layout), labels)
    own = {"ours": []}
    if training and size % GROUP == 0 and size > GROUP:
        own[f"ours, train.bn_group={GROUP}"] = [f"train.bn_group={GROUP}"]
    if device.type == "cuda":
        own["ours, train.compile=true"] = ["train.compile=true"]
    for name, changes in own.items():
        varied = parse_config(to_yaml(config), "benchmark", changes)
        state = build_train_state(varied, tuple(map(str, range(CLASSES))), device, {})
        state.model.train(training)
        laid_out = images.to(memory_format=state.layout)
        if training:
            steps[name] = partial(train_step, state, laid_out, labels, 1e-4)
        else:
            steps[name] = evaluation_step(state.model, config, device, laid_out, labels)
    what = "training" if training else "evaluation"
    yield (
        f"{what} step, {network_name(config.model)}, {config.train.precision}, batch {size}",
        [Variant(name, size, step, partial(peak_memory, step, device)) for name, step in steps.items()],
    )


def references(
    config: Config, device: torch.device
) -> Iterator[tuple[str, Callable[[], nn.Module], torch.memory_format, bool]]:
    """Yield (name, constructor, layout, compiled) of the networks to compare with; timm's if installed.

    Neither has the networks for CIFAR.
    """
    model = config.model
    if model.stem != "imagenet":
        return
    basic, widths = model.block_type == "basic", (model.cardinality, model.base_width)
    kind = torchvision.models.resnet.BasicBlock if basic else torchvision.models.resnet.Bottleneck
    make = partial(
        torchvision.models.ResNet, kind, list(model.stages), groups=widths[0], width_per_group=widths[1]
    )
    yield "torchvision, NCHW", make, torch.contiguous_format, False
    yield "torchvision, channels_last", make, torch.channels_last, False
    try:
        from timm.models import resnet
    except ImportError:
        return
    block = resnet.BasicBlock if basic else resnet.Bottleneck
    make = partial(resnet.ResNet, block, list(model.stages), cardinality=widths[0], base_width=widths[1])
    compiled = device.type == "cuda"
    name = f"timm, channels_last{', compiled' if compiled else ''}"
    yield name, make, torch.channels_last, compiled


def reference_step(
    network: nn.Module, config: Config, device: torch.device, images: Tensor, labels: Tensor
) -> Callable[[], None]:
    """Return a step of torchvision's references/classification/train.py, including its meters."""
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
    network: nn.Module, config: Config, device: torch.device, images: Tensor, labels: Tensor
) -> Callable[[], None]:
    network.eval()

    def step() -> None:
        with torch.inference_mode(), autocast(device, config.train.precision):
            network(images)

    return step


def peak_memory(step: Callable[[], object], device: torch.device, _: float) -> str:
    if device.type != "cuda":
        return ""
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    return f"{torch.cuda.max_memory_allocated() / 2**30:.1f} GiB"


# ---------------------------------------------------------------------------- layers


def inputs_of(config: Config, kind: type[nn.Module]) -> dict[str, tuple[nn.Module, torch.Size]]:
    """Return {name: (layer, input shape)} of all layers of a kind, in execution order, on the meta device."""
    found = {}
    with torch.device("meta"), torch.no_grad():
        model = build_model(config.model, CLASSES).eval()
        for name, module in model.named_modules():
            if isinstance(module, kind):
                module.register_forward_pre_hook(
                    lambda module, inputs, name=name: found.update({name: (module, inputs[0].shape)})
                )
        model(torch.empty(config.train.batch_size, 3, config.data.image_size, config.data.image_size))
    return found


def forward_backward(function: Callable[..., Tensor], *inputs: Tensor) -> Callable[[], object]:
    gradient = torch.randn_like(function(*inputs))
    return lambda: torch.autograd.grad(function(*inputs), inputs, gradient)


def convolutions(overrides: list[str]) -> Iterator[Table]:
    """Compare each distinct grouped 3x3 in both layouts, with groups merged, and dense."""
    config, device = configured(overrides)
    dtype = DTYPES.get(config.train.precision, torch.float32)
    counts: dict[tuple, int] = {}
    for layer, shape in inputs_of(config, nn.Conv2d).values():
        if layer.groups > 1:
            key = (*shape, layer.groups, layer.stride[0])
            counts[key] = counts.get(key, 0) + 1
    for (images, channels, height, width, groups, stride), count in counts.items():
        x = torch.randn(images, channels, height, width, device=device, dtype=dtype)
        weight = torch.randn(channels, channels // groups, 3, 3, device=device, dtype=dtype)
        forms = {
            "channels_last (the default)": (torch.channels_last, 1),
            "NCHW": (torch.contiguous_format, 1),
            **{
                f"channels_last, {k} groups merged": (torch.channels_last, k) for k in (2, 4, 8) if k < groups
            },
            "channels_last, dense": (torch.channels_last, groups),
        }
        variants = []
        for name, (layout, merged) in forms.items():
            run = partial(convolve, stride=stride, groups=groups, merged=merged, layout=layout)
            own = (tensor.contiguous(memory_format=layout).requires_grad_() for tensor in (x, weight))
            variants.append(Variant(name, images, forward_backward(run, *own)))
        what = f"3x3, {channels} channels in {groups} groups, {height}x{width}, stride {stride}"
        yield f"{what}, batch {images}, {count} in the network", variants


def convolve(
    x: Tensor, weight: Tensor, stride: int, groups: int, merged: int, layout: torch.memory_format
) -> Tensor:
    if merged > 1:
        weight = merge_groups(weight, groups, merged).contiguous(memory_format=layout)
    return F.conv2d(x, weight, None, stride, 1, groups=groups // merged)


def merge_groups(weight: Tensor, groups: int, merged: int) -> Tensor:
    """Return (C, D, 3, 3) of a grouped convolution as (C, merged · D, 3, 3), block-diagonal."""
    channels, width, *kernel = weight.shape
    blocks = weight.new_zeros(groups // merged, merged, channels // groups, merged, width, *kernel)
    parts = weight.unflatten(0, (groups // merged, merged, channels // groups))
    blocks.diagonal(dim1=1, dim2=3).copy_(parts.movedim(1, -1))
    return blocks.flatten(3, 4).flatten(0, 2)


def norms(overrides: list[str]) -> Iterator[Table]:
    """Compare torch's operations and ours for each distinct BatchNorm + ReLU, with or without a shortcut."""
    config, device = configured(overrides)
    dtype = DTYPES.get(config.train.precision, torch.float32)
    counts: dict[tuple, int] = {}
    for name, (_, shape) in inputs_of(config, nn.BatchNorm2d).items():
        if "downsample" not in name:
            key = (*shape, name.endswith("bn2" if config.model.block_type == "basic" else "bn3"))
            counts[key] = counts.get(key, 0) + 1
    for (*shape, with_shortcut), count in counts.items():
        images, channels, height, width = shape
        pair = [
            torch.randn(shape, device=device, dtype=dtype)
            .contiguous(memory_format=torch.channels_last)
            .requires_grad_()
            for _ in range(1 + with_shortcut)
        ]
        tensors = 11 if with_shortcut else 8  # that the kernels read or write, forward and backward
        note = partial(bandwidth, tensors * pair[0].nbytes / images)
        layers: dict[str, Callable[..., Tensor]] = {
            "torch: BatchNorm, addition, ReLU": partial(plain, nn.BatchNorm2d(channels).to(device))
        }
        for groups in (1, 8):
            norm = GhostBatchNorm2d(channels, groups, kernels_work(device)).to(device)
            layers[f"ours, {groups} group{'s' * (groups > 1)}"] = partial(fused, norm)
        what = "BatchNorm, shortcut, ReLU" if with_shortcut else "BatchNorm, ReLU"
        yield (
            f"{what}, {channels} channels, {height}x{width}, batch {images}, {count} in the network",
            [Variant(name, images, forward_backward(run, *pair), note) for name, run in layers.items()],
        )


def plain(norm: nn.Module, x: Tensor, shortcut: Tensor | None = None) -> Tensor:
    y = norm(x)
    return F.relu(y if shortcut is None else y + shortcut)


def fused(norm: nn.Module, *pair: Tensor) -> Tensor:
    return norm_relu(norm, *pair)[0]


def bandwidth(bytes_per_image: float, seconds: float) -> str:
    return f"{bytes_per_image / seconds / 1e12:.2f} TB/s"
