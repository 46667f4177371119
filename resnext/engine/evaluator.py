"""Exact error counts: every image once, integers (train.lua, computeScore)."""

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..distributed import all_gather_objects, sum_over_ranks


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

    def as_row(self) -> dict[str, int | float]:
        """Plain numbers for a log row."""
        loss = self.loss if math.isfinite(self.loss) else None  # JSON knows no NaN
        errors = {"top1_error": self.top1_error, "top5_error": self.top5_error}
        return asdict(self) | errors | {"loss": loss}


@dataclass(frozen=True)
class Predictions:
    """What became of each image, in the order of the batches; the first axis is the image."""

    labels: np.ndarray  # int64 (N,)
    top: np.ndarray  # int64 (N, min(5, classes)): the predicted classes, best first
    confidence: np.ndarray  # float64 (N,): probability (softmax) of the first
    losses: np.ndarray  # float64 (N,)

    @property
    def right(self) -> np.ndarray:
        """Whether the first is the label, bool (N,)."""
        return self.top[:, 0] == self.labels

    def score(self, chosen: np.ndarray) -> EvalResult:
        """Score of some of the images, by their numbers."""
        images, labels = len(chosen), self.labels[chosen, None]
        top5 = int((self.top[chosen] == labels).sum())
        loss = float(self.losses[chosen].sum()) / images
        return EvalResult(images, images - int(self.right[chosen].sum()), images - top5, loss)


class PredictionCollector:
    """Collects what becomes of each image; the small tensors stay on the device until the end."""

    def __init__(self):
        self.parts: list[tuple[Tensor, ...]] = []

    def add(self, output: Tensor, labels: Tensor, top: Tensor) -> None:
        """A batch: scores (N, classes), labels (N,) and the first classes (N, k)."""
        confidence = output.softmax(1).gather(1, top[:, :1])[:, 0]
        losses = F.cross_entropy(output, labels, reduction="none")
        self.parts.append((labels, top, confidence.double(), losses.double()))

    def predictions(self) -> Predictions:
        """Those of all processes, on the host, in the order of the images: see `evaluate`."""
        own = [torch.cat(part).cpu().numpy() for part in zip(*self.parts, strict=True)]
        split_batch = [arrays for arrays in all_gather_objects(own) if arrays]
        together = []
        for parts in zip(*split_batch, strict=True):
            array = np.empty((sum(map(len, parts)), *parts[0].shape[1:]), parts[0].dtype)
            for number, part in enumerate(parts):
                array[number :: len(parts)] = part
            together.append(array)
        return Predictions(*together)


def top_classes(output: Tensor) -> Tensor:
    """The first min(5, classes) classes of raw scores (N, classes), best first: int64."""
    return output.topk(min(5, output.shape[1]), dim=1).indices


def count_correct_at(top: Tensor, labels: Tensor) -> Tensor:
    """How many rows of `top` have their label first, and anywhere: int64 (2,)."""
    right = top == labels[:, None]
    return torch.stack([right[:, 0].sum(), right.sum()])


def count_correct(output: Tensor, labels: Tensor) -> Tensor:
    """How many rows have their label first, and among the first min(5, classes): int64 (2,).

    `output` is (N, classes) raw scores, `labels` (N,) int64. Nothing is copied to the host.
    """
    return count_correct_at(top_classes(output), labels)


def sum_crops(output: Tensor, crops: int) -> Tensor:
    """Raw scores of adjacent crops of an image added up: (N·crops, classes) → (N, classes)."""
    return output.unflatten(0, (-1, crops)).sum(1)


def evaluate(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    autocast,
    should_stop=lambda: False,
    *,
    layout: torch.memory_format = torch.preserve_format,
    crops: int = 1,
    columns: Tensor | None = None,
    recorder: PredictionCollector | None = None,
) -> EvalResult | None:
    """Score of a model over batches of (images, labels); None when `should_stop` turned true.

    Of several processes each has every so-many-th image, and as many batches as the others, though the
    last may be empty; their integers are added up.
    `autocast` is a function that makes the precision's context, `layout` the memory layout that the model
    gets images in. The model is left in evaluation mode. Of several `crops` of an image, which are
    adjacent, the raw scores are added up; loss and confidence are those of their mean. With `columns`,
    int64 on the device, only these outputs compete, and labels count among them. A `recorder` gets what
    becomes of each image.
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
            output = output / crops  # after the ranking: rounding could make ties
            loss = F.cross_entropy(output, labels, reduction="sum").double()
            totals.append(torch.cat([loss[None], count_correct_at(top, labels).double()]))
            images += len(labels)
            if recorder is not None:
                recorder.add(output, labels, top)
    own = torch.stack(totals).sum(0).tolist() if totals else [0.0, 0.0, 0.0]
    loss, top1, top5, images = sum_over_ranks(torch.tensor([*own, images], dtype=torch.float64)).tolist()
    return EvalResult(int(images), int(images - top1), int(images - top5), loss / images)


def promote_to_float32(output: Tensor) -> Tensor:
    """Half-precision scores as float32; float32 and float64 as they are."""
    return output.to(torch.promote_types(output.dtype, torch.float32))
