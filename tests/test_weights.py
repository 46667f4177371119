"""A run that starts from the weights of another (model.pretrained)."""

import pytest
import torch
from commands import call, message

import train
from resnext.weights import load_weights


def assert_close(model, reference, tolerance):
    for (name, a), b in zip(model.named_parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


def start_from(tmp_path, finished_run, *overrides: str):
    arguments = ["--config", finished_run / "config.yaml", "--output", tmp_path / "new"]
    settings = [f"model.pretrained={finished_run}", "train.epochs=1", "optimizer.lr=1e-9", *overrides]
    result = call(train.main, *arguments, *settings)
    return result, load_weights(finished_run)[0]


def test_a_run_starts_from_the_weights_of_another(tmp_path, finished_run):
    result, before = start_from(tmp_path, finished_run)
    assert result.status == 0, result.error
    assert "last layer included" in result.output
    after = load_weights(tmp_path / "new")[0]
    assert_close(after, before, 1e-6)  # at a rate of 1e-9 nothing moves
    resumed = call(train.main, "--resume", tmp_path / "new", "train.epochs=2")
    assert resumed.status == 0 and "starting from the weights" not in resumed.output


def test_other_classes_get_a_new_last_layer(tmp_path, finished_run, folder_run):
    pictures = folder_run.parent / "pictures"
    keys = ["data.dataset=folder", f"data.dir={pictures}", "data.train_images=null", "data.val_images=null"]
    result, before = start_from(tmp_path, finished_run, *keys, "data.mean=null", "data.std=null")
    assert result.status == 0, result.error
    assert "a new last layer of 2 classes" in result.output
    after = load_weights(tmp_path / "new")[0]
    assert after.fc.weight.shape[0] == 2
    after.fc = before.fc
    assert_close(after, before, 1e-6)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["model.pretrained=nowhere"], ["nowhere", "no such"]),
        (["model.base_width=2"], ["another architecture"]),
    ],
)
def test_weights_that_cannot_be_used(tmp_path, finished_run, overrides, words):
    result, _ = start_from(tmp_path, finished_run, *overrides)
    text = message(result)
    assert all(word in text for word in words), text
    assert not (tmp_path / "new").exists()
