"""export.py: what other programs make of the files, and the mistakes that it refuses."""

import errno
import importlib.util
import json
import os
import sys

import pytest
import torch
from commands import ROOT, call, message
from torch import nn
from torchvision.models.resnet import Bottleneck, ResNet

from resnext import load_weights
from resnext.config import parse_config, to_yaml
from resnext.engine.checkpoint import write_checkpoint
from resnext.models.resnext import ResNeXt, build_model

sys.path.insert(0, str(ROOT / "scripts"))
import export

SMALL = (
    "model: {{stages: [1, 1, 1, 1], cardinality: 4, base_width: 8, block: {}}}\ndata: {{image_size: 48}}\n"
)


def stir(model):
    """BatchNorms as after a training."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                for tensor in (module.weight, module.running_var):
                    tensor.uniform_(0.5, 1.5)
                for tensor in (module.bias, module.running_mean):
                    tensor.uniform_(-0.3, 0.3)
    return model


def write_weights(folder, text, classes):
    """A checkpoint as train.py leaves it, of a network that was not trained."""
    config = parse_config(text, "test")
    torch.manual_seed(5)
    model = stir(build_model(config.model, classes)).to(memory_format=torch.channels_last)
    content = {
        "model": model.state_dict(),
        "optimizer": {},
        "scaler": None,
        "ema": None,
        "progress": {"epoch": 2, "step": 0, "global_step": 7, "rows": 0},
        "rng": {},
        "config": to_yaml(config),
        "classes": [f"class {number}" for number in range(classes)],
        "preprocessing": {},
        "versions": {},
    }
    write_checkpoint(content, folder, ["best.pt"])
    return folder / "best.pt"


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Weights of an ImageNet network with four blocks in forms A, B and C."""
    folder = tmp_path_factory.mktemp("small")
    return {form: write_weights(folder / form, SMALL.format(form), 5) for form in "ABC"}


def run(*arguments):
    result = call(export.main, *arguments)
    assert result.status == 0, result.error
    return result.output


def pictures(count, size=48):
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(8))


def assert_same_logits(network, path, x):
    original, _ = load_weights(path)
    with torch.no_grad():
        torch.testing.assert_close(network(x), original(x), rtol=1e-5, atol=1e-5)


# ---------------------------------------------------------------------------- weights


@pytest.mark.parametrize("form", "ABC")
def test_torchvision_reads_a_pth(small, tmp_path, form):
    target = tmp_path / "small.pth"
    said = run(small[form], target)
    assert "torchvision's ResNet" in said and "of the largest" in said and "5 classes" in said
    state = torch.load(target, weights_only=True)
    assert type(state) is dict and all(tensor.is_contiguous() for tensor in state.values())
    network = ResNet(Bottleneck, [1, 1, 1, 1], num_classes=5, groups=4, width_per_group=8)
    network.load_state_dict(state, strict=True)
    assert list(network.state_dict()) == list(state)
    assert_same_logits(network.eval(), small[form], pictures(3))
    assert_same_logits(load_weights(target)[0], small[form], pictures(3))


def test_timm_reads_a_pth(tmp_path):
    timm = pytest.importorskip("timm")
    source = write_weights(tmp_path / "run", "data: {image_size: 64}", 3)
    run(source, tmp_path / "x50.pth")
    network = timm.create_model("resnext50_32x4d", pretrained=False, num_classes=3)
    network.load_state_dict(torch.load(tmp_path / "x50.pth", weights_only=True), strict=True)
    assert_same_logits(network.eval(), source, pictures(2, 64))


def test_safetensors_know_the_rest(small, tmp_path):
    safetensors = pytest.importorskip("safetensors")
    text = SMALL.format("B, pretrained: elsewhere").replace("image_size: 48", "image_size: 48, dir: mine")
    source = write_weights(tmp_path / "run", text, 5)
    target = tmp_path / "small.safetensors"
    run(source, target)
    with safetensors.safe_open(target, "pt") as file:
        facts = file.metadata()
        state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, not a dict
    assert facts["format"] == "resnext weights"
    assert facts["architecture"] == "resnext-14 (4x8d)"
    assert facts["origin"] == "this program, weights after 7 steps"
    assert json.loads(facts["classes"]) == [f"class {number}" for number in range(5)]
    assert (json.loads(facts["mean"]), facts["image_size"], facts["resize"]) == (
        [123.675, 116.28, 103.53],
        "48",
        "54",
    )
    config = parse_config(facts["config"], "metadata")
    assert config.model.classes == 5 and config.model.block == "C"
    assert config.data.dir is None and config.model.pretrained is None  # paths of this machine
    network = build_model(config.model, 5)
    network.load_state_dict(state)
    assert_same_logits(network.eval(), source, pictures(2))
    again, info = load_weights(target)
    assert info.classes == tuple(json.loads(facts["classes"])) and info.config == config
    assert_same_logits(again, source, pictures(2))


def test_networks_that_torchvision_has_not(finished_run, tmp_path):
    said = run(finished_run, tmp_path / "tiny.pth")
    assert "torchvision has no such network" in said
    network = ResNeXt((1, 1, 1), 1, 1, 10, stem="cifar", shortcut="A")
    network.load_state_dict(torch.load(tmp_path / "tiny.pth", weights_only=True))
    assert_same_logits(network.eval(), finished_run, pictures(2, 8))


# ---------------------------------------------------------------------------- programs


def test_pt2_takes_any_batch(small, tmp_path):
    target = tmp_path / "small.pt2"
    assert "read back by torch.export" in run(small["A"], target)
    extra = {"resnext.json": ""}
    program = torch.export.load(target, extra_files=extra)
    assert json.loads(extra["resnext.json"])["architecture"] == "resnext-14 (4x8d)"
    for count in (1, 3):
        assert_same_logits(program.module(), small["A"], pictures(count))


def test_folded_pt2(small, tmp_path):
    target = tmp_path / "small.pt2"
    run(small["C"], target, "--fold-batchnorm", "--image-size", "40")
    program = torch.export.load(target)
    assert not any("norm" in str(node.target) for node in program.graph.nodes)
    assert_same_logits(program.module(), small["C"], pictures(3, 40))


@pytest.mark.parametrize("options", [[], ["--fold-batchnorm"]])
def test_onnxruntime_takes_any_batch(small, tmp_path, options):
    for name in ("onnx", "onnxscript"):
        pytest.importorskip(name)
    onnxruntime = pytest.importorskip("onnxruntime")
    target = tmp_path / "small.onnx"
    assert "read back by onnxruntime" in run(small["B"], target, *options)
    assert list(tmp_path.iterdir()) == [target]  # weights included
    session = onnxruntime.InferenceSession(target)
    assert session.get_modelmeta().custom_metadata_map["image_size"] == "48"

    def network(x):
        return torch.from_numpy(session.run(None, {"pictures": x.numpy()})[0])

    for count in (1, 5):
        assert_same_logits(network, small["B"], pictures(count))


@pytest.mark.parametrize("shortcut", "ABC")
@pytest.mark.parametrize(
    ("stem", "preactivation", "left"),
    [("imagenet", False, 0), ("cifar", False, 0), ("imagenet", True, 4), ("cifar", True, 4)],
)
def test_folding_changes_nothing(stem, preactivation, left, shortcut):
    """Of pre-activation networks bn0 and final_bn are left."""
    stages = (1, 1, 1) if stem == "cifar" else (1, 1, 1, 1)
    torch.manual_seed(3)
    model = ResNeXt(stages, 2, 8, 6, stem=stem, preactivation=preactivation, shortcut=shortcut)
    model = stir(model).double().eval()
    folded = export.fold_batchnorm(model)
    names = [name for name, module in folded.named_modules() if isinstance(module, nn.BatchNorm2d)]
    assert len(names) == left and all(name.endswith(("bn0", "final_bn")) for name in names)
    assert any(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    x = pictures(2, 20).double()
    with torch.no_grad():
        torch.testing.assert_close(folded(x), model(x), rtol=1e-12, atol=1e-12)


# ---------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("x.bin", [], ".safetensors"),
        ("x", [], "must end in"),
        ("no/x.pth", [], "folder does not exist"),
        ("there.pth", [], "exists already"),
        ("x.pth", ["--fold-batchnorm"], "--fold-batchnorm: is for .pt2 and .onnx"),
        ("x.safetensors", ["--image-size", "64"], "--image-size: is for"),
        ("x.pt2", ["--image-size", "4"], "from 8 to 4096"),
    ],
)
def test_mistakes(small, tmp_path, name, options, words):
    (tmp_path / "there.pth").write_text("mine")
    assert words in message(call(export.main, small["C"], tmp_path / name, *options))
    assert [path.name for path in tmp_path.iterdir()] == ["there.pth"]
    assert (tmp_path / "there.pth").read_text() == "mine"


def test_what_is_no_weights(tmp_path):
    assert "no such" in message(call(export.main, tmp_path / "x.pt", tmp_path / "x.pth"))
    (tmp_path / "x.pt").write_text("no weights")
    assert "x.pt" in message(call(export.main, tmp_path / "x.pt", tmp_path / "x.pth"))
    assert [path.name for path in tmp_path.iterdir()] == ["x.pt"]


@pytest.mark.parametrize("value", [0.01, float("nan")])
def test_other_logits_are_an_error(small, tmp_path, monkeypatch, value):
    rebuild = export.rebuild

    def broken(state, config):
        return rebuild(state | {"fc.bias": state["fc.bias"] + value}, config)

    monkeypatch.setattr(export, "rebuild", broken)
    assert "logits differ by" in message(call(export.main, small["C"], tmp_path / "x.pth"))
    assert not list(tmp_path.iterdir())


def test_a_full_disk_leaves_nothing(small, tmp_path, monkeypatch):
    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert "No space left" in message(call(export.main, small["C"], tmp_path / "x.pth"))
    assert not list(tmp_path.iterdir())


def test_packages_that_are_not_there(small, tmp_path, monkeypatch):
    find_spec = importlib.util.find_spec

    def without(name, *rest):
        return None if name.startswith(("onnx", "safetensors")) else find_spec(name, *rest)

    monkeypatch.setattr(importlib.util, "find_spec", without)
    text = message(call(export.main, small["C"], tmp_path / "x.onnx"))
    assert "pip install onnx onnxscript" in text
    assert "pip install safetensors" in message(call(export.main, small["C"], tmp_path / "x.safetensors"))
    logits = torch.ones(2, 5)
    said = export.verdict(tmp_path / "x.onnx", None, pictures(2), logits)
    assert said.startswith("parity was not checked") and "pip install onnxruntime" in said
