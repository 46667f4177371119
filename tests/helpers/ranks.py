"""What one rank is given and sees: pretend to be a rank, or watch the training steps of a real one."""

import contextlib
import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from run_files import digest

from resnext.batch_plan import local_indices
from resnext.config import TrainConfig
from resnext.engine import evaluator, trainer


@contextlib.contextmanager
def as_rank(rank: int, ranks: int) -> Iterator[None]:
    """Let this process pretend to be one of several, which a plan of the batch or a resume asks for."""
    with (
        mock.patch.multiple("resnext.batch_plan", rank=lambda: rank, world_size=lambda: ranks),
        mock.patch("resnext.engine.resume.world_size", lambda: ranks),
    ):
        yield


def share_of(train: TrainConfig, rank: int, ranks: int) -> Callable[[int], np.ndarray]:
    """Return the function (number of images → positions in the batch) that a rank's loader gets."""
    return as_rank(rank, ranks)(lambda images: local_indices(images, train))


def watch(
    rank: int, group: bool = False, images: str | None = None, stop: dict[str, Any] | None = None
) -> None:
    """Act inside a job's process, beside its work.

    `images`: a folder for the hashes of what each training step sees, one file per rank (see `seen_images`).
    `stop`: {"rank", "signal"} and "step" or "batch": that rank sends itself the signal before its training
    step or validation batch of this number. `group`: a single process also has the environment of torchrun.
    """

    def before_each(module: Any, name: str, act: Callable[..., None]) -> None:
        function, count = getattr(module, name), 0

        def wrapper(*arguments: Any) -> Any:
            nonlocal count
            count += 1
            act(count, *arguments)
            return function(*arguments)

        setattr(module, name, wrapper)

    def write(_: int, training: Any, pixels: Any, labels: Any, rate: float, total: int) -> None:
        hashes = [digest([image, label]) for image, label in zip(pixels, labels, strict=True)]
        row = {"step": training.progress.global_step, "lr": rate, "total": total, "images": hashes}
        with open(Path(images) / f"{rank}.jsonl", "a") as file:
            print(json.dumps(row), file=file)

    def send(count: int, *_: Any) -> None:
        if count == stop.get("step", stop.get("batch")):
            os.kill(os.getpid(), getattr(signal, stop["signal"]))

    if images:
        Path(images).mkdir(parents=True, exist_ok=True)
        before_each(trainer, "train_step", write)
    if stop and stop["rank"] == rank:
        before_each(*((trainer, "train_step") if "step" in stop else (evaluator, "sum_crops")), send)


def seen_images(folder: Path) -> list[dict[str, Any]]:
    """Return what the steps saw: {"step", "lr", "total", "images"}, the ranks' images one after another."""
    ranks = sorted(folder.glob("*.jsonl"), key=lambda path: int(path.stem))
    found = []
    for rows in zip(*([json.loads(line) for line in path.open()] for path in ranks), strict=True):
        images = [image for row in rows for image in row.pop("images")]
        assert all(row == rows[0] for row in rows)
        found.append(rows[0] | {"images": images})
    return found
