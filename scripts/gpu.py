"""Everything that wants a GPU, in one command: the tests, then measurements in order of importance.

    python scripts/gpu.py                          within 25 minutes
    python scripts/gpu.py --minutes 60 --data DIR  and training from the JPEG files below DIR/train/
    python scripts/gpu.py train norms              these parts alone

Each part's figures are written at once to results/gpu-<device>.json and .md; called again, it goes on
after the last part that ended. docs/gpu.md says how to read them. Without a GPU all parts run on tiny
shapes: their figures mean nothing, but a part that fails would fail on a GPU as well.
"""

import json
import re
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]  # its own folder too, for python -P
from resnext.errors import UserError, command_parser, run_command

RESNEXT101 = ["model.depth=101", "model.base_width=8", "train.batch_size=128"]
PLAIN_RESNET = ["model.cardinality=1", "model.base_width=64"]
TINY = ["model.cardinality=4", "model.base_width=2", "data.image_size=32", "train.batch_size=16"]


def parts(data: str | None) -> dict[str, list[str]]:
    """{name: what to run}, the most important first."""
    benchmarks = {
        "train": ["train", "train.batch_size=256"],
        "convolutions": ["convolutions", "train.batch_size=256"],
        "norms": ["norms", "train.batch_size=256"],
        "train resnext101_32x8d": ["train", *RESNEXT101],
        "train resnet50": ["train", *PLAIN_RESNET, "train.batch_size=256"],
        "evaluate, batch 256": ["eval", "train.batch_size=256"],
        "evaluate, batch 1": ["eval", "train.batch_size=1"],
        "cifar input": ["cifar"],
    }
    if data:
        benchmarks["files to steps"] = ["end-to-end", "--data", data, "train.batch_size=256"]
    commands = {name: ["scripts/benchmark.py", *arguments] for name, arguments in benchmarks.items()}
    return {
        "tests": ["-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider"],
        "demo": ["train.py", "--config", "demo.yaml"],
    } | commands


def main() -> None:
    parser = command_parser(__doc__)
    names = ", ".join(parts("DIR"))
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"default: all of {names}")
    parser.add_argument("--minutes", type=float, default=25, metavar="N", help="default: 25")
    parser.add_argument("--data", metavar="DIR", help="class folders below DIR/train/")
    parser.add_argument(
        "--output", type=Path, default=ROOT / "results", metavar="DIR", help="default: results/"
    )
    arguments = parser.parse_args()
    wanted = parts(arguments.data)
    if unknown := [name for name in arguments.parts if name not in wanted]:
        raise UserError(f"{unknown[0]}: no part of that name; there are {', '.join(wanted)}")
    end = time.monotonic() + 60 * arguments.minutes

    from resnext.distributed import choose_device
    from resnext.reporting import environment

    device = choose_device("auto")
    now = environment(device)
    name = re.sub(r"\W+", "-", now["device"]).strip("-").lower()
    target = arguments.output / f"{'gpu' if device.type == 'cuda' else 'tiny'}-{name}.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    results, failed = earlier(target, now), []
    for part, command in wanted.items():
        if arguments.parts and part not in arguments.parts:
            continue
        if part in results["parts"]:
            print(f"{part}: measured already")
            continue
        left = end - time.monotonic()
        if left < 1:
            print(f"{part}: no time left; call again, or with more --minutes")
            continue
        print(f"\n## {part}, {left / 60:.1f} minutes left", flush=True)
        result = run(part, command, left, tiny=device.type == "cpu")
        if result is None:
            failed.append(part)
        else:
            results["parts"][part] = result
            target.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
            target.with_suffix(".md").write_text(report(results), encoding="utf-8")
    print(f"\n{report(results)}\nwritten to {target} and {target.with_suffix('.md')}")
    if results["parts"].get("tests", {}).get("failed"):
        failed.append("tests")
    if failed:
        raise UserError(f"{', '.join(failed)}: failed or not finished; see above")


def earlier(target: Path, now: dict[str, str]) -> dict:
    """What an earlier call with the same program and hardware has measured."""
    fixed = {key: value for key, value in now.items() if key != "started"}
    if target.exists():
        results = json.loads(target.read_text(encoding="utf-8"))
        if {key: value for key, value in results["environment"].items() if key != "started"} == fixed:
            return results
        kept = target.with_suffix(f".{time.strftime('%Y%m%d-%H%M%S')}.json")
        target.rename(kept)
        print(f"{target} is of another version or another machine: kept as {kept}")
    return {"environment": now, "parts": {}}


def run(part: str, command: list[str], seconds: float, tiny: bool) -> dict | None:
    """Run one part; its figures, or None where it did not end well."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "result"
        if part == "tests":
            command = [*command, f"--junitxml={file}"]
        elif part == "demo":
            command = [*command, "--output", f"{folder}/demo", *(["train.epochs=1"] if tiny else [])]
        else:
            small = TINY if "cifar" not in part else []
            command = [*command, "--json", str(file), *(["--rounds", "1", *small] if tiny else [])]
        start = time.monotonic()
        try:
            done = subprocess.run([sys.executable, *command], cwd=ROOT, timeout=seconds)
        except subprocess.TimeoutExpired:
            print(f"{part}: stopped, the time is up")
            return None
        taken = {"seconds": round(time.monotonic() - start, 1)}
        if part == "tests" and file.exists():
            suite = xml.etree.ElementTree.parse(file).getroot()[0]
            counts = {key: int(suite.get(key, 0)) for key in ("tests", "failures", "errors", "skipped")}
            failed = counts["failures"] + counts["errors"]
            return (
                taken
                | {"passed": counts["tests"] - failed - counts["skipped"], "failed": failed}
                | {"skipped": counts["skipped"]}
            )
        if done.returncode:
            print(f"{part}: ended with status {done.returncode}")
            return None
        if part == "demo":
            rows = (Path(folder) / "demo" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
            return taken | {"top1_error": json.loads(rows[-1])["val"]["top1_error"]}
        return taken | {
            "command": command[1:],
            "tables": json.loads(file.read_text(encoding="utf-8"))["tables"],
        }


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
    run_command(main)
