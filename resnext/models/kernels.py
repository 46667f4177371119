"""BatchNorm over slices of the batch, + shortcut, + ReLU, in three kernels forward and three back.

`norm_relu`, at the end, is what batchnorm.py calls. Importing this module needs triton.

Tensors are (N, C, H, W) in channels_last: M = N·H·W rows of C values. Slice g, one of batchnorm.slice_sizes,
is a range of rows that a kernel works out itself, so a smaller last batch needs no other kernel. A slice is
cut into `split` parts, whose sums are added up in an order that depends on the shape alone. There are no
atomics: the same input gives the same bits. Sums are float32.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

SIZES = ["images", "groups", "hw", "split"]  # integers that do not deserve a specialised kernel each


# ---------------------------------------------------------------------------- rows


@triton.jit
def rows_of_part(images, groups, hw, g, s, split):
    """First row (int64) of part s of slice g, and its number of rows, which may be 0."""
    small = images // groups
    larger = images % groups
    start = (g * small + tl.minimum(g, larger)).to(tl.int64) * hw
    rows = (small + (g < larger).to(tl.int32)) * hw
    each = tl.cdiv(rows, split)
    first = tl.minimum(s * each, rows)
    return start + first, tl.minimum(each, rows - first)


@triton.jit
def normalized(x, mean, scale, bias):
    """One expression for both passes: the backward pass must find the sign that the forward pass had."""
    return tl.fma(x - mean[None, :], scale[None, :], bias[None, :])


# ---------------------------------------------------------------------------- forward


@triton.jit(do_not_specialize=SIZES)
def partial_statistics(x_ptr, part_ptr, images, groups, hw, C, split, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Mean and sum of squared deviations of a part, to part (2, groups, split, C)."""
    cols = tl.program_id(0) * COLS + tl.arange(0, COLS)
    s = tl.program_id(1)
    g = tl.program_id(2)
    inside = cols < C
    start, rows = rows_of_part(images, groups, hw, g, s, split)
    lane = tl.arange(0, ROWS)
    tile = lane[:, None] * C + cols[None, :]
    # Deviations from the part's first row: their squares do not cancel where the mean is large.
    shift = tl.load(x_ptr + start * C + cols, inside & (rows > 0), 0.0).to(tl.float32)
    sums = tl.zeros((ROWS, COLS), tl.float32)
    squares = tl.zeros((ROWS, COLS), tl.float32)
    for r in range(0, rows, ROWS):
        ok = (r + lane < rows)[:, None] & inside[None, :]
        x = tl.load(x_ptr + (start + r) * C + tile, ok, 0.0).to(tl.float32)
        d = tl.where(ok, x - shift[None, :], 0.0)
        sums += d
        squares += d * d
    n = tl.maximum(rows, 1).to(tl.float32)
    total = tl.sum(sums, 0)
    out = part_ptr + (g * split + s) * C + cols
    tl.store(out, shift + total / n, inside)
    tl.store(out + groups * split * C, tl.sum(squares, 0) - total * (total / n), inside)


@triton.jit(do_not_specialize=SIZES)
def merge_statistics(
    part_ptr,
    statistics_ptr,
    running_mean_ptr,
    running_var_ptr,
    batches_ptr,
    images,
    groups,
    hw,
    C,
    eps,
    momentum,
    COUNT: tl.constexpr,
    SPLIT: tl.constexpr,
    COLS: tl.constexpr,
):
    """Mean and 1 / sqrt(var + eps) of each slice, to statistics (2, groups, C).

    Slice 0 moves the running statistics, and its first program counts the batch.
    """
    cols = tl.program_id(0) * COLS + tl.arange(0, COLS)
    g = tl.program_id(1)
    inside = cols < C
    parts = tl.arange(0, SPLIT)
    _, rows = rows_of_part(images, groups, hw, g, parts, SPLIT)
    n = rows.to(tl.float32)[:, None]
    total = tl.sum(rows, 0).to(tl.float32)
    at = part_ptr + (g * SPLIT + parts)[:, None] * C + cols[None, :]
    means = tl.load(at, inside[None, :], 0.0)
    squares = tl.load(at + groups * SPLIT * C, inside[None, :], 0.0)
    shift = tl.load(part_ptr + g * SPLIT * C + cols, inside, 0.0)
    d = means - shift[None, :]
    moved = tl.sum(n * d, 0) / total
    d -= moved[None, :]
    squares = tl.sum(squares + n * d * d, 0)
    mean = shift + moved
    out = statistics_ptr + g * C + cols
    tl.store(out, mean, inside)
    tl.store(out + groups * C, 1.0 / tl.sqrt_rn(squares / total + eps), inside)
    if g == 0:
        old_mean = tl.load(running_mean_ptr + cols, inside, 0.0)
        old_var = tl.load(running_var_ptr + cols, inside, 0.0)
        var = squares / (total - 1.0)
        tl.store(running_mean_ptr + cols, (1.0 - momentum) * old_mean + momentum * mean, inside)
        tl.store(running_var_ptr + cols, (1.0 - momentum) * old_var + momentum * var, inside)
        if COUNT:
            first = tl.program_id(0) == 0
            tl.store(batches_ptr, tl.load(batches_ptr, first) + 1, first)


@triton.jit(do_not_specialize=SIZES)
def apply(
    x_ptr,
    shortcut_ptr,
    y_ptr,
    statistics_ptr,
    weight_ptr,
    bias_ptr,
    images,
    groups,
    hw,
    C,
    split,
    SHORTCUT: tl.constexpr,
    RELU: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    cols = tl.program_id(0) * COLS + tl.arange(0, COLS)
    s = tl.program_id(1)
    g = tl.program_id(2)
    inside = cols < C
    start, rows = rows_of_part(images, groups, hw, g, s, split)
    lane = tl.arange(0, ROWS)
    tile = lane[:, None] * C + cols[None, :]
    mean = tl.load(statistics_ptr + g * C + cols, inside, 0.0)
    scale = tl.load(statistics_ptr + (groups + g) * C + cols, inside, 0.0)
    scale *= tl.load(weight_ptr + cols, inside, 0.0)
    bias = tl.load(bias_ptr + cols, inside, 0.0)
    tiles = tl.cdiv(rows, ROWS)
    for i in range(tiles):
        r = (tiles - 1 - i) * ROWS  # the last rows are those that the cache still has
        ok = (r + lane < rows)[:, None] & inside[None, :]
        at = (start + r) * C + tile
        x = tl.load(x_ptr + at, ok, 0.0).to(tl.float32)
        y = normalized(x, mean, scale, bias)
        if SHORTCUT:
            y += tl.load(shortcut_ptr + at, ok, 0.0).to(tl.float32)
        if RELU:
            y = tl.where(y < 0.0, 0.0, y)  # a NaN stays
        tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), ok)


# ---------------------------------------------------------------------------- backward


@triton.jit
def through_relu(dy, x, y_ptr, at, ok, mean, scale, bias, SHORTCUT: tl.constexpr, RELU: tl.constexpr):
    """dy where ReLU let something through: by the output if there was a shortcut, else computed from x."""
    if RELU:
        if SHORTCUT:  # noqa: SIM108 (a branch of the compiler's)
            y = tl.load(y_ptr + at, ok, 0.0).to(tl.float32)
        else:
            y = normalized(x, mean, scale, bias)
        dy = tl.where(y <= 0.0, 0.0, dy)
    return dy


@triton.jit(do_not_specialize=SIZES)
def partial_gradients(
    x_ptr,
    y_ptr,
    dy_ptr,
    dy2_ptr,
    kept_ptr,
    statistics_ptr,
    weight_ptr,
    bias_ptr,
    part_ptr,
    images,
    groups,
    hw,
    C,
    split,
    SHORTCUT: tl.constexpr,
    TWO: tl.constexpr,
    RELU: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """Sums of dy and of dy · (x - mean) / std of a part, to part (2, groups, split, C).

    With a shortcut or two gradients, what reaches the normalised values is kept: it is the shortcut's
    gradient, and all that `input_gradient` needs besides x.
    """
    cols = tl.program_id(0) * COLS + tl.arange(0, COLS)
    s = tl.program_id(1)
    g = tl.program_id(2)
    inside = cols < C
    start, rows = rows_of_part(images, groups, hw, g, s, split)
    lane = tl.arange(0, ROWS)
    tile = lane[:, None] * C + cols[None, :]
    mean = tl.load(statistics_ptr + g * C + cols, inside, 0.0)
    inverse = tl.load(statistics_ptr + (groups + g) * C + cols, inside, 0.0)
    scale = inverse * tl.load(weight_ptr + cols, inside, 0.0)
    bias = tl.load(bias_ptr + cols, inside, 0.0)
    sums = tl.zeros((ROWS, COLS), tl.float32)
    products = tl.zeros((ROWS, COLS), tl.float32)
    for r in range(0, rows, ROWS):
        ok = (r + lane < rows)[:, None] & inside[None, :]
        at = (start + r) * C + tile
        x = tl.load(x_ptr + at, ok, 0.0).to(tl.float32)
        dy = tl.load(dy_ptr + at, ok, 0.0).to(tl.float32)
        if TWO:
            dy += tl.load(dy2_ptr + at, ok, 0.0).to(tl.float32)
        dy = through_relu(dy, x, y_ptr, at, ok, mean, scale, bias, SHORTCUT, RELU)
        if SHORTCUT or TWO:
            kept = dy.to(kept_ptr.dtype.element_ty)
            tl.store(kept_ptr + at, kept, ok)
            dy = kept.to(tl.float32)
        sums += dy
        products += dy * (x - mean[None, :])
    out = part_ptr + (g * split + s) * C + cols
    tl.store(out, tl.sum(sums, 0), inside)
    tl.store(out + groups * split * C, tl.sum(products, 0) * inverse, inside)


@triton.jit(do_not_specialize=["groups"])
def merge_gradients(part_ptr, sums_ptr, groups, C, SPLIT: tl.constexpr, COLS: tl.constexpr):
    """The two sums of each slice, to sums (2, groups, C)."""
    cols = tl.program_id(0) * COLS + tl.arange(0, COLS)
    g = tl.program_id(1)
    inside = cols < C
    at = part_ptr + (g * SPLIT + tl.arange(0, SPLIT))[:, None] * C + cols[None, :]
    out = sums_ptr + g * C + cols
    tl.store(out, tl.sum(tl.load(at, inside[None, :], 0.0), 0), inside)
    tl.store(out + groups * C, tl.sum(tl.load(at + groups * SPLIT * C, inside[None, :], 0.0), 0), inside)


@triton.jit(do_not_specialize=SIZES)
def input_gradient(
    x_ptr,
    dy_ptr,
    dx_ptr,
    statistics_ptr,
    weight_ptr,
    bias_ptr,
    sums_ptr,
    dweight_ptr,
    dbias_ptr,
    images,
    groups,
    hw,
    C,
    split,
    MASKED: tl.constexpr,
    RELU: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """dx; one program of each block of channels also adds up the slices' sums: dweight and dbias.

    MASKED: dy is what `partial_gradients` kept.
    """
    cols = tl.program_id(0) * COLS + tl.arange(0, COLS)
    s = tl.program_id(1)
    g = tl.program_id(2)
    inside = cols < C
    start, rows = rows_of_part(images, groups, hw, g, s, split)
    lane = tl.arange(0, ROWS)
    tile = lane[:, None] * C + cols[None, :]
    if s + g == 0:
        sixteen = tl.arange(0, 16)
        dbias = tl.zeros((COLS,), tl.float32)
        dweight = tl.zeros((COLS,), tl.float32)
        for first in range(0, groups, 16):
            some = (first + sixteen < groups)[:, None] & inside[None, :]
            each = sums_ptr + (first + sixteen)[:, None] * C + cols[None, :]
            dbias += tl.sum(tl.load(each, some, 0.0), 0)
            dweight += tl.sum(tl.load(each + groups * C, some, 0.0), 0)
        tl.store(dbias_ptr + cols, dbias, inside)
        tl.store(dweight_ptr + cols, dweight, inside)
    mean = tl.load(statistics_ptr + g * C + cols, inside, 0.0)
    inverse = tl.load(statistics_ptr + (groups + g) * C + cols, inside, 0.0)
    scale = inverse * tl.load(weight_ptr + cols, inside, 0.0)
    bias = tl.load(bias_ptr + cols, inside, 0.0)
    small = images // groups
    n = ((small + (g < images % groups).to(tl.int32)) * hw).to(tl.float32)
    constant = tl.load(sums_ptr + g * C + cols, inside, 0.0) / n
    slope = tl.load(sums_ptr + (groups + g) * C + cols, inside, 0.0) / n * inverse
    tiles = tl.cdiv(rows, ROWS)
    for i in range(tiles):
        r = (tiles - 1 - i) * ROWS  # as in `apply`
        ok = (r + lane < rows)[:, None] & inside[None, :]
        at = (start + r) * C + tile
        x = tl.load(x_ptr + at, ok, 0.0).to(tl.float32)
        dy = tl.load(dy_ptr + at, ok, 0.0).to(tl.float32)
        if not MASKED:
            dy = through_relu(dy, x, x_ptr, at, ok, mean, scale, bias, False, RELU)
        dx = (dy - constant[None, :] - (x - mean[None, :]) * slope[None, :]) * scale[None, :]
        tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), ok)


# ---------------------------------------------------------------------------- operators

# (values of a tensor, channels of them) that a program has in hand, of 4 warps; measured on an H100.
FORWARD, BACKWARD = (2048, 64), (4096, 128)
PROGRAMS = 1024  # that a launch has at least, where there is work for so many: 8 on each of an H100's 132 SMs


@functools.cache
def blocks_of(
    images: int, groups: int, hw: int, channels: int, tile: tuple[int, int]
) -> tuple[int, int, int, int]:
    """(ROWS, COLS, split, COLS of the merging kernel), powers of two that depend on the shape alone."""
    values, most = tile
    cols = min(most, triton.next_power_of_2(channels))
    programs = triton.cdiv(channels, cols) * groups
    rows = images // groups * hw
    split = 1
    while programs * split < PROGRAMS and rows >= 4 * split * values // cols:
        split *= 2
    return values // cols, cols, split, max(1, min(cols, max(4, values // split)))


COMPILED: dict[tuple, object] = {}  # what triton made of a kernel for such arguments


def launch(
    kernel: triton.JITFunction,
    grid: tuple[int, int, int],
    tensors: tuple[Tensor, ...],
    numbers: tuple[int | float, ...],
    constants: tuple[int | bool, ...],
) -> None:
    """kernel[grid](...), but triton's search for what it has compiled, longer than a launch, only once."""
    key = (kernel, tensors[0].device, *(tensor.dtype for tensor in tensors), numbers, constants)
    compiled = COMPILED.get(key)
    aligned = all(tensor.data_ptr() % 16 == 0 for tensor in tensors)  # which triton compiles for, if it is so
    if compiled is None or not aligned:
        compiled = kernel[grid](*tensors, *numbers, *constants)
        if compiled is not None and aligned:  # the interpreter compiles nothing
            COMPILED[key] = compiled
    else:
        compiled[grid](*tensors, *numbers, *constants)


def _laid_out(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous(memory_format=torch.channels_last)


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
    """(y, statistics): y as x; float32 (2, groups, C) mean and 1 / std of each slice."""
    n, c, h, w = x.shape
    sizes = (n, groups, h * w, c)
    rows, cols, split, merged = blocks_of(*sizes, FORWARD)
    blocks = triton.cdiv(c, cols)
    x, shortcut = _laid_out(x), _laid_out(shortcut)
    y = torch.empty_like(x)
    statistics = x.new_empty(2, groups, c, dtype=torch.float32)
    part = x.new_empty(2, groups, split, c, dtype=torch.float32)
    with torch.cuda.device_of(x):
        launch(partial_statistics, (blocks, split, groups), (x, part), (*sizes, split), (rows, cols))
        launch(
            merge_statistics,
            (triton.cdiv(c, merged), groups, 1),
            (part, statistics, running_mean, running_var, running_mean if batches is None else batches),
            (*sizes, eps, momentum),
            (batches is not None, split, merged),
        )
        launch(
            apply,
            (blocks, split, groups),
            (x, x if shortcut is None else shortcut, y, statistics, weight, bias),
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
    """Gradients of x, shortcut (empty without one), weight and bias; dy2 is added to dy."""
    n, c, h, w = x.shape
    groups = statistics.shape[1]
    sizes = (n, groups, h * w, c)
    rows, cols, split, merged = blocks_of(*sizes, BACKWARD)
    blocks = triton.cdiv(c, cols)
    dy, dy2, x, y = (_laid_out(tensor) for tensor in (dy, dy2, x, y))
    keep = shortcut or dy2 is not None
    dx, kept = torch.empty_like(x), torch.empty_like(x) if keep else dy
    dweight, dbias = torch.empty_like(weight), torch.empty_like(bias)
    part = x.new_empty(2, groups, split, c, dtype=torch.float32)
    sums = x.new_empty(2, groups, c, dtype=torch.float32)
    with torch.cuda.device_of(x):
        launch(
            partial_gradients,
            (blocks, split, groups),
            (x, x if y is None else y, dy, dy if dy2 is None else dy2, kept, statistics, weight, bias, part),
            (*sizes, split),
            (shortcut, dy2 is not None, relu, rows, cols),
        )
        launch(
            merge_gradients,
            (triton.cdiv(c, merged), groups, 1),
            (part, sums),
            (groups, c),
            (split, merged),
        )
        launch(
            input_gradient,
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
    """The operators `resnext::norm_relu`, and the two that it is made of."""
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
    # Made of the other two: torch.library.register_autograd takes no operator that changes an argument.
    library.impl("norm_relu", _NormRelu.apply, "CompositeImplicitAutograd")
    for name, run, fake in (
        ("norm_forward", norm_forward, _fake_forward),
        ("norm_backward", norm_backward, _fake_backward),
    ):
        # Not for torch.compile to look into, should it come by outside of a graph.
        library.impl(name, torch.compiler.disable(run), "CompositeExplicitAutograd")
        torch.library.register_fake(f"resnext::{name}", fake, lib=library)
    return library


LIBRARY = _register()  # keep it: dropping it unregisters the operators

# relu(batch_norm(x) + shortcut) in training, twice: for the next convolution and the next shortcut. The two
# outputs share memory; each has a gradient of its own, which the backward pass adds up.
#   x: (N, C, H, W) in channels_last; bf16, fp16 or fp32. `shortcut` is the same, or None.
#   weight, bias, running_mean, running_var: float32 (C). The running ones follow the first slice.
#   batches: int64 scalar, counted up; None: left alone.
#   groups: slices of the batch with statistics of their own, at most N; 2 values per channel in each.
#   momentum: weight of the new statistics in the running ones.
norm_relu = torch.ops.resnext.norm_relu
