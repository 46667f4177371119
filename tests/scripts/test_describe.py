"""describe.py: its counts against those of test_resnext.py, its memory against arithmetic, and its errors."""

import json
import re
import sys

import pytest
import torch
from commands import ROOT, call, message, run_python, snapshot
from config_counts import CONFIG_COUNTS

from resnext.config import parse_config
from resnext.models.complexity import complexity
from resnext.models.resnext import ResNeXt, build_model

sys.path.insert(0, str(ROOT / "scripts"))
import describe

META = torch.device("meta")


def test_all_configurations(tmp_path):
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
    assert printed["cifar10_resnext29_8x64d"][4] == "32"
    published = {"resnet50": 11.1, "resnet101": 16.2, "resnext50_32x4d": 14.4}  # by pycls, in millions
    published |= {"resnext101_32x4d": 21.2, "resnext152_32x4d": 29.7}
    assert {name: round(exact[name]["activations"] / 1e6, 1) for name in published} == published


@pytest.mark.parametrize(
    ("form", "preactivation"), [("A", "false"), ("B", "true"), ("C", "false"), ("C", "true")]
)
def test_layers_add_up(form, preactivation):
    text = f"model: {{stem: cifar, depth: 11, cardinality: 2, block: {form}, preactivation: {preactivation}}}"
    config = parse_config(text, "test")
    model = describe.build(config)
    network = describe.costs("test", config, model)
    assert model.conv1.weight.is_meta and network["classes"] == 1000
    assert (network["parameters"], network["macs"]) == complexity(model, 32)
    for column in ("parameters", "macs", "activations"):
        assert sum(layer[column] for layer in network["layers"]) == network[column]
    names = [layer["module"] for layer in network["layers"]]
    assert names[0] == "conv1" and names[-1] == "fc" and len(set(names)) == len(names)
    assert network["layers"][0]["output"] == [64, 32, 32]
    state = build_model(config.model, 1000).state_dict()
    assert network["weight_bytes"] == sum(tensor.nbytes for tensor in state.values())


def test_one_configuration():
    result = call(describe.main, "resnext50_32x4d")
    assert result.status == 0, result.error
    lines = result.output.splitlines()
    assert lines[0] == "resnext50_32x4d: resnext-50 (32x4d), 1000 classes, input 3 x 224 x 224"
    rows = [" ".join(line.split()) for line in lines]
    assert "conv1 Conv2d 64 x 112 x 112 9,408 118,013,952 802,816" in rows
    assert "total 25,028,904 4,230,479,872 14,400,512" in rows
    assert "training: 107.0 MiB per image" in result.output


def test_a_run(finished_run, tmp_path):
    before = snapshot(finished_run)
    result = call(describe.main, finished_run, "--json", tmp_path / "run.json")
    assert result.status == 0, result.error
    network = json.loads((tmp_path / "run.json").read_text())
    with META:
        model = ResNeXt((1, 1, 1), 1, 1, 10, stem="cifar", shortcut="A")
    assert (network["parameters"], network["macs"]) == complexity(model, 8)
    assert network["layers"][-1]["output"] == [10] and "ZeroPadShortcut" in result.output
    again = call(describe.main, finished_run / "checkpoints" / "best.pt")
    assert again.output.splitlines()[1:] == result.output.splitlines()[1:]
    config = finished_run / "config.yaml"  # must not be overwritten
    assert f"--json {config}: " in message(call(describe.main, config, "--json", config))
    assert snapshot(finished_run) == before


def test_memory_of_training():
    """Convolutions keep their input, BN its own, ReLU (in place) its output, the classifier its input."""
    with META:
        model = ResNeXt((1, 1, 1), 2, 8, 10, stem="cifar")
    elements = 3 * 16 * 16 + 2 * 64 * 16 * 16  # images; the stem's convolution and ReLU
    before = 16 * 16
    for number, pixels in enumerate((16 * 16, 8 * 8, 4 * 4)):
        width = 16 * 2**number
        elements += 2 * width * before + 2 * width * pixels  # conv1 before the stride, conv2; with ReLU
        elements += 3 * 16 * width * pixels  # conv3, shortcut, the block's ReLU
        assert getattr(model, f"layer{number + 1}")[0].conv3.weight.shape[:2] == (16 * width, width)
        before = pixels
    elements += 1024 + 10  # the classifier's input, the logarithms of the probabilities
    label = 8
    assert describe.training_bytes(model, 16) == 4 * elements + label


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["resnext50_32x4"], "CONFIG resnext50_32x4: .*did you mean resnext50_32x4d.yaml"),
        (["nowhere/best.pt"], "nowhere/best.pt: no such"),
        (["demo", "--json", "no/such/folder.json"], "--json no/such/folder.json: "),
        (["demo", "--json", "best.pt"], "--json best.pt: "),
        (["demo", "--json", "best.safetensors"], "--json best.safetensors: "),
        (["demo", "--json", "demo"], "--json demo: is what"),
    ],
)
def test_errors(arguments, words):
    assert re.match(words, message(call(describe.main, *arguments)))


def test_errors_do_not_wait_for_torch():
    code = "import sys; sys.path.insert(0, 'scripts'); import describe, export; print('torch' in sys.modules)"
    assert run_python("-c", code, cwd=ROOT).output == "False\n"
