"""What benchmark.py measures of single layers, forward and backward: grouped convolutions and BatchNorm."""

from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from benchmark_data import Table, Variant
from torch import Tensor, nn

from resnext.config import Config, parse_config
from resnext.device import choose_precision, configure_backends, select_device
from resnext.models.ghost_batchnorm import GhostBatchNorm2d, kernels_work, norm_relu
from resnext.models.resnext import build_model

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def prepared(overrides: list[str]) -> tuple[Config, torch.device, torch.dtype]:
    config = parse_config("", "benchmark", ["data.dir=unused", "train.precision=auto", *overrides])
    device = select_device(config.run.device)
    precision = choose_precision(config.train.precision, device)
    configure_backends(precision, config.run.deterministic)
    return config, device, DTYPES.get(precision, torch.float32)


def inputs_of(config: Config, kind: type[nn.Module]) -> dict[str, tuple[nn.Module, torch.Size]]:
    """{name: (layer, shape of its input)} of all layers of a kind, in the order they run; on no device."""
    found = {}
    with torch.device("meta"), torch.no_grad():
        model = build_model(config.model, 1000).eval()
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


# ---------------------------------------------------------------------------- grouped convolutions


def convolutions(overrides: list[str]) -> Iterator[Table]:
    """Each distinct grouped 3x3 of a network: as it is, in both layouts, and with groups merged."""
    config, device, dtype = prepared(overrides)
    found: dict[tuple, int] = {}
    for layer, shape in inputs_of(config, nn.Conv2d).values():
        if layer.groups > 1:
            key = (*shape, layer.groups, layer.stride[0])
            found[key] = found.get(key, 0) + 1
    for (images, channels, height, width, groups, stride), times in found.items():
        x = torch.randn(images, channels, height, width, device=device, dtype=dtype)
        weight = torch.randn(channels, channels // groups, 3, 3, device=device, dtype=dtype)
        forms = {
            "channels_last (the default)": (torch.channels_last, 1),
            "NCHW": (torch.contiguous_format, 1),
        }
        forms |= {
            f"channels_last, {k} groups in one": (torch.channels_last, k) for k in (2, 4, 8) if k < groups
        }
        forms["channels_last, dense"] = (torch.channels_last, groups)
        variants = []
        for name, (layout, merged) in forms.items():
            run = partial(convolve, stride=stride, groups=groups, merged=merged, layout=layout)
            own = (tensor.contiguous(memory_format=layout).requires_grad_() for tensor in (x, weight))
            variants.append(Variant(name, images, forward_backward(run, *own)))
        what = f"3x3, {channels} channels in {groups} groups, {height}x{width} by stride {stride}"
        yield f"{what}, batch {images}, {times} in the network", variants


def convolve(
    x: Tensor, weight: Tensor, stride: int, groups: int, merged: int, layout: torch.memory_format
) -> Tensor:
    if merged > 1:
        weight = merge_groups(weight, groups, merged).contiguous(memory_format=layout)
    return F.conv2d(x, weight, None, stride, 1, groups=groups // merged)


def merge_groups(weight: Tensor, groups: int, merged: int) -> Tensor:
    """(C, D, 3, 3) of a grouped convolution as (C, merged · D, 3, 3), block-diagonal: the same function."""
    channels, width, *kernel = weight.shape
    blocks = weight.new_zeros(groups // merged, merged, channels // groups, merged, width, *kernel)
    parts = weight.unflatten(0, (groups // merged, merged, channels // groups))
    blocks.diagonal(dim1=1, dim2=3).copy_(parts.movedim(1, -1))
    return blocks.flatten(3, 4).flatten(0, 2)


# ---------------------------------------------------------------------------- BatchNorm


def norms(overrides: list[str]) -> Iterator[Table]:
    """Each distinct BatchNorm + ReLU, with or without a shortcut: torch's operations, and ours by groups."""
    config, device, dtype = prepared(overrides)
    found: dict[tuple, int] = {}
    for name, (_, shape) in inputs_of(config, nn.BatchNorm2d).items():
        if "downsample" not in name:
            key = (*shape, name.endswith("bn3"))
            found[key] = found.get(key, 0) + 1
    for (*shape, with_shortcut), times in found.items():
        images, channels, height, width = shape
        pair = [
            torch.randn(shape, device=device, dtype=dtype)
            .contiguous(memory_format=torch.channels_last)
            .requires_grad_()
            for _ in range(1 + with_shortcut)
        ]
        tensors = 11 if with_shortcut else 8  # that resnext/kernels.py reads or writes, there and back
        note = partial(bandwidth, tensors * pair[0].nbytes / images)
        layers: dict[str, Callable[..., Tensor]] = {
            "torch: BatchNorm, addition, ReLU": partial(plain, nn.BatchNorm2d(channels).to(device))
        }
        for groups in (1, 8):
            norm = GhostBatchNorm2d(channels, groups, kernels_work(device)).to(device)
            layers[f"ours, {groups} group{'s' * (groups > 1)}"] = partial(fused, norm)
        what = "BatchNorm, shortcut, ReLU" if with_shortcut else "BatchNorm, ReLU"
        yield (
            f"{what}, {channels} channels, {height}x{width}, batch {images}, {times} in the network",
            [Variant(name, images, forward_backward(run, *pair), note) for name, run in layers.items()],
        )


def plain(norm: nn.Module, x: Tensor, shortcut: Tensor | None = None) -> Tensor:
    y = norm(x)
    return F.relu(y if shortcut is None else y + shortcut)


def fused(norm: nn.Module, *pair: Tensor) -> Tensor:
    return norm_relu(norm, *pair)[0]


def bandwidth(bytes_an_image: float, seconds: float) -> str:
    return f"{bytes_an_image / seconds / 1e12:.2f} TB/s"
