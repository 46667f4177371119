"""What a fresh run starts from other than nothing: pretrained weights, or a run of the Lua code."""

from collections.abc import Mapping

import torch
from torch import Tensor

from ..classes import name_outputs
from ..config import Config, ModelConfig, network_name, to_text
from ..errors import UserError
from ..models.block_forms import convert_form
from ..models.resnext import ResNeXt
from ..weights.load import LuaCheckpoint, WeightsInfo
from .checkpoint import check_state
from .train_state import TrainProgress, TrainState, init_momentum


def load_pretrained(training: TrainState, source: ResNeXt, info: WeightsInfo) -> list[str]:
    """Load pretrained weights into a fresh run (-retrain, -resetClassifier); return lines for the log.

    The last layer is kept if the classes are the same, perhaps in another order; otherwise reinitialized.
    """
    own, theirs = training.config, info.config
    check_architecture(theirs.model, own.model, f"model.pretrained: {info.file}")
    state = convert_state_form(source.state_dict(), theirs.model, own.model)
    outputs, lines = pretrained_classes(info, own, training.classes)
    if outputs is not None:
        row = {name: output for output, name in enumerate(outputs)}
        order = torch.tensor([row[name] for name in training.classes])
        state |= {key: state[key][order] for key in ("fc.weight", "fc.bias")}
        last = "last layer included"
        if info.classes is None:
            last += " (the file names no classes: if they are others, set model.reset_classifier=true)"
    else:
        fresh = training.model.state_dict()
        state |= {key: fresh[key] for key in ("fc.weight", "fc.bias")}
        last = f"a new last layer of {len(training.classes)} classes"
        if info.outputs is None:
            last += " (the file has none)"
    load_weights_and_ema(training, state, info.file)
    lines.append(f"starting from the {info.weights} of {info.file} ({info.origin}), {last}")
    keys = ["mean", "std"]
    if "memory" not in (own.data.pipeline, theirs.data.pipeline):
        keys += ["pipeline", "interpolation"]
    settings = [
        f"data.{key}={to_text(getattr(theirs.data, key))}".replace(", ", ",")
        for key in keys
        if getattr(own.data, key) != getattr(theirs.data, key)
    ]
    if settings:
        lines.append(f"warning: these weights expect {' '.join(settings)}; this run uses other values")
    return lines


def load_weights_and_ema(training: TrainState, state: dict[str, Tensor], file: str) -> None:
    """Load a state_dict into the network, and into its EMA if there is one."""
    check_state(training.model, state, file)
    training.model.load_state_dict(state)
    if training.ema:
        training.ema.module.load_state_dict(state)


def pretrained_classes(
    info: WeightsInfo, config: Config, classes: tuple[str, ...]
) -> tuple[tuple[str, ...] | None, list[str]]:
    """Return (names of the outputs of weights, warnings); None if they are not the run's `classes`."""
    if info.outputs != len(classes) or config.model.reset_classifier:
        return None, []
    if info.classes is not None:
        return (info.classes if set(info.classes) == set(classes) else None), []
    if config.data.dataset != "folder":
        return classes, []
    try:
        return name_outputs(classes, info.outputs, info.origin, config.data.class_order, "data.class_order=")
    except UserError as error:
        raise UserError(
            f"model.pretrained: {info.file}: {error}, or start a new last layer with "
            "model.reset_classifier=true"
        ) from None


def convert_state_form(
    state: Mapping[str, Tensor], source: ModelConfig, target: ModelConfig
) -> dict[str, Tensor]:
    """Return weights (or momenta) of one block form in another; the network's function stays the same."""
    if source.block == target.block:
        return dict(state)
    return convert_form(state, source.cardinality, source.block, target.block)


def check_architecture(found: ModelConfig, configured: ModelConfig, where: str) -> None:
    """Raise UserError with the keys in which weights and configuration are different networks."""
    keys = ["stem", "depth", "block_type", "stages", "cardinality", "base_width", "preactivation"]
    alike = found.block_type == "bottleneck" and max(found.stages) == 1  # shortcuts B and C are the same
    if not alike or "A" in (found.shortcut, configured.shortcut):
        keys.append("shortcut")
    pairs = [(key, getattr(found, key), getattr(configured, key)) for key in keys]
    differing = [f"model.{key}={to_text(theirs)}" for key, theirs, ours in pairs if theirs != ours]
    if differing:
        raise UserError(
            f"{where} is {network_name(found)}, the configuration {network_name(configured)}: another "
            f"architecture; set {' '.join(differing)}, or give other weights"
        )


def resume_from_lua(training: TrainState, run: LuaCheckpoint) -> list[str]:
    """Bring a fresh TrainState to the end of a Lua run's latest epoch (-resume); return lines for the log.

    The configuration's momentum and weight decay are used, as with our checkpoints and unlike the Lua code.
    """
    config, where = training.config, f"--resume {run.info.file}"
    check_architecture(run.info.config.model, config.model, where)
    classes = run.model.fc.out_features
    if classes != len(training.classes):
        raise UserError(
            f"{where}: has {classes} classes and the data {len(training.classes)}; give the data of that run "
            "with --data"
        )
    state = convert_state_form(run.model.state_dict(), run.info.config.model, config.model)
    load_weights_and_ema(training, state, run.info.file)
    if run.momentum:
        momentum = convert_state_form(run.momentum, run.info.config.model, config.model)
        for name, parameter in training.model.named_parameters():
            if parameter.requires_grad:
                training.optimizer.state[parameter]["momentum_buffer"] = momentum[name]
    init_momentum(training.optimizer)
    training.progress = TrainProgress(epoch=run.epoch + 1, global_step=run.steps)
    pairs = {"momentum": "momentum", "nesterov": "nesterov", "weight_decay": "weightDecay"}
    return [
        f"warning: the Lua run had optimizer.{ours}={to_text(run.options[theirs])}, this has "
        f"{to_text(getattr(config.optimizer, ours))}"
        for ours, theirs in pairs.items()
        if run.options.get(theirs, getattr(config.optimizer, ours)) != getattr(config.optimizer, ours)
    ]
