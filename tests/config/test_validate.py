"""Defaults that follow from other keys, and keys that contradict each other."""

import pytest

from resnext.config import parse_config
from resnext.errors import UserError

CIFAR_RESNET = "model: {{architecture: resnet, stem: cifar, {}}}"
# fmt: off
CONTRADICTIONS = [  # configuration, fragment of the message
    ("model: {stem: cifar, depth: 28}", "model.depth: must be 9n+2 (20, 29, 38, ...) (got 28)"),
    ("model: {stem: cifar, depth: 5}", "model.depth: must be 9n+2 (20, 29, 38, ...) (got 5)"),
    (CIFAR_RESNET.format("depth: 5"), "model.depth: must be 6n+2 (20, 32, 44, ...) or 9n+2"),
    (CIFAR_RESNET.format("depth: 29, block_type: basic"), "model.depth: must be 6n+2"),
    ("model: {depth: 29}", "model.depth: must be one of 50, 101, 152, 200 (got 29)"),
    ("model: {depth: 29, architecture: resnet}", "model.depth: must be one of 18, 34, 50, 101, 152, 200"),
    ("model: {block_type: basic}", "model.block_type: resnext has bottlenecks"),
    (
        "model: {stem: cifar, depth: 20, architecture: resnet, base_width: 64}",
        "model.architecture: resnet has cardinality 1, base_width 16",
    ),
    ("model: {stages: [1, 1, 1]}", "model.stages: stem imagenet has 4 stages (got 3)"),
    ("model: {stem: cifar, stages: [1, 1, 1, 1]}", "model.stages: stem cifar has 3 stages (got 4)"),
    ("model: {stages: [3, 4, 6, 3], depth: 101}", "model.stages: 16 bottleneck blocks give 50 layers, but"),
    ("model: {architecture: resnet, cardinality: 2}", "model.architecture: resnet has cardinality 1"),
    ("model: {architecture: resnet, base_width: 4}", "model.architecture: resnet has cardinality 1"),
    ("model: {architecture: resnet, block: B}", "model.architecture: resnet has cardinality 1"),
    ("model: {zero_gamma: true, preactivation: true}", "model.zero_gamma: "),
    ("train: {accumulation_steps: 3}", "train.accumulation_steps: must divide train.batch_size, 256 (got 3)"),
    ("train: {bn_group: 7}", "train.bn_group: 7 does not divide the 256 images"),
    ("train: {bn_group: 128, accumulation_steps: 4}", "train.bn_group: 128 does not divide the 64 images"),
    ("train: {compile: true, activation_checkpointing: true}", "train.compile: "),
    ("train: {bn_group: 16, sync_bn: true}", "train.sync_bn: contradicts train.bn_group"),
    ("model: {stem: cifar}\ntrain: {frozen_stages: 4}", "train.frozen_stages: the network has 3 stages"),
    ("schedule: {name: multistep}", "schedule.milestones: missing"),
    ("schedule: {milestones: [30]}", "schedule.milestones: imagenet_step has none"),
    ("schedule: {name: multistep, milestones: [60, 30]}", "schedule.milestones: must ascend"),
    ("schedule: {name: multistep, milestones: [30, 30]}", "schedule.milestones: must ascend"),
    ("schedule: {name: cosine, min_lr: 1}", "schedule.min_lr: must be at most optimizer.lr, 0.1"),
    ("schedule: {warmup_epochs: 100}", "schedule.warmup_epochs: must be below train.epochs, 100 (got 100)"),
    ("optimizer: {momentum: 0}", "optimizer.nesterov: needs optimizer.momentum above 0"),
    ("data: {pipeline: memory}\naugment: {padding: 224}", "augment.padding: must be below data.image_size"),
    ("augment: {padding: 4}", "augment.padding: fast does not pad"),
    ("data: {pipeline: torch7}\naugment: {padding: 4}", "augment.padding: torch7 does not pad"),
    ("data: {pipeline: torch7}\naugment: {policy: randaugment}", "augment.policy: needs 8-bit images"),
    ("data: {dataset: glyphs, pipeline: fast}", "data.pipeline: glyphs is held in memory (got fast)"),
    ("data: {dataset: cifar10, pipeline: torch7}", "data.pipeline: cifar10 is held in memory (got torch7)"),
    ("data: {image_size: 288, resize: 256}", "data.resize: must be at least data.image_size, 288 (got 256)"),
    ("data: {pipeline: memory, train_size: 160}", "data.train_size: in-memory images have one size"),
    ("data: {dataset: glyphs, resize: 32}", "data.resize: in-memory images have one size"),
    ("data: {pipeline: memory}\naugment: {jitter: 0.4}", "augment.jitter: needs image files"),
    ("data: {dataset: cifar10}\naugment: {lighting: 0.1}", "augment.lighting: needs image files"),
    ("data: {dataset: glyphs}\naugment: {min_area: 0.5}", "augment.min_area: needs image files"),
    ("model: {stem: cifar}\naugment: {repeats: 3}", "augment.repeats: needs image files"),
    ("model: {stem: cifar}\naugment: {policy: trivialaugment}", "augment.policy: needs image files"),
    ("data: {dataset: cifar10, image_size: 64}", "data.image_size: cifar10 images have 32 pixels (got 64)"),
    ("data: {mean: [1, 2]}", "data.mean: must be 3 numbers (got 2)"),
    ("data: {std: [1, 2, 3, 4]}", "data.std: must be 3 numbers (got 4)"),
    ("data: {characters: AB}", "data.characters: folder draws none"),
    ("data: {dataset: glyphs, characters: AA}", "data.characters: must be two or more different"),
]

DERIVED = [  # configuration, section.key, value
    ("model: {architecture: resnet}", "model.base_width", 64),
    ("model: {architecture: resnet}", "model.cardinality", 1),
    ("model: {depth: 101}", "model.stages", (3, 4, 23, 3)),
    ("model: {depth: 152}", "model.stages", (3, 8, 36, 3)),
    ("model: {stem: cifar}", "model.depth", 29),
    ("model: {stem: cifar, depth: 164}", "model.stages", (18, 18, 18)),
    (CIFAR_RESNET.format("depth: 164"), "model.stages", (27, 27, 27)),
    (CIFAR_RESNET.format("depth: 20"), "model.stages", (3, 3, 3)),
    (CIFAR_RESNET.format("depth: 20"), "model.shortcut", "A"),
    (CIFAR_RESNET.format("depth: 20"), "model.base_width", 16),
    (CIFAR_RESNET.format("depth: 20, block_type: bottleneck"), "model.stages", (2, 2, 2)),
    (CIFAR_RESNET.format("depth: 20, stages: [2, 2, 2]"), "model.block_type", "bottleneck"),
    (CIFAR_RESNET.format("depth: 20, stages: [2, 2, 2]"), "model.shortcut", "B"),
    ("model: {architecture: resnet, depth: 34}", "model.block_type", "basic"),
    ("model: {architecture: resnet, stages: [3, 4, 6, 3]}", "model.depth", 50),
    ("model: {architecture: resnet, depth: 200}", "model.stages", (3, 24, 36, 3)),
    ("model: {stages: [2, 2, 2, 2]}", "model.depth", 26),
    ("model: {stem: cifar}", "data.image_size", 32),
    ("data: {dataset: cifar10}", "data.mean", (125.3, 123.0, 113.9)),
    ("data: {dataset: cifar100}", "data.std", (68.2, 65.4, 70.4)),
    ("train: {batch_size: 48}", "train.eval_batch_size", 48),
]
# fmt: on
FILES = "model: {stem: cifar}\ndata: {pipeline: PIPELINE, image_size: 64}"
PIPELINES = [  # configuration, pipeline, train_size, resize, (min_area, jitter, lighting)
    ("model: {stem: cifar}", "memory", 32, 32, (1, 0, 0)),
    ("model: {stem: cifar}\ndata: {dataset: cifar10}", "memory", 32, 32, (1, 0, 0)),
    ("data: {dataset: glyphs, image_size: 32}", "memory", 32, 32, (1, 0, 0)),
    ("data: {pipeline: memory, image_size: 32}", "memory", 32, 32, (1, 0, 0)),
    (FILES.replace("PIPELINE", "fast"), "fast", 64, 73, (0.08, 0.4, 0.1)),
    (FILES.replace("PIPELINE", "torch7"), "torch7", 64, 73, (0.08, 0.4, 0.1)),
    ("data: {image_size: 288, train_size: 176, resize: 288}", "fast", 176, 288, (0.08, 0.4, 0.1)),
]


@pytest.mark.parametrize(("text", "fragment"), CONTRADICTIONS)
def test_contradictory_keys(text, fragment):
    with pytest.raises(UserError) as caught:
        parse_config(text, "text")
    assert str(caught.value).startswith(fragment)
    assert "\n" not in str(caught.value) and "; " in str(caught.value), "one line that ends with a fix"


@pytest.mark.parametrize(("text", "name", "value"), DERIVED)
def test_derived_value(text, name, value):
    section, key = name.split(".")
    assert getattr(getattr(parse_config(text, "text"), section), key) == value


@pytest.mark.parametrize(("text", "pipeline", "train_size", "resize", "strengths"), PIPELINES)
def test_pipelines_by_default(text, pipeline, train_size, resize, strengths):
    """Small datasets are held in memory without the augmentation of files; class folders are streamed."""
    config = parse_config(text, "text")
    assert (config.data.pipeline, config.data.train_size, config.data.resize) == (
        pipeline,
        train_size,
        resize,
    )
    assert (config.augment.min_area, config.augment.jitter, config.augment.lighting) == strengths


def test_override_resolves_a_contradiction_of_the_file():
    text = "train: {batch_size: 30, bn_group: 16}"
    with pytest.raises(UserError, match=r"train\.bn_group"):
        parse_config(text, "text")
    assert parse_config(text, "text", ["train.batch_size=32"]).train.bn_group == 16
