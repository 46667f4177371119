"""Classify images with trained weights: print the most probable classes of each.

    python scripts/predict.py runs/demo image.png photos/           files, and folders with all below them
    python scripts/predict.py RUN 'photos/*.jpg' --top 1            a pattern, matched here
    find photos -newer stamp | python scripts/predict.py RUN -         names from standard input
    python scripts/predict.py RUN photos/ --output classes.csv      rows of path,rank,class,probability

Images are prepared as evaluate.py does. A file that cannot be read is named and skipped; the exit status is
then 2. A file of results appears complete or not at all.
"""

import contextlib
import csv
import io
import json
import sys
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from data.imagenet_archives import imagenet_classes
from data.subsets import read_classes
from data.unlabeled import find_images
from resnext.arguments import CLASS_NAMES_HELP, check_limits, image_parser
from resnext.errors import UserError, run_main
from resnext.files import check_source, check_target, whole_file

if TYPE_CHECKING:
    from torch import Tensor

    from resnext.weights.load import WeightsInfo


def main() -> None:
    parser = image_parser(__doc__)
    add = parser.add_argument
    add("--top", type=int, default=5, metavar="K", help="classes per image (default: 5)")
    add("--format", choices=list(FORMATS), help="default: that of the suffix of --output, else table")
    add("--output", metavar="FILE", help="write to FILE instead of standard output")
    add("--class-names", metavar="FILE", help=CLASS_NAMES_HELP)
    arguments = parser.parse_intermixed_args()
    check_limits(arguments)
    check_source(arguments.weights)
    outputs = read_classes("--class-names", arguments.class_names) if arguments.class_names else None
    paths, broken, notes = find_images(arguments.images, sys.stdin.buffer if "-" in arguments.images else ())
    if arguments.output:
        check_target("--output", Path(arguments.output), [arguments.weights, *paths])
    for line in [*(f"warning: {problem}" for problem in broken), *notes]:
        print(line, file=sys.stderr)
    named = len(paths) + len(broken)

    from data.unlabeled_loader import unlabeled_batches
    from resnext.engine import inference

    model, info = inference.load_classifier(arguments.weights, outputs, arguments.class_names)
    hide_bar = not arguments.output and sys.stdout.isatty()  # the rows themselves show the progress
    logits = inference.run_images(model, info, paths, arguments, unlabeled_batches, broken, hide_bar)
    suffix = Path(arguments.output or "").suffix.lower().removeprefix(".")
    to_text = FORMATS[arguments.format or (suffix if suffix in FORMATS else "table")]
    with writer(arguments.output) as write:
        for text in to_text(predictions(logits, class_names(info), arguments.top)):
            write(text)
    inference.check_all_read(broken, named)


class Prediction(NamedTuple):
    """The most probable classes of an image, best first: (class number, name, probability)."""

    path: str
    classes: list[tuple[int, str, float]]


def predictions(
    batches: Iterable[tuple[list[str], "Tensor"]], names: list[str], count: int
) -> Iterator[Prediction]:
    """Yield the `count` most probable classes of each image of batches of (paths, logits), in order."""
    for paths, logits in batches:
        top = logits.topk(min(count, len(names)), dim=1).indices
        probabilities = logits.softmax(1).gather(1, top)
        if not probabilities.isfinite().all():
            raise UserError(
                f"{paths[0]}: this image or a later one of its batch has logits that are not finite; "
                "use --precision fp32, or other weights"
            )
        for path, classes, shares in zip(paths, top.tolist(), probabilities.tolist(), strict=True):
            yield Prediction(path, [(i, names[i], share) for i, share in zip(classes, shares, strict=True)])


def class_names(info: "WeightsInfo") -> list[str]:
    """Return the names of the network's outputs; ImageNet's have their English names, from torchvision."""
    known = info.classes
    if known is None and (info.outputs != 1000 or info.config.model.stem != "imagenet"):
        return [f"class {number}" for number in range(info.outputs or 0)]
    if known is not None and known != imagenet_classes():
        return list(known)
    from torchvision.models import ResNet50_Weights

    english = ResNet50_Weights.IMAGENET1K_V1.meta["categories"]
    return [" ".join(pair) for pair in zip(known, english, strict=True)] if known else list(english)


@contextlib.contextmanager
def writer(name: str | None) -> Iterator[Callable[[str], None]]:
    """Yield a function that writes one or more lines to a file or standard output."""
    if name is None:
        yield partial(print, flush=True)
        return
    with (
        whole_file(name, "--output") as path,
        open(path, "w", encoding="utf-8", errors="surrogateescape", newline="\n") as file,
    ):
        yield partial(print, file=file)


def to_table(found: Iterable[Prediction]) -> Iterator[str]:
    """Yield text for people: a line per image if one class is asked for, otherwise a block."""
    for path, classes in found:
        lines = [f"{100 * probability:6.2f}%  {name}" for _, name, probability in classes]
        yield f"{lines[0]:<33}  {path}" if len(lines) == 1 else "\n  ".join([path, *lines])


def to_csv(found: Iterable[Prediction]) -> Iterator[str]:
    """Yield a header, then a row for each class of each image."""
    yield "path,rank,class,probability"
    for path, classes in found:
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows(
            (path, rank, name, f"{probability:.6f}") for rank, (_, name, probability) in enumerate(classes, 1)
        )
        yield text.getvalue().removesuffix("\n")


def to_json(found: Iterable[Prediction]) -> Iterator[str]:
    """Yield a list with an object for each image."""
    opening = "["
    for path, classes in found:
        rows = [{"class": name, "index": i, "probability": p} for i, name, p in classes]
        yield opening + json.dumps({"path": path, "predictions": rows})
        opening = ","
    yield "]" if opening == "," else "[]"


FORMATS = {"table": to_table, "csv": to_csv, "json": to_json}


if __name__ == "__main__":
    run_main(main)
