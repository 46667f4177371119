"""Measure speed: interleaved variants, medians, ratios to the first row of each table.

    python scripts/benchmark.py data --data DIR        reading and training input, against torchvision's
    python scripts/benchmark.py end-to-end --data DIR  JPEG files to optimizer steps, and the wait for data
    python scripts/benchmark.py train                  a training step, against torchvision's and timm's
    python scripts/benchmark.py eval                   an evaluation step, against torchvision's and timm's
    python scripts/benchmark.py convolutions           each grouped 3x3, with its groups merged, and dense
    python scripts/benchmark.py norms                  each BatchNorm + ReLU, against torch's operations

Keys change what is measured: model.depth=101 train.batch_size=64. --json FILE writes the figures
with hardware and versions. Nothing is asserted, because machines are noisy.
"""

import json
import statistics
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]  # python -P omits the script's folder
from resnext.errors import UserError, command_parser, run_main
from resnext.files import check_target, write_file

KINDS = ("data", "end-to-end", "train", "eval", "convolutions", "norms")


def main() -> None:
    parser = command_parser(__doc__)
    parser.add_argument("what", choices=KINDS)
    parser.add_argument("--data", metavar="DIR", help="class folders in DIR/train/")
    parser.add_argument("--rounds", type=int, default=7, metavar="N", help="default: 7")
    parser.add_argument("--json", metavar="FILE", help="write the figures here")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="change what is measured")
    arguments = parser.parse_intermixed_args()
    if arguments.rounds < 1:
        raise UserError("--rounds: must be at least 1")
    if arguments.what in ("data", "end-to-end") and not arguments.data:
        raise UserError(f"--data: missing; {arguments.what} reads images in DIR/train/CLASS/")
    if arguments.json:
        check_target("--json", Path(arguments.json))

    import benchmark_data
    import benchmark_steps

    tables = {
        "data": lambda: benchmark_data.pipelines(arguments.data, arguments.overrides),
        "end-to-end": lambda: benchmark_data.end_to_end(arguments.data, arguments.overrides),
        "train": lambda: benchmark_steps.networks(arguments.overrides, training=True),
        "eval": lambda: benchmark_steps.networks(arguments.overrides, training=False),
        "convolutions": lambda: benchmark_steps.convolutions(arguments.overrides),
        "norms": lambda: benchmark_steps.norms(arguments.overrides),
    }
    results = []
    for title, variants in tables[arguments.what]():
        seconds = interleave(variants, arguments.rounds)
        results.append(table(title, variants, seconds))
    if arguments.json:
        from resnext.device import select_device
        from resnext.engine.logger import environment

        content = {
            "benchmark": arguments.what,
            "environment": environment(select_device("auto")),
            "tables": results,
        }
        write_file("--json", arguments.json, json.dumps(content, indent=2) + "\n")


def interleave(variants: list, rounds: int) -> dict[str, list[float]]:
    """Return the seconds of each variant in each round, in the order A B C A B C, after a warm-up round."""
    import torch

    seconds: dict[str, list[float]] = {variant.name: [] for variant in variants}
    for number in range(rounds + 1):
        for variant in variants:
            variant.prepare()
            start = time.perf_counter()
            variant.run()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if number:
                seconds[variant.name].append(time.perf_counter() - start)
    return seconds


def table(title: str, variants: list, seconds: dict[str, list[float]]) -> dict:
    """Print one table and return it as plain values. Ratios are of images/s, to the first row."""
    rows: list[dict] = []
    print(f"\n{title}\n\n| variant | images/s | ms | speed | |\n|---|---|---|---|---|")
    for variant in variants:
        median = statistics.median(seconds[variant.name])
        speed = variant.images / median
        row = {
            "name": variant.name,
            "images": variant.images,
            "seconds": seconds[variant.name],
            "images_per_second": speed,
            "ratio": speed / rows[0]["images_per_second"] if rows else 1.0,
            "note": variant.note(median / variant.images),
        }
        rows.append(row)
        print(
            f"| {row['name']} | {speed:,.0f} | {1000 * median:.3g} | {row['ratio']:.2f}x | {row['note']} |",
            flush=True,
        )
    return {"title": title, "rows": rows}


if __name__ == "__main__":
    run_main(main)
