"""Preparing a batch never waits for the GPU: shown on a simulated one, whose tensors have only shapes.

test_gpu.py asks a real one.
"""

import contextlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from commands import draw_folders
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.transforms import v2

from data import augment
from data.augment import box_mask, erase, erased_boxes, on_device
from data.datasets import load_set
from data.in_memory import ArrayDataset
from data.loaders import make_eval_loader, make_train_loader
from data.rng import RngStream, random_uint64
from resnext.config import parse_config

CUDA = torch.device("cuda", 0)
# The shape of their result, or what the host does next, depends on values.
WAITING = {"_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "equal", "bincount"}
WAITING |= {"repeat_interleave"}
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_"}
EVERYTHING = ["augment.erasing=0.5", "augment.mixup=0.2", "augment.cutmix=1"]


class Waits(AssertionError):
    """The host would wait for the device."""


def is_cuda(leaf: object) -> bool:
    return isinstance(leaf, torch.device) and leaf == CUDA


class SimulatedGPU(TorchDispatchMode):
    """Operators on CUDA tensors compute shapes only; those that make the host wait raise Waits."""

    def __init__(self):
        super().__init__()
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        self.pinned: dict[int, torch.Tensor] = {}  # by address; kept, so that no other tensor gets it
        self.operators = self.copies = 0  # on the device; from the host to it

    def __enter__(self):
        self.fake.__enter__()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self.fake.__exit__(*error)

    def pin(self, tensor: torch.Tensor) -> torch.Tensor:
        copy = tensor.clone()
        self.pinned[copy.untyped_storage().data_ptr()] = copy
        return copy

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        leaves = pytree.tree_leaves((args, kwargs))
        if not any(isinstance(leaf, FakeTensor) or is_cuda(leaf) for leaf in leaves):
            with unset_fake_temporarily():
                return function(*args, **kwargs)
        self.operators += 1
        self.check(function._overloadpacket.__name__, args, kwargs)
        return function(*args, **kwargs)

    def check(self, name: str, args: tuple, kwargs: dict) -> None:
        if name in WAITING:
            raise Waits(name)
        if name in INDEXING and any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1]):
            raise Waits(f"{name} by a mask")
        if name in ("copy_", "_to_copy"):
            source = args[name == "copy_"]
            target = args[0].device if name == "copy_" else kwargs.get("device") or source.device
            if source.device.type == target.type or not source.numel():
                return
            if not (kwargs.get("non_blocking") or args[2:3] == (True,)):
                raise Waits(f"{name} without non_blocking")
            if target.type == "cpu" or source.untyped_storage().data_ptr() not in self.pinned:
                raise Waits(f"{name} of memory that is not pinned")
            self.copies += 1


@pytest.fixture
def gpu(monkeypatch):
    gpu = SimulatedGPU()
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor, *_: gpu.pin(tensor))
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda *_: None)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "Stream", lambda _: "the other stream")
    monkeypatch.setattr(torch.cuda, "stream", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: SimpleNamespace(wait_stream=lambda _: None))
    augment.color_constants.cache_clear()
    yield gpu
    augment.color_constants.cache_clear()


# ---------------------------------------------------------------------------- no batch waits


@pytest.fixture(params=["memory", "files"])
def dataset(request, tmp_path):
    """(30 training images, their configuration with all augmentations)."""
    keys = ["data.dataset=glyphs", "data.train_images=30", "augment.padding=2"]
    if request.param == "files":
        draw_folders(tmp_path, {"cat": 15, "dog": 15}, size=50)
        keys = [f"data.dir={tmp_path}", "data.pipeline=fast", "data.image_size=32", "data.workers=0"]
    config = parse_config("", "test", [*keys, "train.batch_size=8", *EVERYTHING])
    return load_set(config.data, "train"), config


@pytest.mark.parametrize("share", [np.arange, lambda images: np.arange(0, images, 2)], ids=["all", "half"])
def test_training_batches_never_wait(share, dataset, gpu):
    image_set, config = dataset
    with gpu.fake:  # what is copied at the start of a run may wait
        batches = make_train_loader(image_set, config, CUDA, share=share)
    sizes = []
    with gpu:
        for epoch in range(1, 6):
            for images, labels in batches.epoch(epoch):
                assert images.device == labels.device == CUDA
                assert labels.shape == (len(images), len(image_set.classes))
                sizes.append(len(images))
    assert sizes == [len(share(images)) for images in (8, 8, 8, 6)] * 5
    boxes, kept = 20, 20 * (share is not np.arange)
    files = not isinstance(image_set, ArrayDataset)
    others = 4 * 20 + 3 if files else 4 * 5  # draws of a step, and constants; draws of an epoch
    assert 0.9 * others < gpu.copies - boxes - kept <= others  # a batch may have nothing to mirror


def test_evaluation_batches_never_wait(dataset, gpu):
    image_set, config = dataset
    with gpu.fake:
        batches = make_eval_loader(image_set, config.data, 8, CUDA)
    with gpu:
        assert [len(labels) for _, labels in batches] == [8, 8, 8, 6]


@pytest.mark.parametrize(
    "work",
    [
        lambda x: x.sum().item(),
        lambda x: bool((x > 0).any()),
        lambda x: x.tolist(),
        lambda x: x.cpu(),
        lambda x: x.to("cpu", non_blocking=True),
        lambda x: x.nonzero(),
        lambda x: x[x > 0],
        lambda x: x.__setitem__(x > 0, x),
        lambda x: x.unique(),
        lambda x: x.masked_select(x > 0),
        lambda x: torch.equal(x, x),
        lambda x: x.copy_(torch.ones(4)),
        lambda x: torch.tensor([1.0, 2.0], device=CUDA),
        lambda x: torch.ones(4).to(CUDA),
        lambda x: torch.ones(4).to(CUDA, non_blocking=True),
        lambda x: torch.ones(4).pin_memory().to(CUDA),
    ],
)
def test_waiting_is_noticed(work, gpu):
    with gpu, pytest.raises(Waits):
        work(torch.empty(4, device=CUDA))


def test_what_does_not_wait_passes(gpu):
    with gpu:
        x = on_device(np.arange(4), CUDA)
        x[x.argsort()].masked_fill_(x > 2, 0).mul_(2).where(x > 1, 0)
        torch.zeros(4, device=CUDA)[1:] = 1.0
    assert gpu.copies == 1


# ---------------------------------------------------------------------------- erasing


def test_erasing_takes_the_same_launches_for_any_batch(gpu):
    counts = []
    with gpu:
        for count in (8, 64):
            images = torch.empty(count, 3, 16, 16, device=CUDA)
            gpu.operators = gpu.copies = 0
            erase(images, 1, 1, np.arange(count), 1.0)
            counts.append((gpu.operators, gpu.copies))
    assert counts[0] == counts[1] and counts[0][1] == 1


def test_the_mask_is_what_is_erased():
    images, ids = torch.ones(200, 3, 20, 14), np.arange(200)
    boxes = torch.from_numpy(erased_boxes(images, 1, 1, ids, 0.5))
    mask = box_mask(boxes, 20, 14)
    erase(images, 1, 1, ids, 0.5)
    assert 0.05 < mask.double().mean() < 0.15
    assert torch.equal(mask.expand_as(images), images == 0)


def test_erased_boxes_are_torchvisions():
    erasing = v2.RandomErasing(p=1.0)
    images = torch.randn(60, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    ours, theirs = images.clone(), images.clone()
    erase(ours, 1, 2, np.arange(60), 1.0)
    seeds = random_uint64(1, 2, np.arange(60), 2, RngStream.ERASING)[:, 1]
    for image, seed in zip(theirs, seeds.tolist(), strict=True):
        with augment.seeded(seed):
            image.copy_(erasing(image))
    assert torch.equal(ours, theirs) and not torch.equal(ours, images)
