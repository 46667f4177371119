"""Exact error counts: every image once, integers (train.lua, computeScore)."""

import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..distributed import all_gather_objects, sum_over_ranks

Row = dict[str, int | float | None]  # of metrics.jsonl


@dataclass(frozen=True)
class EvalResult:
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

    def as_row(self) -> Row:
        """Return plain numbers for a row of JSON, which has no NaN: such a loss is None."""
        errors = {"top1_error": self.top1_error, "top5_error": self.top5_error}
        return asdict(self) | errors | {"loss": self.loss if math.isfinite(self.loss) else None}


@dataclass(frozen=True)
class Predictions:
    """The prediction for each image, in the order of the dataset; the first axis is the image."""

    labels: np.ndarray  # int64 (N,)
    top: np.ndarray  # int64 (N, min(5, classes)): the predicted classes, best first
    confidence: np.ndarray  # float64 (N,): softmax probability of the first
    losses: np.ndarray  # float64 (N,)

    @property
    def correct(self) -> np.ndarray:
        """Whether the first predicted class is the label, bool (N,)."""
        return self.top[:, 0] == self.labels

    def with_label_sets(self, sets: Sequence[Sequence[int]]) -> "Predictions":
        """Return them for several right classes per image: its label is the one predicted best, or the first.

        Losses are NaN.
        """
        labels = self.labels.copy()
        for i, right in enumerate(sets):
            labels[i] = next((c for c in self.top[i].tolist() if c in right), right[0])
        return replace(self, labels=labels, losses=np.full(len(labels), np.nan))

    def score(self, chosen: np.ndarray | list[int]) -> EvalResult:
        """Count over the images with these indices."""
        images, labels = len(chosen), self.labels[chosen, None]
        top5 = int((self.top[chosen] == labels).sum())
        loss = float(self.losses[chosen].sum()) / images
        return EvalResult(images, images - int(self.correct[chosen].sum()), images - top5, loss)


class PredictionCollector:
    """Collects the prediction for each image; the small tensors stay on the device until the end."""

    def __init__(self) -> None:
        self.parts: list[tuple[Tensor, ...]] = []

    def add(self, output: Tensor, labels: Tensor, top: Tensor) -> None:
        """Add a batch: logits (N, classes), labels (N,), and the first classes (N, k)."""
        confidence = output.softmax(1).gather(1, top[:, :1])[:, 0]
        losses = F.cross_entropy(output, labels, reduction="none")
        self.parts.append((labels, top, confidence.double(), losses.double()))

    def predictions(self) -> Predictions:
        """Return those of all ranks on the host, in dataset order: see `evaluate`."""
        own = [torch.cat(part).cpu().numpy() for part in zip(*self.parts, strict=True)]
        ranks = [arrays for arrays in all_gather_objects(own) if arrays]
        merged = []
        for shares in zip(*ranks, strict=True):
            array = np.empty((sum(map(len, shares)), *shares[0].shape[1:]), shares[0].dtype)
            for number, share in enumerate(shares):
                array[number :: len(shares)] = share
            merged.append(array)
        return Predictions(*merged)


def top_classes(output: Tensor) -> Tensor:
    """Return the first min(5, classes) classes of logits (N, classes), best first: int64."""
    return output.topk(min(5, output.shape[1]), dim=1).indices


def count_correct(output: Tensor, labels: Tensor, top: Tensor | None = None) -> Tensor:
    """Count the rows whose label is first, and among the first min(5, classes): int64 (2,), on the device.

    `output` holds logits (N, classes), `labels` is int64 (N,), `top` is top_classes(output) if known.
    """
    hits = (top_classes(output) if top is None else top) == labels[:, None]
    return torch.stack([hits[:, 0].sum(), hits.sum()])


def sum_crops(output: Tensor, crops: int) -> Tensor:
    """Sum the logits of adjacent crops of an image: (N·crops, classes) → (N, classes)."""
    return output.unflatten(0, (-1, crops)).sum(1)


def promote_to_float32(output: Tensor) -> Tensor:
    """Return half-precision logits as float32; float32 and float64 stay."""
    return output.to(torch.promote_types(output.dtype, torch.float32))


def evaluate(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    autocast: Callable[[], AbstractContextManager],
    should_stop: Callable[[], bool] = lambda: False,
    *,
    layout: torch.memory_format = torch.preserve_format,
    crops: int = 1,
    columns: Tensor | None = None,
    recorder: PredictionCollector | None = None,
) -> EvalResult | None:
    """Count the errors of a model over batches of (images, labels); return None if `should_stop` said so.

    Rank r of R has the images r, r + R, …, and as many batches as the others, though the last may be
    empty; the counts are summed over the ranks. The model stays in evaluation mode and gets its images in
    memory format `layout`. The logits of the `crops` of an image, which are adjacent, are summed; loss and
    confidence are those of their mean. With `columns` (int64, on the device), only these outputs compete,
    and labels count among them. A `recorder` collects the prediction for each image.
    """
    model.eval()
    images, totals = 0, []
    with torch.inference_mode():
        for inputs, labels in batches:
            if should_stop():
                return None
            if not len(labels):
                continue
            with autocast():
                output = model(inputs.to(memory_format=layout))
            output = promote_to_float32(output)
            if columns is not None:
                output = output.index_select(1, columns)
            output = sum_crops(output, crops)
            top = top_classes(output)
            output = output / crops  # after the ranking: rounding could create ties
            loss = F.cross_entropy(output, labels, reduction="sum").double()
            totals.append(torch.cat([loss[None], count_correct(output, labels, top).double()]))
            images += len(labels)
            if recorder is not None:
                recorder.add(output, labels, top)
    own = torch.stack(totals).sum(0).tolist() if totals else [0.0, 0.0, 0.0]
    loss, top1, top5, images = sum_over_ranks(torch.tensor([*own, images], dtype=torch.float64)).tolist()
    return EvalResult(int(images), int(images - top1), int(images - top5), loss / images)
