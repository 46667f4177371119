"""ResNeXt in PyTorch: networks, configuration, trainer and evaluator, without any data code.

    from resnext import resnext50_32x4d
    model = resnext50_32x4d(classes=1000)

Names are resolved on first use, so that `resnext.config` can be imported without PyTorch.
"""

import importlib

_MODULES = {
    "ResNeXt": "models.resnext",
    "build_model": "models.resnext",
    "convert_form": "models.block_forms",
    "resnet50": "models.resnext",
    "resnet101": "models.resnext",
    "resnet152": "models.resnext",
    "resnext50_32x4d": "models.resnext",
    "resnext101_32x4d": "models.resnext",
    "resnext101_32x8d": "models.resnext",
    "resnext101_64x4d": "models.resnext",
    "resnext152_32x4d": "models.resnext",
    "resnext29_8x64d": "models.resnext",
    "resnext29_16x64d": "models.resnext",
    "load_weights": "weights.load",
    "UserError": "errors",
}
__all__ = list(_MODULES)


def __getattr__(name: str):
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
