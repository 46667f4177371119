"""export.py: what other programs read from its files, and the mistakes that it refuses."""

import errno
import importlib.util
import json
import os
import sys

import pytest
import torch
from commands import ROOT, call, message
from networks import SMALL, stir, write_weights
from torch import nn
from torchvision.models.resnet import Bottleneck, ResNet, resnet18

from resnext import load_weights
from resnext.config import parse_config
from resnext.models.resnext import ResNeXt, build_model
from resnext.weights.export import check_parity, fold_batchnorm, rebuild

sys.path.insert(0, str(ROOT / "scripts"))
import export


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Weights of an ImageNet network with four blocks in forms A, B, and C."""
    folder = tmp_path_factory.mktemp("small")
    return {form: write_weights(folder / form, SMALL.format(form), 5) for form in "ABC"}


def run(*arguments):
    result = call(export.main, *arguments)
    assert result.status == 0, result.error
    return result.output


def random_images(count, size=48):
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(8))


def assert_same_logits(network, path, x):
    original, _ = load_weights(path)
    with torch.no_grad():
        torch.testing.assert_close(network(x), original(x), rtol=1e-5, atol=1e-5)


# ---------------------------------------------------------------------------- weights


@pytest.mark.parametrize("form", "ABC")
def test_torchvision_reads_a_pth(small, tmp_path, form):
    target = tmp_path / "small.pth"
    printed = run(small[form], target)
    assert "torchvision's ResNet" in printed and "of the largest" in printed and "5 classes" in printed
    state = torch.load(target, weights_only=True)
    assert type(state) is dict and all(tensor.is_contiguous() for tensor in state.values())
    network = ResNet(Bottleneck, [1, 1, 1, 1], num_classes=5, groups=4, width_per_group=8)
    network.load_state_dict(state, strict=True)
    assert list(network.state_dict()) == list(state)
    assert_same_logits(network.eval(), small[form], random_images(3))
    assert_same_logits(load_weights(target)[0], small[form], random_images(3))


def test_timm_reads_a_pth(tmp_path):
    timm = pytest.importorskip("timm")
    source = write_weights(tmp_path / "run", "data: {image_size: 64}", 3)
    run(source, tmp_path / "x50.pth")
    network = timm.create_model("resnext50_32x4d", pretrained=False, num_classes=3)
    network.load_state_dict(torch.load(tmp_path / "x50.pth", weights_only=True), strict=True)
    assert_same_logits(network.eval(), source, random_images(2, 64))


def test_torchvision_reads_basic_blocks(tmp_path):
    text = "model: {architecture: resnet, depth: 18}\ndata: {image_size: 64}"
    source = write_weights(tmp_path / "run", text, 3)
    assert "torchvision's ResNet, every key" in run(source, tmp_path / "r18.pth")
    network = resnet18(num_classes=3)
    network.load_state_dict(torch.load(tmp_path / "r18.pth", weights_only=True), strict=True)
    assert_same_logits(network.eval(), source, random_images(2, 64))


def test_safetensors_has_classes_and_preprocessing(tmp_path):
    safetensors = pytest.importorskip("safetensors")
    text = SMALL.format("B, pretrained: elsewhere").replace("image_size: 48", "image_size: 48, dir: mine")
    source, target = write_weights(tmp_path / "run", text, 5), tmp_path / "small.safetensors"
    run(source, target)
    with safetensors.safe_open(target, "pt") as file:
        facts = file.metadata()
        state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, not a dict
    assert facts["format"] == "resnext weights"
    assert facts["architecture"] == "resnext-14 (4x8d)"
    assert facts["origin"] == "this program, weights after 7 steps"
    assert json.loads(facts["classes"]) == [f"class {number}" for number in range(5)]
    assert json.loads(facts["mean"]) == [123.675, 116.28, 103.53]
    assert (facts["image_size"], facts["resize"]) == ("48", "54")
    config = parse_config(facts["config"], "metadata")
    assert config.model.classes == 5 and config.model.block == "C"
    assert config.data.dir is None and config.model.pretrained is None  # local paths
    network = build_model(config.model, 5)
    network.load_state_dict(state)
    assert_same_logits(network.eval(), source, random_images(2))
    again, info = load_weights(target)
    assert info.classes == tuple(json.loads(facts["classes"])) and info.config == config
    assert_same_logits(again, source, random_images(2))


def test_network_that_torchvision_does_not_have(finished_run, tmp_path):
    assert "torchvision has no such network" in run(finished_run, tmp_path / "tiny.pth")
    network = ResNeXt((1, 1, 1), 1, 1, 10, stem="cifar", shortcut="A")
    network.load_state_dict(torch.load(tmp_path / "tiny.pth", weights_only=True))
    assert_same_logits(network.eval(), finished_run, random_images(2, 8))


# ---------------------------------------------------------------------------- programs


@pytest.mark.parametrize(
    ("form", "options", "size"),
    [("A", [], 48), ("C", ["--fold-batchnorm", "--image-size", "40"], 40)],
    ids=["plain", "folded"],
)
def test_pt2_takes_any_batch(small, tmp_path, form, options, size):
    target, extra = tmp_path / "small.pt2", {"resnext.json": ""}
    assert "read back by torch.export" in run(small[form], target, *options)
    program = torch.export.load(target, extra_files=extra)
    assert json.loads(extra["resnext.json"])["architecture"] == "resnext-14 (4x8d)"
    assert any("norm" in str(node.target) for node in program.graph.nodes) != bool(options)
    for count in (1, 3):
        assert_same_logits(program.module(), small[form], random_images(count, size))


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
        assert_same_logits(network, small["B"], random_images(count))


@pytest.mark.parametrize("shortcut", "ABC")
@pytest.mark.parametrize(("stem", "preactivation"), [("imagenet", False), ("cifar", False), ("cifar", True)])
def test_folding_changes_no_logits(stem, preactivation, shortcut):
    """Only bn0 and final_bn of a pre-activation network remain: they follow an addition."""
    stages = (1, 1, 1) if stem == "cifar" else (1, 1, 1, 1)
    torch.manual_seed(3)
    model = ResNeXt(stages, 2, 8, 6, stem=stem, preactivation=preactivation, shortcut=shortcut)
    model = stir(model).double().eval()
    folded = fold_batchnorm(model)
    names = [name for name, module in folded.named_modules() if isinstance(module, nn.BatchNorm2d)]
    assert len(names) == 4 * preactivation and all(name.endswith(("bn0", "final_bn")) for name in names)
    assert any(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    x = random_images(2, 20).double()
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


def test_not_weights(tmp_path):
    assert "no such" in message(call(export.main, tmp_path / "x.pt", tmp_path / "x.pth"))
    (tmp_path / "x.pt").write_text("no weights")
    assert "x.pt" in message(call(export.main, tmp_path / "x.pt", tmp_path / "x.pth"))
    assert [path.name for path in tmp_path.iterdir()] == ["x.pt"]


@pytest.mark.parametrize("value", [0.01, float("nan")])
def test_other_logits_are_an_error(small, tmp_path, monkeypatch, value):
    def broken(config, state, torchvision=False):
        if torchvision:  # the network that reads the file back
            state = state | {"fc.bias": state["fc.bias"] + value}
        return rebuild(config, state, torchvision)

    monkeypatch.setattr("resnext.weights.export.rebuild", broken)
    assert "logits differ by" in message(call(export.main, small["C"], tmp_path / "x.pth"))
    assert not list(tmp_path.iterdir())


def test_full_disk_leaves_nothing(small, tmp_path, monkeypatch):
    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert "No space left" in message(call(export.main, small["C"], tmp_path / "x.pth"))
    assert not list(tmp_path.iterdir())


def test_missing_packages(small, tmp_path, monkeypatch):
    find_spec = importlib.util.find_spec

    def without(name, *rest):
        return None if name.startswith(("onnx", "safetensors")) else find_spec(name, *rest)

    monkeypatch.setattr(importlib.util, "find_spec", without)
    for name, needed in (("x.onnx", "onnx onnxscript"), ("x.safetensors", "safetensors")):
        assert f"pip install {needed}" in message(call(export.main, small["C"], tmp_path / name))
    printed = check_parity(tmp_path / "x.onnx", None, random_images(2), None)
    assert printed.startswith("parity was not checked") and "pip install onnxruntime" in printed
