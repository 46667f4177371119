"""Triton kernels for ghost BatchNorm + shortcut + ReLU: three forward, three backward.

fused_norm.py launches them. Importing this module needs triton.

Tensors are (N, C, H, W) in channels_last: M = N·H·W rows of C values. Slice g (see
batch_plan.split_evenly) is a range of rows that each kernel computes itself, so a smaller last
batch needs no other kernel. A slice is cut into `split` parts, whose sums are added in an order
that depends on the shape only. There are no atomics: the same input gives the same bits. Sums
are float32.
"""

import triton
import triton.language as tl

SIZES = ["images", "groups", "hw", "split"]  # do not compile a kernel for each value of these


# ---------------------------------------------------------------------------- rows


@triton.jit
def rows_of_part(images, groups, hw, g, s, split):
    """Return the first row (int64) of part s of slice g, and its number of rows, which may be 0."""
    small = images // groups
    larger = images % groups
    start = (g * small + tl.minimum(g, larger)).to(tl.int64) * hw
    rows = (small + (g < larger).to(tl.int32)) * hw
    each = tl.cdiv(rows, split)
    first = tl.minimum(s * each, rows)
    return start + first, tl.minimum(each, rows - first)


@triton.jit
def normalized(x, mean, scale, bias):
    """Normalize x; both passes use this expression, so the backward pass sees the same sign."""
    return tl.fma(x - mean[None, :], scale[None, :], bias[None, :])


# ---------------------------------------------------------------------------- forward


@triton.jit(do_not_specialize=SIZES)
def partial_statistics(x_ptr, part_ptr, images, groups, hw, C, split, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Write the mean and the sum of squared deviations of a part to part (2, groups, split, C)."""
    cols = tl.program_id(0) * COLS + tl.arange(0, COLS)
    s = tl.program_id(1)
    g = tl.program_id(2)
    inside = cols < C
    start, rows = rows_of_part(images, groups, hw, g, s, split)
    lane = tl.arange(0, ROWS)
    tile = lane[:, None] * C + cols[None, :]
    # Subtract the part's first row, so that squares do not cancel if the mean is large.
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
    """Write the mean and 1 / sqrt(var + eps) of each slice to statistics (2, groups, C).

    Slice 0 updates the running statistics, and its first program counts the batch.
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
    """Write y = normalized x, + shortcut, then ReLU, to y."""
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
        r = (tiles - 1 - i) * ROWS  # last rows first: they are still in the cache
        ok = (r + lane < rows)[:, None] & inside[None, :]
        at = (start + r) * C + tile
        x = tl.load(x_ptr + at, ok, 0.0).to(tl.float32)
        y = normalized(x, mean, scale, bias)
        if SHORTCUT:
            y += tl.load(shortcut_ptr + at, ok, 0.0).to(tl.float32)
        if RELU:
            y = tl.where(y < 0.0, 0.0, y)  # keeps NaN
        tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), ok)


# ---------------------------------------------------------------------------- backward


@triton.jit
def through_relu(dy, x, y_ptr, at, ok, mean, scale, bias, SHORTCUT: tl.constexpr, RELU: tl.constexpr):
    """Return dy where ReLU was active: from the output if there is a shortcut, else recomputed from x."""
    if RELU:
        if SHORTCUT:  # noqa: SIM108 (a compile-time branch)
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
    """Write the sums of dy and of dy · (x - mean) / std of a part to part (2, groups, split, C).

    With a shortcut or two gradients, the gradient after ReLU is kept: it is the shortcut's gradient,
    and `input_gradient` needs it.
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
    """Write the two sums of each slice to sums (2, groups, C)."""
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
    """Write dx; one program per block of channels also adds the slices' sums to dweight and dbias.

    MASKED: dy is the gradient that `partial_gradients` kept.
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
            ok = (first + sixteen < groups)[:, None] & inside[None, :]
            each = sums_ptr + (first + sixteen)[:, None] * C + cols[None, :]
            dbias += tl.sum(tl.load(each, ok, 0.0), 0)
            dweight += tl.sum(tl.load(each + groups * C, ok, 0.0), 0)
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
        r = (tiles - 1 - i) * ROWS  # last rows first, as in `apply`
        ok = (r + lane < rows)[:, None] & inside[None, :]
        at = (start + r) * C + tile
        x = tl.load(x_ptr + at, ok, 0.0).to(tl.float32)
        dy = tl.load(dy_ptr + at, ok, 0.0).to(tl.float32)
        if not MASKED:
            dy = through_relu(dy, x, x_ptr, at, ok, mean, scale, bias, False, RELU)
        dx = (dy - constant[None, :] - (x - mean[None, :]) * slope[None, :]) * scale[None, :]
        tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), ok)
