"""Evaluate a trained network: single-crop top-1 and top-5 error, every validation image once.

    python evaluate.py runs/demo                                    the best checkpoint of a run
    python evaluate.py runs/demo/checkpoints/last.pt                one checkpoint
    python evaluate.py runs/cifar10_resnext29_8x64d --data datasets --json result.json

The checkpoint knows its network, data set, preprocessing and precision; --data says where the data
is now. Averaged weights (train.ema_decay) are evaluated where there are any.
"""

import argparse
import json
import os
from dataclasses import replace
from pathlib import Path

from resnext.errors import UserError, run_command


def parse_arguments() -> argparse.Namespace:
    summary, _, details = __doc__.partition("\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=details, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", metavar="RUN|CHECKPOINT", help="a run directory or a checkpoint file")
    parser.add_argument("--data", metavar="DIR", help="where the data is; default: where it was")
    parser.add_argument("--batch-size", type=int, metavar="N", help="images per batch; changes speed only")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--precision", choices=["fp32", "tf32", "bf16", "fp16"], help="default: the run's")
    parser.add_argument("--json", metavar="FILE", help="write the result there too")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    source = Path(arguments.source)
    if not source.exists():
        raise UserError(f"{source}: no such run directory or checkpoint; check the path")
    if arguments.batch_size is not None and arguments.batch_size < 1:
        raise UserError(f"--batch-size: must be at least 1, not {arguments.batch_size}")
    if arguments.json:
        check_target(Path(arguments.json))

    from data.loader import eval_batches
    from data.sets import load_set
    from resnext.checkpoint import find_checkpoint
    from resnext.distributed import choose_device, set_numerics
    from resnext.evaluation import evaluate
    from resnext.state import autocast, load_evaluated, place

    path = find_checkpoint(source, "best.pt")
    model, config, content = load_evaluated(path)
    if arguments.precision:
        config = replace(config, train=replace(config.train, precision=arguments.precision))
    if arguments.data:
        config = replace(config, data=replace(config.data, dir=arguments.data))
    device = choose_device(arguments.device)
    set_numerics(config.train.precision, config.run.deterministic)
    val_set = load_set(config.data, "val")
    if list(val_set.classes) != content["classes"]:
        raise UserError(
            f"--data {config.data.dir}: its classes ({len(val_set.classes)}) are not those that the network "
            f"was trained on ({len(content['classes'])}); give the data of the run"
        )
    model = place(model, config, device)
    batch_size = arguments.batch_size or config.train.eval_batch_size
    batches = eval_batches(val_set, config.data, batch_size, device)
    score = evaluate(model, batches, lambda: autocast(device, config.train.precision))
    weights = "averaged weights" if content["ema"] is not None else "weights"
    print(f"{path}: {weights} after {content['progress'].get('global_step')} steps")
    print(
        f"{score.images:,} images  top-1 error {score.top1_error:.3f} ({score.top1_errors}/{score.images})  "
        f"top-{min(5, len(val_set.classes))} error {score.top5_error:.3f} "
        f"({score.top5_errors}/{score.images})  loss {score.loss:.4f}"
    )
    if arguments.json:
        result = {"checkpoint": str(path), "weights": weights, **score.as_row()}
        try:
            Path(arguments.json).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        except OSError as error:
            raise UserError(f"--json {arguments.json}: cannot be written ({error.strerror})") from None


def check_target(path: Path) -> None:
    """A UserError now rather than after the work when the result cannot be written."""
    folder = path.resolve().parent
    if path.is_dir() or not folder.is_dir() or not os.access(path if path.exists() else folder, os.W_OK):
        raise UserError(f"--json {path}: cannot be written; name a file in a folder that exists")


if __name__ == "__main__":
    run_command(main)
