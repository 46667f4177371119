"""Pictures without labels, as a command line names them: which files, and batches of them on the device.

They are read, decoded, cropped and resized as in evaluation, so that they get the scores that they get there.
A broken file stops nothing: it is left out, and why is told.
"""

import glob
import os
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from resnext.config import DataConfig
from resnext.errors import UserError

from .decode import check_decoder, decode
from .image_folder import resize_and_center_crop
from .walk import FORMATS, is_hidden, left_out, walk

LARGEST_FILE = 1 << 30  # bytes; what is larger is not read

# ---------------------------------------------------------------------------- which files


def find_images(names: Iterable[str], lines: Iterable[bytes]) -> tuple[list[str], list[str], list[str]]:
    """(paths of files, what could not be found, warnings), each picture once, in the order of `names`.

    A name is a file, a folder (all pictures below it, sorted by path), a pattern such as "DIR/*.jpg"
    (sorted), or "-" for the names in `lines`. Raises UserError where there is no picture at all.
    """
    found: dict[str, None] = {}
    problems: list[str] = []
    notes: list[str] = []
    for name in expand(names, lines, problems):
        if os.path.isdir(name):
            below = walk([os.fsencode(name)])
            inside = list(map(os.fsdecode, below.pictures[0]))
            notes += left_out(below, name)
            for path, error in below.unreadable.items():
                problems.append(f"{os.fsdecode(path)}: cannot be read ({error.strerror})")
            if not inside and not below.unreadable:
                problems.append(f"{name}: holds no pictures ({FORMATS})")
            found |= dict.fromkeys(inside)
        elif os.path.isfile(name):
            found[name] = None
        else:
            problems.append(
                f"{name}: {'is not a file' if os.path.lexists(name) else 'no such file or folder'}"
            )
    if not found:
        others = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        what = problems[0] + others if problems else "-: standard input names no file"
        raise UserError(
            f"{what}; name pictures, folders, quoted patterns, or - for names from standard input"
        )
    return list(found), problems, notes


def expand(names: Iterable[str], lines: Iterable[bytes], problems: list[str]) -> Iterator[str]:
    """The names of files and folders that patterns and "-" stand for."""
    for name in names:
        if name == "-":
            yield from (os.fsdecode(line.rstrip(b"\r\n")) for line in lines if line.strip())
            continue
        path = os.path.expanduser(name)
        if os.path.lexists(path) or not glob.has_magic(path):
            yield path
            continue
        matches = sorted(glob.glob(path, recursive=True))
        matches = [match for match in matches if not is_hidden(os.path.basename(os.fsencode(match)))]
        if not matches:
            problems.append(f"{name}: matches no file")
        yield from matches


# ---------------------------------------------------------------------------- batches
# torch takes seconds to import, and finding files is to be immediate: hence the imports inside.


class Batch(NamedTuple):
    """The pictures that could be read, normalised float32 (N, 3, S, S), and why others could not."""

    paths: list[str]
    images: Any
    problems: list[str]


def unlabeled_batches(paths: list[str], data: DataConfig, batch_size: int, device: Any) -> Iterator[Batch]:
    """All pictures in their order, `batch_size` at a time; no more than a few batches are held.

    `data` says how they are prepared (pipeline, image_size, resize, mean, std) and by how many workers.
    """
    from .augment import normalize
    from .loaders import pixel_statistics
    from .workers import make_loader, prefetch_to_device

    if data.pipeline != "memory":
        check_decoder(data.decoder)
    tasks = [paths[start : start + batch_size] for start in range(0, len(paths), batch_size)]
    workers = data.workers
    if workers is None:  # without a GPU, the network has a use for the cores
        workers = len(os.sched_getaffinity(0)) // (1 if device.type == "cuda" else 4)
    workers = min(workers, len(tasks)) if len(tasks) > 1 else 0  # a single batch is sooner done here
    load = partial(load_images, data)
    size = min(batch_size, len(paths))
    loader = make_loader(load, tasks, replace(data, workers=workers), size, data.image_size, device, False)
    statistics = pixel_statistics(data, device)
    for names, batch in zip(tasks, prefetch_to_device(loader, device), strict=True):
        read = [name for name, problem in zip(names, batch.skipped, strict=True) if not problem]
        yield Batch(read, normalize(batch.images, *statistics), list(filter(None, batch.skipped)))


def load_images(data: DataConfig, paths: list[str]) -> Any:
    """A loader.HostBatch, in a worker; `skipped` has an entry for each path, empty where it was read."""
    from .workers import WorkerBatch, collate_images

    images, problems = [], []
    for path in paths:
        try:
            images.append(load_image(path, data))
            problems.append("")
        except UserError as error:
            problems.append(str(error))
    return WorkerBatch(collate_images(images, data.image_size), skipped=tuple(problems))


def load_image(path: str, data: DataConfig) -> np.ndarray:
    """What evaluation makes of a file: (S, S, 3), uint8 or (torch7) float32, in 0...255."""
    from .transforms import eval_images

    try:
        if os.path.getsize(path) > LARGEST_FILE:
            raise UserError(f"{path}: over 1 GiB, too large for a picture")
        with open(path, "rb", buffering=0) as file:
            content = file.read()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    if data.pipeline == "memory":
        return np.array(
            resize_and_center_crop(decode(content, path, max_pixels=data.max_pixels), data.image_size)
        )
    return eval_images(content, path, data, ten=False)[0]
