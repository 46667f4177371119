"""Command lines as a user types them, in a new process or quickly inside this one; tiny runs and pictures."""

import contextlib
import hashlib
import io
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import numpy as np
from PIL import Image

from resnext.errors import run_main

ROOT = Path(__file__).resolve().parents[2]

# A network of 20,000 parameters and a set of 40 small pictures: an epoch of 3 steps, in milliseconds.
TINY = {
    "model.stem": "cifar",
    "model.depth": "11",
    "model.cardinality": "1",
    "model.base_width": "1",
    "model.shortcut": "A",
    "data.dataset": "glyphs",
    "data.image_size": "8",
    "data.train_images": "40",
    "data.val_images": "20",
    "augment.padding": "1",
    "train.epochs": "2",
    "train.batch_size": "16",
    "optimizer.lr": "0.01",
    "run.device": "cpu",
    "run.tensorboard": "false",
}


def tiny(**changes: str) -> list[str]:
    """Overrides of a tiny run; `train__epochs="3"` changes train.epochs, None leaves a key out."""
    settings = TINY | {name.replace("__", "."): value for name, value in changes.items()}
    return [f"{name}={value}" for name, value in settings.items() if value is not None]


def tiny_yaml(**changes: str) -> str:
    """The same settings as the text of a configuration file."""
    sections: dict[str, list[str]] = {}
    for setting in tiny(**changes):
        name, value = setting.split("=", 1)
        section, key = name.split(".")
        sections.setdefault(section, []).append(f"{key}: {value}")
    return "".join(f"{section}: {{{', '.join(keys)}}}\n" for section, keys in sections.items())


@dataclass(frozen=True)
class Result:
    """How a command line ended."""

    status: int
    output: str
    error: str


def run_script(script: str, *arguments: object, cwd: Path | str, **environment: str) -> Result:
    """`python SCRIPT arguments` in a new process; `script` is a file name of the project's root."""
    return run_python(str(ROOT / script), *arguments, cwd=cwd, **environment)


def run_python(*arguments: object, cwd: Path | str, **environment: str) -> Result:
    """`python arguments` in a new process."""
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=cwd,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=300,
        stdin=subprocess.DEVNULL,
    )
    return Result(done.returncode, done.stdout, done.stderr)


def call(main: Callable[[], object], *arguments: object) -> Result:
    """A command line's `main` with these arguments in this process, through the same `run_command`.

    Anything but a UserError or an exit propagates, as the traceback it would be.
    """
    output, error = io.StringIO(), io.StringIO()
    status = 0
    with (
        mock.patch.object(sys, "argv", ["program", *map(str, arguments)]),
        contextlib.redirect_stdout(output),
        contextlib.redirect_stderr(error),
    ):
        try:
            run_main(main)
        except SystemExit as stop:
            status = stop.code
    return Result(status, output.getvalue(), error.getvalue())


def snapshot(folder: Path, folders: bool = False) -> dict[str, str]:
    """Hash and time of every file below `folder`, to tell whether anything was touched.

    With `folders`, folders are listed too, empty ones included.
    """
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
            found[str(path.relative_to(folder))] = f"{digest} {path.stat().st_mtime_ns}"
        elif folders:
            found[str(path.relative_to(folder))] = "folder"
    return found


def message(result: Result) -> str:
    """The one `error: …` message that bad input must end with, checked for its form."""
    assert result.status == 2, f"status {result.status}\n{result.output}\n{result.error}"
    assert "Traceback" not in result.error
    assert result.error.startswith("error: "), result.error
    assert result.error.endswith("\n")
    text = result.error.removeprefix("error: ").removesuffix("\n")
    assert text.strip() == text
    assert "\n" not in text, "more than one line"
    assert "error: " not in text.lower(), "more than one message"
    assert 20 <= len(text) <= 500, "too short to help or too long to read"
    return text


def draw_folders(root: Path, classes: dict[str, int], size: int = 8) -> Path:
    """train/ and val/ with so many PNGs of noise for each class; returns `root`."""
    generator = np.random.default_rng(0)
    for split in ("train", "val"):
        for name, count in classes.items():
            (root / split / name).mkdir(parents=True)
            for number in range(count):
                noise = generator.integers(0, 256, (size, size, 3), np.uint8)
                Image.fromarray(noise).save(root / split / name / f"{number}.png")
    return root
