"""Everything that wants a GPU, in one command: the tests, then measurements in order of importance.

    python scripts/gpu.py                          within 25 minutes
    python scripts/gpu.py --minutes 60 --data DIR  and training from the JPEG files below DIR/train/
    python scripts/gpu.py train norms              these parts, even if they were measured before

Each part's figures are written at once to results/gpu-<device>.json and .md; called again, it goes on
after the last part that ended. docs/gpu.md says how to read them. Without a GPU all parts run on tiny
shapes, which tries the commands, not the kernels; those figures mean nothing.
"""

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]  # its own folder too, for python -P
from resnext.errors import UserError, command_parser, run_main

BENCHMARKS = {  # the most important first
    "train": ["train", "train.batch_size=256"],
    "convolutions": ["convolutions", "train.batch_size=256"],
    "norms": ["norms", "train.batch_size=256"],
    "train-101-32x8d": ["train", "model.depth=101", "model.base_width=8", "train.batch_size=128"],
    "train-resnet50": ["train", "model.cardinality=1", "model.base_width=64", "train.batch_size=256"],
    "eval-256": ["eval", "train.batch_size=256"],
    "eval-1": ["eval", "train.batch_size=1"],
    "cifar": ["cifar"],
    "files": ["end-to-end", "train.batch_size=256"],
}
PARTS = ("tests", "demo", *BENCHMARKS)
TINY = ["model.cardinality=4", "model.base_width=2", "data.image_size=32", "train.batch_size=16"]
TESTS_AT_MOST = 0.4  # of the time


def main() -> None:
    parser = command_parser(__doc__)
    parser.add_argument(
        "parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)} (which needs --data); default: all"
    )
    parser.add_argument("--minutes", type=float, default=25, metavar="N", help="default: 25")
    parser.add_argument("--data", metavar="DIR", help="class folders below DIR/train/")
    parser.add_argument(
        "--output", type=Path, default=ROOT / "results", metavar="DIR", help="default: results/"
    )
    arguments = parser.parse_args()
    check(arguments.parts, arguments.minutes, arguments.data)
    seconds = 60 * arguments.minutes
    end = time.monotonic() + seconds

    from resnext.device import select_device
    from resnext.engine.logger import environment

    device = select_device("auto")
    now = environment(device)
    name = re.sub(r"\W+", "-", now["device"]).strip("-").lower()
    target = arguments.output / f"{'gpu' if device.type == 'cuda' else 'tiny'}-{name}.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    results, unfinished = earlier(target, now), []
    for part in arguments.parts or PARTS:
        if part == "files" and not arguments.data:
            continue
        if part in results["parts"] and not arguments.parts:
            print(f"{part}: measured already")
            continue
        left = end - time.monotonic()
        if part == "tests":
            left = min(left, TESTS_AT_MOST * seconds)
        print(f"\n## {part}, at most {max(0, left) / 60:.1f} minutes", flush=True)
        result = run(part, left, arguments.data, tiny=device.type == "cpu") if left > 1 else None
        if result is None:
            unfinished.append(part)
        else:
            results["parts"][part] = result
            write(target, json.dumps(results, indent=2) + "\n")
            write(target.with_suffix(".md"), report(results))
    print(f"\n{report(results)}\nwritten to {target} and {target.with_suffix('.md')}")
    if results["parts"].get("tests", {}).get("failed"):
        unfinished.append("tests")
    if unfinished:
        raise UserError(
            f"{', '.join(unfinished)}: failed, or no time was left; see above, or raise --minutes"
        )


def check(names: list[str], minutes: float, data: str | None) -> None:
    if unknown := [name for name in names if name not in PARTS]:
        raise UserError(f"{unknown[0]}: no part of that name; there are {', '.join(PARTS)}")
    if not 0 < minutes < float("inf"):
        raise UserError(f"--minutes {minutes}: must be above 0")
    if "files" in names and not data:
        raise UserError("--data is missing: files reads pictures below DIR/train/CLASS/")
    if data and not (Path(data) / "train").is_dir():
        raise UserError(f"--data {data}: has no folder train/; give the folder that holds train/CLASS/*.jpg")


def write(path: Path, text: str) -> None:
    """Whole or not at all."""
    temporary = path.with_name(f".{path.name}")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def earlier(target: Path, now: dict[str, str]) -> dict:
    """What an earlier call with the same program and hardware has measured."""

    def fixed(environment: dict[str, str]) -> dict[str, str]:
        return {key: value for key, value in environment.items() if key != "started"}

    if target.exists():
        try:
            results = json.loads(target.read_text(encoding="utf-8"))
            if fixed(results["environment"]) == fixed(now):
                return results
        except (ValueError, KeyError, TypeError):
            pass  # damaged
        kept = target.with_suffix(f".{time.strftime('%Y%m%d-%H%M%S')}.json")
        target.rename(kept)
        print(f"{target} is of another version or machine, or damaged: kept as {kept}")
    return {"environment": now, "parts": {}}


def command(part: str, folder: str, data: str | None, tiny: bool) -> list[str]:
    """What python runs for a part, which leaves its result in the folder."""
    if part == "tests":
        return ["-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider", f"--junitxml={folder}/result"]
    if part == "demo":
        return [
            "train.py",
            "--config",
            "demo.yaml",
            "--output",
            f"{folder}/demo",
            *["data.train_images=320"] * tiny,
        ]
    extra = ["--data", data] if part == "files" else []
    if tiny:
        extra += ["--rounds", "1", *(TINY if part != "cifar" else [])]
    return ["scripts/benchmark.py", *BENCHMARKS[part], "--json", f"{folder}/result", *extra]


def run(part: str, seconds: float, data: str | None, tiny: bool) -> dict | None:
    """Run one part; its figures, or None where it did not end well."""
    data = data and str(Path(data).resolve())
    with tempfile.TemporaryDirectory() as folder:
        start = time.monotonic()
        # A session of its own, so that all it has started can be ended with it.
        arguments = [sys.executable, *command(part, folder, data, tiny)]
        process = subprocess.Popen(arguments, cwd=ROOT, start_new_session=True)
        try:
            status = process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            print(f"{part}: stopped, its time is up")
            return None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        taken = {"seconds": round(time.monotonic() - start, 1)}
        result = Path(folder) / "result"
        if part == "tests" and result.exists():
            suite = xml.etree.ElementTree.parse(result).getroot()[0]
            tests, failures, errors, skipped = (
                int(suite.get(key, 0)) for key in ("tests", "failures", "errors", "skipped")
            )
            failed = failures + errors
            return taken | {"passed": tests - failed - skipped, "failed": failed, "skipped": skipped}
        if status:
            print(f"{part}: ended with status {status}")
            return None
        if part == "demo":
            rows = (Path(folder) / "demo" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
            return taken | {"top1_error": json.loads(rows[-1])["val"]["top1_error"]}
        return taken | {"tables": json.loads(result.read_text(encoding="utf-8"))["tables"]}


def report(results: dict) -> str:
    """The figures as Markdown."""
    environment = results["environment"]
    lines = [", ".join(f"{key} {value}" for key, value in environment.items() if key != "processes"), ""]
    for part, result in results["parts"].items():
        if "tables" not in result:
            lines += [f"{part}: " + ", ".join(f"{key} {value}" for key, value in result.items()), ""]
        for table in result.get("tables", ()):
            lines += [f"**{table['title']}**", ""]
            lines += ["| variant | images/s | ms | speed | |", "|---|---|---|---|---|"]
            for row in table["rows"]:
                speed = row["images_per_second"]
                milliseconds = 1000 * row["images"] / speed
                note = row["note"]
                lines.append(
                    f"| {row['name']} | {speed:,.0f} | {milliseconds:.3g} | {row['ratio']:.2f}x | {note} |"
                )
            lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    run_main(main)
