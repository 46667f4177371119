"""The images that each rank gets of a training step and of a validation."""

import json
from collections.abc import Callable, Iterable
from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from batches import draw_jpegs
from ranks import share_of
from torch import Tensor

from data.file_loaders import FileEvalLoader
from data.image_folder import ImageFolderDataset, list_set
from data.in_memory import ArrayDataset
from data.loaders import make_eval_loader, make_train_loader
from resnext.batch_plan import check_world_size
from resnext.config import TrainConfig, parse_config

CPU, SIZE = torch.device("cpu"), 16
EVALUATION = parse_config(f"data: {{image_size: {SIZE}, workers: 0}}", "test").data
Dataset = ArrayDataset | ImageFolderDataset


@pytest.fixture(scope="module")
def datasets(tmp_path_factory) -> dict[str, Dataset]:
    """41 images in memory, and 41 in files."""
    root = draw_jpegs(tmp_path_factory.mktemp("files"), {"ant": 17, "bee": 13, "cow": 11})
    images = np.random.default_rng(0).integers(0, 256, (41, SIZE, SIZE, 3), np.uint8)
    memory = ArrayDataset(images, np.arange(41) % 7, tuple("abcdefg"))
    return {"memory": memory, "files": list_set(str(root), "train")}


AUGMENTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "erasing": {"erasing": 0.5},
    "mixup": {"mixup": 0.2},
    "cutmix": {"cutmix": 1.0},
    "everything": {"mixup": 0.4, "cutmix": 1.0, "erasing": 0.5, "repeats": 3},
}


def section(**changes: object) -> TrainConfig:
    return parse_config(f"train: {json.dumps({'batch_size': 12, **changes})}", "test").train


def train_batches(
    dataset: Dataset,
    augment: dict[str, Any],
    train: TrainConfig | None = None,
    share: Callable[[int], np.ndarray] = np.arange,
    workers: int = 0,
) -> Any:
    """Return the loader of a rank with this share of each batch."""
    if isinstance(dataset, ArrayDataset):
        augment = {key: value for key, value in augment.items() if key != "repeats"} | {"padding": 2}
        data = {"pipeline": "memory", "dataset": "glyphs"}
    else:
        augment = augment | {"policy": "trivialaugment"}
        data = {"pipeline": "fast"}
    data |= {"image_size": SIZE, "workers": workers}
    config = parse_config(json.dumps({"data": data, "augment": augment, "run": {"seed": 5}}), "test")
    return make_train_loader(dataset, replace(config, train=train or section()), CPU, share=share)


def take(batches: Iterable[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
    return [(images.clone(), labels.clone()) for images, labels in batches]


SHARES = [
    ({}, (2, 3, 5, 12)),
    ({"accumulation_steps": 2}, (2, 3, 6)),
    ({"bn_group": 2}, (2, 3, 6)),
    ({"bn_group": 2, "accumulation_steps": 3}, (2,)),
]


def shared_cases() -> list[Any]:
    """Every augmentation by ranks alone, every other sharing with all augmentations; all others are slow."""
    cases = []
    for kind, augment, (number, (changes, ranks)) in product(
        ("memory", "files"), AUGMENTS, enumerate(SHARES)
    ):
        quick = number == 0 or augment == "everything"
        marks = () if quick else pytest.mark.slow
        cases.append(
            pytest.param(kind, augment, changes, ranks, marks=marks, id=f"{kind}-{augment}-{number}")
        )
    return cases


@pytest.mark.parametrize(("kind", "augment", "changes", "numbers"), shared_cases())
def test_ranks_share_the_batches_of_one_process(kind, augment, changes, numbers, datasets):
    """Bit for bit: images, their augmentation, mixed labels; the last batch has 5 images."""
    train = section(**changes)
    alone = take(train_batches(datasets[kind], AUGMENTS[augment], train).epoch(2))
    assert [len(labels) for _, labels in alone] == [12, 12, 12, 5]
    for ranks in numbers:
        check_world_size(train, ranks)
        shares = [share_of(train, rank, ranks) for rank in range(ranks)]
        loaders = [train_batches(datasets[kind], AUGMENTS[augment], train, share) for share in shares]
        assert all((loader.images, loader.steps) == (41, 4) for loader in loaders)
        parts = [take(loader.epoch(2)) for loader in loaders]
        for step, (images, labels) in enumerate(alone):
            together = torch.full_like(images, torch.nan), torch.full_like(labels, -1)
            positions = [share(len(labels)) for share in shares]
            assert sorted(np.concatenate(positions)) == list(range(len(labels)))
            for own, part in zip(positions, parts, strict=True):
                for whole, values in zip(together, part[step], strict=True):
                    assert len(values) == len(own)
                    if len(own):
                        assert values.dtype == whole.dtype
                        whole[own] = values
            assert torch.equal(together[0], images) and torch.equal(together[1], labels)


def test_images_are_mixed_across_ranks(datasets):
    """The test above can tell: the first image of a share is mixed with one of another rank."""
    share = share_of(section(), 1, 2)
    for epoch in range(1, 20):  # to one in which the two have different classes, and neither is almost 0
        plain = take(train_batches(datasets["memory"], {}).epoch(epoch))[0]
        mixed = train_batches(datasets["memory"], {"mixup": 1.0}, share=share)
        images, labels = take(mixed.epoch(epoch))[0]
        assert labels.shape == (6, 7) and torch.allclose(labels.sum(1), torch.ones(6))
        weight = labels[0, plain[1][6]]
        if plain[1][5] != plain[1][6] and 0.2 < weight < 0.8:
            break
    else:
        raise AssertionError("no such epoch")
    torch.testing.assert_close(images[0], weight * plain[0][6] + (1 - weight) * plain[0][5])


@pytest.mark.parametrize("kind", ["memory", "files"])
@pytest.mark.parametrize("augment", AUGMENTS)
def test_a_rank_without_an_image_has_an_empty_batch(kind, augment, datasets):
    share = share_of(section(), 8, 12)
    loader = train_batches(datasets[kind], AUGMENTS[augment], share=share)
    *full, (images, labels) = take(loader.epoch(1))
    assert images.shape == (0, 3, SIZE, SIZE) and images.dtype == torch.float32
    assert len(labels) == 0
    assert all(len(others) == len(other_labels) == 1 for others, other_labels in full)


@pytest.mark.parametrize("augment", ["plain", "everything"])
def test_loader_workers_of_a_rank_change_nothing(augment, datasets):
    """Nor do they in mid-epoch, or if some steps have no image."""
    share = share_of(section(), 7, 8)
    alone = take(train_batches(datasets["files"], AUGMENTS[augment], share=share).epoch(1))
    several = train_batches(datasets["files"], AUGMENTS[augment], share=share, workers=2)
    for first in (0, 2):
        found = take(several.epoch(1, first))
        assert len(found) == 4 - first
        assert all(
            all(map(torch.equal, ours, theirs)) for ours, theirs in zip(found, alone[first:], strict=True)
        )


@pytest.mark.parametrize(("kind", "crops"), [("memory", 1), ("files", 1), ("files", 10)])
@pytest.mark.parametrize("ranks", [1, 2, 3, 7, 50])
@pytest.mark.parametrize("batch_size", [1, 4, 41, 100])
def test_each_validation_image_belongs_to_one_rank(batch_size, ranks, kind, crops, datasets):
    """Ranks take turns and have equally many batches; the images are those that one process sees."""
    dataset, ten_crop = datasets[kind], crops == 10
    [(images, labels)] = take(make_eval_loader(dataset, EVALUATION, 41, CPU, ten_crop))
    assert labels.tolist() == dataset.labels.tolist()
    images = images.unflatten(0, (41, crops))
    numbered = replace(dataset, labels=np.arange(41))
    found = []
    for rank in range(ranks):
        loader = make_eval_loader(numbered, EVALUATION, batch_size, CPU, ten_crop, rank, ranks)
        own = take(loader)
        assert (loader.images, loader.crops) == (41, crops)
        assert len(own) == loader.steps == -(-41 // (ranks * batch_size))
        assert all(len(part) == crops * len(numbers) <= crops * batch_size for part, numbers in own)
        for part, numbers in own:
            assert not len(part) or torch.equal(part.unflatten(0, (-1, crops)), images[numbers])
        numbers = torch.cat([numbers for _, numbers in own]).tolist()
        assert numbers == list(range(rank, 41, ranks))
        found += numbers
    assert sorted(found) == list(range(41))


def test_a_rank_without_validation_images_has_an_empty_batch(datasets):
    files = datasets["files"]
    few = replace(files, paths=files.paths[:2], labels=files.labels[:2])
    for rank, count in enumerate([1, 1, 0]):
        loader = make_eval_loader(few, EVALUATION, 4, CPU, True, rank, 3)
        assert isinstance(loader, FileEvalLoader)
        assert [(len(images), len(labels)) for images, labels in loader] == [(10 * count, count)]
