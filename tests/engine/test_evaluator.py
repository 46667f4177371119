"""Error counts against numpy's sorting: every image once, integers, any batch size and number of classes."""

from contextlib import nullcontext

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


def random_logits(images, classes, seed=0):
    """(logits float64 without ties, labels): about a third of the labels are predicted first."""
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


def counts(result):
    return result.images, result.top1_errors, result.top5_errors


def batches(outputs, labels, size, crops=1):
    inputs, labels = torch.as_tensor(outputs), torch.as_tensor(labels)
    return list(zip(inputs.split(size * crops), labels.split(size), strict=True))


class Identity(nn.Module):
    """A model whose output is its input, in some precision."""

    def __init__(self, dtype=torch.float64):
        super().__init__()
        self.dtype = dtype

    def forward(self, x):
        assert not self.training and not torch.is_grad_enabled()
        return x.to(self.dtype)


@pytest.mark.parametrize("classes", [1, 2, 4, 5, 6, 100])
def test_counts_are_exact(classes):
    outputs, labels = random_logits(101, classes)
    images, top1, top5, loss = reference(outputs, labels)
    assert top5 == 0 if classes <= 5 else 0 < top5 < top1
    found = count_correct(torch.from_numpy(outputs), torch.from_numpy(labels))
    assert found.dtype == torch.int64 and found.tolist() == [images - top1, images - top5]
    for size in (1, 7, 100, 101, 1000):
        result = evaluate(Identity(), batches(outputs, labels, size), nullcontext)
        assert counts(result) == (images, top1, top5)
        assert all(type(n) is int for n in counts(result))
        assert result.loss == pytest.approx(loss, rel=1e-12)
        assert (result.top1_error, result.top5_error) == (100 * top1 / 101, 100 * top5 / 101)


def test_counts_by_hand():
    output = torch.tensor([[6.0, 5, 4, 3, 2, 1]] * 6)
    assert count_correct(output, torch.arange(6)).tolist() == [1, 5]
    assert count_correct(output[:, :3], torch.tensor([0, 1, 2, 2, 0, 0])).tolist() == [3, 6]
    output = torch.tensor([[0.0, 1.0], [0.0, 1.0], [9.0, 0.0]])  # sums of crops count, not votes
    assert count_correct(sum_crops(output, 3), torch.tensor([0])).tolist() == [1, 1]


@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-6), (torch.bfloat16, 0.02)])
def test_loss_of_lower_precisions(dtype, bound):
    outputs, labels = random_logits(1000, 10)
    result = evaluate(Identity(dtype), batches(outputs, labels, 96), nullcontext)
    assert result.loss == pytest.approx(reference(outputs, labels)[3], rel=bound)
    # Rounded logits are summed without further loss: the same rounding in float64 agrees.
    rounded = torch.from_numpy(outputs).to(dtype).double().numpy()
    assert result.loss == pytest.approx(reference(rounded, labels)[3], rel=1e-6)


def test_promotion_to_float32():
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        assert promote_to_float32(torch.ones(2, dtype=dtype)).dtype == torch.float32
    assert promote_to_float32(torch.ones(2, dtype=torch.float64)).dtype == torch.float64


def test_many_images_lose_no_count():
    """Counts and loss stay exact where float32 sums would not (2**24 and more)."""
    outputs = torch.tensor([[1.0, 0.0]]).expand(2**22, 2)
    labels = torch.zeros(2**22, dtype=torch.int64)
    parts = [(outputs, labels)] * 5 + [(outputs[:1], labels[:1] + 1)]
    result = evaluate(Identity(), parts, nullcontext)
    assert (result.images, result.top1_errors) == (5 * 2**22 + 1, 1)
    assert result.loss == pytest.approx(np.log1p(np.exp(-1)), rel=1e-6)


# ---------------------------------------------------------------------------- crops, columns, predictions


@pytest.mark.parametrize("size", [1, 4, 13])
@pytest.mark.parametrize("columns", [None, [3], [1, 4, 19], list(range(12))])
@pytest.mark.parametrize("crops", [1, 10])
def test_crops_columns_and_predictions(crops, columns, size):
    """Sums are ranked; the loss is that of their mean; other outputs are as good as minus infinity."""
    generator = np.random.default_rng(3)
    outputs = generator.normal(size=(13 * crops, 20))
    labels = generator.integers(20 if columns is None else len(columns), size=13)
    np.testing.assert_allclose(
        sum_crops(torch.from_numpy(outputs), crops), outputs.reshape(13, crops, 20).sum(1), atol=1e-13
    )
    summed = outputs.reshape(13, crops, 20).sum(1)[:, columns if columns else slice(None)]
    parts, recorder = batches(outputs, labels, size, crops), PredictionCollector()
    options = {"crops": crops, "columns": columns and torch.tensor(columns)}
    result = evaluate(Identity(), parts, nullcontext, **options, recorder=recorder)
    assert evaluate(Identity(), parts, nullcontext, **options) == result, "recording changes nothing"
    loss = reference(summed / crops, labels)[3]
    assert counts(result) == reference(summed, labels)[:3]
    assert result.loss == pytest.approx(loss, rel=1e-12)
    found = recorder.predictions()
    np.testing.assert_array_equal(found.top, np.argsort(-summed, axis=1, kind="stable")[:, :5])
    np.testing.assert_array_equal(found.labels, labels)
    shares = np.exp(summed / crops)
    np.testing.assert_allclose(found.confidence, shares.max(1) / shares.sum(1), rtol=1e-12)
    assert found.score(np.arange(13)).loss == pytest.approx(loss, rel=1e-12)
    for some in (np.arange(13), np.array([2, 3, 11])):
        part = found.score(some)
        assert counts(part) == reference(summed[some], labels[some])[:3]
        assert all(type(n) is int for n in counts(part))


def test_sums_are_ranked_instead_of_their_rounded_means():
    """Two sums may differ in the last bit though their tenths are equal."""
    values = torch.arange(10.0 * 2**20, 10.0 * 2**20 + 64)
    pairs = torch.stack([values, values + 1], 1)
    assert (pairs[:, 0] / 10 == pairs[:, 1] / 10).any()
    crops = torch.zeros(len(pairs), 10, 2)
    crops[:, 4] = pairs
    parts = [(crops.flatten(0, 1), torch.ones(len(pairs), dtype=torch.int64))]
    assert evaluate(Identity(torch.float32), parts, nullcontext, crops=10).top1_errors == 0


def test_half_precision_crops_are_summed_in_float32():
    crops = torch.full((10, 2), 2048.0)
    crops[:, 1] += 2  # the sum, 20,500, has a neighbor 16 away in float16
    parts, recorder = [(crops, torch.tensor([1]))], PredictionCollector()
    result = evaluate(Identity(torch.float16), parts, nullcontext, crops=10, recorder=recorder)
    assert result.top1_errors == 0
    assert result.loss == pytest.approx(np.log1p(np.exp(-2)), rel=1e-4)
    assert recorder.predictions().confidence == pytest.approx(1 / (1 + np.exp(-2)), rel=1e-4)


# ---------------------------------------------------------------------------- the evaluation


def test_result_as_a_row():
    row = EvalResult(images=8, top1_errors=3, top5_errors=1, loss=0.5).as_row()
    counted = {"images": 8, "top1_errors": 3, "top5_errors": 1, "loss": 0.5}
    assert row == counted | {"top1_error": 37.5, "top5_error": 12.5}


@pytest.mark.parametrize("after", [0, 1, 3])
def test_stopping_gives_no_result(after):
    calls = []

    def should_stop():
        calls.append(len(calls))
        return len(calls) > after

    parts = batches(*random_logits(40, 10), 10)
    assert evaluate(Identity(), parts, nullcontext, should_stop) is None
    assert len(calls) == after + 1  # asked once per batch
    assert evaluate(Identity(), parts, nullcontext, lambda: False) == evaluate(Identity(), parts, nullcontext)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_evaluation_leaves_a_network_unchanged(precision):
    torch.manual_seed(0)
    model = ResNeXt((1, 1, 1), 2, 4, 10, stem="cifar").train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    parts = [(torch.rand(4, 3, 8, 8), torch.arange(4)), (torch.rand(3, 3, 8, 8), torch.arange(3))]
    result = evaluate(model, parts, lambda: autocast(torch.device("cpu"), precision))
    assert result.images == 7 and not model.training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None and not p.is_inference() for p in model.parameters())


def test_evaluation_does_not_depend_on_the_batch_size():
    torch.manual_seed(0)
    model = ResNeXt((1, 1, 1), 2, 4, 10, stem="cifar").double()
    images, labels = torch.rand(30, 3, 8, 8, dtype=torch.float64), torch.arange(30) % 10
    results = [evaluate(model, batches(images, labels, size), nullcontext) for size in (1, 8, 30)]
    assert len(set(map(counts, results))) == 1
    assert all(r.loss == pytest.approx(results[0].loss, rel=1e-12) for r in results)
