"""The YAML schema: what can be configured, read strictly, and printed with every key explained.

A file states what differs from the defaults, which are the original's ImageNet recipe:

    model: {depth: 101, cardinality: 64}
    train: {batch_size: 128}
    optimizer: {lr: 0.05}

Scalars are read as the type their key declares and not by YAML's guessing, so `1e-4` is a number
and `no` is not false. Unknown, duplicate and misplaced keys, wrong types and ranges are
UserErrors that name the line and the remedy. No PyTorch is imported here: configuration errors
are immediate.
"""

import difflib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

import yaml

from .errors import UserError
from .strict_yaml import check_limits, compose, convert, describe, is_null, unique_keys

CONFIG_FOLDER = Path(__file__).resolve().parent.parent / "configs"
MAX_CONFIG_BYTES = 1 << 20


def _key(default: Any, comment: str, **limits: float) -> Any:
    """A configuration key: default, explanation, and limits out of at_least, at_most, above, below.

    The annotation is the type after `complete`, which fills in keys that are null and depend on others.
    """
    return field(default=default, metadata={"comment": comment, "limits": limits})


@dataclass(frozen=True)
class ModelConfig:
    architecture: Literal["resnext", "resnet"] = _key(
        "resnext", "resnext, or resnet: plain bottlenecks (one group)"
    )
    stem: Literal["imagenet", "cifar"] = _key(
        "imagenet", "imagenet: 7x7/2 and max-pool, 4 stages; cifar: 3x3, 3 stages"
    )
    depth: int = _key(None, "layers: 50, 101, 152 (stem imagenet) or 9n+2 (stem cifar)", at_least=5)
    stages: tuple[int, ...] = _key(
        None, "blocks in each stage, instead of depth: [3, 4, 6, 3]", at_least=1, at_most=1000
    )
    cardinality: int = _key(None, "number of groups (paths) of a block", at_least=1, at_most=10_000)
    base_width: int = _key(
        None, "width of a path in the first stage: 4 in '32x4d'", at_least=1, at_most=10_000
    )
    block: Literal["A", "B", "C"] = _key(
        "C", "form of the paper's Fig. 3; C, grouped convolution, is the fast one"
    )
    shortcut: Literal["A", "B", "C"] = _key(
        "B", "A: zero-padded identity; B: 1x1 convolution where channels change; C: always"
    )
    preactivation: bool = _key(False, "BN and ReLU ahead of the convolutions (the paper's CIFAR runs)")
    zero_gamma: bool = _key(False, "start the last BN of each block at 0 (not in the original)")
    classes: int | None = _key(
        None, "number of classes; null: what the data has", at_least=1, at_most=10_000_000
    )
    pretrained: str | None = _key(
        None,
        "start from these weights: a run, a file, torchvision:NAME; other classes get a new last layer",
    )
    reset_classifier: bool = _key(
        False, "with pretrained: a new last layer, also for classes that fit (a file may not name its own)"
    )


@dataclass(frozen=True)
class DataConfig:
    dataset: Literal["folder", "cifar10", "cifar100", "glyphs"] = _key(
        "folder", "folder: class folders below train/ and val/; glyphs: digits drawn in memory"
    )
    characters: str | None = _key(None, "glyphs: the characters to draw, a class each; null: 0123456789")
    dir: str | None = _key(None, "where the data is, or is downloaded to (--data)")
    download: bool = _key(True, "fetch cifar10 and cifar100 where they are missing")
    pipeline: Literal["memory", "fast", "torch7"] = _key(
        None,
        "memory: a small set on the device; fast, torch7: files; null: memory for stem cifar",
    )
    decoder: Literal["simplejpeg", "pillow"] = _key(
        "simplejpeg", "reader of JPEG files (fast, torch7); both see the same pixels to rounding"
    )
    interpolation: Literal["bilinear", "bicubic"] = _key(
        "bicubic", "fast: filter of resizing, antialiased; torch7 has its own, bicubic"
    )
    image_size: int = _key(None, "height and width in pixels that the network sees", at_least=8, at_most=4096)
    train_size: int = _key(None, "the same in training; null: image_size", at_least=8, at_most=4096)
    resize: int = _key(
        None,
        "fast, torch7: shorter side ahead of the evaluation crop; null: image_size * 256 / 224",
        at_least=8,
        at_most=8192,
    )
    workers: int | None = _key(
        None,
        "fast, torch7: loader workers of each process; 0: none; null: one a core",
        at_least=0,
        at_most=256,
    )
    class_order: Literal["string", "natural"] | None = _key(
        None,
        "of class folders: string (10 before 2), natural (2 before 10; timm); null: string, but 0…N-1 "
        "as numbers",
    )
    max_pixels: int = _key(
        178_956_970, "a picture with more is refused, as it could fill the memory", at_least=1
    )
    skip_broken: bool = _key(
        False, "fast, torch7: in place of a training file that cannot be decoded take the next, and log it"
    )
    train_images: int | None = _key(
        None, "use this many training images, evenly spaced (glyphs: draw this many); null: all", at_least=1
    )
    val_images: int | None = _key(None, "likewise for validation", at_least=1)
    mean: tuple[float, ...] = _key(None, "per channel, in pixel values 0...255; null: the data set's own")
    std: tuple[float, ...] = _key(None, "likewise", above=0)


@dataclass(frozen=True)
class AugmentConfig:
    mirror: float = _key(0.5, "probability of a horizontal flip", at_least=0, at_most=1)
    padding: int = _key(
        0,
        "memory: pad by this many pixels of the mean colour, then crop at random; CIFAR: 4",
        at_least=0,
    )
    min_area: float = _key(
        None,
        "fast, torch7: the smallest part of the picture that a crop may be; null: 0.08",
        above=0,
        at_most=1,
    )
    jitter: float = _key(
        None, "fast, torch7: brightness, contrast, saturation by up to this; null: 0.4", at_least=0, at_most=1
    )
    lighting: float = _key(
        None, "fast, torch7: deviation of the colour shift along ImageNet's main axes; null: 0.1", at_least=0
    )
    policy: Literal["randaugment", "trivialaugment"] | None = _key(
        None, "fast: torchvision's RandAugment or TrivialAugmentWide"
    )
    erasing: float = _key(0.0, "probability of a random rectangle of the mean colour", at_least=0, at_most=1)
    mixup: float = _key(0.0, "alpha of mixup, 0: none; with cutmix, one of them for each batch", at_least=0)
    cutmix: float = _key(0.0, "alpha of CutMix, 0: none", at_least=0)
    repeats: int = _key(
        1, "fast, torch7: draw this many versions of each picture (an epoch is as long)", at_least=1
    )


@dataclass(frozen=True)
class TrainConfig:
    epochs: int = _key(100, "passes over the training set", at_least=1)
    batch_size: int = _key(256, "the global batch: images per optimiser step", at_least=1)
    eval_batch_size: int = _key(
        None,
        "images per evaluation batch of a process; changes speed only; null: batch_size",
        at_least=1,
    )
    frozen_stages: int | None = _key(
        None,
        "keep the stem and so many stages as they are, BN statistics included; null: train all",
        at_least=0,
        at_most=4,
    )
    accumulation_steps: int = _key(
        1, "cut the batch into this many parts to save memory; BN sees one part", at_least=1
    )
    bn_group: int | None = _key(
        None, "BN statistics over this many images, as on one of the original's GPUs", at_least=1
    )
    sync_bn: bool = _key(False, "BN statistics over the whole batch of all GPUs")
    label_smoothing: float = _key(0.0, "share of the target spread over all classes", at_least=0, below=1)
    precision: Literal["auto", "fp32", "tf32", "bf16", "fp16"] = _key(
        "fp32",
        "fp32, tf32, or autocast to bf16 or fp16 (with loss scaling); auto: bf16 where the hardware has it, "
        "else fp32",
    )
    channels_last: bool | None = _key(None, "memory layout; null: on where measured faster")
    compile: bool = _key(False, "torch.compile: minutes to start, then faster steps")
    activation_checkpointing: bool = _key(
        False, "recompute blocks in the backward pass: less memory, a third more time"
    )
    clip_grad_norm: float | None = _key(None, "clip the gradient's L2 norm at this; null: never", above=0)
    ema_decay: float | None = _key(
        None,
        "average the weights with this decay and evaluate that; needs many more steps than 1/(1-decay)",
        above=0,
        below=1,
    )


@dataclass(frozen=True)
class OptimizerConfig:
    lr: float = _key(0.1, "learning rate for the global batch", above=0, at_most=1e30)
    head_lr: float | None = _key(
        None, "another rate for the last layer, under the same schedule; null: lr", above=0, at_most=1e30
    )
    momentum: float = _key(0.9, "of SGD", at_least=0, below=1)
    nesterov: bool = _key(True, "Nesterov's momentum, as the original")
    weight_decay: float = _key(1e-4, "on every parameter, BN and biases included", at_least=0, at_most=1e30)
    norm_weight_decay: float | None = _key(
        None, "another one on BN; null: weight_decay, as the original", at_least=0, at_most=1e30
    )


@dataclass(frozen=True)
class ScheduleConfig:
    name: Literal["imagenet_step", "cifar_step", "multistep", "cosine"] = _key(
        "imagenet_step",
        "imagenet_step: /10 every 30 epochs; cifar_step: /10 after 49 and 74 % of all",
    )
    milestones: tuple[int, ...] | None = _key(
        None, "multistep: epochs after which the rate is multiplied by gamma", at_least=1
    )
    gamma: float = _key(0.1, "multistep: the factor", above=0, below=1)
    min_lr: float = _key(0.0, "cosine: the rate it ends at", at_least=0)
    warmup_epochs: int = _key(0, "epochs of linear warm-up, step by step", at_least=0)


@dataclass(frozen=True)
class RunConfig:
    seed: int = _key(0, "of weights, order and augmentation", at_least=0, at_most=2**63 - 1)
    device: Literal["auto", "cpu", "cuda"] = _key("auto", "auto: a GPU where there is one")
    deterministic: bool = _key(False, "repeatable bits on a GPU too, at some cost (a CPU always is)")
    log_interval: int = _key(50, "steps between log rows and checks of the loss", at_least=1)
    save_interval: int | None = _key(
        None, "steps between saves inside an epoch; null: at the end of each", at_least=1
    )
    keep_every: int | None = _key(None, "keep epoch_NNN.pt every so many epochs; null: none", at_least=1)
    tensorboard: bool = _key(True, "write TensorBoard scalars")
    timeout: int = _key(
        600, "seconds that a process of torchrun waits for another, then stops", at_least=1, at_most=86400
    )


@dataclass(frozen=True)
class Config:
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    run: RunConfig = field(default_factory=RunConfig)


SECTIONS = {f.name: f.default_factory for f in fields(Config)}
STAGES_BY_DEPTH = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}

# Per-channel mean and standard deviation in pixel values 0...255 (fb.resnet.torch: datasets/*.lua).
IMAGENET_STATISTICS = ((123.675, 116.28, 103.53), (58.395, 57.12, 57.375))
STATISTICS = {
    "folder": IMAGENET_STATISTICS,
    "cifar10": ((125.3, 123.0, 113.9), (63.0, 62.1, 66.7)),
    "cifar100": ((129.3, 124.1, 112.4), (68.2, 65.4, 70.4)),
    "glyphs": ((128.0, 128.0, 128.0), (64.0, 64.0, 64.0)),
}
IMAGE_SIZES = {"cifar10": 32, "cifar100": 32, "glyphs": 20}

# Keys of files that earlier versions wrote.
RENAMED = {("train", "weights"): ("model", "pretrained")}

# Spellings of the original's command line (opts.lua) and of other trainers.
FOREIGN_KEYS = {
    "netType": "model.architecture",
    "bottleneckType": "model.block",
    "shortcutType": "model.shortcut",
    "nClasses": "model.classes",
    "num_classes": "model.classes",
    "width_per_group": "model.base_width",
    "groups": "model.cardinality",
    "manualSeed": "run.seed",
    "nEpochs": "train.epochs",
    "nThreads": "data.workers",
    "num_workers": "data.workers",
    "train_crop_size": "data.train_size",
    "val_crop_size": "data.image_size",
    "val_resize_size": "data.resize",
    "color_jitter": "augment.jitter",
    "auto_augment": "augment.policy",
    "random_erase": "augment.erasing",
    "reprob": "augment.erasing",
    "mixup_alpha": "augment.mixup",
    "cutmix_alpha": "augment.cutmix",
    "ra_reps": "augment.repeats",
    "smoothing": "train.label_smoothing",
    "learning_rate": "optimizer.lr",
    "shareGradInput": "train.activation_checkpointing",
    "optnet": "train.activation_checkpointing",
    "amp": "train.precision",
    "wd": "optimizer.weight_decay",
    "retrain": "model.pretrained",
    "weights": "model.pretrained",
    "load_from": "model.pretrained",
    "freeze": "train.frozen_stages",
    "freeze_at": "train.frozen_stages",
    "data_dir": "data.dir",
    "root": "data.dir",
    "path": "data.dir",
}


def all_keys(config: Config) -> Iterator[tuple[str, str, Any]]:
    """(section, key, value) of every key, in the order of the schema."""
    for section in SECTIONS:
        values = getattr(config, section)
        for f in fields(values):
            yield section, f.name, getattr(values, f.name)


# ---------------------------------------------------------------------------- reading


def find_config(name: str, option: str = "--config") -> Path:
    """Return the file that `option` names: a path, or a name looked up in configs/."""
    path = Path(name)
    if path.parent == Path() and not path.is_file():
        path = CONFIG_FOLDER / path
        if not path.suffix:
            path = path.with_suffix(".yaml")
    if not path.is_file():
        known = sorted(p.name for p in CONFIG_FOLDER.glob("*.yaml"))
        close = difflib.get_close_matches(path.stem, [Path(k).stem for k in known], n=1, cutoff=0.5)
        hint = (
            f"did you mean {close[0]}.yaml?" if close else f"{CONFIG_FOLDER} has {len(known)} to choose from"
        )
        raise UserError(f"{option} {name}: no such file; {hint}")
    return path


def read_config(path: Path | None, overrides: list[str] | tuple[str, ...] = ()) -> Config:
    """Defaults, then the file, then `section.key=value` overrides; checked and completed."""
    text = ""
    if path is not None:
        try:
            with open(path, "rb") as file:
                raw = file.read(MAX_CONFIG_BYTES + 1)
            text = raw.decode()
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror})") from None
        except UnicodeDecodeError:
            raise UserError(f"{path}: not a YAML text file; give a configuration") from None
    return parse_config(text, str(path), overrides)


def parse_config(text: str, source: str, overrides: list[str] | tuple[str, ...] = ()) -> Config:
    """Like read_config, from YAML text; `source` names it in errors."""
    if len(text) > MAX_CONFIG_BYTES:
        raise UserError(f"{source}: over 1 MB, not a configuration; give a YAML file")
    given: dict[str, dict[str, Any]] = {section: {} for section in SECTIONS}
    for section, key, value in _read_sections(compose(text, source), source):
        given[section][key] = value
    for override in overrides:
        section, key, value = _read_override(override)
        given[section][key] = value
    config = Config(**{name: make(**given[name]) for name, make in SECTIONS.items()})
    return complete(config)


def _read_sections(root: yaml.Node | None, source: str) -> Iterator[tuple[str, str, Any]]:
    if root is None or is_null(root):
        return
    if not isinstance(root, yaml.MappingNode):
        raise UserError(f"{source}: must hold sections such as 'model:', not {describe(root)}")
    for section, node, where in unique_keys(root, source, ""):
        if section not in SECTIONS:
            raise UserError(f"{where}: unknown section {section!r}; {_hint(section, None)}")
        if is_null(node):
            continue
        if not isinstance(node, yaml.MappingNode):
            raise UserError(f"{where}: {section} is a section and takes keys, not {describe(node)}")
        for key, value, value_where in unique_keys(node, source, f"{section}."):
            name = RENAMED.get((section, key), (section, key))
            yield *name, _read_value(*name, value, value_where)


def _read_override(text: str) -> tuple[str, str, Any]:
    name, equals, value = text.partition("=")
    if not equals:
        raise UserError(f"{text!r}: an override is section.key=value, such as train.epochs=30")
    section, dot, key = name.partition(".")
    if not dot or section not in SECTIONS:
        raise UserError(f"{text!r}: no such key; {_hint(key or section, None)}")
    node = compose(value, f"{text!r}")
    if node is None:
        node = yaml.ScalarNode("tag:yaml.org,2002:null", "", style=None)
    return section, key, _read_value(section, key, node, f"{text!r}")


def _read_value(section: str, key: str, node: yaml.Node, where: str) -> Any:
    known = {f.name: f for f in fields(SECTIONS[section])}
    if key not in known:
        raise UserError(f"{where}: unknown key {section}.{key}; {_hint(key, section)}")
    name = f"{section}.{key}"
    nullable = known[key].default is None
    value = None if nullable and is_null(node) else convert(known[key].type, node, f"{where}: {name}")
    for number in value if isinstance(value, tuple) else (value,):
        check_limits(number, known[key].metadata["limits"], f"{where}: {name}")
    return value


def _hint(key: str, section: str | None) -> str:
    """What was probably meant by an unknown key or section."""

    def plain(word: str) -> str:
        return re.sub(r"[^a-z0-9]", "", word.lower())

    names = [f"{s}.{k}" for s, k, _ in all_keys(Config())]
    targets = {plain(foreign): name for foreign, name in FOREIGN_KEYS.items()}
    targets |= {plain(name.split(".")[1]): name for name in names}
    if section is None:
        targets |= {plain(s): f"section {s}" for s in SECTIONS}
    if plain(key) in targets:
        return f"use {targets[plain(key)]}"
    local = {plain(n.split(".")[1]): n for n in names if n.startswith(f"{section}.")}
    for pool in (local, targets):
        close = difflib.get_close_matches(plain(key), pool, n=1, cutoff=0.6)
        if close:
            return f"did you mean {pool[close[0]]}?"
    if section is None:
        return "sections are " + ", ".join(SECTIONS)
    return f"keys of {section}: " + ", ".join(f.name for f in fields(SECTIONS[section]))


# ---------------------------------------------------------------------------- completing


def complete(config: Config) -> Config:
    """Fill in what follows from other keys, and refuse combinations that cannot work."""
    data = _complete_data(config.data, config.model.stem)
    _check_train(config)
    _check_schedule(config)
    augment = _complete_augment(config.augment, data)
    model, train = _complete_model(config.model), config.train
    if (train.frozen_stages or 0) > len(model.stages):
        raise UserError(
            f"train.frozen_stages: {train.frozen_stages}, but the network has {len(model.stages)}; lower it"
        )
    if train.eval_batch_size is None:
        train = replace(train, eval_batch_size=train.batch_size)
    return replace(config, model=model, data=data, augment=augment, train=train)


def _complete_model(model: ModelConfig) -> ModelConfig:
    imagenet = model.stem == "imagenet"
    stages, depth = model.stages, model.depth
    if stages is None:
        depth = depth or (50 if imagenet else 29)
        if imagenet and depth not in STAGES_BY_DEPTH:
            raise UserError(f"model.depth: {depth} is not 50, 101 or 152; state model.stages for another")
        if not imagenet and (depth < 11 or (depth - 2) % 9):
            below = max(11, depth - (depth - 2) % 9)
            raise UserError(
                f"model.depth: {depth} is not 9n+2 (stem cifar); use {below} or {below + 9}, "
                "or state model.stages"
            )
        stages = STAGES_BY_DEPTH[depth] if imagenet else ((depth - 2) // 9,) * 3
    if len(stages) != (4 if imagenet else 3):
        raise UserError(
            f"model.stages: stem {model.stem} has {4 if imagenet else 3} stages, not {len(stages)}"
        )
    if depth not in (None, 3 * sum(stages) + 2):
        raise UserError(
            f"model.stages: {list(stages)} makes {3 * sum(stages) + 2} layers, but model.depth is "
            f"{depth}; remove one of the two"
        )
    widths = {"resnet": (1, 64), "resnext": (32, 4)}[model.architecture]
    cardinality = widths[0] if model.cardinality is None else model.cardinality
    base_width = widths[1] if model.base_width is None else model.base_width
    if model.architecture == "resnet" and (cardinality, base_width, model.block) != (1, 64, "C"):
        raise UserError(
            "model.architecture: resnet has cardinality 1, base_width 64 and block C; remove "
            "these keys or use architecture resnext"
        )
    if model.zero_gamma and model.preactivation:
        raise UserError(
            "model.zero_gamma: pre-activation blocks end without BN; set one of zero_gamma and "
            "preactivation to false"
        )
    return replace(
        model,
        depth=3 * sum(stages) + 2,
        stages=stages,
        cardinality=cardinality,
        base_width=base_width,
    )


def _complete_data(data: DataConfig, stem: str) -> DataConfig:
    size = data.image_size or IMAGE_SIZES.get(data.dataset) or (224 if stem == "imagenet" else 32)
    if data.dataset.startswith("cifar") and size != 32:
        raise UserError(f"data.image_size: {data.dataset} has 32 pixels, not {size}; remove the key")
    pipeline = data.pipeline or ("memory" if data.dataset != "folder" or stem == "cifar" else "fast")
    if pipeline != "memory" and data.dataset != "folder":
        raise UserError(f"data.pipeline: {data.dataset} is held in memory, not {pipeline}; remove the key")
    resize = data.resize
    if pipeline == "memory":
        for name in ("train_size", "resize"):
            if getattr(data, name) not in (None, size):
                raise UserError(
                    f"data.{name}: a set in memory has one size, data.image_size; remove the key, or use "
                    "data.pipeline=fast"
                )
    elif resize is None:
        resize = size * 256 // 224
    elif resize < size:
        raise UserError(f"data.resize: {resize} must be at least data.image_size, {size}; raise it")
    if data.characters is not None:
        _check_characters(data.characters, data.dataset)
    mean, std = STATISTICS[data.dataset]
    for name, value in (("mean", data.mean), ("std", data.std)):
        if value is not None and len(value) != 3:
            raise UserError(f"data.{name}: needs 3 numbers (red, green, blue), not {len(value)}")
    return replace(
        data,
        pipeline=pipeline,
        image_size=size,
        train_size=data.train_size or size,
        resize=resize or size,
        mean=data.mean or mean,
        std=data.std or std,
    )


def _check_characters(characters: str, dataset: str) -> None:
    if dataset != "glyphs":
        raise UserError(f"data.characters: {dataset} draws none; remove the key, or use data.dataset=glyphs")
    drawable = characters.isascii() and characters.isprintable() and " " not in characters
    if not drawable or not 1 < len(set(characters)) == len(characters):
        raise UserError(
            f"data.characters: {characters[:100]!r} is no list of two or more different ASCII characters; "
            "write, for example, ABCDEFGHIJ"
        )


def _complete_augment(augment: AugmentConfig, data: DataConfig) -> AugmentConfig:
    if data.pipeline == "memory":
        for name, none in (("min_area", 1), ("jitter", 0), ("lighting", 0), ("policy", None), ("repeats", 1)):
            if getattr(augment, name) not in (None, none):
                raise UserError(
                    f"augment.{name}: works on files, and data.pipeline is memory; remove the key, or use "
                    "data.pipeline=fast"
                )
        if augment.padding >= data.image_size:
            raise UserError(
                f"augment.padding: {augment.padding} must be below data.image_size, {data.image_size}"
            )
        return replace(augment, min_area=1.0, jitter=0.0, lighting=0.0)
    if augment.padding:
        raise UserError(
            f"augment.padding: crops of {data.pipeline} are not padded; remove the key, or use "
            "data.pipeline=memory"
        )
    if augment.policy and data.pipeline == "torch7":
        raise UserError("augment.policy: needs 8-bit pictures; remove the key, or use data.pipeline=fast")
    return replace(
        augment,
        min_area=0.08 if augment.min_area is None else augment.min_area,
        jitter=0.4 if augment.jitter is None else augment.jitter,
        lighting=0.1 if augment.lighting is None else augment.lighting,
    )


def _check_train(config: Config) -> None:
    train = config.train
    if train.batch_size % train.accumulation_steps:
        raise UserError(
            f"train.accumulation_steps: {train.accumulation_steps} does not divide "
            f"train.batch_size, {train.batch_size}"
        )
    part = train.batch_size // train.accumulation_steps
    if train.bn_group is not None and part % train.bn_group:
        raise UserError(
            f"train.bn_group: {train.bn_group} does not divide the {part} images of a batch "
            "(train.batch_size / train.accumulation_steps); choose one that does, or null"
        )
    if train.bn_group is not None and train.sync_bn:
        raise UserError("train.sync_bn: contradicts train.bn_group (smaller groups); remove one of the two")
    if train.compile and train.activation_checkpointing:
        raise UserError(
            "train.compile: cannot be combined with train.activation_checkpointing; remove one of the two"
        )


def _check_schedule(config: Config) -> None:
    schedule = config.schedule
    multistep = schedule.name == "multistep"
    if multistep and schedule.milestones is None:
        raise UserError("schedule.milestones: multistep needs a list such as [150, 225]")
    if not multistep and schedule.milestones is not None:
        raise UserError(
            f"schedule.milestones: has no meaning for {schedule.name}; "
            "remove it or use schedule.name multistep"
        )
    if multistep and list(schedule.milestones) != sorted(set(schedule.milestones)):
        raise UserError(f"schedule.milestones: must ascend, not {list(schedule.milestones)}; sort them")
    if schedule.name == "cosine" and schedule.min_lr > config.optimizer.lr:
        raise UserError("schedule.min_lr: must not exceed optimizer.lr; lower it")
    if schedule.warmup_epochs and schedule.warmup_epochs >= config.train.epochs:
        raise UserError(
            f"schedule.warmup_epochs: {schedule.warmup_epochs} must be below train.epochs, "
            f"{config.train.epochs}; lower it, for example schedule.warmup_epochs=0"
        )
    if config.optimizer.nesterov and config.optimizer.momentum == 0:
        raise UserError("optimizer.nesterov: needs optimizer.momentum above 0; set one of the two")


# ---------------------------------------------------------------------------- printing


def network_name(model: ModelConfig) -> str:
    """A complete architecture in a word, such as resnext-50 (32x4d)."""
    return f"{model.architecture}-{model.depth} ({model.cardinality}x{model.base_width}d)"


def to_yaml(config: Config) -> str:
    """The configuration as YAML text, every key with its explanation; itself a valid --config."""
    lines = []
    for section in SECTIONS:
        lines.append(f"{section}:")
        values = getattr(config, section)
        for f in fields(values):
            entry = f"  {f.name}: {to_text(getattr(values, f.name))}"
            lines.append(f"{entry:<36}  # {f.metadata['comment']}")
        lines.append("")
    return "\n".join(lines)


def to_text(value: Any) -> str:
    """A value as configuration files spell it."""
    if isinstance(value, tuple):
        return "[" + ", ".join(map(to_text, value)) + "]"
    if isinstance(value, float):  # YAML 1.1 reads 1e-05 as a text, 1.0e-05 as a number
        text = repr(value)
        return text.replace("e", ".0e") if "e" in text and "." not in text else text
    if isinstance(value, str):
        words = ("null", "true", "false", "yes", "no", "on", "off", "y", "n")  # YAML's own
        if re.fullmatch(r"[A-Za-z_/][\w./-]*", value, re.ASCII) and value.lower() not in words:
            return value
        return yaml.safe_dump(value, default_style='"', allow_unicode=True, width=10**9).strip()
    return json.dumps(value)


def differences(old: Config, new: Config) -> list[tuple[str, Any, Any]]:
    """(section.key, old value, new value) of every key that differs."""
    pairs = zip(all_keys(old), all_keys(new), strict=True)
    return [(f"{s}.{k}", a, b) for (s, k, a), (_, _, b) in pairs if a != b]
