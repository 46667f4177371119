"""Fill in the keys that follow from others, and refuse combinations that cannot work."""

from dataclasses import replace

from ..errors import UserError
from .schema import (
    IMAGE_FILES,
    LAYERS,
    STAGES,
    STATISTICS,
    AugmentConfig,
    Config,
    DataConfig,
    ModelConfig,
    TrainConfig,
    stages_by_depth,
)

IMAGE_SIZES = {"cifar10": 32, "cifar100": 32, "glyphs": 20}


def complete(config: Config) -> Config:
    """Return the configuration with derived keys filled in; raise UserError if keys contradict each other."""
    data = _complete_data(config.data, config.model.stem)
    _check_train(config.train)
    _check_schedule(config)
    augment = _complete_augment(config.augment, data)
    model, train = _complete_model(config.model), config.train
    frozen, stages = train.frozen_stages or 0, len(model.stages)
    if frozen > stages:
        raise UserError(f"train.frozen_stages: the network has {stages} stages (got {frozen}); lower it")
    train = replace(train, eval_batch_size=train.eval_batch_size or train.batch_size)
    return replace(config, model=model, data=data, augment=augment, train=train)


def _complete_model(model: ModelConfig) -> ModelConfig:
    plain, imagenet = model.architecture == "resnet", model.stem == "imagenet"
    count = 4 if imagenet else 3
    depth = model.depth or (None if model.stages else 50 if imagenet else 29)
    types = ("basic", "bottleneck") if plain else ("bottleneck",)
    if model.block_type:
        if model.block_type not in types:
            raise UserError("model.block_type: resnext has bottlenecks; set model.architecture=resnet")
        types = (model.block_type,)
    # Blocks alone do not tell 34 layers from 50: then they are bottlenecks.
    block_type = next((kind for kind in types if depth and _fits(model, kind, depth)), types[-1])
    stages = model.stages or stages_by_depth(block_type, depth or 0, model.stem)
    if not stages:
        basic = not plain and stages_by_depth("basic", depth or 0, model.stem)
        other = "architecture=resnet" if basic else "stages"
        raise UserError(
            f"model.depth: must be {_depths(types, imagenet)} (got {depth}); change it, or set model.{other}"
        )
    layers, small = LAYERS[block_type] * sum(stages) + 2, block_type == "basic" and not imagenet
    if len(stages) != count:
        raise UserError(
            f"model.stages: stem {model.stem} has {count} stages (got {len(stages)}); give {count}"
        )
    if depth not in (None, layers):
        raise UserError(
            f"model.stages: {sum(stages)} {block_type} blocks give {layers} layers, but model.depth is "
            f"{depth}; remove one"
        )
    cardinality = model.cardinality or (1 if plain else 32)
    width = 16 if small else 64 if plain else 4
    base_width = model.base_width or width
    if plain and (cardinality, base_width, model.block) != (1, width, "C"):
        wide = "model.block_type=bottleneck or " if small else ""
        raise UserError(
            f"model.architecture: resnet has cardinality 1, base_width {width}, and block C; "
            f"remove these keys, or set {wide}model.architecture=resnext"
        )
    if model.zero_gamma and model.preactivation:
        raise UserError("model.zero_gamma: pre-activation blocks do not end with BN; set it to false")
    return replace(
        model,
        depth=layers,
        block_type=block_type,
        stages=stages,
        cardinality=cardinality,
        base_width=base_width,
        shortcut=model.shortcut or ("A" if small else "B"),
    )


def _fits(model: ModelConfig, block_type: str, depth: int) -> bool:
    """Return whether blocks of a type make a network of this depth, with the stages if they are given."""
    if model.stages:
        return LAYERS[block_type] * sum(model.stages) + 2 == depth
    return bool(stages_by_depth(block_type, depth, model.stem))


def _depths(types: tuple[str, ...], imagenet: bool) -> str:
    """Return which depths exist, for an error message."""
    if imagenet:
        return f"one of {', '.join(str(depth) for kind in types for depth in STAGES[kind])}"
    rules = {"basic": "6n+2 (20, 32, 44, ...)", "bottleneck": "9n+2 (20, 29, 38, ...)"}
    return " or ".join(rules[kind] for kind in types)


def _complete_data(data: DataConfig, stem: str) -> DataConfig:
    size = data.image_size or IMAGE_SIZES.get(data.dataset) or (224 if stem == "imagenet" else 32)
    if data.dataset.startswith("cifar") and size != 32:
        raise UserError(f"data.image_size: {data.dataset} images have 32 pixels (got {size}); remove the key")
    pipeline = data.pipeline or ("memory" if data.dataset not in IMAGE_FILES or stem == "cifar" else "fast")
    if pipeline != "memory" and data.dataset not in IMAGE_FILES:
        raise UserError(f"data.pipeline: {data.dataset} is held in memory (got {pipeline}); remove the key")
    if data.dataset != "folder" and (data.train_list or data.val_list):
        raise UserError(
            f"data.{'train' if data.train_list else 'val'}_list: names image files, and "
            f"{data.dataset} has none; remove the key"
        )
    resize = data.resize or (size if pipeline == "memory" else size * 256 // 224)
    for name, value in (("train_size", data.train_size), ("resize", data.resize)):
        if pipeline == "memory" and value not in (None, size):
            raise UserError(
                f"data.{name}: in-memory images have one size, data.image_size; "
                "remove the key, or set data.pipeline=fast"
            )
    if resize < size:
        raise UserError(f"data.resize: must be at least data.image_size, {size} (got {resize}); raise it")
    if data.characters is not None:
        _check_characters(data.characters, data.dataset)
    for name, numbers in (("mean", data.mean), ("std", data.std)):
        if numbers is not None and len(numbers) != 3:
            raise UserError(f"data.{name}: must be 3 numbers (got {len(numbers)}); give red, green, and blue")
    mean, std = STATISTICS[data.dataset]
    return replace(
        data,
        pipeline=pipeline,
        image_size=size,
        train_size=data.train_size or size,
        resize=resize,
        mean=data.mean or mean,
        std=data.std or std,
    )


def _check_characters(characters: str, dataset: str) -> None:
    if dataset != "glyphs":
        raise UserError(f"data.characters: {dataset} draws none; remove the key, or set data.dataset=glyphs")
    drawable = characters.isascii() and characters.isprintable() and " " not in characters
    if not drawable or not 1 < len(set(characters)) == len(characters):
        raise UserError(
            f"data.characters: must be two or more different ASCII characters (got {characters[:100]!r}); "
            "write, for example, ABCDEFGHIJ"
        )


def _complete_augment(augment: AugmentConfig, data: DataConfig) -> AugmentConfig:
    area, jitter, lighting = 0.08, 0.4, 0.1
    if data.pipeline == "memory":
        area, jitter, lighting = 1.0, 0.0, 0.0
        off = {"min_area": area, "jitter": jitter, "lighting": lighting, "policy": None, "repeats": 1}
        for name, value in off.items():
            if getattr(augment, name) not in (None, value):
                raise UserError(
                    f"augment.{name}: needs image files (data.pipeline is memory); "
                    "remove the key, or set data.pipeline=fast"
                )
        if augment.padding >= data.image_size:
            raise UserError(f"augment.padding: must be below data.image_size, {data.image_size}; lower it")
    elif augment.padding:
        raise UserError(
            f"augment.padding: {data.pipeline} does not pad; remove it, or set data.pipeline=memory"
        )
    if augment.policy and data.pipeline == "torch7":
        raise UserError("augment.policy: needs 8-bit images; remove the key, or set data.pipeline=fast")
    return replace(
        augment,
        min_area=area if augment.min_area is None else augment.min_area,
        jitter=jitter if augment.jitter is None else augment.jitter,
        lighting=lighting if augment.lighting is None else augment.lighting,
    )


def _check_train(train: TrainConfig) -> None:
    batch, steps, ghost = train.batch_size, train.accumulation_steps, train.bn_group
    if batch % steps:
        raise UserError(
            f"train.accumulation_steps: must divide train.batch_size, {batch} (got {steps}); change it"
        )
    if ghost is not None and batch // steps % ghost:
        raise UserError(
            f"train.bn_group: {ghost} does not divide the {batch // steps} images of a micro-batch "
            "(train.batch_size / train.accumulation_steps); choose a divisor, or null"
        )
    if ghost is not None and train.sync_bn:
        raise UserError("train.sync_bn: contradicts train.bn_group; remove one of the two")
    if train.compile and train.activation_checkpointing:
        raise UserError("train.compile: excludes train.activation_checkpointing; remove one of the two")


def _check_schedule(config: Config) -> None:
    schedule, epochs, optimizer = config.schedule, config.train.epochs, config.optimizer
    multistep, milestones = schedule.name == "multistep", list(schedule.milestones or ())
    if multistep and not milestones:
        raise UserError("schedule.milestones: missing for multistep; give a list such as [150, 225]")
    if milestones and not multistep:
        raise UserError(f"schedule.milestones: {schedule.name} has none; remove it, or use multistep")
    if milestones != sorted(set(milestones)):
        raise UserError(f"schedule.milestones: must ascend strictly (got {milestones}); sort them")
    if schedule.name == "cosine" and schedule.min_lr > optimizer.lr:
        raise UserError(f"schedule.min_lr: must be at most optimizer.lr, {optimizer.lr}; lower it")
    warmup = schedule.warmup_epochs
    if warmup and warmup >= epochs:
        raise UserError(
            f"schedule.warmup_epochs: must be below train.epochs, {epochs} (got {warmup}); "
            "lower it, for example schedule.warmup_epochs=0"
        )
    if optimizer.nesterov and optimizer.momentum == 0:
        raise UserError("optimizer.nesterov: needs optimizer.momentum above 0; set one of the two")
