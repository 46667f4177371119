"""Which output belongs to which class folder: orders, origins, the user's choice, and a network as proof."""

import argparse
import json
import random
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import ROOT, Result, call, message, tiny
from PIL import Image
from timm.utils import natural_key as timm_key
from torch import Tensor
from torchvision.datasets import ImageFolder

import evaluate
import train
from resnext.classes import name_outputs, sort_classes
from resnext.config import ModelConfig
from resnext.errors import UserError
from resnext.models.resnext import build_model
from resnext.weights.load import load_weights

sys.path.insert(0, str(ROOT / "scripts"))
import predict

NATURAL = tuple(str(number) for number in range(1, 13))
STRING = ("1", "10", "11", "12", "2", "3", "4", "5", "6", "7", "8", "9")
ROWS = [NATURAL.index(name) for name in STRING]  # of the natural order, in string order


def test_orders_are_those_of_timm_and_torchvision(tmp_path):
    """Compared with the programs, on names of letters of both cases, digits and other characters."""
    draw = random.Random(0)
    names = {"".join(draw.choices("aBé10 2-_x9", k=draw.randint(1, 6))).strip() or "x" for _ in range(300)}
    natural = sort_classes(names, "natural")
    assert [timm_key(name) for name in natural] == sorted(timm_key(name) for name in names)
    for name in names:
        (tmp_path / name).mkdir()
        (tmp_path / name / "0.png").touch()
    assert list(sort_classes(names, "string")) == ImageFolder(tmp_path).classes


@pytest.mark.parametrize(
    ("names", "order", "expected"),
    [
        (["Mango", "apple", "10", "2"], "natural", ("2", "10", "apple", "Mango")),
        (["Mango", "apple", "10", "2"], None, ("10", "2", "Mango", "apple")),
        (list(map(str, range(12))), None, tuple(map(str, range(12)))),
        (["0", "1", "2", "10"], "string", ("0", "1", "10", "2")),
        (NATURAL, None, STRING),  # they do not start with 0
    ],
)
def test_sort_classes(names, order, expected):
    assert sort_classes(names, order) == expected


THOUSAND = tuple(map(str, range(1000)))  # ImageNet-V2


@pytest.mark.parametrize(
    ("names", "outputs", "origin", "order", "expected"),
    [
        (NATURAL, 12, "timm", None, NATURAL),
        (NATURAL, 12, "torchvision", None, STRING),
        (NATURAL, 12, "mmpretrain", None, STRING),
        (NATURAL, 12, "Torch7", None, STRING),
        (NATURAL, 12, "timm", "string", STRING),
        (NATURAL, 12, "torchvision or timm", "natural", NATURAL),
        (["cat", "dog", "n10", "n20"], 4, "torchvision or timm", None, ("cat", "dog", "n10", "n20")),
        (THOUSAND, 1000, "torchvision", None, THOUSAND),
        (["000", "001", "002"], 3, "torchvision", None, ("000", "001", "002")),
    ],
)
def test_name_outputs(names, outputs, origin, order, expected):
    assert name_outputs(names, outputs, origin, order, "--class-order ") == (expected, [])


def test_some_folders_that_are_numbers_of_outputs():
    names, (warning,) = name_outputs(
        ["0", "2", "10", "11"], 12, "torchvision or timm", None, "--class-order "
    )
    assert names == tuple(map(str, range(12))) and warning.endswith("give --class-order string")


@pytest.mark.parametrize(
    ("names", "origin", "text"),
    [
        (NATURAL, "torchvision or timm", "1, 2, 3, 4, … in timm's order, 1, 10, 11, 12, … in torchvision's"),
        (THOUSAND[:12], "Torch7", "may be numbers of outputs, or classes in the order of Torch7"),
        (["cat"], "timm", "there are 1 class folders, and the network has 12 classes"),
    ],
)
def test_unknown_order(names, origin, text):
    with pytest.raises(UserError, match=text):
        name_outputs(names, 12, origin, None, "--class-order ")


# ---------------------------------------------------------------------------- a network that is always right


def fit_last_layer(network: torch.nn.Module, images: Tensor, labels: list[int]) -> None:
    """Set the last layer by ridge regression, so that the network classifies all images correctly."""
    inputs = []
    handle = network.fc.register_forward_pre_hook(lambda _, arguments: inputs.append(arguments[0]))
    network(images)
    handle.remove()
    features, target = inputs[0].double(), torch.eye(12).double()[labels]
    center, scale = features.mean(0), features.std(0) + 1e-6
    known = (features - center) / scale
    gram = known.T @ known + 1e-2 * torch.eye(known.shape[1])
    weight = torch.linalg.solve(gram, known.T @ (target - target.mean(0))).T * 20
    network.fc.weight.copy_(weight / scale)
    network.fc.bias.copy_(-(weight / scale) @ center)
    assert network(images).argmax(1).tolist() == labels


@pytest.fixture(scope="module")
def numbered(tmp_path_factory) -> Path:
    """train/ and val/ with folders 1…12 of one color each, v2/val with 0…11, and weights in files.

    Output k - 1 of the network belongs to folder k, as timm numbers them.
    """
    root = tmp_path_factory.mktemp("numbered")
    draw = np.random.default_rng(1)
    images, labels = [], []
    for k in range(12):
        color = np.array((20 + 70 * (k % 4), 20 + 90 * (k // 4), (k * 97) % 256))
        for folder in (f"val/{k + 1}", f"train/{k + 1}", f"v2/val/{k}"):
            (root / folder).mkdir(parents=True)
            for number in range(2):
                pixels = np.clip(color + draw.integers(-6, 7, (32, 32, 3)), 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(root / folder / f"{number}.png")
                images.append(pixels)
                labels.append(k)
    torch.manual_seed(1)
    config = ModelConfig(
        stem="cifar", block_type="bottleneck", stages=(1, 1, 1), cardinality=4, base_width=8, shortcut="B"
    )
    network = build_model(config, 12).eval()
    mean, std = np.array([123.675, 116.28, 103.53]), np.array([58.395, 57.12, 57.375])
    pixels = torch.tensor((np.stack(images) - mean) / std, dtype=torch.float32).permute(0, 3, 1, 2)
    with torch.no_grad():
        fit_last_layer(network, pixels, labels)
    state = network.state_dict()
    torch.save(state, root / "bare.pth")
    arguments = argparse.Namespace(num_classes=12)
    timm = {"epoch": 3, "arch": "x", "state_dict": state, "version": 2, "args": arguments}
    torch.save(timm, root / "timm.pth.tar")
    torch.save({"model": state, "lr_scheduler": {}, "epoch": 3}, root / "torchvision.pth")
    for name, classes in (("words", "abcdefghijkl"), ("numbers", NATURAL)):  # mmpretrain's
        theirs = {f"{'head' if key.startswith('fc.') else 'backbone'}.{key}": state[key] for key in state}
        torch.save({"state_dict": theirs, "meta": {"classes": list(classes)}}, root / f"{name}.pth")
    (root / "names.txt").write_text("\n".join(NATURAL))
    (root / "few.txt").write_text("\n".join(NATURAL[:5]))
    return root


@pytest.mark.parametrize(
    ("weights", "data", "options", "errors", "warning"),
    [
        ("timm.pth.tar", ".", "", 0, None),
        ("torchvision.pth", ".", "", 22, None),  # as torchvision would count
        ("bare.pth", ".", "--class-order natural", 0, None),
        ("bare.pth", ".", "--class-names names.txt", 0, None),
        ("bare.pth", "v2", "", 0, "(0, 1, 2, 3, …) are interpreted as numbers of the network's outputs"),
        ("words.pth", "v2", "", 0, "0…11 are interpreted as numbers of the network's outputs, a, b, c, d, …"),
    ],
)
def test_evaluation(weights, data, options, errors, warning, numbered, tmp_path, monkeypatch):
    monkeypatch.chdir(numbered)
    target = tmp_path / "result.json"
    result = call(evaluate.main, weights, "--data", data, *options.split(), "--json", target, "--device=cpu")
    assert result.status == 0, result.error
    assert json.loads(target.read_text())["top1_errors"] == errors
    assert warning in result.error if warning else result.error == ""


@pytest.mark.parametrize(
    ("weights", "data", "options", "texts"),
    [
        ("bare.pth", ".", "", ["--class-order natural (timm) or --class-order string", "--class-names"]),
        ("bare.pth", ".", "--class-names few.txt", ["names 5 classes", "has 12"]),
        ("numbers.pth", "v2", "", ["are not those that the network was trained on"]),
        ("numbers.pth", ".", "--class-order natural", ["names its classes"]),
    ],
)
def test_refused_evaluation(weights, data, options, texts, numbered, monkeypatch):
    monkeypatch.chdir(numbered)
    error = message(call(evaluate.main, weights, "--data", data, *options.split()))
    assert all(text in error for text in texts), error


def train_folder(folder: Path, output: Path, *more: str, **changes: str) -> Result:
    """Train on class folders."""
    config = output.with_suffix(".yaml")
    config.touch()
    settings = {"data__dataset": "folder", "data__dir": str(folder), "data__image_size": "32"}
    settings |= {"model__depth": "11", "model__cardinality": "4", "model__base_width": "8"}
    settings |= dict.fromkeys(
        ("model__shortcut", "augment__padding", "data__train_images", "data__val_images")
    )
    arguments = tiny(**settings, train__epochs="1", **changes)
    return call(train.main, "--config", config, "--output", output, *arguments, *more)


def test_pretrained_weights_keep_their_classes(numbered, tmp_path):
    """Rows of the last layer are permuted if the order differs. The learning rate changes no weight."""

    def start(output: Path, weights: Path, *more: str) -> Result:
        return train_folder(numbered, output, *more, optimizer__lr="1e-12", model__pretrained=str(weights))

    def check(output: Path, classes: tuple[str, ...], expected: Tensor) -> None:
        model, info = load_weights(output)
        assert info.classes == classes
        torch.testing.assert_close(model.fc.weight, expected, rtol=0, atol=1e-6)

    theirs = load_weights(numbered / "timm.pth.tar")[0].fc.weight
    result = start(tmp_path / "timm", numbered / "timm.pth.tar")
    assert "last layer included" in result.output, result.error
    check(tmp_path / "timm", STRING, theirs[ROWS])
    result = start(tmp_path / "again", tmp_path / "timm", "data.class_order=natural")  # our own weights
    assert "last layer included" in result.output, result.error
    check(tmp_path / "again", NATURAL, theirs)
    error = message(start(tmp_path / "bare", numbered / "bare.pth"))
    assert "data.class_order=natural (timm)" in error and "model.reset_classifier=true" in error
    result = start(tmp_path / "chosen", numbered / "bare.pth", "data.class_order=natural")
    assert result.status == 0, result.error
    check(tmp_path / "chosen", NATURAL, theirs)


def test_a_resumed_run_keeps_its_order(numbered, tmp_path):
    """Folders 0…11 were once numbered in string order; such a checkpoint keeps it."""
    for split in ("train", "val"):
        (tmp_path / "data").mkdir(exist_ok=True)
        (tmp_path / "data" / split).symlink_to(numbered / "v2" / "val")
    result = train_folder(tmp_path / "data", tmp_path / "run", data__class_order="string")
    assert result.status == 0, result.error
    before = load_weights(tmp_path / "run")[1].classes
    assert before[:3] == ("0", "1", "10")
    changes = ("data.class_order=null", "train.epochs=2", "run.device=cpu")
    result = call(train.main, "--resume", tmp_path / "run", *changes)
    assert result.status == 0, result.error
    assert torch.load(tmp_path / "run/checkpoints/last.pt", weights_only=True)["classes"] == list(before)


@pytest.mark.parametrize(("options", "name"), [([], "class 10"), (["--class-names", "names.txt"], "11")])
def test_prediction_with_names(options, name, numbered, monkeypatch):
    monkeypatch.chdir(numbered)
    result = call(predict.main, "bare.pth", "val/11/0.png", "--top", "1", "--format", "csv", *options)
    assert result.output.splitlines()[1].split(",")[2] == name
