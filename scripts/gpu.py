"""Run everything that needs a GPU: the tests, then measurements in order of importance.

    python scripts/gpu.py                          within 25 minutes
    python scripts/gpu.py --minutes 60 --data DIR  also train on the JPEG files in DIR/train/
    python scripts/gpu.py train norms              only these parts, even if already measured

Each part's figures are written at once to results/gpu-<device>.json and .md. The same command
later continues after the last finished part. docs/gpu.md explains the figures. Without a GPU all
parts run with tiny shapes: that tests the commands, and the figures mean nothing.
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
sys.path.insert(0, str(ROOT))  # python -P omits it
from resnext.errors import UserError, command_parser, run_main
from resnext.files import write_file

BENCHMARKS = {  # the most important first
    "train": ["train", "train.batch_size=256"],
    "convolutions": ["convolutions", "train.batch_size=256"],
    "norms": ["norms", "train.batch_size=256"],
    "train-cifar": [
        *("train", "model.stem=cifar", "model.depth=20", "model.cardinality=1", "model.base_width=16"),
        "train.batch_size=128",
    ],
    "train-101-32x8d": ["train", "model.depth=101", "model.base_width=8", "train.batch_size=128"],
    "train-resnet50": ["train", "model.cardinality=1", "model.base_width=64", "train.batch_size=256"],
    "eval-256": ["eval", "train.batch_size=256"],
    "eval-1": ["eval", "train.batch_size=1"],
    "files": ["end-to-end", "train.batch_size=256"],
}
PARTS = ("tests", "demo", *BENCHMARKS)
TINY = ["model.cardinality=4", "model.base_width=2", "data.image_size=32", "train.batch_size=16"]
TESTS_AT_MOST = 0.4  # of the time


def main() -> None:
    parser = command_parser(__doc__)
    add = parser.add_argument
    add("parts", nargs="*", metavar="PART", help=f"{', '.join(PARTS)} (needs --data); default: all")
    add("--minutes", type=float, default=25, metavar="N", help="default: 25")
    add("--data", metavar="DIR", help="class folders in DIR/train/")
    add("--output", type=Path, default=ROOT / "results", metavar="DIR", help="default: results/")
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
    results, unfinished = earlier_results(target, now), []
    for part in arguments.parts or PARTS:
        if part == "files" and not arguments.data:
            continue
        if part in results["parts"] and not arguments.parts:
            print(f"{part}: already measured")
            continue
        left = end - time.monotonic()
        if part == "tests":
            left = min(left, TESTS_AT_MOST * seconds)
        print(f"\n## {part}, at most {max(0, left) / 60:.1f} minutes", flush=True)
        result = run(part, left, arguments.data, tiny=device.type == "cpu") if left > 1 else None
        if result is None:
            unfinished.append(part)
            continue
        results["parts"][part] = result
        write_file("--output", str(target), json.dumps(results, indent=2) + "\n")
        write_file("--output", str(target.with_suffix(".md")), report(results))
    print(f"\n{report(results)}\nwritten to {target} and {target.with_suffix('.md')}")
    if results["parts"].get("tests", {}).get("failed"):
        unfinished.append("tests")
    if unfinished:
        raise UserError(f"{', '.join(unfinished)}: failed or out of time; see above, or raise --minutes")


def check(names: list[str], minutes: float, data: str | None) -> None:
    if unknown := [name for name in names if name not in PARTS]:
        raise UserError(f"{unknown[0]}: unknown part; choose from {', '.join(PARTS)}")
    if not 0 < minutes < float("inf"):
        raise UserError(f"--minutes {minutes}: must be above 0")
    if "files" in names and not data:
        raise UserError("--data: missing; the part files reads images in DIR/train/CLASS/")
    if data and not (Path(data) / "train").is_dir():
        raise UserError(f"--data {data}: has no folder train/; name the folder that holds train/CLASS/*.jpg")


def earlier_results(target: Path, now: dict[str, str]) -> dict:
    """Return what an earlier call with the same program and hardware measured."""
    if target.exists():
        try:
            results = json.loads(target.read_text(encoding="utf-8"))
            if results["environment"] | {"started": ""} == now | {"started": ""}:
                return results
        except (ValueError, KeyError, TypeError):
            pass  # damaged
        kept = target.with_suffix(f".{time.strftime('%Y%m%d-%H%M%S')}.json")
        target.rename(kept)
        print(f"{target}: from another version or machine, or damaged; kept as {kept}")
    return {"environment": now, "parts": {}}


def command(part: str, folder: str, data: str | None, tiny: bool) -> list[str]:
    """Return python's arguments for a part; its result goes to the folder."""
    if part == "tests":
        return ["-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider", f"--junitxml={folder}/result"]
    if part == "demo":
        few = ["data.train_images=320"] if tiny else []
        return ["train.py", "--config", "demo.yaml", "--output", f"{folder}/demo", *few]
    extra = ["--data", str(Path(data).resolve())] if part == "files" and data else []
    if tiny:
        extra += ["--rounds", "1", *TINY]
    return ["scripts/benchmark.py", *BENCHMARKS[part], "--json", f"{folder}/result", *extra]


def run(part: str, seconds: float, data: str | None, tiny: bool) -> dict | None:
    """Run a part and return its figures, or None if it failed."""
    with tempfile.TemporaryDirectory() as folder:
        start = time.monotonic()
        # In its own session, so that everything it starts can be killed.
        arguments = [sys.executable, *command(part, folder, data, tiny)]
        process = subprocess.Popen(arguments, cwd=ROOT, start_new_session=True)
        try:
            status = process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            print(f"{part}: stopped, out of time")
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
            print(f"{part}: exit status {status}")
            return None
        if part == "demo":
            rows = (Path(folder) / "demo" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
            return taken | {"top1_error": json.loads(rows[-1])["val"]["top1_error"]}
        return taken | {"tables": json.loads(result.read_text(encoding="utf-8"))["tables"]}


def report(results: dict) -> str:
    """Return the figures as Markdown."""
    environment = results["environment"]
    lines = [", ".join(f"{key} {value}" for key, value in environment.items() if key != "processes"), ""]
    for part, result in results["parts"].items():
        if "tables" not in result:
            lines += [f"{part}: " + ", ".join(f"{key} {value}" for key, value in result.items()), ""]
        for table in result.get("tables", ()):
            lines += [f"**{table['title']}**", ""]
            lines += ["| variant | images/s | ms | speed | |", "|---|---|---|---|---|"]
            for row in table["rows"]:
                speed, ratio = row["images_per_second"], row["ratio"]
                milliseconds = 1000 * row["images"] / speed
                lines.append(
                    f"| {row['name']} | {speed:,.0f} | {milliseconds:.3g} | {ratio:.2f}x | {row['note']} |"
                )
            lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    run_main(main)
