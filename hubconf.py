"""Entry points of torch.hub: the named networks, and trained weights from a file.

    import torch
    model = torch.hub.load(FOLDER, "resnext50_32x4d", source="local", classes=10)
    model = torch.hub.load(FOLDER, "resnext50_32x4d", source="local", weights="resnext50.pth")
    model = torch.hub.load(FOLDER, "load_weights", source="local", path="runs/demo")

FOLDER is where this file is. Nothing is downloaded. torch.hub takes every public callable here for an entry
point, and has this folder on the path only while one runs: so imports are inside of them.
"""

dependencies = ["torch", "numpy", "yaml"]


def load_weights(path):
    """The network in a file of weights or a run directory, whoever wrote it, in evaluation mode.

    Takes what evaluate.py takes, and files without a last layer. Input is float32 (N, 3, H, W), (pixels
    0...255 - mean) / std; output are raw scores (N, classes), without a last layer the pooled features
    (N, channels). Raises resnext.UserError for what cannot be read.
    """
    from resnext import load_weights

    model, _ = load_weights(path)
    return model


def _entry_point(name):
    def make(weights=None, **options):
        import resnext

        constructor = getattr(resnext, name)
        return constructor(**options) if weights is None else _load_as(name, constructor, weights, options)

    make.__name__ = make.__qualname__ = name
    make.__doc__ = f"""{name}, untrained, or with the weights of a file or run directory.

    weights: what evaluate.py takes; the network comes in evaluation mode, with the file's classes, form and
    shortcuts. A file of another architecture is a resnext.UserError.
    options: classes, form, shortcut, preactivation, zero_gamma, as for resnext.ResNeXt.
    """
    return make


def _load_as(name, constructor, weights, options):
    """The network in a file, which must be what `constructor` makes with `options`."""
    import torch

    from resnext import load_weights
    from resnext.engine.checkpoint import check_state

    model, info = load_weights(weights)
    found = info.config.model
    known = {
        "classes": info.outputs,
        "form": found.block,
        "shortcut": found.shortcut,
        "preactivation": found.preactivation,
    }
    with torch.device("meta"):
        wanted = constructor(**known | options)
    check_state(wanted, model.state_dict(), f"{weights}, as {name}")
    return model


resnet50 = _entry_point("resnet50")
resnet101 = _entry_point("resnet101")
resnet152 = _entry_point("resnet152")
resnext50_32x4d = _entry_point("resnext50_32x4d")
resnext101_32x4d = _entry_point("resnext101_32x4d")
resnext101_32x8d = _entry_point("resnext101_32x8d")
resnext101_64x4d = _entry_point("resnext101_64x4d")
resnext152_32x4d = _entry_point("resnext152_32x4d")
resnext29_8x64d = _entry_point("resnext29_8x64d")
resnext29_16x64d = _entry_point("resnext29_16x64d")
