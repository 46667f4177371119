"""Training and evaluation by several processes: the same pictures, the same arithmetic, the same integers.

What a process has of a batch is tested by itself; the rest with real processes over gloo, some of them
started by torchrun. What happens when one dies or hangs is in another file.
"""

import contextlib
import csv
import hashlib
import json
import os
import re
import shutil
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from commands import ROOT, call, snapshot
from PIL import Image
from torch import nn
from torchrun import (
    Ended,
    Processes,
    Torchrun,
    assert_same_run,
    digest,
    error_lines,
    fingerprint,
    marked,
    read,
    rows,
    seen_pictures,
    tensors,
    wait_for,
)

import evaluate
import resnext.distributed
from data.image_folder import ImageFolderDataset, list_set
from data.in_memory import ArrayDataset
from data.loaders import FileEvalLoader, make_eval_loader, make_train_loader
from resnext.batch_plan import check_last_batch, check_world_size, local_indices, split_batch, split_evenly
from resnext.config import Config, TrainConfig, parse_config
from resnext.distributed import all_gather_objects, process_group, sum_over_ranks
from resnext.engine.resume import batchnorm_change_warning
from resnext.engine.train_state import build_train_state
from resnext.engine.trainer import train_step, warm_up_ddp
from resnext.errors import UserError
from resnext.models.resnext import build_model

CPU = torch.device("cpu")


def train_section(**changes: object) -> TrainConfig:
    return parse_config(f"train: {json.dumps(changes)}", "test").train


def settings(**more: object) -> list[str]:
    """Overrides of a small run: 9 steps an epoch, the last of 18 images."""
    values = {
        "model.cardinality": 4,
        "model.base_width": 4,
        "data.train_images": 210,
        "data.val_images": 101,
        "data.image_size": 16,
        "train.batch_size": 24,
        "train.epochs": 3,
        "train.precision": "fp32",
        "train.ema_decay": "null",
        "train.accumulation_steps": 1,
        "train.eval_batch_size": 4,
        "run.device": "cpu",
        "run.deterministic": "true",
        "run.log_interval": 2,
        "run.tensorboard": "false",
        "run.timeout": 60,
    } | {name.replace("__", "."): value for name, value in more.items()}
    return [f"{name}={value}" for name, value in values.items()]


STEPS = 9  # of an epoch


@pytest.fixture(scope="module")
def processes(tmp_path_factory) -> Iterator[Processes]:
    with Processes(tmp_path_factory.mktemp("processes")) as processes:
        yield processes


def start(output: Path, *more: object) -> list[object]:
    return ["--config", "demo.yaml", "--output", output, *more]


def finished(ended: Ended) -> Ended:
    """The same, having gone well."""
    assert set(ended.statuses) == {0}, ended
    assert ended.errors == [""] * len(ended.errors), ended
    return ended


def failed(ended: Ended) -> Ended:
    """The same, having ended with status 2; whom torchrun was quicker to end has been told to."""
    assert 2 in ended.statuses and set(ended.statuses) <= {2, -signal.SIGTERM}, ended
    return ended


class Runs:
    """Runs that were never stopped, made once; look, don't touch."""

    def __init__(self, processes: Processes, folder: Path):
        self.processes, self.folder = processes, folder
        self.ended: dict[Path, Ended] = {}

    def __call__(self, ranks: int, overrides: list[str]) -> Path:
        """The run directory of so many processes."""
        name = hashlib.sha256(repr((ranks, overrides)).encode()).hexdigest()[:16]
        output = self.folder / name
        if output not in self.ended:
            self.ended[output] = finished(self.processes.run(ranks, "train", *start(output, *overrides)))
        return output


@pytest.fixture(scope="module")
def whole(processes, tmp_path_factory) -> Runs:
    return Runs(processes, tmp_path_factory.mktemp("whole"))


# ---------------------------------------------------------------------------- shares

SHARED = [
    (batch_size, accumulation, bn_group, ranks)
    for batch_size in (4, 6, 24, 64, 100)
    for accumulation in (1, 2, 3, 4)
    for bn_group in (None, 1, 2, 4, 8, 25)
    for ranks in (1, 2, 3, 4, 5, 8)
]


def sharable() -> Iterator[tuple[TrainConfig, int]]:
    """Settings that are valid, and that so many processes can share."""
    for batch_size, accumulation, bn_group, ranks in SHARED:
        changes = {"batch_size": batch_size, "accumulation_steps": accumulation}
        try:
            config = train_section(**changes, bn_group=bn_group)
            check_world_size(config, ranks)
        except UserError:
            continue
        yield config, ranks


@contextlib.contextmanager
def as_rank(rank: int, ranks: int) -> Iterator[None]:
    """Inside, this process takes itself for one of several."""
    with (
        mock.patch.multiple("resnext.batch_plan", rank=lambda: rank, world_size=lambda: ranks),
        mock.patch("resnext.engine.resume.world_size", lambda: ranks),
    ):
        yield


def share_of(config: TrainConfig, rank: int, ranks: int) -> Callable[[int], np.ndarray]:
    def share(images: int) -> np.ndarray:
        with as_rank(rank, ranks):
            return local_indices(images, config)

    return share


def test_every_position_is_exactly_one_process_s():
    """And in each accumulation part the processes follow each other, so do the parts."""
    cases = 0
    for config, ranks in sharable():
        cases += 1
        for images in range(config.batch_size + 1):
            sizes = split_batch(images, config, ranks)
            assert [len(part) for part in sizes] == [ranks] * config.accumulation_steps
            positions = [share_of(config, rank, ranks)(images) for rank in range(ranks)]
            assert all(own.dtype == np.int64 for own in positions)
            assert [len(own) for own in positions] == np.sum(sizes, 0).tolist()
            iterators = [iter(own.tolist()) for own in positions]
            in_order = [
                next(iterators[rank]) for part in sizes for rank, size in enumerate(part) for _ in range(size)
            ]
            assert in_order == list(range(images))
    assert cases > 100


def test_processes_work_equally_and_the_first_is_never_idle():
    for config, ranks in sharable():
        for images in range(1, config.batch_size + 1):
            sizes = split_batch(images, config, ranks)
            assert sizes[0][0] > 0
            assert all(part[0] == max(part) for part in sizes)
            slices = config.bn_group and config.batch_size // config.accumulation_steps // config.bn_group
            groups = 1 if slices is None else slices // ranks  # each may have an image more
            assert np.ptp(sizes) <= groups
        full = split_batch(config.batch_size, config, ranks)
        if config.batch_size % (config.accumulation_steps * ranks) == 0:
            assert np.ptp(full) == 0


def test_groups_of_batchnorm_are_the_same_on_any_number_of_processes():
    """The slices that each process's BatchNorm makes are, one after another, those of one process."""
    cases = 0
    for config, ranks in sharable():
        if config.bn_group is None:
            continue
        cases += ranks > 1
        groups = config.batch_size // config.accumulation_steps // config.bn_group
        for images in range(1, config.batch_size + 1):
            by_one = [split_evenly(part, groups) for [part] in split_batch(images, config, 1)]
            by_all = [
                [size for own in part for size in split_evenly(own, groups // ranks)]
                for part in split_batch(images, config, ranks)
            ]
            assert by_all == by_one
            in_order = [size for part in by_all for size in part]
            assert in_order == split_evenly(images, groups * config.accumulation_steps)
    assert cases > 20


def test_synchronised_batchnorm_needs_an_image_in_each_process():
    config = parse_config("train: {batch_size: 24, sync_bn: true}", "test")
    for images, ranks in ((48, 4), (28, 4), (3, 3)):
        check_last_batch(config, images, ranks)
    with pytest.raises(UserError, match=r"train\.sync_bn: the last batch of an epoch has 3 images.* 4 proc"):
        check_last_batch(config, 51, 4)
    config = replace(config, train=replace(config.train, sync_bn=False))
    check_last_batch(config, 51, 4)


def test_the_message_lists_the_numbers_that_work():
    cases = 0
    for batch_size, accumulation, bn_group, _ in SHARED:
        try:
            config = train_section(batch_size=batch_size, accumulation_steps=accumulation, bn_group=bn_group)
        except UserError:
            continue
        part = batch_size // accumulation
        works = set()
        messages = {}
        for ranks in range(1, part + 3):
            try:
                check_world_size(config, ranks)
                works.add(ranks)
            except UserError as error:
                messages[ranks] = str(error)
        assert 1 in works and messages
        for ranks, message in messages.items():
            if bn_group is None:
                assert ranks > part
                assert message.startswith(
                    f"train.batch_size: {part} images at a time are too few for {ranks}"
                )
                continue
            cases += 1
            groups = part // bn_group
            listed = re.search(r"; start ([0-9, ]+) \(--nproc-per-node\)", message)[1]
            assert {int(number) for number in listed.split(", ")} == works
            assert message.startswith(f"train.bn_group: {bn_group} makes {groups} groups of {part} images")
    assert cases > 20


# ---------------------------------------------------------------------------- the pictures of a step

SIZE = 16


def draw_jpegs(root: Path, counts: dict[str, int]) -> Path:
    """JPEGs of 40x50 pixels below train/ and val/, no two alike."""
    generator = np.random.default_rng(0)
    for split in ("train", "val"):
        for name, count in counts.items():
            (root / split / name).mkdir(parents=True)
            for number in range(count):
                small = Image.fromarray(generator.integers(0, 256, (6, 5, 3), np.uint8))
                small.resize((40, 50)).save(root / split / name / f"{number}.jpg", quality=90)
    return root


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    """101 pictures in each of train/ and val/."""
    return draw_jpegs(tmp_path_factory.mktemp("pictures"), {"ant": 40, "bee": 33, "cow": 28})


@pytest.fixture(scope="module")
def in_memory() -> ArrayDataset:
    images = np.random.default_rng(0).integers(0, 256, (41, SIZE, SIZE, 3), np.uint8)
    return ArrayDataset(images, np.arange(41) % 7, tuple("abcdefg"))


@pytest.fixture(scope="module")
def in_files(tmp_path_factory) -> ImageFolderDataset:
    root = draw_jpegs(tmp_path_factory.mktemp("files"), {"ant": 17, "bee": 13, "cow": 11})
    return list_set(str(root), "train")


AUGMENTS = {
    "plain": {},
    "erasing": {"erasing": 0.5},
    "mixup": {"mixup": 0.2},
    "cutmix": {"cutmix": 1.0},
    "everything": {"mixup": 0.4, "cutmix": 1.0, "erasing": 0.5, "repeats": 3},
}


def batches_of(image_set, augment: dict, changes: dict, share=np.arange, workers: int = 0):
    """Training batches; with `changes` to the section train."""
    augment = dict(augment)
    if isinstance(image_set, ArrayDataset):
        augment.pop("repeats", None)
        augment["padding"] = 2
        memory = {"pipeline": "memory", "dataset": "glyphs"}
    else:
        memory = {"pipeline": "fast"}
        augment["policy"] = "trivialaugment"
    text = json.dumps(
        {
            "data": {"image_size": SIZE, "workers": workers, **memory},
            "augment": augment,
            "train": {"batch_size": 12, **changes},
            "run": {"seed": 5},
        }
    )
    return make_train_loader(image_set, parse_config(text, "test"), CPU, share=share)


def take(iterator) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [(images.clone(), labels.clone()) for images, labels in iterator]


@pytest.mark.parametrize("kind", ["memory", "files"])
@pytest.mark.parametrize("augment", AUGMENTS)
@pytest.mark.parametrize(
    ("changes", "numbers"),
    [
        ({}, (2, 3, 5, 12)),
        ({"accumulation_steps": 2}, (2, 3, 6)),
        ({"bn_group": 2}, (2, 3, 6)),
        ({"bn_group": 2, "accumulation_steps": 3}, (2,)),
    ],
    ids=str,
)
def test_processes_share_the_batches_of_one(kind, augment, changes, numbers, in_memory, in_files):
    """Bit for bit: pictures, their augmentation, mixed labels; the last batch is of 5 images."""
    image_set = in_memory if kind == "memory" else in_files
    config = train_section(batch_size=12, **changes)
    alone = take(batches_of(image_set, AUGMENTS[augment], changes).epoch(2))
    assert [len(labels) for _, labels in alone] == [12, 12, 12, 5]
    for ranks in numbers:
        check_world_size(config, ranks)
        parts = []
        for rank in range(ranks):
            share = share_of(config, rank, ranks)
            batches = batches_of(image_set, AUGMENTS[augment], changes, share)
            assert (batches.images, batches.steps) == (41, 4)
            parts.append(take(batches.epoch(2)))
        for step, (images, labels) in enumerate(alone):
            together = torch.full_like(images, torch.nan), torch.full_like(labels, -1)
            seen = np.zeros(len(labels), int)
            for rank in range(ranks):
                own = share_of(config, rank, ranks)(len(labels))
                seen[own] += 1
                for whole, part in zip(together, parts[rank][step], strict=True):
                    assert len(part) == len(own)
                    if len(own):
                        assert part.dtype == whole.dtype
                        whole[own] = part
            assert (seen == 1).all()
            assert torch.equal(together[0], images) and torch.equal(together[1], labels)


def test_pictures_are_mixed_across_processes(in_memory):
    """That the test above tells: the first picture of a share is mixed with one of another process."""
    # An epoch in which the two are of different classes, and neither is almost nothing.
    share = share_of(train_section(batch_size=12), 1, 2)
    for epoch in range(1, 20):
        plain = take(batches_of(in_memory, {}, {}).epoch(epoch))[0]
        images, labels = take(batches_of(in_memory, {"mixup": 1.0}, {}, share).epoch(epoch))[0]
        assert labels.shape == (6, 7) and torch.allclose(labels.sum(1), torch.ones(6))
        weight = labels[0, plain[1][6]]
        if plain[1][5] != plain[1][6] and 0.2 < weight < 0.8:
            break
    else:
        raise AssertionError("no such epoch")
    expected = weight * plain[0][6] + (1 - weight) * plain[0][5]
    torch.testing.assert_close(images[0], expected)


@pytest.mark.parametrize("kind", ["memory", "files"])
@pytest.mark.parametrize("augment", AUGMENTS)
def test_a_process_without_an_image_has_an_empty_batch(kind, augment, in_memory, in_files):
    image_set = in_memory if kind == "memory" else in_files
    share = share_of(train_section(batch_size=12), 8, 12)
    *full, (images, labels) = take(batches_of(image_set, AUGMENTS[augment], {}, share).epoch(1))
    assert images.shape == (0, 3, SIZE, SIZE) and images.dtype == torch.float32
    assert len(labels) == 0
    for others, other_labels in full:
        assert len(others) == len(other_labels) == 1


@pytest.mark.parametrize("augment", ["plain", "everything"])
def test_workers_of_a_process_change_nothing(augment, in_files):
    """Neither do they in mid-epoch, nor where some steps have no image."""
    share = share_of(train_section(batch_size=12), 7, 8)
    alone = take(batches_of(in_files, AUGMENTS[augment], {}, share).epoch(1))
    several = batches_of(in_files, AUGMENTS[augment], {}, share, workers=2)
    for first in (0, 2):
        found = take(several.epoch(1, first))
        assert len(found) == 4 - first
        for ours, theirs in zip(found, alone[first:], strict=True):
            assert all(map(torch.equal, ours, theirs))


# ---------------------------------------------------------------------------- evaluation, by itself


@pytest.mark.parametrize("ten_crop", [False, True])
@pytest.mark.parametrize("ranks", [1, 2, 3, 7, 50])
@pytest.mark.parametrize("batch_size", [1, 4, 41, 100])
def test_each_validation_image_is_one_process_s(batch_size, ranks, ten_crop, in_memory, in_files):
    """In turns, in batches of which all have as many; the pictures are those that one process sees."""
    data = parse_config(f"data: {{image_size: {SIZE}, workers: 0}}", "test").data
    for image_set in [in_files] if ten_crop else [in_memory, in_files]:
        crops = 10 if ten_crop else 1
        alone = take(make_eval_loader(image_set, data, 41, CPU, ten_crop))
        images, labels = alone[0][0].unflatten(0, (41, crops)), alone[0][1]
        numbered = replace(image_set, labels=np.arange(41))
        found, steps = [], set()
        for rank in range(ranks):
            batches = make_eval_loader(numbered, data, batch_size, CPU, ten_crop, rank, ranks)
            assert (batches.images, batches.crops) == (41, crops)
            own = take(batches)
            assert len(own) == batches.steps
            steps.add(len(own))
            numbers = torch.cat([labels for _, labels in own])
            assert numbers.tolist() == list(range(rank, 41, ranks))
            assert all(len(labels) <= batch_size for _, labels in own)
            pixels = torch.cat([part for part, _ in own]).unflatten(0, (-1, crops)) if len(numbers) else []
            assert len(pixels) == len(numbers)
            if len(numbers):
                assert torch.equal(pixels, images[numbers])
            found += numbers.tolist()
        assert sorted(found) == list(range(41))
        assert steps == {-(-41 // (ranks * batch_size))}
    assert labels.tolist() == in_files.labels.tolist()


def test_no_image_at_all_is_no_batch(in_files):
    data = parse_config(f"data: {{image_size: {SIZE}, workers: 0}}", "test").data
    few = replace(in_files, paths=in_files.paths[:2], labels=in_files.labels[:2])
    for rank, expected in enumerate([[1], [1], [0]]):
        batches = make_eval_loader(few, data, 4, CPU, True, rank, 3)
        assert isinstance(batches, FileEvalLoader)
        assert [(len(images), len(labels)) for images, labels in batches] == [
            (10 * count, count) for count in expected
        ]


# ---------------------------------------------------------------------------- the arithmetic, in float64

BATCHES = (64, 64, 37, 3)
CLIP, DECAY, MOMENTUM, WEIGHT_DECAY, SMOOTHING, RATES = 2.0, 0.7, 0.9, 1e-3, 0.1, (0.1, 0.05, 0.02, 0.01)


def float64_config(accumulation: int, bn_group: int) -> Config:
    return parse_config(
        f"""
        model: {{stem: cifar, depth: 11, cardinality: 2, base_width: 4}}
        data: {{dataset: glyphs, image_size: 8}}
        train: {{batch_size: 64, accumulation_steps: {accumulation}, bn_group: {bn_group},
                 clip_grad_norm: {CLIP}, ema_decay: {DECAY}, label_smoothing: {SMOOTHING}}}
        optimizer: {{momentum: {MOMENTUM}, weight_decay: {WEIGHT_DECAY}}}
        run: {{seed: 3}}
        """,
        "test",
    )


def float64_batches() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    for count in BATCHES:
        images = torch.randn(count, 3, 8, 8, dtype=torch.float64, generator=generator)
        yield images, torch.randint(10, (count,), generator=generator)


def train_in_float64(accumulation: int, bn_group: int, target: str) -> None:
    """In each of the processes of a job: the program's own steps; what came of them goes to `target`."""
    torch.set_default_dtype(torch.float64)
    config = float64_config(accumulation, bn_group)
    results = []
    with process_group(60):
        ours = build_train_state(config, tuple("0123456789"), CPU, {})
        warm_up_ddp(ours)
        ours.model.train()
        for (images, labels), rate in zip(float64_batches(), RATES, strict=True):
            own = torch.from_numpy(local_indices(len(images), config.train))
            result = train_step(ours, images[own], labels[own], rate, len(images))
            results.append(sum_over_ranks(result))
        content = {
            "model": ours.model.state_dict(),
            "ema": ours.ema.state_dict(),
            "optimizer": ours.optimizer.state_dict(),
        }
        weights = digest(
            tensor for name, tensor in tensors(content).items() if not re.search("running|num_batches", name)
        )
        assert len(set(all_gather_objects(weights))) == 1, (
            "the processes' weights, momentum and averages differ"
        )
        before = digest(ours.ema.module.buffers())
        ours.broadcast_buffers()
        settled = all_gather_objects(digest(ours.ema.module.buffers()))
        assert len(set(settled)) == 1
        if resnext.distributed.rank() == 0:
            assert settled[0] == before, "those of the first process"
            torch.save(tensors(content) | {"results": torch.stack(results)}, target)


class BatchNormByHand(nn.Module):
    """Over slices of the batch as numpy cuts them; running statistics from the first."""

    def __init__(self, norm: nn.BatchNorm2d, slices: int):
        super().__init__()
        self.weight, self.bias, self.slices, self.eps = norm.weight, norm.bias, slices, norm.eps
        self.mean, self.var = norm.running_mean.clone(), norm.running_var.clone()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = []
        for indices in np.array_split(np.arange(len(x)), self.slices):
            part = x[indices]
            if not len(part):
                continue
            mean = part.mean((0, 2, 3), keepdim=True)
            squares = ((part - mean) ** 2).mean((0, 2, 3), keepdim=True)
            out.append((part - mean) / (squares + self.eps).sqrt())
            if len(out) == 1:
                count = part.numel() / part.shape[1]
                unbiased = squares.detach().flatten() * count / (count - 1)
                self.mean = 0.9 * self.mean + 0.1 * mean.detach().flatten()
                self.var = 0.9 * self.var + 0.1 * unbiased
        return torch.cat(out) * self.weight[:, None, None] + self.bias[:, None, None]


def train_by_hand(accumulation: int, bn_group: int, target: str) -> None:
    """The same steps as a plain loop over whole batches: one mean loss, one backward pass."""
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(3)
    model = build_model(float64_config(accumulation, bn_group).model, 10)
    norms = {}
    for parent_name, parent in list(model.named_modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.BatchNorm2d):
                norm = norms[f"{parent_name}.{name}".lstrip(".")] = BatchNormByHand(child, 64 // bn_group)
                setattr(parent, name, norm)
    parameters = list(model.parameters())
    momenta = [torch.zeros_like(p) for p in parameters]
    averages = None
    results = []
    for (images, labels), rate in zip(float64_batches(), RATES, strict=True):
        output = model(images)
        log_softmax = output.log_softmax(1)
        smoothed = (1 - SMOOTHING) * F.one_hot(labels, 10) + SMOOTHING / 10
        loss = -(smoothed * log_softmax).sum(1).mean()
        gradients = torch.autograd.grad(loss, parameters)
        norm = torch.sqrt(sum((gradient**2).sum() for gradient in gradients))
        assert norm > CLIP, "the gradient is clipped, or this is no test of it"
        with torch.no_grad():
            for parameter, momentum, gradient in zip(parameters, momenta, gradients, strict=True):
                gradient = gradient * (CLIP / (norm + 1e-6)) + WEIGHT_DECAY * parameter
                momentum.mul_(MOMENTUM).add_(gradient)
                parameter -= rate * (gradient + MOMENTUM * momentum)  # Nesterov
        place = output.argsort(1, descending=True)
        right = place == labels[:, None]
        results.append(torch.stack([loss.detach(), right[:, 0].sum(), right[:, :5].sum()]))
        now = [p.detach().clone() for p in parameters]
        if averages is None:
            averages = now
        averages = [DECAY * a + (1 - DECAY) * p for a, p in zip(averages, now, strict=True)]
    names = [name for name, _ in model.named_parameters()]
    found = {f"model/{name}": p.detach() for name, p in zip(names, parameters, strict=True)}
    found |= {f"ema/module.{name}": a for name, a in zip(names, averages, strict=True)}
    found |= {f"momentum/{number}": momentum for number, momentum in enumerate(momenta)}
    found |= {f"model/{name}.running_mean": norm.mean for name, norm in norms.items()}
    found |= {f"model/{name}.running_var": norm.var for name, norm in norms.items()}
    torch.save(found | {"results": torch.stack(results)}, target)


@pytest.fixture(scope="module")
def arithmetic(processes, tmp_path_factory) -> Callable[..., dict[str, torch.Tensor]]:
    """What came of training in float64, made once."""
    folder = tmp_path_factory.mktemp("float64")
    made: dict[tuple, dict] = {}

    def results(function: str, ranks: int, accumulation: int, bn_group: int) -> dict[str, torch.Tensor]:
        key = (function, ranks, accumulation, bn_group)
        if key not in made:
            target = str(folder / "-".join(map(str, key)))
            what = f"test_distributed:{function}"
            finished(processes.run(ranks, what, accumulation, bn_group, target))
            made[key] = torch.load(target, weights_only=True)
        return made[key]

    return results


def assert_close(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    for name, tensor in theirs.items():
        scale = tensor.abs().max().clamp_min(1e-3)
        error = ((ours[name] - tensor).abs().max() / scale).item()
        assert error < 1e-10, f"{name}: {error}"


@pytest.mark.parametrize(("accumulation", "bn_group"), [(1, 16), (2, 8)])
def test_one_process_trains_as_a_plain_loop(accumulation, bn_group, arithmetic):
    ours = arithmetic("train_in_float64", 1, accumulation, bn_group)
    theirs = arithmetic("train_by_hand", 1, accumulation, bn_group)
    extra = {name for name in ours.keys() - theirs.keys() if not re.search("num_batches|n_averaged", name)}
    assert all(name.startswith("ema/") and "running" in name for name in extra)
    assert_close(ours, theirs)


@pytest.mark.parametrize(
    ("ranks", "accumulation", "bn_group"),
    [
        (4, 1, 16),
        (2, 1, 16),
        (4, 2, 8),
        pytest.param(2, 2, 8, marks=pytest.mark.slow),
        pytest.param(4, 1, 8, marks=pytest.mark.slow),
    ],
)
def test_processes_train_as_one(ranks, accumulation, bn_group, arithmetic):
    """Loss, hits, weights, momentum, averages and running statistics; of 3 images some have none."""
    config = float64_config(accumulation, bn_group).train
    last = np.sum(split_batch(BATCHES[-1], config, ranks), 0)
    assert (last.min() == 0) == (ranks == 4)
    ours = arithmetic("train_in_float64", ranks, accumulation, bn_group)
    alone = arithmetic("train_in_float64", 1, accumulation, bn_group)
    assert ours.keys() == alone.keys()
    assert_close(ours, alone)
    assert_close(ours, arithmetic("train_by_hand", 1, accumulation, bn_group))
    assert torch.equal(ours["results"][:, 1:], alone["results"][:, 1:])


# ---------------------------------------------------------------------------- a run of several processes


@pytest.mark.parametrize(
    ("ranks", "setting"),
    [(2, ()), pytest.param(3, ("fp32", "0.9"), marks=pytest.mark.slow)],
)
def test_the_same_configuration_gives_the_same_bits(ranks, setting, processes, whole, tmp_path):
    overrides = settings_of(*setting)
    finished(processes.run(ranks, "train", *start(tmp_path / "run", *overrides)))
    assert_same_run(tmp_path / "run", whole(ranks, overrides))
    assert fingerprint(tmp_path / "run") == fingerprint(whole(ranks, overrides))


def test_a_group_of_one_is_one_process(processes, tmp_path):
    """torchrun --nproc-per-node=1 gives the bits of python."""
    overrides = settings(train__epochs=1, schedule__warmup_epochs=0)
    finished(processes.run(1, "train", *start(tmp_path / "a", *overrides)))
    finished(processes.run(1, "train", *start(tmp_path / "b", *overrides), watch={"group": True}))
    assert_same_run(tmp_path / "b", tmp_path / "a")


def test_the_first_process_speaks_for_all(whole):
    """Nothing is said, logged or written twice; the run directory knows of the others."""
    output = whole(2, settings())
    ended = whole.ended[output]
    assert ended.outputs[1] == ""
    lines = ended.outputs[0].splitlines()
    steps = [line for line in lines if line.startswith("epoch ")]
    logged = [2, 4, 6, 8, 9]  # run.log_interval, and the last
    assert len(steps) == 3 * len(logged) and len(set(steps)) == len(steps)
    assert sum(line.startswith(" * epoch") for line in lines) == 3
    assert sum(line.startswith("finished: 3 epochs") for line in lines) == 1
    assert "global batch 24 of 2 processes" in ended.outputs[0]
    found = rows(output)
    assert [(row["kind"], row["epoch"], row.get("step")) for row in found] == [
        row
        for epoch in (1, 2, 3)
        for row in [*(("step", epoch, step) for step in logged), ("epoch", epoch, None)]
    ]
    assert [row["images"] for row in found if row["kind"] == "step"] == [48, 48, 48, 48, 18] * 3
    assert all(row["train"]["images"] == 210 for row in found if row["kind"] == "epoch")
    assert all(row["val"]["images"] == 101 for row in found if row["kind"] == "epoch")
    log = [line[20:] for line in (output / "log.txt").read_text().splitlines()]
    assert log.count("processes: 2") == 1
    assert [line for line in log if line in lines] == lines
    text = (output / "config.yaml").read_text()
    assert "# processes: 2\n" in text and yaml.safe_load(text)["train"]["batch_size"] == 24
    assert read(output)["versions"]["processes"] == "2"
    assert {path.name for path in (output / "checkpoints").iterdir()} == {"last.pt", "previous.pt", "best.pt"}


def test_a_batch_that_cannot_be_shared(processes, tmp_path):
    overrides = settings(train__bn_group=12)
    ended = failed(processes.run(3, "train", *start(tmp_path / "run", *overrides)))
    expected = "train.bn_group: 12 makes 2 groups of 24 images, which 3 processes cannot share; start 1, 2 "
    assert len(ended.messages) == 1 and ended.messages[0].startswith(expected), ended
    assert ended.outputs == [""] * 3 and sorted(len(text.splitlines()) for text in ended.errors) == [0, 0, 1]
    assert not (tmp_path / "run").exists()


def test_torchrun_shows_one_message(tmp_path):
    """torchrun adds its own, and ends with 1."""
    overrides = settings(train__bn_group=8)
    with Torchrun(tmp_path, 2, ROOT / "train.py", *start(tmp_path / "run", *overrides)) as job:
        assert job.wait() == 1
        assert set(job.statuses()) <= {2, 128 + signal.SIGTERM} and 2 in job.statuses()
        messages = error_lines(job.error)
        assert len(messages) == 1 and messages[0].startswith("train.bn_group: 8 makes 3 groups")
        assert f'File "{ROOT}' not in job.error.replace(f"{ROOT}/.venv", ""), "no traceback of ours"
    assert not (tmp_path / "run").exists()


def test_a_result_that_cannot_be_written(processes, whole):
    """The first process fails when the others have done their work; they say nothing."""
    ended = failed(processes.run(2, "evaluate", whole(3, settings()), "--csv", "/dev/full"))
    assert len(ended.messages) == 1 and "--csv /dev/full: cannot be written" in ended.messages[0]
    assert "Traceback" not in "".join(ended.errors)


def test_a_directory_in_use(processes, whole, tmp_path):
    shutil.copytree(whole(2, settings()), tmp_path / "run")
    before = snapshot(tmp_path)
    ended = failed(processes.run(2, "train", *start(tmp_path / "run", *settings())))
    assert len(ended.messages) == 1 and "is in use already" in ended.messages[0], ended
    assert snapshot(tmp_path) == before


def test_activation_checkpointing_changes_no_bit(processes, whole, tmp_path):
    overrides = settings(train__activation_checkpointing="true")
    finished(processes.run(2, "train", *start(tmp_path / "run", *overrides)))
    theirs = whole(2, settings())
    assert rows(tmp_path / "run") == rows(theirs)
    assert fingerprint(tmp_path / "run") == fingerprint(theirs)


def test_fine_tuning_on_two_processes_is_that_on_one(processes, whole, tmp_path):
    """From weights, a part of the network frozen, the last layer at a rate of its own."""
    more = {"model.pretrained": whole(2, settings()), "data.characters": "ABCD", "train.frozen_stages": 1}
    more |= {"optimizer.head_lr": 0.1, "train.bn_group": 6, "train.epochs": 2, "run.log_interval": 1}
    more |= {"optimizer.lr": 0.01}
    overrides = [*settings(), *(f"{key}={value}" for key, value in more.items())]
    for number in (1, 2):
        finished(processes.run(number, "train", *start(tmp_path / f"{number}", *overrides)))
    one, two = (rows(tmp_path / f"{number}") for number in (1, 2))
    assert [row["loss"] for row in one if row["kind"] == "step"] == pytest.approx(
        [row["loss"] for row in two if row["kind"] == "step"], rel=1e-4
    )


@pytest.mark.slow
@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("c++")), reason="no C++ compiler")
def test_compiled(processes, whole, tmp_path):
    """To rounding, at a rate at which that does not grow; and with the same bits after a stop."""
    more = {"train__epochs": 1, "schedule__warmup_epochs": 0, "optimizer__lr": 0.001}
    overrides = settings(train__compile="true", run__log_interval=1, **more)
    output, stopped = tmp_path / "run", tmp_path / "stopped"
    assert set(processes.run(2, "train", *start(output, *overrides), seconds=500).statuses) == {0}
    theirs = rows(whole(2, settings(run__log_interval=1, **more)))
    for ours, other in zip(rows(output)[:STEPS], theirs, strict=False):
        assert ours["loss"] == pytest.approx(other["loss"], rel=1e-3)
    stop = {"rank": 1, "signal": "SIGUSR1", "step": 4}
    for more in ({"watch": {"stop": stop}}, {}):
        command = start(stopped, *overrides, *(["--resume"] if not more else []))
        assert set(processes.run(2, "train", *command, seconds=500, **more).statuses) == {0}
    assert_same_run(stopped, output)


# ---------------------------------------------------------------------------- stopped and resumed


def assert_stopped(output: Path, name: str, epochs: int = 3) -> dict:
    """Stopped early by a signal, and saved exactly once by it; returns where it stands."""
    log = (output / "log.txt").read_text()
    assert log.count(f"stopped by {name} in epoch") == 1 and "finished:" not in log
    last = read(output)["progress"]
    assert last["global_step"] < epochs * STEPS or last["epoch"] <= epochs
    previous = output / "checkpoints" / "previous.pt"
    if last["epoch"] == 1:
        assert not previous.exists()
    else:  # which the end of the epoch before has written
        before = read(output, "previous.pt")["progress"]
        assert (before["epoch"], before["step"]) == (last["epoch"], 0)
    assert len(rows(output)) == last["rows"]
    return last


def settings_of(precision="fp32", ema="null", accumulation=1, **more: object) -> list[str]:
    return settings(
        train__precision=precision, train__ema_decay=ema, train__accumulation_steps=accumulation, **more
    )


def test_torchrun_that_gets_sigterm(processes, whole, tmp_path):
    check_stop_by_torchrun(processes, whole, tmp_path, "torchrun", 2, settings_of(ema="0.9"))


def test_torchrun_that_passes_sigusr1_on(processes, whole, tmp_path):
    check_stop_by_torchrun(processes, whole, tmp_path, "SIGUSR1", 3, settings_of(ema="0.9"))


STOPS = ["torchrun", "SIGUSR1", "one rank", "one rank SIGUSR1", "everything"]


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("stop", STOPS)
@pytest.mark.parametrize(
    "setting", [("fp32", "null", 2), ("bf16", "0.9", 1), ("fp32", "0.9", 1), ("bf16", "null", 2)], ids=str
)
def test_every_stop_under_torchrun(setting, stop, ranks, processes, whole, tmp_path):
    check_stop_by_torchrun(processes, whole, tmp_path, stop, ranks, settings_of(*setting), again=True)


def check_stop_by_torchrun(processes, whole, tmp_path, stop, ranks, overrides, again=False) -> None:
    """Started by torchrun and stopped from outside in mid-epoch; resumed as if never stopped.

    `again`: resumed by torchrun too.
    """
    output = tmp_path / "run"
    options = ["--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"] if stop == "SIGUSR1" else []
    number = signal.SIGUSR1 if "SIGUSR1" in stop else signal.SIGTERM
    metrics = output / "metrics.jsonl"
    with Torchrun(tmp_path, ranks, ROOT / "train.py", *start(output, *overrides), options=options) as job:
        pids = [job.pid(rank) for rank in range(ranks)]
        assert wait_for(lambda: metrics.exists() and metrics.read_bytes().count(b"\n") >= 7), job.error
        if stop == "everything":
            for pid in marked(job.mark):
                os.kill(pid, number)
        else:
            os.kill(pids[-1] if "rank" in stop else job.process.pid, number)
        status = job.wait()
        # After a signal of its own torchrun ends with 1, however its processes did.
        assert status == (0 if "rank" in stop else 1), job.error
        assert job.statuses() == [0] * ranks, job.error
        assert error_lines(job.error) == [] and "forcefully" not in job.error
    progress = assert_stopped(output, number.name)
    assert (progress["epoch"], progress["step"]) >= (2, 2)
    if again:
        command = start(output, *overrides, "--resume")
        with Torchrun(tmp_path, ranks, ROOT / "train.py", *command) as job:
            assert job.wait() == 0 and job.statuses() == [0] * ranks, job.error
    else:
        finished(processes.run(ranks, "train", *start(output, *overrides, "--resume")))
    assert_same_run(output, whole(ranks, overrides))


WHERE = {
    "in mid-epoch": ({"step": STEPS + 4}, (2, range(4, 7))),
    "at the first step": ({"step": 1}, (1, range(1, 4))),
    "at the end of an epoch": ({"step": 2 * STEPS}, (2, [STEPS])),
    "in a validation": ({"batch": 3}, (2, [STEPS])),
    "in the last validation": ({"batch": 5}, (3, [STEPS])),
}


@pytest.mark.parametrize(
    ("where", "ranks", "name", "setting"),
    [
        ("in mid-epoch", 3, "SIGTERM", ("fp32", "null", 2)),
        ("at the end of an epoch", 2, "SIGUSR1", ("fp32", "null", 1)),
        ("in a validation", 2, "SIGHUP", ("fp32", "0.9", 1)),
        pytest.param("in the last validation", 3, "SIGINT", ("fp32", "0.9", 1), marks=pytest.mark.slow),
    ],
)
def test_a_signal_to_one_process_stops_all(where, ranks, name, setting, processes, whole, tmp_path):
    check_stop(processes, whole, tmp_path, where, ranks, name, setting)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("ema", ["null", "0.9"])
@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("ranks", [2, 3, 4])
@pytest.mark.parametrize("where", WHERE)
def test_a_signal_to_one_process_stops_all_in_every_setting(
    where, ranks, precision, ema, accumulation, processes, whole, tmp_path
):
    setting = (precision, ema, accumulation)
    check_stop(processes, whole, tmp_path, where, ranks, "SIGTERM", setting)


def check_stop(processes, whole, tmp_path, where, ranks, name, setting) -> None:
    """The last process sends itself a signal at a certain place; all stop there, and go on."""
    output = tmp_path / "run"
    overrides = settings_of(*setting)
    place, (epoch, steps) = WHERE[where]
    if where == "in a validation":
        place = {"batch": batches_of_validation(ranks) + 3}
    elif where == "in the last validation":
        place = {"batch": 2 * batches_of_validation(ranks) + 2}
    stop = {"rank": ranks - 1, "signal": name, **place}
    ended = finished(processes.run(ranks, "train", *start(output, *overrides), watch={"stop": stop}))
    assert f"stopped by {name} in epoch {epoch}" in ended.outputs[0] and not any(ended.outputs[1:])
    progress = assert_stopped(output, name)
    assert progress["epoch"] == epoch and progress["step"] in steps
    finished(processes.run(ranks, "train", *start(output, *overrides, "--resume")))
    assert_same_run(output, whole(ranks, overrides))


def batches_of_validation(ranks: int) -> int:
    """How many the last process has that are not empty."""
    return -(-len(range(ranks - 1, 101, ranks)) // 4)


def test_a_stop_of_processes_with_workers(processes, whole, pictures, tmp_path):
    """A whole group gets SIGTERM, as of torchrun: the process and its workers; pictures are mixed."""
    overrides = on_files(pictures)
    output = tmp_path / "run"
    metrics = output / "metrics.jsonl"
    job = processes.start(2, "train", *start(output, *overrides))
    wait_for(lambda: metrics.exists() and metrics.read_bytes().count(b"\n") >= 7)
    for pid in job.pids:
        os.killpg(pid, signal.SIGTERM)
    ended = finished(job.wait())
    assert "stopped by SIGTERM" in ended.outputs[0]
    last = read(output)["progress"]
    assert (2, 1) <= (last["epoch"], last["step"]) < (3, 5)
    finished(processes.run(2, "train", *start(output, *overrides, "--resume", "data.workers=0")))
    assert_same_run(output, whole(2, overrides))


def on_files(pictures: Path) -> list[str]:
    """A run on 101 JPEG files, read by workers: 5 steps an epoch."""
    return settings(
        data__dataset="folder",
        data__dir=pictures,
        data__pipeline="fast",
        data__workers=1,
        data__train_images="null",
        data__val_images="null",
        augment__mirror=0.5,
        augment__padding=0,
        augment__mixup=0.2,
        augment__cutmix=1.0,
        augment__erasing=0.3,
        augment__repeats=2,
        run__log_interval=1,
    )


# ---------------------------------------------------------------------------- on another number of processes


def test_going_on_with_another_number_of_processes(processes, tmp_path):
    """Begun by three, continued by two, ended by one: the steps, their rates and their pictures stay."""
    overrides = settings(augment__mirror=0.5, augment__erasing=0.5, augment__mixup=0.2, augment__cutmix=1.0)

    def run(output: Path, part: str, ranks: int, *more: object, step: int | None = None) -> Ended:
        stop = step and {"rank": 0, "signal": "SIGTERM", "step": step}
        watch = {"pictures": str(tmp_path / f"{output.name} {part}"), "stop": stop}
        return finished(processes.run(ranks, "train", *start(output, *overrides, *more), watch=watch))

    run(tmp_path / "alone", "", 1)
    alone = seen_pictures(tmp_path / "alone ")
    output = tmp_path / "run"
    run(output, "1", 3, step=STEPS + 2)
    ended = run(output, "2", 2, "--resume", step=STEPS + 1)
    warning = (
        "warning: BatchNorm's statistics were over 8 images and are over 12 now; train.bn_group keeps them "
        "the same on any number of processes"
    )
    assert ended.outputs[0].count(warning) == 1
    assert (output / "log.txt").read_text().count(warning) == 1
    assert "warning: processes was 3 and is 2; the bits may differ from here on" in ended.outputs[0]
    ended = run(output, "3", 1, "--resume")
    assert "BatchNorm's statistics were over 12 images and are over 24 now" in ended.outputs[0]
    parts = [seen_pictures(tmp_path / f"run {part}") for part in "123"]
    assert all(len(part) > 3 for part in parts)
    seen = [step for part in parts for step in part]
    assert [step["step"] for step in seen] == list(range(3 * STEPS))
    assert seen == alone
    assert Counter(len(step["pictures"]) for step in seen) == {24: 24, 18: 3}
    ours, theirs = rows(output), rows(tmp_path / "alone")
    names = ("kind", "epoch", "step", "global_step", "lr", "images")
    assert [[row.get(name) for name in names] for row in ours] == [
        [row.get(name) for name in names] for row in theirs
    ]


def test_the_warning_of_batchnorm():
    """Where the statistics are over other images than before, and only there."""

    def warnings(ranks: int, before: str, **changes: object) -> list[str]:
        config = parse_config(f"train: {json.dumps({'batch_size': 24, **changes})}", "test")
        with as_rank(0, ranks):
            return batchnorm_change_warning(config, before)

    assert len(warnings(2, "3")) == len(warnings(1, "2")) == 1
    assert warnings(3, "3") == warnings(1, "1") == warnings(2, "unknown") == []
    assert warnings(2, "4", bn_group=6) == warnings(2, "4", sync_bn=True) == []
    assert "over 3 images and are over 6 now" in warnings(2, "4", accumulation_steps=2)[0]


@pytest.mark.slow
def test_going_on_with_the_same_groups_of_batchnorm(processes, tmp_path):
    """Then nothing changes but rounding, and there is nothing to warn of."""
    overrides = settings(train__bn_group=6, run__log_interval=1, optimizer__lr=0.01)
    finished(processes.run(1, "train", *start(tmp_path / "alone", *overrides)))
    output = tmp_path / "run"
    stop = {"rank": 1, "signal": "SIGTERM", "step": 4}
    finished(processes.run(4, "train", *start(output, *overrides), watch={"stop": stop}))
    ended = finished(processes.run(2, "train", *start(output, *overrides, "--resume")))
    assert "BatchNorm" not in ended.outputs[0]
    ours, theirs = rows(output), rows(tmp_path / "alone")
    losses = [[row["loss"] for row in part if row["kind"] == "step"] for part in (ours, theirs)]
    assert losses[0][:STEPS] == pytest.approx(losses[1][:STEPS], rel=1e-2)


def test_groups_that_cannot_be_shared_on_resuming(processes, whole, tmp_path):
    """One message, the run as it was."""
    output = shutil.copytree(whole(2, settings()), tmp_path / "run")
    before = {name: text for name, text in snapshot(tmp_path).items() if "log.txt" not in name}
    command = start(output, *settings(train__bn_group=6), "--resume")
    ended = failed(processes.run(3, "train", *command))
    assert len(ended.messages) == 1 and ended.messages[0].startswith("train.bn_group: "), ended
    after = {name: text for name, text in snapshot(tmp_path).items() if "log.txt" not in name}
    assert after == before


# ---------------------------------------------------------------------------- evaluation


@pytest.fixture(scope="module")
def files_run(whole, pictures) -> Path:
    """A run on JPEG files in class folders."""
    return whole(2, on_files(pictures))


@pytest.fixture(scope="module")
def parts(pictures, tmp_path_factory) -> dict[str, list[object]]:
    """Options of evaluate.py that choose pictures and classes."""
    folder = tmp_path_factory.mktemp("parts")
    (folder / "classes.txt").write_text("cow\nant\n")
    names = sorted(str(path.relative_to(pictures / "val")) for path in (pictures / "val").rglob("*.jpg"))
    lines = [f"{name},{'odd' if number % 3 else 'even'}\n" for number, name in enumerate(names[:-5])]
    (folder / "splits.csv").write_text("path,split\n" + "".join(lines) + f"{names[0]},first\n")
    return {"classes": ["--classes", folder / "classes.txt"], "splits": ["--splits", folder / "splits.csv"]}


class Evaluations:
    """Evaluations with the same options by other processes: everything is the same, but for rounding."""

    def __init__(self, processes: Processes, folder: Path, *arguments: object):
        self.processes, self.folder = processes, folder
        files = ("--json", folder / "all.json", "--csv", folder / "rows.csv")
        self.arguments = [*arguments, "--device", "cpu", *files]
        result = call(evaluate.main, *self.arguments)
        assert result.status == 0, result.error
        self.console = result.output
        self.json, self.csv = self.read()

    def read(self) -> tuple[dict, list[dict]]:
        """What was written, which is then removed."""
        with open(self.folder / "rows.csv", newline="") as file:
            table = list(csv.DictReader(file))
        result = json.loads((self.folder / "all.json").read_text())
        for name in ("all.json", "rows.csv"):
            (self.folder / name).unlink()
        return result, table

    def check(self, ranks: int, *more: object) -> None:
        """The same of so many processes; only the first says something."""
        ended = finished(self.processes.run(ranks, "evaluate", *self.arguments, *more))
        self.check_results(ended.outputs[0])
        assert not any(ended.outputs[1:])

    def check_results(self, console: str) -> None:
        result, table = self.read()
        assert_same_results(result, self.json)
        assert_same_results(table, self.csv)
        # Losses are rounded to be shown; one may be on the other side.
        assert re.sub(r"loss [0-9.]+", "loss", console) == re.sub(r"loss [0-9.]+", "loss", self.console)


def assert_same_results(ours: object, theirs: object, where: str = "") -> None:
    if isinstance(theirs, dict):
        assert list(ours) == list(theirs), where
        for key in theirs:
            assert_same_results(ours[key], theirs[key], f"{where}/{key}")
    elif isinstance(theirs, list):
        assert len(ours) == len(theirs), where
        for number, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            assert_same_results(a, b, f"{where}/{number}")
    elif where.rsplit("/", 1)[-1] in ("loss", "confidence"):
        assert float(ours) == pytest.approx(float(theirs), rel=0, abs=1e-5), where
    else:
        assert ours == theirs and type(ours) is type(theirs), where


def test_evaluation_of_a_set_in_memory(processes, whole, tmp_path):
    run = whole(2, settings())
    ours = Evaluations(processes, tmp_path, run, "--per-class")
    assert ours.json["images"] == len(ours.csv) == 101
    assert [row["index"] for row in ours.csv] == [str(number) for number in range(101)]
    assert ours.json["top1_error"] == rows(run)[-1]["best_top1_error"]
    ours.check(2, "--batch-size", 1)
    ours.check(3, "--batch-size", 34)


def test_evaluation_of_files(processes, files_run, parts, tmp_path):
    """In one process without workers, in several with some."""
    ours = Evaluations(processes, tmp_path, files_run, *parts["splits"], "--per-class", "--workers", 0)
    assert ours.json["images"] == len(ours.csv) == 101
    assert {name: split["images"] for name, split in ours.json["splits"].items()} == {
        "even": 32,
        "odd": 64,
        "first": 1,
    }
    names = [row["path"] for row in ours.csv]
    assert names == sorted(names) and len(set(names)) == 101
    ours.check(2, "--batch-size", 7, "--workers", 2)
    ours.check(3, "--batch-size", 50, "--workers", 1)


def test_evaluation_of_ten_crops_among_some_classes_under_torchrun(processes, files_run, parts, tmp_path):
    options = [files_run, *parts["splits"], *parts["classes"], "--ten-crop", "--per-class", "--workers", 0]
    ours = Evaluations(processes, tmp_path, *options)
    assert ours.json["images"] == len(ours.csv) == 68 and ours.json["crops"] == 10
    ours.check(3, "--batch-size", 9)
    with Torchrun(tmp_path, 2, ROOT / "evaluate.py", *ours.arguments, keep_status=False) as job:
        assert job.wait() == 0, job.error
        ours.check_results(job.output)


def test_more_processes_than_images(processes, files_run, pictures, tmp_path):
    """Then some have no image at all."""
    for name in ("ant", "cow"):
        (tmp_path / "few" / "val" / name).mkdir(parents=True)
        shutil.copy(pictures / "val" / name / "3.jpg", tmp_path / "few" / "val" / name)
    (tmp_path / "classes.txt").write_text("cow\nant\n")
    options = ["--data", tmp_path / "few", "--classes", tmp_path / "classes.txt", "--ten-crop"]
    ours = Evaluations(processes, tmp_path, files_run, *options, "--workers", 0)
    assert ours.json["images"] == 2
    ours.check(3)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("crops", [1, 10])
@pytest.mark.parametrize("part", ["all", "classes", "splits"])
def test_every_evaluation_of_files(part, crops, ranks, processes, files_run, parts, tmp_path):
    options = [*parts.get(part, []), "--per-class", *(["--ten-crop"] if crops == 10 else [])]
    ours = Evaluations(processes, tmp_path, files_run, *options)
    for batch_size in (1, 10, 34, 300):
        for workers in (0, 1, 2):
            ours.check(ranks, "--batch-size", batch_size, "--workers", workers)


@pytest.mark.parametrize("setting", [("fp32", "null", 2), ("fp32", "0.9", 1)], ids=["model", "ema"])
def test_validation_in_training_is_evaluate_py(setting, whole, tmp_path):
    """Of three processes, whose running statistics differ, those saved are those that were validated."""
    run = whole(3, settings_of(*setting))
    last = rows(run)[-1]
    assert last["weights"] == ("model" if setting[1] == "null" else "ema")
    source = run / "checkpoints" / "last.pt"
    result = call(evaluate.main, source, "--json", tmp_path / "all.json", "--device", "cpu")
    assert result.status == 0, result.error
    found = json.loads((tmp_path / "all.json").read_text())
    for name in ("images", "top1_errors", "top5_errors", "top1_error", "top5_error"):
        assert found[name] == last["val"][name]
    assert found["loss"] == pytest.approx(last["val"]["loss"], rel=1e-5)
