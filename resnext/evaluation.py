"""Exact error counts: every image once, integers (train.lua, computeScore)."""

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Score:
    """Counts over a set of images; errors in percent, loss in nats per image."""

    images: int
    top1_errors: int
    top5_errors: int
    loss: float

    @property
    def top1_error(self) -> float:
        return 100.0 * self.top1_errors / self.images

    @property
    def top5_error(self) -> float:
        return 100.0 * self.top5_errors / self.images

    def as_row(self) -> dict[str, int | float]:
        """Plain numbers for a log row."""
        loss = self.loss if math.isfinite(self.loss) else None  # JSON knows no NaN
        errors = {"top1_error": self.top1_error, "top5_error": self.top5_error}
        return asdict(self) | errors | {"loss": loss}


def hits(output: Tensor, labels: Tensor) -> Tensor:
    """How many rows have their label first, and among the first min(5, classes): int64 (2,).

    `output` is (N, classes) raw scores, `labels` (N,) int64. Nothing is copied to the host.
    """
    first = output.topk(min(5, output.shape[1]), dim=1).indices
    right = first == labels[:, None]
    return torch.stack([right[:, 0].sum(), right.sum()])


def sum_crops(output: Tensor, crops: int) -> Tensor:
    """Raw scores of adjacent crops of an image added up: (N·crops, classes) → (N, classes)."""
    return output.unflatten(0, (-1, crops)).sum(1)


def evaluate(
    model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], autocast, should_stop=lambda: False
) -> Score | None:
    """Score of a model over batches of (images, labels); None when `should_stop` turned true.

    `autocast` is a function that makes the precision's context. The model is left in
    evaluation mode.
    """
    model.eval()
    images, totals = 0, None
    with torch.inference_mode():
        for inputs, labels in batches:
            if should_stop():
                return None
            with autocast():
                output = model(inputs)
            output = at_least_float32(output)
            loss = F.cross_entropy(output, labels, reduction="sum").double()
            counts = torch.cat([loss[None], hits(output, labels).double()])
            totals = counts if totals is None else totals + counts
            images += len(labels)
    loss, top1, top5 = totals.tolist()
    return Score(images, images - int(top1), images - int(top5), loss / images)


def at_least_float32(output: Tensor) -> Tensor:
    """Half-precision scores as float32; float32 and float64 as they are."""
    return output.to(torch.promote_types(output.dtype, torch.float32))
