"""The operator `norm_relu`: ghost BatchNorm + shortcut + ReLU by the kernels of kernels.py, with autograd.

Importing this module needs triton.
"""

import functools

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import kernels

# (values, channels) in a tile of one program with 4 warps; the fastest on an H100.
FORWARD, BACKWARD = (2048, 64), (4096, 128)
PROGRAMS = 1024  # per launch, if there is enough work: 8 for each of an H100's 132 multiprocessors


@functools.cache
def blocks_of(
    images: int, groups: int, hw: int, channels: int, tile: tuple[int, int]
) -> tuple[int, int, int, int]:
    """Return (ROWS, COLS, split, COLS of the merging kernel): powers of two that depend on the shape only."""
    values, most = tile
    cols = min(most, triton.next_power_of_2(channels))
    programs = triton.cdiv(channels, cols) * groups
    rows = images // groups * hw
    split = 1
    while programs * split < PROGRAMS and rows >= 4 * split * values // cols:
        split *= 2
    return values // cols, cols, split, max(1, min(cols, max(4, values // split)))


COMPILED: dict[tuple, triton.compiler.CompiledKernel] = {}  # kernel and argument types → compiled kernel


def launch(
    kernel: triton.JITFunction,
    grid: tuple[int, int, int],
    tensors: tuple[Tensor, ...],
    numbers: tuple[int | float, ...],
    constants: tuple[int | bool, ...],
) -> None:
    """Run kernel[grid](...), with a lookup of compiled kernels that is faster than triton's."""
    key = (kernel, tensors[0].device, *(tensor.dtype for tensor in tensors), numbers, constants)
    compiled = COMPILED.get(key)
    aligned = all(tensor.data_ptr() % 16 == 0 for tensor in tensors)  # triton compiles for this
    if compiled is None or not aligned:
        compiled = kernel[grid](*tensors, *numbers, *constants)
        if compiled is not None and aligned:  # the interpreter compiles nothing
            COMPILED[key] = compiled
    else:
        compiled[grid](*tensors, *numbers, *constants)


def _channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def norm_forward(
    x: Tensor,
    shortcut: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    batches: Tensor | None,
    groups: int,
    momentum: float,
    eps: float,
    relu: bool,
) -> tuple[Tensor, Tensor]:
    """Return (y, statistics): y like x; mean and 1 / std of each slice, float32 (2, groups, C)."""
    n, c, h, w = x.shape
    sizes = (n, groups, h * w, c)
    rows, cols, split, merged = blocks_of(*sizes, FORWARD)
    blocks = triton.cdiv(c, cols)
    x = _channels_last(x)
    added = x if shortcut is None else _channels_last(shortcut)
    y = torch.empty_like(x)
    statistics = x.new_empty(2, groups, c, dtype=torch.float32)
    part = x.new_empty(2, groups, split, c, dtype=torch.float32)
    with torch.cuda.device_of(x):
        launch(kernels.partial_statistics, (blocks, split, groups), (x, part), (*sizes, split), (rows, cols))
        launch(
            kernels.merge_statistics,
            (triton.cdiv(c, merged), groups, 1),
            (part, statistics, running_mean, running_var, running_mean if batches is None else batches),
            (*sizes, eps, momentum),
            (batches is not None, split, merged),
        )
        launch(
            kernels.apply,
            (blocks, split, groups),
            (x, added, y, statistics, weight, bias),
            (*sizes, split),
            (shortcut is not None, relu, rows, cols),
        )
    return y, statistics


def norm_backward(
    dy: Tensor,
    dy2: Tensor | None,
    x: Tensor,
    y: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    statistics: Tensor,
    shortcut: bool,
    relu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of x, shortcut (empty without one), weight and bias for the gradient dy + dy2."""
    n, c, h, w = x.shape
    groups = statistics.shape[1]
    sizes = (n, groups, h * w, c)
    rows, cols, split, merged = blocks_of(*sizes, BACKWARD)
    blocks = triton.cdiv(c, cols)
    dy, x = _channels_last(dy), _channels_last(x)
    more = dy if dy2 is None else _channels_last(dy2)
    output = x if y is None else _channels_last(y)
    keep = shortcut or dy2 is not None
    dx, kept = torch.empty_like(x), torch.empty_like(x) if keep else dy
    dweight, dbias = torch.empty_like(weight), torch.empty_like(bias)
    part = x.new_empty(2, groups, split, c, dtype=torch.float32)
    sums = x.new_empty(2, groups, c, dtype=torch.float32)
    with torch.cuda.device_of(x):
        launch(
            kernels.partial_gradients,
            (blocks, split, groups),
            (x, output, dy, more, kept, statistics, weight, bias, part),
            (*sizes, split),
            (shortcut, dy2 is not None, relu, rows, cols),
        )
        launch(
            kernels.merge_gradients,
            (triton.cdiv(c, merged), groups, 1),
            (part, sums),
            (groups, c),
            (split, merged),
        )
        launch(
            kernels.input_gradient,
            (blocks, split, groups),
            (x, kept, dx, statistics, weight, bias, sums, dweight, dbias),
            (*sizes, split),
            (keep, relu, rows, cols),
        )
    return dx, kept if shortcut else x.new_empty(0), dweight, dbias


def _fake_forward(x, shortcut, weight, bias, running_mean, running_var, batches, groups, momentum, eps, relu):
    y = torch.empty_like(x, memory_format=torch.channels_last)
    return y, x.new_empty(2, groups, x.shape[1], dtype=torch.float32)


def _fake_backward(dy, dy2, x, y, weight, bias, statistics, shortcut, relu):
    dx = torch.empty_like(x, memory_format=torch.channels_last)
    dshortcut = torch.empty_like(dx) if shortcut else x.new_empty(0)
    return dx, dshortcut, torch.empty_like(weight), torch.empty_like(bias)


class _NormRelu(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, x, shortcut, weight, bias, running_mean, running_var, batches, groups, momentum, eps, relu
    ):
        y, statistics = torch.ops.resnext.norm_forward(
            x, shortcut, weight, bias, running_mean, running_var, batches, groups, momentum, eps, relu
        )
        ctx.shortcut, ctx.relu = shortcut is not None, relu
        ctx.save_for_backward(x, y if ctx.shortcut and relu else None, weight, bias, statistics)
        ctx.set_materialize_grads(False)
        return y, y.view_as(y)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, dy2):
        if dy is None:
            dy, dy2 = dy2, None
        if dy is None:
            return (None,) * 11
        dx, dshortcut, dweight, dbias = torch.ops.resnext.norm_backward(
            dy, dy2, *ctx.saved_tensors, ctx.shortcut, ctx.relu
        )
        return dx, dshortcut if ctx.shortcut else None, dweight, dbias, *(None,) * 7


def _register() -> torch.library.Library:
    """Register the operator `resnext::norm_relu` and the two that it calls."""
    library = torch.library.Library("resnext", "FRAGMENT")
    arguments = (
        "(Tensor x, Tensor? shortcut, Tensor weight, Tensor bias, Tensor(a!) running_mean, "
        "Tensor(b!) running_var, Tensor(c!)? batches, int groups, float momentum, float eps, bool relu)"
    )
    library.define(f"norm_relu{arguments} -> (Tensor, Tensor)")
    library.define(f"norm_forward{arguments} -> (Tensor, Tensor)")
    library.define(
        "norm_backward(Tensor dy, Tensor? dy2, Tensor x, Tensor? y, Tensor weight, Tensor bias, "
        "Tensor statistics, bool shortcut, bool relu) -> (Tensor, Tensor, Tensor, Tensor)"
    )
    # Composite, because torch.library.register_autograd refuses operators that change an argument.
    library.impl("norm_relu", _NormRelu.apply, "CompositeImplicitAutograd")
    for name, run, fake in (
        ("norm_forward", norm_forward, _fake_forward),
        ("norm_backward", norm_backward, _fake_backward),
    ):
        # Outside a graph, torch.compile must not trace into the launches.
        library.impl(name, torch.compiler.disable(run), "CompositeExplicitAutograd")
        torch.library.register_fake(f"resnext::{name}", fake, lib=library)
    return library


LIBRARY = _register()  # keep it: dropping it unregisters the operators

# Return relu(batch_norm(x) + shortcut) in training, twice: for the next convolution and the next shortcut.
# The two outputs share memory; the backward pass adds their gradients.
#   x: (N, C, H, W) in channels_last; bf16, fp16 or fp32. `shortcut` is the same, or None.
#   weight, bias, running_mean, running_var: float32 (C). The first slice updates the running statistics.
#   batches: int64 scalar, incremented; or None.
#   groups: slices of the batch with their own statistics, at most N; each has 2 or more values per channel.
#   momentum: weight of the new statistics in the running ones.
norm_relu = torch.ops.resnext.norm_relu
