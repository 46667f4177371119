"""Evaluate a trained network: top-1 and top-5 error with 95% intervals, every validation image once.

    python evaluate.py runs/demo                                    the best checkpoint of a run
    python evaluate.py runs/demo/checkpoints/last.pt                one checkpoint
    python evaluate.py runs/cifar10_resnext29_8x64d --data datasets --json result.json
    python evaluate.py resnext_50_32x4d.t7 --data imagenet          other programs (docs/weights.md)
    python evaluate.py torchvision:resnext50_32x4d --data imagenet  weights that torchvision publishes
    python evaluate.py timm:resnext50_32x4d.a1_in1k --data imagenet the same of timm, or hf:OWNER/REPO
    python evaluate.py RUN --ten-crop                               center, corners, and all five mirrored
    python evaluate.py RUN --image-size 320 --resize 320            the paper's Table 5
    python evaluate.py RUN --data DIR --classes wnids.txt           among some of the classes only
    python evaluate.py RUN --data imagenet-a --classes imagenet-a   ImageNet's test sets (docs/test_sets.md)
    python evaluate.py RUN --data ILSVRC/Data/CLS-LOC --val-list LOC_val_solution.csv       no class folders
    python evaluate.py RUN --per-class --csv predictions.csv        where the errors are
    torchrun --nproc-per-node=8 evaluate.py RUN                     on 8 GPUs: the same counts

A checkpoint states its network, dataset, preprocessing, and precision; --data says where the data is now.
For other programs' weights, the network is inferred, and the preprocessing is what they state, or usual.
Averaged weights (train.ema_decay) are used if there are any. Result files appear complete or not at all.
"""

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # for python -P
from data.evaluation import evaluation_data
from data.label_sets import read_label_sets
from data.subsets import find_members, load_scored, read_classes, read_splits
from resnext.arguments import CLASS_NAMES_HELP, add_inference_options, check_limits
from resnext.config import IMAGE_FILES
from resnext.errors import UserError, command_parser, run_main
from resnext.files import check_source, check_target, write_file


def parse_arguments() -> argparse.Namespace:
    parser = command_parser(__doc__)
    add = parser.add_argument
    add("source", metavar="RUN|CHECKPOINT|WEIGHTS", help="a run directory, or a file of weights")
    add("--data", metavar="DIR", help="where the data is; default: where it was")
    add("--ten-crop", action="store_true", help="sum the logits of ten crops per image (image files)")
    add("--image-size", type=int, metavar="N", help="crop N pixels; default: the run's (image files)")
    add("--resize", type=int, metavar="N", help="shorter side before the crop; default: in the run's ratio")
    interpolation_help = "filter of resizing (image files, not torch7); default: the weights'"
    add("--interpolation", choices=["bilinear", "bicubic"], help=interpolation_help)
    classes_help = "score only these classes, one per line or the folders of DIR; only they compete"
    add("--classes", metavar="FILE|DIR", help=classes_help)
    add(
        "--val-list",
        metavar="FILE",
        help="file of image paths and classes instead of class folders (data.val_list)",
    )
    real_help = "several outputs are right per image: ReaL's real.json, or ObjectNet's folder mappings/"
    add("--real-labels", metavar="FILE|DIR", help=real_help)
    add("--splits", metavar="FILE", help="CSV with header path,split: also score each split")
    order_help = (
        "order of class folders, for weights without class names: string (torchvision, mmpretrain: 10 before "
        "2) or natural (timm: 2 before 10); default: their origin's"
    )
    add("--class-order", choices=["string", "natural"], help=order_help)
    add("--class-names", metavar="FILE", help=CLASS_NAMES_HELP)
    add("--per-class", action="store_true", help="print the worst classes and the most confused pairs")
    add("--json", metavar="FILE", help="write all results to FILE")
    add("--csv", metavar="FILE", help="write a row per image to FILE: label, predictions, confidence")
    batch_help = "images per batch of a rank; default: the run's, a tenth for ten crops"
    add_inference_options(parser, None, batch_help, "DataLoader workers (data.workers)")
    return parser.parse_args()


def check_arguments(arguments: argparse.Namespace) -> None:
    """Raise UserError for what is wrong before anything is read."""
    check_source(arguments.source)
    check_limits(arguments)
    source, results = Path(arguments.source).expanduser(), (arguments.json, arguments.csv)
    inputs = [source / "checkpoints/best.pt" if source.is_dir() else source]
    given = (arguments.classes, arguments.splits, arguments.class_names, arguments.val_list)
    inputs += [Path(name) for name in (*given, arguments.real_labels) if name]
    if arguments.real_labels and arguments.classes:
        raise UserError("--real-labels: numbers all outputs of the network; omit --classes")
    for option, name in zip(("--json", "--csv"), results, strict=True):
        if name:
            check_target(option, Path(name), inputs)
    if all(results) and Path(arguments.json).resolve() == Path(arguments.csv).resolve():
        raise UserError(f"--csv {arguments.csv}: is also --json; name another file for the result")


def main() -> None:
    arguments = parse_arguments()
    check_arguments(arguments)
    wanted = read_classes("--classes", arguments.classes) if arguments.classes else None
    outputs = read_classes("--class-names", arguments.class_names) if arguments.class_names else None
    splits = read_splits(arguments.splits) if arguments.splits else []
    sets = read_label_sets(arguments.real_labels) if arguments.real_labels else None

    from data.loaders import make_eval_loader
    from resnext.distributed import local_rank0_first, process_group, rank, world_size
    from resnext.engine.inference import InferenceSettings, evaluate_batches, load_classifier, to_inference
    from resnext.engine.report import result_row, split_rows, to_csv

    model, info = load_classifier(arguments.source, outputs, arguments.class_names)
    if arguments.class_order and info.classes is not None and outputs is None:
        raise UserError(f"--class-order: {info.file} names its classes; omit the option")
    settings, crops = InferenceSettings.of(info), 10 if arguments.ten_crop else 1
    batch_size = arguments.batch_size or max(1, settings.batch_size // crops)
    data = evaluation_data(info.config, info.classes is not None, arguments)
    info = replace(info, config=replace(info.config, data=data))
    with process_group(settings.timeout):
        network = to_inference(model, settings, arguments.device, arguments.precision)
        with local_rank0_first():  # it downloads what is missing
            val_set, names, columns, notes = load_scored(data, info, wanted, arguments.classes, sets)
        for note in notes if rank() == 0 else ():
            print(note, file=sys.stderr)
        members = find_members(splits, names, arguments.splits) if splits else {}
        shares = (arguments.ten_crop, rank(), world_size())
        batches = make_eval_loader(val_set, data, batch_size, network.device, *shares)
        score, predictions = evaluate_batches(network, batches, batches.steps, batch_size, crops, columns)
        if sets:
            predictions = predictions.with_label_sets([sets.of(name) for name in names])
            score = predictions.score(list(range(len(names))))
        if rank() == 0:
            classes = val_set.classes
            result = result_row(info, network, crops, classes, arguments.classes, score, predictions)
            result["real_labels"] = arguments.real_labels
            result |= split_rows(arguments.splits, splits, members, predictions)
            key = "path" if data.dataset in IMAGE_FILES else "index"
            rows = to_csv(key, names, predictions, classes) if arguments.csv else ""
            write_results(arguments, result, rows)


def write_results(arguments: argparse.Namespace, result: dict[str, object], rows: str) -> None:
    """Write the result files and print the report."""
    from resnext.engine.report import report

    try:
        if arguments.csv:
            write_file("--csv", arguments.csv, rows)
        if arguments.json:
            write_file("--json", arguments.json, json.dumps(result, indent=2) + "\n")
    finally:  # print the report even if writing a file failed
        print(report(result, arguments.per_class), flush=True)


if __name__ == "__main__":
    run_main(main)
