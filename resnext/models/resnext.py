"""ResNeXt and ResNet bottleneck networks for ImageNet and CIFAR (paper, sections 3-5).

Parameter names are torchvision's. A stage with n features outputs 4n channels; a block has
C = cardinality paths of width D = floor(n · base_width / 64). Its three equivalent forms
(Fig. 3) are C, one grouped convolution; B, separate paths joined by concatenation; A, separate
paths that each end in their own 1x1 convolution, summed. A plain ResNet bottleneck is the case
C = 1, base_width = 64.

Pre-activation blocks (fb.resnet.torch, preresnet.lua) put `bn0` and ReLU ahead of the
convolutions and drop the last BN, the shortcut's BN and the ReLU after the addition.
"""

import contextlib
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from ..config import STAGES_BY_DEPTH, ModelConfig
from ..errors import UserError
from .ghost_batchnorm import GhostBatchNorm2d, frozen_running_statistics, norm_relu, on_gpu

EXPANSION = 4


class Bottleneck(nn.Module):
    """A block in form C: 1x1, grouped 3x3 (with the stride), 1x1, added to a shortcut.

    `width` is D, of one path. With `preactivation`, `activate_input` is None in the first block
    of the ImageNet network (its input is activated already), "shared" where the shortcut sees
    the activated input too (other first blocks of a stage) and "branch" elsewhere.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        width: int,
        cardinality: int,
        stride: int,
        shortcut: nn.Module | None,
        preactivation: bool,
        activate_input: str | None,
    ):
        super().__init__()
        self.activate_input = activate_input
        if activate_input:
            self.bn0 = nn.BatchNorm2d(inputs)
        self._build_branch(inputs, outputs, width, cardinality, stride)
        self.bn3 = nn.Identity() if preactivation else nn.BatchNorm2d(outputs)
        self.activate_output = not preactivation
        self.downsample = shortcut

    def _build_branch(self, inputs, outputs, width, cardinality, stride) -> None:
        total = width * cardinality
        self.conv1 = _convolution(inputs, total, 1)
        self.bn1 = nn.BatchNorm2d(total)
        self.conv2 = _convolution(total, total, 3, stride, groups=cardinality)
        self.bn2 = nn.BatchNorm2d(total)
        self.conv3 = _convolution(total, outputs, 1)

    def _branch(self, x: Tensor) -> Tensor:
        x, _ = norm_relu(self.bn1, self.conv1(x))
        x, _ = norm_relu(self.bn2, self.conv2(x))
        return self.conv3(x)

    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """The output; where `skip` is given, which is x again, the output twice (see norm_relu)."""
        twice = skip is not None
        if not twice:
            skip = x
        if self.activate_input:
            x, activated = norm_relu(self.bn0, x)
            if self.activate_input == "shared":
                skip = activated
        if self.downsample is not None:
            skip = self.downsample(skip)
        x = self._branch(x)
        if self.activate_output:
            y, y2 = norm_relu(self.bn3, x, skip)
        else:
            y = y2 = self.bn3(x) + skip
        return (y, y2) if twice else y


class BottleneckPath(nn.Module):
    """One path of forms A and B: 1x1 and 3x3 of width D; in form A also its own last 1x1."""

    def __init__(self, inputs: int, width: int, stride: int, outputs: int | None = None):
        super().__init__()
        self.conv1 = _convolution(inputs, width, 1)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = _convolution(width, width, 3, stride)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Identity() if outputs is None else _convolution(width, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        x, _ = norm_relu(self.bn1, self.conv1(x))
        x, _ = norm_relu(self.bn2, self.conv2(x))
        return self.conv3(x)


class BottleneckB(Bottleneck):
    """A block in form B: paths joined by concatenation, then one 1x1."""

    def _build_branch(self, inputs, outputs, width, cardinality, stride) -> None:
        self.paths = nn.ModuleList(BottleneckPath(inputs, width, stride) for _ in range(cardinality))
        self.conv3 = _convolution(width * cardinality, outputs, 1)

    def _branch(self, x: Tensor) -> Tensor:
        return self.conv3(torch.cat([path(x) for path in self.paths], 1))


class BottleneckA(Bottleneck):
    """A block in form A: paths that each end in their own 1x1, summed."""

    def _build_branch(self, inputs, outputs, width, cardinality, stride) -> None:
        self.paths = nn.ModuleList(BottleneckPath(inputs, width, stride, outputs) for _ in range(cardinality))

    def _branch(self, x: Tensor) -> Tensor:
        return sum(path(x) for path in self.paths)


BLOCKS = {"A": BottleneckA, "B": BottleneckB, "C": Bottleneck}


class ZeroPadShortcut(nn.Module):
    """Shortcut A: the input subsampled by the stride, zero channels appended."""

    def __init__(self, added: int, stride: int):
        super().__init__()
        self.added, self.stride = added, stride

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.added))


class ResNeXt(nn.Module):
    """The network: stem, stages of blocks, global average pool, linear classifier.

    Args:
        stages: blocks in each stage; 4 stages for the ImageNet stem, 3 for CIFAR's.
        cardinality, base_width: groups of a block, and the width of one at 64 features.
        stem: "imagenet" (7x7/2, max-pool) or "cifar" (3x3).
        form: "A", "B" or "C" (Fig. 3).
        shortcut: "A", "B" or "C" (see config.Model).
        classes: size of the output; None for a backbone without a last layer (`fc` is an Identity).

    Input is a float tensor (N, 3, H, W), normalised; output (N, classes) raw scores, of a backbone the
    pooled features (N, channels). Any H and W work; the original's are 224 and 32.
    `activation_checkpointing` may be set at any time.
    """

    def __init__(
        self,
        stages: Sequence[int] = (3, 4, 6, 3),
        cardinality: int = 32,
        base_width: int = 4,
        classes: int | None = 1000,
        *,
        stem: str = "imagenet",
        form: str = "C",
        shortcut: str = "B",
        preactivation: bool = False,
        zero_gamma: bool = False,
    ):
        super().__init__()
        _check_arguments(stages, cardinality, base_width, classes, stem, form, shortcut)
        if zero_gamma and preactivation:
            raise UserError("zero_gamma: pre-activation blocks end without BN; set one of the two to False")
        imagenet = stem == "imagenet"
        self.cardinality, self.form = cardinality, form
        self.activation_checkpointing = False
        self.conv1 = _convolution(3, 64, 7, 2) if imagenet else _convolution(3, 64, 3)
        # In the pre-activation CIFAR network the first block's bn0 does the stem's work.
        if imagenet or not preactivation:
            self.bn1 = nn.BatchNorm2d(64)
            self.relu = nn.ReLU(inplace=True)
        if imagenet:
            self.maxpool = nn.MaxPool2d(3, 2, 1)
        # The children stand in the order they run, for torchvision's IntermediateLayerGetter.
        self.stem = [name for name, _ in self.named_children()]
        self.frozen: list[str] = []
        channels = 64
        for number, blocks in enumerate(stages, 1):
            features = 64 * 2 ** (number - 1)
            outputs = EXPANSION * features
            stage = nn.Sequential()
            for index in range(blocks):
                first = index == 0
                stride = 2 if first and number > 1 else 1
                activate = None
                if preactivation and not (imagenet and first and number == 1):
                    activate = "shared" if first else "branch"
                stage.append(
                    BLOCKS[form](
                        channels,
                        outputs,
                        width=features * base_width // 64,
                        cardinality=cardinality,
                        stride=stride,
                        shortcut=_shortcut(shortcut, channels, outputs, stride, not preactivation),
                        preactivation=preactivation,
                        activate_input=activate,
                    )
                )
                channels = outputs
            self.add_module(f"layer{number}", stage)
        self.stages = len(stages)
        self.final_bn = nn.BatchNorm2d(channels) if preactivation else None
        self.fc = nn.Identity() if classes is None else nn.Linear(channels, classes)
        _initialize(self, zero_gamma)

    def freeze(self, stages: int) -> None:
        """Keep the stem and the first `stages` as they are: neither learned nor BN statistics moved."""
        self.frozen = [*self.stem, *(f"layer{number}" for number in range(1, stages + 1))]
        for name in self.frozen:
            getattr(self, name).requires_grad_(False)
        self.train(self.training)

    def train(self, mode: bool = True) -> "ResNeXt":
        super().train(mode)
        for name in self.frozen:
            getattr(self, name).eval()
        return self

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.forward_features(x).mean((2, 3)))

    def forward_features(self, x: Tensor) -> Tensor:
        """The activated output of the last stage: (N, channels, h, w)."""
        x = self.conv1(x)
        if "bn1" in self.stem:
            x, _ = norm_relu(self.bn1, x, relu=self.relu)
        if "maxpool" in self.stem:
            x = self.maxpool(x)
        skip = x
        for number in range(1, self.stages + 1):
            for block in getattr(self, f"layer{number}"):
                if self.training and type(block.bn3) is GhostBatchNorm2d and block.bn3.fused and on_gpu(x):
                    x, skip = self._run(block, x, skip)
                else:
                    x = skip = self._run(block, x)
        return x if self.final_bn is None else norm_relu(self.final_bn, x)[0]

    def _run(self, block: nn.Module, *x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        if not (self.activation_checkpointing and self.training and torch.is_grad_enabled()):
            return block(*x)

        def contexts():
            # Recomputation must not move the running statistics a second time.
            return contextlib.nullcontext(), frozen_running_statistics(block)

        return checkpoint(block, *x, use_reentrant=False, preserve_rng_state=False, context_fn=contexts)


def _convolution(inputs: int, outputs: int, size: int, stride: int = 1, groups: int = 1):
    return nn.Conv2d(inputs, outputs, size, stride, size // 2, groups=groups, bias=False)


def _shortcut(kind: str, inputs: int, outputs: int, stride: int, with_bn: bool) -> nn.Module | None:
    if kind == "C" or (kind == "B" and inputs != outputs):
        shortcut = nn.Sequential(_convolution(inputs, outputs, 1, stride))
        if with_bn:
            shortcut.append(nn.BatchNorm2d(outputs))
        return shortcut
    return None if inputs == outputs else ZeroPadShortcut(outputs - inputs, stride)


def _initialize(model: ResNeXt, zero_gamma: bool) -> None:
    """models/resnext.lua: conv N(0, sqrt(2 / (k·k·outputs))), BN 1 and 0, linear U(±1/sqrt(in))."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            fan_out = math.prod(module.kernel_size) * module.out_channels
            nn.init.normal_(module.weight, 0.0, math.sqrt(2.0 / fan_out))
        elif isinstance(module, nn.Linear):
            bound = 1.0 / math.sqrt(module.in_features)
            nn.init.uniform_(module.weight, -bound, bound)
            nn.init.zeros_(module.bias)
        elif isinstance(module, Bottleneck) and zero_gamma:
            nn.init.zeros_(module.bn3.weight)


def _check_arguments(stages, cardinality, base_width, classes, stem, form, shortcut) -> None:
    choices = {
        "stem": (stem, ("imagenet", "cifar")),
        "form": (form, ("A", "B", "C")),
        "shortcut": (shortcut, ("A", "B", "C")),
        "number of stages": (len(stages), (4,) if stem == "imagenet" else (3,)),
    }
    for name, (value, allowed) in choices.items():
        if value not in allowed:
            raise UserError(f"{name} must be {' or '.join(map(str, allowed))}, not {value!r}")
    for name, value in {
        "blocks of a stage": min(stages),
        "cardinality": cardinality,
        "base_width": base_width,
        "classes": classes,
    }.items():
        if value is not None and value < 1:
            raise UserError(f"{name} must be at least 1, not {value}")


def build_model(config: ModelConfig, classes: int | None) -> ResNeXt:
    """The network that a configuration describes; without a last layer where `classes` is None."""
    return ResNeXt(
        config.stages,
        config.cardinality,
        config.base_width,
        classes,
        stem=config.stem,
        form=config.block,
        shortcut=config.shortcut,
        preactivation=config.preactivation,
        zero_gamma=config.zero_gamma,
    )


def complexity(model: nn.Module, image_size: int) -> tuple[int, int]:
    """(parameters, multiply-adds of convolutions and linear layers for one image)."""
    counter = FlopCounterMode(display=False)
    like = next(model.parameters())
    training = model.training
    model.eval()
    with torch.no_grad(), counter:
        model(torch.empty(1, 3, image_size, image_size, device=like.device, dtype=like.dtype))
    model.train(training)
    return sum(p.numel() for p in model.parameters()), counter.get_total_flops() // 2


def convert_form(
    state: Mapping[str, Tensor], cardinality: int, source: str, target: str
) -> dict[str, Tensor]:
    """Weights of a network in form `source` rearranged for form `target` (Fig. 3, A, B, C).

    The networks compute the same function. `state` is a state_dict; the result shares no memory
    with it. Path i holds rows i·D...(i+1)·D of form C's 1x1 and 3x3 with their BN, and in form
    A also columns i·D...(i+1)·D of the last 1x1.
    """
    if not {source, target} <= set("ABC"):
        raise UserError(f"forms are A, B and C, not {source!r} and {target!r}")
    paths = {key.partition(".paths.")[2].split(".")[0] for key in state if ".paths." in key}
    found = "C" if not paths else "A" if any(".paths.0.conv3." in key for key in state) else "B"
    if found != source or (paths and len(paths) != cardinality):
        count = f" with {len(paths)} paths" if paths else ""
        raise UserError(
            f"the weights are of form {found}{count}, not {source} with cardinality {cardinality}"
        )
    joined: dict[str, Tensor] = {}
    for key, value in state.items():  # to form C
        block, is_path, rest = key.partition(".paths.")
        if not is_path:
            joined[key] = value.clone()
        elif rest.startswith("0."):
            leaf = rest[2:]
            parts = [state[f"{block}.paths.{i}.{leaf}"] for i in range(cardinality)]
            if value.dim() == 0:  # num_batches_tracked is the same in every path
                joined[f"{block}.{leaf}"] = value.clone()
            else:
                joined[f"{block}.{leaf}"] = torch.cat(parts, 1 if leaf == "conv3.weight" else 0)
    if target == "C":
        return joined
    split_leaves = {"conv1", "bn1", "conv2", "bn2"} | ({"conv3"} if target == "A" else set())
    split: dict[str, Tensor] = {}
    for key, value in joined.items():
        *block, leaf, kind = key.split(".")
        if len(block) < 2 or leaf not in split_leaves:
            split[key] = value
            continue
        axis = 1 if leaf == "conv3" else 0
        if value.dim() and value.shape[axis] % cardinality:
            raise UserError(f"{key}: {value.shape[axis]} channels do not make {cardinality} paths")
        parts = value.chunk(cardinality, axis) if value.dim() else [value] * cardinality
        for i, part in enumerate(parts):
            split[".".join([*block, "paths", str(i), leaf, kind])] = part.clone()
    return split


def _named(depth: int, cardinality: int, base_width: int) -> Callable[..., ResNeXt]:
    """A constructor with a conventional name: classes and other options as for ResNeXt."""
    if depth in STAGES_BY_DEPTH:
        return partial(ResNeXt, STAGES_BY_DEPTH[depth], cardinality, base_width)
    stages = ((depth - 2) // 9,) * 3
    return partial(ResNeXt, stages, cardinality, base_width, stem="cifar")


resnet50 = _named(50, 1, 64)
resnet101 = _named(101, 1, 64)
resnet152 = _named(152, 1, 64)
resnext50_32x4d = _named(50, 32, 4)
resnext101_32x4d = _named(101, 32, 4)
resnext101_32x8d = _named(101, 32, 8)
resnext101_64x4d = _named(101, 64, 4)
resnext152_32x4d = _named(152, 32, 4)
resnext29_8x64d = _named(29, 8, 64)
resnext29_16x64d = _named(29, 16, 64)
