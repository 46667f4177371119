"""describe.py: its counts against those of test_model.py, its memory against arithmetic, and its mistakes."""

import json
import sys

import pytest
import torch
from commands import ROOT, call, message, run_python, snapshot
from test_resnext import CONFIG_COUNTS

from resnext.config import parse_config
from resnext.models.complexity import complexity
from resnext.models.resnext import ResNeXt, build_model

sys.path.insert(0, str(ROOT / "scripts"))
import describe

META = torch.device("meta")


def test_the_table_of_all_configurations(tmp_path):
    result = call(describe.main, "--json", tmp_path / "all.json")
    assert result.status == 0, result.error
    header, _, *lines = result.output.splitlines()
    assert header.split("  ")[0] == "configuration"
    printed = {line.split()[0]: line.split()[1:] for line in lines}
    exact = {row["name"]: row for row in json.loads((tmp_path / "all.json").read_text())}
    assert printed.keys() == exact.keys() == CONFIG_COUNTS.keys()
    for name, (parameters, macs) in CONFIG_COUNTS.items():
        assert (exact[name]["parameters"], exact[name]["macs"]) == (parameters, macs)
        assert printed[name][:2] == [f"{parameters:,}", f"{macs / 1e9:.3f}"]
        assert exact[name]["weight_bytes"] > 4 * parameters
    assert printed["resnet50"][2:] == ["11.11", "97.7", "224", "px"]
    published = {  # by pycls, in millions
        "resnet50": 11.1,
        "resnet101": 16.2,
        "resnext50_32x4d": 14.4,
        "resnext101_32x4d": 21.2,
        "resnext152_32x4d": 29.7,
    }
    assert {name: round(exact[name]["activations"] / 1e6, 1) for name in published} == published
    assert printed["cifar10_resnext29_8x64d"][4] == "32"


@pytest.mark.parametrize("form", "ABC")
@pytest.mark.parametrize("preactivation", ["true", "false"])
def test_layers_add_up(form, preactivation):
    text = f"model: {{stem: cifar, depth: 11, cardinality: 2, block: {form}, preactivation: {preactivation}}}"
    config = parse_config(text, "test")
    network, model = describe.totals("test", config)
    assert model.conv1.weight.is_meta and network["classes"] == 1000
    assert (network["parameters"], network["macs"]) == complexity(model, 32)
    for column in ("parameters", "macs", "activations"):
        assert sum(layer[column] for layer in network["layers"]) == network[column]
    names = [layer["module"] for layer in network["layers"]]
    assert names[0] == "conv1" and names[-1] == "fc" and len(set(names)) == len(names)
    assert network["layers"][0]["output"] == [64, 32, 32]
    assert network["weight_bytes"] == sum(
        t.nbytes for t in build_model(config.model, 1000).state_dict().values()
    )


def test_one_configuration_layer_by_layer():
    result = call(describe.main, "resnext50_32x4d")
    assert result.status == 0, result.error
    lines = result.output.splitlines()
    assert lines[0] == "resnext50_32x4d: resnext-50 (32x4d), 1000 classes, input 3 x 224 x 224"
    rows = {line.split()[0]: line for line in lines if line}
    words = ["conv1", "Conv2d", "64", "x", "112", "x", "112", "9,408", "118,013,952", "802,816"]
    assert rows["conv1"].split() == words
    assert rows["total"].split() == ["total", "25,028,904", "4,230,479,872", "14,400,512"]
    assert "training: 107.0 MiB for each image" in result.output


def test_a_run_layer_by_layer(finished_run, tmp_path):
    before = snapshot(finished_run)
    result = call(describe.main, finished_run, "--json", tmp_path / "run.json")
    assert result.status == 0, result.error
    network = json.loads((tmp_path / "run.json").read_text())
    with META:
        model = ResNeXt((1, 1, 1), 1, 1, 10, stem="cifar", shortcut="A")
    assert (network["parameters"], network["macs"]) == complexity(model, 8)
    assert network["layers"][-1]["output"] == [10] and "ZeroPadShortcut" in result.output
    assert snapshot(finished_run) == before
    again = call(describe.main, finished_run / "checkpoints" / "best.pt")
    assert again.output.splitlines()[1:] == result.output.splitlines()[1:]


def test_memory_of_training_is_what_the_layers_keep():
    """Convolutions keep their input, BN its own, ReLU (in place) its output, the classifier its input."""
    with META:
        model = ResNeXt((1, 1, 1), 2, 8, 10, stem="cifar")
    convolutions = {"layer1": 16 * 16, "layer2": 8 * 8, "layer3": 4 * 4}  # pixels of a stage
    elements = 3 * 16 * 16 + 2 * 64 * 16 * 16  # pictures; the stem's convolution and ReLU
    before = 16 * 16
    for number, (stage, pixels) in enumerate(convolutions.items()):
        width = 16 * 2**number
        elements += 2 * width * before + 2 * width * pixels  # conv1 ahead of the stride, conv2; with ReLU
        elements += 3 * 16 * width * pixels  # conv3, shortcut, the block's ReLU
        assert getattr(model, stage)[0].conv3.weight.shape[:2] == (16 * width, width)
        before = pixels
    elements += 1024 + 10  # the classifier's input, the logarithms of the probabilities
    label = 8
    assert describe.training_bytes(model, 16) == 4 * elements + label
    assert model.training


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["resnext50_32x4"], "did you mean resnext50_32x4d.yaml"),
        (["nowhere/best.pt"], "nowhere/best.pt: no such"),
        (["demo", "--json", "no/such/folder.json"], "--json"),
        (["demo", "--json", "best.pt"], "the name of a run file"),
    ],
)
def test_mistakes(arguments, words):
    assert words in message(call(describe.main, *arguments))


def test_what_is_described_is_not_overwritten(finished_run):
    before = snapshot(finished_run)
    config = finished_run / "config.yaml"
    assert "the name of a run file" in message(call(describe.main, config, "--json", config))
    assert snapshot(finished_run) == before


def test_mistakes_are_told_at_once():
    code = "import sys; sys.path.insert(0, 'scripts'); import describe, export; print('torch' in sys.modules)"
    assert run_python("-c", code, cwd=ROOT).output == "False\n"
