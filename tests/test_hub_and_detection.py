"""The networks in other programs: through torch.hub, and as the backbone of docs/detection.md."""

import re
from functools import partial

import pytest
import torch
from commands import ROOT
from networks import SMALL, write_weights
from torchvision.models.feature_extraction import create_feature_extractor

import resnext
from resnext import UserError, load_weights

SMALL_NETWORK = partial(resnext.ResNeXt, (1, 1, 1, 1), 4, 8)


def hub(name, **options):
    return torch.hub.load(str(ROOT), name, source="local", **options)


# ---------------------------------------------------------------------------- torch.hub


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """Return the name of the project as torch.hub stores downloads."""
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    (tmp_path / "someone_resnext_main").symlink_to(ROOT)
    return "someone/resnext:main"


def test_hub_lists_the_networks_with_help(repository):
    known = torch.hub.list(repository, trust_repo=True, verbose=False)
    assert sorted(known) == sorted([*resnext.NETWORKS, "load_weights"])
    for name in resnext.NETWORKS:
        assert torch.hub.help(repository, name, trust_repo=True).startswith(f"{name}, untrained")
    assert "run directory" in torch.hub.help(repository, "load_weights", trust_repo=True)


@pytest.mark.parametrize("name", resnext.NETWORKS)
def test_hub_creates_the_network_of_the_name(name):
    with torch.device("meta"):
        ours, theirs = getattr(resnext, name)(classes=7), hub(name, classes=7)
    shapes = {key: tensor.shape for key, tensor in ours.state_dict().items()}
    assert {key: tensor.shape for key, tensor in theirs.state_dict().items()} == shapes


def test_hub_loads_weights(tmp_path, finished_run):
    network = hub("load_weights", path=finished_run)
    original, _ = load_weights(finished_run)
    assert not network.training
    assert all(torch.equal(a, b) for a, b in zip(network.parameters(), original.parameters(), strict=True))

    source = write_weights(tmp_path, "model: {depth: 50, shortcut: C}", 3)
    network = hub("resnext50_32x4d", weights=source)
    original, _ = load_weights(source)
    state, expected = network.state_dict(), original.state_dict()
    assert state.keys() == expected.keys() and all(torch.equal(state[k], expected[k]) for k in state)
    assert not network.training and network.fc.out_features == 3
    for name, options in (("resnext50_32x4d", {"classes": 4}), ("resnet50", {}), ("resnet34", {})):
        with pytest.raises(UserError, match=f"as {name}: .*another architecture"):
            hub(name, weights=source, **options)


def test_hub_loads_a_backbone(tmp_path):
    state = resnext.resnext50_32x4d(classes=None).state_dict()
    torch.save(state, tmp_path / "w.pth")
    for name, argument in (("load_weights", "path"), ("resnext50_32x4d", "weights")):
        network = hub(name, **{argument: tmp_path / "w.pth"})
        assert isinstance(network.fc, torch.nn.Identity) and network.state_dict().keys() == state.keys()
        assert network(torch.zeros(1, 3, 32, 32)).shape == (1, 2048)
    with pytest.raises(UserError, match=r"as resnext50_32x4d: has no fc\.weight"):
        hub("resnext50_32x4d", weights=tmp_path / "w.pth", classes=3)


def test_hub_uses_the_form_of_the_weights(tmp_path, monkeypatch):
    source = write_weights(tmp_path, SMALL.format("B"), 5)
    with pytest.raises(UserError, match="as resnext50_32x4d: "):
        hub("resnext50_32x4d", weights=source)
    monkeypatch.setattr(resnext, "resnext50_32x4d", SMALL_NETWORK, raising=False)
    assert hub("resnext50_32x4d", weights=source).form == "B"
    with pytest.raises(UserError, match="as resnext50_32x4d: "):
        hub("resnext50_32x4d", weights=source, form="C")


# ---------------------------------------------------------------------------- detection


@pytest.fixture(scope="module")
def example():
    """Return the variables of the document's code, which trains one step and detects once."""
    torch.manual_seed(0)
    names = {}
    for block in re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "detection.md").read_text(), re.DOTALL):
        exec(block, names)
    return names


def test_the_example_trains(example):
    assert len(example["losses"]) == 4 and all(loss.isfinite() for loss in example["losses"].values())
    body = example["model"].backbone.body
    frozen = [*body.conv1.parameters(), *body.layer1.parameters()]
    assert frozen and not any(p.requires_grad or p.grad is not None for p in frozen)
    for stage in (body.layer2, body.layer4):
        assert all(p.grad.isfinite().all() and p.grad.any() for p in stage.parameters())
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in example["network"].modules())


def test_the_example_detects(example):
    assert len(example["detections"]) == 2
    for found, image in zip(example["detections"], example["images"], strict=True):
        height, width = image.shape[1:]
        boxes, labels, scores = found["boxes"], found["labels"], found["scores"]
        assert len(boxes) == len(labels) == len(scores) > 0
        assert boxes.isfinite().all() and boxes.min() >= 0
        assert boxes[:, 0::2].max() <= width and boxes[:, 1::2].max() <= height
        assert set(labels.tolist()) <= {1, 2} and scores.max() <= 1


def test_the_pyramid_gets_the_features_of_the_network(example):
    network, body = example["network"], example["model"].backbone.body
    x = torch.randn(2, 3, 64, 48, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        found = body(x)
        expected = x
        for name in network.stem:
            expected = getattr(network, name)(expected)
        for number in range(4):
            expected = getattr(network, f"layer{number + 1}")(expected)
            assert torch.equal(found[str(number)], expected)
            assert expected.shape[1] == 256 * 2**number
        assert torch.equal(expected, network.forward_features(x))


def test_basic_blocks_have_narrower_features(example):
    network = resnext.resnet18()
    body = example["detector"](network, classes=3).backbone
    shapes = [tuple(level.shape[1:]) for level in body(torch.zeros(1, 3, 64, 64)).values()]
    assert shapes == [(256, 16, 16), (256, 8, 8), (256, 4, 4), (256, 2, 2), (256, 1, 1)]


def test_freezing_batchnorm_changes_no_logit(example):
    torch.manual_seed(2)
    network = SMALL_NETWORK(5).train()
    x = torch.randn(4, 3, 64, 64)
    with torch.no_grad():
        network(x)  # moves the statistics
        before = network.eval()(x)
        example["freeze_batchnorm"](network)
        torch.testing.assert_close(network.train()(x), before)


def test_torchvision_takes_a_network_apart():
    """torch.fx can trace the network: nothing in forward depends on the values of an image."""
    network = SMALL_NETWORK(5).eval()
    x = torch.randn(2, 3, 64, 64)
    parts = create_feature_extractor(network, ["layer2", "layer4"])(x)
    assert parts["layer2"].shape == (2, 512, 8, 8)
    assert torch.equal(parts["layer4"], network.forward_features(x))
