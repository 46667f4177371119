"""Weights of other programs: their networks, built in foreign_networks, against what load_weights reads."""

import argparse
import json
import sys
from functools import partial

import numpy as np
import pytest
import timm
import torch
from commands import ROOT, call, draw_folders, message
from foreign_networks import (
    SAVERS,
    Bearpaw,
    Mmpretrain,
    Pycls,
    PyclsCifar,
    assert_equal,
    check,
    randomize_norms,
    small_torchvision,
    without_fc,
    zip_and_legacy,
)
from oracle import relative_error
from PIL import Image
from safetensors.torch import save_file
from torch import nn

import evaluate
from resnext import ResNeXt, UserError, load_weights, resnet20

sys.path.insert(0, str(ROOT / "scripts"))
import describe
import export
import extract_features
import predict

# ---------------------------------------------------------------------------- programs


def bare(state):
    return state


def trainer_file(state):
    """As torchvision's references/classification/train.py writes them, argparse's Namespace included."""
    model = {f"module.{key}": value for key, value in state.items()}
    return {"model": model, "optimizer": {"state": {}}, "epoch": 3, "args": argparse.Namespace(lr=0.1)}


WRAPPERS = {
    "bare": bare,
    "module.": lambda state: {f"module.{key}": value for key, value in state.items()},
    "_orig_mod.": lambda state: {f"_orig_mod.module.{key}": value for key, value in state.items()},
    "state_dict": lambda state: {"epoch": 1, "arch": "resnext", "state_dict": state},
    "train.py": trainer_file,
    "old files": lambda state: {key: v for key, v in state.items() if not key.endswith("batches_tracked")},
}


@pytest.mark.parametrize("wrap", WRAPPERS)
@zip_and_legacy
def test_torchvision_in_all_wrappings(wrap, save, tmp_path):
    theirs = randomize_norms(small_torchvision())
    save(WRAPPERS[wrap](theirs.state_dict()), tmp_path / "w.pth")
    info = check(tmp_path / "w.pth", theirs)
    model = info.config.model
    assert info.origin == "torchvision or timm" and info.config.data.interpolation == "bilinear"
    assert (model.classes, model.cardinality, model.base_width) == (10, 4, 6)


TRAINERS = {
    "torchvision": {"lr_scheduler": {"last_epoch": 3}},
    "torchvision, the ImageNet example": {"best_acc1": torch.tensor(76.0), "arch": "resnext50_32x4d"},
    "timm": {"version": 2, "arch": "resnext50_32x4d"},
}


@pytest.mark.parametrize("origin", TRAINERS)
def test_what_else_a_file_holds_shows_its_trainer(origin, tmp_path):
    torch.save({"state_dict": small_torchvision().state_dict()} | TRAINERS[origin], tmp_path / "w.pth")
    assert load_weights(tmp_path / "w.pth")[1].origin == origin.partition(",")[0]


def test_averaged_weights_come_first(tmp_path):
    raw, average = small_torchvision(), randomize_norms(small_torchvision(), seed=1)
    ema = {f"module.{key}": value for key, value in average.state_dict().items()}
    ema["n_averaged"] = torch.tensor(3)
    files = {"torchvision": {"model": raw.state_dict(), "model_ema": ema, "epoch": 1}}
    files["timm"] = {"state_dict": raw.state_dict(), "state_dict_ema": average.state_dict()}
    for name, content in files.items():
        torch.save(content, tmp_path / name)
        assert check(tmp_path / name, average).weights == "averaged weights"


@pytest.mark.parametrize(
    ("make", "origin"),
    [
        (partial(timm.create_model, "resnet18", num_classes=12), "torchvision or timm"),
        (partial(timm.create_model, "resnet34", num_classes=12), "torchvision or timm"),
        (partial(small_torchvision, basic=True), "torchvision or timm"),
        (partial(Mmpretrain, basic=True), "mmpretrain"),
        (PyclsCifar, "pycls"),
        (partial(resnet20, shortcut="B"), "torchvision or timm"),
        (partial(resnet20, preactivation=True, classes=12), "torchvision or timm"),
    ],
)
def test_basic_blocks(make, origin, tmp_path):
    theirs = randomize_norms(make())
    torch.save(theirs.state_dict(), tmp_path / "w.pth")
    info = check(tmp_path / "w.pth", theirs, 32)
    assert info.origin == origin and info.config.model.block_type == "basic"


def test_timm(tmp_path):
    theirs = randomize_norms(timm.create_model("resnext50_32x4d", pretrained=False, num_classes=12))
    for name, save in SAVERS.items():
        save(theirs.state_dict(), tmp_path / name)
        model = check(tmp_path / name, theirs).config.model
        assert (model.depth, model.cardinality) == (50, 32)


def test_ours_through_torchvision_and_back(tmp_path):
    ours = randomize_norms(ResNeXt((1, 2, 1, 1), 4, 6, 10))
    theirs = small_torchvision()
    theirs.load_state_dict(ours.state_dict())
    torch.save(theirs.state_dict(), tmp_path / "w.pth")
    check(tmp_path / "w.pth", theirs.eval())
    check(tmp_path / "w.pth", ours)
    assert_equal(load_weights(tmp_path / "w.pth")[0].state_dict(), ours.state_dict())


def test_mmpretrain(tmp_path):
    theirs, path = randomize_norms(Mmpretrain()), tmp_path / "w.pth"
    state = theirs.state_dict() | {"data_preprocessor.mean": torch.zeros(3)}
    names = [f"class {number}" for number in range(10)]
    meta = {"epoch": 100, "dataset_meta": {"classes": names}, "cfg": "style='pytorch'", "seed": np.int64(3)}
    torch.save({"state_dict": state, "meta": meta, "message_hub": {"history": np.ones(3)}}, path)
    info = check(path, theirs)
    assert info.origin == "mmpretrain" and info.classes == tuple(names)
    torch.save({"state_dict": state, "meta": meta | {"cfg": "style='caffe'"}}, path)
    with pytest.raises(UserError, match="stride in the first 1x1"):
        load_weights(path)


def test_pycls(tmp_path):
    theirs, other = randomize_norms(Pycls()), randomize_norms(Pycls(), seed=1)
    content = {"epoch": 99, "test_err": 22.0, "ema_err": 23.0, "cfg": "MODEL:\n  TYPE: anynet\n"}
    content |= {"model_state": theirs.state_dict(), "ema_state": other.state_dict()}
    torch.save(content, tmp_path / "w.pyth")
    info = check(tmp_path / "w.pyth", theirs)
    assert info.origin == "pycls" and info.weights == "weights"
    torch.save(content | {"ema_err": 21.0}, tmp_path / "w.pyth")
    assert check(tmp_path / "w.pyth", other).weights == "averaged weights"
    torch.save(content | {"cfg": "MODEL: {TYPE: resnet}\nRESNET:\n  STRIDE_1X1: true"}, tmp_path / "w.pyth")
    with pytest.raises(UserError, match="stride in the first 1x1"):
        load_weights(tmp_path / "w.pyth")


@pytest.mark.parametrize(
    ("origin", "std"), [("bearpaw", (51.5865, 50.847, 51.255)), ("prlz77", (63.0, 62.1, 66.7))]
)
def test_bearpaw_and_prlz77(origin, std, tmp_path):
    theirs, path = randomize_norms(Bearpaw()), tmp_path / "model_best.pth.tar"
    state = {f"module.{key}": value for key, value in theirs.state_dict().items()}
    content = {"epoch": 300, "state_dict": state, "acc": 96.0, "best_acc": 96.3, "optimizer": {}}
    torch.save(content if origin == "bearpaw" else state, path)
    info = check(path, theirs, size=32)
    model = info.config.model
    assert info.origin == origin and info.config.data.std == std
    assert (model.depth, model.cardinality, model.base_width) == (20, 3, 16)
    folders = draw_folders(tmp_path / "images", {f"{number}": 1 for number in range(10)}, size=32)
    result = call(evaluate.main, path, "--data", folders)
    assert result.status == 0 and f"weights of {origin}: resnext-20 (3x16d)" in result.output, result.error


def test_imagenet_weights_are_scored_on_folders_of_wordnet_ids(tmp_path):
    """The classes of the outputs are known, so --classes can name some."""
    torch.save(small_torchvision(1000).state_dict(), tmp_path / "w.pth")
    folders = draw_folders(tmp_path / "images", {"n01440764": 2, "n15075141": 2}, size=64)
    (tmp_path / "wnids.txt").write_text("n01440764\nn15075141\n")
    arguments = [tmp_path / "w.pth", "--data", folders, "--image-size", 64, "--workers", 0]
    result = call(evaluate.main, *arguments, "--classes", tmp_path / "wnids.txt")
    assert result.status == 0, result.error
    assert "2 of the network's 1,000" in result.output and "resized bilinear" in result.output


# ---------------------------------------------------------------------------- without a last layer


def moco(head):
    """Return a checkpoint of main_moco.py: two encoders with a head in place of fc, and the queue."""

    def checkpoint(state):
        encoder = state | {f"fc.{key}": value for key, value in head.state_dict().items()}
        found = {f"module.encoder_q.{key}": value for key, value in encoder.items()}
        found |= {f"module.encoder_k.{key}": torch.zeros_like(value) for key, value in encoder.items()}
        found |= {"module.queue": torch.rand(128, 16), "module.queue_ptr": torch.zeros(1, dtype=torch.long)}
        return {"epoch": 200, "arch": "resnext", "state_dict": found, "optimizer": {"state": {}}}

    return checkpoint


def swav(state):
    """Return the network of main_swav.py: projection_head and prototypes in place of fc."""
    head = nn.Sequential(nn.Linear(2048, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 8)).state_dict()
    state = state | {f"projection_head.{key}": value for key, value in head.items()}
    state["prototypes.weight"] = torch.rand(30, 8)
    return {f"module.{key}": value for key, value in state.items()}


def below(prefix, **others):
    return lambda state: {"state_dict": {f"{prefix}{key}": value for key, value in state.items()} | others}


def torchvision_backbone():
    return without_fc(small_torchvision())


TORCHVISION = "torchvision or timm"
BACKBONES = {  # network, how it is saved, origin
    "torchvision": (torchvision_backbone, bare, TORCHVISION),
    "mmpretrain": (torchvision_backbone, below("backbone."), "mmpretrain"),
    "mmpretrain, neck": (
        torchvision_backbone,
        below("backbone.", **{"neck.fc0.weight": torch.ones(2, 2)}),
        "mmpretrain",
    ),
    "MoCo v1": (torchvision_backbone, moco(nn.Linear(2048, 128)), "MoCo"),
    "MoCo v2": (
        torchvision_backbone,
        moco(nn.Sequential(nn.Linear(2048, 64), nn.ReLU(), nn.Linear(64, 128))),
        "MoCo",
    ),
    "SwAV": (torchvision_backbone, swav, "SwAV"),
    "timm": (lambda: randomize_norms(timm.create_model("resnext50_32x4d", num_classes=0)), bare, TORCHVISION),
    "pycls": (lambda: without_fc(Pycls(), "head.fc"), bare, "pycls"),
    "bearpaw": (lambda: without_fc(Bearpaw(), "classifier"), bare, "prlz77"),
    "pre-activation": (
        lambda: without_fc(ResNeXt((1, 2, 1), 3, 8, 7, stem="cifar", preactivation=True, form="B")),
        bare,
        TORCHVISION,
    ),
    "form A": (
        lambda: without_fc(ResNeXt((1, 1, 1), 1, 8, 7, stem="cifar", shortcut="C", form="A")),
        bare,
        TORCHVISION,
    ),
}


@pytest.mark.parametrize(("make", "wrap", "origin"), BACKBONES.values(), ids=BACKBONES)
def test_backbones(make, wrap, origin, tmp_path):
    theirs = make()
    content = wrap(theirs.state_dict())
    torch.save(content, tmp_path / "w.pth")
    save_file(content.get("state_dict", content), tmp_path / "w.safetensors")
    for name in ("w.pth", "w.safetensors"):
        info = check(tmp_path / name, theirs, 64 if hasattr(theirs, "layer4") or origin == "pycls" else 32)
        assert info.origin == origin and info.outputs is None and info.classes is None
        found = load_weights(tmp_path / name)[0]
        assert isinstance(found.fc, nn.Identity)
        if hasattr(theirs, "layer1"):  # the same names
            assert_equal(found.state_dict(), theirs.state_dict())


def test_commands_on_a_backbone(tmp_path):
    """Its features can be computed; commands that need classes refuse it."""
    theirs, path, output = without_fc(small_torchvision()), tmp_path / "w.pth", tmp_path / "features.npz"
    torch.save(theirs.state_dict(), path)
    folders = draw_folders(tmp_path / "images", {"cat": 2, "dog": 1}, size=256)
    cats = sorted((folders / "val" / "cat").iterdir())
    result = call(extract_features.main, path, *cats, "--output", output, "--workers", 0)
    assert result.status == 0 and "(4x6d), no last layer; " in result.error, result.error
    pixels = np.stack([np.asarray(Image.open(cat), np.float32)[16:240, 16:240] / 255 for cat in cats])
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    images = torch.tensor((pixels - mean) / std, dtype=torch.float32).permute(0, 3, 1, 2)
    with torch.no_grad():
        assert relative_error(np.load(output)["features"], theirs(images)) <= 1e-5
    exported = tmp_path / "out.pth"
    for main, *words in (evaluate.main, "--data", folders), (predict.main, cats[0]), (export.main, exported):
        text = message(call(main, path, *words))
        assert text.startswith(f"{path}: has no last layer") and f"model.pretrained={path}" in text
    assert not exported.exists()
    result = call(describe.main, path, "--json", tmp_path / "costs.json")
    assert result.status == 0 and "(4x6d), no last layer, input" in result.output
    costs = json.loads((tmp_path / "costs.json").read_text())
    assert costs["classes"] is None and costs["parameters"] == sum(p.numel() for p in theirs.parameters())
