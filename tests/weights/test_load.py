"""A run that starts from trained weights: all of them, other classes, parts that stay (model.pretrained)."""

import sys

import pytest
import torch
from commands import ROOT, call, message
from safetensors import safe_open
from safetensors.torch import save_file

import train
from resnext.config import read_config
from resnext.engine.checkpoint import read_checkpoint
from resnext.engine.train_state import build_train_state
from resnext.engine.trainer import train_step
from resnext.models.block_forms import convert_form
from resnext.weights.load import load_weights

sys.path.insert(0, str(ROOT / "scripts"))
import export


def assert_close(model, reference, tolerance):
    for (name, a), b in zip(model.named_parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


def load_pretrained(tmp_path, finished_run, *overrides: str):
    arguments = ["--config", finished_run / "config.yaml", "--output", tmp_path / "new"]
    settings = [f"model.pretrained={finished_run}", "train.epochs=1", "optimizer.lr=1e-9", *overrides]
    result = call(train.main, *arguments, *settings)
    return result, load_weights(finished_run)[0]


def test_a_run_starts_from_the_weights_of_another(tmp_path, finished_run):
    result, before = load_pretrained(tmp_path, finished_run)
    assert result.status == 0, result.error
    assert "last layer included" in result.output
    after = load_weights(tmp_path / "new")[0]
    assert_close(after, before, 1e-6)  # at a rate of 1e-9 nothing moves
    resumed = call(train.main, "--resume", tmp_path / "new", "train.epochs=2")
    assert resumed.status == 0 and "starting from the weights" not in resumed.output


def test_other_classes_get_a_new_last_layer(tmp_path, finished_run, folder_run):
    pictures = folder_run.parent / "pictures"
    keys = ["data.dataset=folder", f"data.dir={pictures}", "data.train_images=null", "data.val_images=null"]
    result, before = load_pretrained(tmp_path, finished_run, *keys, "data.mean=null", "data.std=null")
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
    result, _ = load_pretrained(tmp_path, finished_run, *overrides)
    text = message(result)
    assert all(word in text for word in words), text
    assert not (tmp_path / "new").exists()


# ---------------------------------------------------------------------------- parts of the network


def tensors(model, frozen):
    """Parameters and statistics of the stem and first stage, or of all others."""
    parts = ("conv1", "bn1", "layer1.")
    return {key: value for key, value in model.state_dict().items() if key.startswith(parts) == frozen}


@pytest.mark.parametrize(
    "extra", [[], ["train.ema_decay=0.5", "train.accumulation_steps=2", "train.bn_group=4"]]
)
def test_frozen_stages_stay_to_the_bit(tmp_path, finished_run, extra):
    settings = ["train.frozen_stages=1", "optimizer.lr=0.1", *extra]
    result, before = load_pretrained(tmp_path, finished_run, *settings)
    assert result.status == 0, result.error
    after = load_weights(tmp_path / "new")[0]
    assert all(torch.equal(value, tensors(before, True)[key]) for key, value in tensors(after, True).items())
    assert not any(
        torch.equal(value, tensors(before, False)[key]) for key, value in tensors(after, False).items()
    )
    assert call(train.main, "--resume", tmp_path / "new", "train.epochs=2").status == 0
    again = load_weights(tmp_path / "new")[0]
    assert all(torch.equal(value, tensors(before, True)[key]) for key, value in tensors(again, True).items())
    text = message(call(train.main, "--resume", tmp_path / "new", "train.frozen_stages=2"))
    assert text.startswith("train.frozen_stages: ")


def test_the_last_layer_has_a_rate_of_its_own(tmp_path, finished_run):
    """Against a step by hand: SGD's first step is the rate times (1 + momentum) times gradient and decay."""
    config = read_config(finished_run / "config.yaml", ["optimizer.head_lr=0.03"])
    steps = {}
    for head_lr in ("0.03", "null"):
        config = read_config(
            finished_run / "config.yaml", ["optimizer.lr=0.01", f"optimizer.head_lr={head_lr}"]
        )
        training = build_train_state(config, tuple("0123456789"), torch.device("cpu"), {})
        training.model.train()
        before = {name: p.detach().clone() for name, p in training.model.named_parameters()}
        generator = torch.Generator().manual_seed(0)
        pictures, labels = torch.randn(16, 3, 8, 8, generator=generator), torch.arange(16) % 10
        train_step(training, pictures, labels, rate=0.005)  # half-way down a schedule
        steps[head_lr] = {name: p.detach() - before[name] for name, p in training.model.named_parameters()}
    for name, step in steps["null"].items():
        factor = 3 if name.startswith("fc.") else 1
        torch.testing.assert_close(steps["0.03"][name], factor * step, rtol=1e-3, atol=1e-7)


def test_a_rate_of_the_last_layer_survives_a_resume(tmp_path, finished_run):
    settings = ["optimizer.head_lr=0.03", "optimizer.norm_weight_decay=0"]
    assert load_pretrained(tmp_path, finished_run, *settings, "optimizer.lr=0.01")[0].status == 0
    assert call(train.main, "--resume", tmp_path / "new", "train.epochs=2").status == 0
    groups = read_checkpoint(tmp_path / "new" / "checkpoints" / "last.pt")["optimizer"]["param_groups"]
    assert [(group["weight_decay"], group["lr_scale"]) for group in groups] == [(1e-4, 1), (0, 1), (1e-4, 3)]
    text = message(call(train.main, "--resume", tmp_path / "new", "optimizer.head_lr=null"))
    assert text.startswith("optimizer.head_lr: ")


def test_weights_of_another_program_and_form(tmp_path, finished_run):
    """A state_dict without names of classes keeps its last layer; form C becomes form B."""
    model, _ = load_weights(finished_run)
    torch.save(model.state_dict(), tmp_path / "w.pth")
    settings = [f"model.pretrained={tmp_path / 'w.pth'}", "model.block=B"]
    result, before = load_pretrained(tmp_path, finished_run, *settings)
    assert result.status == 0, result.error
    assert "(torchvision or timm), last layer included (the file names no classes" in result.output
    assert "warning: they are meant for data.mean=[125.3,123.0,113.9] data.std" in result.output
    after, info = load_weights(tmp_path / "new")
    assert info.config.model.block == "B"
    state = convert_form(after.state_dict(), 1, "B", "C")
    for name, parameter in before.named_parameters():  # at a rate of 1e-9 nothing moves
        torch.testing.assert_close(state[name], parameter, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", [torch.float64, torch.float16, torch.float8_e4m3fn], ids=str)
def test_own_files_in_other_types(tmp_path, finished_run, kind):
    """A checkpoint and an exported file that somebody has cast are read as float32, of the rounded values."""

    def cast(state):
        return {key: value.to(kind) if value.is_floating_point() else value for key, value in state.items()}

    content = read_checkpoint(finished_run / "checkpoints" / "best.pt")
    expected = {key: value.to(content["model"][key]) for key, value in cast(content["model"]).items()}
    torch.save(content | {"model": cast(content["model"])}, tmp_path / "w.pt")
    exported = tmp_path / "w.safetensors"
    assert call(export.main, finished_run, exported).status == 0
    with safe_open(exported, "pt") as file:
        metadata, state = file.metadata(), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    save_file(cast(state), exported, metadata)
    for path in (tmp_path / "w.pt", exported):
        model, info = load_weights(path)
        assert info.origin == "this program" and info.classes == tuple("0123456789")
        for key, value in model.state_dict().items():
            assert value.dtype == expected[key].dtype and torch.equal(value, expected[key]), key


@pytest.mark.parametrize("form", ["C", "B"])
def test_a_file_without_a_last_layer(tmp_path, finished_run, folder_run, form):
    """Its backbone stays as it is, to the bit; the last layer is a new one that learns."""
    backbone = load_weights(finished_run)[0].state_dict()
    del backbone["fc.weight"], backbone["fc.bias"]
    torch.save(backbone, tmp_path / "w.pth")
    keys = ["data.dataset=folder", f"data.dir={folder_run.parent / 'pictures'}", f"model.block={form}"]
    keys += ["data.train_images=null", "data.val_images=null", "train.frozen_stages=3", "train.ema_decay=0.5"]
    result, _ = load_pretrained(tmp_path, finished_run, *keys, f"model.pretrained={tmp_path / 'w.pth'}")
    assert result.status == 0, result.error
    assert "(torchvision or timm), a new last layer of 2 classes (the file has none)" in result.output
    after = load_weights(tmp_path / "new")[0]
    assert after.fc.weight.shape == (2, 1024)
    state = convert_form(after.state_dict(), 1, form, "C")
    assert all(torch.equal(value, state[key]) for key, value in backbone.items())


def test_files_of_before_the_key_had_its_name(tmp_path, finished_run):
    text = (finished_run / "config.yaml").read_text()
    lines = [line for line in text.splitlines() if not line.startswith("  pretrained:")]
    old = "\n".join(lines).replace("\ntrain:", f"\ntrain:\n  weights: {finished_run}")
    (tmp_path / "old.yaml").write_text(old)
    assert read_config(tmp_path / "old.yaml").model.pretrained == str(finished_run)


def test_a_new_last_layer_for_classes_that_fit(tmp_path, finished_run):
    result, before = load_pretrained(tmp_path, finished_run, "model.reset_classifier=true")
    assert result.status == 0 and "a new last layer of 10 classes" in result.output
    after = load_weights(tmp_path / "new")[0]
    assert not torch.equal(after.fc.weight, before.fc.weight)
    after.fc = before.fc
    assert_close(after, before, 1e-6)
    assert call(train.main, "--resume", tmp_path / "new", "train.epochs=2").status == 0
