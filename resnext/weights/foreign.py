"""Recognize state_dicts of other programs by their keys, and rename the keys to ours (torchvision's).

    torchvision, timm    conv1, bn1, layer1.0.conv1 ... layer1.0.downsample.0, fc: our own names
    mmpretrain           the same below backbone., and head.fc
    pycls                stem.conv, s1.b1.f.a ... s1.b1.proj, head.fc; its images are BGR
    bearpaw, prlz77      conv_1_3x3, stage_1.stage_1_bottleneck_0.conv_reduce ... classifier (CIFAR)
    MoCo                 our own below encoder_q., whose fc is not a classifier
    SwAV                 our own without fc
    transformers         resnet.embedder.embedder, resnet.encoder.stages.0.layers.0 ... classifier.1

Any file may lack the last layer; the network then has an Identity there.

Tensors do not show everything: variants that differ only in pooling, activation or strides (timm's resnetaa,
Caffe's stride in the first 1x1) look like the plain network, unless a configuration in the file shows it.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Literal, TypeAlias

from torch import Tensor

from ..config import LAYERS, DataConfig, ModelConfig
from ..errors import InvalidFileError
from ..safe_pickle import Placeholder

# Keys under which trainers keep a state_dict; averaged weights first, as in our evaluation.
AVERAGED = ("ema_state", "state_dict_ema", "model_ema")
CONTAINERS = ("state_dict_ema", "model_ema", "state_dict", "model", "model_state", "net")
WRAPPERS = ("module.", "_orig_mod.", "model.")  # DataParallel, DDP and AveragedModel; compile; Lightning
IGNORED = re.compile(r"n_averaged|data_preprocessor\..*")

PYCLS = (
    (r"stem\.(conv|bn)\.", r"\g<1>1."),
    (r"s(\d)\.b(\d+)\.f\.([abc])_bn\.", lambda m: f"layer{m[1]}.{int(m[2]) - 1}.bn{'abc'.index(m[3]) + 1}."),
    (r"s(\d)\.b(\d+)\.f\.([abc])\.", lambda m: f"layer{m[1]}.{int(m[2]) - 1}.conv{'abc'.index(m[3]) + 1}."),
    (r"s(\d)\.b(\d+)\.proj\.", lambda m: f"layer{m[1]}.{int(m[2]) - 1}.downsample.0."),
    (r"s(\d)\.b(\d+)\.bn\.", lambda m: f"layer{m[1]}.{int(m[2]) - 1}.downsample.1."),
    (r"head\.fc\.", "fc."),
)
BEARPAW_LEAVES = {"conv_reduce": "conv1", "conv_conv": "conv2", "conv_expand": "conv3"}
BEARPAW_LEAVES |= {"bn_reduce": "bn1", "bn": "bn2", "bn_expand": "bn3"}
BEARPAW_LEAVES |= {"shortcut.shortcut_conv": "downsample.0", "shortcut.shortcut_bn": "downsample.1"}
BEARPAW = (
    (r"conv_1_3x3\.", "conv1."),
    (r"bn_1\.", "bn1."),
    (
        r"stage_(\d)\.stage_\1_bottleneck_(\d+)\.(shortcut\.\w+|\w+)\.",
        lambda m: f"layer{m[1]}.{m[2]}.{BEARPAW_LEAVES.get(m[3], m[3])}.",
    ),
    (r"classifier\.", "fc."),
)
MMPRETRAIN = ((r"backbone\.", ""), (r"head\.fc\.", "fc."))
MOCO = ((r"encoder_q\.fc\.", "projection_head."), (r"encoder_q\.", ""))
KINDS = {"convolution": "conv", "normalization": "bn"}
KIND, LAYER = r"(convolution|normalization)\.", r"resnet\.encoder\.stages\.(\d)\.layers\.(\d+)\."
TRANSFORMERS = (
    (rf"resnet\.embedder\.embedder\.{KIND}", lambda m: f"{KINDS[m[1]]}1."),
    (
        rf"{LAYER}layer\.(\d)\.{KIND}",
        lambda m: f"layer{int(m[1]) + 1}.{m[2]}.{KINDS[m[4]]}{int(m[3]) + 1}.",
    ),
    (
        rf"{LAYER}shortcut\.{KIND}",
        lambda m: f"layer{int(m[1]) + 1}.{m[2]}.downsample.{int(m[3] == 'normalization')}.",
    ),
    (r"classifier\.1\.", "fc."),
)
# What self-supervised training (MoCo, SwAV, mmpretrain) saves in addition to the backbone.
PRETEXT = re.compile(r"(projection_head|prototypes|encoder_k|neck)\..*|queue(_ptr)?")

Renaming: TypeAlias = tuple[str, str | Callable[[re.Match[str]], str]]  # (pattern, replacement)
# origin: (a key that identifies it, how to rename its keys)
STYLES: dict[str, tuple[str, tuple[Renaming, ...]]] = {
    "mmpretrain": ("backbone.conv1.weight", MMPRETRAIN),
    "pycls": ("stem.conv.weight", PYCLS),
    "bearpaw": ("conv_1_3x3.weight", BEARPAW),
    "MoCo": ("encoder_q.conv1.weight", MOCO),
    "SwAV": ("prototypes.weight", ()),
    "transformers": ("resnet.embedder.embedder.convolution.weight", TRANSFORMERS),
    "torchvision or timm": ("conv1.weight", ()),
}
CIFAR: dict[int | None, Literal["cifar10", "cifar100", "folder"]] = {
    10: "cifar10",
    100: "cifar100",
}  # by classes
BEARPAW_MEAN, BEARPAW_STD = (125.307, 122.961, 113.8575), (51.5865, 50.847, 51.255)  # for both CIFAR sets


def find_state(content: object) -> tuple[dict[str, Tensor], str, dict[str, object]]:
    """Return (state_dict, which weights of the file it is, what else the file holds).

    `content` is from safe_pickle. Raise InvalidFileError if there is no state_dict.
    """
    if isinstance(content, Placeholder):
        raise InvalidFileError(
            f"holds an object of class {content.name[:80]}; save the network's state_dict()"
        )
    if not isinstance(content, dict):
        raise InvalidFileError("holds no state_dict")
    others = {key: value for key, value in content.items() if isinstance(key, str)}
    found, which = content, "weights"
    for name in _containers(others):
        if isinstance(others.get(name), dict) and others[name]:
            found, which = others[name], "averaged weights" if name in AVERAGED else "weights"
            break
    tensors = [(key, value) for key, value in found.items() if isinstance(value, Tensor)]
    return unwrap((key, tensor) for key, tensor in tensors if isinstance(key, str)), which, others


def _containers(others: Mapping[str, object]) -> tuple[str, ...]:
    """Return the keys that may hold a state_dict, the one to prefer first."""
    average, last = others.get("ema_err"), others.get("test_err")  # pycls evaluates both
    better = isinstance(average, float) and isinstance(last, float) and average <= last
    return ("ema_state", *CONTAINERS) if better else CONTAINERS


def unwrap(tensors: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """Return tensors without the prefixes of their keys that wrappers of the network add."""
    state: dict[str, Tensor] = {}
    for key, tensor in tensors:
        while key.startswith(WRAPPERS):
            key = key[key.index(".") + 1 :]
        if not IGNORED.fullmatch(key):
            _add(state, key, tensor)
    if not state:
        raise InvalidFileError("holds no state_dict with tensors")
    return state


def _add(state: dict[str, Tensor], key: str, value: Tensor) -> None:
    if key in state:
        raise InvalidFileError(f"two of its tensors are {key[:80]}")
    state[key] = value


def class_names(others: Mapping[str, object]) -> tuple[str, ...] | None:
    """Return the names of the classes if mmpretrain's metadata has them."""
    meta = others.get("meta")
    found = meta.get("dataset_meta", meta) if isinstance(meta, dict) else None
    return as_names(found.get("classes", found.get("CLASSES"))) if isinstance(found, dict) else None


def as_names(value: object) -> tuple[str, ...] | None:
    """Return a list or tuple of texts as a tuple; None for anything else."""
    listed = isinstance(value, list | tuple) and all(isinstance(name, str) for name in value)
    return tuple(value) if isinstance(value, list | tuple) and listed else None


def translate(state: Mapping[str, Tensor], others: Mapping[str, object]) -> tuple[str, dict[str, Tensor]]:
    """Return (the program that wrote a state_dict, its tensors under our names).

    Raise InvalidFileError for unknown names.
    """
    origin = next((origin for origin, (sign, _) in STYLES.items() if sign in state), None)
    if origin is None:
        known = ", ".join(STYLES)
        raise InvalidFileError(
            f"its first key is {next(iter(state))[:80]!r}, which no ResNeXt of {known} has"
        )
    renamed: dict[str, Tensor] = {}
    for key, value in state.items():
        for pattern, name in STYLES[origin][1]:
            key, hits = re.subn(rf"^{pattern}", name, key, count=1)
            if hits:
                break
        _add(renamed, key, value)
    if "fc.weight" not in renamed:
        renamed = {key: value for key, value in renamed.items() if not PRETEXT.fullmatch(key)}
    _check_variant(origin, others)
    if origin == "pycls":
        renamed["conv1.weight"] = renamed["conv1.weight"].flip(1)
    if origin == "bearpaw" and "best_acc" not in others:  # its trainer's files; prlz77's are bare
        origin = "prlz77"
    if origin == "torchvision or timm":
        if isinstance(others.get("version"), int) and "arch" in others:
            origin = "timm"
        # torchvision's references, and PyTorch's ImageNet example, which also reads folders with torchvision.
        elif "lr_scheduler" in others or "best_acc1" in others:
            origin = "torchvision"
    return origin, renamed


def _check_variant(origin: str, others: Mapping[str, object]) -> None:
    """Refuse variants that only a name or configuration shows: other pooling, a stride in the first 1x1."""
    arch, meta = others.get("arch"), others.get("meta")
    if isinstance(arch, str) and re.search(r"blur|ne[xt]+aa", arch):
        raise InvalidFileError(f"{arch[:40]} pools differently from these networks")
    texts = [others.get("cfg"), *(meta.values() if isinstance(meta, dict) else [meta])]
    for text in (text for text in texts if isinstance(text, str)):
        pycls = re.search(r"TYPE: resnet\b", text) and re.search(r"STRIDE_1X1: true", text, re.IGNORECASE)
        if (origin == "pycls" and pycls) or (origin == "mmpretrain" and "style='caffe'" in text):
            raise InvalidFileError("its blocks have the stride in the first 1x1 convolution, ours in the 3x3")


# ---------------------------------------------------------------------------- the network


def architecture(state: Mapping[str, Tensor]) -> ModelConfig:
    """Infer the network from tensors under our names. Raise InvalidFileError for any other network."""
    stem = _shape(state, "conv1.weight", 4)
    basic = "layer1.0.conv2.weight" in state and "layer1.0.conv3.weight" not in state
    paths = _count(state, r"layer1\.0\.paths\.(\d+)\.")
    total, width = _shape(state, f"layer1.0.{'paths.0.' if paths else ''}conv2.weight", 4)[:2]
    if stem[2] not in (3, 7) or stem[1] != 3 or not width or total % width:
        raise InvalidFileError(
            f"not a known network (its first convolutions are {stem} and {(total, width)})"
        )
    stages = [_count(state, rf"layer{number}\.(\d+)\.") for number in range(1, 6)]
    branch = re.compile(rf"layer\d\.\d+\.{'paths.0.' if paths else ''}conv1\.weight")
    present = sum(branch.fullmatch(key) is not None for key in state)
    block_type: Literal["basic", "bottleneck"] = "basic" if basic else "bottleneck"
    if present != sum(stages) or present * max(1, paths) * LAYERS[block_type] > len(state):
        raise InvalidFileError("some of its blocks are missing")
    shortcuts = {m[1] for key in state if (m := re.match(r"(layer\d\.\d+)\.downsample\.", key))}
    first_blocks = {f"layer{number}.0" for number in range(2 if basic else 1, 5)}  # where channels change
    cardinality = paths or total // width
    block: Literal["A", "B", "C"] = "C"
    if paths:
        block = "A" if "layer1.0.paths.0.conv3.weight" in state else "B"
    plain = basic or (cardinality, width, block) == (1, 64, "C")
    return ModelConfig(
        architecture="resnet" if plain else "resnext",
        stem="imagenet" if stem[2] == 7 else "cifar",
        block_type=block_type,
        stages=tuple(stages[: stages.index(0)] if 0 in stages else stages),
        cardinality=cardinality,
        base_width=width,
        block=block,
        shortcut="A" if not shortcuts else "B" if shortcuts <= first_blocks else "C",
        preactivation="final_bn.weight" in state,
        classes=_shape(state, "fc.weight", 2)[0] if "fc.weight" in state else None,
    )


def _shape(state: Mapping[str, Tensor], key: str, dimensions: int) -> tuple[int, ...]:
    if key not in state or state[key].ndim != dimensions:
        raise InvalidFileError(f"not a known network (it has no {key} of {dimensions} dimensions)")
    return tuple(state[key].shape)


def _count(state: Mapping[str, Tensor], pattern: str) -> int:
    """Return one more than the largest number that matches."""
    found = [int(m[1]) for key in state if (m := re.match(pattern, key)) and len(m[1]) < 6]
    return max(found, default=-1) + 1


def data_config(model: ModelConfig, origin: str) -> DataConfig:
    """Return the preprocessing that is usual for the weights of an origin, with defaults left open."""
    if model.stem == "imagenet":
        return DataConfig(pipeline="torch7") if origin == "Torch7" else DataConfig(interpolation="bilinear")
    data = DataConfig(dataset=CIFAR.get(model.classes, "folder"))
    return replace(data, mean=BEARPAW_MEAN, std=BEARPAW_STD) if origin == "bearpaw" else data
