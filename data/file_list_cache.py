"""The cache of file lists: reading the names of 1.28 million files takes minutes on some disks.

A list is valid while no folder below it has changed its modification time, which adding, removing and
renaming files does. A folder that had changed just before it was listed could change again within the
clock's tick, so such a list is not kept.
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


def _place(folder: Path) -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    name = hashlib.sha256(os.fsencode(folder.resolve())).hexdigest()[:24]
    return Path(base) / "resnext" / f"{name}.npz"


def _header(folder: Path, classes: tuple[str, ...]) -> np.ndarray:
    """Of lists of train/ or val/ made for these classes by the rules of this version."""
    rules = [*EXTENSIONS, *map(to_text, sorted(SYSTEM_NAMES))]
    return np.array(hashlib.sha256(to_bytes("/".join([folder.name, *classes, *rules]))).hexdigest())


def cached(folder: Path, classes: tuple[str, ...]) -> tuple[np.ndarray, np.ndarray, tuple[str, ...]] | None:
    """(paths, labels, warnings) as they were remembered, None where there is nothing or it has changed."""
    try:
        with np.load(_place(folder), allow_pickle=False) as stored:
            if stored["classes"] != _header(folder, classes):
                return None
            for directory, changed in zip(stored["directories"], stored["changed"], strict=True):
                if os.stat(os.fsdecode(directory)).st_mtime_ns != changed:
                    return None
            return stored["paths"], stored["labels"], tuple(map(to_text, stored["notes"].tolist()))
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, RuntimeError):
        return None


def remember(
    folder: Path,
    classes: tuple[str, ...],
    paths: np.ndarray,
    labels: np.ndarray,
    notes: tuple[str, ...],
    directories: dict[bytes, int],
) -> None:
    """Keep a list; `directories` are all folders below, with their times from before they were listed."""
    if max(directories.values()) > time.time_ns() - TICK:
        return
    with contextlib.suppress(OSError, RuntimeError):  # a cache that cannot be written is no harm
        place = _place(folder)
        temporary = place.with_name(f".{place.name}.{os.getpid()}")
        place.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(temporary, "wb") as file:
                np.savez(
                    file,
                    classes=_header(folder, classes),
                    paths=paths,
                    labels=labels,
                    notes=np.array([to_bytes(note) for note in notes], "S"),
                    directories=np.array(list(directories)),
                    changed=np.array(list(directories.values())),
                )
            os.replace(temporary, place)
        finally:
            temporary.unlink(missing_ok=True)
