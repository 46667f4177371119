"""Run several configurations with several seeds, one after another; write a table and a figure.

    python scripts/study.py cifar10_resnext29_{1x64d,32x4d}.yaml --seeds 2 --data datasets
    python scripts/study.py A.yaml B.yaml --output studies/mine train.epochs=30     the same change for all

The same command goes on where it was stopped; finished runs are not repeated. Writes table.md and
curves.png (means over the seeds) into --output, beside the run directories.
"""

import signal
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]  # its own folder too, for python -P
from plot_curves import draw, epoch_rows

from resnext.config import Config, differences, find_config, read_config, to_text
from resnext.engine.run_directory import absolute_paths
from resnext.errors import UserError, command_parser, run_main


def main() -> int:
    parser = command_parser(__doc__)
    parser.add_argument("configs", nargs="+", metavar="CONFIG", help="files, or names in configs/")
    parser.add_argument("--seeds", type=int, default=1, metavar="N", help="run seeds 0...N-1 (default: 1)")
    parser.add_argument("--output", default="studies/study", metavar="DIR", help="default: studies/study")
    parser.add_argument("--data", metavar="DIR", help="where the data is (data.dir)")
    arguments = parser.parse_intermixed_args()
    overrides = [text for text in arguments.configs if "=" in text]
    names = [text for text in arguments.configs if "=" not in text]
    if not names:
        raise UserError("CONFIG is missing: name one or more files of configs/")
    if arguments.seeds < 1:
        raise UserError(f"--seeds: must be at least 1, not {arguments.seeds}")
    output = Path(arguments.output)
    plan = [
        (Path(name).stem, resolved(name, seed, arguments.data, overrides), seed, name)
        for name in names
        for seed in range(arguments.seeds)
    ]
    if len({label for label, *_ in plan}) * arguments.seeds != len(plan):
        raise UserError("CONFIG: two configurations have the same name; rename one")
    for label, config, seed, _ in plan:
        check_unchanged(run_folder(output, label, seed), config)

    for number, (label, config, seed, name) in enumerate(plan, 1):
        folder = run_folder(output, label, seed)
        if finished(folder, config):
            print(f"[{number}/{len(plan)}] {label}, seed {seed}: finished already")
            continue
        print(f"[{number}/{len(plan)}] {label}, seed {seed}", flush=True)
        command = [
            sys.executable,
            ROOT / "train.py",
            "--config",
            find_config(name),
            "--output",
            folder,
            "--resume",
        ]
        command += ["--data", arguments.data] if arguments.data else []
        status = run_child([*map(str, command), *overrides, f"run.seed={seed}"])
        if status:
            return status
        if not finished(folder, config):
            print("stopped; the same command goes on from here")
            return 0
    report(plan, output)
    return 0


def resolved(name: str, seed: int, data: str | None, overrides: list[str]) -> Config:
    """The configuration of one run."""
    return absolute_paths(read_config(find_config(name), [*overrides, f"run.seed={seed}"]), data)


def run_folder(output: Path, label: str, seed: int) -> Path:
    return output / f"{label}-seed{seed}"


def check_unchanged(folder: Path, config: Config) -> None:
    """A study compares runs of one recipe: refuse to mix in runs of another."""
    path = folder / "config.yaml"
    if not path.is_file():
        return
    for key, before, now in differences(read_config(path), config):
        if (key, now) == ("train.precision", "auto"):  # the run says what that was
            continue
        if key != "data.dir" and not key.startswith("run."):
            raise UserError(
                f"{folder}: was run with {key}={to_text(before)}, not {to_text(now)}; choose another --output"
            )


def finished(folder: Path, config: Config) -> bool:
    """Whether a run has reached its last epoch and saved it."""
    from resnext.engine.checkpoint import read_checkpoint

    last = folder / "checkpoints" / "last.pt"
    return last.exists() and read_checkpoint(last)["progress"]["epoch"] > config.train.epochs


def run_child(command: list[str]) -> int:
    """Run train.py; other stop signals are passed on, Ctrl-C reaches it by itself: it saves and ends."""
    child = subprocess.Popen(command)
    before = {
        signal.SIGINT: signal.signal(signal.SIGINT, lambda *_: None),
        **{
            number: signal.signal(number, lambda number, _: child.send_signal(number))
            for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
        },
    }
    try:
        return child.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def report(plan: list[tuple[str, Config, int, str]], output: Path) -> None:
    """table.md and curves.png."""
    import torch

    from resnext.models.complexity import complexity
    from resnext.models.resnext import build_model

    lines = [
        "| configuration | parameters | multiply-adds | top-1 error (%) | top-5 error (%) | seeds | time |",
        "|---|---|---|---|---|---|---|",
    ]
    curves: dict[str, list[list[dict]]] = {}
    configs = {label: config for label, config, *_ in plan}
    for label, config in configs.items():
        rows = [epoch_rows(run_folder(output, name, seed)) for name, _, seed, _ in plan if name == label]
        curves[label] = rows
        with torch.device("meta"):
            model = build_model(config.model, classes(run_folder(output, label, 0)))
        parameters, macs = complexity(model, config.data.image_size)
        minutes = statistics.mean(r[-1]["time"]["total_seconds"] for r in rows) / 60
        top1, top5 = (
            mean_and_deviation([r[-1]["val"][f"{k}_error"] for r in rows]) for k in ("top1", "top5")
        )
        cells = (label, f"{parameters:,}", f"{macs:,}", top1, top5, len(rows), f"{minutes:.1f} min")
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    lines += ["", "Errors after the last epoch and times: means over the seeds (± standard deviation).", ""]
    text = "\n".join(lines)
    (output / "table.md").write_text(text, encoding="utf-8", errors="backslashreplace")
    draw(curves, output / "curves.png")
    print(f"\n{text}\nwrote {output / 'table.md'} and {output / 'curves.png'}")


def classes(folder: Path) -> int:
    """How many classes a finished run has."""
    from resnext.engine.checkpoint import find_checkpoint, read_checkpoint

    return len(read_checkpoint(find_checkpoint(folder, "last.pt"))["classes"])


def mean_and_deviation(values: list[float]) -> str:
    """3.65 ± 0.12, or the value alone where there is one."""
    if len(values) == 1:
        return f"{values[0]:.2f}"
    return f"{statistics.mean(values):.2f} ± {statistics.stdev(values):.2f}"


if __name__ == "__main__":
    run_main(main)
