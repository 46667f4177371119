"""Batches of class folders and of datasets in memory: what they hold, whatever the workers."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from batches import COUNTS as CLASSES
from batches import CPU, EVERYTHING, IMAGES, assert_same, configure, joined, spoil, take, train_loader

import data.file_loaders
from data.augment import (
    erase,
    jitter,
    mirror,
    mix,
    normalize,
    sample_cifar_crops,
    sample_color_params,
    sample_flips,
)
from data.file_loaders import FileEvalLoader
from data.image_folder import ImageFolderDataset, list_set
from data.in_memory import ArrayDataset
from data.loaders import InMemoryTrainLoader, make_eval_loader, make_train_loader
from data.rng import RngStream, random_uint64, random_uniform
from data.sampler import epoch_order
from data.transforms import CROP_DRAWS, apply_policy, eval_images, train_image
from resnext.config import AugmentConfig, Config, DataConfig, RunConfig, TrainConfig
from resnext.errors import UserError

# ---------------------------------------------------------------------------- class folders, training


@pytest.mark.parametrize("more, workers", [("", 1), ("", 2), (EVERYTHING, 1), (EVERYTHING, 3)])
def test_workers_change_nothing(more, workers, shared_root):
    """Neither from the middle of an epoch, nor in a second epoch of the same workers."""
    alone = train_loader(configure(shared_root, more))
    several = train_loader(configure(shared_root, more, workers))
    assert_same(several.epoch(1), alone.epoch(1))
    assert_same(several.epoch(2, 3), take(alone.epoch(2))[3:])


@pytest.mark.parametrize("pipeline", ["fast", "torch7"])
@pytest.mark.parametrize("decoder", ["simplejpeg", "pillow"])
def test_decoders_change_nothing(pipeline, decoder, shared_root):
    expected = train_loader(configure(shared_root, pipeline=pipeline))
    ours = train_loader(configure(shared_root, pipeline=pipeline, decoder=decoder, workers=2))
    assert_same(ours.epoch(1), expected.epoch(1))


def by_definition(files: ImageFolderDataset, config: Config, epoch: int, step: int):
    """Assemble a batch from its parts, one image after another."""
    augment, seed, size = config.augment, config.run.seed, config.train.batch_size
    ids = epoch_order(seed, epoch, len(files), augment.repeats)[step * size : (step + 1) * size]
    draws = random_uniform(seed, epoch, ids, CROP_DRAWS, RngStream.CROP)
    seeds = random_uint64(seed, epoch, ids, 1, RngStream.POLICY)[:, 0]
    crops = []
    for id, row, policy_seed in zip(ids, draws, seeds, strict=True):
        content = Path(files.path(id % len(files))).read_bytes()
        crop = train_image(content, "x", row, config.data, augment.min_area)
        if augment.policy:
            crop = apply_policy(crop, augment.policy, int(policy_seed))
        crops.append(torch.from_numpy(crop.copy()))
    images = torch.stack(crops)
    mirror(images, torch.from_numpy(sample_flips(seed, epoch, ids, augment)))
    mean, std = torch.tensor(config.data.mean), torch.tensor(config.data.std)
    images = jitter(images, torch.from_numpy(sample_color_params(seed, epoch, ids, augment)), mean, std)
    labels = torch.from_numpy(files.labels[ids % len(files)])
    if augment.erasing:
        erase(images, seed, epoch, ids, augment.erasing)
    if augment.mixup:
        return mix(images, labels, augment, len(files.classes), seed, epoch, step)
    return images, labels


@pytest.mark.parametrize("more", ["", EVERYTHING], ids=["plain", "everything"])
def test_a_batch_is_what_its_draws_say(more, shared_root):
    config = configure(shared_root, more)
    files = list_set(str(shared_root), "train")
    assert_same(train_loader(config).epoch(4), [by_definition(files, config, 4, step) for step in range(5)])


def test_repeats(shared_root):
    """A third of the images, three different versions of each in a row; as many steps."""
    config = configure(shared_root, "augment: {repeats: 3}", batch_size=6)
    files = replace(list_set(str(shared_root), "train"), labels=np.arange(IMAGES))
    loader = make_train_loader(files, config, CPU)
    assert loader.steps == 4
    chosen = []
    for epoch in (1, 2):
        images, labels = joined(loader.epoch(epoch))
        counts = Counter(labels.tolist())
        assert len(labels) == IMAGES and sorted(counts.values()) == [2] + [3] * 7
        assert labels.tolist() == sorted(labels.tolist(), key=list(counts).index), "one after another"
        assert len(np.unique(images.flatten(1).numpy(), axis=0)) == IMAGES
        assert list(counts) == epoch_order(config.run.seed, epoch, IMAGES)[:8].tolist()
        chosen.append(tuple(counts))
    assert chosen[0] != chosen[1]


# ---------------------------------------------------------------------------- both kinds, training

DATA = DataConfig(dataset="cifar10", mean=(120.0, 110.0, 100.0), std=(60.0, 61.0, 62.0))


def numbered(images: int = 50, size: int = 8) -> ArrayDataset:
    """Random images labeled with their own number."""
    pixels = np.random.default_rng(0).integers(256, size=(images, size, size, 3)).astype(np.uint8)
    return ArrayDataset(pixels, np.arange(images), tuple(map(str, range(images))))


def in_memory(batch_size: int, seed: int = 0, images: int = 50, padding: int = 2) -> InMemoryTrainLoader:
    augment = AugmentConfig(mirror=0.5, padding=padding)
    config = Config(
        data=DATA, augment=augment, train=TrainConfig(batch_size=batch_size), run=RunConfig(seed=seed)
    )
    return InMemoryTrainLoader(numbered(images), config, CPU, np.arange)


def from_files(root: Path, batch_size: int, seed: int = 3, more: str = ""):
    """A loader of class folders whose labels are the numbers of the images."""
    config = configure(root, more, batch_size=batch_size)
    files = replace(list_set(str(root), "train"), labels=np.arange(IMAGES))
    return make_train_loader(files, replace(config, run=replace(config.run, seed=seed)), CPU)


@pytest.fixture(params=["memory", "files"])
def make(request, shared_root):
    """A function of (batch size, seed) to a loader, in memory or of files."""
    if request.param == "memory":
        return in_memory
    return lambda *words: from_files(shared_root, *words, more="augment: {policy: randaugment, erasing: 0.5}")


@pytest.mark.parametrize("batch_size", [5, 16, 49, 50, 64])
def test_every_image_once_an_epoch(batch_size, make):
    loader = make(batch_size)
    full, rest = divmod(loader.images, batch_size)
    orders = []
    for epoch in (1, 2):
        found = take(loader.epoch(epoch))
        sizes = [len(labels) for _, labels in found]
        assert sizes == [batch_size] * full + [rest] * (rest > 0) and loader.steps == len(found)
        assert all(len(images) == len(labels) for images, labels in found)
        orders.append(torch.cat([labels for _, labels in found]).tolist())
        assert sorted(orders[-1]) == list(range(loader.images))
    assert orders[0] != orders[1]


@pytest.mark.parametrize("first", range(6))
def test_a_step_is_the_same_wherever_the_epoch_was_entered(first, shared_root):
    files, memory = train_loader(configure(shared_root, EVERYTHING)), in_memory(10)
    for loader in (files, memory):
        whole = take(loader.epoch(2))
        assert len(whole) == 5
        assert_same(loader.epoch(2, first), whole[first:])


def test_images_do_not_depend_on_the_batch_size(make):
    images, labels = joined(make(100).epoch(3))
    for batch_size in (1, 7, 16):
        others, other_labels = joined(make(batch_size).epoch(3))
        assert torch.equal(images, others) and torch.equal(labels, other_labels)


def test_seeds_and_epochs_differ(make):
    def by_label(seed, epoch):
        images, labels = joined(make(16, seed).epoch(epoch))
        return images[labels.argsort()], labels

    base, order = by_label(0, 1)
    for seed, epoch in ((0, 2), (1, 1)):
        images, other = by_label(seed, epoch)
        assert not torch.equal(order, other)
        assert (images != base).flatten(1).any(1).double().mean() > 0.9


def test_images_belong_to_their_labels_and_draws():
    """A batch holds the images of its labels, mirrored as sample_cifar_crops says."""
    pixels = torch.from_numpy(numbered().images)
    plain = normalize(pixels, torch.tensor(DATA.mean), torch.tensor(DATA.std))
    for images, labels in in_memory(16, 4, padding=0).epoch(6):
        mirrored, _, _ = sample_cifar_crops(4, 6, labels.numpy(), 0.5, 0)
        assert 0 < mirrored.sum() < len(mirrored) or len(mirrored) < 8
        for image, label, flip in zip(images, labels, mirrored, strict=True):
            assert torch.equal(image, plain[label].flip(2) if flip else plain[label])


def test_an_image_occurs_in_all_mirrors_and_offsets():
    loader = in_memory(4, images=4, padding=1)
    seen = {
        tuple(image[0].flatten().tolist())
        for epoch in range(1, 201)
        for images, labels in loader.epoch(epoch)
        for image in images[labels == 2]
    }
    assert len(seen) == 2 * 3 * 3


# ---------------------------------------------------------------------------- evaluation


def expected_crop(crop: np.ndarray, config: DataConfig) -> torch.Tensor:
    pixels = torch.from_numpy(crop.copy()).float()
    return ((pixels - torch.tensor(config.mean)) / torch.tensor(config.std)).permute(2, 0, 1)


@pytest.mark.parametrize(
    "pipeline, workers, batch_size", [("fast", 0, 1), ("fast", 2, 5), ("torch7", 0, 100), ("torch7", 2, 5)]
)
def test_evaluation_is_every_image_in_order(pipeline, workers, batch_size, shared_root):
    config = configure(shared_root, workers=workers, pipeline=pipeline).data
    files = list_set(str(shared_root), "val")
    loader = make_eval_loader(files, config, batch_size, CPU)
    assert isinstance(loader, FileEvalLoader)
    assert (loader.images, loader.crops) == (IMAGES, 1)
    for _ in range(2):
        images, labels = joined(take(loader))
        assert labels.tolist() == files.labels.tolist()
        for i, image in enumerate(images):
            (crop,) = eval_images(files.read(i), "x", config, ten=False)
            assert torch.equal(image, expected_crop(crop, config))


def test_ten_crops_are_adjacent(shared_root):
    config = configure(shared_root, workers=1).data
    files = list_set(str(shared_root), "val")
    loader = make_eval_loader(files, config, 4, CPU, ten_crop=True)
    found = take(loader)
    assert loader.crops == 10
    assert [(len(images), len(labels)) for images, labels in found] == [(40, 4)] * 5 + [(30, 3)]
    images = torch.cat([images for images, _ in found]).unflatten(0, (IMAGES, 10))
    for i in (0, 7, IMAGES - 1):
        for crop, ours in zip(eval_images(files.read(i), "x", config, ten=True), images[i], strict=True):
            assert torch.equal(ours, expected_crop(crop, config))


@pytest.mark.parametrize("batch_size", [1, 16, 50, 64])
def test_evaluation_in_memory_keeps_the_order(batch_size):
    loader = make_eval_loader(numbered(), DATA, batch_size, CPU)
    expected = torch.stack([expected_crop(image, DATA) for image in numbered().images])
    for _ in range(2):
        images, labels = joined(loader)
        assert loader.images == 50 and labels.tolist() == list(range(50))
        assert torch.equal(images, expected)
    with pytest.raises(UserError, match="--ten-crop"):
        make_eval_loader(numbered(), DATA, batch_size, CPU, ten_crop=True)


# ---------------------------------------------------------------------------- broken files


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("split", ["train", "val"])
def test_a_broken_file_is_one_message(split, workers, root):
    """The same as without a worker; validation never skips, because it would be another validation set."""
    spoil(root, f"{split}/bee/3.jpg")
    config = configure(root, workers=workers, skip_broken=split == "val")
    with pytest.raises(UserError) as caught:
        if split == "train":
            take(train_loader(config).epoch(1))
        else:
            take(make_eval_loader(list_set(str(root), "val"), config.data, 4, CPU))
    message = str(caught.value)
    assert message.startswith(f"{root}/{split}/bee/3.jpg: cannot be decoded (")
    assert message.endswith("replace or remove the file") and "\n" not in message


def test_a_missing_file_is_an_error(root):
    loader = train_loader(configure(root, workers=2))
    (root / "train" / "cow" / "1.jpg").unlink()
    with pytest.raises(UserError, match=r"cow/1\.jpg: cannot be read \(No such file or directory\)"):
        take(loader.epoch(1))


@pytest.mark.parametrize("workers", [0, 2])
def test_broken_files_are_skipped_on_request(workers, root):
    """Each is logged once, and the next file of the list stands in for it; all others stay the same."""
    config = configure(root, "augment: {erasing: 0.5}", workers, skip_broken=True)
    files = list_set(str(root), "train")
    lines: list[str] = []
    whole = [take(train_loader(config, lines.append).epoch(epoch)) for epoch in (1, 2)]
    assert lines == []
    names = ("train/bee/3.jpg", "train/bee/4.jpg", "train/ant/0.jpg")
    spoil(root, *names)
    broken = [i for i in range(IMAGES) if files.path(i).endswith(names)]
    loader = train_loader(config, lines.append)
    for epoch, unspoiled in zip((1, 2), whole, strict=True):
        found = take(loader.epoch(epoch))
        assert [len(labels) for _, labels in found] == [len(labels) for _, labels in unspoiled]
        order = epoch_order(config.run.seed, epoch, IMAGES)
        for step, (images, labels) in enumerate(found):
            part = order[step * 5 : step * 5 + 5]
            keep = torch.from_numpy(~np.isin(part, broken))
            assert torch.equal(images[keep], unspoiled[step][0][keep])
            shown = [next(i for i in range(id, id + 3) if i not in broken) for id in part.tolist()]
            assert labels.tolist() == files.labels[shown].tolist()
    logged = [line.split(": ")[:4] for line in lines]
    assert [words[1:3] for words in logged] == [
        ["broken files skipped so far", f"{n}, the latest"] for n in (1, 2, 3)
    ]
    assert {words[3] for words in logged} == {files.path(i) for i in broken}


def test_nothing_but_broken_files(root):
    spoil(root, *(f"train/{name}/{i}.jpg" for name, count in CLASSES.items() for i in range(count)))
    with pytest.raises(UserError, match=r"data\.skip_broken: 100 files in a row"):
        take(train_loader(configure(root, skip_broken=True)).epoch(1))


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_of_the_program_keeps_its_traceback(workers, shared_root, monkeypatch):
    def fail(*_):
        raise RuntimeError("expected a tensor")

    monkeypatch.setattr(data.file_loaders, "train_image", fail)
    with pytest.raises(RuntimeError, match="expected a tensor"):
        take(train_loader(configure(shared_root, workers=workers)).epoch(1))


# ---------------------------------------------------------------------------- the list of files


def test_the_list_of_imagenets_files_takes_little_memory(shared_root):
    """1.28 million files are two arrays of 50 MB together, which forked workers share."""
    images = 1_281_167
    names = np.char.mod(b"n01440764/n01440764_%d.JPEG", np.arange(1000))
    paths = np.resize(names.astype("S30"), images)
    classes = tuple(f"n{i:08}" for i in range(1000))
    files = ImageFolderDataset(Path("/data"), paths, np.arange(images) % 1000, classes)
    assert len(files) == images
    assert (files.paths.nbytes + files.labels.nbytes) / images <= 40
    assert sum(isinstance(value, list | dict) for value in vars(files).values()) == 0
    assert files.path(999) == "/data/n01440764/n01440764_999.JPEG"
    listed = list_set(str(shared_root), "train")
    assert (listed.paths.dtype, listed.labels.dtype) == (np.dtype("S9"), np.int64)


def test_fingerprint_of_files(shared_root):
    files = list_set(str(shared_root), "train")
    others = [
        list_set(str(shared_root), "train", 22),
        replace(files, labels=np.append(files.labels[:-1], 0)),
        replace(files, classes=("ant", "bee", "cat")),
        replace(files, paths=files.paths[::-1].copy()),
    ]
    assert len({files.fingerprint(), *(other.fingerprint() for other in others)}) == 5
    assert replace(files, folder=Path("/elsewhere")).fingerprint() == files.fingerprint()
