"""Entry points of torch.hub: the named networks, and trained weights from a file.

    import torch
    model = torch.hub.load(FOLDER, "resnext50_32x4d", source="local", classes=10)
    model = torch.hub.load(FOLDER, "resnext50_32x4d", source="local", weights="resnext50.pth")
    model = torch.hub.load(FOLDER, "load_weights", source="local", path="runs/demo")

FOLDER is the folder of this file. Only weights by name, such as "torchvision:NAME" or "timm:NAME", are
downloaded. torch.hub treats every public callable of this module as an entry point, so only modules are
imported here.
"""

import torch

import resnext.engine.checkpoint

dependencies = ["torch", "numpy", "yaml"]


def load_weights(path):
    """Return the network in a file of weights or a run directory, in evaluation mode.

    path: any weights that evaluate.py accepts, and files without a last layer.
    Input is float32 (N, 3, H, W), (pixels 0...255 - mean) / std; output are logits (N, classes), or pooled
    features (N, channels) without a last layer. Raises resnext.UserError if the file cannot be read.
    """
    return resnext.load_weights(path)[0]


def _entry_point(name):
    def create(weights=None, **options):
        constructor = getattr(resnext, name)
        return constructor(**options) if weights is None else _load_as(name, constructor, weights, options)

    create.__name__ = create.__qualname__ = name
    create.__doc__ = f"""{name}, untrained, or with the weights of a file or run directory.

    weights: any weights that evaluate.py accepts; the network is in evaluation mode, with the classes, form,
    and shortcuts of the file. Raises resnext.UserError if the file has another architecture.
    options: classes, form, shortcut, preactivation, zero_gamma, as for resnext.ResNeXt.
    """
    return create


def _load_as(name, constructor, weights, options):
    """Return the network in a file, which must match `constructor` with `options`."""
    model, info = resnext.load_weights(weights)
    found = info.config.model
    known = {"classes": info.outputs, "form": found.block, "shortcut": found.shortcut}
    with torch.device("meta"):
        wanted = constructor(**known | {"preactivation": found.preactivation} | options)
    resnext.engine.checkpoint.check_state(wanted, model.state_dict(), f"{weights}, as {name}")
    return model


globals().update({name: _entry_point(name) for name in resnext.NETWORKS})
