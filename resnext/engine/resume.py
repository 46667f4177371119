"""What a run starts from (nothing, a checkpoint, weights, a Lua run), and its state at the start."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias, cast

import torch

from ..batch_plan import micro_batch_size
from ..config import Config, Precision, differences, parse_config, to_text
from ..device import choose_precision, is_out_of_memory, slow_precision
from ..distributed import broadcast_from_rank0, local_rank0_first, world_size
from ..errors import UserError
from ..models.resnext import ResNeXt, build_model
from ..schedule import learning_rate
from .checkpoint import Checkpoint, check_state, read_latest
from .train_state import TrainProgress, TrainState, build_train_state, init_momentum, parameter_groups

if TYPE_CHECKING:  # a run loads the readers of other programs' files only if it needs them
    from ..weights.load import LuaCheckpoint, WeightsInfo

Pretrained: TypeAlias = "tuple[ResNeXt, WeightsInfo]"
Start: TypeAlias = "Checkpoint | Pretrained | LuaCheckpoint | None"

FOR_THE_WHOLE_RUN = ("train.ema_decay", "optimizer.norm_weight_decay", "optimizer.head_lr")
# Inside an epoch the rest of its steps is only defined while these stay as they were.
FIXED_INSIDE_EPOCH = (
    "data.train_images",
    "augment.repeats",
    "train.batch_size",
    "train.accumulation_steps",
    "run.seed",
    "run.log_interval",
)


def read_start(config: Config, source: Path | None, device: torch.device) -> tuple[Config, Start, list[str]]:
    """Return (configuration, what a run starts from, lines for the log).

    `source` is a checkpoint, a file of a Lua run, or None. The configuration's precision is no longer `auto`:
    a resumed run keeps the one it had.
    """
    if source is not None and source.suffix != ".t7":
        return read_resumed(config, source, device)
    start: Start = None
    if source is not None:
        from ..weights.load import load_lua_run

        start = broadcast_from_rank0(lambda: load_lua_run(source.parent))
    elif config.model.pretrained:
        from ..weights.load import load_weights

        with local_rank0_first():  # it downloads what is missing
            start = load_weights(config.model.pretrained)
    config, lines = set_precision(config, config.train.precision, device)
    return config, start, lines


def read_resumed(config: Config, source: Path, device: torch.device) -> tuple[Config, Checkpoint, list[str]]:
    """Do the same for a checkpoint; raise UserError if the run cannot continue with this configuration."""
    warnings: list[str] = []
    content, warnings = broadcast_from_rank0(lambda: (read_latest(source, warnings.append), warnings))
    before, precision = parse_config(content["config"], str(source)), config.train.precision
    config, slow = set_precision(config, before.train.precision if precision == "auto" else precision, device)
    changes = check_resume(before, config, content["progress"]["step"])
    with torch.device("meta"):  # costs no memory
        check_state(build_model(config.model, len(content["classes"])), content["model"], source)
    return config, content, [*warnings, *slow, *changes]


def set_precision(config: Config, precision: Precision, device: torch.device) -> tuple[Config, list[str]]:
    """Return the configuration with this precision, if it is `auto` with the device's, and warnings."""
    precision = choose_precision(precision, device)
    train = replace(config.train, precision=precision)
    return replace(config, train=train), slow_precision(precision, device, "train.precision=")


def check_resume(old: Config, new: Config, step: int) -> list[str]:
    """Return what changed since the checkpoint as log lines; raise UserError if the run cannot continue so.

    `step` is the number of steps done of an unfinished epoch.
    """
    lines = []
    for key, before, now in differences(old, new):
        before, now = to_text(before), to_text(now)
        changed = f"{key}: the checkpoint has {before}, the configuration {now}"
        if key in ("model.pretrained", "model.reset_classifier"):  # only for the start
            continue
        if key.startswith("model.") and key != "model.classes":
            raise UserError(f"{changed}; the network of a run cannot change; start a new run")
        if key == "train.frozen_stages" or (key in FOR_THE_WHOLE_RUN and "null" in (before, now)):
            raise UserError(f"{changed}; it cannot be switched on or off during a run; start a new run")
        if step and key in FIXED_INSIDE_EPOCH:
            raise UserError(
                f"{changed}; it was saved after step {step} of an epoch, which must be finished with the "
                "same value"
            )
        lines.append(f"changed since the checkpoint: {key} {before} → {now}")
    return lines


def make_training(
    config: Config,
    classes: tuple[str, ...],
    images: int | None,
    device: torch.device,
    versions: dict[str, str],
    source: Path | None,
    start: Start,
) -> tuple[TrainState, list[str]]:
    """Return (the state of the training at its start, lines for the log).

    `classes` and `images` are those of the training set, images None if unknown; `start` is from read_start.
    """
    training = build_train_state(config, classes, device, versions)
    if start is None:
        return training, []
    if isinstance(start, tuple):
        from .warm_start import load_pretrained

        return training, load_pretrained(training, *start)
    if isinstance(start, dict):
        restore(training, start, cast(Path, source))  # a checkpoint comes from a file
        lines = [
            f"warning: {name} was {old} and is {versions.get(name)}; the bits may differ from here on"
            for name, old in start["versions"].items()
            if name != "started" and old != versions.get(name)
        ]
        lines += batchnorm_change_warning(config, start["versions"].get("processes", "1"))
        if images:
            before = parse_config(start["config"], str(source))
            lines += rate_jump(before, config, training.progress, images)
    else:
        from .warm_start import resume_from_lua

        lines = resume_from_lua(training, start)
    done = training.progress.epoch - 1
    if done > config.train.epochs:
        raise UserError(f"train.epochs: {config.train.epochs}, but {done} are done already; raise it")
    return training, lines


def restore(training: TrainState, content: Checkpoint, path: Path) -> None:
    """Bring a fresh TrainState to the state of a checkpoint; the configuration's optimizer keys win."""
    if tuple(content["classes"]) != training.classes:
        raise UserError(
            f"{path}: was trained on other classes ({len(content['classes'])} of them) than the "
            f"data has ({len(training.classes)}); give the data of the run with --data"
        )
    check_state(training.model, content["model"], path)
    training.model.load_state_dict(content["model"])
    if training.ema:
        average = content["ema"] or {}
        check_state(training.ema, average, path)
        training.ema.load_state_dict(average)
    optimizer = training.optimizer
    try:
        training.progress = TrainProgress.from_dict(content["progress"])
        optimizer.load_state_dict(content["optimizer"])
        for parameter, state in optimizer.state.items():
            if state["momentum_buffer"] is not None and state["momentum_buffer"].shape != parameter.shape:
                raise ValueError("the momentum does not fit the weights")
        if content["scaler"] is not None:
            training.scaler.load_state_dict(content["scaler"])
        torch.set_rng_state(content["rng"]["cpu"])
        if training.device.type == "cuda" and content["rng"]["cuda"] is not None:
            torch.cuda.set_rng_state(content["rng"]["cuda"])
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        if is_out_of_memory(error):
            raise
        raise UserError(f"{path}: damaged, its state cannot be restored ({error!r}); use another") from error
    config = training.config.optimizer
    for group, own in zip(optimizer.param_groups, parameter_groups(training.model, config), strict=True):
        group |= {
            "momentum": config.momentum,
            "nesterov": config.nesterov,
            "fused": optimizer.defaults["fused"],
        }
        group |= {"weight_decay": own["weight_decay"], "lr_scale": own["lr_scale"]}
    init_momentum(optimizer)


def rate_jump(before: Config, config: Config, progress: TrainProgress, images: int) -> list[str]:
    """Return a line with the jump of the learning rate if another schedule or length causes one."""

    def rate(config: Config, ahead: int) -> float:
        steps = -(-images // config.train.batch_size)
        step = (progress.epoch - 1) * steps + progress.step + ahead
        position = (step // steps + 1, step % steps, steps)
        return learning_rate(config.schedule, config.optimizer.lr, config.train.epochs, *position)

    last, next_ = rate(before, -1), rate(config, 0)
    if progress.epoch > config.train.epochs or not progress.global_step or next_ == rate(before, 0):
        return []
    return [f"the learning rate jumps from {last:.3g} at the last step to {next_:.3g}"]


def batchnorm_change_warning(config: Config, before: str) -> list[str]:
    """Return a warning if another world size changes BatchNorm's statistics; `before` is the former one."""
    train, now = config.train, world_size()
    if before == str(now) or train.bn_group is not None or train.sync_bn or not before.isdigit():
        return []
    images = micro_batch_size(train)
    return [
        f"warning: BatchNorm's statistics were over {images // int(before)} images and are over "
        f"{images // now} now; train.bn_group keeps them the same on any number of processes"
    ]
