"""Weights of other programs: their networks as published, built here, against what load_weights reads."""

import argparse
import collections
import io
import json
import os
import pickle
import resource
import struct
import sys
import zipfile

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from commands import ROOT, call, draw_folders, message
from oracle import relative_error
from PIL import Image
from safetensors.torch import save_file
from torch import nn

import evaluate
from resnext import ResNeXt, UserError, load_weights
from resnext.engine.checkpoint import read_checkpoint

sys.path.insert(0, str(ROOT / "scripts"))
import describe
import export
import extract_features
import predict

# ---------------------------------------------------------------------------- their networks


def unusual(model, seed=0):
    """Every scale and statistic different, so that nothing can be exchanged unnoticed."""
    torch.manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for value in (module.weight.data, module.bias.data, module.running_mean, module.running_var):
                value.uniform_(0.5, 1.5)
    return model.eval()


class BearpawBlock(nn.Module):
    """models/cifar/resnext.py of bearpaw/pytorch-classification, and prlz77/ResNeXt.pytorch."""

    def __init__(self, inputs, outputs, stride, cardinality, width):
        super().__init__()
        self.conv_reduce = nn.Conv2d(inputs, width, 1, bias=False)
        self.bn_reduce = nn.BatchNorm2d(width)
        self.conv_conv = nn.Conv2d(width, width, 3, stride, 1, groups=cardinality, bias=False)
        self.bn = nn.BatchNorm2d(width)
        self.conv_expand = nn.Conv2d(width, outputs, 1, bias=False)
        self.bn_expand = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Sequential()
        if inputs != outputs:
            self.shortcut.add_module("shortcut_conv", nn.Conv2d(inputs, outputs, 1, stride, bias=False))
            self.shortcut.add_module("shortcut_bn", nn.BatchNorm2d(outputs))

    def forward(self, x):
        out = F.relu(self.bn_reduce(self.conv_reduce(x)))
        out = F.relu(self.bn(self.conv_conv(out)))
        return F.relu(self.shortcut(x) + self.bn_expand(self.conv_expand(out)))


class Bearpaw(nn.Module):
    def __init__(self, blocks=2, cardinality=3, base_width=16, classes=10):
        super().__init__()
        self.conv_1_3x3 = nn.Conv2d(3, 64, 3, 1, 1, bias=False)
        self.bn_1 = nn.BatchNorm2d(64)
        for stage, (inputs, outputs) in enumerate(((64, 256), (256, 512), (512, 1024)), 1):
            block = nn.Sequential()
            for i in range(blocks):
                stride = 2 if i == 0 and stage > 1 else 1
                width = cardinality * base_width * outputs // 256
                name = f"stage_{stage}_bottleneck_{i}"
                before = inputs if i == 0 else outputs
                block.add_module(name, BearpawBlock(before, outputs, stride, cardinality, width))
            setattr(self, f"stage_{stage}", block)
        self.classifier = nn.Linear(1024, classes)

    def forward(self, x):
        x = F.relu(self.bn_1(self.conv_1_3x3(x)))
        x = self.stage_3(self.stage_2(self.stage_1(x)))
        return self.classifier(F.avg_pool2d(x, 8, 1).view(-1, 1024))


class PyclsBranch(nn.Module):
    """pycls/models/anynet.py: BottleneckTransform."""

    def __init__(self, inputs, outputs, stride, width, groups):
        super().__init__()
        self.a, self.a_bn = nn.Conv2d(inputs, width, 1, bias=False), nn.BatchNorm2d(width)
        self.b = nn.Conv2d(width, width, 3, stride, 1, groups=groups, bias=False)
        self.b_bn = nn.BatchNorm2d(width)
        self.c, self.c_bn = nn.Conv2d(width, outputs, 1, bias=False), nn.BatchNorm2d(outputs)

    def forward(self, x):
        x = F.relu(self.a_bn(self.a(x)))
        return self.c_bn(self.c(F.relu(self.b_bn(self.b(x)))))


class PyclsBlock(nn.Module):
    def __init__(self, inputs, outputs, stride, width, groups):
        super().__init__()
        if inputs != outputs or stride != 1:
            self.proj, self.bn = nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
        self.f = PyclsBranch(inputs, outputs, stride, width, groups)

    def forward(self, x):
        shortcut = self.bn(self.proj(x)) if hasattr(self, "proj") else x
        return F.relu(shortcut + self.f(x))


class Pycls(nn.Module):
    """Takes blue, green, red."""

    def __init__(self, depths=(1, 2, 1, 1), groups=4, classes=10):
        super().__init__()
        self.stem = nn.Sequential(
            collections.OrderedDict(conv=nn.Conv2d(3, 64, 7, 2, 3, bias=False), bn=nn.BatchNorm2d(64))
        )
        inputs = 64
        for stage, blocks in enumerate(depths, 1):
            outputs, part = 128 * 2**stage, nn.Sequential()
            for i in range(1, blocks + 1):
                stride = 2 if i == 1 and stage > 1 else 1
                part.add_module(f"b{i}", PyclsBlock(inputs, outputs, stride, outputs // 4, groups))
                inputs = outputs
            setattr(self, f"s{stage}", part)
        self.head = nn.Module()
        self.head.fc = nn.Linear(inputs, classes)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.stem(x)), 3, 2, 1)
        x = self.s4(self.s3(self.s2(self.s1(x))))
        return self.head.fc(x.mean((2, 3)))


class Mmpretrain(nn.Module):
    """ImageClassifier: backbone, neck without weights, head; blocks are called as torchvision's."""

    def __init__(self):
        super().__init__()
        self.backbone = small_torchvision()
        self.head = nn.Module()
        self.head.fc, self.backbone.fc = self.backbone.fc, nn.Identity()

    def forward(self, x):
        return self.head.fc(self.backbone(x))


def small_torchvision(classes=10, **options):
    block = torchvision.models.resnet.Bottleneck
    options = {"groups": 4, "width_per_group": 6} | options
    return torchvision.models.ResNet(block, [1, 2, 1, 1], num_classes=classes, **options)


def pictures(size=64):
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def check(path, theirs, size=64, reverse=False):
    found, info = load_weights(path)
    x = pictures(size)
    assert relative_error(found(x), theirs(x.flip(1) if reverse else x)) <= 1e-5
    return info


# ---------------------------------------------------------------------------- styles


def trainer_file(state):
    """As torchvision's references/classification/train.py writes them, argparse's Namespace included."""
    model = {f"module.{key}": value for key, value in state.items()}
    return {"model": model, "optimizer": {"state": {}}, "epoch": 3, "args": argparse.Namespace(lr=0.1)}


WRAPPERS = {
    "bare": lambda state: state,
    "module.": lambda state: {f"module.{key}": value for key, value in state.items()},
    "_orig_mod.": lambda state: {f"_orig_mod.module.{key}": value for key, value in state.items()},
    "state_dict": lambda state: {"epoch": 1, "arch": "resnext", "state_dict": state},
    "train.py": trainer_file,
    "old files": lambda state: {
        key: v for key, v in state.items() if not key.endswith("num_batches_tracked")
    },
}


@pytest.mark.parametrize("wrap", WRAPPERS)
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_torchvision_in_all_wrappings(wrap, zipped, tmp_path):
    theirs = unusual(small_torchvision())
    path = tmp_path / "w.pth"
    torch.save(WRAPPERS[wrap](theirs.state_dict()), path, _use_new_zipfile_serialization=zipped)
    info = check(path, theirs)
    assert info.origin == "torchvision or timm" and info.config.model.classes == 10
    assert (info.config.model.cardinality, info.config.model.base_width) == (4, 6)
    assert info.config.data.interpolation == "bilinear"


def test_averaged_weights_come_first(tmp_path):
    raw, average = unusual(small_torchvision()), unusual(small_torchvision(), seed=1)
    ema = {f"module.{key}": value for key, value in average.state_dict().items()} | {
        "n_averaged": torch.tensor(3)
    }
    torch.save({"model": raw.state_dict(), "model_ema": ema, "epoch": 1}, tmp_path / "tv.pth")
    torch.save(
        {"state_dict": raw.state_dict(), "state_dict_ema": average.state_dict()}, tmp_path / "timm.pth"
    )
    for name in ("tv.pth", "timm.pth"):
        assert check(tmp_path / name, average).weights == "averaged weights"


def test_timm(tmp_path):
    theirs = unusual(timm.create_model("resnext50_32x4d", pretrained=False, num_classes=12))
    torch.save(theirs.state_dict(), tmp_path / "w.pth")
    save_file(theirs.state_dict(), tmp_path / "w.safetensors")
    for name in ("w.pth", "w.safetensors"):
        info = check(tmp_path / name, theirs)
        assert (info.config.model.depth, info.config.model.cardinality) == (50, 32)


def test_ours_through_torchvision_and_timm_and_back(tmp_path):
    ours = unusual(ResNeXt((1, 2, 1, 1), 4, 6, 10))
    theirs = small_torchvision()
    theirs.load_state_dict(ours.state_dict())
    with torch.no_grad():
        assert relative_error(theirs.eval()(pictures()), ours(pictures())) <= 1e-5
    torch.save(theirs.state_dict(), tmp_path / "w.pth")
    back, _ = load_weights(tmp_path / "w.pth")
    assert all(torch.equal(value, ours.state_dict()[key]) for key, value in back.state_dict().items())


def test_mmpretrain(tmp_path):
    theirs = unusual(Mmpretrain())
    state = theirs.state_dict() | {"data_preprocessor.mean": torch.zeros(3)}
    names = [f"class {number}" for number in range(10)]
    meta = {"epoch": 100, "dataset_meta": {"classes": names}, "cfg": "style='pytorch'", "seed": np.int64(3)}
    torch.save(
        {"state_dict": state, "meta": meta, "message_hub": {"history": np.ones(3)}}, tmp_path / "w.pth"
    )
    info = check(tmp_path / "w.pth", theirs)
    assert info.origin == "mmpretrain" and info.classes == tuple(names)
    torch.save({"state_dict": state, "meta": meta | {"cfg": "style='caffe'"}}, tmp_path / "caffe.pth")
    with pytest.raises(UserError, match="stride in the first 1x1"):
        load_weights(tmp_path / "caffe.pth")


def test_pycls(tmp_path):
    theirs, other = unusual(Pycls()), unusual(Pycls(), seed=1)
    content = {"epoch": 99, "test_err": 22.0, "ema_err": 23.0, "cfg": "MODEL:\n  TYPE: anynet\n"}
    content |= {"model_state": theirs.state_dict(), "ema_state": other.state_dict()}
    torch.save(content, tmp_path / "w.pyth")
    info = check(tmp_path / "w.pyth", theirs, reverse=True)
    assert info.origin == "pycls" and info.weights == "weights"
    torch.save(content | {"ema_err": 21.0}, tmp_path / "w.pyth")
    assert check(tmp_path / "w.pyth", other, reverse=True).weights == "averaged weights"
    torch.save(content | {"cfg": "MODEL: {TYPE: resnet}\nRESNET:\n  STRIDE_1X1: true"}, tmp_path / "w.pyth")
    with pytest.raises(UserError, match="stride in the first 1x1"):
        load_weights(tmp_path / "w.pyth")


@pytest.mark.parametrize(
    ("origin", "std"), [("bearpaw", (51.5865, 50.847, 51.255)), ("prlz77", (63.0, 62.1, 66.7))]
)
def test_bearpaw_and_prlz77(origin, std, tmp_path):
    theirs = unusual(Bearpaw())
    state = {f"module.{key}": value for key, value in theirs.state_dict().items()}
    content = {"epoch": 300, "state_dict": state, "acc": 96.0, "best_acc": 96.3, "optimizer": {}}
    torch.save(content if origin == "bearpaw" else state, tmp_path / "model_best.pth.tar")
    info = check(tmp_path / "model_best.pth.tar", theirs, size=32)
    assert info.origin == origin and info.config.data.std == std
    assert (info.config.model.depth, info.config.model.cardinality, info.config.model.base_width) == (
        20,
        3,
        16,
    )
    folders = draw_folders(tmp_path / "pictures", {f"{number}": 1 for number in range(10)}, size=32)
    result = call(evaluate.main, tmp_path / "model_best.pth.tar", "--data", folders)
    assert result.status == 0 and f"weights of {origin}: resnext-20 (3x16d)" in result.output, result.error


def test_imagenet_weights_are_scored_on_the_folders_of_wnids(tmp_path):
    """Which class is which is known, so that --classes can name some."""
    theirs = unusual(small_torchvision(1000))
    torch.save(theirs.state_dict(), tmp_path / "w.pth")
    folders = draw_folders(tmp_path / "pictures", {"n01440764": 2, "n15075141": 2}, size=64)
    (tmp_path / "wnids.txt").write_text("n01440764\nn15075141\n")
    arguments = [tmp_path / "w.pth", "--data", folders, "--image-size", 64, "--workers", 0]
    result = call(evaluate.main, *arguments, "--classes", tmp_path / "wnids.txt")
    assert result.status == 0, result.error
    assert "2 of the network's 1,000" in result.output and "resized bilinear" in result.output


def test_torchvision_by_name(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    weights = torchvision.models.ResNeXt50_32X4D_Weights.IMAGENET1K_V1
    theirs = unusual(torchvision.models.resnext50_32x4d())
    cache = tmp_path / "hub" / "checkpoints"
    cache.mkdir(parents=True)
    torch.save(theirs.state_dict(), cache / weights.url.rpartition("/")[2])
    info = check("torchvision:resnext50_32x4d:IMAGENET1K_V1", theirs)
    assert info.config.data.resize == 256 and info.config.data.mean == pytest.approx(
        (123.675, 116.28, 103.53)
    )
    for name in ("torchvision:resnext51", "torchvision:resnext50_32x4d:V9", "torchvision:"):
        with pytest.raises(UserError, match="no such weights"):
            load_weights(name)
    with pytest.raises(UserError, match=r"cannot be had .*; fetch it yourself"):
        load_weights("torchvision:resnext101_32x8d")


# ---------------------------------------------------------------------------- without a last layer


def without_fc(model, name="fc"):
    """The network that puts out pooled features."""
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, nn.Identity())
    return unusual(model)


def moco(head):
    """A checkpoint of main_moco.py: two encoders, each with a head in place of fc, and the queue."""

    def checkpoint(state):
        encoder = state | {f"fc.{key}": value for key, value in head.state_dict().items()}
        found = {f"module.encoder_q.{key}": value for key, value in encoder.items()}
        found |= {f"module.encoder_k.{key}": torch.zeros_like(value) for key, value in encoder.items()}
        found |= {"module.queue": torch.rand(128, 16), "module.queue_ptr": torch.zeros(1, dtype=torch.long)}
        return {"epoch": 200, "arch": "resnext", "state_dict": found, "optimizer": {"state": {}}}

    return checkpoint


def swav(state):
    """The network of main_swav.py: projection_head and prototypes in place of fc."""
    head = nn.Sequential(nn.Linear(2048, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 8)).state_dict()
    state = state | {f"projection_head.{key}": value for key, value in head.items()}
    state["prototypes.weight"] = torch.rand(30, 8)
    return {f"module.{key}": value for key, value in state.items()}


def below(prefix, **others):
    return lambda state: {"state_dict": {f"{prefix}{key}": value for key, value in state.items()} | others}


BACKBONES = {
    "bare": (lambda state: state, "torchvision or timm"),
    "mmpretrain": (below("backbone."), "mmpretrain"),
    "mmpretrain, neck": (below("backbone.", **{"neck.fc0.weight": torch.ones(2, 2)}), "mmpretrain"),
    "MoCo v1": (moco(nn.Linear(2048, 128)), "MoCo"),
    "MoCo v2": (moco(nn.Sequential(nn.Linear(2048, 64), nn.ReLU(), nn.Linear(64, 128))), "MoCo"),
    "SwAV": (swav, "SwAV"),
}


@pytest.mark.parametrize(("wrap", "origin"), BACKBONES.values(), ids=BACKBONES)
def test_backbones(wrap, origin, tmp_path):
    theirs = without_fc(small_torchvision())
    content = wrap(theirs.state_dict())
    torch.save(content, tmp_path / "w.pth")
    save_file(content.get("state_dict", content), tmp_path / "w.safetensors")
    for name in ("w.pth", "w.safetensors"):
        info = check(tmp_path / name, theirs)
        assert info.origin == origin and info.outputs is None and info.classes is None
        found = load_weights(tmp_path / name)[0]
        assert isinstance(found.fc, nn.Identity) and found.state_dict().keys() == theirs.state_dict().keys()
        assert all(torch.equal(value, theirs.state_dict()[key]) for key, value in found.state_dict().items())


@pytest.mark.parametrize(
    ("make", "size"),
    [
        (lambda: unusual(timm.create_model("resnext50_32x4d", pretrained=False, num_classes=0)), 64),
        (lambda: without_fc(Pycls(), "head.fc"), 64),
        (lambda: without_fc(Bearpaw(), "classifier"), 32),
        (lambda: without_fc(ResNeXt((1, 2, 1), 3, 8, 7, stem="cifar", preactivation=True, form="B")), 32),
        (lambda: without_fc(ResNeXt((1, 1, 1), 1, 8, 7, stem="cifar", shortcut="C", form="A")), 32),
    ],
    ids=["timm", "pycls", "bearpaw", "ours, pre-activation", "ours, form A"],
)
def test_other_backbones(make, size, tmp_path):
    theirs = make()
    torch.save(theirs.state_dict(), tmp_path / "w.pth")
    assert check(tmp_path / "w.pth", theirs, size, reverse=isinstance(theirs, Pycls)).outputs is None


def test_what_a_backbone_is_good_for(tmp_path):
    """Its features can be had; who wants classes is told that there are none."""
    theirs, path, output = without_fc(small_torchvision()), tmp_path / "w.pth", tmp_path / "features.npz"
    torch.save(theirs.state_dict(), path)
    folders = draw_folders(tmp_path / "pictures", {"cat": 2, "dog": 1}, size=256)
    cats = sorted((folders / "val" / "cat").iterdir())
    result = call(extract_features.main, path, *cats, "--output", output, "--workers", 0)
    assert result.status == 0 and "(4x6d), no last layer; " in result.error, result.error
    pixels = np.stack([np.asarray(Image.open(cat), np.float32)[16:240, 16:240] / 255 for cat in cats])
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    images = torch.tensor((pixels - mean) / std, dtype=torch.float32).permute(0, 3, 1, 2)
    with torch.no_grad():
        assert relative_error(np.load(output)["features"], theirs(images)) <= 1e-5
    for main, *arguments in (
        (evaluate.main, "--data", folders),
        (predict.main, cats[0]),
        (export.main, tmp_path / "out.pth"),
    ):
        text = message(call(main, path, *arguments))
        advice = f"train one with model.pretrained={path}"
        assert text == f"{path}: has no last layer, so it names no classes; {advice}"
    assert not (tmp_path / "out.pth").exists()
    result = call(describe.main, path, "--json", tmp_path / "costs.json")
    assert result.status == 0 and "(4x6d), no last layer, input" in result.output
    costs = json.loads((tmp_path / "costs.json").read_text())
    assert costs["classes"] is None and costs["parameters"] == sum(p.numel() for p in theirs.parameters())


# ---------------------------------------------------------------------------- types of numbers

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2)
SAVERS = {
    "zip": torch.save,
    "legacy": lambda state, path: torch.save(state, path, _use_new_zipfile_serialization=False),
    "safetensors": save_file,
}


def cast(state, kinds, integers=False):
    """The tensors in types that take turns."""
    return {
        key: value.to(kinds[number % len(kinds)]) if value.is_floating_point() or integers else value
        for number, (key, value) in enumerate(state.items())
    }


@pytest.mark.parametrize("save", SAVERS.values(), ids=SAVERS)
@pytest.mark.parametrize("kinds", [*((kind,) for kind in FLOATS), FLOATS], ids=str)
@pytest.mark.parametrize("make", [small_torchvision, Pycls], ids=["torchvision", "pycls"])
def test_all_types_become_float32(make, kinds, save, tmp_path):
    theirs, path = unusual(make()), tmp_path / "w"
    for norm in (module for module in theirs.modules() if isinstance(module, nn.BatchNorm2d)):
        norm.num_batches_tracked.fill_(24)  # in all types
    for integers in (False, True):  # half() leaves them alone, a script may not
        state = cast(theirs.state_dict(), kinds, integers)
        theirs.load_state_dict(state)
        save(state, path)
        check(path, theirs, reverse=make is Pycls)
        found = load_weights(path)[0].state_dict()
        for key, value in found.items():
            assert value.dtype == (torch.int64 if key.endswith("num_batches_tracked") else torch.float32)
            assert value.dtype == torch.float32 or value == 24
    if make is small_torchvision:
        assert all(torch.equal(value, theirs.state_dict()[key]) for key, value in found.items())


def test_double_precision_on_request(tmp_path):
    theirs = unusual(small_torchvision()).double()
    theirs.conv1.weight.data += 1e-12  # which float32 cannot hold
    torch.save(theirs.state_dict(), tmp_path / "w.pth")
    found, _ = load_weights(tmp_path / "w.pth", dtype=torch.float64)
    assert all(torch.equal(value, theirs.state_dict()[key]) for key, value in found.state_dict().items())


# ---------------------------------------------------------------------------- what is refused


def state_without(*keys, **values):
    state = small_torchvision().state_dict()
    return {key: value for key, value in state.items() if key not in keys} | values


WRONG = {
    "a key is missing": (state_without("layer2.1.bn2.bias"), "has no layer2.1.bn2.bias"),
    "one too many": (state_without(**{"layer1.0.se.fc.weight": torch.ones(1)}), "has layer1.0.se.fc.weight"),
    "another shape": (state_without(**{"layer2.0.bn1.weight": torch.ones(3)}), "layer2.0.bn1.weight is"),
    "basic blocks": (torchvision.models.resnet18(num_classes=3).state_dict(), "two convolutions"),
    "not a ResNet": (nn.Linear(2, 2).state_dict(), "first key is 'weight'"),
    "numbers only": ({"epoch": 3}, "no state_dict"),
    "a list": ([1, 2], "no state_dict"),
    "a whole model": (small_torchvision(), "save the state_dict"),
    "quantised": (state_without(**{"fc.weight": torch.ones(10, 2048, dtype=torch.int8)}), "torch.int8, not"),
    "one channel": (state_without(**{"conv1.weight": torch.ones(64, 1, 7, 7)}), "first convolutions"),
    "expanded": (
        state_without(**{"fc.weight": torch.ones(1, 1).expand(10**9, 2048), "fc.bias": torch.ones(1)}),
        "larger than the file",
    ),
    "more than a classifier": (state_without(**{"prototypes.weight": torch.ones(1)}), "has prototypes"),
    "another last layer": (
        state_without("fc.weight", "fc.bias", **{"last_linear.weight": torch.ones(10, 2048)}),
        r"has last_linear\.weight, which this network lacks",
    ),
    "many blocks": (state_without(**{"layer1.99999.conv1.weight": torch.ones(1)}), "blocks are missing"),
}


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize(("content", "words"), WRONG.values(), ids=WRONG)
@pytest.mark.filterwarnings("ignore:.*source")
def test_other_files_are_refused(content, words, zipped, tmp_path):
    torch.save(content, tmp_path / "w.pt", _use_new_zipfile_serialization=zipped)
    with pytest.raises(UserError, match=words) as caught:
        load_weights(tmp_path / "w.pt")
    assert "w.pt" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is empty"),
        (b"hello", "not a file of weights"),
        (os.urandom(500), "."),
        (b"\x10" + b"\0" * 7 + b'{"a": 1', "."),
        (struct.pack("<Q", 2**60) + b"{", "."),
        (b"PK\x03\x04 and no more", "damaged"),
        (b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.\x80\x02M\xe9\x03.", "damaged|cut off"),
    ],
)
def test_files_of_no_kind(content, words, tmp_path):
    (tmp_path / "w.pt").write_bytes(content)
    with pytest.raises(UserError, match=words):
        load_weights(tmp_path / "w.pt")


def test_a_small_pickle_takes_no_large_memory(tmp_path):
    """A number of a memo for which the unpickler in C would make 64 GiB of room; long claims of all kinds."""
    for content in (
        b"Nr\xff\xff\xff\xff.",
        b"B\xff\xff\xff\x7fx.",
        b"\x8b\xff\xff\xff\x7fx.",
        b"\x96" + b"\xff" * 5 + b"\0\0\0x.",
    ):
        with zipfile.ZipFile(tmp_path / "w.pt", "w") as archive:
            archive.writestr("w/data.pkl", b"\x80\x05" + content)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        with pytest.raises(UserError):
            load_weights(tmp_path / "w.pt")
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1 << 18  # KiB


def test_pickles_that_take_for_ever(tmp_path):
    """2^60 hashes of a nested tuple as a key; millions of empty objects."""
    pairs = [b"h" + bytes([i]) + b"h" + bytes([i]) + b"\x86q" + bytes([i + 1]) + b"0" for i in range(60)]
    bomb = b"\x80\x02K\1\x85q\0" + b"0" + b"".join(pairs) + b"}h\x3cK\1s."
    ours = tmp_path / "ours.pt"
    for content, words in (
        (bomb, "neither text nor number"),
        (b"\x80\x02" + b"}0" * 3_000_000 + b".", "parts"),
    ):
        with zipfile.ZipFile(tmp_path / "w.pt", "w") as archive:
            archive.writestr("w/data.pkl", content)
        with pytest.raises(UserError, match=words):
            load_weights(tmp_path / "w.pt")
        with zipfile.ZipFile(ours, "w") as archive:
            archive.writestr(
                "w/data.pkl", content.replace(b"\x80\x02", b"\x80\x02X\x12\0\0\0resnext checkpoint0", 1)
            )
        for read in (load_weights, read_checkpoint):
            with pytest.raises(UserError, match=words):
                read(ours)


def test_tensors_that_promise_a_large_network(tmp_path):
    """Names of many blocks or paths, with nothing in them."""
    paths = {f"layer1.0.paths.{i}.conv2.weight": torch.empty(0, 0, 0, 0) for i in range(300)}
    state = small_torchvision().state_dict() | paths
    torch.save(state, tmp_path / "w.pt")
    with pytest.raises(UserError, match=r"blocks are missing|first convolutions"):
        load_weights(tmp_path / "w.pt")


def test_the_same_weights_twice(tmp_path):
    state = small_torchvision().state_dict()
    torch.save(
        state | {f"model.{key}": torch.zeros_like(value) for key, value in state.items()}, tmp_path / "w.pt"
    )
    with pytest.raises(UserError, match=r"two of its tensors are conv1\.weight"):
        load_weights(tmp_path / "w.pt")


def test_variants_that_a_name_gives_away(tmp_path):
    state = small_torchvision().state_dict()
    torch.save({"arch": "resnetblur50", "state_dict": state}, tmp_path / "w.pt")
    with pytest.raises(UserError, match="resnetblur50 pools otherwise"):
        load_weights(tmp_path / "w.pt")


def test_what_is_no_file():
    for name in ("/dev/zero", "/dev/null"):
        with pytest.raises(UserError, match="is no file"):
            load_weights(name)


def test_a_torchscript_program(tmp_path):
    torch.jit.save(torch.jit.trace(small_torchvision().eval(), pictures()), tmp_path / "w.pt")
    with pytest.raises(UserError, match="TorchScript"):
        load_weights(tmp_path / "w.pt")


# ---------------------------------------------------------------------------- hostile


class Command:
    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


class SetState:
    """Pickles as a tensor whose __setstate__ is called."""

    def __init__(self, state):
        self.state = state

    def __reduce__(self):
        return torch.empty, (1,), self.state


def attacks(marker):
    command = Command(f"touch {marker}")
    return {
        "value": {"state_dict": small_torchvision().state_dict(), "epoch": command},
        "key": {"state_dict": {command: torch.ones(1)}},
        "nested": {"state_dict": {"conv1.weight": [[(command,)]]}},
        "bytes of a pickle": {"state_dict": pickle.dumps(command), "x": command},
        "the whole": command,
        "a tensor's state": {"x": SetState((torch.empty(0).untyped_storage(), 0, (2**40,), (1,)))},
    }


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("name", attacks(""))
def test_nothing_in_a_file_is_executed(name, zipped, tmp_path):
    marker = tmp_path / "executed"
    torch.save(attacks(marker)[name], tmp_path / "w.pt", _use_new_zipfile_serialization=zipped)
    if name == "value":
        load_weights(tmp_path / "w.pt")
    else:
        with pytest.raises(UserError):
            load_weights(tmp_path / "w.pt")
    assert not marker.exists()


@pytest.mark.parametrize("format", ["", "resnext checkpoint"], ids=["theirs", "ours"])
def test_tensors_of_untyped_storages(format, tmp_path):
    """float8 of a shape that its numbers do not fill, of a type that they do not make, of what is no type."""
    buffer = io.BytesIO()
    torch.save({"format": format, "conv1.weight": torch.ones(2, 3).to(torch.float8_e5m2)}, buffer)
    shape, kind = b"K\x02K\x03\x86", b"ctorch\nfloat8_e5m2\n"
    changes = [
        (shape, b"J\xff\xff\xff\x7fK\x03\x86"),
        (kind, b"ctorch\nDoubleStorage\n"),
        (kind, b"cos\nsystem\n"),
    ]
    for old, new in changes:
        with zipfile.ZipFile(buffer) as whole, zipfile.ZipFile(tmp_path / "w.pt", "w") as archive:
            for name in whole.namelist():
                content = whole.read(name)
                if name.endswith("data.pkl"):
                    assert content.count(old) == 1
                    content = content.replace(old, new)
                archive.writestr(name, content)
        with pytest.raises(UserError, match=r"w\.pt: .*(damaged|does not fit|not a checkpoint)"):
            load_weights(tmp_path / "w.pt")


def test_opcodes_that_call(tmp_path):
    """Every way a pickle can name a function."""
    marker = tmp_path / "executed"
    text = f"touch {marker}".encode()
    calls = [
        b"cos\nsystem\n(U" + bytes([len(text)]) + text + b"tR.",
        b"(U" + bytes([len(text)]) + text + b"ios\nsystem\n.",
        b"(cos\nsystem\nU" + bytes([len(text)]) + text + b"o.",
        b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c" + bytes([len(text)]) + text + b"\x85R.",
        b"\x80\x02cbuiltins\nexec\nU" + bytes([len(text)]) + text + b"\x85\x81.",
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n}U\x08__code__cos\nsystem\nsb.",
    ]
    for content in calls:
        with zipfile.ZipFile(tmp_path / "w.pt", "w") as archive:
            archive.writestr("w/data.pkl", content)
            archive.writestr("w/version", "3")
        with pytest.raises(UserError):
            load_weights(tmp_path / "w.pt")
    assert not marker.exists()


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_damaged_files(zipped, tmp_path):
    buffer, path = io.BytesIO(), tmp_path / "w.pt"
    theirs = small_torchvision()
    torch.save(theirs.state_dict(), buffer, _use_new_zipfile_serialization=zipped)
    content, generator = buffer.getvalue(), np.random.default_rng(0)
    for end in [*range(0, 400, 37), *generator.integers(400, len(content) - 1, 12)]:
        path.write_bytes(content[:end])
        with pytest.raises(UserError):
            load_weights(path)
    start = content.find(b"data.pkl") if zipped else 0
    for _ in range(60):
        changed = bytearray(content)
        for place in generator.integers(start, start + 15_000, 3):
            changed[place] = generator.integers(256)
        path.write_bytes(changed)
        try:
            load_weights(path)
        except UserError as error:
            assert "\n" not in str(error) and len(str(error)) < 500
