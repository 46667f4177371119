"""ResNeXt in PyTorch: networks, configuration, trainer and evaluator, without any data code.

    from resnext import resnext50_32x4d
    model = resnext50_32x4d(classes=1000)

Names are resolved on first use, so that `resnext.config` can be imported without PyTorch.
"""

import importlib

_MODULES = {
    "ResNeXt": "model",
    "build_model": "model",
    "convert_form": "model",
    "resnet50": "model",
    "resnet101": "model",
    "resnet152": "model",
    "resnext50_32x4d": "model",
    "resnext101_32x4d": "model",
    "resnext101_32x8d": "model",
    "resnext101_64x4d": "model",
    "resnext152_32x4d": "model",
    "resnext29_8x64d": "model",
    "resnext29_16x64d": "model",
    "load_weights": "weights",
    "UserError": "errors",
}
__all__ = list(_MODULES)


def __getattr__(name: str):
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
