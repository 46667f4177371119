"""Error counts against numpy's sorting: every image once, integers, any batch size and class count."""

import contextlib

import numpy as np
import pytest
import torch
from torch import nn

from resnext.engine.evaluator import (
    EvalResult,
    PredictionCollector,
    count_correct,
    evaluate,
    promote_to_float32,
    sum_crops,
)
from resnext.engine.train_state import autocast
from resnext.models.resnext import ResNeXt


def scores(images, classes, seed=0):
    """(outputs float64 without ties, labels): about a third of the labels are the first choice."""
    generator = np.random.default_rng(seed)
    outputs = generator.permutation(images * classes).reshape(images, classes) / (images * classes) * 8
    labels = generator.integers(classes, size=images)
    chosen = generator.random(images) < 0.3
    labels[chosen] = outputs[chosen].argmax(1)
    return outputs, labels


def reference(outputs, labels):
    """(images, top-1 errors, top-min(5, n) errors, mean loss)"""
    ranks = (outputs > outputs[np.arange(len(labels)), labels][:, None]).sum(1)
    shifted = outputs - outputs.max(1, keepdims=True)
    losses = np.log(np.exp(shifted).sum(1)) - shifted[np.arange(len(labels)), labels]
    return len(labels), int((ranks >= 1).sum()), int((ranks >= 5).sum()), losses.mean()


def batches(outputs, labels, size):
    inputs, labels = torch.from_numpy(outputs), torch.from_numpy(labels)
    return list(zip(inputs.split(size), labels.split(size), strict=True))


class Passing(nn.Module):
    """Its output is its input, in some precision."""

    def __init__(self, dtype=torch.float64):
        super().__init__()
        self.dtype = dtype

    def forward(self, x):
        assert not self.training and not torch.is_grad_enabled()
        return x.to(self.dtype)


@pytest.mark.parametrize("size", [1, 7, 64, 100, 101, 1000])
@pytest.mark.parametrize("classes", [1, 2, 3, 4, 5, 6, 10, 100])
def test_counts_are_exact(classes, size):
    outputs, labels = scores(101, classes)
    score = evaluate(Passing(), batches(outputs, labels, size), contextlib.nullcontext)
    images, top1, top5, loss = reference(outputs, labels)
    assert (score.images, score.top1_errors, score.top5_errors) == (images, top1, top5)
    assert all(type(n) is int for n in (score.images, score.top1_errors, score.top5_errors))
    assert score.loss == pytest.approx(loss, rel=1e-12)
    assert score.top1_error == 100 * top1 / 101 and score.top5_error == 100 * top5 / 101
    assert top5 == 0 if classes <= 5 else 0 < top5 < top1


@pytest.mark.parametrize("classes", [1, 3, 5, 10])
def test_hits(classes):
    outputs, labels = scores(50, classes, seed=1)
    images, top1, top5, _ = reference(outputs, labels)
    found = count_correct(torch.from_numpy(outputs), torch.from_numpy(labels))
    assert found.dtype == torch.int64 and found.tolist() == [images - top1, images - top5]


def test_hits_by_hand():
    output = torch.tensor([[6.0, 5, 4, 3, 2, 1]] * 6)
    assert count_correct(output, torch.arange(6)).tolist() == [1, 5]
    assert count_correct(output[:, :3], torch.tensor([0, 1, 2, 2, 0, 0])).tolist() == [3, 6]


@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-6), (torch.bfloat16, 0.02)])
def test_loss_of_lower_precisions(dtype, bound):
    outputs, labels = scores(1000, 10)
    score = evaluate(Passing(dtype), batches(outputs, labels, 96), contextlib.nullcontext)
    assert score.loss == pytest.approx(reference(outputs, labels)[3], rel=bound)
    # Rounded scores are summed without further loss: the same rounding in float64 agrees.
    rounded = torch.from_numpy(outputs).to(dtype).double().numpy()
    assert score.loss == pytest.approx(reference(rounded, labels)[3], rel=1e-6)


def test_at_least_float32():
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        assert promote_to_float32(torch.ones(2, dtype=dtype)).dtype == torch.float32
    assert promote_to_float32(torch.ones(2, dtype=torch.float64)).dtype == torch.float64


def test_many_images_lose_no_count():
    """Counts and loss stay exact where float32 sums would not (2**24 and more)."""
    outputs = torch.tensor([[1.0, 0.0]]).expand(2**22, 2)
    labels = torch.zeros(2**22, dtype=torch.int64)
    parts = [(outputs, labels)] * 5 + [(outputs[:1], labels[:1] + 1)]
    score = evaluate(Passing(), parts, contextlib.nullcontext)
    assert (score.images, score.top1_errors) == (5 * 2**22 + 1, 1)
    assert score.loss == pytest.approx(np.log1p(np.exp(-1)), rel=1e-6)


# ---------------------------------------------------------------------------- crops


@pytest.mark.parametrize("crops", [1, 2, 10])
@pytest.mark.parametrize("size", [1, 4, 13])
def test_ten_crops_are_summed(crops, size):
    generator = np.random.default_rng(2)
    outputs, labels = generator.normal(size=(13 * crops, 20)), generator.integers(20, size=13)
    summed = np.stack([sum(outputs[i * crops + j] for j in range(crops)) for i in range(13)])
    np.testing.assert_allclose(sum_crops(torch.from_numpy(outputs), crops), summed, rtol=1e-13, atol=1e-13)

    class Summing(nn.Module):
        def forward(self, x):
            return sum_crops(x, crops)

    parts = zip(
        torch.from_numpy(outputs).split(size * crops), torch.from_numpy(labels).split(size), strict=True
    )
    score = evaluate(Summing(), parts, contextlib.nullcontext)
    images, top1, top5, loss = reference(summed, labels)
    assert (score.images, score.top1_errors, score.top5_errors) == (images, top1, top5)
    assert score.loss == pytest.approx(loss, rel=1e-12)


def test_crops_count_raw_scores_not_votes():
    output = torch.tensor([[0.0, 1.0], [0.0, 1.0], [9.0, 0.0]])
    assert count_correct(sum_crops(output, 3), torch.tensor([0])).tolist() == [1, 1]


@pytest.mark.parametrize("size", [1, 4, 13])
@pytest.mark.parametrize("columns", [None, [3], [1, 4, 19], list(range(12))])
@pytest.mark.parametrize("crops", [1, 10])
def test_crops_and_columns(crops, columns, size):
    """Sums are ranked; the loss is that of their mean; outputs left out are as good as minus infinity."""
    generator = np.random.default_rng(3)
    outputs = generator.normal(size=(13 * crops, 20))
    labels = generator.integers(20 if columns is None else len(columns), size=13)
    summed = outputs.reshape(13, crops, 20).sum(1)[:, columns if columns else slice(None)]
    inputs = torch.from_numpy(outputs).split(size * crops)
    parts = list(zip(inputs, torch.from_numpy(labels).split(size), strict=True))
    recorder = PredictionCollector()
    score = evaluate(
        Passing(),
        parts,
        contextlib.nullcontext,
        crops=crops,
        columns=columns and torch.tensor(columns),
        recorder=recorder,
    )
    images, top1, top5, _ = reference(summed, labels)
    loss = reference(summed / crops, labels)[3]
    assert (score.images, score.top1_errors, score.top5_errors) == (images, top1, top5)
    assert score.loss == pytest.approx(loss, rel=1e-12)
    found = recorder.predictions()
    order = np.argsort(-summed, axis=1, kind="stable")[:, :5]
    np.testing.assert_array_equal(found.top, order)
    np.testing.assert_array_equal(found.labels, labels)
    split_batch = np.exp(summed / crops)
    np.testing.assert_allclose(found.confidence, (split_batch.max(1) / split_batch.sum(1)), rtol=1e-12)
    whole = found.score(np.arange(13))
    assert (whole.top1_errors, whole.top5_errors) == (top1, top5)
    assert whole.loss == pytest.approx(loss, rel=1e-12)
    some = np.array([2, 3, 11])
    images, top1, top5, _ = reference(summed[some], labels[some])
    part = found.score(some)
    assert (part.images, part.top1_errors, part.top5_errors) == (images, top1, top5)
    assert all(type(n) is int for n in (part.images, part.top1_errors, part.top5_errors))


def test_sums_are_ranked_and_not_their_rounded_means():
    """Two sums may differ in the last bit though their tenths are equal."""
    values = torch.arange(10.0 * 2**20, 10.0 * 2**20 + 64)
    pairs = torch.stack([values, values + 1], 1)
    assert (pairs[:, 0] / 10 == pairs[:, 1] / 10).any()
    crops = torch.zeros(len(pairs), 10, 2)
    crops[:, 4] = pairs
    parts = [(crops.flatten(0, 1), torch.ones(len(pairs), dtype=torch.int64))]
    assert evaluate(Passing(torch.float32), parts, contextlib.nullcontext, crops=10).top1_errors == 0


def test_half_precision_crops_are_summed_in_float32():
    crops = torch.full((10, 2), 2048.0)
    crops[:, 1] += 2  # the sum, 20,500, has a neighbour 16 away in float16
    recorder = PredictionCollector()
    parts = [(crops, torch.tensor([1]))]
    score = evaluate(Passing(torch.float16), parts, contextlib.nullcontext, crops=10, recorder=recorder)
    assert score.top1_errors == 0
    assert score.loss == pytest.approx(np.log1p(np.exp(-2)), rel=1e-4)
    assert recorder.predictions().confidence == pytest.approx(1 / (1 + np.exp(-2)), rel=1e-4)


def test_a_recorder_changes_no_score():
    outputs, labels = scores(101, 10)
    parts = batches(outputs, labels, 16)
    plain = evaluate(Passing(torch.float32), parts, contextlib.nullcontext)
    assert (
        evaluate(Passing(torch.float32), parts, contextlib.nullcontext, recorder=PredictionCollector())
        == plain
    )


# ---------------------------------------------------------------------------- the evaluation


def test_score_as_a_row():
    row = EvalResult(images=8, top1_errors=3, top5_errors=1, loss=0.5).as_row()
    assert row == {
        "images": 8,
        "top1_errors": 3,
        "top5_errors": 1,
        "loss": 0.5,
        "top1_error": 37.5,
        "top5_error": 12.5,
    }


@pytest.mark.parametrize("after", [0, 1, 3])
def test_stopping_gives_no_score(after):
    calls = []

    def should_stop():
        calls.append(len(calls))
        return len(calls) > after

    outputs, labels = scores(40, 10)
    assert evaluate(Passing(), batches(outputs, labels, 10), contextlib.nullcontext, should_stop) is None
    assert len(calls) == after + 1  # asked once a batch, and no longer


def test_not_stopping():
    outputs, labels = scores(40, 10)
    parts = batches(outputs, labels, 10)
    plain = evaluate(Passing(), parts, contextlib.nullcontext)
    assert evaluate(Passing(), parts, contextlib.nullcontext, lambda: False) == plain


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_evaluation_leaves_a_network_unchanged(precision):
    torch.manual_seed(0)
    model = ResNeXt((1, 1, 1), 2, 4, 10, stem="cifar").train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    parts = [(torch.rand(4, 3, 8, 8), torch.arange(4)), (torch.rand(3, 3, 8, 8), torch.arange(3))]
    device = torch.device("cpu")
    score = evaluate(model, parts, lambda: autocast(device, precision))
    assert score.images == 7 and not model.training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None and not p.is_inference() for p in model.parameters())


def test_evaluation_does_not_depend_on_the_batch_size():
    torch.manual_seed(0)
    model = ResNeXt((1, 1, 1), 2, 4, 10, stem="cifar").double()
    images, labels = torch.rand(30, 3, 8, 8, dtype=torch.float64), torch.arange(30) % 10
    results = [
        evaluate(model, zip(images.split(n), labels.split(n), strict=True), contextlib.nullcontext)
        for n in (1, 8, 30)
    ]
    assert len({(r.images, r.top1_errors, r.top5_errors) for r in results}) == 1
    assert all(r.loss == pytest.approx(results[0].loss, rel=1e-12) for r in results)
