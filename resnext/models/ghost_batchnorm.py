"""Ghost BatchNorm: statistics over groups of images within a batch, as on the original's GPUs.

The original cuts each batch into one contiguous slice per GPU. Each slice has its own statistics,
and the running statistics are those of the first GPU (DataParallelTable). `GhostBatchNorm2d`
does the same on one device, so the number of GPUs does not change the result.
"""

import contextlib
import warnings
from collections.abc import Callable, Iterator
from typing import TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..batch_plan import split_evenly


def _relu(x: Tensor) -> Tensor:
    return F.relu(x, inplace=True)


class GhostBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm2d with training statistics over each of `groups` near-equal slices of the batch.

    Input and output are (N, C, H, W). Slices are contiguous in N; there are min(groups, N) of them.
    The first slice updates the running statistics. Evaluation is plain BatchNorm. With `fused`,
    training on CUDA in channels_last runs the kernels of kernels.py.
    """

    def __init__(self, num_features: int, groups: int = 1, fused: bool = False):
        super().__init__(num_features)
        self.groups, self.fused = groups, fused

    def forward(self, x: Tensor) -> Tensor:
        if _has_kernel(self, x):
            return self.run_kernels(x, None, relu=False)[0]
        if not self.training or self.groups == 1:
            return super().forward(x)
        sizes = [size for size in split_evenly(len(x), self.groups) if size]
        first, *others = x.split(sizes)
        normalized = [super().forward(first)]
        for part in others:
            normalized.append(F.batch_norm(part, None, None, self.weight, self.bias, True, 0.0, self.eps))
        return torch.cat(normalized)

    def run_kernels(self, x: Tensor, shortcut: Tensor | None, relu: bool) -> tuple[Tensor, Tensor]:
        """Return what fused_norm.norm_relu returns."""
        from .fused_norm import norm_relu  # optional: it needs triton

        return norm_relu(
            x,
            shortcut,
            self.weight,
            self.bias,
            self.running_mean,
            self.running_var,
            self.num_batches_tracked,
            min(self.groups, len(x)),
            self.momentum,
            self.eps,
            relu,
        )

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, groups={self.groups}"


def norm_relu(
    norm: nn.Module, x: Tensor, shortcut: Tensor | None = None, relu: Callable[[Tensor], Tensor] = _relu
) -> tuple[Tensor, Tensor]:
    """Return relu(norm(x) + shortcut) twice: for the next convolution and the next shortcut.

    If `norm` has kernels, one operator does all of it, and its backward pass adds the gradients of the
    two outputs. Otherwise both outputs are the same tensor.
    """
    if (
        _has_kernel(norm, x)
        and (relu is _relu or type(relu) is nn.ReLU)
        and (shortcut is None or (shortcut.shape == x.shape and shortcut.dtype == x.dtype))
    ):
        return norm.run_kernels(x, shortcut, relu=True)
    y = norm(x)
    y = relu(y if shortcut is None else y + shortcut)
    return y, y


def _has_kernel(norm: nn.Module, x: Tensor) -> TypeGuard[GhostBatchNorm2d]:
    """Return whether fused_norm.norm_relu can replace this module for the input x."""
    if not (type(norm) is GhostBatchNorm2d and norm.fused and norm.training and on_gpu(x) and x.dim() == 4):
        return False
    n, c, h, w = x.shape
    return (
        n > 0
        and c == norm.num_features
        and max(1, n // norm.groups) * h * w > 1  # torch raises an error for a single value
        and x.dtype in (torch.bfloat16, torch.float16, torch.float32)
        and x.is_contiguous(memory_format=torch.channels_last)
        and norm.running_mean is not None
        and norm.weight.dtype == norm.running_mean.dtype == torch.float32
    )


def on_gpu(x: Tensor) -> bool:
    return x.is_cuda


def kernels_work(device: torch.device) -> bool:
    """Return whether kernels.py runs on a device: this needs Ampere or newer, triton, and a C compiler."""
    if device.type != "cuda" or torch.cuda.get_device_properties(device).major < 8:
        return False
    try:
        import triton

        triton.runtime.driver.active.utils  # noqa: B018 (loads the driver, which compiles)
    except Exception as error:  # triton raises many types; all mean that it does not work
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        warnings.warn(
            f"triton does not work here ({reason}), so BatchNorm uses torch's kernels and a step takes up to "
            "1.4x as long; install triton, gcc and Python's headers (python3-dev)",
            stacklevel=2,
        )
        return False
    return True


def use_ghost_batchnorm(model: nn.Module, groups: int, fused: bool = False) -> None:
    """Turn every BatchNorm2d of a model into a GhostBatchNorm2d; parameters, buffers and hooks stay."""
    for module in model.modules():
        if type(module) is nn.BatchNorm2d:
            module.__class__ = GhostBatchNorm2d
        if isinstance(module, GhostBatchNorm2d):
            module.groups, module.fused = groups, fused


@contextlib.contextmanager
def frozen_running_statistics(model: nn.Module) -> Iterator[None]:
    """Keep training-mode BatchNorm from updating its running statistics inside the context.

    Later micro-batches and recomputation in the backward pass need this: no image may count twice.
    """
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    before = [(m.momentum, m.num_batches_tracked) for m in norms]
    for norm in norms:
        # Momentum 0, not missing buffers: the same tensors must be saved for the backward pass.
        norm.momentum = 0.0
        # SyncBatchNorm needs a counter.
        count = norm.num_batches_tracked
        is_sync = isinstance(norm, nn.SyncBatchNorm)
        norm.num_batches_tracked = count.clone() if is_sync and count is not None else None
    try:
        yield
    finally:
        for norm, (momentum, count) in zip(norms, before, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, count
