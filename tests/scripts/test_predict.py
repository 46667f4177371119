"""predict.py and extract_features.py: what evaluation says, for any pictures, whatever is wrong with some."""

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
from data.subsets import IMAGENET_WNIDS
from data.unlabeled import find_images
from resnext import load_weights

sys.path.insert(0, str(ROOT / "scripts"))
import extract_features
import predict


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    """train/ and val/ with cat and dog of 12 pixels, and a gray one of another shape."""
    root = draw_folders(tmp_path_factory.mktemp("set") / "pictures", {"cat": 4, "dog": 3}, size=12)
    Image.effect_noise((31, 17), 80).save(root / "val" / "dog" / "wide.jpg")
    return root


@pytest.fixture(scope="module", params=["memory", "fast", "torch7"])
def run(request, pictures) -> Path:
    """A run on these pictures in each of the pipelines; networks see 8 pixels."""
    folder = pictures.parent / request.param
    keys = {"data__pipeline": request.param, "augment__padding": "0", "data__workers": "0"}
    settings = tiny(data__dataset="folder", data__dir=str(pictures), train__epochs="1", **keys)
    result = call(
        train.main, "--config", "demo.yaml", "--output", folder, *settings, "schedule.warmup_epochs=0"
    )
    assert result.status == 0, result.error
    return folder


@pytest.fixture
def some(folder_run) -> list[Path]:
    """Three pictures of `folder_run`'s."""
    return sorted((folder_run.parent / "pictures" / "val" / "cat").iterdir())


def rows(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text)))


def test_says_what_evaluation_says(run, pictures, tmp_path):
    assert call(evaluate.main, run, "--csv", tmp_path / "evaluate.csv").status == 0
    options = ("--top", "1", "--batch-size", "3", "--workers", "1", "--output", tmp_path / "predict.csv")
    result = call(predict.main, run, pictures / "val", *options)
    assert (result.status, result.output, result.error) == (0, "", "")
    expected = rows((tmp_path / "evaluate.csv").read_text())
    found = rows((tmp_path / "predict.csv").read_text())
    assert len(found) == 8
    assert [row["path"] for row in found] == [str(pictures / "val" / row["path"]) for row in expected]
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
    assert table[1] == f"  {100 * flat[0]['probability']:6.2f} %  {flat[0]['class']}"
    lines = call(predict.main, folder_run, *some, "--top", "1").output.splitlines()
    assert [line.split() for line in lines] == [
        [f"{100 * a['probability']:.2f}", "%", a["class"], str(path)]
        for a, path in zip(flat[::2], some, strict=True)
    ]


def test_which_pictures(tmp_path, monkeypatch):
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
    back = "skipped links to files or folders that are included already: 1, such as deep/back to b"
    unknown = "skipped files of unsupported formats: 1 (no extension 1), such as x"
    assert notes == [f"warning: b: {back}", f"warning: empty: {unknown}; convert them to JPEG or PNG"]


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


def test_output_is_replaced_whole_at_the_end(folder_run, some, tmp_path, monkeypatch):
    target = tmp_path / "found.csv"
    target.write_text("before")

    def stop(*_: object):
        raise KeyboardInterrupt

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
        return predict.class_names(SimpleNamespace(classes=classes, config=config), outputs)

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
        (["PICTURE", "--top", "0"], ["--top", "at least 1"]),
        (["PICTURE", "--batch-size", "0"], ["--batch-size"]),
        (["gone.png"], ["gone.png", "no such file"]),
        (["PICTURE", "--output", "nowhere/x.csv"], ["nowhere", "cannot be written"]),
        (["PICTURE", "--output", "PICTURE"], ["--output", "is read too"]),
        (["PICTURE", "--output", "x.pt"], ["--output", "file of a run"]),
    ],
)
def test_wrong_usage(folder_run, some, tmp_path, monkeypatch, options, words):
    monkeypatch.chdir(tmp_path)
    before = snapshot(folder_run.parent)
    options = [some[0] if option == "PICTURE" else option for option in options]
    text = message(call(predict.main, folder_run, *options))
    assert all(word in text for word in words), text
    assert snapshot(folder_run.parent) == before and not list(tmp_path.iterdir())


def test_help_needs_no_torch(tmp_path):
    code = "import sys; import {}; print('torch' in sys.modules)"
    for name in ("predict", "extract_features"):
        path = {"PYTHONPATH": str(ROOT / "scripts")}
        assert run_python("-c", code.format(name), cwd=tmp_path, **path).output == "False\n"
        result = run_script(f"scripts/{name}.py", "--help", cwd=tmp_path)
        assert result.status == 0 and "torchvision:NAME" in result.output


# ---------------------------------------------------------------------------- extract_features.py


@pytest.fixture
def stages(folder_run, some):
    """(network, normalised pictures float32 (3, 3, 8, 8)), by no code of data/."""
    model, info = load_weights(folder_run)
    pixels = np.stack([np.asarray(Image.open(path), np.float32) for path in some])
    pixels = (pixels - np.array(info.config.data.mean)) / np.array(info.config.data.std)
    return model, torch.tensor(pixels, dtype=torch.float32).permute(0, 3, 1, 2)


def extract(folder_run: Path, some: list[Path], target: Path, *options: str):
    result = call(extract_features.main, folder_run, *some, "--output", target, *options)
    assert result.status == 0, result.error
    with np.load(target) as stored:
        assert stored["paths"].tolist() == list(map(str, some))
        return stored["features"], str(stored["layer"])


def test_features(folder_run, some, stages, tmp_path):
    model, images = stages
    with torch.no_grad():
        expected = model.forward_features(images)
    features, layer = extract(folder_run, some, tmp_path / "a.npz", "--batch-size", "2")
    assert (features.dtype, features.shape, layer) == (np.float32, (3, 1024), "fc_input")
    np.testing.assert_allclose(features, expected.mean((2, 3)).numpy(), rtol=0, atol=1e-6)
    maps, _ = extract(folder_run, some, tmp_path / "b.npz", "--layer", "layer3", "--no-pool")
    np.testing.assert_allclose(maps, expected.numpy(), rtol=0, atol=1e-6)  # the last block's output


def test_features_of_a_layer(folder_run, some, stages, tmp_path):
    model, images = stages
    with torch.no_grad():
        block = model.layer1[0]
        x = model.relu(model.bn1(model.conv1(images)))
        expected = block.bn1(block.conv1(x))  # ahead of the ReLU, which works in place
    features, layer = extract(folder_run, some, tmp_path / "a.npz", "--layer", "layer1.0.bn1")
    assert layer == "layer1.0.bn1" and features.shape == (3, len(expected[0]))
    np.testing.assert_allclose(features, expected.mean((2, 3)).numpy(), rtol=0, atol=1e-6)
    maps, _ = extract(folder_run, some, tmp_path / "a.npz", "--layer", "layer1.0.bn1", "--no-pool")
    np.testing.assert_allclose(maps, expected.numpy(), rtol=0, atol=1e-6)


def test_safetensors_and_a_broken_file(folder_run, some, tmp_path):
    safetensors = pytest.importorskip("safetensors")
    (tmp_path / "broken.png").touch()
    target = tmp_path / "f.safetensors"
    result = call(
        extract_features.main, folder_run, some[0], tmp_path / "broken.png", some[1], "--output", target
    )
    assert result.status == 2 and "error: 1 of 3 could" in result.error and "wrote" in result.output
    with safetensors.safe_open(target, "np") as file:
        assert file.get_tensor("features").shape == (2, 1024)
        assert json.loads(file.metadata()["paths"]) == list(map(str, some[:2]))
        assert file.metadata()["layer"] == "fc_input"
    before = snapshot(tmp_path)
    result = call(extract_features.main, folder_run, tmp_path / "broken.png", "--output", target)
    assert result.status == 2 and "error: none of the 1 pictures" in result.error
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize(
    ("target", "layer", "words"),
    [
        ("f.npy", "fc_input", ["--output", ".npz or .safetensors"]),
        ("f.safetensors", "fc_input", ["pip install safetensors"]),
        ("f.npz", "layer1.0.conv9", ["--layer", "layer1.0.conv"]),
        ("f.npz", "zebra", ["--layer", "zebra", "fc_input"]),
    ],
)
def test_features_that_cannot_be_had(folder_run, some, tmp_path, monkeypatch, target, layer, words):
    monkeypatch.setattr(extract_features.importlib.util, "find_spec", lambda _: None)
    text = message(
        call(extract_features.main, folder_run, *some, "--output", tmp_path / target, "--layer", layer)
    )
    assert all(word in text for word in words), text
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("where", "words"),
    [
        ("resnext.engine.train_state.to_device", "--device: it has no memory for the network"),
        ("resnext.ResNeXt.forward", "--batch-size: the device has no memory for 2 pictures"),
    ],
)
@pytest.mark.parametrize(
    ("main", "output"),
    [(predict.main, "a.csv"), (extract_features.main, "a.npz")],
    ids=["predict", "extract"],
)
def test_out_of_memory(main, output, where, words, folder_run, some, tmp_path, monkeypatch):
    def full(*_, **__):
        raise torch.AcceleratorError("CUDA error: out of memory")

    monkeypatch.setattr(where, full)
    options = ("--batch-size", "2", "--output", tmp_path / output)
    assert message(call(main, folder_run, *some, *options)).startswith(words)
