"""What a training starts from (nothing, a checkpoint, weights, a Lua run) and its state at the start."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ..config import Config, parse_config
from ..device import choose_precision, slow_precision
from ..distributed import broadcast_from_rank0, local_rank0_first, world_size
from ..errors import UserError
from ..schedule import learning_rate
from .checkpoint import check_resume, read_latest
from .train_state import TrainProgress, TrainState, build_train_state, check_network, restore


def read_start(config: Config, source: Path | None, device: torch.device) -> tuple[Config, Any, list[str]]:
    """(configuration, what a training starts from, lines for the log).

    The configuration's precision is no longer `auto`: a run goes on with the one that it had. A training
    starts from a checkpoint's content, a LuaState, (network, Info) of pretrained weights, or None.
    """
    start, before, warnings = None, None, []
    if source is None:
        if config.model.pretrained:
            from ..weights.load import load_weights

            with local_rank0_first():  # which downloads what is missing
                start = load_weights(config.model.pretrained)
    elif source.suffix == ".t7":
        from ..weights.load import load_lua_run

        start = broadcast_from_rank0(lambda: load_lua_run(source.parent))
    else:
        start, warnings = broadcast_from_rank0(lambda: (read_latest(source, warnings.append), warnings))
        before = parse_config(start["config"], str(source))
    precision = config.train.precision
    if precision == "auto" and before:
        precision = before.train.precision
    precision = choose_precision(precision, device)
    config = replace(config, train=replace(config.train, precision=precision))
    warnings += slow_precision(precision, device, "train.precision=")
    if before:
        warnings += check_resume(before, config, start["progress"]["step"])
        check_network(config, start, source)
    return config, start, warnings


def make_training(
    config: Config,
    classes: tuple[str, ...],
    images: int | None,
    device: torch.device,
    versions: dict[str, str],
    source: Path | None,
    start: Any,
) -> tuple[TrainState, list[str]]:
    """(the state of the training at its start, lines for the log).

    `classes` and `images` are those of the training set, images None where it is unknown; `start` is from
    read_start.
    """
    training = build_train_state(config, classes, device, versions)
    if start is None:
        return training, []
    if isinstance(start, tuple):
        from .warm_start import load_pretrained

        return training, load_pretrained(training, *start)
    if not isinstance(start, dict):
        from .warm_start import resume_from_lua

        warnings = resume_from_lua(training, start)
    else:
        restore(training, start, source)
        warnings = [
            f"warning: {name} was {old} and is {versions.get(name)}; the bits may differ from here on"
            for name, old in start["versions"].items()
            if name != "started" and old != versions.get(name)
        ]
        warnings += batchnorm_change_warning(config, start["versions"].get("processes", "1"))
        if images:
            before = parse_config(start["config"], str(source))
            warnings += rate_jump(before, config, training.progress, images)
    done = training.progress.epoch - 1
    if done > config.train.epochs:
        raise UserError(f"train.epochs: {config.train.epochs}, but {done} are done already; raise it")
    return training, warnings


def rate_jump(before: Config, config: Config, progress: TrainProgress, images: int) -> list[str]:
    """From where to where the learning rate jumps, if another schedule or length makes it do so."""

    def rate(config: Config, ahead: int) -> float:
        steps = -(-images // config.train.batch_size)
        step = (progress.epoch - 1) * steps + progress.step + ahead
        position = (step // steps + 1, step % steps, steps)
        return learning_rate(config.schedule, config.optimizer.lr, config.train.epochs, *position)

    last, next_ = rate(before, -1), rate(config, 0)
    if progress.epoch > config.train.epochs or not progress.global_step or next_ == rate(before, 0):
        return []
    return [f"the learning rate jumps from {last:.3g}, of the last step, to {next_:.3g}"]


def batchnorm_change_warning(config: Config, before: str) -> list[str]:
    """What another number of processes does to BatchNorm."""
    train, now = config.train, world_size()
    if before == str(now) or train.bn_group is not None or train.sync_bn or not before.isdigit():
        return []
    part = train.batch_size // train.accumulation_steps
    return [
        f"warning: BatchNorm's statistics were over {part // int(before)} images and are over {part // now} "
        "now; train.bn_group keeps them the same on any number of processes"
    ]
