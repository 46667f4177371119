"""ResNeXt in PyTorch: networks, configuration, trainer, and evaluator, without any data code.

    from resnext import resnext50_32x4d
    model = resnext50_32x4d(classes=1000)

Names are resolved on first use, so that `resnext.config` can be imported without torch.
"""

import importlib
from typing import Any

NETWORKS = (
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "resnet152",
    "resnet200",
    "resnext50_32x4d",
    "resnext101_32x4d",
    "resnext101_32x8d",
    "resnext101_64x4d",
    "resnext152_32x4d",
    "resnext29_8x64d",
    "resnext29_16x64d",
    "resnet20",
    "resnet32",
    "resnet44",
    "resnet56",
    "resnet110",
    "resnet1202",
)
_MODULES = dict.fromkeys(("ResNeXt", "build_model", *NETWORKS), "models.resnext")
_MODULES |= {"convert_form": "models.block_forms", "load_weights": "weights.load", "UserError": "errors"}
__all__ = list(_MODULES)


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
