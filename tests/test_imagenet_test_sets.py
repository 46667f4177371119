"""ImageNet's test sets in their real layouts: the right classes, columns, and crops; hits counted by hand.

The network answers every image alike: its last layer is nothing but a bias. So each count below follows from
the list RANKING and the labels alone.
"""

import csv
import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import call, message, tiny
from PIL import Image
from shard_files import pack, sample

import evaluate
import train
from data.imagenet_archives import imagenet_classes
from data.label_sets import read_label_sets
from resnext.weights.load import load_weights

WNIDS = imagenet_classes()
RANKING = (970, 230, 57, 516, 809, 6, 11, 13)  # the best outputs of every image, best first
REAL = [[], [970, 795], [230, 231], [809], [516, 850], [57], [334]]  # how google's real.json begins


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder with the network as weights.pth."""
    root = tmp_path_factory.mktemp("sets")
    (root / "tiny.yaml").touch()
    draw(root / "data/train/a/0.png", root / "data/train/b/0.png", root / "data/val/a/0.png")
    settings = tiny(
        model__stem="imagenet", model__depth=None, model__stages="[1, 1, 1, 1]", model__shortcut=None,
        model__cardinality="2", model__base_width="4", data__dataset="folder", data__dir=str(root / "data"),
        data__image_size="32", data__workers="0", data__train_images=None, data__val_images=None,
        augment__padding=None, train__epochs="1", train__batch_size="2",
    )  # fmt: skip
    result = call(train.main, "--config", root / "tiny.yaml", "--output", root / "run", *settings)
    assert result.status == 0, result.error
    state = load_weights(root / "run")[0].state_dict()
    state["fc.weight"] = torch.zeros(1000, state["fc.weight"].shape[1])
    state["fc.bias"] = torch.zeros(1000)
    for rank, output in enumerate(RANKING):
        state["fc.bias"][output] = 10 - rank
    torch.save(state, root / "weights.pth")
    return root


def draw(*paths: Path, size: tuple[int, int] = (32, 32)) -> None:
    for seed, path in enumerate(paths):
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)
        Image.fromarray(pixels).save(path, "PNG")


@pytest.fixture
def score(folder, tmp_path, monkeypatch):
    """Return a function: options of evaluate.py → (images, top-1 errors, top-5 errors)."""
    monkeypatch.chdir(tmp_path)

    def run(*options: object, warning: str = "") -> tuple[int, int, int]:
        files = ("--json", "out.json", "--csv", "out.csv", "--workers", "0", "--device", "cpu")
        result = call(evaluate.main, folder / "weights.pth", *options, *files)
        assert result.status == 0, result.error
        assert (" loss " in result.output) == ("--real-labels" not in options)
        assert warning in result.error if warning else not result.error, result.error
        found = json.loads(Path("out.json").read_text())
        return found["images"], found["top1_errors"], found["top5_errors"]

    return run


def png() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (32, 32)).save(file, "PNG")
    return file.getvalue()


PNG = png()


def test_v2(score):
    """The folders 0…999 are outputs; sorted as strings, 970 would be another."""
    folders = [970, 970, 230, 57, 10, 100, 2, 1000 - 1]
    names = [f"imagenetv2-matched-frequency-format-val/{c}/{n}.jpeg" for n, c in enumerate(folders)]
    draw(*map(Path, names))
    assert score("--data", "imagenetv2-matched-frequency-format-val", warning="no images of 993") == (8, 6, 4)
    rows = list(csv.DictReader(Path("out.csv").read_text().splitlines()))
    assert {row["label"] for row in rows if row["correct"] == "1"} == {WNIDS[970]}


@pytest.mark.parametrize("name", ["imagenet-a", "imagenet-r"])
def test_some_columns_compete(name, score):
    """Among 6, 11 and 13, the network prefers 6; of all outputs, 970. The README does no harm."""
    for output, count in ((6, 3), (11, 2), (13, 1)):
        draw(*(Path(f"{name}/{WNIDS[output]}/0.00{n}_fox squirrel_0.5.jpg") for n in range(count)))
        draw(*(Path(f"imagenet/val/{WNIDS[output]}/{n}.JPEG") for n in range(4)))
    draw(*(Path(f"imagenet/val/{WNIDS[970]}/{n}.JPEG") for n in range(4)))
    Path(name, "README.txt").write_text("x")
    assert score("--data", name, "--classes", name) == (6, 3, 0)
    assert score("--data", "imagenet", "--classes", name) == (12, 8, 0)  # "A-clean"
    assert score("--data", name, warning="--classes DIR") == (6, 6, 6)


def test_shards_with_other_numbers(score, folder):
    """WordNet IDs in the names of images tell that 5 labels are not the numbers of the outputs."""
    for shift, name in ((0, "right"), (1, "wrong")):
        images = [part for c in (970, 6, 11) for part in sample(f"{WNIDS[c]}_x", c + shift, PNG, "png")]
        pack(Path(name, "val-0000.tar"), images)
    assert score("--data", "right", warning="no images of 997") == (3, 2, 2)
    error = message(call(evaluate.main, folder / "weights.pth", "--data", "wrong", "--device", "cpu"))
    assert f"wrong: shards of val: an image of {WNIDS[6]} has the label of {WNIDS[7]!r}" in error


def test_sketch(score):
    draw(Path(f"sketch/{WNIDS[970]}/sketch_0.JPEG"), Path(f"sketch/{WNIDS[809]}/sketch_1.JPEG"))
    draw(Path(f"sketch/{WNIDS[6]}/sketch_2.JPEG"))
    assert score("--data", "sketch", warning="no images of 997") == (3, 2, 1)


def test_c(score, folder):
    """The images have 224 pixels: they are neither resized nor cropped."""
    name = Path(f"imagenet-c/gaussian_noise/3/{WNIDS[970]}/ILSVRC2012_val_00000001.JPEG")
    draw(name, size=(224, 224))
    for severity in (1, 2, 4, 5):
        draw(Path(f"imagenet-c/gaussian_noise/{severity}/{WNIDS[6]}/x.JPEG"))
    options = ("--image-size", "224", "--resize", "224")
    assert score("--data", "imagenet-c/gaussian_noise/3", *options, warning="no images of 999") == (1, 0, 0)
    result = call(evaluate.main, folder / "weights.pth", "--data", "imagenet-c/gaussian_noise", *options)
    assert "did you mean --data imagenet-c/gaussian_noise/1?" in message(result)


def test_real(score):
    """Of seven images, 1 has no label and 7 no right answer: 2 is a hit, 3 to 6 are in the first five."""
    Path("real.json").write_text(json.dumps(REAL))
    wrong = WNIDS[0]  # the folder does not matter
    draw(*(Path(f"imagenet/val/{wrong}/ILSVRC2012_val_{number:08}.JPEG") for number in range(1, 8)))
    note = "6 of 7 images have right outputs"
    assert score("--data", "imagenet", "--real-labels", "real.json", warning=note) == (6, 5, 1)
    rows = list(csv.DictReader(Path("out.csv").read_text().splitlines()))
    assert [row["label"] for row in rows] == [WNIDS[c] for c in (970, 230, 809, 516, 57, 334)]
    assert [row["correct"] for row in rows] == list("100000")
    Path("flat").mkdir()
    Path("imagenet/val", wrong).rename("flat/val")
    Path("val.txt").write_text("".join(f"ILSVRC2012_val_{n:08}.JPEG {c}\n" for n, c in ((1, 65), (2, 970))))
    options = ("--data", "flat", "--val-list", "val.txt")
    assert score(*options, warning="no images of 998") == (2, 1, 1)
    assert score(*options, "--real-labels", "real.json", warning="1 of 2") == (1, 0, 0)


def mappings() -> None:
    """Write ObjectNet's mapping files with a few of their entries."""
    lines = ["kit fox", "analog clock", "digital clock", "banana", "umbrella"]
    files = {
        "folder_to_objectnet_label": {
            "alarm_clock": "Alarm clock",
            "banana": "Banana",
            "air_freshener": "Air",
        },
        "objectnet_to_imagenet_1k": {"Alarm clock": "analog clock; digital clock", "Banana": "banana"},
        "pytorch_to_imagenet_2012_id": {"409": 1, "230": 2, "954": 3},  # 230 instead of 530
    }
    Path("objectnet-1.0/mappings").mkdir(parents=True)
    Path("objectnet-1.0/mappings/imagenet_to_label_2012_v2").write_text("\n".join(lines) + "\n")
    for name, content in files.items():
        Path(f"objectnet-1.0/mappings/{name}.json").write_text(json.dumps(content))


def test_objectnet(score, folder):
    """A clock is a hit in the first five, a banana none; the air freshener is none of ImageNet's classes."""
    mappings()
    images = ("alarm_clock/a.png", "alarm_clock/b.png", "banana/c.png", "air_freshener/d.png")
    draw(*(Path("objectnet-1.0/images", image) for image in images))
    options = ("--data", "objectnet-1.0/images", "--real-labels", "objectnet-1.0/mappings")
    assert score(*options, warning="3 of 4 images have right outputs") == (3, 3, 1)
    assert read_label_sets("objectnet-1.0/mappings").of("alarm_clock/a.png") == [409, 230]
    for words, phrase in (
        (("--data", "objectnet-1.0", *options[2:]), "did you mean --data objectnet-1.0/images?"),
        (options[:2], "does not name; give the folders of all its classes; or name the classes"),
    ):
        assert phrase in message(call(evaluate.main, folder / "weights.pth", *words))


def test_objectnet_without_its_border(folder, tmp_path, monkeypatch):
    """The program sees what Pillow crops."""
    from data.image_folder import list_set
    from data.label_sets import ObjectNetFiles

    draw(tmp_path / "images/banana/x.png", size=(20, 30))
    files = ObjectNetFiles(**vars(list_set("", "val", classes=("banana",), folder=tmp_path / "images")))
    with Image.open(tmp_path / "images/banana/x.png") as image, Image.open(io.BytesIO(files.read(0))) as read:
        assert read.size == (26, 16)
        assert np.array_equal(np.asarray(read), np.asarray(image.crop((2, 2, 28, 18))))


@pytest.mark.parametrize(
    ("content", "options", "phrase"),
    [
        ("[[1], [1000]]", "", "an output is not a number from 0 to 999"),
        ("[[1], [1.0]]", "", "is neither ReaL's real.json nor ObjectNet's mappings/"),
        ('{"a": [1]}', "", "is neither ReaL's"),
        ("[1, 2]", "", "is neither ReaL's"),
        ("[[1]", "", "download it again"),
        ("[[1]]", "--classes imagenet", "omit --classes"),
        ("[[], []]", "", "no image of these classes"),
    ],
)
def test_refused_labels(content, options, phrase, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("real.json").write_text(content)
    draw(Path(f"imagenet/val/{WNIDS[0]}/ILSVRC2012_val_00000001.JPEG"))
    options = ("--data", "imagenet", "--real-labels", "real.json", *options.split())
    assert phrase in message(call(evaluate.main, folder / "weights.pth", *options))


def test_other_networks_are_refused(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("real.json").write_text("[[1]]")
    error = message(call(evaluate.main, folder / "run", "--real-labels", "real.json"))
    assert "the network has others" in error
