"""Folders of timm and transformers: config.json, weights, and the folders that scripts/export.py writes."""

import io
import json
import math
import os
import pickle
import sys
from contextlib import nullcontext

import pytest
import timm
import torch
import torchvision
from commands import ROOT, call, draw_folders, message
from foreign_networks import assert_equal, check, randomize_norms, small_torchvision
from networks import SMALL, write_weights
from PIL import Image
from safetensors.torch import load_file, save_file

import evaluate
from resnext import UserError, load_weights
from resnext.errors import InvalidFileError
from resnext.weights.foreign import architecture
from resnext.weights.model_folder import MAX_CONFIG, TIMM_TAGS, crop_pct, read_facts

sys.path.insert(0, str(ROOT / "scripts"))
import export

HALVES = {"mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25], "interpolation": "bilinear"}
SIZES = {"input_size": [3, 24, 24], "test_input_size": [3, 32, 32], "crop_pct": 0.875, "test_crop_pct": 0.88}
NAMES = [f"c{number}" for number in range(5)]
ARGUMENTS = {"layers": [1, 2, 1, 1], "cardinality": 4, "base_width": 6}


def folder(path, cfg=(), weights="model.safetensors", **changes):
    """Write a folder as timm does, for a small network; return its path."""
    path.mkdir(exist_ok=True)
    config = {"architecture": "resnet50", "num_classes": 5, "label_names": NAMES, "model_args": ARGUMENTS}
    config |= {"pretrained_cfg": HALVES | SIZES | dict(cfg)} | changes
    (path / "config.json").write_text(json.dumps(config))
    save = save_file if weights.endswith("safetensors") else torch.save
    save(randomize_norms(small_torchvision(5)).state_dict(), path / weights)
    return path


class Evil:
    def __reduce__(self):
        return os.system, ("touch escaped",)


def pickled(path):
    """Return a folder's weights as torch.save writes them; without a folder, code instead of weights."""
    buffer = io.BytesIO()
    torch.save(load_file(path / "model.safetensors") if path else Evil(), buffer)
    return buffer.getvalue()


# ---------------------------------------------------------------------------- timm


@pytest.mark.parametrize("name", [n for n in timm.list_pretrained() if n.partition(".")[0] in TIMM_TAGS])
def test_preprocessing_is_that_of_timms_validate(name, tmp_path):
    cfg = timm.models.get_pretrained_cfg(name).to_dict()
    timm_way = timm.data.resolve_data_config(pretrained_cfg=cfg, use_test_size=True)
    content = {"architecture": cfg.pop("architecture"), "pretrained_cfg": cfg}
    old = cfg | {"architecture": name.partition(".")[0]}  # flat
    for config in (content, old):
        (tmp_path / "config.json").write_text(json.dumps(config))
        facts = read_facts(tmp_path)
        size, data = timm_way["input_size"][1], facts.data
        assert (data.image_size, data.interpolation) == (size, timm_way["interpolation"])
        assert data.resize == math.floor(size / timm_way["crop_pct"])
        assert data.mean == pytest.approx([255 * value for value in timm_way["mean"]])
        assert data.std == pytest.approx([255 * value for value in timm_way["std"]])
        assert (facts.origin, facts.license, facts.labels) == ("timm", cfg.get("license"), None)


def test_config_json_describes_the_tensors(tmp_path):
    """Each network of timm fits the facts of its own name, and no others."""
    facts, networks = {}, {}
    for name in (*TIMM_TAGS, "resnet50.bamboo"):  # which has no last layer
        cfg = timm.models.get_pretrained_cfg(name).to_dict()
        config = {"architecture": cfg.pop("architecture"), "num_classes": cfg["num_classes"]}
        (tmp_path / "config.json").write_text(json.dumps(config | {"pretrained_cfg": cfg}))
        with torch.device("meta"):
            facts[name] = read_facts(tmp_path)
            networks[name] = architecture(timm.create_model(name).state_dict())
    for name, fact in facts.items():
        for other, network in networks.items():
            with nullcontext() if name == other else pytest.raises(InvalidFileError, match="another network"):
                fact.check(network)


@pytest.mark.parametrize("classes", [5, 0])
def test_folder_that_timm_saved(classes, tmp_path):
    """save_for_hf repeats the sizes in model_args; names may have gaps."""
    arguments = ARGUMENTS | {"num_classes": classes, "drop_path_rate": 0.1}
    theirs = timm.create_model("resnet50", **arguments).eval()
    randomize_norms(theirs)
    names = {"label_names": {"0": "a", "4": "b"}}
    timm.models.save_for_hf(theirs, tmp_path, names, arguments, safe_serialization=True)
    named = ("a", "output 1", "output 2", "output 3", "b") if classes else None
    assert check(tmp_path, theirs).classes == named


@pytest.mark.parametrize(
    "weights", ["model.safetensors", "pytorch_model.bin", "model.pth", "x.safetensors", "y.bin"]
)
def test_folder_of_timm(weights, tmp_path):
    path = folder(tmp_path / "w", weights=weights)
    (path / "z.bin").write_bytes(b"is not read")
    theirs = timm.create_model(f"local-dir:{path}", pretrained=True).eval()
    info = check(path, theirs)
    data = info.config.data
    assert (info.origin, info.file, info.classes, info.stated) == (
        "timm",
        str(path),
        tuple(NAMES),
        "config.json",
    )
    assert (data.image_size, data.resize, data.interpolation) == (32, 36, "bilinear")
    assert (data.mean, data.std) == ((127.5,) * 3, (63.75,) * 3)
    assert data.pipeline == "fast" and data.dataset == "folder"


def test_classes(tmp_path):
    phrases = ["tench, Tinca tinca", *map(str, range(998)), "toilet tissue, toilet paper, bathroom tissue"]
    for names, expected in (
        ({str(number): name for number, name in reversed(list(enumerate(NAMES)))}, tuple(NAMES)),
        ({"0": "a", "4": "b"}, ("a", "output 1", "output 2", "output 3", "b")),
        (None, None),
        ({}, None),
        ([f"LABEL_{number}" for number in range(5)], None),
        (phrases, None),
        ([*phrases[:-2], "tench", "toilet paper"], None),  # not all of them are different
    ):
        path = folder(tmp_path / "w", label_names=names)
        outputs = max(5, len(names or ()))
        assert read_facts(path).class_names(outputs) == expected
        assert read_facts(path).class_names(None) is None
    for names, found in (
        (NAMES[:4], "got 4 names, 4 different, expected 5"),
        ([*NAMES, "c5"], "got 6 names, 6"),
        ([*NAMES[:4], "c0"], "got 5 names, 4"),
        ([1, 2, 3, 4, 5], "got 0 names"),
        ({"0": "a", "5": "b"}, "got 6 names"),
        ({name: number for number, name in enumerate(NAMES)}, "got 0 names"),  # the wrong way round
        ("c0 c1 c2 c3 c4", "got 0 names"),
    ):
        path = folder(tmp_path / "w", label_names=names)
        with pytest.raises(UserError, match=rf"config\.json: label_names does not .*{found}"):
            load_weights(path)
    path = folder(tmp_path / "w")
    flat = {"architecture": "resnet50", "num_classes": 5, "labels": NAMES, **HALVES}
    (path / "config.json").write_text(json.dumps(flat | {"model_args": ARGUMENTS}))
    assert load_weights(path)[1].classes == tuple(NAMES)


REFUSED = {
    "architecture": ({"architecture": "resnetaa50"}, {}, "architecture is not supported (got resnetaa50"),
    "kind": ({"architecture": ["resnet50"]}, {}, "architecture"),
    "output stride": ({"model_args": {"output_stride": 8}}, {}, "output_stride is not supported (got 8"),
    "block_args": ({"model_args": {"block_args": {"attn_layer": "se"}}}, {}, "block_args"),
    "pooling": ({"model_args": {"global_pool": "max"}}, {}, "global_pool"),
    "channels": ({"model_args": {"in_chans": 1}}, {}, "in_chans"),
    "average": ({"model_args": {"avg_down": True}}, {}, "model_args.avg_down is not supported (got True)"),
    "tensors": (
        {"model_args": ARGUMENTS | {"cardinality": 2}},
        {},
        "another network than the tensors: cardinality (got 2, expected 4)",
    ),
    "name": ({"model_args": {}}, {}, "layers (got [3, 4, 6, 3], expected [1, 2, 1, 1])"),
    "block": ({"architecture": "resnet18"}, {}, "block_type (got basic, expected bottleneck)"),
    "outputs": ({"num_classes": 10}, {}, "num_classes (got 10, expected 5)"),
    "no outputs": ({"num_classes": 0}, {}, "num_classes (got 0, expected 5)"),
    "outputs again": ({"model_args": ARGUMENTS | {"num_classes": 3}}, {}, "num_classes (got 3, expected 5)"),
    "arguments": ({"model_args": [1]}, {}, "model_args: is not a JSON object"),
    "label offset": ({}, {"label_offset": 1}, "label_offset"),
    "crop mode": ({}, {"crop_mode": "squash"}, "crop_mode is not supported (got squash, expected center"),
    "filter": ({}, {"interpolation": "lanczos"}, "got lanczos, expected bilinear or bicubic"),
    "random filter": ({}, {"interpolation": ["bilinear"]}, "filter of resizing"),
    "not square": ({}, {"test_input_size": [3, 32, 48]}, "input_size"),
    "size": ({}, {"test_input_size": [3, 10**9, 10**9]}, "8 to 4096"),
    "text": ({}, {"test_input_size": [3, "32", "32"]}, "8 to 4096"),
    "crop": ({}, {"test_crop_pct": 1e-300}, "crop_pct"),
    "larger crop": ({}, {"test_crop_pct": 1.5}, "crop_pct"),
    "negative": ({}, {"mean": [-0.5, 0.5, 0.5]}, "mean is not supported"),
    "mean": ({}, {"mean": [0.5, 0.5]}, "mean is not supported"),
    "not a number": ({}, {"mean": [float("nan")] * 3}, "mean is not supported"),
    "zero": ({}, {"std": [0, 0, 0]}, "std is not supported"),
    "cfg": ({"pretrained_cfg": "x"}, {}, "pretrained_cfg: is not a JSON object"),
}


@pytest.mark.parametrize(("changes", "cfg", "words"), REFUSED.values(), ids=REFUSED)
def test_other_networks_are_refused_by_name(changes, cfg, words, tmp_path):
    path = folder(tmp_path / "w", cfg, **changes)
    with pytest.raises(UserError) as caught:
        load_weights(path)
    assert str(caught.value).startswith(f"{path}: ") and words in str(caught.value)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"[1]", "is not a JSON object"),
        (b"", "is damaged"),
        (b"\xff\xfe{", "is damaged"),
        (b"[" * 200_000, "is damaged"),
        (b'{"num_classes": ' + b"1" * 10_000 + b"}", "is damaged"),
        (b" " * (MAX_CONFIG + 1), "larger than 16 MiB"),
        (b'{"model_type": "vit"}', "model_type is not supported (got vit"),
        (b"{}", "model_type is not supported (got None"),
    ],
    ids=range(8),
)
def test_damaged_configurations(content, words, tmp_path):
    path = folder(tmp_path / "w")
    (path / "config.json").write_bytes(content)
    with pytest.raises(UserError) as caught:
        load_weights(path)
    assert str(caught.value).startswith(f"{path}: config.json: ") and words in str(caught.value)


def test_only_the_folders_own_files_are_read(tmp_path, monkeypatch):
    """config.json may name other files, and a pickle may name code."""
    monkeypatch.chdir(tmp_path)
    elsewhere = {"file": "../secret.pth", "url": "http://127.0.0.1:9/x", "hf_hub_filename": "../secret.pth"}
    path = folder(tmp_path / "w", elsewhere | {"hf_hub_id": "../..", "custom_load": True})
    (tmp_path / "secret.pth").write_bytes(b"is not read")
    assert_equal(load_weights(path)[0].state_dict(), load_file(path / "model.safetensors"))
    (path / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"no weights, such as model\.safetensors"):
        load_weights(path)
    for content in (pickled(None), pickle.dumps(Evil())):
        (path / "pytorch_model.bin").write_bytes(content)
        with pytest.raises(UserError, match=f"^{path}"):
            load_weights(path)
    assert not (tmp_path / "escaped").exists()


def test_files_without_their_content(tmp_path):
    """A download that broke off is named, and so is a pointer of Git LFS."""
    path = folder(tmp_path / "w", weights="pytorch_model.bin")
    file = path / "pytorch_model.bin"
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(UserError, match=rf"{path}: pytorch_model\.bin: damaged or cut off"):
        load_weights(path)
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n"
    for name in ("pytorch_model.bin", "model.safetensors", "x.pth"):
        (path / name).write_text(pointer)
        with pytest.raises(UserError, match=rf"{name}: is a Git LFS pointer, .*`git lfs pull`"):
            load_weights(path / name if name == "x.pth" else path)


def test_evaluation_prepares_images_as_timm_does(tmp_path):
    path, pictures = folder(tmp_path / "w"), draw_folders(tmp_path / "data", dict.fromkeys(NAMES, 3), 60)
    rows, theirs = tmp_path / "rows.csv", timm.create_model(f"local-dir:{path}", pretrained=True).eval()
    result = call(evaluate.main, path, "--data", pictures, "--workers", "0", "--csv", rows)
    assert result.status == 0, result.error
    assert "preprocessing, as config.json says: 32 pixels, resized bilinear" in result.output
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(theirs, use_test_size=True))
    lines = [line.split(",") for line in rows.read_text().splitlines()]
    confidence = lines[0].index("confidence")
    assert len(lines) == 16
    for line in lines[1:]:
        with Image.open(pictures / "val" / line[0]) as image, torch.no_grad():
            scores = theirs(transform(image.convert("RGB"))[None]).softmax(1)
        assert float(line[confidence]) == pytest.approx(scores.max().item(), abs=0.01)


# ---------------------------------------------------------------------------- transformers


def to_transformers(key):
    """Return transformers' name of a tensor."""
    stem = {"conv1": "convolution", "bn1": "normalization"}
    first, *rest = key.split(".")
    if first in stem:
        return ".".join(["resnet.embedder.embedder", stem[first], *rest])
    if first == "fc":
        return f"classifier.1.{rest[0]}"
    block, layer, *last = rest
    part = f"layer.{int(layer[-1]) - 1}" if layer != "downsample" else "shortcut"
    kind = layer[:-1] if layer != "downsample" else ("conv", "bn")[int(last.pop(0))]
    word = {"conv": "convolution", "bn": "normalization"}[kind]
    return f"resnet.encoder.stages.{int(first[-1]) - 1}.layers.{block}.{part}.{word}.{last[0]}"


PROCESSOR = {
    "image_processor_type": "ConvNextImageProcessor",
    "crop_pct": 0.875,
    "size": {"shortest_edge": 40},
}
PROCESSOR |= {"do_rescale": True, "rescale_factor": 0.00392156862745098}
PROCESSOR |= {"resample": 3, "image_mean": [0.5, 0.5, 0.5], "image_std": [0.25, 0.25, 0.25]}


def transformers_network(basic=False):
    torch.manual_seed(2)
    block = torchvision.models.resnet.BasicBlock if basic else torchvision.models.resnet.Bottleneck
    return randomize_norms(torchvision.models.ResNet(block, [1, 2, 1, 1], num_classes=5))


def transformers_folder(path, basic=False, processor=(), **changes):
    """Write a folder as transformers does; return its path."""
    path.mkdir(exist_ok=True)
    config = {"model_type": "resnet", "id2label": dict(enumerate(NAMES)), "hidden_act": "relu"}
    config |= {"depths": [1, 2, 1, 1], "embedding_size": 64}
    config |= {"layer_type": "basic" if basic else "bottleneck", "downsample_in_bottleneck": False} | changes
    (path / "config.json").write_text(json.dumps(config))
    (path / "preprocessor_config.json").write_text(json.dumps(PROCESSOR | dict(processor)))
    state = transformers_network(basic).state_dict()
    save_file({to_transformers(key): value for key, value in state.items()}, path / "model.safetensors")
    return path


@pytest.mark.parametrize("basic", [False, True])
def test_transformers(basic, tmp_path):
    path = transformers_folder(tmp_path / "w", basic)
    info = check(path, transformers_network(basic))
    data = info.config.data
    assert (info.origin, info.classes, info.stated) == (
        "transformers",
        tuple(NAMES),
        "preprocessor_config.json",
    )
    assert (data.image_size, data.resize, data.interpolation) == (40, 45, "bicubic")
    assert (data.mean, data.std) == ((127.5,) * 3, (63.75,) * 3)
    (path / "preprocessor_config.json").unlink()
    data = check(path, transformers_network(basic)).config.data
    assert (data.image_size, data.resize, data.interpolation) == (224, 256, "bicubic")


@pytest.mark.parametrize(
    ("changes", "processor", "words"),
    [
        (
            {"downsample_in_bottleneck": True},
            {},
            "config.json: downsample_in_bottleneck is not supported (got True",
        ),
        ({"downsample_in_first_stage": True}, {}, "downsample_in_first_stage"),
        ({"hidden_act": "gelu"}, {}, "hidden_act is not supported (got gelu, expected relu"),
        ({}, {"image_processor_type": "ViTImageProcessor"}, "got ViTImageProcessor"),
        ({}, {"size": 384}, "preprocessor_config.json: size"),
        ({}, {"size": {"height": 224}}, "the image size"),
        ({}, {"resample": 0}, "got 0, expected bilinear or bicubic"),
        ({}, {"do_normalize": False}, "do_normalize"),
        ({}, {"rescale_factor": 1 / 127.5}, "rescale_factor is not supported (got 0.00784"),
        ({}, {"rescale_factor": None}, "rescale_factor"),
        ({"depths": [3, 4, 6, 3]}, {}, "depths (got [3, 4, 6, 3], expected [1, 2, 1, 1])"),
        ({"layer_type": "basic"}, {}, "layer_type (got basic, expected bottleneck)"),
        ({"id2label": dict(enumerate("abcdef"))}, {}, "id2label does not name each output"),
    ],
)
def test_other_networks_of_transformers(changes, processor, words, tmp_path):
    path = transformers_folder(tmp_path / "w", False, processor, **changes)
    with pytest.raises(UserError) as caught:
        load_weights(path)
    assert str(caught.value).startswith(f"{path}: ") and words in str(caught.value)


def test_names_can_be_replaced(tmp_path):
    """The names of outputs are often not those of the class folders; --class-names gives these."""
    pictures = draw_folders(tmp_path / "data", {f"n{number}": 2 for number in (9, 10, 11, 12, 13)}, 60)
    path, names = transformers_folder(tmp_path / "w"), tmp_path / "names.txt"
    options = ("--data", pictures, "--workers", "0", "--json", tmp_path / "result.json")
    expected = {}
    for order, listed in (("natural", (9, 10, 11, 12, 13)), ("string", (10, 11, 12, 13, 9))):
        names.write_text("".join(f"n{number}\n" for number in listed))
        for labels, way in ((NAMES, ("--class-names", names)), ((f"LABEL_{n}" for n in range(5)), None)):
            transformers_folder(path, id2label=dict(enumerate(labels)))
            result = call(evaluate.main, path, *options, *(way or ("--class-order", order)))
            assert result.status == 0, result.error
            found = json.loads((tmp_path / "result.json").read_text())
            assert expected.setdefault(order, found["loss"]) == found["loss"]
    assert expected["natural"] != expected["string"]
    assert "--class-names FILE" in message(call(evaluate.main, transformers_folder(path), *options))
    names.write_text("a\nb\n")
    assert "names 2 classes" in message(call(evaluate.main, path, *options, "--class-names", names))


# ---------------------------------------------------------------------------- export

EXPORTED = {
    "small": SMALL.format("B"),
    "resnet18": "model: {architecture: resnet, depth: 18}\n"
    "data: {image_size: 64, resize: 70, std: [9, 7, 1]}",
    "resnext50_32x4d": "model: {depth: 50}\ndata: {image_size: 64, interpolation: bilinear}",
}


@pytest.mark.parametrize("name", EXPORTED)
def test_timm_reads_an_exported_folder(name, tmp_path):
    source, target = write_weights(tmp_path / "run", EXPORTED[name], 5), tmp_path / "x.y"
    result = call(export.main, source, f"{target}/")
    assert result.status == 0, result.error
    assert "read back by timm: logits differ by 0 at most" in result.output
    assert sorted(path.name for path in target.iterdir()) == ["config.json", "model.safetensors"]
    theirs = timm.create_model(f"local-dir:{target}", pretrained=True).eval()
    config = json.loads((target / "config.json").read_text())
    assert config["architecture"] == ("resnet50" if name == "small" else name)
    assert bool(config["model_args"]) == (name == "small")
    (original, before), (again, after) = load_weights(source), load_weights(target)
    x = torch.randn(2, 3, 48, 48, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert torch.equal(theirs(x), original(x)) and torch.equal(theirs(x), again(x))
    timm_way = timm.data.resolve_model_data_config(theirs, use_test_size=True)
    assert math.floor(timm_way["input_size"][1] / timm_way["crop_pct"]) == before.config.data.resize
    for key in ("image_size", "resize", "interpolation", "mean", "std"):
        assert getattr(after.config.data, key) == getattr(before.config.data, key), key
    assert after.classes == before.classes and theirs.pretrained_cfg["label_names"] == list(before.classes)


def test_every_ratio_survives():
    """floor(image_size / crop_pct) is the resized side again."""
    for size in range(8, 400):
        for resize in range(size, 2 * size):
            assert math.floor(size / crop_pct(size, resize)) == resize


@pytest.mark.parametrize("text", ["model: {stem: cifar, depth: 11}", "model: {depth: 50, shortcut: C}"])
def test_networks_that_timm_does_not_have(text, tmp_path):
    source = write_weights(tmp_path / "run", text, 5)
    assert "timm has no such network" in message(call(export.main, source, f"{tmp_path}/x/"))
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_folders_appear_whole_or_not_at_all(tmp_path, monkeypatch):
    source = write_weights(tmp_path / "run", SMALL.format("C"), 5)
    assert "exists already" in message(call(export.main, source, f"{tmp_path}/run/"))
    assert "--fold-batchnorm: is for" in message(
        call(export.main, source, f"{tmp_path}/x/", "--fold-batchnorm")
    )

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert "No space left" in message(call(export.main, source, f"{tmp_path}/x/"))
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
