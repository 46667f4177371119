"""Train several configurations with several seeds, one after another; write a table and a figure.

    python scripts/study.py cifar10_resnext29_{1x64d,32x4d}.yaml --seeds 2 --data datasets
    python scripts/study.py A.yaml B.yaml --output studies/mine train.epochs=30     the same change for all

The same command continues where it was stopped, and skips finished runs. It writes table.md and curves.png
(means over the seeds) into --output, beside the run directories.
"""

import argparse
import signal
import statistics
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]  # its own folder too, for python -P
from plot_curves import draw, epoch_rows

from resnext.config import Config, differences, find_config, read_config, to_text
from resnext.engine.run_directory import absolute_paths
from resnext.errors import UserError, command_parser, run_main

HEADER = """| configuration | parameters | multiply-adds | top-1 error (%) | top-5 error (%) | seeds | time |
|---|---|---|---|---|---|---|"""


class Run(NamedTuple):
    label: str
    config: Config
    seed: int
    folder: Path
    command: list[str]

    def __str__(self) -> str:
        return f"{self.label}, seed {self.seed}"


def main() -> int:
    parser = command_parser(__doc__)
    parser.add_argument("configs", nargs="+", metavar="CONFIG", help="files, or names in configs/")
    parser.add_argument("--seeds", type=int, default=1, metavar="N", help="run seeds 0...N-1 (default: 1)")
    parser.add_argument("--output", default="studies/study", metavar="DIR", help="default: studies/study")
    parser.add_argument("--data", metavar="DIR", help="where the data is (data.dir)")
    runs = plan(parser.parse_intermixed_args())
    for number, run in enumerate(runs, 1):
        done = finished_classes(run) is not None
        print(f"[{number}/{len(runs)}] {run}{': finished already' if done else ''}", flush=True)
        if done:
            continue
        status = run_child(run.command)
        if status:
            return status
        if finished_classes(run) is None:
            print("stopped; run the same command again to continue")
            return 0
    report(runs)
    return 0


def plan(arguments: argparse.Namespace) -> list[Run]:
    """Return the runs in their order; raise UserError if one of them cannot start or continue."""
    overrides = [text for text in arguments.configs if "=" in text]
    paths = [find_config(text, "CONFIG") for text in arguments.configs if "=" not in text]
    if not paths:
        raise UserError("CONFIG is missing; name one or more files of configs/")
    if arguments.seeds < 1:
        raise UserError(f"--seeds: must be at least 1, not {arguments.seeds}")
    if len({path.stem for path in paths}) < len(paths):
        raise UserError("CONFIG: two configurations have the same name; rename one")
    runs = []
    for path in paths:
        for seed in range(arguments.seeds):
            keys = [*overrides, f"run.seed={seed}"]
            folder = Path(arguments.output) / f"{path.stem}-seed{seed}"
            command = [sys.executable, ROOT / "train.py", "--config", path, "--output", folder, "--resume"]
            command += ["--data", arguments.data] if arguments.data else []
            config = absolute_paths(read_config(path, keys), arguments.data)
            runs.append(Run(path.stem, config, seed, folder, [*map(str, command), *keys]))
            check_unchanged(runs[-1])
    return runs


def check_unchanged(run: Run) -> None:
    """Raise UserError if the folder holds a run of another recipe, which a study must not mix in."""
    path = run.folder / "config.yaml"
    for key, before, now in differences(read_config(path), run.config) if path.is_file() else ():
        if (key, now) == ("train.precision", "auto"):  # the run has recorded what that was
            continue
        if key != "data.dir" and not key.startswith("run."):
            change = f"{key}={to_text(before)}, not {to_text(now)}"
            raise UserError(f"{run.folder}: was run with {change}; choose another --output")


def finished_classes(run: Run) -> int | None:
    """Return the number of classes of a run that has saved its last epoch, else None."""
    from resnext.engine.checkpoint import read_latest

    last = run.folder / "checkpoints" / "last.pt"
    if not last.exists():
        return None
    content = read_latest(last, print)
    return len(content["classes"]) if content["progress"]["epoch"] > run.config.train.epochs else None


def run_child(command: list[str]) -> int:
    """Run train.py and return its status. It saves and ends on a stop signal.

    Ctrl-C reaches it by itself; this process passes on the other signals.
    """
    child = subprocess.Popen(command)
    before = {signal.SIGINT: signal.signal(signal.SIGINT, lambda *_: None)}
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
        before[number] = signal.signal(number, lambda number, _: child.send_signal(number))
    try:
        return child.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def report(runs: list[Run]) -> None:
    """Write table.md and curves.png."""
    import torch

    from resnext.models.complexity import complexity
    from resnext.models.resnext import build_model

    output, lines = runs[0].folder.parent, [HEADER]
    curves: dict[str, list[list[dict]]] = {}
    for run in runs:
        curves.setdefault(run.label, []).append(epoch_rows(run.folder))
    for run in (run for run in runs if run.seed == 0):
        with torch.device("meta"):
            model = build_model(run.config.model, finished_classes(run))
        parameters, macs = complexity(model, run.config.data.image_size)
        last = [rows[-1] for rows in curves[run.label]]
        minutes = statistics.mean(row["time"]["total_seconds"] for row in last) / 60
        top1, top5 = (
            mean_and_deviation([row["val"][key] for row in last]) for key in ("top1_error", "top5_error")
        )
        cells = (run.label, f"{parameters:,}", f"{macs:,}", top1, top5, len(last), f"{minutes:.1f} min")
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    lines += ["", "Errors after the last epoch and times: means over the seeds (± standard deviation).", ""]
    text = "\n".join(lines)
    (output / "table.md").write_text(text, encoding="utf-8", errors="backslashreplace")
    draw(curves, output / "curves.png")
    print(f"\n{text}\nwrote {output / 'table.md'} and {output / 'curves.png'}")


def mean_and_deviation(values: list[float]) -> str:
    """Return 3.65 ± 0.12, or the value alone if there is one."""
    deviation = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{deviation}"


if __name__ == "__main__":
    run_main(main)
