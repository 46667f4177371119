"""Runs that start from trained weights (model.pretrained): all of them, other classes, frozen parts."""

import sys

import pytest
import torch
from commands import ROOT, call, message
from safetensors import safe_open
from safetensors.torch import save_file

import train
from resnext import UserError
from resnext.config import read_config
from resnext.engine.checkpoint import read_checkpoint
from resnext.engine.train_state import build_train_state
from resnext.engine.trainer import train_step
from resnext.models.block_forms import convert_form
from resnext.weights.load import load_weights

sys.path.insert(0, str(ROOT / "scripts"))
import export


def assert_close(model, reference):
    """Compare all but the last layer; at a rate of 1e-9 nothing moves."""
    for (name, a), b in zip(model.named_parameters(), reference.parameters(), strict=True):
        if not name.startswith("fc."):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


@pytest.fixture
def start(tmp_path, finished_run):
    """Start the run `new` from the weights of another; return (how it ended, those weights)."""

    def start(*overrides):
        arguments = ["--config", finished_run / "config.yaml", "--output", tmp_path / "new"]
        settings = [f"model.pretrained={finished_run}", "train.epochs=1", "optimizer.lr=1e-9", *overrides]
        return call(train.main, *arguments, *settings), load_weights(finished_run)[0]

    return start


@pytest.fixture
def folder_settings(folder_run):
    """Overrides for the class folders cat and dog."""
    images = folder_run.parent / "pictures"
    return ["data.dataset=folder", f"data.dir={images}", "data.train_images=null", "data.val_images=null"]


def resume(tmp_path, *overrides):
    return call(train.main, "--resume", tmp_path / "new", *overrides)


def test_a_run_starts_from_the_weights_of_another(tmp_path, start):
    result, before = start()
    assert result.status == 0, result.error
    assert "last layer included" in result.output
    after = load_weights(tmp_path / "new")[0]
    assert_close(after, before)
    torch.testing.assert_close(after.fc.weight, before.fc.weight, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(after.fc.bias, before.fc.bias, rtol=1e-6, atol=1e-6)
    resumed = resume(tmp_path, "train.epochs=2")
    assert resumed.status == 0 and "starting from the weights" not in resumed.output


def test_other_classes_get_a_new_last_layer(tmp_path, start, folder_settings):
    result, before = start(*folder_settings, "data.mean=null", "data.std=null")
    assert result.status == 0, result.error
    assert "a new last layer of 2 classes" in result.output
    after = load_weights(tmp_path / "new")[0]
    assert after.fc.weight.shape[0] == 2
    assert_close(after, before)


def test_a_new_last_layer_for_classes_that_match(tmp_path, start):
    result, before = start("model.reset_classifier=true")
    assert result.status == 0 and "a new last layer of 10 classes" in result.output
    after = load_weights(tmp_path / "new")[0]
    assert not torch.equal(after.fc.weight, before.fc.weight)
    assert_close(after, before)
    assert resume(tmp_path, "train.epochs=2").status == 0


@pytest.mark.parametrize(
    ("override", "words"),
    [("model.pretrained=nowhere", "nowhere: no such"), ("model.base_width=2", "another architecture")],
)
def test_weights_that_cannot_be_used(tmp_path, start, override, words):
    assert words in message(start(override)[0])
    assert not (tmp_path / "new").exists()


# ---------------------------------------------------------------------------- parts of the network


@pytest.mark.parametrize(
    "extra", [[], ["train.ema_decay=0.5", "train.accumulation_steps=2", "train.bn_group=4"]]
)
def test_frozen_stages_keep_their_bits(tmp_path, start, extra):
    result, before = start("train.frozen_stages=1", "optimizer.lr=0.1", *extra)
    assert result.status == 0, result.error

    def unchanged():
        after = load_weights(tmp_path / "new")[0].state_dict()
        return {key for key, value in before.state_dict().items() if torch.equal(value, after[key])}

    frozen = {key for key in before.state_dict() if key.startswith(("conv1", "bn1", "layer1."))}
    assert unchanged() == frozen
    assert resume(tmp_path, "train.epochs=2").status == 0
    assert unchanged() >= frozen
    assert message(resume(tmp_path, "train.frozen_stages=2")).startswith("train.frozen_stages: ")


def test_head_lr_is_the_rate_of_the_last_layer(finished_run):
    """The first step of SGD is proportional to the rate."""
    steps = {}
    for head_lr in ("0.03", "null"):
        overrides = ["optimizer.lr=0.01", f"optimizer.head_lr={head_lr}"]
        config = read_config(finished_run / "config.yaml", overrides)
        training = build_train_state(config, tuple("0123456789"), torch.device("cpu"), {})
        training.model.train()
        before = {name: p.detach().clone() for name, p in training.model.named_parameters()}
        generator = torch.Generator().manual_seed(0)
        images, labels = torch.randn(16, 3, 8, 8, generator=generator), torch.arange(16) % 10
        train_step(training, images, labels, rate=0.005)  # halfway down a schedule
        steps[head_lr] = {name: p.detach() - before[name] for name, p in training.model.named_parameters()}
    for name, step in steps["null"].items():
        factor = 3 if name.startswith("fc.") else 1
        torch.testing.assert_close(steps["0.03"][name], factor * step, rtol=1e-3, atol=1e-7)


def test_head_lr_survives_a_resume(tmp_path, start):
    result, _ = start("optimizer.head_lr=0.03", "optimizer.norm_weight_decay=0", "optimizer.lr=0.01")
    assert result.status == 0, result.error
    assert resume(tmp_path, "train.epochs=2").status == 0
    groups = read_checkpoint(tmp_path / "new" / "checkpoints" / "last.pt")["optimizer"]["param_groups"]
    assert [(group["weight_decay"], group["lr_scale"]) for group in groups] == [(1e-4, 1), (0, 1), (1e-4, 3)]
    assert message(resume(tmp_path, "optimizer.head_lr=null")).startswith("optimizer.head_lr: ")


# ---------------------------------------------------------------------------- other files


def test_weights_of_another_program_and_form(tmp_path, start, finished_run):
    """A state_dict without names of classes keeps its last layer; form C becomes form B."""
    torch.save(load_weights(finished_run)[0].state_dict(), tmp_path / "w.pth")
    result, before = start(f"model.pretrained={tmp_path / 'w.pth'}", "model.block=B")
    assert result.status == 0, result.error
    assert "(torchvision or timm), last layer included (the file names no classes" in result.output
    assert "data.mean=[125.3,123.0,113.9] data.std" in result.output
    after, info = load_weights(tmp_path / "new")
    assert info.config.model.block == "B"
    state = convert_form(after.state_dict(), 1, "B", "C")
    for name, parameter in before.named_parameters():
        torch.testing.assert_close(state[name], parameter, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("form", ["C", "B"])
def test_a_file_without_a_last_layer(tmp_path, start, finished_run, folder_settings, form):
    """Its frozen backbone keeps its bits; the last layer is a new one that learns."""
    backbone = load_weights(finished_run)[0].state_dict()
    del backbone["fc.weight"], backbone["fc.bias"]
    torch.save(backbone, tmp_path / "w.pth")
    frozen = ["train.frozen_stages=3", "train.ema_decay=0.5", f"model.pretrained={tmp_path / 'w.pth'}"]
    result, _ = start(*folder_settings, *frozen, f"model.block={form}")
    assert result.status == 0, result.error
    assert "a new last layer of 2 classes (the file has none)" in result.output
    after = load_weights(tmp_path / "new")[0]
    assert after.fc.weight.shape == (2, 1024)
    state = convert_form(after.state_dict(), 1, form, "C")
    assert all(torch.equal(value, state[key]) for key, value in backbone.items())


@pytest.mark.parametrize("kind", [torch.float64, torch.float16, torch.float8_e4m3fn], ids=str)
def test_own_files_in_other_types(tmp_path, finished_run, kind):
    """A checkpoint and an exported file that somebody cast are read as float32, with the rounded values."""

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


def test_errors_in_the_configuration_of_own_files_name_the_file(tmp_path, finished_run):
    content = read_checkpoint(finished_run / "checkpoints" / "best.pt")
    for change, words in (("model: {depth: 12}", "model.depth: "), ("model: {dept: 1}", "model.dept")):
        torch.save(content | {"config": change}, tmp_path / "w.pt")
        with pytest.raises(UserError, match=words) as caught:
            load_weights(tmp_path / "w.pt")
        assert str(caught.value).startswith(f"{tmp_path / 'w.pt'}: ")


def test_the_former_name_of_the_key(tmp_path, finished_run):
    lines = (finished_run / "config.yaml").read_text().splitlines()
    old = "\n".join(line for line in lines if not line.startswith("  pretrained:"))
    (tmp_path / "old.yaml").write_text(old.replace("\ntrain:", f"\ntrain:\n  weights: {finished_run}"))
    assert read_config(tmp_path / "old.yaml").model.pretrained == str(finished_run)
