"""Files that commands read and write: checked before the work, written completely or not at all."""

import os
from pathlib import Path

from .errors import UserError

RUN_FILES = ("config.yaml", "metrics.jsonl", "log.txt")


def check_source(source: str) -> None:
    """Raise UserError if there is nothing that load_weights could read; does not import torch."""
    if not source.startswith("torchvision:") and not Path(source).expanduser().exists():
        raise UserError(f"{source}: no such run directory or file of weights; check the path")


def check_target(option: str, path: Path) -> None:
    """Raise UserError if a result cannot be written to `path`, or would replace a file of a run."""
    if path.suffix in (".pt", ".pth", ".pyth", ".tar", ".t7") or path.name in RUN_FILES:
        raise UserError(f"{option} {path}: has the name of a run file; choose another name for the result")
    if path.exists() and not path.is_file() and not path.is_dir():
        writable = os.access(path, os.W_OK)  # a pipe or device
    else:
        folder = path.resolve().parent
        writable = folder.is_dir() and not path.is_dir() and os.access(folder, os.W_OK | os.X_OK)
        writable = writable and (not path.exists() or os.access(path, os.W_OK))
    if not writable:
        raise UserError(f"{option} {path}: cannot be written; name a file in a folder that exists")


def write_file(option: str, name: str, text: str) -> None:
    """Write a result to the file, pipe, or device that an option names; raise UserError if that fails."""
    path, content = Path(name), text.encode("utf-8", "surrogateescape")
    try:
        if path.exists() and not path.is_file():  # a pipe or device
            path.write_bytes(content)
        else:
            atomic_write(path.resolve(), content)
    except OSError as error:
        raise UserError(f"{option} {name}: cannot be written ({error.strerror}); name another file") from None


def atomic_write(path: Path, content: bytes) -> None:
    """Write and sync a temporary file, then rename it: `path` is never incomplete."""
    temporary = path.with_name(f".{os.getpid()}.partial")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
