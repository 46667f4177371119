"""Files that commands read and write: checked before the work, written completely or not at all."""

import contextlib
import os
import re
import shutil
import signal
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from .errors import UserError

RUN_FILES = ("config.yaml", "metrics.jsonl", "log.txt")
PUBLISHED = ("torchvision:", "timm:", "hf:")  # prefixes of names of weights that are downloaded


def is_published(source: str) -> bool:
    """Return whether weights are given by a name, not by a path."""
    return source.startswith(PUBLISHED)


def check_source(source: str) -> None:
    """Raise UserError if there is nothing that load_weights could read; does not import torch."""
    if not is_published(source) and not Path(source).expanduser().exists():
        raise no_such_weights(source)


def no_such_weights(source: str) -> UserError:
    """Return the error for a path that does not exist; it may be a hub's name without hf:."""
    name = re.fullmatch(r"(hf-hub:|https:/+huggingface\.co/|(?=timm/))(\w[\w.-]*/\w[\w.@-]*)", source)
    fix = f"did you mean hf:{name[2]}?" if name else "check the path"
    return UserError(f"{source}: no such run directory or file of weights; {fix}")


def check_target(option: str, path: Path, inputs: Iterable[str | Path] = ()) -> None:
    """Raise UserError before the work if the result cannot be written, or would replace an input."""
    if path.suffix in (".pt", ".pth", ".pyth", ".tar", ".t7") or path.name in RUN_FILES:
        raise UserError(f"{option} {path}: looks like a file of a run; choose another name for the result")
    if path.exists() and not path.is_file() and not path.is_dir():
        writable = os.access(path, os.W_OK)  # a pipe or device
    else:
        folder = path.resolve().parent
        writable = folder.is_dir() and not path.is_dir() and os.access(folder, os.W_OK | os.X_OK)
        writable = writable and (not path.exists() or os.access(path, os.W_OK))
    if not writable:
        raise UserError(f"{option} {path}: cannot be written; name a file in a folder that exists")
    if path.is_file() and any(os.path.exists(used) and path.samefile(used) for used in inputs):
        raise UserError(f"{option} {path}: is also an input; name another file for the result")


@contextlib.contextmanager
def whole_file(name: str, option: str = "") -> Iterator[Path]:
    """Yield another name to write to; the file gets its own once it is complete, and never before.

    A folder may be created under that name instead. A pipe or device is written to directly. SIGTERM removes
    what was written so far.
    """
    direct = Path(name).exists() and not Path(name).is_file()
    target = Path(name) if direct else Path(name).resolve()
    path = target if direct else target.with_name(f".{os.getpid()}.partial{target.suffix}")
    handler = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        yield path
        if not direct:
            for written in path.iterdir() if path.is_dir() else (path,):
                with open(written, "rb") as file:
                    os.fsync(file.fileno())
            os.replace(path, target)
    except OSError as error:
        raise UserError(
            f"{option} {name}: cannot be written ({error.strerror or error}); name another file".lstrip()
        ) from None
    finally:
        if not direct and path.is_dir():
            shutil.rmtree(path)
        elif not direct:
            path.unlink(missing_ok=True)
        signal.signal(signal.SIGTERM, handler)


def write_file(option: str, name: str, text: str) -> None:
    """Write a text file that appears complete or not at all."""
    with whole_file(name, option) as path:
        path.write_bytes(text.encode("utf-8", "surrogateescape"))


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
