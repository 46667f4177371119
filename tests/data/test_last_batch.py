"""The smallest last batch that BatchNorm can normalize."""

import contextlib
import re

import pytest
import torch

from resnext.batch_plan import check_last_batch
from resnext.config import parse_config
from resnext.engine.train_state import build_train_state
from resnext.engine.trainer import train_step
from resnext.errors import UserError


@pytest.mark.parametrize(
    ("images", "ranks", "keys", "works"),
    [
        (64, 1, "", True),
        (65, 1, "", False),
        (66, 1, "", True),
        (66, 2, "", False),  # a single image on each rank
        (68, 2, "", True),
        (67, 2, "", False),  # two and one
        (66, 1, "train.accumulation_steps=2", False),
        (68, 1, "train.accumulation_steps=2", True),
        (70, 1, "train.bn_group=4", False),  # two of four groups have one image
        (72, 1, "train.bn_group=4", True),
        (65, 1, "data.image_size=64", True),
        (65, 1, "train.frozen_stages=4", True),  # no statistics are computed
        (65, 1, "model.stem=cifar data.pipeline=memory", True),
        (1, 1, "", False),
    ],
)
def test_smallest_batches(images, ranks, keys, works):
    """Compared with BatchNorm itself for one rank: it refuses what is refused here."""
    base = ["data.image_size=32", "model.base_width=1", "model.cardinality=1", "train.batch_size=16"]
    config = parse_config("", "test", [*base, *keys.split()])
    with contextlib.nullcontext() if works else pytest.raises(UserError) as refused:
        check_last_batch(config, images, ranks)
    remedy = None if works else re.search(r"such as (train\.batch_size=\d+)", str(refused.value))
    if remedy:
        check_last_batch(parse_config("", "test", [*base, *keys.split(), remedy[1]]), images, ranks)
    if ranks == 1:
        training = build_train_state(config, ("a", "b"), torch.device("cpu"), {})
        training.model.train()
        if config.train.frozen_stages is not None:
            training.model.freeze(config.train.frozen_stages)
        total = (images - 1) % config.train.batch_size + 1
        pixels, labels = torch.randn(total, 3, *[config.data.image_size] * 2), torch.arange(total) % 2
        with contextlib.nullcontext() if works else pytest.raises(ValueError, match="more than 1 value"):
            train_step(training, pixels, labels, 0.01)
