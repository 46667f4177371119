"""Glyphs: deterministic, balanced, never the same twice, and too hard for a linear model."""

import hashlib

import numpy as np
import pytest

from data import glyphs
from data.datasets import load_set
from data.in_memory import ArrayDataset
from resnext.config import parse_config


@pytest.fixture(scope="module")
def drawn() -> dict[str, ArrayDataset]:
    return {split: glyphs.render_glyphs(split, 600, 20) for split in ("train", "val")}


def test_defaults():
    config = parse_config("data: {dataset: glyphs, train_images: 50}", "text").data
    assert config.image_size == 20 and len(load_set(config, "train")) == 50
    val = load_set(config, "val")
    assert val.images.shape == (1000, 20, 20, 3)
    assert (val.images.dtype, val.labels.dtype) == (np.uint8, np.int64)
    assert val.classes == tuple("0123456789")
    assert glyphs.SIZES == {"train": 5000, "val": 1000}
    digest = hashlib.sha256(val.labels.astype("<i8").tobytes()).hexdigest()
    assert digest == "abbc512c3acb0f8cbfb5028feee89e6acb003603ae14addba0cb44cb6273784f"


@pytest.mark.parametrize("split", ["train", "val"])
def test_deterministic(split, drawn):
    again = glyphs.render_glyphs(split, 600, 20)
    assert again.fingerprint() == drawn[split].fingerprint()
    assert np.array_equal(glyphs.render_glyphs(split, 70, 20).images, drawn[split].images[:70])


def test_all_images_differ(drawn):
    """No image occurs twice, neither within a split nor across both."""
    images = np.concatenate([one.images for one in drawn.values()]).reshape(1200, -1)
    assert len(np.unique(images, axis=0)) == 1200
    assert drawn["train"].fingerprint() != drawn["val"].fingerprint()
    assert all(np.bincount(one.labels).tolist() == [60] * 10 for one in drawn.values())


@pytest.mark.parametrize("size", [8, 20, 33])
def test_other_sizes(size):
    images = glyphs.render_glyphs("train", 20, size).images
    assert images.shape == (20, size, size, 3)
    assert images.std(axis=(1, 2, 3)).min() > 10, "an image is blank"


def test_no_linear_model_does_well():
    """Ridge regression on the pixels, with the best of several penalties, has over 50% error."""
    train, val = glyphs.render_glyphs("train", 3000, 20), glyphs.render_glyphs("val", 500, 20)

    def features(images: ArrayDataset) -> np.ndarray:
        pixels = images.images.reshape(len(images), -1).astype(np.float64) / 128 - 1
        return np.hstack([pixels, np.ones((len(images), 1))])

    x, targets = features(train), np.eye(10)[train.labels]
    errors = []
    for penalty in (1e1, 1e2, 1e3, 1e4):
        weights = np.linalg.solve(x.T @ x + penalty * np.eye(x.shape[1]), x.T @ targets)
        errors.append(np.mean((features(val) @ weights).argmax(1) != val.labels))
    assert min(errors) > 0.5
