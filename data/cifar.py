"""CIFAR-10 and CIFAR-100: torchvision's readers, downloaded once, every file's hash checked."""

import contextlib
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from resnext.errors import UserError

from .in_memory import ArrayDataset

TIMEOUT = 60.0  # seconds without a byte from the server


def read_set(name: str, root: str, split: str, download: bool) -> ArrayDataset:
    """The 50,000 training or 10,000 test pictures ("val") of `name`, cifar10 or cifar100."""
    from torchvision import datasets

    reader = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[name]
    folder = Path(root).expanduser()
    remedy = f"get {reader.url}, put {reader.filename} into {folder} and start again"
    try:
        if download:
            folder.mkdir(parents=True, exist_ok=True)
            if not os.access(folder, os.W_OK):
                download = False  # a read-only copy is fine as long as it is whole
        with _time_out():
            pictures = reader(folder, train=split == "train", download=download)
    except RuntimeError:  # torchvision: files missing, or their hash is not the known one
        raise UserError(
            f"data.dir {folder}: {name} is missing or damaged "
            f"(the hash of {reader.base_folder} or {reader.filename} differs); "
            f"delete it and set data.download=true, or {remedy}"
        ) from None
    except (OSError, EOFError) as error:  # urllib's errors are OSErrors
        raise UserError(f"data.dir {folder}: {name} cannot be fetched ({error}); {remedy}") from None
    return ArrayDataset(pictures.data, np.array(pictures.targets), tuple(pictures.classes))


@contextlib.contextmanager
def _time_out() -> Iterator[None]:
    """A time-out for connections that are opened without one, as torchvision's are."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(TIMEOUT)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)
