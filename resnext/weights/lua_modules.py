"""Convert networks of the Lua code (models/resnext.lua, resnet.lua, preresnet.lua) to state_dicts.

Modules are recognized by kind and order, not by position, because published files nest them differently
from the code. A network that would compute something different from ours is refused.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from ..errors import InvalidFileError
from .t7 import Object, Table, Value, parse_t7

EPS = 1e-5  # of our BatchNorm
MAX_MODULES, MAX_NESTING = 100_000, 50

NEUTRAL = ("View", "Reshape", "Identity", "Copy", "Contiguous", "Squeeze")  # change no number
CONTAINERS = ("Sequential", "ConcatTable", "Concat", "DepthConcat")
REPLICAS = ("DataParallelTable", "DataParallel")  # hold the network several times
KINDS = {"SpatialConvolution": "conv", "SpatialConvolutionMM": "conv", "Linear": "linear"}
KINDS |= {"SpatialBatchNormalization": "bn", "BatchNormalization": "bn"}
KINDS |= {"ReLU": "relu", "Threshold": "relu", "MulConstant": "zero", "Padding": "padding"}
KINDS |= {"SpatialMaxPooling": "maxpool", "SpatialAveragePooling": "avgpool"}
KINDS |= {"CAddTable": "add", "JoinTable": "join"}
TENSORS = ("weight", "bias", "running_mean", "running_var", "running_std")


@dataclass
class Op:
    """One module that computes something, or a container of parallel branches (kind "branches")."""

    kind: str
    module: Object
    branches: list[list["Op"]] = field(default_factory=list)


END = Op("end", Object("nothing"))


def read_network(path: Path) -> dict[str, Tensor]:
    """Return the state_dict of a model_N.t7 or a published file, under our names, in Lua's order.

    Raise InvalidFileError for other networks and other files.
    """
    content = path.read_bytes()
    root = parse_t7(content)
    if isinstance(root, Table) and "modelFile" in root:
        raise InvalidFileError("names the files of a Lua run; give its folder")
    ops, modules = _flatten(root)
    names = _Names(ops, {})
    names.network()
    tensors = [_tensor(module, key) for module in modules for key in TENSORS]
    if sum(tensor.numel() for tensor in tensors if tensor is not None) > len(content):
        raise InvalidFileError("its tensors are larger than the file")
    state: dict[str, Tensor] = {}
    for module in modules:
        name = names.of[id(module)]
        state |= {f"{name}.{key}": value for key, value in _convert(module, name).items()}
    return state


def learned_keys(state: dict[str, Tensor]) -> list[str]:
    """Return the keys of the learned parameters of read_network's state_dict, in Lua's order."""
    return [key for key in state if not key.endswith(("running_mean", "running_var"))]


def read_run(folder: Path) -> tuple[dict[str, Tensor], int, Table]:
    """Return the state_dict, the finished epochs, and the optimizer's state (optim.sgd) of a Lua run.

    checkpoints.lua writes them to the two files that latest.t7 names. Raise InvalidFileError.
    """
    latest = read_latest(folder)
    epoch = latest.get("epoch")
    if not isinstance(epoch, float) or epoch < 1 or not epoch.is_integer():
        raise InvalidFileError(f"latest.t7 has no number of finished epochs (got {str(epoch)[:40]})")
    optimizer = parse_t7(named_file(folder, latest, "optimFile").read_bytes())
    if not isinstance(optimizer, Table):
        raise InvalidFileError("its optimizer's state is not a file of checkpoints.lua")
    return read_network(named_file(folder, latest, "modelFile")), int(epoch), optimizer


def read_latest(folder: Path) -> Table:
    """Return the content of a directory's latest.t7. Raise InvalidFileError."""
    latest = parse_t7((folder / "latest.t7").read_bytes())
    if not isinstance(latest, Table):
        raise InvalidFileError("latest.t7 is not a file of checkpoints.lua")
    return latest


def named_file(folder: Path, latest: Table, key: str) -> Path:
    """Return the file that latest.t7 names; it is beside latest.t7, wherever the run wrote it."""
    name = latest.get(key)
    if not isinstance(name, str) or not name.rpartition("/")[2]:
        raise InvalidFileError(f"latest.t7 names no {key}")
    path = folder / name.rpartition("/")[2]
    if not path.is_file():
        raise InvalidFileError(f"{path.name}, which latest.t7 names, is missing")
    return path


# ---------------------------------------------------------------------------- the tree as a list


def _flatten(root: Value) -> tuple[list[Op], list[Object]]:
    """Return what a module tree does, in order, and its modules with weights in Lua's order."""
    weighted: dict[int, Object] = {}
    inside: set[int] = set()
    visits = 0

    def walk(module: Value) -> list[Op]:
        nonlocal visits
        visits += 1
        if visits > MAX_MODULES or id(module) in inside or len(inside) > MAX_NESTING:
            raise InvalidFileError(
                f"a module holds itself, over {MAX_MODULES:,} others, or over {MAX_NESTING} levels"
            )
        if not isinstance(module, Object):
            raise InvalidFileError("holds no network (it has a plain value in place of an nn module)")
        name = _class(module)
        if name in NEUTRAL:
            return []
        if name in CONTAINERS or name in REPLICAS:
            inside.add(id(module))
            children = _children(module)
            branches = [walk(child) for child in (children[:1] if name in REPLICAS else children)]
            inside.remove(id(module))
            if name == "Sequential" or name in REPLICAS:
                return [op for branch in branches for op in branch]
            joined = [] if name == "ConcatTable" else [Op("join", module)]
            return [Op("branches", module, branches), *joined]
        if name not in KINDS:
            raise InvalidFileError(f"has a module {module.class_name[:60]!r}, which no known network has")
        if name == "Threshold" and (_number(module, "threshold"), _number(module, "val")) != (0, 0):
            raise InvalidFileError("has a threshold other than ReLU's")
        if KINDS[name] in ("conv", "bn", "linear"):
            if id(module) in weighted:
                raise InvalidFileError("a module with weights is used twice")
            weighted[id(module)] = module
        return [Op(KINDS[name], module)]

    return walk(root), list(weighted.values())


def _class(module: Object) -> str:
    """Return the class name of a module without its package (nn, cudnn, fbnn, inn)."""
    return module.class_name.rpartition(".")[2]


def _children(module: Object) -> list[Value]:
    children = module.fields.get("modules")
    if not isinstance(children, Table) or not len(children):
        raise InvalidFileError(f"a {module.class_name[:60]} has no modules")
    return [children.get(number) for number in range(1, len(children) + 1)]


# ---------------------------------------------------------------------------- names by order


class _Names:
    """A parser of the list; it gives each module with weights the name of its counterpart in our network."""

    def __init__(self, ops: list[Op], of: dict[int, str]):
        self.ops, self.place = [*ops, END], 0
        self.of = of  # id of a module → name

    # -- the cursor

    def sees(self, *kinds: str) -> bool:
        return [op.kind for op in self.ops[self.place : self.place + len(kinds)]] == list(kinds)

    def next(self, kind: str, where: str) -> Op:
        op = self.ops[self.place]
        if op.kind != kind:
            raise InvalidFileError(f"{where}: not a known network (got {op.kind}, expected {kind})")
        self.place += 1
        return op

    def norm(self, name: str) -> None:
        self.of[id(self.next("bn", name).module)] = name

    def norm_relu(self, name: str) -> None:
        self.norm(name)
        self.next("relu", name)

    def convolution(self, name: str, kernel: int, stride: int = 1) -> None:
        module = self.next("conv", name).module
        _check_sizes(module, name, kernel, stride, kernel // 2)
        self.of[id(module)] = name

    # -- the grammar

    def network(self) -> None:
        first = next((op for op in self.ops if op.kind == "branches"), None)
        if first is None:
            raise InvalidFileError("holds no network with residual blocks")
        self.check_last_norms()
        self.preactivation = max(map(_trunk, first.branches), key=len)[-1:] == ["conv"]
        self.stem()
        stage, channels, index = 0, None, 0
        while self.sees("branches") or self.sees("bn", "relu", "branches"):
            outputs = _outputs(self.ops[self.place + (0 if self.sees("branches") else 2)])
            if outputs != channels:
                stage, channels, index = stage + 1, outputs, 0
            self.block(stage, index)
            index += 1
        if self.preactivation:
            self.norm_relu("final_bn")
        self.next("avgpool", "the last pooling")
        self.of[id(self.next("linear", "fc").module)] = "fc"
        self.next("end", "fc")

    def check_last_norms(self) -> None:
        """Refuse BN after the addition; only the first block of a pre-activation stage follows a BN."""
        kinds = ["branches", "add", "bn", "relu", "branches"]
        for place, op in enumerate(self.ops):
            self.place = place
            if self.sees(*kinds) and _outputs(op) == _outputs(self.ops[place + 4]):
                raise InvalidFileError(
                    "its blocks have BN after the addition, as in the published resnet-50.t7, and ours before"
                )
        self.place = 0

    def stem(self) -> None:
        self.imagenet = self.sees("conv") and _number(self.ops[0].module, "kW") == 7
        self.convolution("conv1", *((7, 2) if self.imagenet else (3, 1)))
        if self.imagenet or not self.preactivation:
            self.norm_relu("bn1")
        if self.imagenet:
            pool = self.next("maxpool", "maxpool").module
            _check_sizes(pool, "maxpool", 3, 2, 1)
            if pool.fields.get("ceil_mode") is True:
                raise InvalidFileError("maxpool: rounds sizes up, but ours rounds down")

    def block(self, stage: int, index: int) -> None:
        name, first = f"layer{stage}.{index}", index == 0
        stride = 2 if first and stage > 1 else 1
        activated = self.preactivation and not (self.imagenet and first and stage == 1)
        if activated and first:  # the shortcut also gets the activated input
            self.norm_relu(f"{name}.bn0")
        sides = self.next("branches", name).branches
        self.next("add", name)
        if len(sides) != 2:
            raise InvalidFileError(f"{name}: has {len(sides)} branches, expected a branch and a shortcut")
        branch, shortcut = sorted(sides, key=lambda ops: len(_trunk(ops)), reverse=True)
        basic = _trunk(branch).count("conv") == 2
        inner = _Names(branch, self.of)
        if activated and not first:
            inner.norm_relu(f"{name}.bn0")
        if basic:
            inner.path(name, (3, stride))
            inner.convolution(f"{name}.conv2", 3)
        else:
            inner.branch(name, stride)
        if not self.preactivation:
            inner.norm(f"{name}.bn{2 if basic else 3}")
            self.next("relu", name)
        inner.next("end", name)
        _Names(shortcut, self.of).shortcut(name, stride, with_bn=not self.preactivation)

    def branch(self, name: str, stride: int) -> None:
        """Read the convolutions of form C, or the paths of form B (joined) or A (added)."""
        if not self.sees("branches"):
            self.path(name, (1, 1), (3, stride))
            self.convolution(f"{name}.conv3", 1)
            return
        paths = self.next("branches", name).branches
        added = self.sees("add")
        self.next("add" if added else "join", name)
        for number, ops in enumerate(paths):
            path = _Names(ops, self.of)
            path.path(f"{name}.paths.{number}", (1, 1), (3, stride))
            if added:
                path.convolution(f"{name}.paths.{number}.conv3", 1)
            path.next("end", name)
        if not added:
            self.convolution(f"{name}.conv3", 1)

    def path(self, name: str, *convolutions: tuple[int, int]) -> None:
        """Read convolutions, given by kernel and stride, each with BN and ReLU."""
        for number, (kernel, stride) in enumerate(convolutions, 1):
            self.convolution(f"{name}.conv{number}", kernel, stride)
            self.norm_relu(f"{name}.bn{number}")

    def shortcut(self, name: str, stride: int, with_bn: bool) -> None:
        """Read the identity, a 1x1 convolution, or the subsampled input with zero channels appended."""
        if self.sees("conv"):
            self.convolution(f"{name}.downsample.0", 1, stride)
            if with_bn:
                self.norm(f"{name}.downsample.1")
            self.next("end", f"{name}'s shortcut")
            return
        if self.sees("avgpool"):
            _check_sizes(self.next("avgpool", name).module, f"{name}'s shortcut", 1, stride, 0)
        if self.sees("branches", "join"):
            branches = self.next("branches", name).branches
            kinds = [[op.kind for op in branch] for branch in branches]
            if kinds != [[], ["zero"]] or _number(branches[1][0].module, "constant_scalar", 1) != 0:
                raise InvalidFileError(f"{name}: its shortcut is not of type A, B or C")
            self.next("join", name)
        elif self.sees("padding"):
            self.next("padding", name)
        self.next("end", f"{name}'s shortcut")


def _weighted(ops: Iterable[Op]) -> Iterator[Op]:
    """Yield the convolutions and norms of a branch, including those of its inner branches."""
    for op in ops:
        if op.kind in ("conv", "bn"):
            yield op
        for inner in op.branches:
            yield from _weighted(inner)


def _trunk(ops: Iterable[Op]) -> list[str]:
    return [op.kind for op in _weighted(ops)]


def _outputs(block: Op) -> int:
    """Return the output channels of a block: those of the last convolution of its longest branch."""
    branches = [[op.module for op in _weighted(ops) if op.kind == "conv"] for ops in block.branches]
    longest = max(branches, key=len)
    return _whole(longest[-1], "nOutputPlane") if longest else 0


# ---------------------------------------------------------------------------- fields of a module


def _number(module: Object, name: str, default: float = 0) -> float:
    value = module.fields.get(name)
    return value if type(value) is float else default


def _whole(module: Object, name: str, default: int = 0) -> int:
    value = _number(module, name, default)
    if not 0 <= value < 1 << 31 or value != int(value):
        raise InvalidFileError(f"{name} of a {module.class_name[:60]} is {value}, expected an integer")
    return int(value)


def _check_sizes(module: Object, name: str, kernel: int, stride: int, padding: int) -> None:
    defaults = {"kW": 0, "kH": 0, "dW": 1, "dH": 1, "padW": 0, "padH": 0}
    found = [_number(module, key, default) for key, default in defaults.items()]
    if found != [kernel, kernel, stride, stride, padding, padding]:
        k, s, p = (f"{found[i]:g}x{found[i + 1]:g}" for i in (0, 2, 4))
        raise InvalidFileError(
            f"{name}: kernel {k}, stride {s}, padding {p}, expected {kernel}, {stride}, {padding}"
        )


def _tensor(module: Object, name: str) -> Tensor | None:
    value = module.fields.get(name)
    if not isinstance(value, Tensor) or not value.numel():
        return None
    if not value.is_floating_point():
        raise InvalidFileError(f"{name} of a {module.class_name[:60]} holds integers")
    return value


def _convert(module: Object, name: str) -> dict[str, Tensor]:
    """Return the learned tensors, then the statistics of a module, with the shapes of ours."""
    weight, bias = _tensor(module, "weight"), _tensor(module, "bias")
    kind = KINDS[_class(module)]
    if kind == "conv":
        if bias is not None and bias.count_nonzero():
            raise InvalidFileError(f"{name}: has a bias, but ours has none")
        return {"weight": _convolution_weight(module, weight, name)}
    if kind == "linear":
        if weight is None or weight.ndim != 2:
            raise InvalidFileError(f"{name}: has no weight matrix")
        return {"weight": weight, "bias": weight.new_zeros(len(weight)) if bias is None else bias}
    mean, variance = _tensor(module, "running_mean"), _tensor(module, "running_var")
    eps, deviation = _number(module, "eps", EPS), _tensor(module, "running_std")
    if variance is None and deviation is not None:  # before version 2: 1 / sqrt(variance + eps)
        variance = deviation.double() ** -2 - eps
    if mean is None or variance is None or mean.shape != variance.shape:
        raise InvalidFileError(f"{name}: has no running statistics")
    if eps != EPS:  # ours adds its own
        variance = variance.double() + (eps - EPS)
    return {
        "weight": torch.ones_like(mean) if weight is None else weight,
        "bias": torch.zeros_like(mean) if bias is None else bias,
        "running_mean": mean,
        "running_var": variance,
    }


def _convolution_weight(module: Object, weight: Tensor | None, name: str) -> Tensor:
    """Return (outputs, inputs / groups, kernel, kernel), in whatever shape a backend stored it."""
    keys = ("nOutputPlane", "nInputPlane", "kH", "kW")
    outputs, inputs, height, width = (_whole(module, key) for key in keys)
    groups = _whole(module, "groups", 1)
    if groups < 1 or inputs % groups or weight is None:
        raise InvalidFileError(f"{name}: has no weights for {inputs} channels in {groups} groups")
    shape = (outputs, inputs // groups, height, width)
    if weight.numel() != torch.Size(shape).numel():
        raise InvalidFileError(f"{name}: has {weight.numel()} weights, which do not make {shape}")
    return weight.reshape(shape)
