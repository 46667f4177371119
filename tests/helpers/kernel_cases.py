"""Compare fused_norm.norm_relu on any device with float64 BatchNorm of each slice."""

from typing import NamedTuple

import torch
import torch.nn.functional as F

from resnext.batch_plan import split_evenly

TOLERANCE = {torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}  # of the largest value


class Case(NamedTuple):
    shape: tuple[int, int, int, int]
    groups: int = 1
    dtype: torch.dtype = torch.float32
    shortcut: bool = False
    relu: bool = True
    gradients: str = "first"  # of the outputs: first, second or both
    offset: float = 0.0
    momentum: float = 0.1


SMALL = (
    Case((8, 64, 6, 6)),
    Case((8, 64, 6, 6), relu=False),
    Case((8, 64, 6, 6), shortcut=True, gradients="both"),
    Case((8, 64, 6, 6), shortcut=True, relu=False, gradients="second"),
    Case((5, 72, 9, 9), groups=2, gradients="both"),  # slices of 3 and 2 images, blocks of 64 and 8 channels
    Case((7, 64, 3, 5), groups=4, shortcut=True),
    Case((18, 4, 3, 2), groups=18, shortcut=True, gradients="both"),  # one image each
    Case((4, 1, 3, 3), groups=2),
    Case((4, 3, 3, 3), groups=3, shortcut=True),
    Case((5, 33, 8, 8), offset=1000.0),
    Case((6, 64, 4, 4), groups=2, shortcut=True, offset=1000.0),
    Case((6, 64, 4, 4), groups=2, momentum=0.0),
    Case((6, 64, 5, 5), groups=2, dtype=torch.bfloat16),
    Case((6, 64, 5, 5), groups=2, dtype=torch.bfloat16, shortcut=True, gradients="both"),
    Case((6, 64, 5, 5), groups=2, dtype=torch.float16, shortcut=True, gradients="both"),
    Case((6, 40, 5, 5), groups=2, dtype=torch.float16, relu=False),
    Case((2, 2048, 2, 1), shortcut=True),
)
LARGE = tuple(
    Case(shape, groups, dtype, shortcut, gradients="both" if shortcut else "first")
    for shape, groups in (
        ((256, 64, 28, 28), 1),
        ((83, 128, 28, 28), 8),
        ((256, 2048, 7, 7), 8),
        ((64, 1000, 7, 7), 2),
    )
    for dtype in (torch.float32, torch.bfloat16, torch.float16)
    for shortcut in (False, True)
)


def results(case: Case, device: str) -> tuple[dict, dict]:
    """Return the kernels' outputs, gradients, and running statistics, and those of float64."""
    from resnext.models.fused_norm import norm_relu  # needs triton

    generator = torch.Generator().manual_seed(1)
    n, c, _, _ = case.shape

    def draw(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator)

    inputs = {"x": (draw(*case.shape) + case.offset).to(case.dtype)}
    if case.shortcut:
        inputs["shortcut"] = draw(*case.shape).to(case.dtype)
    inputs |= {"weight": 1 + 0.3 * draw(c), "bias": draw(c)}
    gradients = [
        draw(*case.shape).to(case.dtype) if case.gradients in (output, "both") else None
        for output in ("first", "second")
    ]
    running = {"running_mean": draw(c) + case.offset, "running_var": 1 + draw(c).square()}

    exact = {k: v.to(device).double().requires_grad_() for k, v in inputs.items()}
    exact_running = {k: v.to(device).double() for k, v in running.items()}
    first, *others = exact["x"].split([size for size in split_evenly(n, case.groups) if size])
    affine = (exact["weight"], exact["bias"], True)
    parts = [F.batch_norm(first, *exact_running.values(), *affine, case.momentum)]
    parts += [F.batch_norm(part, None, None, *affine) for part in others]
    z = torch.cat(parts) + (exact["shortcut"] if case.shortcut else 0)
    y = z.relu() if case.relu else z
    # At ReLU's kink, rounding decides the gradient: those gradients are 0 here.
    away = (z.detach().abs() > 1e-3) if case.relu else torch.ones_like(z, dtype=torch.bool)
    gradients = [None if g is None else (g.to(device) * away) for g in gradients]
    y.backward(sum(g.double() for g in gradients if g is not None))
    exact_results = {"y": y.detach()} | {k: v.grad for k, v in exact.items()} | exact_running

    given = {k: v.to(device) for k, v in inputs.items()}
    for key in given.keys() & {"x", "shortcut"}:
        given[key] = given[key].contiguous(memory_format=torch.channels_last)
    given = {k: v.requires_grad_() for k, v in given.items()}
    own = {k: v.to(device) for k, v in running.items()}
    batches = torch.tensor(6, device=device)
    options = (*own.values(), batches, case.groups, case.momentum, 1e-5, case.relu)
    outputs = norm_relu(given["x"], given.get("shortcut"), given["weight"], given["bias"], *options)
    assert torch.equal(*outputs) and outputs[0].dtype == case.dtype
    assert outputs[0].is_contiguous(memory_format=torch.channels_last) and batches == 7
    used = [(y, g) for y, g in zip(outputs, gradients, strict=True) if g is not None]
    torch.autograd.backward(*zip(*used, strict=True))
    return {"y": outputs[0].detach()} | {k: v.grad for k, v in given.items()} | own, exact_results


def check(case: Case, device: str) -> None:
    """Compare relative to the largest value; a mean of 1000 leaves fewer digits for the deviations."""
    ours, exact = results(case, device)
    assert ours.keys() == exact.keys()
    for key, value in exact.items():
        assert ours[key].dtype == (case.dtype if key in ("y", "x", "shortcut") else torch.float32)
        found = (ours[key].double() - value).abs().max() / value.abs().max()
        running = key.startswith("running")
        tolerance = 1e-6 if running else TOLERANCE[case.dtype] * (10 if case.offset else 1)
        assert found < tolerance, f"{key}: {found:.1e}"
