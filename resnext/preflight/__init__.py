"""What train.py --check verifies before a run: data, disk, memory, learning rates, time.

It finds failures that would otherwise surface hours into a run, and writes no file. All ranks call the same
checks in the same order, and rank 0 prints.
"""

import os
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist

from ..batch_plan import check_last_batch, check_world_size
from ..classes import USUAL_CLASSES
from ..config import Config
from ..device import choose_precision, configure_backends, explain_step_errors, select_device
from ..distributed import all_gather_objects, broadcast_from_rank0, rank, world_size
from ..engine.logger import environment
from ..engine.resume import Start, make_training, read_start
from ..engine.run_directory import resume_source
from ..engine.train_state import TrainState
from ..engine.trainer import TrainLoader, ValLoader
from ..errors import UserError
from ..weights.load import LuaCheckpoint
from . import checks, measure
from .checks import CheckResult, Dataset
from .measure import CollectiveError, DataTimings, LoaderTiming

T = TypeVar("T")
Datasets = tuple[Dataset, Dataset, str]  # training set, validation set, fingerprint
Loaders = tuple[TrainLoader, ValLoader]
MakeBatches = Callable[..., Loaders]  # data.training.make_batches


class CheckReport:
    """The results so far, the same on all ranks; rank 0 prints each as it comes."""

    def __init__(self) -> None:
        self.results: list[CheckResult] = []

    def add(self, *own: CheckResult | None) -> None:
        """Print the results of this rank, and what is wrong on others; nothing is printed twice."""
        for number, results in enumerate(all_gather_objects(own)):
            for result in filter(None, results):
                if (number and result.kind == "ok") or result in self.results:
                    continue
                self.results.append(result)
                self.print(f"{result.kind:<8} {f'rank {number}: ' if number else ''}{result.text}")

    def attempt(self, function: Callable[[], T]) -> T | None:
        """Return what `function` returns; add its UserError to the report and return None.

        `function` may wait for other ranks only if its errors are those of all ranks.
        """
        value, problem = None, None
        try:
            value = function()
        except CollectiveError:
            raise
        except UserError as error:
            problem = CheckResult("error", str(error))
        self.add(problem)
        return value

    def finish(self, command: str) -> int:
        """Print the last line; return the exit status: 0, or 2 after an error."""
        kinds = [result.kind for result in self.results]
        errors, warnings = kinds.count("error"), kinds.count("warning")
        counts = f"{checks.count(errors, 'error')}, {checks.count(warnings, 'warning')}"
        advice = "fix the errors, then check again" if errors else f"start with: {command}"
        self.print(f"{'not ready' if errors else 'ready'}: {counts}; {advice}")
        return 2 if errors else 0

    def print(self, text: str) -> None:
        if rank() == 0:
            print(" ".join(text.splitlines()), flush=True)


def check(
    config: Config,
    output: Path,
    resume: str | None,
    load_sets: Callable[[Config, Start], Datasets],
    make_batches: MakeBatches,
) -> int:
    """Try everything that a run needs, without training; return the exit status.

    `resume` is --resume; the last two are functions of data.training.
    """
    device = select_device(config.run.device)
    report = CheckReport()

    def find_start() -> tuple[Path | None, Config, Start, list[str]]:
        source = broadcast_from_rank0(lambda: resume_source(resume, output))
        return source, *read_start(config, source, device)

    found = report.attempt(find_start)
    source, config, start, notes = found or (None, config, None, [])
    precision = choose_precision(config.train.precision, device)
    config = replace(config, train=replace(config.train, precision=precision))
    configure_backends(precision, config.run.deterministic)
    sets = report.attempt(lambda: load_present(report, config, lambda config: load_sets(config, start)))
    data = check_data(report, config, sets, make_batches, device) if sets else DataTimings()
    classes = sets[0].classes if sets else placeholder_classes(config, start)
    if found:
        action = f"resuming from {source}" if source else "starting a new run"
        report.add(CheckResult("ok", f"output: {output}, {action}"))
    report.add(
        report.attempt(lambda: broadcast_from_rank0(lambda: checks.disk(config, len(classes), output)))
    )
    versions = environment(device) | {"data": sets[2] if sets else "unknown"}

    def build() -> tuple[TrainState, list[str]]:
        with explain_step_errors(config, device, measure.rank_error()):
            return make_training(config, classes, data.images, device, versions, source, start)

    training, changes = report.attempt(build) or (None, [])
    report.add(*checks.warnings(line for line in notes + changes if line.startswith(checks.WARNING)))
    check_training(report, config, training, data, device)
    return report.finish(start_command(sys.argv[1:]))


def start_command(arguments: Sequence[str]) -> str:
    """Return the command line of the check without --check, which starts the training."""
    # argparse accepts --che for --check; --c could also be --config.
    kept = [word for word in arguments if not (len(word) > 3 and "--check".startswith(word))]
    program = ["python"]
    if dist.is_initialized():
        nodes, processes = int(os.environ.get("GROUP_WORLD_SIZE", "1")), os.environ["LOCAL_WORLD_SIZE"]
        program = ["torchrun", *([f"--nnodes={nodes}"] if nodes > 1 else []), f"--nproc-per-node={processes}"]
    return shlex.join([*program, "train.py", *kept])


def load_present(report: CheckReport, config: Config, load: Callable[[Config], Datasets]) -> Datasets | None:
    """Load the datasets without downloading; if a download is missing, add a warning and return None."""
    data = config.data
    try:
        return load(replace(config, data=replace(data, download=False)))
    except UserError:
        if not (data.download and data.dir and data.dataset.startswith("cifar")):
            raise
    text = f"data.dir {data.dir}: {data.dataset} is missing or incomplete, and the training will download it"
    report.add(CheckResult("warning", f"{text}; give --data DIR to check existing images now"))
    return None


def placeholder_classes(config: Config, start: object) -> tuple[str, ...]:
    """Return names for the expected number of classes, for checks without data."""
    if isinstance(start, dict):
        return tuple(start["classes"])
    if isinstance(start, LuaCheckpoint):
        return tuple(map(str, range(len(start.model.state_dict()["fc.weight"]))))
    usual = len(config.data.characters or "") or USUAL_CLASSES[config.data.dataset]
    return tuple(map(str, range(config.model.classes or usual)))


def check_data(
    report: CheckReport, config: Config, sets: Datasets, make_batches: MakeBatches, device: torch.device
) -> DataTimings:
    """Check both datasets, the first batches of their loaders, and that all validation files decode."""
    train_set, val_set, _ = sets
    report.add(*checks.datasets(config, train_set, val_set))
    report.add(*checks.warnings([*train_set.notes, *val_set.notes]))
    try:
        check_world_size(config.train, world_size())
    except UserError:  # reported when the network is built
        config = replace(config, train=replace(config.train, bn_group=None))
    skipped: list[str] = []

    def make_loaders() -> tuple[Loaders, CheckResult | None]:
        arguments = (train_set, val_set, device, skipped.append)
        try:
            return make_batches(config, *arguments), None
        except UserError as error:  # perhaps too little shared memory: read the images without workers
            without = replace(config, data=replace(config.data, workers=0))
            return make_batches(without, *arguments), CheckResult("error", str(error))

    loaders, shortage = report.attempt(make_loaders) or ((None, None), None)

    def first_batch(name: str, loader: TrainLoader | ValLoader | None) -> LoaderTiming | None:
        timing = report.attempt(lambda: measure.time_loader(loader, device) if loader else None)
        report.add(checks.first_batch(name, timing, config) if timing else None)
        return timing

    timings = first_batch("training", loaders[0]), first_batch("validation", loaders[1])
    in_memory = config.data.pipeline == "memory"
    if not in_memory:
        batches = report.attempt(lambda: loaders[1] and sum(1 for _ in loaders[1]))
        if all(all_gather_objects(batches)):  # each rank has decoded its share of the files
            report.add(CheckResult("ok", f"validation files: all {len(val_set):,} can be decoded"))
    report.add(*checks.warnings(skipped[-1:]))  # the last one has the total
    workers = max((timing.workers for timing in timings if timing), default=0)
    report.add(shortage or (checks.shared_memory(workers) if workers else None))
    # Without a reference to loaders of files, their workers end here.
    return DataTimings(len(train_set), timings[0], timings[1], loaders if in_memory else None)


def check_training(
    report: CheckReport,
    config: Config,
    training: TrainState | None,
    data: DataTimings,
    device: torch.device,
) -> None:
    """Check steps of a `training` built for that, the collectives, the learning rates, and the time."""
    images, batch_size = data.images, config.train.batch_size
    step, val_seconds = None, None
    if training:
        if images:
            report.attempt(lambda: check_last_batch(config, images, world_size()))
        total = min(batch_size, images or batch_size)
        batch = data.training[:2] if data.training else measure.random_batch(training, total)
        # Without a collective first: a rank that ran out of memory inside one would keep the others waiting.
        loss = report.attempt(lambda: measure.try_micro_batch(training, *batch, total))
        losses = all_gather_objects(loss)  # on every rank
        if loss is not None and None not in losses:
            step = report.attempt(lambda: measure.measure_step(training, *batch, total))
            report.add(step and checks.step(step, loss, total, data.training is not None))
        val_seconds = report.attempt(
            lambda: data.validation and measure.measure_validation(training, data.validation.images)
        )
    if dist.is_initialized():
        report.add(checks.ranks(training, device, images is not None))
    report.add(checks.learning_rates(config, -(-images // batch_size) if images else 100))
    left = config.train.epochs - (training.progress.epoch - 1 if training else 0)
    report.add(checks.remaining_time(left, data, step, val_seconds))
