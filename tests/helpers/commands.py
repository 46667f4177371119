"""Run command lines in a new process or, faster, inside this one; tiny runs and image folders for them."""

import contextlib
import hashlib
import io
import os
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import numpy as np
from PIL import Image

from resnext.errors import run_main

ROOT = Path(__file__).resolve().parents[2]

# A network of 20,000 parameters and 40 small images: an epoch has 3 steps and takes milliseconds.
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
    """Return the overrides of a tiny run; `train__epochs="3"` changes train.epochs, None removes a key."""
    settings = TINY | {name.replace("__", "."): value for name, value in changes.items()}
    return [f"{name}={value}" for name, value in settings.items() if value is not None]


def tiny_yaml(**changes: str) -> str:
    """Return the same settings as the text of a configuration file."""
    sections: dict[str, list[str]] = {}
    for setting in tiny(**changes):
        name, value = setting.split("=", 1)
        section, key = name.split(".")
        sections.setdefault(section, []).append(f"{key}: {value}")
    return "".join(f"{section}: {{{', '.join(keys)}}}\n" for section, keys in sections.items())


@dataclass(frozen=True)
class Result:
    """The outcome of a command line."""

    status: int
    output: str
    error: str


def run_script(script: str, *arguments: object, cwd: Path | str, **environment: str) -> Result:
    """Run `python SCRIPT arguments` in a new process; `script` is a path in the project."""
    return run_python(str(ROOT / script), *arguments, cwd=cwd, **environment)


def run_python(*arguments: object, cwd: Path | str, **environment: str) -> Result:
    """Run `python arguments` in a new process."""
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
    """Call the `main` of a command line in this process, through the same `run_main`.

    Exceptions other than UserError and SystemExit propagate: a user would see their traceback.
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
    """Return the hash and time of every file below `folder`, to detect changes.

    With `folders`, the result lists folders too, including empty ones.
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
    """Return the one `error: …` message that bad input must end with, after checks of its form."""
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


def refused(folder: Path, main: Callable[[], object], *arguments: object) -> str:
    """Return the message of a command that must fail and leave every file below `folder` unchanged."""
    before = snapshot(folder)
    text = message(call(main, *arguments))
    assert snapshot(folder) == before
    return text


def expect(text: str, fragments: Iterable[str]) -> None:
    """Assert that a message has all fragments."""
    for fragment in fragments:
        assert fragment in text, f"{fragment!r} is not in: {text}"


def draw_folders(root: Path, classes: dict[str, int], size: int = 8) -> Path:
    """Write noise PNGs, `classes` of them per class folder, to train/ and val/; return `root`."""
    generator = np.random.default_rng(0)
    for split in ("train", "val"):
        for name, count in classes.items():
            (root / split / name).mkdir(parents=True)
            for number in range(count):
                noise = generator.integers(0, 256, (size, size, 3), np.uint8)
                Image.fromarray(noise).save(root / split / name / f"{number}.png")
    return root
