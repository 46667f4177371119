"""The cache of file lists: reading the names of 1.28 million files, or of images in shards, takes minutes.

A list is valid until a folder below, or a shard, changes its modification time, as a folder does if files
are added, removed, or renamed. A list of what changed just before is not stored: it could change again
within the clock's tick.
"""

import contextlib
import hashlib
import os
import time
import zipfile
from pathlib import Path

import numpy as np

from .walk import EXTENSIONS, SYSTEM_NAMES, to_bytes, to_text

TICK = 3 * 10**9  # nanoseconds; the coarsest clock of common file systems ticks every 2 seconds

Arrays = dict[str, np.ndarray]  # what a list consists of, by name


def _cache_file(folder: Path) -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    name = hashlib.sha256(os.fsencode(folder.resolve())).hexdigest()[:24]
    return Path(base) / "resnext" / f"{name}.npz"


def _header(folder: Path, classes: tuple[str, ...]) -> np.ndarray:
    """Return a hash of the split, its classes and this version's rules for files."""
    rules = [*EXTENSIONS, *map(to_text, sorted(SYSTEM_NAMES))]
    return np.array(hashlib.sha256(to_bytes("/".join([folder.name, *classes, *rules]))).hexdigest())


def cached(folder: Path, classes: tuple[str, ...], names: tuple[str, ...]) -> Arrays | None:
    """Return the arrays `names` of the stored list, or None if there is none or a folder has changed.

    The `classes` must be those that it was stored with: class names, or the names of the shards.
    """
    try:
        with np.load(_cache_file(folder), allow_pickle=False) as stored:
            if stored["classes"] != _header(folder, classes):
                return None
            for directory, changed in zip(stored["directories"], stored["changed"], strict=True):
                if os.stat(os.fsdecode(directory)).st_mtime_ns != changed:
                    return None
            return {name: stored[name] for name in names}
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, RuntimeError):
        return None


def remember(folder: Path, classes: tuple[str, ...], arrays: Arrays, directories: dict[bytes, int]) -> None:
    """Store a list. `directories` are all folders or shards, with their times from before they were read."""
    if max(directories.values()) > time.time_ns() - TICK:
        return
    with contextlib.suppress(OSError, RuntimeError):  # training works without the cache
        target = _cache_file(folder)
        temporary = target.with_name(f".{target.name}.{os.getpid()}")
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(temporary, "wb") as file:
                np.savez(
                    file,
                    classes=_header(folder, classes),
                    directories=np.array(list(directories)),
                    changed=np.array(list(directories.values())),
                    allow_pickle=False,
                    **arrays,
                )
            os.replace(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)
