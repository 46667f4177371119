"""Batches of picture files: the same whatever the workers, and what happens when a file or a worker fails."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import ROOT
from PIL import Image

import data.loader
from data.augment import erase, jitter, mirror, mix, sample_color_params, sample_flips
from data.image_folder import ImageFolderDataset, list_set
from data.loaders import FileEvalLoader, FileTrainLoader, make_eval_loader, make_train_loader
from data.rng import RngStream, random_uint64, random_uniform
from data.sampler import epoch_order
from data.transforms import CROP_DRAWS, apply_policy, eval_images, train_image
from resnext.config import Config, parse_config
from resnext.engine.train_state import build_train_state
from resnext.engine.trainer import train_step
from resnext.errors import UserError

CPU = torch.device("cpu")
COUNTS = {"ant": 9, "bee": 8, "cow": 6}
IMAGES = sum(COUNTS.values())
EVERYTHING = """
    augment: {policy: trivialaugment, erasing: 0.5, mixup: 0.2, cutmix: 1, repeats: 3}
"""


def draw_jpegs(root: Path, counts: dict[str, int] = COUNTS, seed: int = 0) -> Path:
    """JPEGs of 40x50 pixels below train/ and val/, no two alike."""
    generator = np.random.default_rng(seed)
    for split in ("train", "val"):
        for name, count in counts.items():
            (root / split / name).mkdir(parents=True)
            for number in range(count):
                small = Image.fromarray(generator.integers(0, 256, (6, 5, 3), np.uint8))
                small.resize((40, 50)).save(root / split / name / f"{number}.jpg", quality=90)
    return root


@pytest.fixture(scope="module")
def shared_root(tmp_path_factory) -> Path:
    """Look, don't touch."""
    return draw_jpegs(tmp_path_factory.mktemp("data"))


@pytest.fixture
def root(shared_root, tmp_path) -> Path:
    """A copy to spoil."""
    return shutil.copytree(shared_root, tmp_path / "data")


def configuration(root: Path, more: str = "", workers: int = 0, batch_size: int = 5, **changes) -> Config:
    text = f"""
    data: {{dir: {root}, pipeline: fast, image_size: 16, workers: {workers}}}
    train: {{batch_size: {batch_size}}}
    run: {{seed: 3}}
    {more}
    """
    config = parse_config(text, "test")
    return replace(config, data=replace(config.data, **changes)) if changes else config


STREAMS = weakref.WeakSet()


@pytest.fixture(autouse=True)
def workers_end_with_the_test():
    """A failed iterator is held by its exception; torch takes long to end the workers of cyclic garbage."""
    yield
    for batches in list(STREAMS):
        if batches.loader._iterator is not None:
            batches.loader._iterator._shutdown_workers()
    STREAMS.clear()


def stream(config: Config, warn=print) -> FileTrainLoader:
    batches = make_train_loader(list_set(config.data.dir, "train"), config, CPU, warn)
    assert isinstance(batches, FileTrainLoader)
    if config.data.workers:
        STREAMS.add(batches)
    return batches


def take(iterator) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [(images.clone(), labels.clone()) for images, labels in iterator]


def assert_same(ours, theirs) -> None:
    assert len(ours) == len(theirs)
    for (images, labels), (other_images, other_labels) in zip(ours, theirs, strict=True):
        assert images.dtype == other_images.dtype == torch.float32
        assert torch.equal(images, other_images) and torch.equal(labels, other_labels)


def sources(files: ImageFolderDataset, config: Config, epoch: int, repeats: int = 1) -> np.ndarray:
    return epoch_order(config.run.seed, epoch, len(files), repeats) % len(files)


# ---------------------------------------------------------------------------- the same batches


@pytest.mark.parametrize("workers", [1, 2, 3])
@pytest.mark.parametrize("more", ["", EVERYTHING], ids=["plain", "everything"])
def test_workers_change_nothing(more, workers, shared_root):
    """Neither do they from the middle of an epoch, nor in a second epoch of the same workers."""
    alone = stream(configuration(shared_root, more))
    several = stream(configuration(shared_root, more, workers))
    assert_same(take(several.epoch(1)), take(alone.epoch(1)))
    assert_same(take(several.epoch(2, 3)), take(alone.epoch(2))[3:])


@pytest.mark.parametrize("pipeline", ["fast", "torch7"])
@pytest.mark.parametrize("decoder", ["simplejpeg", "pillow"])
def test_decoders_change_nothing(pipeline, decoder, shared_root):
    expected = stream(configuration(shared_root, pipeline=pipeline))
    ours = stream(configuration(shared_root, pipeline=pipeline, decoder=decoder, workers=2))
    assert_same(take(ours.epoch(1)), take(expected.epoch(1)))


@pytest.mark.parametrize("first", range(6))
def test_a_step_is_the_same_wherever_the_epoch_was_entered(first, shared_root):
    batches = stream(configuration(shared_root, EVERYTHING))
    assert_same(take(batches.epoch(2, first)), take(batches.epoch(2))[first:])


def test_every_image_once_an_epoch(shared_root):
    """Here as a number in the place of a label."""
    config = configuration(shared_root)
    files = list_set(str(shared_root), "train")
    numbered = replace(files, labels=np.arange(IMAGES))
    batches = make_train_loader(numbered, config, CPU)
    assert (batches.images, batches.steps) == (IMAGES, 5)
    orders = []
    for epoch in (1, 2):
        found = [labels for _, labels in take(batches.epoch(epoch))]
        assert [len(labels) for labels in found] == [5, 5, 5, 5, 3]
        orders.append(torch.cat(found).tolist())
        assert sorted(orders[-1]) == list(range(IMAGES))
    assert orders[0] != orders[1]


def test_pictures_do_not_depend_on_the_batch_size(shared_root):
    more = "augment: {policy: randaugment, erasing: 0.5}"
    expected = None
    for batch_size in (1, 4, IMAGES, 100):
        batches = stream(configuration(shared_root, more, batch_size=batch_size))
        images, labels = (torch.cat(part) for part in zip(*batches.epoch(3), strict=True))
        expected = expected or (images, labels)
        assert torch.equal(images, expected[0]) and torch.equal(labels, expected[1])


def by_definition(files: ImageFolderDataset, config: Config, epoch: int, step: int):
    """A batch put together from its parts, one picture after another."""
    augment, seed, size = config.augment, config.run.seed, config.train.batch_size
    ids = epoch_order(seed, epoch, len(files), augment.repeats)[step * size : (step + 1) * size]
    draws = random_uniform(seed, epoch, ids, CROP_DRAWS, RngStream.CROP)
    images = []
    for id, row in zip(ids, draws, strict=True):
        content = Path(files.path(id % len(files))).read_bytes()
        image = train_image(content, "x", row, config.data, augment.min_area)
        if augment.policy:
            image = apply_policy(
                image, augment.policy, int(random_uint64(seed, epoch, [id], 1, RngStream.POLICY)[0, 0])
            )
        images.append(torch.from_numpy(image.copy()))
    images = torch.stack(images)
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
    config = configuration(shared_root, more)
    files = list_set(str(shared_root), "train")
    ours = take(stream(config).epoch(4))
    assert_same(ours, [by_definition(files, config, 4, step) for step in range(5)])


def test_seeds_and_epochs_differ(shared_root):
    config = configuration(shared_root, batch_size=IMAGES)
    first = take(stream(config).epoch(1))
    other_seed = replace(config, run=replace(config.run, seed=4))
    for images, labels in (*take(stream(config).epoch(2)), *take(stream(other_seed).epoch(1))):
        assert not torch.equal(labels, first[0][1])
        order, other = labels.argsort(stable=True), first[0][1].argsort(stable=True)
        assert (images[order] != first[0][0][other]).flatten(1).any(1).double().mean() > 0.9


def test_repeats(shared_root):
    """A third of the pictures, three versions of each in a row, all different; as many steps."""
    config = configuration(shared_root, "augment: {repeats: 3}", batch_size=6)
    files = replace(list_set(str(shared_root), "train"), labels=np.arange(IMAGES))
    batches = make_train_loader(files, config, CPU)
    assert batches.steps == 4
    chosen = []
    for epoch in (1, 2):
        images, labels = (torch.cat(part) for part in zip(*batches.epoch(epoch), strict=True))
        assert len(labels) == IMAGES
        counts = Counter(labels.tolist())
        assert sorted(counts.values()) == [2] + [3] * 7
        chosen.append(tuple(counts))
        assert labels.tolist() == sorted(labels.tolist(), key=list(counts).index), "one after another"
        assert len(np.unique(images.flatten(1).numpy(), axis=0)) == IMAGES
        plain = epoch_order(config.run.seed, epoch, IMAGES)[:8]
        assert list(counts) == plain.tolist()
    assert chosen[0] != chosen[1]


# ---------------------------------------------------------------------------- evaluation


@pytest.mark.parametrize("pipeline", ["fast", "torch7"])
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("batch_size", [1, 5, 100])
def test_evaluation_is_every_image_in_order(pipeline, workers, batch_size, shared_root):
    config = configuration(shared_root, workers=workers, pipeline=pipeline).data
    files = list_set(str(shared_root), "val")
    batches = make_eval_loader(files, config, batch_size, CPU)
    assert isinstance(batches, FileEvalLoader)
    assert (batches.images, batches.crops) == (IMAGES, 1)
    for _ in range(2):
        images, labels = (torch.cat(part) for part in zip(*take(batches), strict=True))
        assert labels.tolist() == files.labels.tolist()
        for i, image in enumerate(images):
            (crop,) = eval_images(files.read(i), "x", config, ten=False)
            expected = (torch.from_numpy(crop.copy()).float() - torch.tensor(config.mean)) / torch.tensor(
                config.std
            )
            assert torch.equal(image, expected.permute(2, 0, 1))


def test_ten_crops_are_adjacent(shared_root):
    config = configuration(shared_root, workers=1).data
    files = list_set(str(shared_root), "val")
    batches = make_eval_loader(files, config, 4, CPU, ten_crop=True)
    found = take(batches)
    assert batches.crops == 10
    assert [(len(images), len(labels)) for images, labels in found] == [(40, 4)] * 5 + [(30, 3)]
    images = torch.cat([images for images, _ in found]).unflatten(0, (IMAGES, 10))
    for i in (0, 7, IMAGES - 1):
        for crop, ours in zip(eval_images(files.read(i), "x", config, ten=True), images[i], strict=True):
            expected = (torch.from_numpy(crop.copy()).float() - torch.tensor(config.mean)) / torch.tensor(
                config.std
            )
            assert torch.equal(ours, expected.permute(2, 0, 1))


# ---------------------------------------------------------------------------- broken files


def spoil(root: Path, *names: str, split: str = "train") -> None:
    for name in names:
        path = root / split / name
        path.write_bytes(path.read_bytes()[:-300])


@pytest.mark.parametrize("workers", [0, 2])
def test_a_broken_file_stops_the_epoch(workers, root):
    """One plain message, as if no worker had been between."""
    spoil(root, "bee/3.jpg")
    with pytest.raises(UserError) as caught:
        take(stream(configuration(root, workers=workers)).epoch(1))
    message = str(caught.value)
    assert message.startswith(f"{root}/train/bee/3.jpg: cannot be decoded (")
    assert message.endswith("replace or remove the file") and "\n" not in message


def test_a_vanished_file_stops_the_epoch(root):
    batches = stream(configuration(root, workers=2))
    (root / "train" / "cow" / "1.jpg").unlink()
    with pytest.raises(UserError, match=r"cow/1\.jpg: cannot be read \(No such file or directory\)"):
        take(batches.epoch(1))


@pytest.mark.parametrize("workers", [0, 2])
def test_broken_files_are_skipped_on_request(workers, root):
    """Said once each; the next file of the list is shown in their place; the others are what they were."""
    config = configuration(root, "augment: {erasing: 0.5}", workers, skip_broken=True)
    files = list_set(str(root), "train")
    whole = [take(stream(config).epoch(epoch)) for epoch in (1, 2)]
    spoil(root, "bee/3.jpg", "bee/4.jpg", "ant/0.jpg")
    broken = [i for i in range(IMAGES) if files.path(i).endswith(("bee/3.jpg", "bee/4.jpg", "ant/0.jpg"))]
    lines = []
    batches = stream(config, lines.append)
    for epoch in (1, 2):
        order = sources(files, config, epoch)
        found = take(batches.epoch(epoch))
        assert [len(labels) for _, labels in found] == [len(labels) for _, labels in whole[epoch - 1]]
        for step, (images, labels) in enumerate(found):
            part = order[step * 5 : step * 5 + 5]
            keep = torch.from_numpy(~np.isin(part, broken))
            assert torch.equal(images[keep], whole[epoch - 1][step][0][keep])
            shown = [next(i for i in range(id, id + 3) if i not in broken) for id in part.tolist()]
            assert labels.tolist() == files.labels[shown].tolist()
    said = [line.split(": ")[:3] for line in lines]
    assert [words[:2] for words in said] == [
        ["warning", f"{n} broken files skipped so far"] for n in (1, 2, 3)
    ]
    assert {words[2] for words in said} == {files.path(i) for i in broken}


def test_nothing_is_said_of_whole_files(shared_root):
    lines = []
    assert len(take(stream(configuration(shared_root, skip_broken=True), lines.append).epoch(1))) == 5
    assert lines == []


def test_nothing_but_broken_files(root):
    spoil(root, *(f"{name}/{i}.jpg" for name, count in COUNTS.items() for i in range(count)))
    with pytest.raises(UserError, match=r"data\.skip_broken: 100 files in a row cannot be decoded"):
        take(stream(configuration(root, skip_broken=True), lambda _: None).epoch(1))


@pytest.mark.parametrize("workers", [0, 2])
def test_validation_never_skips(workers, root):
    """It would be another validation set."""
    spoil(root, "bee/3.jpg", split="val")
    config = configuration(root, workers=workers, skip_broken=True).data
    with pytest.raises(UserError, match=r"val/bee/3\.jpg: cannot be decoded .*replace or remove the file$"):
        take(make_eval_loader(list_set(str(root), "val"), config, 4, CPU))


def test_an_error_of_the_program_keeps_its_traceback(shared_root, monkeypatch):
    """It is not reported as bad input."""

    def fail(*_):
        raise RuntimeError("expected a tensor")

    monkeypatch.setattr(data.loader, "train_image", fail)
    for workers in (0, 1):
        with pytest.raises(RuntimeError, match="expected a tensor"):
            take(stream(configuration(shared_root, workers=workers)).epoch(1))


# ---------------------------------------------------------------------------- workers


def processes(batches: FileTrainLoader) -> list:
    return batches.loader._iterator._workers


def gone(pid: int) -> bool:
    """No such process, or one that nobody has fetched yet."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except FileNotFoundError:
        return True


def wait_for(condition, seconds: float = 30) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.05)
    return False


def test_a_killed_worker_is_an_error(shared_root, monkeypatch):
    """As when memory is short. A picture takes half a second, so that the batch is being waited for."""
    monkeypatch.setattr(data.loader, "train_image", lambda *_: time.sleep(0.5))
    batches = stream(configuration(shared_root, workers=2, batch_size=3))

    def kill():
        assert wait_for(lambda: batches.loader._iterator is not None)
        os.kill(processes(batches)[0].pid, signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    start = time.monotonic()
    with pytest.raises(UserError) as caught:
        next(batches.epoch(1))
    assert time.monotonic() - start < 10
    killer.join()
    assert str(caught.value).startswith("data.workers: DataLoader worker (pid")
    assert str(caught.value).endswith("; if memory is short, lower data.workers")
    assert "\n" not in str(caught.value)


def test_a_worker_killed_meanwhile_is_an_error_at_the_next_batch(shared_root):
    """Not at once, which may be in the middle of a step, or of writing a checkpoint; nor in 15 minutes."""
    batches = stream(configuration(shared_root, workers=2, batch_size=1))
    iterator = batches.epoch(1)
    next(iterator)
    pid = processes(batches)[0].pid
    os.kill(pid, signal.SIGKILL)
    assert wait_for(lambda: gone(pid))
    before = time.monotonic()
    # torch words it by where it notices: "(pid N) is killed by signal" or "(pid(s) N) exited unexpectedly"
    with pytest.raises(UserError, match=rf"^data.workers: DataLoader worker .*\b{pid}\).*lower data"):
        take(iterator)
    assert time.monotonic() - before < 10


def test_a_worker_killed_between_epochs_is_an_error(shared_root):
    batches = stream(configuration(shared_root, workers=2))
    take(batches.epoch(1))
    os.kill(processes(batches)[1].pid, signal.SIGKILL)
    assert wait_for(lambda: gone(processes(batches)[1].pid))
    before = time.monotonic()
    with pytest.raises(UserError, match=r"^data\.workers: DataLoader worker"):
        take(batches.epoch(2))
    assert time.monotonic() - before < 10


def test_a_worker_that_gives_nothing_is_an_error(shared_root, monkeypatch):
    monkeypatch.setattr(data.loader, "TIMEOUT", 1)
    monkeypatch.setattr(data.loader, "train_image", lambda *_: time.sleep(2.5))
    batches = stream(configuration(shared_root, workers=1, batch_size=1))
    with pytest.raises(UserError, match=r"data\.workers: DataLoader timed out after 1 seconds"):
        next(batches.epoch(1))


def test_workers_ignore_the_signals_that_stop_a_run(shared_root):
    """A batch system and a terminal send them to all processes; the run still wants to finish its step."""
    batches = stream(configuration(shared_root, workers=2))
    iterator = batches.epoch(1)
    found = [next(iterator)]
    for process in processes(batches):
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
            os.kill(process.pid, number)
    found += take(iterator)
    assert_same(found, take(stream(configuration(shared_root)).epoch(1)))
    assert_same(take(batches.epoch(2)), take(stream(configuration(shared_root)).epoch(2)))
    assert all(process.is_alive() for process in processes(batches))


def test_workers_stay_from_epoch_to_epoch(shared_root):
    batches = stream(configuration(shared_root, workers=2))
    take(batches.epoch(1))
    before = [process.pid for process in processes(batches)]
    take(batches.epoch(2))
    assert [process.pid for process in processes(batches)] == before and len(before) == 2


def test_workers_end_with_the_batches(shared_root):
    batches = stream(configuration(shared_root, workers=2))
    take(batches.epoch(1))
    pids = [process.pid for process in processes(batches)]
    del batches
    assert wait_for(lambda: all(map(gone, pids)))
    files = list_set(str(shared_root), "val")
    children = {p.pid for p in torch.multiprocessing.active_children()}
    take(make_eval_loader(files, configuration(shared_root, workers=2).data, 4, CPU))
    assert {p.pid for p in torch.multiprocessing.active_children()} <= children


@pytest.mark.parametrize("workers", [0, 2])
def test_an_epoch_that_was_left(workers, shared_root):
    """A stopped run leaves its batches half way; the next epoch is right."""
    expected = stream(configuration(shared_root))
    batches = stream(configuration(shared_root, workers=workers, batch_size=5))
    iterator = batches.epoch(1)
    next(iterator)
    iterator.close()
    assert_same(take(batches.epoch(2)), take(expected.epoch(2)))
    iterator = batches.epoch(3, 2)
    next(iterator)
    del iterator
    assert_same(take(batches.epoch(1)), take(expected.epoch(1)))


WITH_WORKERS = """
import sys, time
import torch
from data.folder import list_set
from data.loaders import train_batches
from resnext.config import parse_config

text = f"data: {{dir: {sys.argv[1]}, image_size: 16, workers: 2}}"
config = parse_config(text, "text", ["train.batch_size=1"])
batches = train_batches(list_set(sys.argv[1], "train"), config, torch.device("cpu"))
epoch = batches.epoch(1)
next(epoch)
print(*(process.pid for process in batches.loader._iterator._workers), flush=True)
"""


def start_with_workers(root: Path, then: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", f"{WITH_WORKERS}\n{then}", str(root)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize("leave", ["pass", "sys.exit(3)", "raise ValueError"])
def test_a_run_that_leaves_its_epoch_ends_with_its_workers(leave, shared_root):
    """Whatever still refers to the batches when the interpreter exits."""
    parent = start_with_workers(shared_root, leave)
    try:
        pids = [int(pid) for pid in parent.stdout.readline().split()]
        parent.wait(30)
        assert len(pids) == 2 and wait_for(lambda: all(map(gone, pids)), 20)
    finally:
        parent.kill()
        parent.stdout.close()


def test_no_worker_outlives_a_killed_run(shared_root):
    parent = start_with_workers(shared_root, "time.sleep(300)")
    try:
        pids = [int(pid) for pid in parent.stdout.readline().split()]
        assert len(pids) == 2 and not any(map(gone, pids))
        parent.kill()
        parent.wait()
        assert wait_for(lambda: all(map(gone, pids)), 20)
    finally:
        parent.kill()
        parent.stdout.close()


def test_too_little_shared_memory(shared_root, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(100, 0, 100_000))
    take(stream(configuration(shared_root, workers=0)).epoch(1))
    with pytest.raises(
        UserError, match=r"data\.workers: 2 workers need .*lower data\.workers, or enlarge it"
    ):
        stream(configuration(shared_root, workers=2, batch_size=100))


# ---------------------------------------------------------------------------- the index


def test_index_of_imagenet_takes_little_memory():
    """1.28 million files: two arrays of 50 MB together, which forked workers share."""
    images = 1_281_167
    number = np.arange(images)
    names = np.char.mod(b"n01440764/n01440764_%d.JPEG", number[:1000])
    paths = np.resize(names.astype("S30"), images)
    files = ImageFolderDataset(Path("/data"), paths, number % 1000, tuple(f"n{i:08}" for i in range(1000)))
    assert len(files) == images
    assert (files.paths.nbytes + files.labels.nbytes) / images <= 40
    assert sum(isinstance(value, list | dict) for value in vars(files).values()) == 0
    assert files.path(999) == "/data/n01440764/n01440764_999.JPEG"


def test_files_read_from_folders_are_one_array(shared_root):
    files = list_set(str(shared_root), "train")
    assert files.paths.dtype == np.dtype("S9") and files.labels.dtype == np.int64
    assert files.paths.nbytes + files.labels.nbytes == IMAGES * 17


def test_fingerprint(shared_root):
    files = list_set(str(shared_root), "train")
    labels = files.labels.copy()
    labels[-1] = 0
    others = [
        list_set(str(shared_root), "train", 22),
        replace(files, labels=labels),
        replace(files, classes=("ant", "bee", "cat")),
        replace(files, paths=files.paths[::-1].copy()),
    ]
    assert len({files.fingerprint(), *(other.fingerprint() for other in others)}) == 5
    assert replace(files, folder=Path("/elsewhere")).fingerprint() == files.fingerprint()


# ---------------------------------------------------------------------------- the loss


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("parts", [1, 2])
def test_loss_of_smoothed_and_mixed_labels(smoothing, mixed, parts):
    """-Σ target·log softmax, of the target a part spread over all classes; hits are the larger share's."""
    config = parse_config(
        f"""
        model: {{stem: cifar, depth: 11, cardinality: 1, base_width: 1}}
        train: {{batch_size: 8, label_smoothing: {smoothing}, accumulation_steps: {parts}}}
        """,
        "test",
    )
    torch.manual_seed(0)
    training = build_train_state(config, tuple("abcdefg"), CPU, {})
    outputs = []
    training.model.register_forward_hook(lambda module, inputs, output: outputs.append(output.detach()))
    images, labels = torch.randn(8, 3, 16, 16), torch.arange(8) % 7
    targets = torch.nn.functional.one_hot(labels, 7).double()
    if mixed:
        targets = 0.7 * targets + 0.3 * targets.roll(1, 0)
        labels = targets.float()
    loss, top1, top5 = train_step(training, images, labels, 0.0).tolist()
    logits = torch.cat(outputs).double().numpy()
    assert logits.shape == (8, 7) and len(outputs) == parts
    log_softmax = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    smoothed = (1 - smoothing) * targets.numpy() + smoothing / 7
    assert loss == pytest.approx(-(smoothed * log_softmax).sum(1).mean(), rel=1e-6)
    rank = (-logits).argsort(1)
    own = targets.argmax(1).numpy()
    assert top1 == (rank[:, 0] == own).sum()
    assert top5 == (rank[:, :5] == own[:, None]).any(1).sum()


# ---------------------------------------------------------------------------- a training

TRAINING = [
    "model.depth=null",
    "model.stages=[1, 1, 1, 1]",
    "model.cardinality=1",
    "model.base_width=1",
    "data.image_size=32",
    "data.workers=2",
    "augment.policy=trivialaugment",
    "augment.erasing=0.5",
    "augment.mixup=0.2",
    "augment.cutmix=1",
    "augment.repeats=3",
    "train.label_smoothing=0.1",
    "train.epochs=3",
    "train.batch_size=4",
    "train.bn_group=null",
    "optimizer.lr=0.01",
    "run.device=cpu",
    "run.log_interval=1",
    "run.tensorboard=false",
]


def command(output: Path, root: Path, *more: str) -> list[str]:
    script = [sys.executable, str(ROOT / "train.py"), "--config", "resnext50_32x4d.yaml", "--data", str(root)]
    return [*script, "--output", str(output), *TRAINING, *more]


def rows(output: Path) -> list[dict]:
    text = (output / "metrics.jsonl").read_text()
    return [{k: v for k, v in json.loads(line).items() if k != "time"} for line in text.splitlines()]


def state(output: Path) -> dict:
    content = torch.load(output / "checkpoints" / "last.pt", weights_only=True)
    return content["model"] | {
        f"{number}/{name}": value
        for number, entry in content["optimizer"]["state"].items()
        for name, value in entry.items()
        if torch.is_tensor(value)
    }


def test_a_stopped_training_on_files_ends_with_the_same_bits(shared_root, tmp_path):
    """Stopped in mid-epoch and gone on with other workers, as if never stopped; and no worker is left."""
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    done = subprocess.run(command(whole, shared_root), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert len(rows(whole)) == 3 * (6 + 1)
    process = subprocess.Popen(
        command(stopped, shared_root), stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        metrics = stopped / "metrics.jsonl"
        assert wait_for(lambda: metrics.exists() and metrics.read_bytes().count(b"\n") >= 9, 60)
        os.killpg(process.pid, signal.SIGTERM)  # as a batch system does: the workers get it too
        process.communicate(timeout=60)
        assert process.returncode == 0
        with pytest.raises(ProcessLookupError):
            os.killpg(process.pid, 0)
    finally:
        process.kill()
    progress = torch.load(stopped / "checkpoints" / "last.pt", weights_only=True)["progress"]
    assert (progress["epoch"], progress["step"]) < (4, 0) and progress["step"] > 0, "in mid-epoch"
    again = command(stopped, shared_root, "--resume", "data.workers=1")
    done = subprocess.run(again, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert rows(stopped) == rows(whole)
    ours, theirs = state(stopped), state(whole)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_warnings_of_skipped_files_reach_the_log(root, tmp_path):
    spoil(root, "bee/3.jpg")
    more = ("data.skip_broken=true", "train.epochs=2", "augment.repeats=1")
    done = subprocess.run(command(tmp_path / "run", root, *more), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    log = (tmp_path / "run" / "log.txt").read_text()
    assert log.count("bee/3.jpg: cannot be decoded") == 1
    assert "warning: 1 broken files skipped so far: " in log
    images = [row["train"]["images"] for row in rows(tmp_path / "run") if row["kind"] == "epoch"]
    assert images == [IMAGES] * 2
