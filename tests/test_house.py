"""The size of the program, so that it does not grow unnoticed, and what is installed of it."""

import subprocess
import sys
import tomllib
from pathlib import Path

from commands import ROOT, tiny

SOURCES = sorted(
    [*ROOT.glob("*.py"), *(p for f in ("resnext", "data", "scripts") for p in (ROOT / f).rglob("*.py"))]
)
LINES, LONGEST, LOADED = 15_250, 400, 5_000  # of all sources, of one file, of what a training run loads


def lines(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


def test_the_program_does_not_grow(tmp_path):
    script = (
        "import sys, train\n"
        f"sys.argv[1:] = {['--config', 'demo.yaml', '--output', str(tmp_path / 'run'), *tiny()]!r}\n"
        "train.main()\n"
        "files = {getattr(m, '__file__', None) or '' for m in list(sys.modules.values())}\n"
        "print(*sorted(files), sep='\\n')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    printed = set(done.stdout.splitlines())
    loaded = sum(lines(path) for path in SOURCES if str(path) in printed)
    assert loaded > 3_000, "the list of modules was not printed"
    longest = max(SOURCES, key=lines)
    found = sum(map(lines, SOURCES)), lines(longest), loaded
    print(f"source lines {found[0]:,}, longest {longest.name} {found[1]}, of a training run {found[2]:,}")
    assert all(size <= limit for size, limit in zip(found, (LINES, LONGEST, LOADED), strict=True)), found


def test_all_of_the_library_is_installed():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    folders = {path.parent.relative_to(ROOT) for path in SOURCES if path.is_relative_to(ROOT / "resnext")}
    assert {".".join(folder.parts) for folder in folders} == set(project["tool"]["setuptools"]["packages"])
