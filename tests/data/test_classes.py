"""Which output answers to which class folder: orders, origins, the user's word, a network that proves it."""

import argparse
import json
import random
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import ROOT, call, message, tiny
from PIL import Image
from timm.utils import natural_key as timm_key
from torchvision.datasets import ImageFolder

import evaluate
import train
from resnext.classes import name_outputs, sort_classes
from resnext.config import ModelConfig
from resnext.errors import UserError
from resnext.models.resnext import build_model
from resnext.weights.load import load_weights

NUMBERS = [str(number) for number in range(1, 13)]
NATURAL = tuple(NUMBERS)
STRING = ("1", "10", "11", "12", "2", "3", "4", "5", "6", "7", "8", "9")


def test_orders_are_timms_and_torchvisions(tmp_path):
    """Against the programs themselves, on names of letters of both cases, digits and other signs."""
    draw = random.Random(0)
    names = {"".join(draw.choices("aBé10 2-_x9", k=draw.randint(1, 6))).strip() or "x" for _ in range(300)}
    natural = sort_classes(names, "natural")
    assert [timm_key(name) for name in natural] == sorted(timm_key(name) for name in names)
    for name in names:
        (tmp_path / name).mkdir()
        (tmp_path / name / "0.png").touch()
    assert list(sort_classes(names, "string")) == ImageFolder(tmp_path).classes
    assert sort_classes({"Mango", "apple", "10", "2"}, "natural") == ("2", "10", "apple", "Mango")
    assert sort_classes({"Mango", "apple", "10", "2"}) == ("10", "2", "Mango", "apple")


def test_names_that_are_numbers():
    assert sort_classes(map(str, range(12))) == tuple(map(str, range(12)))
    assert sort_classes(map(str, range(12)), "string")[:3] == ("0", "1", "10")
    assert sort_classes(NUMBERS) == STRING, "they do not begin with 0"


@pytest.mark.parametrize(
    ("origin", "order", "expected"),
    [
        ("timm", None, NATURAL),
        ("torchvision", None, STRING),
        ("mmpretrain", None, STRING),
        ("Torch7", None, STRING),
        ("timm", "string", STRING),
        ("torchvision or timm", "natural", NATURAL),
    ],
)
def test_order_of_the_origin_or_the_users(origin, order, expected):
    assert name_outputs(NUMBERS, 12, origin, order, "--class-order ") == (expected, [])


def test_order_that_is_not_known():
    with pytest.raises(UserError, match=r"1, 2, 3, 4, … in timm's order, 1, 10, 11, 12, … in torchvision's"):
        name_outputs(NUMBERS, 12, "torchvision or timm", None, "--class-order ")
    same = ["cat", "dog", "n10", "n20"]
    assert name_outputs(same, 4, "torchvision or timm", None, "")[0] == tuple(same), (
        "both orders are the same"
    )


def test_numbers_are_outputs():
    folders = ["0", "2", "10", "11"]  # some classes only
    names, warnings = name_outputs(folders, 12, "torchvision or timm", None, "--class-order ")
    assert names == tuple(map(str, range(12)))
    assert len(warnings) == 1 and warnings[0].endswith("give --class-order string")
    with pytest.raises(
        UserError, match=r"0…11 may be the outputs' numbers, or classes in the order of Torch7"
    ):
        name_outputs([str(number) for number in range(12)], 12, "Torch7", None, "--class-order ")
    thousand = tuple(map(str, range(1000)))  # ImageNet-V2
    assert name_outputs(thousand, 1000, "torchvision", None, "") == (thousand, [])
    assert name_outputs(["000", "001", "002"], 3, "torchvision", None, "") == (("000", "001", "002"), [])


# ---------------------------------------------------------------------------- a network that is always right


@pytest.fixture(scope="module")
def numbered(tmp_path_factory) -> Path:
    """train/ and val/ with folders 1…12 of one colour each, v2/val with 0…11, and weights in files.

    Output k - 1 of the network answers to folder k, as timm numbers them.
    """
    root = tmp_path_factory.mktemp("numbered")
    draw = np.random.default_rng(1)
    pictures, labels = [], []
    for k in range(12):
        color = np.array((20 + 70 * (k % 4), 20 + 90 * (k // 4), (k * 97) % 256))
        for place in (root / "val" / str(k + 1), root / "train" / str(k + 1), root / "v2" / "val" / str(k)):
            place.mkdir(parents=True)
            for number in range(2):
                pixels = np.clip(color + draw.integers(-6, 7, (32, 32, 3)), 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(place / f"{number}.png")
                pictures.append(pixels)
                labels.append(k)
    torch.manual_seed(1)
    network = build_model(ModelConfig(stem="cifar", stages=(1, 1, 1), cardinality=4, base_width=8), 12).eval()
    mean, std = np.array([123.675, 116.28, 103.53]), np.array([58.395, 57.12, 57.375])
    images = torch.tensor((np.stack(pictures) - mean) / std, dtype=torch.float32).permute(0, 3, 1, 2)
    with torch.no_grad():
        taken = []
        handle = network.fc.register_forward_pre_hook(lambda _, inputs: taken.append(inputs[0]))
        network(images)
        handle.remove()
        features, target = taken[0].double(), torch.eye(12).double()[labels]
        centre, scale = features.mean(0), features.std(0) + 1e-6
        known = (features - centre) / scale
        gram = known.T @ known + 1e-2 * torch.eye(known.shape[1])
        weight = torch.linalg.solve(gram, known.T @ (target - target.mean(0))).T * 20
        network.fc.weight.copy_(weight / scale)
        network.fc.bias.copy_(-(weight / scale) @ centre)
        assert (network(images).argmax(1) == torch.tensor(labels)).all()
    state = network.state_dict()
    torch.save(state, root / "bare.pth")
    arguments = argparse.Namespace(num_classes=12)
    timm = {"epoch": 3, "arch": "x", "state_dict": state, "version": 2, "args": arguments}
    torch.save(timm, root / "timm.pth.tar")
    torch.save({"model": state, "lr_scheduler": {}, "epoch": 3}, root / "torchvision.pth")
    return root


def errors(*arguments: object) -> tuple[int, str]:
    """(wrong pictures, standard error) of an evaluation."""
    target = Path(arguments[0]).with_name("result.json")
    result = call(evaluate.main, *arguments, "--json", target, "--device", "cpu")
    assert result.status == 0, result.error
    return json.loads(target.read_text())["top1_errors"], result.error


def test_evaluation_in_the_order_of_the_origin(numbered):
    assert errors(numbered / "timm.pth.tar", "--data", numbered) == (0, "")
    assert errors(numbered / "torchvision.pth", "--data", numbered)[0] == 22, "as torchvision would count"
    refused = message(call(evaluate.main, numbered / "bare.pth", "--data", numbered))
    assert "--class-order natural (timm) or --class-order string" in refused and "--class-names" in refused


def test_evaluation_in_the_users_order(numbered, tmp_path):
    bare = numbered / "bare.pth"
    assert errors(bare, "--data", numbered, "--class-order", "natural") == (0, "")
    assert errors(bare, "--data", numbered, "--class-order", "string")[0] == 22
    (tmp_path / "names.txt").write_text("\n".join(NUMBERS))
    assert errors(bare, "--data", numbered, "--class-names", tmp_path / "names.txt") == (0, "")
    (tmp_path / "few.txt").write_text("\n".join(NUMBERS[:5]))
    few = call(evaluate.main, bare, "--data", numbered, "--class-names", tmp_path / "few.txt")
    assert "names 5 classes" in message(few) and "has 12" in message(few)


def test_folders_that_are_the_numbers_of_outputs(numbered):
    wrong, said = errors(numbered / "bare.pth", "--data", numbered / "v2")
    assert wrong == 0
    assert "warning: the class folders (0, 1, 2, 3, …) are taken for the numbers of the network's" in said
    refused = message(call(evaluate.main, numbered / "torchvision.pth", "--data", numbered / "v2"))
    assert "--class-order natural (numbers) or --class-order string" in refused
    told = errors(numbered / "torchvision.pth", "--data", numbered / "v2", "--class-order", "natural")
    assert told == (0, "")
    assert errors(numbered / "timm.pth.tar", "--data", numbered / "v2") == (0, "")


def test_numbers_and_a_network_that_names_its_classes(numbered, tmp_path):
    """Words as names: numbers are its outputs, with a warning. Other numbers as names: refused."""
    words = "abcdefghijkl"
    for name, named in (("words", list(words)), ("numbers", NUMBERS)):
        file = {"state_dict": load_weights(numbered / "bare.pth")[0].state_dict(), "meta": {"classes": named}}
        file["state_dict"] = {f"backbone.{key}": value for key, value in file["state_dict"].items()}
        for key in ("weight", "bias"):
            file["state_dict"][f"head.fc.{key}"] = file["state_dict"].pop(f"backbone.fc.{key}")
        torch.save(file, tmp_path / f"{name}.pth")
    wrong, said = errors(tmp_path / "words.pth", "--data", numbered / "v2")
    assert wrong == 0 and "0…11 are taken for the numbers of the network's outputs, a, b, c, d, …" in said
    refused = call(evaluate.main, tmp_path / "numbers.pth", "--data", numbered / "v2")
    assert "are not those that the network was trained on" in message(refused)
    unneeded = call(evaluate.main, tmp_path / "numbers.pth", "--data", numbered, "--class-order", "natural")
    assert "names its classes" in message(unneeded)


def small(folder: Path, **changes: str | None) -> list[str]:
    settings = {"data__dataset": "folder", "data__dir": str(folder), "data__image_size": "32"}
    network = {"model__depth": "11", "model__cardinality": "4", "model__base_width": "8"}
    others = {"model__shortcut": None, "train__epochs": "1", "augment__padding": None}
    others |= {"data__train_images": None, "data__val_images": None}
    return tiny(**settings, **network, **others, **changes)


def start(config: Path, weights: Path, folder: Path, *more: str, rate: str = "1e-12"):
    """A training that begins with weights, at a rate that changes nothing."""
    config.touch()
    settings = small(folder, optimizer__lr=rate, model__pretrained=str(weights))
    return call(train.main, "--config", config, "--output", config.with_suffix(""), *settings, *more)


def test_pretrained_weights_keep_their_classes(numbered, tmp_path):
    """Started from timm's weights, the run's outputs are its own folders': string order, rows permuted."""
    result = start(tmp_path / "timm.yaml", numbered / "timm.pth.tar", numbered)
    assert "last layer included" in result.output, result.error
    model, info = load_weights(tmp_path / "timm")
    assert info.classes == STRING
    theirs = load_weights(numbered / "timm.pth.tar")[0].fc.weight
    rows = [NUMBERS.index(name) for name in STRING]
    torch.testing.assert_close(model.fc.weight, theirs[rows], rtol=0, atol=1e-6)

    refused = message(start(tmp_path / "bare.yaml", numbered / "bare.pth", numbered))
    assert "data.class_order=natural (timm)" in refused and "model.reset_classifier=true" in refused
    result = start(tmp_path / "said.yaml", numbered / "bare.pth", numbered, "data.class_order=natural")
    assert result.status == 0, result.error
    model, info = load_weights(tmp_path / "said")
    assert info.classes == NATURAL
    torch.testing.assert_close(model.fc.weight, theirs, rtol=0, atol=1e-6)


def test_our_own_weights_in_another_order_keep_their_last_layer(numbered, tmp_path):
    assert start(tmp_path / "a.yaml", numbered / "timm.pth.tar", numbered).status == 0
    result = start(tmp_path / "b.yaml", tmp_path / "a", numbered, "data.class_order=natural")
    assert "last layer included" in result.output, result.error
    first, second = load_weights(tmp_path / "a")[0], load_weights(tmp_path / "b")[0]
    rows = [STRING.index(name) for name in NATURAL]
    torch.testing.assert_close(second.fc.weight, first.fc.weight[rows], rtol=0, atol=1e-6)


def test_a_run_goes_on_in_the_order_that_it_had(numbered, tmp_path):
    """Folders 0…11 were once numbered in string order: such a checkpoint stays what it is."""
    folder = tmp_path / "data"
    for part in ("train", "val"):
        (folder / part).mkdir(parents=True)
        for number in range(12):
            (folder / part / str(number)).symlink_to(numbered / "v2" / "val" / str(number))
    (tmp_path / "run.yaml").touch()
    settings = small(folder, data__class_order="string")
    result = call(train.main, "--config", tmp_path / "run.yaml", "--output", tmp_path / "run", *settings)
    assert result.status == 0, result.error
    before = load_weights(tmp_path / "run")[1].classes
    assert before[:3] == ("0", "1", "10")
    result = call(
        train.main, "--resume", tmp_path / "run", "data.class_order=null", "train.epochs=2", "run.device=cpu"
    )
    assert result.status == 0, result.error
    assert torch.load(tmp_path / "run/checkpoints/last.pt", weights_only=True)["classes"] == list(before)


def test_prediction_with_names(numbered, tmp_path):
    sys.path.insert(0, str(ROOT / "scripts"))
    import predict

    (tmp_path / "names.txt").write_text("".join(f"n{k}\n" for k in NUMBERS))
    picture = numbered / "val" / "11" / "0.png"
    shown = ["--top", "1", "--format", "csv"]
    result = call(predict.main, numbered / "bare.pth", picture, *shown)
    assert result.output.splitlines()[1].split(",")[2] == "class 10"
    result = call(
        predict.main, numbered / "bare.pth", picture, *shown, "--class-names", tmp_path / "names.txt"
    )
    assert result.output.splitlines()[1].split(",")[2] == "n11"
