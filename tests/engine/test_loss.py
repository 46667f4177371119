"""The loss and the hits of a training step, of smoothed and mixed labels."""

import numpy as np
import pytest
import torch

from resnext.config import parse_config
from resnext.engine.train_state import build_train_state
from resnext.engine.trainer import train_step


@pytest.mark.parametrize(
    "smoothing, mixed, parts", [(0.0, False, 1), (0.1, False, 2), (0.0, True, 2), (0.1, True, 1)]
)
def test_loss_of_smoothed_and_mixed_labels(smoothing, mixed, parts):
    """-Σ target·log softmax, a part of the target spread over all classes; the larger share is the hit."""
    config = parse_config(
        f"""
        model: {{stem: cifar, depth: 11, cardinality: 1, base_width: 1}}
        train: {{batch_size: 8, label_smoothing: {smoothing}, accumulation_steps: {parts}}}
        """,
        "test",
    )
    torch.manual_seed(0)
    training = build_train_state(config, tuple("abcdefg"), torch.device("cpu"), {})
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
