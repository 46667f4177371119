"""The configuration: what a YAML file can set, read strictly, validated, and printed with explanations.

A file states what differs from the defaults, which are the original's ImageNet recipe:

    model: {depth: 101, cardinality: 64}
    train: {batch_size: 128}
    optimizer: {lr: 0.05}

This package does not import torch, so configuration errors appear at once.
"""

from .parser import find_config, parse_config, read_config
from .schema import (
    CONFIG_FOLDER,
    IMAGE_FILES,
    KEYS,
    LAYERS,
    SECTIONS,
    STAGES,
    STATISTICS,
    AugmentConfig,
    Config,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    Precision,
    RunConfig,
    ScheduleConfig,
    TrainConfig,
    Value,
    all_keys,
    differences,
    network_name,
    stages_by_depth,
    to_text,
    to_yaml,
)
from .validate import complete
