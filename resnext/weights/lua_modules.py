"""Networks of the Lua code (models/resnext.lua, resnet.lua, preresnet.lua) as state_dicts.

Modules are told by kind and order and not by their place, because published files nest them otherwise
than the code does. Whatever would compute something else than our network is refused.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import InvalidFileError
from .t7 import Object, Table, parse_t7

EPS = 1e-5  # of our BatchNorm
MAX_MODULES, MAX_NESTING = 100_000, 50

CONVOLUTIONS = ("SpatialConvolution", "SpatialConvolutionMM")
NORMS = ("SpatialBatchNormalization", "BatchNormalization")
RELUS = ("ReLU", "Threshold")
NEUTRAL = ("View", "Reshape", "Identity", "Copy", "Contiguous", "Squeeze")  # change no number
CONTAINERS = ("Sequential", "ConcatTable", "Concat", "DepthConcat")
REPLICAS = ("DataParallelTable", "DataParallel")  # hold the network several times
KINDS = dict.fromkeys(CONVOLUTIONS, "conv") | dict.fromkeys(NORMS, "bn") | dict.fromkeys(RELUS, "relu")
KINDS |= {"SpatialMaxPooling": "maxpool", "SpatialAveragePooling": "avgpool", "Linear": "linear"}
KINDS |= {"CAddTable": "add", "JoinTable": "join", "MulConstant": "zero", "Padding": "padding"}


@dataclass
class Op:
    """One module that computes something, or parallel branches of them (kind "branches")."""

    kind: str
    module: Object | None = None
    branches: list[list["Op"]] = field(default_factory=list)


@dataclass
class LuaNetwork:
    """state: a state_dict in our names. parameters: those of its keys that are learned, in Lua's order."""

    state: dict[str, Tensor]
    parameters: list[str]


def convert_network(root: Any, limit: int) -> LuaNetwork:
    """The network in a module tree as parse_t7 reads it; `limit`: the most elements that it may have.

    Raises Unreadable for what is none of these networks.
    """
    ops, order = _flatten(root)
    names = _Names(ops)
    names.network()
    if sum(tensor.numel() for module in order for tensor in _all_tensors(module)) > limit:
        raise InvalidFileError("its tensors are larger than the file")
    state: dict[str, Tensor] = {}
    parameters: list[str] = []
    for module in order:
        name = names.of[id(module)]
        learned, statistics = _tensors(module, name)
        for key, value in learned.items():
            state[f"{name}.{key}"] = value
            parameters.append(f"{name}.{key}")
        state |= {f"{name}.{key}": value for key, value in statistics.items()}
    return LuaNetwork(state, parameters)


@dataclass
class LuaRun:
    """A directory of checkpoints.lua: network, epochs done, and the optimiser's state (optim.sgd)."""

    network: LuaNetwork
    epoch: int
    optimizer: Table


def read_network(path: Path) -> LuaNetwork:
    """The network of a model_N.t7 or a published file. Raises Unreadable."""
    content = path.read_bytes()
    root = parse_t7(content)
    if isinstance(root, Table) and "modelFile" in root:
        raise InvalidFileError("names the files of a Lua run; give its folder")
    return convert_network(root, len(content))


def model_file(folder: Path) -> Path:
    """The model that a directory's latest.t7 names. Raises Unreadable."""
    return _named_file(folder, _latest(folder), "modelFile")


def read_run(folder: Path) -> LuaRun:
    """What latest.t7, and the two files that it names, hold. Raises Unreadable."""
    latest = _latest(folder)
    epoch = latest.get("epoch")
    optimizer = parse_t7(_named_file(folder, latest, "optimFile").read_bytes())
    whole = type(epoch) is float and epoch >= 1 and epoch.is_integer()
    if not whole or not isinstance(optimizer, Table):
        raise InvalidFileError("latest.t7 or the optimiser's state is not what checkpoints.lua writes")
    return LuaRun(read_network(_named_file(folder, latest, "modelFile")), int(epoch), optimizer)


def _latest(folder: Path) -> Table:
    latest = parse_t7((folder / "latest.t7").read_bytes())
    if not isinstance(latest, Table):
        raise InvalidFileError("latest.t7 is not what checkpoints.lua writes")
    return latest


def _named_file(folder: Path, latest: Table, key: str) -> Path:
    """Beside latest.t7, wherever the run was."""
    name = latest.get(key)
    if not isinstance(name, str) or not name.rpartition("/")[2]:
        raise InvalidFileError(f"latest.t7 names no {key}")
    path = folder / name.rpartition("/")[2]
    if not path.is_file():
        raise InvalidFileError(f"{path.name}, which latest.t7 names, is not there")
    return path


# ---------------------------------------------------------------------------- the tree as a list


def _flatten(root: Any) -> tuple[list[Op], list[Object]]:
    """(what a module tree does, one after another; its modules with weights as Lua walks them)."""
    order: dict[int, Object] = {}
    inside: set[int] = set()
    visits = 0

    def walk(module: Any) -> list[Op]:
        nonlocal visits
        visits += 1
        if visits > MAX_MODULES or id(module) in inside or len(inside) > MAX_NESTING:
            raise InvalidFileError(
                f"a module holds itself, or over {MAX_MODULES:,} others, or {MAX_NESTING} nested"
            )
        kind = _class(module)
        if kind in CONTAINERS or kind in REPLICAS:
            inside.add(id(module))
            children = _children(module)
            branches = [walk(child) for child in (children[:1] if kind in REPLICAS else children)]
            inside.remove(id(module))
            if kind == "Sequential" or kind in REPLICAS:
                return [op for branch in branches for op in branch]
            joined = [] if kind == "ConcatTable" else [Op("join")]
            return [Op("branches", module, branches), *joined]
        if kind in NEUTRAL:
            return []
        _check_kind(module, kind)
        if KINDS[kind] in ("conv", "bn", "linear"):
            if id(module) in order:
                raise InvalidFileError("a module with weights is used twice")
            order[id(module)] = module
        return [Op(KINDS[kind], module)]

    return walk(root), list(order.values())


def _check_kind(module: Object, kind: str) -> None:
    if kind not in KINDS:
        raise InvalidFileError(
            f"it has a module {module.class_name[:60]!r}, which these networks do not have"
        )
    if kind == "Threshold" and (_number(module, "threshold", 0), _number(module, "val", 0)) != (0, 0):
        raise InvalidFileError("it has a threshold that is not ReLU's")


def _class(module: Any) -> str:
    """The class name of a module without its package: nn, cudnn, fbnn, inn."""
    if not isinstance(module, Object) or module.fields is None:
        raise InvalidFileError("it holds no network: something else stands in place of an nn module")
    return module.class_name.rpartition(".")[2]


def _children(module: Object) -> list[Any]:
    children = module.fields.get("modules")
    if not isinstance(children, Table) or not len(children):
        raise InvalidFileError(f"a {module.class_name[:60]} without modules")
    return [children.get(number) for number in range(1, len(children) + 1)]


# ---------------------------------------------------------------------------- names by order


class _Names:
    """Walks the list and gives each module with weights the name it has with us."""

    def __init__(self, ops: list[Op]):
        self.ops, self.place = ops, 0
        self.of: dict[int, str] = {}

    # -- the cursor

    def sees(self, *kinds: str) -> bool:
        return [op.kind for op in self.ops[self.place : self.place + len(kinds)]] == list(kinds)

    def next(self, kind: str, what: str) -> Op:
        if not self.sees(kind):
            found = self.ops[self.place].kind if self.place < len(self.ops) else "nothing"
            raise InvalidFileError(
                f"{what}: {found} stands where {kind} should; this is none of the networks read"
            )
        self.place += 1
        return self.ops[self.place - 1]

    def norm(self, name: str) -> None:
        self.of[id(self.next("bn", name).module)] = name

    def convolution(self, name: str, kernel: int, stride: int = 1) -> Object:
        module = self.next("conv", name).module
        _check_sizes(module, name, kernel, stride, kernel // 2)
        self.of[id(module)] = name
        return module

    def inner(self, ops: list[Op]) -> "_Names":
        names = _Names(ops)
        names.of = self.of
        return names

    def end(self, what: str) -> None:
        if self.place < len(self.ops):
            raise InvalidFileError(f"{what}: goes on with {self.ops[self.place].kind} where it should end")

    # -- the grammar

    def network(self) -> None:
        first = next((op for op in self.ops if op.kind == "branches"), None)
        if first is None:
            raise InvalidFileError("it holds no network with residual blocks")
        self.preactivation = max((_trunk(branch) for branch in first.branches), key=len)[-1:] == ["conv"]
        self.stem()
        stage, channels, index = 0, None, 0
        while self.sees("branches") or self.sees("bn", "relu", "branches"):
            outputs = _outputs(self.ops[self.place + (0 if self.sees("branches") else 2)])
            if outputs != channels:
                stage, channels, index = stage + 1, outputs, 0
            self.block(stage, index)
            index += 1
        if self.preactivation:
            self.norm("final_bn")
            self.next("relu", "final_bn")
        self.next("avgpool", "the pooling ahead of the last layer")
        self.of[id(self.next("linear", "fc").module)] = "fc"
        self.end("fc")

    def stem(self) -> None:
        first = self.ops[0].module if self.sees("conv") else None
        self.imagenet = first is not None and _number(first, "kW", 0) == 7
        if self.imagenet:
            self.convolution("conv1", 7, 2)
        else:
            self.convolution("conv1", 3)
        if self.imagenet or not self.preactivation:
            self.norm("bn1")
            self.next("relu", "bn1")
        if self.imagenet:
            pool = self.next("maxpool", "maxpool").module
            _check_sizes(pool, "maxpool", 3, 2, 1)
            if pool.fields.get("ceil_mode") is True:
                raise InvalidFileError("maxpool: rounds sizes up, ours down")

    def block(self, stage: int, index: int) -> None:
        name, first = f"layer{stage}.{index}", index == 0
        stride = 2 if first and stage > 1 else 1
        bare = not self.preactivation or (self.imagenet and first and stage == 1)
        if not bare and first:  # the shortcut sees the activated input too
            self.norm(f"{name}.bn0")
            self.next("relu", name)
        sides = self.next("branches", name).branches
        self.next("add", name)
        if len(sides) != 2:
            raise InvalidFileError(f"{name}: has {len(sides)} branches, not a branch and a shortcut")
        branch, shortcut = sorted(sides, key=lambda ops: len(_trunk(ops)), reverse=True)
        if _trunk(branch).count("conv") == 2:
            raise InvalidFileError(
                "its blocks have two convolutions; these networks have bottlenecks of three"
            )
        inner = self.inner(branch)
        if not bare and not first:
            inner.norm(f"{name}.bn0")
            inner.next("relu", name)
        inner.branch(name, stride)
        if not self.preactivation:
            inner.norm(f"{name}.bn3")
            self.next("relu", name)
        inner.end(name)
        self.inner(shortcut).shortcut(name, stride, with_bn=not self.preactivation)

    def branch(self, name: str, stride: int) -> None:
        """The convolutions of form C, or the paths of B (joined) and A (added)."""
        if not self.sees("branches"):
            self.path(name, stride)
            self.convolution(f"{name}.conv3", 1)
            return
        paths = self.next("branches", name).branches
        added = self.sees("add")
        self.next("add" if added else "join", name)
        for number, ops in enumerate(paths):
            path = self.inner(ops)
            path.path(f"{name}.paths.{number}", stride)
            if added:
                path.convolution(f"{name}.paths.{number}.conv3", 1)
            path.end(name)
        if not added:
            self.convolution(f"{name}.conv3", 1)

    def path(self, name: str, stride: int) -> None:
        for number, (kernel, step) in enumerate(((1, 1), (3, stride)), 1):
            self.convolution(f"{name}.conv{number}", kernel, step)
            self.norm(f"{name}.bn{number}")
            self.next("relu", name)

    def shortcut(self, name: str, stride: int, with_bn: bool) -> None:
        """The identity, a 1x1 convolution, or the subsampled input with zero channels appended."""
        if self.sees("conv"):
            self.convolution(f"{name}.downsample.0", 1, stride)
            if with_bn:
                self.norm(f"{name}.downsample.1")
        elif self.ops:
            if self.sees("avgpool"):
                _check_sizes(self.next("avgpool", name).module, f"{name}'s shortcut", 1, stride, 0)
            if self.sees("branches", "join"):
                kinds = [[op.kind for op in branch] for branch in self.ops[self.place].branches]
                zero = kinds == [[], ["zero"]] and self.ops[self.place].branches[1][0].module
                if not zero or _number(zero, "constant_scalar", 1) != 0:
                    raise InvalidFileError(f"{name}: its shortcut is none of A, B and C")
                self.place += 2
            elif self.sees("padding"):
                self.place += 1
        self.end(f"{name}'s shortcut")


def _trunk(ops: Iterable[Op]) -> list[str]:
    """The kinds of the modules with weights of a branch, those of its inner branches ahead of them."""
    return [
        kind
        for op in ops
        for kind in (
            [k for inner in op.branches for k in _trunk(inner)] if op.kind == "branches" else [op.kind]
        )
        if kind in ("conv", "bn")
    ]


def _outputs(branches: Op) -> int:
    """The channels that a block puts out: those of the last convolution of its longest branch."""

    def convolutions(ops: list[Op]) -> Iterator[Object]:
        for op in ops:
            if op.kind == "conv":
                yield op.module
            for inner in op.branches:
                yield from convolutions(inner)

    found = max((list(convolutions(ops)) for ops in branches.branches), key=len)
    return _whole(found[-1], "nOutputPlane") if found else 0


# ---------------------------------------------------------------------------- numbers of a module


def _number(module: Object, name: str, default: float) -> float:
    value = module.fields.get(name)
    return value if type(value) is float else default


def _whole(module: Object, name: str, default: int = 0) -> int:
    value = _number(module, name, default)
    if not 0 <= value < 1 << 31 or value != int(value):
        raise InvalidFileError(f"{name} of a {module.class_name[:60]} is {value}")
    return int(value)


def _tensor(module: Object, name: str) -> Tensor | None:
    value = module.fields.get(name)
    if not isinstance(value, Tensor) or not value.numel():
        return None
    if not value.is_floating_point():
        raise InvalidFileError(f"{name} of a {module.class_name[:60]} holds whole numbers")
    return value


def _all_tensors(module: Object) -> list[Tensor]:
    keys = ("weight", "bias", "running_mean", "running_var", "running_std")
    return [tensor for key in keys if (tensor := _tensor(module, key)) is not None]


def _check_sizes(module: Object, name: str, kernel: int, stride: int, padding: int) -> None:
    fields = ("kW", "kH", "dW", "dH", "padW", "padH")
    defaults = (0, 0, 1, 1, 0, 0)
    found = [_number(module, key, default) for key, default in zip(fields, defaults, strict=True)]
    if found != [kernel, kernel, stride, stride, padding, padding]:
        k, s, p = (f"{found[i]:g}x{found[i + 1]:g}" for i in (0, 2, 4))
        raise InvalidFileError(
            f"{name}: kernel {k}, stride {s}, padding {p}, where ours has {kernel}, {stride}, {padding}"
        )


def _tensors(module: Object, name: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(learned tensors, statistics) of a module, of the shapes that ours have."""
    weight, bias = _tensor(module, "weight"), _tensor(module, "bias")
    if KINDS[_class(module)] == "conv":
        return {"weight": _convolution_weight(module, weight, bias, name)}, {}
    if KINDS[_class(module)] == "linear":
        if weight is None or weight.ndim != 2:
            raise InvalidFileError(f"{name}: has no matrix of weights")
        return {"weight": weight, "bias": weight.new_zeros(len(weight)) if bias is None else bias}, {}
    mean, variance = _tensor(module, "running_mean"), _tensor(module, "running_var")
    eps, deviation = _number(module, "eps", EPS), _tensor(module, "running_std")
    if variance is None and deviation is not None:  # before version 2: 1 / sqrt(variance + eps)
        variance = deviation.double() ** -2 - eps
    if mean is None or variance is None or mean.shape != variance.shape:
        raise InvalidFileError(f"{name}: has no running statistics")
    learned = {
        "weight": torch.ones_like(mean) if weight is None else weight,
        "bias": torch.zeros_like(mean) if bias is None else bias,
    }
    if eps != EPS:  # ours adds its own
        variance = variance.double() + (eps - EPS)
    return learned, {"running_mean": mean, "running_var": variance}


def _convolution_weight(module: Object, weight: Tensor | None, bias: Tensor | None, name: str) -> Tensor:
    """(outputs, inputs / groups, kernel, kernel), however a backend stored it."""
    if bias is not None and bias.count_nonzero():
        raise InvalidFileError(f"{name}: has a bias, ours has none")
    keys = ("nOutputPlane", "nInputPlane", "kH", "kW")
    outputs, inputs, height, width = (_whole(module, key) for key in keys)
    groups = _whole(module, "groups", 1)
    if groups < 1 or inputs % groups or weight is None:
        raise InvalidFileError(f"{name}: a convolution of {inputs} channels in {groups} groups")
    shape = (outputs, inputs // groups, height, width)
    if weight.numel() != torch.Size(shape).numel():
        raise InvalidFileError(f"{name}: {weight.numel()} weights do not make {shape}")
    return weight.reshape(shape)
