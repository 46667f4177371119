"""Intervals, class counts, and confusions against scipy, scikit-learn's numbers, and counting by hand."""

import numpy as np
import pytest
from scipy import stats

from resnext.engine.metrics import most_confused, per_class, precision_recall_f1, wilson_interval


@pytest.mark.parametrize("confidence", [0.9, 0.95, 0.99])
def test_wilson_interval(confidence):
    for count, images in ((0, 1), (1, 1), (3, 10), (10, 10), (1, 1000), (11_182, 50_000), (50_000, 50_000)):
        expected = stats.binomtest(count, images).proportion_ci(confidence, method="wilson")
        low, high = wilson_interval(count, images, confidence)
        assert (low, high) == pytest.approx((expected.low, expected.high), rel=1e-9, abs=1e-15)
        assert 0 <= low <= count / images <= high <= 1


def test_wilson_interval_by_hand():
    """At the bounds, the observed share is z deviations off: (p - x)^2 = z^2 p (1 - p) / n."""
    for bound in wilson_interval(30, 100):
        assert (bound - 0.3) ** 2 == pytest.approx(1.959963984540054**2 * bound * (1 - bound) / 100)
    # Newcombe, Statistics in Medicine 17 (1998), table I, method 3
    assert wilson_interval(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert wilson_interval(15, 148) == pytest.approx((0.0624, 0.1605), abs=5e-5)
    assert wilson_interval(0, 20) == (0, pytest.approx(0.1611, abs=5e-5))
    assert wilson_interval(1, 29) == pytest.approx((0.0061, 0.1718), abs=5e-5)


def test_interval_covers_the_truth_as_often_as_stated():
    """Over all counts of 200 images with an error of 20%, 95% of the probability."""
    counts = np.arange(201)
    bounds = np.array([wilson_interval(int(count), 200) for count in counts])
    covered = (bounds[:, 0] <= 0.2) & (bounds[:, 1] >= 0.2)
    assert stats.binom.pmf(counts[covered], 200, 0.2).sum() == pytest.approx(0.95, abs=0.01)


# labels, predictions, then scikit-learn 1.9's precision_recall_fscore_support(zero_division=0) per class
FOUR = (
    [0, 0, 0, 0, 1, 1, 1, 2, 2, 2, 2, 2, 3, 3],
    [0, 0, 1, 2, 1, 1, 0, 2, 2, 2, 0, 1, 2, 0],
    [[0.4, 0.5, 0.6, 0], [0.5, 0.66666667, 0.6, 0], [0.44444444, 0.57142857, 0.6, 0]],
)
TWO = (
    [0] * 59 + [1] * 71,
    [0] * 56 + [1] * 3 + [1] * 69 + [0] * 2,
    [[0.96551724, 0.95833333], [0.94915254, 0.97183099], [0.95726496, 0.96503497]],
)
# Class 2 is predicted but has no images; class 3 neither.
ABSENT = ([0, 0, 1], [0, 2, 2], [[1, 0, 0, np.nan], [0.5, 0, np.nan, np.nan], [2 / 3, 0, np.nan, np.nan]])


@pytest.mark.parametrize(("labels", "predicted", "expected"), [FOUR, TWO, ABSENT], ids=["4", "2", "absent"])
def test_precision_recall_f1(labels, predicted, expected):
    counts = per_class(np.array(labels), np.array(predicted)[:, None], len(expected[0]))
    np.testing.assert_allclose(precision_recall_f1(counts), expected, atol=1e-8)


@pytest.mark.parametrize("classes", [1, 2, 5, 40])
def test_counts_by_counting(classes):
    generator = np.random.default_rng(classes)
    labels = generator.integers(classes, size=300)
    top = np.stack([generator.permutation(classes)[:5] for _ in labels])
    counts = per_class(labels, top, classes)
    images = list(zip(labels.tolist(), top.tolist(), strict=True))
    for c in range(classes):
        assert counts.images[c] == sum(label == c for label, _ in images)
        assert counts.predicted[c] == sum(first[0] == c for _, first in images)
        assert counts.top1[c] == sum(label == c and first[0] == c for label, first in images)
        assert counts.top5[c] == sum(label == c and c in first for label, first in images)
    confusions = most_confused(labels, top[:, 0], classes)
    pairs = [(label, first[0]) for label, first in images if label != first[0]]
    assert sorted(confusions) == sorted((*pair, pairs.count(pair)) for pair in set(pairs))
    assert [n for *_, n in confusions] == sorted((n for *_, n in confusions), reverse=True)


def test_counts_of_parts_add_up():
    """The counts of several ranks are summed."""
    generator = np.random.default_rng(0)
    labels, top = generator.integers(7, size=100), generator.integers(7, size=(100, 5))
    whole = per_class(labels, top, 7)
    parts = [per_class(labels[rank::3], top[rank::3], 7) for rank in range(3)]
    for name in ("images", "predicted", "top1", "top5"):
        summed = sum(getattr(part, name) for part in parts)
        np.testing.assert_array_equal(summed, getattr(whole, name))
        assert summed.dtype == np.int64


def test_confusions_of_many_classes():
    """Equal counts come in the order of the classes; the pairs of 10 million classes fit into int64."""
    labels = np.array([9_999_999, 9_999_999, 5, 0, 5, 1])
    predicted = np.array([9_999_998, 9_999_998, 3, 7, 5, 0])
    expected = [(9_999_999, 9_999_998, 2), (0, 7, 1), (1, 0, 1), (5, 3, 1)]
    assert most_confused(labels, predicted, 10_000_000) == expected
    assert most_confused(labels, labels, 10_000_000) == []
