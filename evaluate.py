"""Evaluate a trained network: top-1 and top-5 error with their 95 % intervals, every validation image once.

    python evaluate.py runs/demo                                    the best checkpoint of a run
    python evaluate.py runs/demo/checkpoints/last.pt                one checkpoint
    python evaluate.py runs/cifar10_resnext29_8x64d --data datasets --json result.json
    python evaluate.py resnext_50_32x4d.t7 --data imagenet          other programs (docs/weights.md)
    python evaluate.py torchvision:resnext50_32x4d --data imagenet  those that torchvision publishes
    python evaluate.py RUN --ten-crop                               centre, corners, and all five mirrored
    python evaluate.py RUN --image-size 320 --resize 320            the paper's Table 5
    python evaluate.py RUN --data DIR --classes wnids.txt           among some of the classes only
    python evaluate.py RUN --per-class --csv predictions.csv        where the errors are
    torchrun --nproc-per-node=8 evaluate.py RUN                     on 8 GPUs: the same integers

The checkpoint knows its network, data set, preprocessing and precision; --data says where the data
is now. Of other programs' weights the network is inferred, and the preprocessing is that of their origin.
Averaged weights (train.ema_decay) are evaluated where there are any. Files of results appear whole or not
at all.
"""

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))  # for python -P
from resnext.config import Config, network_name
from resnext.errors import UserError, command_parser, run_main
from resnext.files import check_source, check_target, write_file


def parse_arguments() -> argparse.Namespace:
    parser = command_parser(__doc__)
    add = parser.add_argument
    add("source", metavar="RUN|CHECKPOINT|WEIGHTS", help="a run directory, or a file of weights")
    add("--data", metavar="DIR", help="where the data is; default: where it was")
    add("--ten-crop", action="store_true", help="sum the scores of ten crops an image (sets of files)")
    add("--image-size", type=int, metavar="N", help="crop N pixels instead of the run's (sets of files)")
    add(
        "--resize",
        type=int,
        metavar="N",
        help="shorter side ahead of the crop; default: in the run's ratio to it, 256 for 224",
    )
    add(
        "--interpolation",
        choices=["bilinear", "bicubic"],
        help="of resizing (sets of files, not torch7); default: the weights'",
    )
    add(
        "--classes",
        metavar="FILE",
        help="score only these classes, one name a line; only they compete",
    )
    add("--splits", metavar="FILE", help="CSV with header path,split: a score for each split too")
    add(
        "--class-order",
        choices=["string", "natural"],
        help="of class folders, for weights that do not name their classes: string (torchvision, mmpretrain: "
        "10 before 2) or natural (timm: 2 before 10); default: their origin's",
    )
    add(
        "--class-names",
        metavar="FILE",
        help="names of the network's outputs, one a line in their order, for weights that do not name them",
    )
    add("--per-class", action="store_true", help="the worst classes and the most confused pairs")
    add("--json", metavar="FILE", help="write all results there too")
    add(
        "--csv",
        metavar="FILE",
        help="write a row for each image there: label, predictions, confidence",
    )
    add(
        "--batch-size",
        type=int,
        metavar="N",
        help="images per batch of a process; default: the run's, a tenth for ten crops",
    )
    add("--workers", type=int, metavar="N", help="loader processes (data.workers)")
    add("--device", choices=["auto", "cpu", "cuda"], default="auto")
    add("--precision", choices=["auto", "fp32", "tf32", "bf16", "fp16"], help="default: the run's")
    add("--max-pixels", type=int, metavar="N", help="refuse pictures with more (data.max_pixels)")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    check_arguments(arguments)

    from data import subsets

    wanted = subsets.read_classes("--classes", arguments.classes) if arguments.classes else None
    names = arguments.class_names and tuple(subsets.read_classes("--class-names", arguments.class_names))
    splits = subsets.read_splits(arguments.splits) if arguments.splits else []

    from resnext.classes import name_classes
    from resnext.distributed import process_group
    from resnext.weights.load import check_classifier, load_weights

    model, info = load_weights(arguments.source)
    check_classifier(info)
    if info.classes is not None and arguments.class_order:
        raise UserError(f"--class-order: {info.file} names its classes; leave the option out")
    if names:
        info = name_classes(info, names, arguments.class_names)
    config = adapt(info.config, arguments)
    if info.classes is None and (Path(config.data.dir or "").expanduser() / "val").is_dir():
        # Not the CIFAR set that a network of such a stem and so many classes is likely of.
        config = replace(config, data=replace(config.data, dataset="folder"))
    with process_group(config.run.timeout):
        run(model, replace(info, config=config), wanted, splits, arguments)


def run(
    model: Any,
    info: Any,
    wanted: dict[str, int] | None,
    splits: list[tuple[int, str, str]],
    arguments: argparse.Namespace,
) -> None:
    """Load the data, evaluate in each of the processes, and report in the first."""
    from data import subsets
    from resnext.device import (
        choose_precision,
        configure_backends,
        explain_out_of_memory,
        select_device,
        slow_precision,
    )
    from resnext.distributed import local_rank0_first, rank
    from resnext.engine.report import class_rows, report, score_row, to_csv
    from resnext.engine.train_state import to_device
    from resnext.weights.load import preprocessing

    config, device = info.config, select_device(arguments.device)
    precision = choose_precision(config.train.precision, device)
    config = replace(config, train=replace(config.train, precision=precision))
    configure_backends(precision, config.run.deterministic, training=False)
    with local_rank0_first():  # which downloads what is missing
        val_set, names, columns, notes = subsets.load_scored(info, wanted, arguments.classes)
    for note in [*slow_precision(precision, device, "--precision "), *notes] if rank() == 0 else ():
        print(note, file=sys.stderr)
    members = subsets.find_members(splits, names, arguments.splits) if splits else {}
    with explain_out_of_memory(
        "--device: it has no memory for the network; close other programs, or use cpu"
    ):
        model = to_device(model, config, device)
    score, predictions = measure(model, config, val_set, columns, device, arguments)
    if rank() != 0:
        return
    result = {
        "checkpoint": info.file,
        "origin": info.origin,
        "network": network_name(config.model),
        "preprocessing": None if info.origin == "this program" else preprocessing(info),
        "weights": info.weights,
        "global_step": info.steps,
        **score_row(score),
        "dataset": config.data.dataset,
        "data": config.data.dir,
        "pipeline": config.data.pipeline,
        "interpolation": config.data.interpolation,
        "mean": config.data.mean,
        "std": config.data.std,
        "image_size": config.data.image_size,
        "resize": config.data.resize,
        "crops": 10 if arguments.ten_crop else 1,
        "precision": config.train.precision,
        "device": device.type,
        "classes": len(val_set.classes),
        "network_classes": info.outputs,
        "classes_file": arguments.classes,
        **class_rows(predictions, val_set.classes),
        "splits_file": arguments.splits,
        "splits": {split: score_row(predictions.score(numbers)) for split, numbers in members.items()},
        "images_in_no_split": len(names) - len(set().union(*members.values())) if splits else None,
        "unused_split_lines": len(splits) - sum(map(len, members.values())) if splits else None,
    }
    try:
        if arguments.csv:
            key = "path" if config.data.dataset == "folder" else "index"
            write_file("--csv", arguments.csv, to_csv(key, names, predictions, val_set.classes))
        if arguments.json:
            write_file("--json", arguments.json, json.dumps(result, indent=2) + "\n")
    finally:  # neither a full disk nor a closed pipe takes the other results along
        print(report(result, arguments.per_class), flush=True)


def check_arguments(arguments: argparse.Namespace) -> None:
    """What can be said about the command line before anything is read."""
    check_source(arguments.source)
    source = Path(arguments.source).expanduser()
    limits = {"batch_size": (1, 1 << 20), "workers": (0, 256), "image_size": (8, 4096), "resize": (8, 8192)}
    limits["max_pixels"] = (1, 1 << 40)
    for name, (low, high) in limits.items():
        value, option = getattr(arguments, name), "--" + name.replace("_", "-")
        if value is not None and value < low:
            raise UserError(f"{option}: must be at least {low}, not {value}")
        if value is not None and value > high:
            raise UserError(f"{option}: must be at most {high}, not {value}")
    others = {
        "the checkpoint": source / "checkpoints" / "best.pt" if source.is_dir() else source,
        "--classes": arguments.classes,
        "--splits": arguments.splits,
        "--class-names": arguments.class_names,
    }
    for option, name in (("--json", arguments.json), ("--csv", arguments.csv)):
        if not name:
            continue
        check_target(option, Path(name))
        for other, used in others.items():
            if used and Path(used).resolve() == Path(name).resolve():
                raise UserError(f"{option} {name}: is {other} too; name another file for the result")
        others[option] = name


def adapt(config: Config, arguments: argparse.Namespace) -> Config:
    """The configuration of the weights with what the options change."""
    data, train = config.data, config.train
    if data.pipeline == "memory":
        for name in ("ten_crop", "image_size", "resize", "interpolation"):
            if getattr(arguments, name):
                raise UserError(
                    f"--{name.replace('_', '-')}: works on files, and this set is in memory at "
                    f"{data.image_size} pixels (data.pipeline); leave the option out"
                )
    size = arguments.image_size or data.image_size
    resize = arguments.resize or size * data.resize // data.image_size
    if arguments.image_size and config.model.stem == "imagenet" and size < 32:
        raise UserError(f"--image-size: {size} is less than the network's stride; use 32 or more")
    if resize < size:
        raise UserError(f"--resize: {resize} is less than the crop of {size}; raise it")
    return replace(
        config,
        train=replace(train, precision=arguments.precision or train.precision),
        data=replace(
            data,
            image_size=size,
            resize=resize,
            interpolation=arguments.interpolation or data.interpolation,
            dir=arguments.data or data.dir,
            workers=data.workers if arguments.workers is None else arguments.workers,
            class_order=arguments.class_order,
            max_pixels=arguments.max_pixels or data.max_pixels,
        ),
    )


def measure(
    model: Any, config: Config, val_set: Any, columns: list[int] | None, device: Any, arguments: Any
) -> tuple[Any, Any]:
    """The evaluation itself: (Score, Predictions)."""
    import torch
    from tqdm import tqdm

    from data.loaders import make_eval_loader
    from resnext.device import explain_out_of_memory
    from resnext.distributed import rank, world_size
    from resnext.engine.evaluator import PredictionCollector, evaluate
    from resnext.engine.train_state import autocast, memory_layout

    crops = 10 if arguments.ten_crop else 1
    batch_size = arguments.batch_size or max(1, config.train.eval_batch_size // crops)
    batches = make_eval_loader(
        val_set, config.data, batch_size, device, arguments.ten_crop, rank(), world_size()
    )
    bar = tqdm(batches, "evaluating", batches.steps, leave=False, disable=None if rank() == 0 else True)
    recorder = PredictionCollector()
    text = f"--batch-size: the device has no memory for {batch_size} images, {crops} crops each; lower it"
    with explain_out_of_memory(text):
        score = evaluate(
            model,
            bar,
            lambda: autocast(device, config.train.precision),
            layout=memory_layout(config, device),
            crops=crops,
            columns=torch.tensor(columns, device=device) if columns else None,
            recorder=recorder,
        )
        return score, recorder.predictions()


if __name__ == "__main__":
    run_main(main)
