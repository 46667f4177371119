"""Measure speed: interleaved variants, medians, ratios to the first of each table.

    python scripts/benchmark.py data --data DIR        training input on one core against torchvision's way
    python scripts/benchmark.py end-to-end --data DIR  JPEG files to optimiser steps, and the wait for data
    python scripts/benchmark.py train                  a training step against torchvision's and timm's
    python scripts/benchmark.py eval                   the same of evaluation
    python scripts/benchmark.py convolutions           grouped 3x3 as they are, with groups merged, dense
    python scripts/benchmark.py norms                  BatchNorm + ReLU against torch's operations
    python scripts/benchmark.py memory                 of loader workers over 1.28 million file names
    python scripts/benchmark.py cifar                  CIFAR batches on the device against a PIL loader
    python scripts/benchmark.py batchnorm              a CIFAR step with and without BatchNorm groups of 16

Keys change what is measured: model.depth=101 train.batch_size=64. --json FILE writes the figures with
hardware and versions, --chart FILE.png draws them. Nothing is asserted: machines are noisy.
"""

import json
import statistics
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]  # its own folder too, for python -P
from resnext.errors import UserError, command_parser, run_main


def main() -> None:
    parser = command_parser(__doc__)
    kinds = ["data", "end-to-end", "train", "eval", "convolutions", "norms", "memory", "cifar", "batchnorm"]
    parser.add_argument("what", choices=kinds)
    parser.add_argument("--data", metavar="DIR", help="class folders below DIR/train/")
    parser.add_argument("--rounds", type=int, default=7, metavar="N", help="default: 7")
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--chart", metavar="FILE", help=".png, .svg or .pdf")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="change what is measured")
    arguments = parser.parse_intermixed_args()
    if arguments.rounds < 1:
        raise UserError("--rounds: must be at least 1")
    if arguments.what in ("data", "end-to-end") and not arguments.data:
        raise UserError(f"--data is missing: {arguments.what} reads pictures below DIR/train/CLASS/")
    for option in (arguments.json, arguments.chart):
        if option and not Path(option).resolve().parent.is_dir():
            raise UserError(f"{option}: its folder does not exist; make it, or choose another")

    import benchmark_data
    import benchmark_layers
    import benchmark_steps

    if arguments.what == "memory":
        return benchmark_data.memory()
    tables = {
        "data": lambda: benchmark_data.pipelines(arguments.data, arguments.overrides),
        "end-to-end": lambda: benchmark_data.end_to_end(arguments.data, arguments.overrides),
        "train": lambda: benchmark_steps.networks(arguments.overrides, training=True),
        "eval": lambda: benchmark_steps.networks(arguments.overrides, training=False),
        "convolutions": lambda: benchmark_layers.convolutions(arguments.overrides),
        "norms": lambda: benchmark_layers.norms(arguments.overrides),
        "cifar": lambda: benchmark_data.cifar(arguments.overrides),
        "batchnorm": lambda: benchmark_steps.batchnorm(arguments.overrides),
    }
    results = []
    for title, variants in tables[arguments.what]():
        seconds = interleave(variants, arguments.rounds)
        results.append(table(title, variants, seconds))
    if arguments.json:
        write_json(Path(arguments.json), arguments.what, results)
    if arguments.chart:
        draw(results, Path(arguments.chart))


def interleave(variants: list, rounds: int) -> dict[str, list[float]]:
    """Seconds of each variant in each round, A B C A B C …, after one round to warm up."""
    import torch

    seconds: dict[str, list[float]] = {variant.name: [] for variant in variants}
    for number in range(rounds + 1):
        for variant in variants:
            start = time.perf_counter()
            variant.run()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if number:
                seconds[variant.name].append(time.perf_counter() - start)
    return seconds


def table(title: str, variants: list, seconds: dict[str, list[float]]) -> dict:
    """Print one table; the same as plain values. Ratios are of images/s, to the first row."""
    rows = []
    for variant in variants:
        median = statistics.median(seconds[variant.name])
        rows.append(
            {
                "name": variant.name,
                "images": variant.images,
                "seconds": seconds[variant.name],
                "images_per_second": variant.images / median,
                "note": variant.note(median / variant.images),
            }
        )
    first = rows[0]["images_per_second"]
    notes = any(row["note"] for row in rows)
    print(f"\n{title}\n")
    print(
        f"| variant | images/s (median of {len(rows[0]['seconds'])}) | ms/image | speed |{' |' * notes}\n"
        f"|---|---|---|---|{'---|' * notes}"
    )
    for row in rows:
        speed = row["images_per_second"]
        row["ratio"] = speed / first
        note = f" {row['note']} |" if notes else ""
        print(
            f"| {row['name']} | {speed:,.0f} | {1000 / speed:.3f} | {row['ratio']:.2f}x |{note}", flush=True
        )
    return {"title": title, "rows": rows}


def write_json(path: Path, what: str, results: list[dict]) -> None:
    from resnext.device import select_device
    from resnext.engine.logger import environment

    content = {"benchmark": what, "environment": environment(select_device("auto")), "tables": results}
    try:
        path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"--json {path}: cannot be written ({error.strerror})") from None


def draw(results: list[dict], path: Path) -> None:
    """Bars of images/s, one panel a table."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    heights = [len(result["rows"]) for result in results]
    figure, panels = pyplot.subplots(
        len(results),
        figsize=(9, 1.2 * len(results) + 0.32 * sum(heights)),
        height_ratios=heights,
        layout="constrained",
        squeeze=False,
    )
    for axes, result in zip(panels[:, 0], results, strict=True):
        names = [row["name"] for row in result["rows"]]
        bars = axes.barh(names, [row["images_per_second"] for row in result["rows"]], color="C0")
        axes.bar_label(bars, [f"{row['ratio']:.2f}x" for row in result["rows"]], padding=3)
        axes.invert_yaxis()
        axes.margins(x=0.12)
        axes.set(title=result["title"], xlabel="images/s")
    try:
        figure.savefig(path, dpi=150)
    except (OSError, ValueError) as error:
        raise UserError(f"--chart {path}: cannot be drawn ({error}); name a .png, .svg or .pdf") from None
    pyplot.close(figure)


if __name__ == "__main__":
    run_main(main)
