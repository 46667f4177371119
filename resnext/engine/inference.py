"""A trained network on its device, as evaluation, prediction, and feature extraction run it."""

import argparse
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor
from tqdm import tqdm

from ..config import DataConfig, Precision
from ..device import (
    choose_precision,
    configure_backends,
    explain_out_of_memory,
    select_device,
    slow_precision,
)
from ..distributed import rank
from ..errors import UserError
from ..models.resnext import ResNeXt
from ..weights.load import WeightsInfo, check_classifier, load_weights, preprocessing
from .evaluator import EvalResult, PredictionCollector, Predictions, evaluate, promote_to_float32
from .train_state import autocast, memory_layout

ImageBatch = tuple[list[str], Tensor, list[str]]  # paths, normalized images, why others could not be read


@dataclass(frozen=True)
class InferenceSettings:
    """How to run a network: as its run did, or by these defaults if the weights are of no run."""

    precision: Precision = "fp32"
    batch_size: int = 256
    channels_last: bool | None = None
    deterministic: bool = False
    timeout: int = 600  # seconds that a rank waits for another

    @classmethod
    def of(cls, info: WeightsInfo) -> "InferenceSettings":
        """Return the settings of the run that the weights are from, or else the defaults."""
        if info.origin != "this program":
            return cls()
        train, run = info.config.train, info.config.run
        return cls(
            train.precision, train.eval_batch_size, train.channels_last, run.deterministic, run.timeout
        )


@dataclass(frozen=True)
class InferenceNetwork:
    """A network in evaluation mode on its device, with the precision and memory layout it runs in."""

    model: ResNeXt
    device: torch.device
    precision: Precision
    layout: torch.memory_format

    def autocast(self) -> AbstractContextManager:
        return autocast(self.device, self.precision)

    @torch.inference_mode()
    def logits(self, images: Tensor) -> Tensor:
        """Return the output, float32 (N, classes), for normalized images (N, 3, H, W) on the device."""
        with self.autocast():
            return promote_to_float32(self.model(images.to(memory_format=self.layout)))


def load_classifier(
    source: str, names: Iterable[str] | None, names_file: str | None
) -> tuple[ResNeXt, WeightsInfo]:
    """Load a network that has a last layer; `names` are the user's for its outputs, from `names_file`."""
    model, info = load_weights(source)
    check_classifier(info)
    if names is not None and names_file is not None:
        info = info.with_classes(tuple(names), names_file)
    return model, info


def to_inference(
    model: ResNeXt, settings: InferenceSettings, device_name: str, precision: Precision | None
) -> InferenceNetwork:
    """Move a network to its device at the given precision, or that of the settings; warn if that is slow."""
    device = select_device(device_name)
    precision = choose_precision(precision or settings.precision, device)
    if rank() == 0:
        for note in slow_precision(precision, device, "--precision "):
            print(note, file=sys.stderr)
    configure_backends(precision, settings.deterministic, training=False)
    layout = memory_layout(settings.channels_last, precision, device)
    with explain_out_of_memory(
        "--device: not enough memory for the network; close other programs, or use cpu"
    ):
        return InferenceNetwork(model.to(memory_format=layout).to(device), device, precision, layout)


def evaluate_batches(
    network: InferenceNetwork,
    batches: Iterable[tuple[Tensor, Tensor]],
    steps: int,
    batch_size: int,
    crops: int,
    columns: list[int] | None,
) -> tuple[EvalResult, Predictions]:
    """Evaluate over batches of (images, labels), `steps` in all, with a progress bar on rank 0."""
    recorder = PredictionCollector()
    bar = tqdm(batches, "evaluating", steps, leave=False, disable=None if rank() == 0 else True)
    explained = f"--batch-size: not enough memory for {batch_size} images with {crops} crops each; lower it"
    with explain_out_of_memory(explained):
        score = evaluate(
            network.model,
            bar,
            network.autocast,
            layout=network.layout,
            crops=crops,
            columns=torch.tensor(columns, device=network.device) if columns else None,
            recorder=recorder,
        )
        return cast(EvalResult, score), recorder.predictions()  # nothing stops the evaluation


def run_images(
    model: ResNeXt,
    info: WeightsInfo,
    paths: list[str],
    options: argparse.Namespace,
    make_batches: Callable[[list[str], DataConfig, int, torch.device], Iterable[ImageBatch]],
    broken: list[str],
    hide_bar: bool = False,
) -> Iterator[tuple[list[str], Tensor]]:
    """Return an iterator over (paths, logits) of batches of image files.

    `options` are those of `image_parser`, `make_batches` is unlabeled_batches of data/unlabeled_loader.py.
    If an image cannot be read, the reason is printed as a warning and added to `broken`.
    """
    if info.origin != "this program":
        print(preprocessing(info), file=sys.stderr)
    network = to_inference(model, InferenceSettings.of(info), options.device, options.precision)
    max_pixels = options.max_pixels or info.config.data.max_pixels
    data = replace(info.config.data, workers=options.workers, max_pixels=max_pixels)
    batches = make_batches(paths, data, options.batch_size, network.device)
    bar = tqdm(total=len(paths), unit=" images", leave=False, disable=hide_bar or None)
    return run_batches(network, batches, options.batch_size, broken, bar)


def run_batches(
    network: InferenceNetwork, batches: Iterable[ImageBatch], batch_size: int, broken: list[str], bar: tqdm
) -> Iterator[tuple[list[str], Tensor]]:
    with bar:
        for paths, images, problems in batches:
            for problem in problems:
                bar.write(f"warning: {problem}", file=sys.stderr)
            broken += problems
            if paths:
                with explain_out_of_memory(
                    f"--batch-size: not enough memory for {batch_size} images; lower it"
                ):
                    logits = network.logits(images)
                yield paths, logits
            bar.update(len(paths) + len(problems))


def check_all_read(broken: list[str], named: int) -> None:
    """Raise the closing UserError if some of the named images could not be read."""
    if broken:
        others = "; all others are done" if len(broken) < named else ""
        raise UserError(
            f"{len(broken):,} of {named:,} could not be read (see the warnings); replace or remove "
            f"them{others}"
        )
