"""Files that commands read and write: checked before the work, written whole or not at all."""

import os
from pathlib import Path

from .errors import UserError

RUN_FILES = ("config.yaml", "metrics.jsonl", "log.txt")


def check_source(source: str) -> None:
    """A UserError where load_weights has nothing to look at; costs no import of torch."""
    if not source.startswith("torchvision:") and not Path(source).expanduser().exists():
        raise UserError(f"{source}: no such run directory or file of weights; check the path")


def check_target(option: str, path: Path) -> None:
    """A UserError now rather than after the work when the result cannot be written, or must not be."""
    if path.suffix in (".pt", ".pth", ".pyth", ".tar", ".t7") or path.name in RUN_FILES:
        raise UserError(f"{option} {path}: is called as a file of a run; name another file for the result")
    if path.exists() and not path.is_file() and not path.is_dir():
        writable = os.access(path, os.W_OK)  # a pipe or device
    else:
        folder = path.resolve().parent
        writable = folder.is_dir() and not path.is_dir() and os.access(folder, os.W_OK | os.X_OK)
        writable = writable and (not path.exists() or os.access(path, os.W_OK))
    if not writable:
        raise UserError(f"{option} {path}: cannot be written; name a file in a folder that exists")


def write_file(option: str, name: str, text: str) -> None:
    """Write a file under another name first: what stood there stays until the new one is whole."""
    path, content = Path(name), text.encode("utf-8", "surrogateescape")
    try:
        if path.exists() and not path.is_file():  # a pipe or device
            path.write_bytes(content)
            return
        path = path.resolve()
        temporary = path.with_name(f".{os.getpid()}.partial")
        try:
            with open(temporary, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"{option} {name}: cannot be written ({error.strerror}); name another file") from None
