"""BatchNorm over groups of images inside a batch, as the original's GPUs computed it.

The original cuts each batch into one contiguous slice a GPU; every slice has its own statistics
and the running statistics are those of the first GPU (DataParallelTable). `GroupBatchNorm2d`
does the same on one device, so that the number of GPUs no longer changes the result.
"""

import contextlib
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def slice_sizes(images: int, slices: int) -> list[int]:
    """Sizes of near-equal contiguous slices, the larger first: (83, 8) → 11 three times, 10 five."""
    small, larger = divmod(images, slices)
    return [small + 1] * larger + [small] * (slices - larger)


class GroupBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm2d whose training statistics are taken over `groups` near-equal slices of the batch.

    Input and output are (N, C, H, W); slices are contiguous in N and fewer than `groups` where
    N is smaller. Running statistics follow the first slice. Evaluation is plain BatchNorm.
    """

    def __init__(self, num_features: int, groups: int, eps: float = 1e-5, momentum: float = 0.1):
        super().__init__(num_features, eps, momentum)
        self.groups = groups

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.groups == 1:
            return super().forward(x)
        sizes = [size for size in slice_sizes(len(x), self.groups) if size]
        first, *others = x.split(sizes)
        normalised = [super().forward(first)]
        for part in others:
            normalised.append(F.batch_norm(part, None, None, self.weight, self.bias, True, 0.0, self.eps))
        return torch.cat(normalised)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, groups={self.groups}"


def use_group_batchnorm(model: nn.Module, groups: int) -> None:
    """Replace every BatchNorm2d of a model by GroupBatchNorm2d, keeping parameters and buffers."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.BatchNorm2d:
                grouped = GroupBatchNorm2d(child.num_features, groups, child.eps, child.momentum)
                grouped.weight, grouped.bias = child.weight, child.bias
                grouped.load_state_dict(child.state_dict())
                grouped.to(child.weight.device, child.weight.dtype)
                grouped.train(child.training)
                setattr(parent, name, grouped)


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
        norm.momentum, norm.num_batches_tracked = 0.0, norm.num_batches_tracked.clone()
    try:
        yield
    finally:
        for norm, (momentum, count) in zip(norms, before, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, count
