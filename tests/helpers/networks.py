"""Small networks and checkpoints of them that no training wrote."""

from pathlib import Path

import torch
from torch import nn

from resnext.config import parse_config, to_yaml
from resnext.engine.checkpoint import write_checkpoint
from resnext.models.resnext import build_model

# An ImageNet network with four blocks, of the form that is filled in.
SMALL = (
    "model: {{stages: [1, 1, 1, 1], cardinality: 4, base_width: 8, block: {}}}\ndata: {{image_size: 48}}\n"
)


@torch.no_grad()
def stir(model: nn.Module) -> nn.Module:
    """Give the BatchNorms weights and statistics as after a training."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight, module.running_var):
                tensor.uniform_(0.5, 1.5)
            for tensor in (module.bias, module.running_mean):
                tensor.uniform_(-0.3, 0.3)
    return model


def write_weights(folder: Path, text: str, classes: int) -> Path:
    """Write best.pt as train.py does, for an untrained network with the configuration `text`."""
    config = parse_config(text, "test")
    torch.manual_seed(5)
    model = stir(build_model(config.model, classes)).to(memory_format=torch.channels_last)
    content = {
        "model": model.state_dict(),
        "optimizer": {},
        "scaler": None,
        "ema": None,
        "progress": {"epoch": 2, "step": 0, "global_step": 7, "rows": 0},
        "rng": {},
        "config": to_yaml(config),
        "classes": [f"class {number}" for number in range(classes)],
        "preprocessing": {},
        "versions": {},
    }
    write_checkpoint(content, folder, ["best.pt"])
    return folder / "best.pt"
