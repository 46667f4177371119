"""Small training runs on several ranks."""

import hashlib
from pathlib import Path
from typing import Any

from torchrun import Ended, Processes

STEPS = 9  # of an epoch; the last has 18 images


def settings(**more: object) -> list[str]:
    """Return the overrides of a small run."""
    values = {
        "model.cardinality": 4,
        "model.base_width": 4,
        "data.train_images": 210,
        "data.val_images": 101,
        "data.image_size": 16,
        "train.batch_size": 24,
        "train.epochs": 3,
        "train.precision": "fp32",
        "train.eval_batch_size": 4,
        "run.device": "cpu",
        "run.deterministic": "true",
        "run.log_interval": 2,
        "run.tensorboard": "false",
        "run.timeout": 60,
    } | {name.replace("__", "."): value for name, value in more.items()}
    return [f"{name}={value}" for name, value in values.items()]


def settings_of(precision: str = "fp32", ema: str = "null", accumulation: int = 1) -> list[str]:
    return settings(train__precision=precision, train__ema_decay=ema, train__accumulation_steps=accumulation)


def on_files(images: Path) -> list[str]:
    """Return the overrides of a run on 101 JPEG files, read by workers: 5 steps per epoch."""
    files = {"dataset": "folder", "dir": images, "pipeline": "fast", "workers": 1}
    files |= {"train_images": "null", "val_images": "null"}
    augment = {"mirror": 0.5, "padding": 0, "mixup": 0.2, "cutmix": 1.0, "erasing": 0.3, "repeats": 2}
    changes = {f"data__{key}": value for key, value in files.items()}
    changes |= {f"augment__{key}": value for key, value in augment.items()}
    return settings(run__log_interval=1, **changes)


def command(output: Path, *more: object) -> list[object]:
    return ["--config", "demo.yaml", "--output", output, *more]


class Runs:
    """Runs of several ranks; those that were never stopped are made once."""

    def __init__(self, processes: Processes, folder: Path):
        self.processes, self.folder = processes, folder
        self.ended: dict[Path, Ended] = {}

    def start(self, ranks: int, output: Path, *more: object, **options: Any) -> Ended:
        return self.processes.run(ranks, "train", *command(output, *more), **options)

    def train(self, ranks: int, output: Path, *more: object, **options: Any) -> Ended:
        return self.start(ranks, output, *more, **options).finished()

    def whole(self, ranks: int, overrides: list[str]) -> Path:
        """Return the directory of a run that was never stopped, to be looked at only."""
        output = self.folder / hashlib.sha256(repr((ranks, overrides)).encode()).hexdigest()[:16]
        if output not in self.ended:
            self.ended[output] = self.train(ranks, output, *overrides)
        return output
