"""predict.py and extract_features.py: the outputs of evaluation, for any images, and what is refused."""

import csv
import io
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from commands import ROOT, call, draw_folders, message, run_python, run_script, snapshot, tiny
from PIL import Image

import evaluate
import train
from data.imagenet_archives import IMAGENET_WNIDS
from data.unlabeled import find_images
from resnext import load_weights

sys.path.insert(0, str(ROOT / "scripts"))
import extract_features
import predict


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """train/ and val/ with cat and dog of 12 pixels, and a gray image of another shape."""
    root = draw_folders(tmp_path_factory.mktemp("set") / "images", {"cat": 4, "dog": 3}, size=12)
    Image.effect_noise((31, 17), 80).save(root / "val" / "dog" / "wide.jpg")
    return root


@pytest.fixture(scope="module", params=["memory", "fast", "torch7"])
def run(request, images) -> Path:
    """A run on these images in each of the pipelines; networks see 8 pixels."""
    folder = images.parent / request.param
    keys = {"data__pipeline": request.param, "augment__padding": "0", "data__workers": "0"}
    settings = tiny(data__dataset="folder", data__dir=str(images), train__epochs="1", **keys)
    settings.append("schedule.warmup_epochs=0")
    result = call(train.main, "--config", "demo.yaml", "--output", folder, *settings)
    assert result.status == 0, result.error
    return folder


@pytest.fixture
def some(folder_run) -> list[Path]:
    """Three images of `folder_run`."""
    return sorted((folder_run.parent / "pictures" / "val" / "cat").iterdir())


def rows(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text)))


def test_same_classes_as_evaluation(run, images, tmp_path):
    assert call(evaluate.main, run, "--csv", tmp_path / "evaluate.csv").status == 0
    options = ("--top", "1", "--batch-size", "3", "--workers", "1", "--output", tmp_path / "predict.csv")
    result = call(predict.main, run, images / "val", *options)
    assert (result.status, result.output, result.error) == (0, "", "")
    expected = rows((tmp_path / "evaluate.csv").read_text())
    found = rows((tmp_path / "predict.csv").read_text())
    assert len(found) == 8
    assert [row["path"] for row in found] == [str(images / "val" / row["path"]) for row in expected]
    assert [row["class"] for row in found] == [row["top1"] for row in expected]
    for row, other in zip(found, expected, strict=True):
        assert float(row["probability"]) == pytest.approx(float(other["confidence"]), abs=1e-4)


def test_formats(folder_run, some):
    table = call(predict.main, folder_run, *some).output.splitlines()
    as_csv = call(predict.main, folder_run, *some, "--format", "csv").output
    as_json = json.loads(call(predict.main, folder_run, *some, "--format", "json").output)
    assert as_csv.startswith("path,rank,class,probability\n")
    assert [one["path"] for one in as_json] == list(map(str, some)) == table[::3]
    flat = [row for one in as_json for row in one["predictions"]]  # min(5, classes) of each
    assert [row["index"] for row in flat] == [["cat", "dog"].index(row["class"]) for row in flat]
    assert [(row["rank"], row["class"]) for row in rows(as_csv)] == [
        (str(1 + number % 2), row["class"]) for number, row in enumerate(flat)
    ]
    for one in as_json:
        first, second = (row["probability"] for row in one["predictions"])
        assert first >= second and first + second == pytest.approx(1, abs=1e-6)
    assert table[1] == f"  {100 * flat[0]['probability']:6.2f}%  {flat[0]['class']}"
    lines = call(predict.main, folder_run, *some, "--top", "1").output.splitlines()
    assert [line.split() for line in lines] == [
        [f"{100 * a['probability']:.2f}%", a["class"], str(path)]
        for a, path in zip(flat[::2], some, strict=True)
    ]


def test_which_images(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("b/2.PNG", "b/10.jpg", "b/deep/er/x.bmp", "b/notes.txt", "a[1].png", "c.data", "empty/x"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).touch()
    below = ["b/10.jpg", "b/2.PNG", "b/deep/er/x.bmp"]
    assert find_images(["c.data", "b", "a[1].png"], []) == (["c.data", *below, "a[1].png"], [], [])
    assert find_images(["b/*.*"], []) == (["b/10.jpg", "b/2.PNG", "b/notes.txt"], [], [])
    assert find_images(["b/**/*.bmp", "b"], [])[0] == ["b/deep/er/x.bmp", "b/10.jpg", "b/2.PNG"]
    assert find_images(["-"], [b"c.data\n", b"\n", b"b\r\n", b"c.data"]) == (["c.data", *below], [], [])
    Path("b/deep/back").symlink_to(tmp_path / "b")
    found, problems, notes = find_images(["gone.jpg", "b", "empty", "*.gif"], [])
    assert found == below
    assert [problem.split(":")[0] for problem in problems] == ["gone.jpg", "empty", "*.gif"]
    assert [note.split(":")[1] for note in notes] == [" b", " empty"]
    assert "deep/back" in notes[0] and "no extension 1" in notes[1]


def test_standard_input_and_broken_files(folder_run, some, tmp_path, monkeypatch):
    (tmp_path / "broken.png").write_bytes(some[0].read_bytes()[:60])
    names = [some[0], tmp_path / "broken.png", some[1], tmp_path / "gone.png", some[2]]
    lines = "".join(f"{name}\n" for name in names).encode()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(lines)))
    result = call(predict.main, folder_run, "-", "--format", "json", "--batch-size", "2")
    assert result.status == 2
    assert [one["path"] for one in json.loads(result.output)] == list(map(str, some))
    *warnings, last = result.error.splitlines()
    assert all(line.startswith("warning: ") for line in warnings) and len(warnings) == 2
    assert "gone.png" in warnings[0] and "broken.png" in warnings[1]
    assert last.startswith("error: 2 of 5 could not be read")
    for kind, nothing in (("json", "[]"), ("csv", "path,rank,class,probability"), ("table", "")):
        result = call(predict.main, folder_run, tmp_path / "broken.png", "--format", kind)
        assert (result.status, result.output.strip()) == (2, nothing)


def test_output_is_replaced_at_the_end(folder_run, some, tmp_path, monkeypatch):
    target = tmp_path / "found.csv"
    target.write_text("before")

    def stop(*_: object):
        raise KeyboardInterrupt
        yield

    with monkeypatch.context() as patch:
        patch.setattr("data.unlabeled_loader.unlabeled_batches", stop)
        assert call(predict.main, folder_run, *some, "--output", target).status == 130
    assert target.read_text() == "before"
    assert call(predict.main, folder_run, *some, "--output", target).status == 0
    assert len(rows(target.read_text())) == 6
    assert list(tmp_path.iterdir()) == [target]
    assert "No space" in message(call(predict.main, folder_run, *some, "--output", "/dev/full"))


def test_names_of_classes():
    def names(classes, outputs, stem="imagenet"):
        config = SimpleNamespace(model=SimpleNamespace(stem=stem))
        return predict.class_names(SimpleNamespace(classes=classes, outputs=outputs, config=config))

    assert names(("cat", "dog"), 2) == ["cat", "dog"]
    assert names(None, 3) == ["class 0", "class 1", "class 2"]
    assert names(None, 1000, "cifar")[999] == "class 999"
    assert names(None, 1000)[:2] == ["tench", "goldfish"]
    wnids = tuple(IMAGENET_WNIDS.read_text().split())
    assert names(wnids, 1000)[999] == "n15075141 toilet tissue"
    assert names((*wnids[:-1], "n99999999"), 1000)[:2] == ["n01440764", "n01443537"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["IMAGE", "--top", "0"], "--top: must be from 1"),
        (["IMAGE", "--batch-size", "0"], "--batch-size: must be from 1"),
        (["gone.png"], "gone.png: no such file"),
        (["IMAGE", "--output", "nowhere/x.csv"], "--output nowhere/x.csv: cannot be written"),
        (["IMAGE", "--output", "IMAGE"], "is also an input"),
        (["IMAGE", "--output", "x.pt"], "--output x.pt: "),
    ],
)
def test_wrong_usage(folder_run, some, tmp_path, monkeypatch, options, words):
    monkeypatch.chdir(tmp_path)
    before = snapshot(folder_run.parent)
    options = [some[0] if option == "IMAGE" else option for option in options]
    assert words in message(call(predict.main, folder_run, *options))
    assert snapshot(folder_run.parent) == before and not list(tmp_path.iterdir())


def test_help_needs_no_torch(tmp_path):
    code = "import sys; import {}; print('torch' in sys.modules)"
    for name in ("predict", "extract_features", "export"):
        path = {"PYTHONPATH": str(ROOT / "scripts")}
        assert run_python("-c", code.format(name), cwd=tmp_path, **path).output == "False\n"
    result = run_script("scripts/extract_features.py", "--help", cwd=tmp_path)
    assert result.status == 0 and "torchvision:NAME" in result.output


# ---------------------------------------------------------------------------- extract_features.py


def test_features(folder_run, some, tmp_path):
    """Against the network by hand, on images prepared without data/."""

    def extract(*options: str) -> tuple[np.ndarray, str]:
        target = tmp_path / "a.npz"
        result = call(extract_features.main, folder_run, *some, "--output", target, *options)
        assert result.status == 0, result.error
        with np.load(target) as stored:
            assert stored["paths"].tolist() == list(map(str, some))
            return stored["features"], str(stored["layer"])

    model, info = load_weights(folder_run)
    pixels = np.stack([np.asarray(Image.open(path), np.float32) for path in some])
    pixels = (pixels - np.array(info.config.data.mean)) / np.array(info.config.data.std)
    with torch.no_grad():
        x = torch.tensor(pixels, dtype=torch.float32).permute(0, 3, 1, 2)
        last = model.forward_features(x).numpy()
        block = model.layer1[0]
        inner = block.bn1(block.conv1(model.relu(model.bn1(model.conv1(x))))).numpy()
    features, layer = extract("--batch-size", "2")
    assert (features.dtype, features.shape, layer) == (np.float32, (3, 1024), "fc_input")
    np.testing.assert_allclose(features, last.mean((2, 3)), rtol=0, atol=1e-6)
    maps, _ = extract("--layer", "layer3", "--no-pool")
    np.testing.assert_allclose(maps, last, rtol=0, atol=1e-6)  # the last block's output
    features, layer = extract("--layer", "layer1.0.bn1")  # before the ReLU, which works in place
    assert layer == "layer1.0.bn1"
    np.testing.assert_allclose(features, inner.mean((2, 3)), rtol=0, atol=1e-6)
    maps, _ = extract("--layer", "layer1.0.bn1", "--no-pool")
    np.testing.assert_allclose(maps, inner, rtol=0, atol=1e-6)


def test_safetensors_and_a_broken_file(folder_run, some, tmp_path):
    safetensors = pytest.importorskip("safetensors")
    broken, target = tmp_path / "broken.png", tmp_path / "f.safetensors"
    broken.touch()
    result = call(extract_features.main, folder_run, some[0], broken, some[1], "--output", target)
    assert result.status == 2 and "error: 1 of 3 could" in result.error and "wrote" in result.output
    with safetensors.safe_open(target, "np") as file:
        assert file.get_tensor("features").shape == (2, 1024)
        assert json.loads(file.metadata()["paths"]) == list(map(str, some[:2]))
        assert file.metadata()["layer"] == "fc_input"
    before = snapshot(tmp_path)
    result = call(extract_features.main, folder_run, broken, "--output", target)
    assert result.status == 2 and "error: none of the images could be read" in result.error
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize(
    ("target", "layer", "words"),
    [
        ("f.npy", "fc_input", "must end in .npz or .safetensors"),
        ("f.safetensors", "fc_input", "pip install safetensors"),
        ("f.npz", "layer1.0.conv9", "did you mean layer1.0.conv"),
        ("f.npz", "zebra", "no layer 'zebra'; fc_input"),
    ],
)
def test_impossible_features(folder_run, some, tmp_path, monkeypatch, target, layer, words):
    monkeypatch.setattr(extract_features.importlib.util, "find_spec", lambda _: None)
    options = ("--output", tmp_path / target, "--layer", layer)
    assert words in message(call(extract_features.main, folder_run, *some, *options))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("where", "words"),
    [
        ("resnext.engine.inference.InferenceNetwork", "--device: not enough memory for the network"),
        ("resnext.ResNeXt.forward", "--batch-size: not enough memory for 2 images"),
    ],
)
@pytest.mark.parametrize("main", [predict.main, extract_features.main], ids=["predict", "extract"])
def test_out_of_memory(main, where, words, folder_run, some, tmp_path, monkeypatch):
    def full(*_, **__):
        raise torch.AcceleratorError("CUDA error: out of memory")

    monkeypatch.setattr(where, full)
    options = ("--batch-size", "2", "--output", tmp_path / "a.npz")
    assert message(call(main, folder_run, *some, *options)).startswith(words)
