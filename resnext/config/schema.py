"""The configuration's sections and keys: type, default, help text, limits, and other programs' names."""

import json
import re
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import yaml

Scalar = str | float | bool
Value = Scalar | tuple[Scalar, ...] | None

CONFIG_FOLDER = Path(__file__).resolve().parents[2] / "configs"
IMAGE_FILES = ("folder", "shards")  # values of data.dataset: files of any size
LAYERS = {"basic": 2, "bottleneck": 3}  # convolutions per block
STAGES = {  # of the ImageNet networks: {block type: {depth: blocks per stage}}
    "basic": {18: (2, 2, 2, 2), 34: (3, 4, 6, 3)},
    "bottleneck": {50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3), 200: (3, 24, 36, 3)},
}

# Per-channel mean and standard deviation in pixel values 0...255 (fb.resnet.torch: datasets/*.lua).
STATISTICS = {
    "folder": ((123.675, 116.28, 103.53), (58.395, 57.12, 57.375)),
    "shards": ((123.675, 116.28, 103.53), (58.395, 57.12, 57.375)),
    "cifar10": ((125.3, 123.0, 113.9), (63.0, 62.1, 66.7)),
    "cifar100": ((129.3, 124.1, 112.4), (68.2, 65.4, 70.4)),
    "glyphs": ((128.0, 128.0, 128.0), (64.0, 64.0, 64.0)),
}


def key(default: Value, comment: str, aliases: str = "", **limits: float) -> Any:
    """Return a field with its help text, its limits (at_least, at_most, above, below), and its aliases.

    An annotation is the key's type after `complete`, which fills in null keys that follow from others.
    `aliases` are names of the key in opts.lua and in other trainers, for error messages.
    """
    return field(default=default, metadata={"comment": comment, "aliases": aliases.split(), "limits": limits})


# fmt: off
Precision = Literal["auto", "fp32", "tf32", "bf16", "fp16"]


@dataclass(frozen=True)
class ModelConfig:
    """The network."""

    architecture: Literal["resnext", "resnet"] = key("resnext",
        "resnext, or resnet: blocks without groups", "netType")
    stem: Literal["imagenet", "cifar"] = key("imagenet",
        "imagenet: 7x7/2 and max-pool, 4 stages; cifar: 3x3, 3 stages")
    depth: int = key(None, "layers; stem imagenet: 50, 101, 152, 200, and resnet 18, 34; "
        "stem cifar: 9n+2, and resnet 6n+2", at_least=4)
    block_type: Literal["basic", "bottleneck"] = key(None,
        "resnet: basic (two 3x3) or bottleneck; null: basic if the depth is one of theirs")
    stages: tuple[int, ...] = key(None,
        "blocks per stage, instead of depth: [3, 4, 6, 3]", at_least=1, at_most=1000)
    cardinality: int = key(None, "groups (paths) per block", "groups", at_least=1, at_most=10_000)
    base_width: int = key(None,
        "width of a path in the first stage: 4 in 32x4d", "width_per_group", at_least=1, at_most=10_000)
    block: Literal["A", "B", "C"] = key("C",
        "block form of the paper's Fig. 3; C, grouped convolution, is the fast one", "bottleneckType")
    shortcut: Literal["A", "B", "C"] = key(None, "A: zero-padded identity; B: 1x1 convolution if channels "
        "change; C: always; null: A for basic blocks of stem cifar, else B", "shortcutType")
    preactivation: bool = key(False, "BN and ReLU before the convolutions (the paper's CIFAR runs)")
    zero_gamma: bool = key(False, "initialize the last BN of each block to 0 (not in the original)")
    classes: int | None = key(None,
        "number of classes; null: as in the data", "nClasses num_classes", at_least=1, at_most=10**7)
    pretrained: str | None = key(None,
        "initial weights: a run, file, torchvision:NAME, timm:NAME, or hf:OWNER/REPO; "
        "other classes get a new last layer",
        "retrain weights load_from")
    reset_classifier: bool = key(False,
        "with pretrained: reinitialize the last layer even if the number of classes matches")


@dataclass(frozen=True)
class DataConfig:
    """The dataset and how images become network inputs."""

    dataset: Literal["folder", "shards", "cifar10", "cifar100", "glyphs"] = key("folder",
        "folder: class folders in train/ and val/; shards: tars of images; glyphs: digits drawn in memory")
    characters: str | None = key(None, "glyphs: the characters to draw, one class each; null: 0123456789")
    dir: str | None = key(None, "dataset folder; downloads go there too (--data)", "data_dir root path")
    download: bool = key(True, "download cifar10 and cifar100 if they are missing")
    pipeline: Literal["memory", "fast", "torch7"] = key(None,
        "memory: a small dataset on the device; fast, torch7: files; null: memory for stem cifar")
    decoder: Literal["simplejpeg", "pillow"] = key("simplejpeg",
        "JPEG decoder (fast, torch7); both give the same pixels up to rounding")
    interpolation: Literal["bilinear", "bicubic"] = key("bicubic",
        "fast: resizing filter, antialiased; torch7 always uses its own bicubic filter")
    image_size: int = key(None,
        "height and width of the network's input in pixels", "val_crop_size", at_least=8, at_most=4096)
    train_size: int = key(None,
        "image_size in training; null: image_size", "train_crop_size", at_least=8, at_most=4096)
    resize: int = key(None,
        "fast, torch7: shorter side before the evaluation crop; null: image_size * 256 / 224",
        "val_resize_size", at_least=8, at_most=8192)
    workers: int | None = key(None,
        "fast, torch7: DataLoader workers per process; 0: none; null: one per CPU core",
        "nThreads num_workers", at_least=0, at_most=256)
    class_order: Literal["string", "natural"] | None = key(None,
        "class folders: string (10 before 2), natural (2 before 10; timm); null: string, or 0…N-1 by number")
    max_pixels: int = key(178_956_970, "refuse larger images, which could exhaust the memory", at_least=1)
    train_list: str | None = key(None,
        "folder: file of image paths and classes, instead of class folders; FILE:COLUMN of a CSV file")
    val_list: str | None = key(None, "the same for validation: LOC_val_solution.csv, val_annotations.txt, …",
        "ann_file")
    skip_broken: bool = key(False,
        "fast, torch7: replace an undecodable training file with the next one, and log it")
    train_images: int | None = key(None,
        "use this many training images, evenly spaced (glyphs: draw this many); null: all", at_least=1)
    val_images: int | None = key(None, "the same for validation", at_least=1)
    mean: tuple[float, ...] = key(None, "per channel, in pixel values 0...255; null: the dataset's own")
    std: tuple[float, ...] = key(None, "standard deviation, like mean", above=0)


@dataclass(frozen=True)
class AugmentConfig:
    """Random changes to training images."""

    mirror: float = key(0.5, "probability of a horizontal flip", at_least=0, at_most=1)
    padding: int = key(0,
        "memory: pad by this many pixels of the mean color, then crop at random; CIFAR: 4", at_least=0)
    min_area: float = key(None,
        "fast, torch7: smallest crop as a share of the image; null: 0.08", above=0, at_most=1)
    jitter: float = key(None,
        "fast, torch7: largest change of brightness, contrast, saturation; null: 0.4",
        "color_jitter", at_least=0, at_most=1)
    lighting: float = key(None,
        "fast, torch7: std of the color shift along ImageNet's principal axes; null: 0.1", at_least=0)
    policy: Literal["randaugment", "trivialaugment"] | None = key(None,
        "fast: torchvision's RandAugment or TrivialAugmentWide", "auto_augment")
    erasing: float = key(0.0,
        "probability of a random mean-color rectangle", "random_erase reprob", at_least=0, at_most=1)
    mixup: float = key(0.0,
        "alpha of mixup; 0: off; with cutmix, one of the two per batch", "mixup_alpha", at_least=0)
    cutmix: float = key(0.0, "alpha of CutMix; 0: off", "cutmix_alpha", at_least=0)
    repeats: int = key(1,
        "fast, torch7: augmented copies of each image per epoch of unchanged length", "ra_reps", at_least=1)


@dataclass(frozen=True)
class TrainConfig:
    """The training procedure."""

    epochs: int = key(100, "passes over the training set", "nEpochs", at_least=1)
    batch_size: int = key(256, "global batch size: images per optimizer step", at_least=1)
    eval_batch_size: int = key(None,
        "images per evaluation batch and process; affects only speed; null: batch_size", at_least=1)
    frozen_stages: int | None = key(None,
        "freeze the stem and the first N stages, including BN statistics; null: train all",
        "freeze freeze_at", at_least=0, at_most=4)
    accumulation_steps: int = key(1,
        "split the batch into N micro-batches to save memory; BN sees one micro-batch", at_least=1)
    bn_group: int | None = key(None,
        "ghost batch size: images per BN group, as on one GPU of the original", at_least=1)
    sync_bn: bool = key(False, "BN statistics over the micro-batch of all GPUs")
    label_smoothing: float = key(0.0,
        "share of the target spread over all classes", "smoothing", at_least=0, below=1)
    precision: Precision = key("fp32",  # noqa: RUF009 (an alias hides the Literal)
        "fp32, tf32, autocast to bf16 or fp16 (with loss scaling); auto: bf16 if in hardware, else fp32",
        "amp")
    channels_last: bool | None = key(None, "memory layout; null: on where measured faster")
    compile: bool = key(False, "torch.compile: minutes to start, then faster steps")
    activation_checkpointing: bool = key(False,
        "recompute blocks in the backward pass: less memory, a third more time", "shareGradInput optnet")
    clip_grad_norm: float | None = key(None, "clip the gradient's L2 norm to this; null: never", above=0)
    ema_decay: float | None = key(None,
        "evaluate averaged weights with this decay; needs many more steps than 1/(1-decay)",
        above=0, below=1)


@dataclass(frozen=True)
class OptimizerConfig:
    """Stochastic gradient descent."""

    lr: float = key(0.1, "learning rate for the global batch", "learning_rate", above=0, at_most=1e30)
    head_lr: float | None = key(None,
        "learning rate of the last layer, same schedule; null: lr", above=0, at_most=1e30)
    momentum: float = key(0.9, "SGD momentum", at_least=0, below=1)
    nesterov: bool = key(True, "Nesterov momentum, as in the original")
    weight_decay: float = key(1e-4,
        "weight decay of all parameters, including BN and biases", "wd", at_least=0, at_most=1e30)
    norm_weight_decay: float | None = key(None,
        "weight decay of BN; null: weight_decay, as in the original", at_least=0, at_most=1e30)


@dataclass(frozen=True)
class ScheduleConfig:
    """The learning rate over time."""

    name: Literal["imagenet_step", "cifar_step", "multistep", "cosine"] = key("imagenet_step",
        "imagenet_step: /10 every 30 epochs; cifar_step: /10 after 49% and 74% of all epochs")
    milestones: tuple[int, ...] | None = key(None,
        "multistep: epochs after which the learning rate is multiplied by gamma", at_least=1)
    gamma: float = key(0.1, "multistep: the factor", above=0, below=1)
    min_lr: float = key(0.0, "cosine: final learning rate", at_least=0)
    warmup_epochs: int = key(0, "epochs of linear warm-up, updated every step", at_least=0)


@dataclass(frozen=True)
class RunConfig:
    """The run: seed, device, logging, saving."""

    seed: int = key(0,
        "seed of initial weights, data order, and augmentation", "manualSeed", at_least=0, at_most=2**63 - 1)
    device: Literal["auto", "cpu", "cuda"] = key("auto", "auto: a GPU if there is one")
    deterministic: bool = key(False, "reproducible bits on GPUs too, but slower; on CPUs always")
    log_interval: int = key(50, "steps between log rows and checks of the loss", at_least=1)
    save_interval: int | None = key(None,
        "steps between checkpoints within an epoch; null: only at its end", at_least=1)
    keep_every: int | None = key(None, "keep epoch_NNN.pt every N epochs; null: none", at_least=1)
    tensorboard: bool = key(True, "write TensorBoard scalars")
    timeout: int = key(600,
        "seconds that a torchrun process waits for the others before it ends", at_least=1, at_most=86400)

# fmt: on


@dataclass(frozen=True)
class Config:
    """A configuration; each section is a frozen dataclass."""

    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    augment: AugmentConfig = AugmentConfig()
    train: TrainConfig = TrainConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    run: RunConfig = RunConfig()


SECTIONS: dict[str, type] = {section.name: type(section.default) for section in fields(Config)}
KEYS = {f"{section}.{f.name}": f for section, kind in SECTIONS.items() for f in fields(kind)}


def all_keys(config: Config) -> dict[str, Value]:
    """Return section.key → value of every key, in the order of the schema."""
    pairs = (name.split(".") for name in KEYS)
    return {f"{section}.{name}": getattr(getattr(config, section), name) for section, name in pairs}


def differences(old: Config, new: Config) -> list[tuple[str, Value, Value]]:
    """Return (section.key, old value, new value) of every key that differs."""
    after = all_keys(new)
    return [(name, value, after[name]) for name, value in all_keys(old).items() if value != after[name]]


def network_name(model: ModelConfig) -> str:
    """Return a short name of a completed architecture, such as resnext-50 (32x4d) or resnet-20 (basic)."""
    kind = "basic" if model.block_type == "basic" else f"{model.cardinality}x{model.base_width}d"
    return f"{model.architecture}-{model.depth} ({kind})"


def stages_by_depth(block_type: str, depth: int, stem: str) -> tuple[int, ...]:
    """Return the blocks per stage of a network; () if no network of this block type has this depth."""
    if stem == "imagenet":
        return STAGES[block_type].get(depth, ())
    blocks, rest = divmod(depth - 2, 3 * LAYERS[block_type])
    return () if blocks < 1 or rest else (blocks,) * 3


def to_yaml(config: Config) -> str:
    """Return the configuration as YAML with the help text of every key; the result is a valid --config."""
    lines = []
    for section in SECTIONS:
        lines.append(f"{section}:")
        for name, value in vars(getattr(config, section)).items():
            entry = f"  {name}: {to_text(value)}"
            lines.append(f"{entry:<36}  # {KEYS[f'{section}.{name}'].metadata['comment']}")
        lines.append("")
    return "\n".join(lines)


def to_text(value: Value) -> str:
    """Return a value as configuration files spell it."""
    if isinstance(value, tuple):
        return "[" + ", ".join(map(to_text, value)) + "]"
    if isinstance(value, float):  # YAML 1.1 reads 1e-05 as text, 1.0e-05 as a number
        text = repr(value)
        return text.replace("e", ".0e") if "e" in text and "." not in text else text
    if isinstance(value, str):
        words = ("null", "true", "false", "yes", "no", "on", "off", "y", "n")  # YAML's own
        if re.fullmatch(r"[A-Za-z_/][\w./-]*", value, re.ASCII) and value.lower() not in words:
            return value
        return yaml.safe_dump(value, default_style='"', allow_unicode=True, width=10**9).strip()
    return json.dumps(value)
