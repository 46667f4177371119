"""CIFAR-10 and CIFAR-100 through torchvision: downloaded once, with the hash of every file checked."""

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
    """Return the 50,000 training or 10,000 test ("val") images of `name`, cifar10 or cifar100."""
    from torchvision import datasets  # imports torch

    reader = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[name]
    folder = Path(root).expanduser()
    remedy = f"get {reader.url}, put {reader.filename} into {folder} and start again"
    try:
        if download:
            folder.mkdir(parents=True, exist_ok=True)
            download = os.access(folder, os.W_OK)  # a complete read-only copy is fine
        with _timeout():
            images = reader(folder, train=split == "train", download=download)
    except RuntimeError:  # torchvision: files are missing, or have another hash
        raise UserError(
            f"data.dir {folder}: {name} is missing or damaged "
            f"(the hash of {reader.base_folder} or {reader.filename} differs); "
            f"delete it and set data.download=true, or {remedy}"
        ) from None
    except (OSError, EOFError) as error:  # urllib's errors are OSErrors
        raise UserError(f"data.dir {folder}: {name} could not be downloaded ({error}); {remedy}") from None
    return ArrayDataset(images.data, np.array(images.targets), tuple(images.classes))


@contextlib.contextmanager
def _timeout() -> Iterator[None]:
    """Set a timeout for connections opened without one, as torchvision's are."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(TIMEOUT)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)
