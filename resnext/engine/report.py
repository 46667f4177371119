"""The results of an evaluation as plain values, as CSV and as text for people."""

import csv
import io
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from .evaluator import EvalResult, Predictions
from .metrics import most_confused, per_class, precision_recall_f1, wilson_interval

FEW_CLASSES = 20  # so many class folders are shown without being asked for
SHOWN_CLASSES, SHOWN_PAIRS = 20, 10

# ---------------------------------------------------------------------------- values


def score_row(score: EvalResult) -> dict[str, Any]:
    """Counts, errors in percent and their 95 % intervals."""

    def interval(errors: int) -> list[float]:
        return [100 * bound for bound in wilson_interval(errors, score.images)]

    return score.as_row() | {
        "top1_interval": interval(score.top1_errors),
        "top5_interval": interval(score.top5_errors),
    }


def class_rows(predictions: Predictions, classes: Sequence[str]) -> dict[str, Any]:
    """Each class, the average of those that have images, and all confusions; shares in percent."""
    counts = per_class(predictions.labels, predictions.top, len(classes))
    measures = 100 * np.stack(precision_recall_f1(counts))
    rows = []
    for i, name in enumerate(classes):
        images, top1, top5 = (int(n[i]) for n in (counts.images, counts.top1, counts.top5))
        split_batch = [None if math.isnan(share) else share for share in measures[:, i].tolist()]
        rows.append(
            {
                "class": name,
                "images": images,
                "predicted": int(counts.predicted[i]),
                "top1_errors": images - top1,
                "top5_errors": images - top5,
                "top1_error": 100 * (images - top1) / images if images else None,
                **dict(zip(("precision", "recall", "f1"), split_batch, strict=True)),
            }
        )
    average = measures[:, counts.images > 0].mean(1).tolist()
    pairs = most_confused(predictions.labels, predictions.top[:, 0], len(classes))
    return {
        "accuracy": 100 * int(counts.top1.sum()) / len(predictions.labels),
        "macro_average": dict(zip(("precision", "recall", "f1"), average, strict=True)),
        "per_class": rows,
        "confusions": [{"true": classes[a], "predicted": classes[b], "images": n} for a, b, n in pairs],
    }


def to_csv(key: str, names: Sequence[str], predictions: Predictions, classes: Sequence[str]) -> str:
    """A row for each image; `key` says what the names are."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    places = [f"top{place}" for place in range(1, predictions.top.shape[1] + 1)]
    writer.writerow([key, "label", *places, "confidence", "correct"])
    columns = (predictions.labels, predictions.top, predictions.confidence, predictions.right)
    for name, label, top, confidence, right in zip(names, *(c.tolist() for c in columns), strict=True):
        writer.writerow([name, classes[label], *(classes[c] for c in top), f"{confidence:.6f}", int(right)])
    return text.getvalue()


# ---------------------------------------------------------------------------- the console


def report(result: dict[str, Any], per_class: bool) -> str:
    """The results for people."""
    view = f"{result['image_size']} pixels"
    if result["pipeline"] != "memory":
        crops = "one crop" if result["crops"] == 1 else f"{result['crops']} crops"
        view = f"{crops} of {result['image_size']} from {result['resize']} pixels"
    scores = {"all": result} | result["splits"] if result["splits"] else {"": result}
    steps = "" if result["global_step"] is None else f" after {result['global_step']} steps"
    lines = [
        f"{result['checkpoint']}: {result['weights']}{steps}; {view}, {result['precision']}",
        *([result["preprocessing"]] if result["preprocessing"] else []),
        *aligned([[name, *score_cells(row, result["classes"])] for name, row in scores.items()], gap=" "),
        "errors in percent, [95 % interval]",
        *notes(result),
    ]
    if per_class or (result["dataset"] == "folder" and result["classes"] <= FEW_CLASSES):
        lines += ["", *class_table(result)]
    pairs = result["confusions"]
    if per_class and pairs:
        lines += ["", f"most confused, {min(SHOWN_PAIRS, len(pairs))} of {len(pairs):,} pairs:"]
        lines += [f"{pair['true']} -> {pair['predicted']}: {pair['images']}" for pair in pairs[:SHOWN_PAIRS]]
    return "\n".join(lines)


def aligned(rows: list[list[str]], gap: str = "  ") -> list[str]:
    """Rows as lines: the first column left, the others right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for first, *others in rows:
        cells = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        lines.append(gap.join([first.ljust(widths[0])] * (widths[0] > 0) + cells))
    return lines


def score_cells(row: dict[str, Any], classes: int) -> list[str]:
    """One space between them; those that begin a group have another."""
    cells = [f"{row['images']:,} images"]
    for name, title in (("top1", "top-1"), ("top5", f"top-{min(5, classes)}")):
        low, high = row[f"{name}_interval"]
        counts = f"({row[f'{name}_errors']}/{row['images']})"
        cells += [f" {title} error", f"{row[f'{name}_error']:.3f}", counts, f"[{low:.2f}, {high:.2f}]"]
    return [*cells, " loss", f"{math.nan if row['loss'] is None else row['loss']:.4f}"]


def notes(result: dict[str, Any]) -> list[str]:
    """What else one must know to read the numbers."""
    lines = []
    if result["classes_file"]:
        empty = sum(row["images"] == 0 for row in result["per_class"])
        lines.append(
            f"{result['classes_file']}: {result['classes']:,} of the network's {result['network_classes']:,} "
            f"classes compete, {empty:,} of them without images"
        )
    if result["images_in_no_split"]:
        lines.append(f"{result['splits_file']}: images in no split: {result['images_in_no_split']:,}")
    if result["unused_split_lines"]:
        lines.append(
            f"{result['splits_file']}: lines that name no scored image: {result['unused_split_lines']:,}"
        )
    return lines


def class_table(result: dict[str, Any]) -> list[str]:
    """The worst classes and the average of all."""
    present = [row for row in result["per_class"] if row["images"]]
    shown = sorted(present, key=lambda row: -row["top1_error"])[:SHOWN_CLASSES]
    average = result["macro_average"]

    def cells(name: str, images: int, errors: int, split_batch: dict[str, float]) -> list[str]:
        measures = [100 - split_batch["recall"], *(split_batch[key] for key in ("precision", "recall", "f1"))]
        return [name, f"{images:,}", f"{errors:,}", *(f"{measure:.2f}" for measure in measures)]

    table = [["class", "images", "errors", "top-1 error", "precision", "recall", "F1"]]
    table += [cells(row["class"], row["images"], row["top1_errors"], row) for row in shown]
    table += [cells("macro average", result["images"], result["top1_errors"], average)]
    head, *rows, last = aligned(table)
    hidden = len(present) - len(shown)
    rows += [f"and {hidden:,} more classes; --json FILE has them all"] * (hidden > 0)
    note = f"accuracy {result['accuracy']:.3f} %; each row takes its class as the positive one; worst first"
    return [head, *rows, last, note]
