"""The size and cost of a network."""

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode


def complexity(model: nn.Module, image_size: int) -> tuple[int, int]:
    """Return (parameters, multiply-adds of convolutions and linear layers for one square image)."""
    counter = FlopCounterMode(display=False)
    like = next(model.parameters())
    training = model.training
    model.eval()
    with torch.no_grad(), counter:
        model(torch.empty(1, 3, image_size, image_size, device=like.device, dtype=like.dtype))
    model.train(training)
    return sum(p.numel() for p in model.parameters()), counter.get_total_flops() // 2
