"""How ranks, micro-batches and ghost batches share a global batch."""

import functools
import json
import re
from collections.abc import Iterator
from dataclasses import replace
from itertools import chain, product

import numpy as np
import pytest
from ranks import share_of

from resnext.batch_plan import check_last_batch, check_world_size, split_batch, split_evenly
from resnext.config import TrainConfig, parse_config
from resnext.errors import UserError


@functools.cache
def valid_settings() -> list[TrainConfig]:
    found = []
    for batch_size, accumulation, bn_group in product(
        (4, 6, 24, 64, 100), (1, 2, 3, 4), (None, 1, 2, 4, 8, 25)
    ):
        values = {"batch_size": batch_size, "accumulation_steps": accumulation, "bn_group": bn_group}
        try:
            found.append(parse_config(f"train: {json.dumps(values)}", "test").train)
        except UserError:
            continue
    return found


def sharable() -> Iterator[tuple[TrainConfig, int]]:
    """Yield settings, and numbers of ranks that can share their batches."""
    for train, ranks in product(valid_settings(), (1, 2, 3, 4, 5, 8)):
        try:
            check_world_size(train, ranks)
        except UserError:
            continue
        yield train, ranks


def test_every_position_belongs_to_exactly_one_rank():
    """Within a micro-batch the ranks follow each other, and so do the micro-batches."""
    cases = 0
    for train, ranks in sharable():
        cases += 1
        for images in range(train.batch_size + 1):
            sizes = split_batch(images, train, ranks)
            assert [len(part) for part in sizes] == [ranks] * train.accumulation_steps
            positions = [share_of(train, rank, ranks)(images) for rank in range(ranks)]
            assert all(own.dtype == np.int64 for own in positions)
            assert [len(own) for own in positions] == np.sum(sizes, 0).tolist()
            rest = [iter(own.tolist()) for own in positions]
            in_order = [
                next(rest[rank]) for part in sizes for rank, size in enumerate(part) for _ in range(size)
            ]
            assert in_order == list(range(images))
    assert cases > 100


def test_ranks_work_equally_and_the_first_is_never_idle():
    for train, ranks in sharable():
        for images in range(1, train.batch_size + 1):
            sizes = split_batch(images, train, ranks)
            assert sizes[0][0] > 0
            assert all(part[0] == max(part) for part in sizes)
            slices = train.bn_group and train.batch_size // train.accumulation_steps // train.bn_group
            groups = 1 if slices is None else slices // ranks  # each may have one image more
            assert np.ptp(sizes) <= groups
        if train.batch_size % (train.accumulation_steps * ranks) == 0:
            assert np.ptp(split_batch(train.batch_size, train, ranks)) == 0


def test_ghost_batches_are_the_same_on_any_number_of_ranks():
    """The slices that the ranks' BatchNorm makes are, one after another, those of one process."""
    cases = 0
    for train, ranks in sharable():
        if train.bn_group is None:
            continue
        cases += ranks > 1
        groups = train.batch_size // train.accumulation_steps // train.bn_group
        for images in range(1, train.batch_size + 1):
            alone = [split_evenly(part, groups) for [part] in split_batch(images, train, 1)]
            shared = [
                [size for own in part for size in split_evenly(own, groups // ranks)]
                for part in split_batch(images, train, ranks)
            ]
            assert shared == alone
            assert list(chain(*shared)) == split_evenly(images, groups * train.accumulation_steps)
    assert cases > 20


@pytest.mark.parametrize(
    ("images", "expected"),
    [(64, [16, 16, 16, 16]), (51, [14, 13, 12, 12]), (3, [2, 1])],  # 51: slices of 7 7 7 6 6 6 6 6
)
def test_micro_batches_end_where_ghost_batches_do(images, expected):
    text = "train: {batch_size: 64, accumulation_steps: 4, bn_group: 8}"
    assert [n for [n] in split_batch(images, parse_config(text, "test").train, 1) if n] == expected


def test_synchronized_batchnorm_needs_an_image_on_each_rank():
    config = parse_config("train: {batch_size: 24, sync_bn: true}", "test")
    for images, ranks in ((48, 4), (28, 4), (3, 3)):
        check_last_batch(config, images, ranks)
    with pytest.raises(UserError, match=r"train\.sync_bn: the last batch of an epoch has 3 images.* 4 proc"):
        check_last_batch(config, 51, 4)
    check_last_batch(replace(config, train=replace(config.train, sync_bn=False)), 51, 4)


def test_the_message_lists_the_numbers_that_work():
    for train in valid_settings():
        micro_batch, works, messages = train.batch_size // train.accumulation_steps, set(), {}
        for ranks in range(1, micro_batch + 3):
            try:
                check_world_size(train, ranks)
                works.add(ranks)
            except UserError as error:
                messages[ranks] = str(error)
        assert 1 in works and messages
        if train.bn_group is None:
            assert works == set(range(1, micro_batch + 1))
            assert all(text.startswith("train.batch_size: ") for text in messages.values())
            continue
        for message in messages.values():
            assert message.startswith("train.bn_group: ")
            listed = re.search(r"; start ([0-9, ]+) processes \(--nproc-per-node\)", message)[1]
            assert {int(number) for number in listed.split(", ")} == works
