"""Draw training and validation error over the epochs, as in the paper's Fig. 5.

python scripts/plot_curves.py runs/demo                         writes runs/demo/curves.png
python scripts/plot_curves.py runs/a runs/b --output both.svg
"""

import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from resnext.errors import UserError, command_parser, run_main

FORMATS = (".png", ".svg", ".pdf")
Row = dict[str, Any]  # of metrics.jsonl


def main() -> None:
    parser = command_parser(__doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run directories")
    parser.add_argument("--output", metavar="FILE", help="image to write: .png, .svg, or .pdf")
    arguments = parser.parse_args()
    runs = [Path(run) for run in arguments.runs]
    default = runs[0] / "curves.png" if len(runs) == 1 else "curves.png"
    target = Path(arguments.output or default)
    names = [run.resolve().name for run in runs]
    labels = names if len(set(names)) == len(names) else map(str, runs)
    draw({label: [epoch_rows(run)] for label, run in zip(labels, runs, strict=True)}, target)
    print(f"wrote {target}")


def epoch_rows(run: Path) -> list[Row]:
    """Return the epoch rows of a run's metrics.jsonl."""
    path = run / "metrics.jsonl"
    if not path.is_file():
        raise UserError(f"{run}: not a run directory (no metrics.jsonl); give one that train.py wrote")
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except ValueError as error:
        raise UserError(f"{path}: damaged ({error}); resume the run to cut off a torn last line") from None
    rows = [row for row in rows if row["kind"] == "epoch"]
    if not rows:
        raise UserError(f"{run}: has not finished an epoch, so there is nothing to draw; resume it first")
    return rows


def draw(curves: dict[str, list[list[Row]]], target: Path) -> None:
    """Draw top-1 errors: label → epoch rows of each seed, whose mean is drawn."""
    if target.suffix not in FORMATS:
        raise UserError(f"--output {target}: the name must end in {', '.join(FORMATS)}")
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 5), layout="constrained")
    highest = 0.0
    for number, (label, seeds) in enumerate(curves.items()):
        name = label.encode("utf-8", "backslashreplace").decode()  # a folder's name may be any bytes
        count = min(map(len, seeds))
        epochs = [row["epoch"] for row in seeds[0][:count]]
        look = {"color": f"C{number % 10}", "marker": "o" if count < 3 else None, "markersize": 4}
        for part, title, line, width in (("train", "training", "--", 1.0), ("val", "validation", "-", 1.5)):
            mean = [sum(rows[i][part]["top1_error"] for rows in seeds) / len(seeds) for i in range(count)]
            text = f"{name}, {title} ({mean[-1]:.2f}%)"
            axes.plot(epochs, mean, line, linewidth=width, label=text, **look)
            highest = max(highest, *mean)
    axes.set(xlabel="epoch", ylabel="top-1 error (%)", ylim=(0, min(100, highest * 1.05)))
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.3)
    axes.legend()
    try:
        figure.savefig(target, dpi=150)
    except OSError as error:
        raise UserError(f"--output {target}: cannot be written ({error.strerror})") from None
    pyplot.close(figure)


if __name__ == "__main__":
    run_main(main)
