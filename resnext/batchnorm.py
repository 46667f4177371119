"""BatchNorm over groups of images inside a batch, as the original's GPUs computed it.

The original cuts each batch into one contiguous slice a GPU; every slice has its own statistics
and the running statistics are those of the first GPU (DataParallelTable). `GroupBatchNorm2d`
does the same on one device, so that the number of GPUs no longer changes the result.
"""

import contextlib
import importlib.util
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

TRITON = importlib.util.find_spec("triton") is not None


def slice_sizes(images: int, slices: int) -> list[int]:
    """Sizes of near-equal contiguous slices, the larger first: (83, 8) → 11 three times, 10 five."""
    small, larger = divmod(images, slices)
    return [small + 1] * larger + [small] * (slices - larger)


def _relu(x: Tensor) -> Tensor:
    return F.relu(x, inplace=True)


class GroupBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm2d whose training statistics are taken over `groups` near-equal slices of the batch.

    Input and output are (N, C, H, W); slices are contiguous in N and fewer than `groups` where
    N is smaller. Running statistics follow the first slice. Evaluation is plain BatchNorm.
    """

    def __init__(self, num_features: int, groups: int = 1, eps: float = 1e-5, momentum: float = 0.1):
        super().__init__(num_features, eps, momentum)
        self.groups = groups

    def forward(self, x: Tensor) -> Tensor:
        if _has_kernel(self, x):
            return self.fused(x, None, relu=False)[0]
        if not self.training or self.groups == 1:
            return super().forward(x)
        sizes = [size for size in slice_sizes(len(x), self.groups) if size]
        first, *others = x.split(sizes)
        normalised = [super().forward(first)]
        for part in others:
            normalised.append(F.batch_norm(part, None, None, self.weight, self.bias, True, 0.0, self.eps))
        return torch.cat(normalised)

    def fused(self, x: Tensor, shortcut: Tensor | None, relu: bool) -> tuple[Tensor, Tensor]:
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

    `norm` may be any module, and `relu` another activation. In training on a GPU one operator does it all;
    then each of the two outputs has a gradient of its own, which the backward pass adds up. Elsewhere they
    are one tensor.
    """
    if _has_kernel(norm, x) and not has_hooks(norm):
        is_relu = relu is _relu or (type(relu) is nn.ReLU and not has_hooks(relu))
        if is_relu and (shortcut is None or (shortcut.shape == x.shape and shortcut.dtype == x.dtype)):
            return norm.fused(x, shortcut, relu=True)
    y = norm(x)
    y = relu(y if shortcut is None else y + shortcut)
    return y, y


def has_hooks(module: nn.Module) -> bool:
    """Whether someone listens to what goes into a module and comes out of it."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def _has_kernel(norm: nn.Module, x: Tensor) -> bool:
    """Whether kernels.norm_relu can do what this module does to x; if not, torch's own kernels do."""
    if not (type(norm) is GroupBatchNorm2d and norm.training and on_gpu(x) and x.dim() == 4):
        return False
    n, c, h, w = x.shape
    return (
        n > 0
        and c == norm.num_features
        and max(1, n // norm.groups) * h * w > 1  # torch has an error for a single value
        and x.dtype in (torch.bfloat16, torch.float16, torch.float32)
        and x.is_contiguous(memory_format=torch.channels_last)
        and norm.weight is not None
        and norm.weight.dtype == torch.float32
        and norm.running_mean is not None
        and norm.momentum is not None
    )


def on_gpu(x: Tensor) -> bool:
    """Whether a tensor is where the kernels run."""
    return TRITON and x.is_cuda and torch.cuda.get_device_properties(x.device).major >= 8


def use_group_batchnorm(model: nn.Module, groups: int) -> None:
    """Let every GroupBatchNorm2d of a model cut its batches into so many slices."""
    for module in model.modules():
        if isinstance(module, GroupBatchNorm2d):
            module.groups = groups


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
