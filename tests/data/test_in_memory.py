"""Datasets in memory: evenly spaced subsets, fingerprints, class counts."""

from dataclasses import replace

import numpy as np
import pytest
from images import noise

from data.datasets import check_classes
from data.in_memory import ArrayDataset, even_indices, subsample
from resnext.errors import UserError


@pytest.mark.parametrize("images", [1, 2, 7, 10, 1000, 50_000, 1_281_167])
@pytest.mark.parametrize("limit", [1, 2, 3, 10, 999, 50_000, None])
def test_even_indices(images, limit):
    found = even_indices(images, limit)
    assert found.dtype == np.int64 and len(found) == min(images, limit or images)
    assert found[0] == 0 and found[-1] < images
    steps = np.diff(found)
    assert not len(steps) or (steps.min() >= 1 and steps.max() - steps.min() <= 1)


@pytest.mark.parametrize("limit", [10, 11, 25, 99])
def test_a_subset_of_a_sorted_dataset_keeps_every_class(limit):
    whole = ArrayDataset(noise(100, 2, 2, 3), np.repeat(np.arange(10), 10), tuple("0123456789"))
    part = subsample(whole, limit)
    counts = np.bincount(part.labels, minlength=10)
    assert counts.min() >= 1 and counts.max() - counts.min() <= 1
    assert part.classes == whole.classes


def test_fingerprint_detects_every_change():
    whole = ArrayDataset(noise(10, 2, 2, 3), np.arange(10), tuple("0123456789"))
    images, labels = whole.images.copy(), whole.labels.copy()
    images[9, 1, 1, 2] ^= 1
    labels[3] = 4
    changed = [
        replace(whole, images=images),
        replace(whole, labels=labels),
        replace(whole, classes=tuple("012345678x")),
        subsample(whole, 9),
    ]
    assert len({whole.fingerprint(), *(one.fingerprint() for one in changed)}) == 5
    copy = ArrayDataset(np.asfortranarray(whole.images), whole.labels[::-1][::-1], whole.classes)
    assert copy.fingerprint() == whole.fingerprint()


def test_check_classes():
    whole = ArrayDataset(noise(2, 2, 2, 3), np.arange(2), ("a", "b"))
    check_classes(None, whole)
    check_classes(2, whole)
    with pytest.raises(UserError, match=r"model\.classes: 3, but the data has 2 classes"):
        check_classes(3, whole)
