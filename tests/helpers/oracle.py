"""Reference numbers of the original Lua code: the formulas behind them and the copies in golden/.

The original's parameters, inputs and initial running statistics were filled by a hash formula, so
that only its results need storing. Numbers too many to store are given as a summary of each tensor:
norm, sum, projection on the hash, and values at 64 places.
"""

import json
import lzma
from pathlib import Path

import numpy as np
import torch
from torch import nn

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
SHARED = Path(__file__).resolve().parents[3] / "shared" / "oracle"  # all reference data, if present


def golden(name):
    """Return the content of a JSON file of golden/, or the arrays of an .npz file."""
    path = GOLDEN / name
    if path.suffix == ".json":
        return json.loads(path.read_text())
    with np.load(path) as arrays:
        return dict(arrays)


def unpack(source, target):
    """Write an .xz file's content to `target`, and return `target`."""
    target.write_bytes(lzma.decompress(source.read_bytes()))
    return target


def h(i):
    """Map integers i >= 0 to float64 in [-0.5, 0.5) by the hash formula."""
    bits = (np.asarray(i) % 4093 * 2654435761) % 2**32 >> 16
    return bits / 65536 - 0.5


def network_input(shape, offset=0):
    """Return a network input, a float64 tensor of values rounded to float32."""
    values = 3.4 * h(np.arange(np.prod(shape)) + offset)
    return torch.from_numpy(values.astype(np.float32).reshape(shape)).double()


def batch_norms(model):
    return [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]


@torch.no_grad()
def fill_parameters(model):
    """Fill the parameters, in the order of parameters(), which is that of Torch's getParameters()."""
    kinds = {p: (m, n) for m in model.modules() for n, p in m.named_parameters(recurse=False)}
    for number, parameter in enumerate(model.parameters()):
        module, name = kinds[parameter]
        values = h(np.arange(parameter.numel()) + 977 * number)
        if isinstance(module, nn.Conv2d):
            fan_out = module.kernel_size[0] * module.kernel_size[1] * module.out_channels
            values = values * 2 * np.sqrt(3) * np.sqrt(2 / fan_out)
        elif isinstance(module, nn.Linear):
            values = 0.1 * values
        else:
            values = 1 + 0.5 * values if name == "weight" else 0.2 * values
        parameter.copy_(torch.from_numpy(values.astype(np.float32)).view_as(parameter))


@torch.no_grad()
def fill_running_statistics(model):
    for number, norm in enumerate(batch_norms(model)):
        i = np.arange(norm.num_features) + 977 * number
        norm.running_mean.copy_(torch.from_numpy((0.1 * h(i + 13)).astype(np.float32)))
        norm.running_var.copy_(torch.from_numpy((1 + 0.5 * h(i + 29)).astype(np.float32)))


def running_statistics(model):
    """Return (means, variances) of each BatchNorm, lists of float64 arrays."""
    norms = batch_norms(model)
    return [n.running_mean.numpy().copy() for n in norms], [n.running_var.numpy().copy() for n in norms]


def sample_places(count):
    """Return the up to 64 flat indices at which a tensor of `count` elements was stored."""
    return np.arange(count) if count <= 64 else np.arange(64) * (count - 1) // 63


def summary(tensors):
    """Summarize tensors as stored: arrays norm, sum and proj; val, samples one after another."""
    flat = [t.detach().numpy().ravel() for t in tensors]
    return {
        "norm": np.array([np.linalg.norm(t) for t in flat]),
        "sum": np.array([t.sum() for t in flat]),
        "proj": np.array([t @ h(np.arange(t.size)) for t in flat]),
        "val": np.concatenate([t[sample_places(t.size)] for t in flat]),
    }


def relative_error(ours, theirs, scale=None):
    """Return the largest difference in units of `scale`, by default the largest of `theirs`."""
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    assert ours.shape == theirs.shape and np.isfinite(ours).all()
    scale = np.abs(theirs).max() if scale is None else scale
    return float((np.abs(ours - theirs) / scale).max())


def split_like(flat, arrays):
    """Cut a flat array into pieces of the sizes of `arrays`."""
    return np.split(flat, np.cumsum([a.size for a in arrays])[:-1])


def statistics_error(ours, flat):
    """Return the largest relative error of a list of arrays; `flat` has theirs one after another."""
    assert sum(a.size for a in ours) == flat.size
    return max(relative_error(a, b) for a, b in zip(ours, split_like(flat, ours), strict=True))
