"""Trained weights, whoever wrote them: `load_weights` tells by content what a file is.

Read are checkpoints of this program, state_dicts of torchvision, timm, mmpretrain, pycls and the CIFAR
models of bearpaw and prlz77 (.pt, .pth, .safetensors), and Torch7's .t7. Nothing in a file is executed,
and none takes more memory than its own size asks for. The network is inferred from the tensors.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..checkpoint import check_state, find_checkpoint, read_checkpoint
from ..config import Config, parse_config
from ..model import ResNeXt, build_model


@dataclass(frozen=True)
class Info:
    """What is known of loaded weights.

    origin: whose file it is. weights: which of its weights these are, for people. config: network
    (config.model), preprocessing and data set (config.data); of our own checkpoints the run's. classes:
    names in the order of the outputs, None where the file does not say.
    """

    origin: str
    weights: str
    config: Config
    classes: tuple[str, ...] | None


def load_weights(path: Path | str) -> tuple[ResNeXt, Info]:
    """The network in a file or run directory, in evaluation mode on the CPU, and what is known of it.

    Raises UserError for whatever cannot be read.
    """
    path = find_checkpoint(Path(path).expanduser(), "best.pt")
    content = read_checkpoint(path)
    config = parse_config(content["config"], str(path))
    steps = content["progress"]["global_step"]
    averaged = "averaged weights" if content["ema"] is not None else "weights"
    state = evaluated_state(content)
    with torch.device("meta"):  # no memory before the shapes are known to be the file's
        model = build_model(config.model, len(content["classes"]))
    check_state(model, state, path)
    model.load_state_dict(state, assign=True)
    info = Info("this program", f"{averaged} after {steps} steps", config, tuple(content["classes"]))
    return model.eval(), info


def evaluated_state(content: dict[str, Any]) -> dict[str, Any]:
    """The state_dict that validation speaks of: the average's where there is one."""
    if content["ema"] is None:
        return dict(content["model"])
    prefix = "module."
    return {k.removeprefix(prefix): v for k, v in content["ema"].items() if k.startswith(prefix)}
