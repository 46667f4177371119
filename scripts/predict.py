"""What trained weights see in pictures: the most probable classes of each.

    python scripts/predict.py runs/demo picture.png photos/         files, and folders with all below them
    python scripts/predict.py RUN 'photos/*.jpg' --top 1            a pattern, matched here
    find photos -newer stamp | python scripts/predict.py RUN -         names from standard input
    python scripts/predict.py RUN photos/ --output classes.csv      rows of path,rank,class,probability

Pictures are prepared as evaluate.py does. A file that cannot be read is named and left out, the others are
done; the exit status is then 2. A file of results appears whole or not at all.
"""

import argparse
import contextlib
import csv
import io
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from data.subsets import imagenet_classes, read_classes
from data.unlabeled import find_images
from resnext.classes import name_classes
from resnext.errors import UserError, command_parser, run_main
from resnext.files import check_source, check_target


def main() -> None:
    parser = argument_parser(__doc__)
    add = parser.add_argument
    add("--top", type=int, default=5, metavar="K", help="classes of each picture (default: 5)")
    add("--format", choices=list(FORMATS), help="default: as --output ends, else table")
    add("--output", metavar="FILE", help="write there instead of to standard output")
    add(
        "--class-names",
        metavar="FILE",
        help="names of the network's outputs, one a line in their order, for weights that do not name them",
    )
    arguments = parser.parse_intermixed_args()
    if arguments.top < 1:
        raise UserError(f"--top: must be at least 1, not {arguments.top}")
    names = read_classes("--class-names", arguments.class_names) if arguments.class_names else None
    paths, broken = find_inputs(arguments)
    named = len(paths) + len(broken)
    suffix = Path(arguments.output or "").suffix.lower().removeprefix(".")
    kind = arguments.format or (suffix if suffix in FORMATS else "table")
    network = load_network(arguments, classifier=True)
    if names:
        network = network._replace(info=name_classes(network.info, tuple(names), arguments.class_names))
    with writer(arguments.output) as write:
        for text in FORMATS[kind](predictions(network, paths, arguments, broken)):
            write(text)
    report_broken(broken, named)


# ---------------------------------------------------------------------------- shared with extract_features.py


def argument_parser(document: str | None) -> argparse.ArgumentParser:
    """A parser of what both scripts take, described by a module's docstring."""
    parser = command_parser(document)
    add = parser.add_argument
    add(
        "weights",
        metavar="WEIGHTS",
        help="a run directory (its best checkpoint), a file of weights, or torchvision:NAME",
    )
    add(
        "pictures",
        nargs="+",
        metavar="PICTURE",
        help="file, folder, quoted pattern, or - for names from standard input, one a line",
    )
    add("--batch-size", type=int, default=32, metavar="N", help="pictures at a time (default: 32)")
    add(
        "--workers",
        type=int,
        metavar="N",
        help="loader processes (data.workers; default: one a core, a quarter without a GPU)",
    )
    add("--device", choices=["auto", "cpu", "cuda"], default="auto")
    add("--precision", choices=["auto", "fp32", "tf32", "bf16", "fp16"], help="default: the run's")
    add("--max-pixels", type=int, metavar="N", help="refuse pictures with more (data.max_pixels)")
    return parser


LIMITS = {"batch_size": (1, 1 << 16), "workers": (0, 256), "max_pixels": (1, 1 << 40)}


def find_inputs(arguments: argparse.Namespace) -> tuple[list[str], list[str]]:
    """(pictures, what was named and not found, warned of); wrong options are UserErrors, at once."""
    for name, (low, high) in LIMITS.items():
        value = getattr(arguments, name)
        if value is not None and not low <= value <= high:
            raise UserError(f"--{name.replace('_', '-')}: must be in {low}...{high}, not {value}")
    check_source(arguments.weights)
    if arguments.output:
        check_target("--output", Path(arguments.output))
    paths, broken, notes = find_images(
        arguments.pictures, sys.stdin.buffer if "-" in arguments.pictures else ()
    )
    if arguments.output:
        check_kept(Path(arguments.output), [arguments.weights, *paths])
    for problem in [*broken, *notes]:
        warn(problem.removeprefix("warning: "))
    return paths, broken


def check_kept(target: Path, inputs: list[str]) -> None:
    """A UserError where results would replace weights, a picture or a file of a run."""
    used = target.is_file() and any(os.path.exists(name) and target.samefile(name) for name in inputs)
    if used:
        raise UserError(f"--output {target}: is read too; name another file for the result")


class Network(NamedTuple):
    """A network on its device; `info` and `config` as load_weights and the options say."""

    model: Any
    info: Any
    config: Any
    device: Any


def load_network(arguments: argparse.Namespace, classifier: bool) -> Network:
    """The weights, ready to be used on the device and at the precision that the options ask for.

    With `classifier`, a UserError where they have no last layer.
    """
    from resnext.device import (
        choose_precision,
        configure_backends,
        explain_out_of_memory,
        select_device,
        slow_precision,
    )
    from resnext.engine.train_state import to_device
    from resnext.weights.load import check_classifier, load_weights, preprocessing

    model, info = load_weights(arguments.weights)
    if classifier:
        check_classifier(info)
    if info.origin != "this program":
        print(preprocessing(info), file=sys.stderr)
    config, device = info.config, select_device(arguments.device)
    precision = choose_precision(arguments.precision or config.train.precision, device)
    for note in slow_precision(precision, device, "--precision "):
        warn(note.removeprefix("warning: "))
    max_pixels = arguments.max_pixels or config.data.max_pixels
    config = replace(
        config,
        train=replace(config.train, precision=precision),
        data=replace(config.data, workers=arguments.workers, max_pixels=max_pixels),
    )
    configure_backends(precision, config.run.deterministic, training=False)
    with explain_out_of_memory(
        "--device: it has no memory for the network; close other programs, or use cpu"
    ):
        return Network(to_device(model, config, device), info, config, device)


def scores(
    network: Network, paths: list[str], arguments: argparse.Namespace, broken: list[str]
) -> Iterator[tuple[list[str], Any]]:
    """(paths, raw scores (N, classes) float32) of each batch; what cannot be read is added to `broken`."""
    import torch
    from tqdm import tqdm

    from data.unlabeled_loader import unlabeled_batches
    from resnext.device import explain_out_of_memory
    from resnext.engine.evaluator import promote_to_float32
    from resnext.engine.train_state import autocast, memory_layout

    model, _, config, device = network
    text = f"--batch-size: the device has no memory for {arguments.batch_size} pictures; lower it"
    hidden = not arguments.output and sys.stdout.isatty()  # the rows themselves show how far it is
    with tqdm(total=len(paths), unit=" pictures", leave=False, disable=hidden or None) as bar:
        for batch in unlabeled_batches(paths, config.data, arguments.batch_size, device):
            for problem in batch.problems:
                warn(problem)
            broken += batch.problems
            if batch.paths:
                images = batch.images.to(memory_format=memory_layout(config, device))
                with (
                    explain_out_of_memory(text),
                    torch.inference_mode(),
                    autocast(device, config.train.precision),
                ):
                    output = model(images)
                yield batch.paths, promote_to_float32(output)
            bar.update(len(batch.paths) + len(batch.problems))


def warn(problem: str) -> None:
    """A warning on standard error, above the progress bar where there is one."""
    from tqdm import tqdm

    tqdm.write(f"warning: {problem}", file=sys.stderr)


def report_broken(broken: list[str], named: int) -> None:
    """The closing message, where anything could not be read."""
    if broken:
        others = "; all others are done" if len(broken) < named else ""
        raise UserError(
            f"{len(broken):,} of {named:,} could not be read (see the warnings); replace or remove "
            f"them{others}"
        )


@contextlib.contextmanager
def whole_file(name: str) -> Iterator[Path]:
    """The path to write to: another name, so that what stood there stays until the new file is whole."""
    target = Path(name).resolve()
    special = target.exists() and not target.is_file()  # a pipe or device
    path = target if special else target.with_name(f".{os.getpid()}.partial")
    handler = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        yield path
        if not special:
            with open(path, "rb") as file:
                os.fsync(file.fileno())
            os.replace(path, target)
    except OSError as error:
        raise UserError(f"--output {name}: cannot be written ({error.strerror}); name another file") from None
    finally:
        if not special:
            path.unlink(missing_ok=True)
        signal.signal(signal.SIGTERM, handler)


# ---------------------------------------------------------------------------- predictions


class Prediction(NamedTuple):
    """The most probable classes of a picture, best first: (class number, name, probability)."""

    path: str
    classes: list[tuple[int, str, float]]


def predictions(
    network: Network, paths: list[str], arguments: argparse.Namespace, broken: list[str]
) -> Iterator[Prediction]:
    """A Prediction of each picture that can be read, in order."""
    names = class_names(network.info, network.model.fc.out_features)
    for batch, output in scores(network, paths, arguments, broken):
        top = output.topk(min(arguments.top, len(names)), dim=1).indices
        probabilities = output.softmax(1).gather(1, top)
        if not probabilities.isfinite().all():
            raise UserError(
                f"{batch[0]}: it or one after it gets scores that are no numbers; use --precision fp32, or "
                "other weights"
            )
        for path, numbers, split_batch in zip(batch, top.tolist(), probabilities.tolist(), strict=True):
            yield Prediction(path, [(i, names[i], p) for i, p in zip(numbers, split_batch, strict=True)])


def class_names(info: Any, outputs: int) -> list[str]:
    """Names of the network's outputs; ImageNet's get their English ones, from torchvision."""
    known = info.classes
    if known is None and (outputs != 1000 or info.config.model.stem != "imagenet"):
        return [f"class {number}" for number in range(outputs)]
    if known is not None and known != imagenet_classes():
        return list(known)
    from torchvision.models import ResNet50_Weights

    english = ResNet50_Weights.IMAGENET1K_V1.meta["categories"]
    return [" ".join(pair) for pair in zip(known, english, strict=True)] if known else list(english)


@contextlib.contextmanager
def writer(name: str | None) -> Iterator[Callable[[str], None]]:
    """A function that writes a line, or several, to a file or standard output."""
    if name is None:
        yield partial(print, flush=True)
        return
    options = {"encoding": "utf-8", "errors": "surrogateescape", "newline": "\n"}
    with whole_file(name) as path, open(path, "w", **options) as file:
        yield lambda text: print(text, file=file)


def to_table(found: Iterator[Prediction]) -> Iterator[str]:
    """For people: a picture a line where one class is asked for, else a block."""
    for path, classes in found:
        lines = [f"{100 * probability:6.2f} %  {name}" for _, name, probability in classes]
        yield f"{lines[0]:<34}  {path}" if len(lines) == 1 else "\n  ".join([path, *lines])


def to_csv(found: Iterator[Prediction]) -> Iterator[str]:
    """A row for each class of each picture, below a header."""
    yield "path,rank,class,probability"
    for path, classes in found:
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows(
            (path, rank, name, f"{probability:.6f}") for rank, (_, name, probability) in enumerate(classes, 1)
        )
        yield text.getvalue().removesuffix("\n")


def to_json(found: Iterator[Prediction]) -> Iterator[str]:
    """A list with an object for each picture."""
    opening = "["
    for path, classes in found:
        rows = [{"class": name, "index": i, "probability": p} for i, name, p in classes]
        yield opening + json.dumps({"path": path, "predictions": rows})
        opening = ","
    yield "]" if opening == "," else "[]"


FORMATS = {"table": to_table, "csv": to_csv, "json": to_json}


if __name__ == "__main__":
    run_main(main)
