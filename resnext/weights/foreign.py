"""Whose weights a state_dict holds, told by its keys, and the same under torchvision's names.

    torchvision, timm    conv1, bn1, layer1.0.conv1 ... layer1.0.downsample.0, fc: our own names
    mmpretrain           the same below backbone., and head.fc
    pycls                stem.conv, s1.b1.f.a ... s1.b1.proj, head.fc; its pictures are BGR
    bearpaw, prlz77      conv_1_3x3, stage_1.stage_1_bottleneck_0.conv_reduce ... classifier (CIFAR)
    MoCo                 our own below encoder_q., whose fc is no classifier
    SwAV                 our own without fc

Any file may lack the last layer, and then has an Identity there.

Tensors do not tell everything: variants that only pool, activate or stride otherwise (timm's resnetaa,
Caffe's stride in the first 1x1) look like the plain network, unless a configuration in the file says so.
"""

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..config import Config, DataConfig, ModelConfig, complete
from ..errors import InvalidFileError
from ..safe_pickle import Placeholder

# Keys under which trainers keep a state_dict; averaged weights ahead of the others, as in our evaluation.
AVERAGED = ("state_dict_ema", "model_ema")
CONTAINERS = (*AVERAGED, "state_dict", "model", "model_state", "net")
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
BEARPAW_LEAVES = {
    "conv_reduce": "conv1",
    "bn_reduce": "bn1",
    "conv_conv": "conv2",
    "bn": "bn2",
    "conv_expand": "conv3",
    "bn_expand": "bn3",
    "shortcut.shortcut_conv": "downsample.0",
    "shortcut.shortcut_bn": "downsample.1",
}
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
# What self-supervised training (MoCo, SwAV, mmpretrain) has beside the backbone.
PRETEXT = re.compile(r"(projection_head|prototypes|encoder_k|neck)\..*|queue(_ptr)?")

# origin: (a key that tells, patterns of names)
STYLES = {
    "mmpretrain": ("backbone.conv1.weight", MMPRETRAIN),
    "pycls": ("stem.conv.weight", PYCLS),
    "bearpaw": ("conv_1_3x3.weight", BEARPAW),
    "MoCo": ("encoder_q.conv1.weight", MOCO),
    "SwAV": ("prototypes.weight", ()),
    "torchvision or timm": ("conv1.weight", ()),
}
BEARPAW_STATISTICS = ((125.307, 122.961, 113.8575), (51.5865, 50.847, 51.255))  # its only ones


def find_state(content: Any) -> tuple[dict[str, Tensor], str, dict[str, Any]]:
    """(state_dict, which weights of the file it is, what else the file holds).

    `content` as read_archive gives it. Raises Unreadable where there is no state_dict.
    """
    if isinstance(content, Placeholder):
        raise InvalidFileError(
            f"holds an object of class {content.name[:80]}; of a network save the state_dict()"
        )
    if not isinstance(content, dict):
        raise InvalidFileError("holds no state_dict")
    others = {key: value for key, value in content.items() if isinstance(key, str)}
    which, found = "weights", content
    keys = [key for key in CONTAINERS if isinstance(others.get(key), dict) and others[key]]
    if keys:
        which, found = ("averaged weights" if keys[0] in AVERAGED else "weights"), others[keys[0]]
    if _better_average(others):  # pycls evaluates both
        which, found = "averaged weights", others["ema_state"]
    state = {}
    for key, value in found.items():
        if isinstance(key, str) and isinstance(value, Tensor) and not IGNORED.fullmatch(unwrapped(key)):
            add(state, unwrapped(key), value)
    if not state:
        raise InvalidFileError("holds no state_dict with tensors")
    return state, which, others


def add(state: dict[str, Tensor], key: str, value: Tensor) -> None:
    """Put a tensor under its key; Unreadable where there is one already."""
    if key in state:
        raise InvalidFileError(f"two of its tensors are {key[:80]}")
    state[key] = value


def _better_average(others: Mapping[str, Any]) -> bool:
    errors = [others.get(key) for key in ("ema_err", "test_err")]
    return isinstance(others.get("ema_state"), dict) and (
        all(isinstance(error, float) for error in errors) and errors[0] <= errors[1]
    )


def unwrapped(key: str) -> str:
    """A key without what wrappers of the network put ahead of it."""
    while key.startswith(WRAPPERS):
        key = key[key.index(".") + 1 :]
    return key


def class_names(others: Mapping[str, Any]) -> tuple[str, ...] | None:
    """Names of the classes where mmpretrain's metadata has them."""
    meta = others.get("meta")
    found = meta.get("dataset_meta", meta) if isinstance(meta, dict) else None
    found = found.get("classes", found.get("CLASSES")) if isinstance(found, dict) else None
    whole = isinstance(found, list | tuple) and all(isinstance(name, str) for name in found)
    return tuple(found) if whole else None


def translate(state: Mapping[str, Tensor], others: Mapping[str, Any]) -> tuple[str, dict[str, Tensor]]:
    """(whose weights these are, the same under our names). Raises Unreadable for unknown names."""
    origin = next((origin for origin, (sign, _) in STYLES.items() if sign in state), None)
    if origin is None:
        raise InvalidFileError(
            f"its first key is {next(iter(state))[:80]!r}: none of the names of {', '.join(STYLES)} ResNeXts"
        )
    renamed, patterns = {}, STYLES[origin][1]
    for key, value in state.items():
        for pattern, name in patterns:
            key, hits = re.subn(rf"^{pattern}", name, key, count=1)
            if hits:
                break
        add(renamed, key, value)
    if "fc.weight" not in renamed:
        renamed = {key: value for key, value in renamed.items() if not PRETEXT.fullmatch(key)}
    _check_variant(origin, others)
    if origin == "pycls":
        renamed["conv1.weight"] = renamed["conv1.weight"].flip(1)
    if origin == "bearpaw" and "best_acc" not in others:  # the trainer; prlz77's files are bare
        origin = "prlz77"
    if origin == "torchvision or timm":
        origin = _trainer(others) or origin
    return origin, renamed


def _trainer(others: Mapping[str, Any]) -> str | None:
    """Whose program saved a checkpoint, told by what is beside the weights; None where nothing tells."""
    if isinstance(others.get("version"), int) and "arch" in others:
        return "timm"
    # torchvision's references, and PyTorch's ImageNet example, which reads folders with torchvision too.
    return "torchvision" if "lr_scheduler" in others or "best_acc1" in others else None


def _check_variant(origin: str, others: Mapping[str, Any]) -> None:
    """What no tensor shows, but a name or configuration does: other pooling, the stride in the 1x1."""
    arch = others.get("arch")
    if isinstance(arch, str) and re.search(r"blur|ne[xt]+aa", arch):
        raise InvalidFileError(f"{arch[:40]} pools otherwise than these networks")
    texts = [value for key in ("cfg", "meta") if isinstance(value := others.get(key), str)]
    if isinstance(others.get("meta"), dict):
        texts += [value for value in others["meta"].values() if isinstance(value, str)]
    for text in texts:
        pycls = re.search(r"TYPE: resnet\b", text) and re.search(r"STRIDE_1X1: true", text, re.IGNORECASE)
        if (origin == "pycls" and pycls) or (origin == "mmpretrain" and re.search(r"style='caffe'", text)):
            raise InvalidFileError(
                "its blocks have their stride in the first 1x1 convolution, ours in the 3x3"
            )


# ---------------------------------------------------------------------------- the network


def architecture(state: Mapping[str, Tensor]) -> ModelConfig:
    """The network that tensors under our names belong to. Raises Unreadable where there is none."""
    stem, first = _shape(state, "conv1.weight", 4), "layer1.0.conv2.weight"
    if "layer1.0.conv2.weight" in state and "layer1.0.conv3.weight" not in state:
        raise InvalidFileError("its blocks have two convolutions; these networks have bottlenecks of three")
    paths = _count(state, r"layer1\.0\.paths\.(\d+)\.")
    if paths:
        first = "layer1.0.paths.0.conv2.weight"
    total, width = _shape(state, first, 4)[:2]
    if stem[2] not in (3, 7) or stem[1] != 3 or not width or total % width:
        raise InvalidFileError(
            f"its first convolutions are {stem} and {(total, width)}: none of these networks"
        )
    stages = [_count(state, rf"layer{number}\.(\d+)\.") for number in range(1, 6)]
    branch = ".paths.0.conv1.weight" if paths else ".conv1.weight"
    present = sum(re.fullmatch(r"layer\d\.\d+" + re.escape(branch), key) is not None for key in state)
    if present != sum(stages) or present * max(1, paths) * 3 > len(state):
        raise InvalidFileError("some of its blocks are missing")
    shortcuts = {m[1] for key in state if (m := re.match(r"(layer\d\.\d+)\.downsample\.", key))}
    first_blocks = {f"layer{number}.0" for number in range(1, 5)}
    cardinality, block = total // width, "C"
    if paths:
        cardinality, block = paths, "A" if "layer1.0.paths.0.conv3.weight" in state else "B"
    plain = (cardinality, width, block) == (1, 64, "C")
    return ModelConfig(
        architecture="resnet" if plain else "resnext",
        stem="imagenet" if stem[2] == 7 else "cifar",
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
        raise InvalidFileError(f"has no {key} of {dimensions} dimensions: none of these networks")
    return tuple(state[key].shape)


def _count(state: Mapping[str, Tensor], pattern: str) -> int:
    """One more than the largest number that matches."""
    found = [int(m[1]) for key in state if (m := re.match(pattern, key)) and len(m[1]) < 6]
    return max(found, default=-1) + 1


def configuration(model: ModelConfig, origin: str) -> Config:
    """A configuration with this network and the preprocessing that the origin's weights expect."""
    classes = model.classes
    cifar = {10: "cifar10", 100: "cifar100"}.get(classes, "folder") if model.stem == "cifar" else "folder"
    data: dict[str, Any] = {"dataset": cifar}
    if model.stem == "imagenet":
        data |= {"pipeline": "torch7"} if origin == "Torch7" else {"interpolation": "bilinear"}
    elif origin == "bearpaw":
        data["mean"], data["std"] = BEARPAW_STATISTICS
    return complete(Config(model=model, data=DataConfig(**data)))
