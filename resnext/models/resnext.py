"""ResNeXt and ResNet for ImageNet and CIFAR (paper, sections 3-5; fb.resnet.torch).

Parameter names are torchvision's. A stage with n features outputs 4n channels from bottlenecks,
which have C = cardinality paths of width D = floor(n · base_width / 64). Their three equivalent
forms (Fig. 3) are C, one grouped convolution; B, separate paths joined by concatenation; A,
separate paths that each end in their own 1x1 convolution, summed. A plain ResNet bottleneck is
the case C = 1, base_width = 64. Basic blocks (resnet.lua) output n channels; n starts at
base_width, 64 for ImageNet and 16 for CIFAR.

Pre-activation blocks (fb.resnet.torch, preresnet.lua) put `bn0` and ReLU before the convolutions
and have no last BN, no BN in the shortcut, and no ReLU after the addition.
"""

import contextlib
import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..config import ModelConfig, stages_by_depth
from ..errors import UserError
from .ghost_batchnorm import GhostBatchNorm2d, frozen_running_statistics, norm_relu, on_gpu


class Block(nn.Module):
    """A residual block: a branch of convolutions, added to a shortcut.

    `features` is n of the stage. With `preactivation`, `activate_input` is None in the first block
    of the ImageNet network (its input is already activated), "shared" in the first block of other
    stages (the shortcut also gets the activated input), and "branch" in all other blocks.
    """

    expansion: int  # output channels per feature
    last: str  # name of the last BN

    def __init__(
        self,
        inputs: int,
        features: int,
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
        outputs = self.expansion * features
        self._build_branch(inputs, outputs, width, cardinality, stride)
        self.add_module(self.last, nn.Identity() if preactivation else nn.BatchNorm2d(outputs))
        self.activate_output = not preactivation
        self.downsample = shortcut

    @property
    def last_bn(self) -> nn.Module:
        """The BN before the addition; an Identity in pre-activation blocks."""
        return getattr(self, self.last)

    def _build_branch(self, inputs, outputs, width, cardinality, stride) -> None:
        raise NotImplementedError

    def _branch(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """Return the output; if `skip` (x again) is given, return the output twice (see norm_relu)."""
        shortcut = x if skip is None else skip
        if self.activate_input:
            x, activated = norm_relu(self.bn0, x)
            if self.activate_input == "shared":
                shortcut = activated
        if self.downsample is not None:
            shortcut = self.downsample(shortcut)
        x = self._branch(x)
        if self.activate_output:
            y, y2 = norm_relu(self.last_bn, x, shortcut)
        else:
            y = y2 = x + shortcut
        return y if skip is None else (y, y2)


class Basic(Block):
    """A block of two 3x3, the first with the stride."""

    expansion, last = 1, "bn2"

    def _build_branch(self, inputs, outputs, width, cardinality, stride) -> None:
        self.conv1 = _convolution(inputs, width, 3, stride)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = _convolution(width, outputs, 3)

    def _branch(self, x: Tensor) -> Tensor:
        x, _ = norm_relu(self.bn1, self.conv1(x))
        return self.conv2(x)


class Bottleneck(Block):
    """A block in form C: 1x1, grouped 3x3 (with the stride), 1x1; `width` is D, that of one path."""

    expansion, last = 4, "bn3"

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


class BottleneckPath(nn.Module):
    """One path of forms A and B: 1x1 and 3x3 of width D; in form A also a last 1x1."""

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
    """A block in form A: the sum of paths that each end in a 1x1."""

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
        cardinality, base_width: groups per block, and the width of a group at 64 features; of basic
            blocks 1, and the channels of the first stage.
        stem: "imagenet" (7x7/2, max-pool) or "cifar" (3x3).
        block_type: "bottleneck" or "basic".
        form: "A", "B" or "C" (Fig. 3); of basic blocks C.
        shortcut: "A", "B" or "C" (see config.ModelConfig).
        classes: size of the output; None makes a backbone without a last layer (`fc` is an Identity).

    The input is a normalized float tensor (N, 3, H, W). The output is logits (N, classes), or pooled
    features (N, channels) of a backbone. Any H and W work; the original uses 224 and 32.
    `activation_checkpointing` can be set at any time. Raises UserError for impossible arguments.
    """

    def __init__(
        self,
        stages: Sequence[int] = (3, 4, 6, 3),
        cardinality: int = 32,
        base_width: int = 4,
        classes: int | None = 1000,
        *,
        stem: str = "imagenet",
        block_type: str = "bottleneck",
        form: str = "C",
        shortcut: str = "B",
        preactivation: bool = False,
        zero_gamma: bool = False,
    ):
        super().__init__()
        _check_arguments(stages, cardinality, base_width, classes, stem, block_type, form, shortcut)
        if zero_gamma and preactivation:
            raise UserError("zero_gamma: pre-activation blocks end without BN; set one of the two to False")
        imagenet, basic = stem == "imagenet", block_type == "basic"
        block = Basic if basic else BLOCKS[form]
        channels = base_width if basic else 64
        self.cardinality, self.form = cardinality, form
        self.activation_checkpointing = False
        self.conv1 = _convolution(3, channels, *((7, 2) if imagenet else (3, 1)))
        # In the pre-activation CIFAR network, the first block's bn0 replaces the stem's.
        if imagenet or not preactivation:
            self.bn1 = nn.BatchNorm2d(channels)
            self.relu = nn.ReLU(inplace=True)
        if imagenet:
            self.maxpool = nn.MaxPool2d(3, 2, 1)
        # Children are in execution order, for torchvision's IntermediateLayerGetter.
        self.stem = [name for name, _ in self.named_children()]
        self.frozen: list[str] = []
        first_features = channels
        for number, blocks in enumerate(stages, 1):
            features = first_features * 2 ** (number - 1)
            outputs = block.expansion * features
            stage = nn.Sequential()
            for index in range(blocks):
                first = index == 0
                stride = 2 if first and number > 1 else 1
                activate = None
                if preactivation and not (imagenet and first and number == 1):
                    activate = "shared" if first else "branch"
                stage.append(
                    block(
                        channels,
                        features,
                        width=features if basic else features * base_width // 64,
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
        """Freeze the stem and the first `stages` stages, including BatchNorm statistics."""
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
        """Return the activated output of the last stage, (N, channels, h, w)."""
        x = self.conv1(x)
        if "bn1" in self.stem:
            x, _ = norm_relu(self.bn1, x, relu=self.relu)
        if "maxpool" in self.stem:
            x = self.maxpool(x)
        skip = x
        for number in range(1, self.stages + 1):
            for block in getattr(self, f"layer{number}"):
                norm = block.last_bn
                if self.training and type(norm) is GhostBatchNorm2d and norm.fused and on_gpu(x):
                    output = self._run(block, x, skip)
                else:
                    output = self._run(block, x)
                x, skip = output if isinstance(output, tuple) else (output, output)
        return x if self.final_bn is None else norm_relu(self.final_bn, x)[0]

    def _run(self, block: nn.Module, *x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        if not (self.activation_checkpointing and self.training and torch.is_grad_enabled()):
            return block(*x)

        def contexts():
            # Recomputation must not update the running statistics again.
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
    """Initialize as resnext.lua: conv N(0, sqrt(2 / (k·k·outputs))), BN 1 and 0, linear U(±1/sqrt(in))."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            fan_out = math.prod(module.kernel_size) * module.out_channels
            nn.init.normal_(module.weight, 0.0, math.sqrt(2.0 / fan_out))
        elif isinstance(module, nn.Linear):
            bound = 1.0 / math.sqrt(module.in_features)
            nn.init.uniform_(module.weight, -bound, bound)
            nn.init.zeros_(module.bias)
        elif isinstance(module, Block) and zero_gamma:
            nn.init.zeros_(module.last_bn.get_parameter("weight"))


def _check_arguments(stages, cardinality, base_width, classes, stem, block_type, form, shortcut) -> None:
    choices = {
        "stem": (stem, ("imagenet", "cifar")),
        "block_type": (block_type, ("bottleneck", "basic")),
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
    if block_type == "basic" and (cardinality, form) != (1, "C"):
        raise UserError(f"basic blocks have cardinality 1 and form C, not {cardinality} and {form}")


def build_model(config: ModelConfig, classes: int | None) -> ResNeXt:
    """Build the network of a configuration; without a last layer if `classes` is None."""
    return ResNeXt(
        config.stages,
        config.cardinality,
        config.base_width,
        classes,
        stem=config.stem,
        block_type=config.block_type,
        form=config.block,
        shortcut=config.shortcut,
        preactivation=config.preactivation,
        zero_gamma=config.zero_gamma,
    )


def _named(depth: int, cardinality: int, base_width: int, stem: str = "imagenet") -> Callable[..., ResNeXt]:
    """Return a constructor that takes `classes` and the keyword options of ResNeXt."""
    return partial(ResNeXt, stages_by_depth("bottleneck", depth, stem), cardinality, base_width, stem=stem)


def _basic(depth: int, stem: str) -> Callable[..., ResNeXt]:
    width, shortcut = (64, "B") if stem == "imagenet" else (16, "A")
    build = partial(ResNeXt, stages_by_depth("basic", depth, stem), 1, width)
    return partial(build, stem=stem, block_type="basic", shortcut=shortcut)


resnet18 = _basic(18, "imagenet")
resnet34 = _basic(34, "imagenet")
resnet50 = _named(50, 1, 64)
resnet101 = _named(101, 1, 64)
resnet152 = _named(152, 1, 64)
resnet200 = _named(200, 1, 64)
resnext50_32x4d = _named(50, 32, 4)
resnext101_32x4d = _named(101, 32, 4)
resnext101_32x8d = _named(101, 32, 8)
resnext101_64x4d = _named(101, 64, 4)
resnext152_32x4d = _named(152, 32, 4)
resnext29_8x64d = _named(29, 8, 64, "cifar")
resnext29_16x64d = _named(29, 16, 64, "cifar")
resnet20 = _basic(20, "cifar")
resnet32 = _basic(32, "cifar")
resnet44 = _basic(44, "cifar")
resnet56 = _basic(56, "cifar")
resnet110 = _basic(110, "cifar")
resnet1202 = _basic(1202, "cifar")
