"""Measure speed: interleaved variants, medians, ratios to the first of each table.

    python scripts/benchmark.py input        batches held on the device against a per-picture PIL loader
    python scripts/benchmark.py batchnorm    a training step with BatchNorm groups of 16 against plain ones
    python scripts/benchmark.py layout       a training step per precision and memory layout

--json FILE writes the figures with hardware and versions. Nothing is asserted: machines are noisy.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from data.images import ImageSet
from data.loader import TrainBatches
from resnext.config import Config, parse_config, to_yaml
from resnext.distributed import choose_device, set_numerics
from resnext.errors import UserError, run_command
from resnext.reporting import environment
from resnext.state import prepare
from resnext.trainer import train_step

RECIPE = (
    "model.stem=cifar",
    "data.dataset=cifar10",
    "data.dir=unused",
    "augment.padding=4",
    "train.batch_size=128",
)


def main() -> None:
    summary, _, details = __doc__.partition("\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=details, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["input", "batchnorm", "layout"])
    parser.add_argument("--rounds", type=int, default=7, metavar="N", help="default: 7")
    parser.add_argument("--workers", type=int, default=2, metavar="N", help="of the PIL loader; default: 2")
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="default: 11 layers, 4x16d, batch 128"
    )
    arguments = parser.parse_intermixed_args()
    if arguments.rounds < 1 or arguments.workers < 1:
        raise UserError("--rounds and --workers: must be at least 1")
    small = ("model.depth=11", "model.cardinality=4", "model.base_width=16")
    config = parse_config("", "benchmark", [*RECIPE, *small, *arguments.overrides])
    device = choose_device(config.run.device)
    set_numerics(config.train.precision, config.run.deterministic)
    if arguments.what == "input":
        images, functions = input_variants(config, device, arguments.workers)
    else:
        images, functions = step_variants(arguments.what, config, device)
    seconds = interleave(functions, arguments.rounds, device)
    print_table(images, seconds)
    if arguments.json:
        result = {"benchmark": arguments.what, "environment": environment(device), "images": images}
        Path(arguments.json).write_text(json.dumps(result | {"seconds": seconds}, indent=2) + "\n")


def interleave(variants: dict[str, Callable], rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of each variant in each round, A B C A B C …, after one round to warm up."""
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for number in range(rounds + 1):
        for name, function in variants.items():
            start = time.perf_counter()
            function()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if number:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def print_table(images: int, seconds: dict[str, list[float]]) -> None:
    first = statistics.median(next(iter(seconds.values())))
    print(f"| variant | images/s (median of {len(next(iter(seconds.values())))}) | time, relative |")
    print("|---|---|---|")
    for name, values in seconds.items():
        median = statistics.median(values)
        print(f"| {name} | {images / median:,.0f} | {median / first:.3f} |")


class PerPicture(Dataset):
    """The usual way: one PIL picture at a time through torchvision's transforms."""

    def __init__(self, images: ImageSet, config: Config):
        self.images = images
        mean, std = (tuple(v / 255 for v in values) for values in (config.data.mean, config.data.std))
        self.transform = transforms.Compose(
            [
                transforms.RandomCrop(32, padding=4),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize(mean, std),
            ]
        )

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int):
        return self.transform(Image.fromarray(self.images.images[index])), self.images.labels[index]


def input_variants(config: Config, device: torch.device, workers: int) -> tuple[int, dict[str, Callable]]:
    """An epoch of 25,600 random 32x32 pictures, delivered to the device."""
    count = 25_600
    generator = np.random.default_rng(0)
    pictures = generator.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
    images = ImageSet(pictures, generator.integers(0, 10, count), tuple("0123456789"))
    ours = TrainBatches(images, config, device)

    def loader(workers: int) -> Callable:
        batches = DataLoader(
            PerPicture(images, config),
            config.train.batch_size,
            shuffle=True,
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=device.type == "cuda",
        )

        def run() -> None:
            for x, y in batches:
                x.to(device, non_blocking=True), y.to(device, non_blocking=True)

        return run

    return count, {
        "batches on the device": lambda: [None for _ in ours.epoch(1)],
        "PIL loader in process": loader(0),
        f"PIL loader, {workers} workers": loader(workers),
    }


def step_variants(what: str, config: Config, device: torch.device) -> tuple[int, dict[str, Callable]]:
    """Training steps on one batch of noise."""
    size = config.train.batch_size
    images = torch.randn(size, 3, config.data.image_size, config.data.image_size, device=device)
    labels = torch.arange(size, device=device) % 10
    if what == "batchnorm":
        changes = {
            f"{name}, {precision}": [f"train.precision={precision}", *groups]
            for precision in ("fp32", "bf16")
            for name, groups in (("plain BatchNorm", []), ("groups of 16", ["train.bn_group=16"]))
        }
    else:
        changes = {
            f"{precision}, {name}": [f"train.precision={precision}", f"train.channels_last={value}"]
            for precision in ("fp32", "bf16")
            for name, value in (("NCHW", "false"), ("channels_last", "true"))
        }

    def step(overrides: list[str]) -> Callable:
        varied = parse_config(to_yaml(config), "benchmark", overrides)
        training = prepare(varied, tuple("0123456789"), device, {})
        training.model.train()
        layout = torch.channels_last if "channels_last=true" in " ".join(overrides) else None
        x = images.contiguous(memory_format=layout) if layout else images
        return lambda: train_step(training, x, labels, 0.01)

    return size, {name: step(overrides) for name, overrides in changes.items()}


if __name__ == "__main__":
    run_command(main)
