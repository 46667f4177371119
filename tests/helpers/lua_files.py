"""Write .t7 files: networks as the Lua code and the authors' published files nest them.

Written from the description of the format and of the models, not from the reader's tables.
"""

import struct
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from resnext.models.resnext import Basic

KINDS = {torch.float64: "Double", torch.float32: "Float", torch.float16: "Half", torch.int64: "Long"}


@dataclass(eq=False)
class Module:
    name: str
    fields: dict


class Writer:
    """Bytes of values, binary or ASCII; tensors that share memory share a storage."""

    def __init__(self, ascii=False, cuda=False):
        self.ascii, self.cuda = ascii, cuda
        self.out, self.indices, self.keep = [], {}, []

    def put(self, kind, *numbers):
        if not self.ascii:
            self.out.append(struct.pack(f"<{len(numbers)}{kind}", *numbers))
        elif numbers:
            text = " ".join(repr(n).removesuffix(".0") if kind == "d" else str(n) for n in numbers)
            self.out.append(text.encode() + b"\n")

    def text(self, value):
        self.put("i", len(value.encode()))
        self.out.append(value.encode() + (b"\n" if self.ascii and value else b""))

    def index(self, key, value):
        """Write the index of an object; return whether the object is new."""
        new = key not in self.indices
        self.keep.append(value)  # so that no id comes twice
        self.put("i", self.indices.setdefault(key, len(self.indices) + 1))
        return new

    def write(self, value):
        if value is None:
            self.put("i", 0)
        elif isinstance(value, bool):
            self.put("i", 5)
            self.put("i", int(value))
        elif isinstance(value, int | float):
            self.put("i", 1)
            self.put("d", float(value))
        elif isinstance(value, str):
            self.put("i", 2)
            self.text(value)
        elif isinstance(value, dict | list):
            self.put("i", 3)
            if self.index(id(value), value):
                table = value if isinstance(value, dict) else dict(enumerate(value, 1))
                self.put("i", len(table))
                for key, item in table.items():
                    self.write(key)
                    self.write(item)
        else:
            self.put("i", 4)
            if self.index(id(value), value):
                self.write_module(value) if isinstance(value, Module) else self.write_tensor(value)
        return self

    def write_module(self, module):
        self.text("V 1")
        self.text(module.name)
        self.write(module.fields)

    def write_tensor(self, tensor):
        name = KINDS[tensor.dtype]
        if self.cuda:
            name = "Cuda" + name.replace("Float", "")
        self.text("V 1")
        self.text(f"torch.{name}Tensor")
        self.put("i", tensor.ndim)
        self.put("q", *tensor.shape)
        self.put("q", *tensor.stride())
        self.put("q", tensor.storage_offset() + 1)
        self.put("i", 4)
        storage = tensor.untyped_storage()
        if self.index(("storage", storage.data_ptr()), tensor):
            numbers = torch.empty(0, dtype=tensor.dtype).set_(storage).numpy()
            self.text("V 1")
            self.text(f"torch.{name}Storage")
            self.put("q", numbers.size)
            if self.ascii:
                self.out.append(" ".join(map(repr, numbers.astype(np.float64).tolist())).encode() + b"\n")
            else:
                self.out.append(numbers.tobytes())


def to_t7(value, **options):
    return b"".join(Writer(**options).write(value).out)


# ---------------------------------------------------------------------------- networks


def share_memory(model):
    """Make all parameters parts of one storage, as getParameters() does; return it flat."""
    parameters = list(model.parameters())
    flat = torch.cat([p.detach().reshape(-1) for p in parameters])
    for parameter, part in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        parameter.data = part.view_as(parameter)
    return flat


def sequential(*modules):
    return Module("nn.Sequential", {"modules": list(modules), "_type": "torch.FloatTensor", "train": False})


def convolution(m):
    (height, width), (rows, columns), (top, left) = m.kernel_size, m.stride, m.padding
    weight = m.weight.detach()
    fields = {"nInputPlane": m.in_channels, "nOutputPlane": m.out_channels, "groups": m.groups}
    fields |= {"kW": width, "kH": height, "dW": columns, "dH": rows, "padW": left, "padH": top}
    fields |= {"weight": weight, "gradWeight": torch.zeros_like(weight)}
    return Module("cudnn.SpatialConvolution", fields)


def norm(m):
    fields = {"eps": m.eps, "momentum": 0.1, "affine": True, "nDim": 4, "weight": m.weight.detach()}
    fields |= {"bias": m.bias.detach(), "running_mean": m.running_mean, "running_var": m.running_var}
    return Module("nn.SpatialBatchNormalization", fields)


def relu():
    return Module("cudnn.ReLU", {"inplace": True, "threshold": 0, "val": 0})


def table(*modules):
    return Module("nn.ConcatTable", {"modules": list(modules)})


def pool(name, size, stride, padding=0):
    fields = {"kW": size, "kH": size, "dW": stride, "dH": stride, "padW": padding, "padH": padding}
    return Module(name, fields | {"ceil_mode": False})


def path(m):
    first = [convolution(m.conv1), norm(m.bn1), relu(), convolution(m.conv2)]
    return first if isinstance(m, Basic) else [*first, norm(m.bn2), relu()]


def shortcut(block):
    if block.downsample is None:
        return Module("nn.Identity", {})
    if isinstance(block.downsample, nn.Sequential):
        first, *rest = block.downsample
        return sequential(convolution(first), *map(norm, rest))
    zero = Module("nn.MulConstant", {"constant_scalar": 0})
    doubled = Module("nn.Concat", {"dimension": 2, "modules": [Module("nn.Identity", {}), zero]})
    return sequential(pool("nn.SpatialAveragePooling", 1, block.downsample.stride), doubled)


def block_tree(block, nested, preactivation):
    if hasattr(block, "paths"):
        paths = [sequential(*path(p)) for p in block.paths]
        join = Module("nn.JoinTable", {"dimension": 1, "nInputDims": 3})
        concat = Module("nn.Concat", {"dimension": 2, "modules": paths})  # both as one module
        branch = [concat] if nested else [table(*paths), join]
    else:
        branch = [sequential(*path(block))] if nested else path(block)
    if not isinstance(block, Basic):
        branch.append(convolution(block.conv3))
    head, activate = [], [norm(block.bn0), relu()] if block.activate_input else []
    if block.activate_input == "shared":
        head = activate
    elif activate:
        branch = activate + branch
    if not preactivation:
        branch.append(norm(block.last_bn))
    sides, add = table(sequential(*branch), shortcut(block)), Module("nn.CAddTable", {"inplace": True})
    return sequential(*head, sides, add, *([] if preactivation else [relu()]))


def network_tree(model, nested=False):
    """Return a ResNeXt as a tree of Lua modules, `nested` as in published files or as the code builds it."""
    preactivation = model.final_bn is not None
    modules = [convolution(model.conv1)]
    if hasattr(model, "bn1"):
        modules += [norm(model.bn1), relu()]
    if hasattr(model, "maxpool"):
        modules.append(pool("nn.SpatialMaxPooling", 3, 2, 1))
    for number in range(1, model.stages + 1):
        stage = getattr(model, f"layer{number}")
        modules.append(sequential(*(block_tree(block, nested, preactivation) for block in stage)))
    if preactivation:
        modules += [norm(model.final_bn), relu()]
    modules.append(pool("cudnn.SpatialAveragePooling", 7 if hasattr(model, "maxpool") else 8, 1))
    linear = Module("nn.Linear", {"weight": model.fc.weight.detach(), "bias": model.fc.bias.detach()})
    return sequential(*modules, Module("nn.View", {"numElements": model.fc.in_features}), linear)


def find(tree, name):
    """Return all modules of a class in a tree, in order."""
    found = [tree] if tree.name == name else []
    return found + [m for child in tree.fields.get("modules", []) for m in find(child, name)]
