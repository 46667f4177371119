"""Confidence intervals, per-class counts, and confusions; numpy alone.

Every count is a sum over images, so the counts of parts of a dataset add up to those of the whole.
"""

from dataclasses import dataclass
from statistics import NormalDist

import numpy as np


def wilson_interval(count: int, images: int, confidence: float = 0.95) -> tuple[float, float]:
    """Return Wilson's score interval of a share, count / images: (low, high), in 0...1.

    Unlike the usual ± it holds for few images and for shares near 0 and 1.
    """
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    share, scale = count / images, 1 + z * z / images
    center = (share + z * z / (2 * images)) / scale
    margin = z * (share * (1 - share) / images + (z / (2 * images)) ** 2) ** 0.5 / scale
    return (0.0 if count == 0 else center - margin, 1.0 if count == images else center + margin)


@dataclass(frozen=True)
class ClassCounts:
    """Images per class, int64 (classes,)."""

    images: np.ndarray  # of the class
    predicted: np.ndarray  # predicted as the class
    top1: np.ndarray  # of the class and predicted as it
    top5: np.ndarray  # of the class, which is among the first five predictions


def per_class(labels: np.ndarray, top: np.ndarray, classes: int) -> ClassCounts:
    """Count per class; `labels` (N,), `top` (N, k) predicted classes, best first."""
    hits = top == labels[:, None]
    chosen = (labels, top[:, 0], labels[hits[:, 0]], labels[hits.any(1)])
    return ClassCounts(*(np.bincount(values, minlength=classes) for values in chosen))


def precision_recall_f1(counts: ClassCounts) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return (precision, recall, F1) with each class as the positive one, float64 in 0...1.

    If a class has images but is never predicted, its precision is 0 (scikit-learn's zero_division=0). If it
    has no images, recall and F1 are NaN, and so is precision if it is never predicted.
    """
    with np.errstate(invalid="ignore", divide="ignore"):
        precision = counts.top1 / counts.predicted
        recall = counts.top1 / counts.images
        f1 = 2 * counts.top1 / (counts.images + counts.predicted)
    empty = counts.images == 0
    precision[(counts.predicted == 0) & ~empty] = 0
    f1[empty] = np.nan
    return precision, recall, f1


def most_confused(labels: np.ndarray, predicted: np.ndarray, classes: int) -> list[tuple[int, int, int]]:
    """Return (true class, predicted class, images) of all errors, the most frequent first."""
    wrong = labels != predicted
    # Pairs instead of a matrix, which would have 25 million entries for 5,000 classes.
    pairs, counts = np.unique(labels[wrong] * classes + predicted[wrong], return_counts=True)
    order = np.argsort(-counts, kind="stable")
    pairs, counts = pairs[order], counts[order]
    return list(zip((pairs // classes).tolist(), (pairs % classes).tolist(), counts.tolist(), strict=True))
