"""The results of an evaluation as plain values for JSON, as CSV, and as text."""

import csv
import io
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from ..config import IMAGE_FILES, network_name
from ..weights.load import WeightsInfo, preprocessing
from .evaluator import EvalResult, Predictions
from .inference import InferenceNetwork
from .metrics import most_confused, per_class, precision_recall_f1, wilson_interval

FEW_CLASSES = 20  # up to this many class folders get a table without --per-class
SHOWN_CLASSES, SHOWN_PAIRS = 20, 10
DATA_KEYS = ("dataset", "pipeline", "interpolation", "mean", "std", "image_size", "resize", "val_list")
SHARES = ("precision", "recall", "f1")

Row = dict[str, Any]  # a JSON object

# ---------------------------------------------------------------------------- values


def score_row(score: EvalResult) -> Row:
    """Return counts, errors in percent, and their 95% intervals."""
    row: Row = {**score.as_row()}
    for name in ("top1", "top5"):
        bounds = wilson_interval(getattr(score, f"{name}_errors"), score.images)
        row[f"{name}_interval"] = [100 * bound for bound in bounds]
    return row


def class_rows(predictions: Predictions, classes: Sequence[str]) -> Row:
    """Return each class, the average of those that have images, and all confusions; shares in percent."""
    counts = per_class(predictions.labels, predictions.top, len(classes))
    shares = 100 * np.stack(precision_recall_f1(counts))
    rows = []
    for i, name in enumerate(classes):
        images, top1, top5 = (int(n[i]) for n in (counts.images, counts.top1, counts.top5))
        row = {
            "class": name,
            "images": images,
            "predicted": int(counts.predicted[i]),
            "top1_errors": images - top1,
            "top5_errors": images - top5,
            "top1_error": 100 * (images - top1) / images if images else None,
        }
        for key, share in zip(SHARES, shares[:, i].tolist(), strict=True):
            row[key] = None if math.isnan(share) else share
        rows.append(row)
    average = shares[:, counts.images > 0].mean(1).tolist()
    pairs = most_confused(predictions.labels, predictions.top[:, 0], len(classes))
    return {
        "accuracy": 100 * int(counts.top1.sum()) / len(predictions.labels),
        "macro_average": dict(zip(SHARES, average, strict=True)),
        "per_class": rows,
        "confusions": [{"true": classes[a], "predicted": classes[b], "images": n} for a, b, n in pairs],
    }


def result_row(
    info: WeightsInfo,
    network: InferenceNetwork,
    crops: int,
    classes: Sequence[str],
    classes_file: str | None,
    score: EvalResult,
    predictions: Predictions,
) -> Row:
    """Return all results but those of splits; `info.config.data` is what was evaluated."""
    data = info.config.data
    return {
        "checkpoint": info.file,
        "origin": info.origin,
        "network": network_name(info.config.model),
        "preprocessing": None if info.origin == "this program" else preprocessing(info),
        "weights": info.weights,
        "global_step": info.steps,
        **score_row(score),
        "data": data.dir,
        **{key: getattr(data, key) for key in DATA_KEYS},
        "crops": crops,
        "precision": network.precision,
        "device": network.device.type,
        "classes": len(classes),
        "network_classes": info.outputs,
        "classes_file": classes_file,
        **class_rows(predictions, classes),
    }


def split_rows(
    file: str | None, lines: Sequence[object], members: dict[str, list[int]], predictions: Predictions
) -> Row:
    """Return the results per split; `members` maps a split to its images, `lines` are those of the file."""
    outside = len(predictions.labels) - len(set().union(*members.values()))
    unused = len(lines) - sum(map(len, members.values()))
    return {
        "splits_file": file,
        "splits": {split: score_row(predictions.score(images)) for split, images in members.items()},
        "images_in_no_split": outside if file else None,
        "unused_split_lines": unused if file else None,
    }


def to_csv(key: str, names: Sequence[str], predictions: Predictions, classes: Sequence[str]) -> str:
    """Return a row for each image; `key` is the header of the images' names."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    places = [f"top{place}" for place in range(1, predictions.top.shape[1] + 1)]
    writer.writerow([key, "label", *places, "confidence", "correct"])
    columns = (predictions.labels, predictions.top, predictions.confidence, predictions.correct)
    for name, label, top, confidence, hit in zip(names, *(c.tolist() for c in columns), strict=True):
        writer.writerow([name, classes[label], *(classes[c] for c in top), f"{confidence:.6f}", int(hit)])
    return text.getvalue()


# ---------------------------------------------------------------------------- text


def report(result: Row, per_class: bool) -> str:
    """Return the console text of a result; `per_class` asks for the table of classes."""
    view = f"{result['image_size']} pixels"
    if result["pipeline"] != "memory":
        crops = "one crop" if result["crops"] == 1 else f"{result['crops']} crops"
        view = f"{crops} of {result['image_size']} from {result['resize']} pixels"
    scores = {"all": result} | result["splits"] if result["splits"] else {"": result}
    steps = "" if result["global_step"] is None else f" after {result['global_step']} steps"
    lines = [
        f"{result['checkpoint']}: {result['weights']}{steps}; {view}, {result['precision']}",
        *([result["preprocessing"]] if result["preprocessing"] else []),
        *aligned([[name, *score_cells(row, result)] for name, row in scores.items()], gap=" "),
        "errors in percent, [95% interval]",
        *footnotes(result),
    ]
    if per_class or (result["dataset"] in IMAGE_FILES and result["classes"] <= FEW_CLASSES):
        lines += ["", *class_table(result)]
    pairs = result["confusions"]
    if per_class and pairs:
        lines += ["", f"most confused, {min(SHOWN_PAIRS, len(pairs))} of {len(pairs):,} pairs:"]
        lines += [f"{pair['true']} -> {pair['predicted']}: {pair['images']}" for pair in pairs[:SHOWN_PAIRS]]
    return "\n".join(lines)


def aligned(rows: list[list[str]], gap: str = "  ") -> list[str]:
    """Return rows as lines: the first column left-aligned, the others right-aligned."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for first, *others in rows:
        cells = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        lines.append(gap.join([first.ljust(widths[0])] * (widths[0] > 0) + cells))
    return lines


def score_cells(row: Row, result: Row) -> list[str]:
    """Return the cells of a score; one that begins a group has a leading space."""
    cells = [f"{row['images']:,} images"]
    for name, title in (("top1", "top-1"), ("top5", f"top-{min(5, result['classes'])}")):
        low, high = row[f"{name}_interval"]
        counts = f"({row[f'{name}_errors']}/{row['images']})"
        cells += [f" {title} error", f"{row[f'{name}_error']:.3f}", counts, f"[{low:.2f}, {high:.2f}]"]
    if result["real_labels"]:  # there is none
        return cells
    return [*cells, " loss", f"{math.nan if row['loss'] is None else row['loss']:.4f}"]


def footnotes(result: Row) -> list[str]:
    """Return notes on the classes and splits that were scored."""
    lines = []
    if result["classes_file"]:
        empty = sum(row["images"] == 0 for row in result["per_class"])
        competing = f"{result['classes']:,} of the network's {result['network_classes']:,} classes compete"
        lines.append(f"{result['classes_file']}: {competing}, {empty:,} of them without images")
    for key, text in (
        ("images_in_no_split", "images in no split"),
        ("unused_split_lines", "lines that name no scored image"),
    ):
        if result[key]:
            lines.append(f"{result['splits_file']}: {text}: {result[key]:,}")
    return lines


def class_table(result: Row) -> list[str]:
    """Return the worst classes and the average of all as lines."""
    present = [row for row in result["per_class"] if row["images"]]
    worst = sorted(present, key=lambda row: -row["top1_error"])[:SHOWN_CLASSES]
    average = result | result["macro_average"] | {"class": "macro average"}
    table = [["class", "images", "errors", "top-1 error", "precision", "recall", "F1"]]
    for row in [*worst, average]:
        shares = [100 - row["recall"], *(row[key] for key in SHARES)]
        counts = [f"{row[key]:,}" for key in ("images", "top1_errors")]
        table.append([row["class"], *counts, *(f"{share:.2f}" for share in shares)])
    head, *rows, last = aligned(table)
    hidden = len(present) - len(worst)
    rows += [f"and {hidden:,} more classes; --json FILE has them all"] * (hidden > 0)
    note = f"accuracy {result['accuracy']:.3f}%; each row has its class as the positive one; worst first"
    return [head, *rows, last, note]
