"""BatchNorm over groups of images inside a batch, as the original's GPUs computed it.

The original cuts each batch into one contiguous slice a GPU; every slice has its own statistics
and the running statistics are those of the first GPU (DataParallelTable). `GroupBatchNorm2d`
does the same on one device, so that the number of GPUs no longer changes the result.
"""

import contextlib
import warnings
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..batch_plan import split_evenly


def _relu(x: Tensor) -> Tensor:
    return F.relu(x, inplace=True)


class GhostBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm2d whose training statistics are taken over `groups` near-equal slices of the batch.

    Input and output are (N, C, H, W); slices are contiguous in N and fewer than `groups` where
    N is smaller. Running statistics follow the first slice. Evaluation is plain BatchNorm. With
    `fused`, training on CUDA in channels_last runs in the kernels of kernels.py.
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
        """See kernels.norm_relu."""
        from .kernels import norm_relu  # not at the top: it needs triton

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
    """relu(norm(x) + shortcut), twice: for the next convolution and the next shortcut.

    Where `norm` has kernels one operator does it all; then each of the two outputs has a gradient of its
    own, which the backward pass adds up. Elsewhere they are one tensor.
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


def _has_kernel(norm: nn.Module, x: Tensor) -> bool:
    """Whether kernels.norm_relu can do what this module does to x; if not, torch's own kernels do."""
    if not (type(norm) is GhostBatchNorm2d and norm.fused and norm.training and on_gpu(x) and x.dim() == 4):
        return False
    n, c, h, w = x.shape
    return (
        n > 0
        and c == norm.num_features
        and max(1, n // norm.groups) * h * w > 1  # torch has an error for a single value
        and x.dtype in (torch.bfloat16, torch.float16, torch.float32)
        and x.is_contiguous(memory_format=torch.channels_last)
        and norm.weight.dtype == norm.running_mean.dtype == torch.float32
    )


def on_gpu(x: Tensor) -> bool:
    return x.is_cuda


def kernels_work(device: torch.device) -> bool:
    """Whether kernels.py runs on a device: a GPU since Ampere, triton, and a C compiler for it."""
    if device.type != "cuda" or torch.cuda.get_device_properties(device).major < 8:
        return False
    try:
        import triton

        triton.runtime.driver.active.utils  # noqa: B018 (compiles its way to the driver)
    except Exception as error:  # of many kinds, and all mean the same
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        warnings.warn(
            f"BatchNorm runs in torch's own kernels, and a step takes up to 1.4 times as long: triton does "
            f"not work here ({reason}); install triton, gcc and the headers of Python (python3-dev)",
            stacklevel=2,
        )
        return False
    return True


def use_ghost_batchnorm(model: nn.Module, groups: int, fused: bool = False) -> None:
    """Make every BatchNorm2d of a model a GroupBatchNorm2d; parameters, buffers and hooks stay."""
    for module in model.modules():
        if type(module) in (nn.BatchNorm2d, GhostBatchNorm2d):
            module.__class__ = GhostBatchNorm2d
            module.groups, module.fused = groups, fused


@contextlib.contextmanager
def frozen_running_statistics(model: nn.Module) -> Iterator[None]:
    """Inside, training-mode BatchNorm uses batch statistics but leaves the running ones alone.

    For the later parts of an accumulated batch and for recomputation in the backward pass, which
    must not count an image twice.
    """
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    before = [(m.momentum, m.num_batches_tracked) for m in norms]
    for norm in norms:
        # Momentum 0 rather than no buffers at all: the same tensors must be saved for backward.
        norm.momentum = 0.0
        # SyncBatchNorm insists on a counter.
        norm.num_batches_tracked = (
            None if isinstance(norm, nn.BatchNorm2d) else norm.num_batches_tracked.clone()
        )
    try:
        yield
    finally:
        for norm, (momentum, count) in zip(norms, before, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, count
