"""Weights of other programs: their networks, built in foreign_networks, against what load_weights reads."""

import argparse
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
import torchvision
from commands import ROOT, call, draw_folders, message
from damage import check_damaged
from foreign_networks import Bearpaw, Mmpretrain, Pycls, randomize_norms, small_torchvision, without_fc
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


def save_legacy(content, path):
    torch.save(content, path, _use_new_zipfile_serialization=False)


SAVERS = {"zip": torch.save, "legacy": save_legacy, "safetensors": save_file}
zip_and_legacy = pytest.mark.parametrize("save", [torch.save, save_legacy], ids=["zip", "legacy"])


@torch.no_grad()
def check(path, theirs, size=64):
    """Compare the outputs of the loaded network with theirs, and return what is known about the weights."""
    found, info = load_weights(path)
    x = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))
    assert relative_error(found(x), theirs(x.flip(1) if isinstance(theirs, Pycls) else x)) <= 1e-5
    return info


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    assert all(torch.equal(value, expected[key]) for key, value in found.items())


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


def test_torchvision_by_name(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    weights = torchvision.models.ResNeXt50_32X4D_Weights.IMAGENET1K_V1
    theirs = randomize_norms(torchvision.models.resnext50_32x4d())
    cache = tmp_path / "hub" / "checkpoints"
    cache.mkdir(parents=True)
    torch.save(theirs.state_dict(), cache / weights.url.rpartition("/")[2])
    data = check("torchvision:resnext50_32x4d:IMAGENET1K_V1", theirs).config.data
    assert (data.image_size, data.train_size, data.resize, data.interpolation) == (224, 224, 256, "bilinear")
    assert data.mean == pytest.approx((123.675, 116.28, 103.53))
    assert data.std == pytest.approx((58.395, 57.12, 57.375))
    for name in ("torchvision:resnext51", "torchvision:resnext50_32x4d:V9", "torchvision:"):
        with pytest.raises(UserError, match="no such weights"):
            load_weights(name)
    with pytest.raises(UserError, match="could not be downloaded"):
        load_weights("torchvision:resnext101_32x8d")


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


# ---------------------------------------------------------------------------- types of numbers

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2)


@pytest.mark.parametrize(
    ("make", "kinds", "save"),
    [
        *((small_torchvision, (kind,), "zip") for kind in FLOATS),
        *((small_torchvision, FLOATS, save) for save in SAVERS),
        (Pycls, FLOATS, "zip"),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_all_types_become_float32(make, kinds, save, tmp_path):
    """`kinds` take turns."""
    theirs, path = randomize_norms(make()), tmp_path / "w"
    for norm in (module for module in theirs.modules() if isinstance(module, nn.BatchNorm2d)):
        norm.num_batches_tracked.fill_(24)  # exact in all types
    for integers in (False, True):  # half() leaves them alone, a script may not
        state = {
            key: value.to(kinds[number % len(kinds)]) if value.is_floating_point() or integers else value
            for number, (key, value) in enumerate(theirs.state_dict().items())
        }
        theirs.load_state_dict(state)
        SAVERS[save](state, path)
        check(path, theirs)
        found = load_weights(path)[0].state_dict()
        for key, value in found.items():
            assert value.dtype == (torch.int64 if key.endswith("num_batches_tracked") else torch.float32)
            assert value.dtype == torch.float32 or value == 24
    if make is small_torchvision:
        assert_equal(found, theirs.state_dict())


def test_double_precision_on_request(tmp_path):
    theirs = randomize_norms(small_torchvision()).double()
    theirs.conv1.weight.data += 1e-12  # which float32 cannot hold
    torch.save(theirs.state_dict(), tmp_path / "w.pth")
    assert_equal(load_weights(tmp_path / "w.pth", torch.float64)[0].state_dict(), theirs.state_dict())


# ---------------------------------------------------------------------------- what is refused


def changed(*removed, **values):
    state = small_torchvision().state_dict()
    return {key: value for key, value in state.items() if key not in removed} | values


EXPANDED = {"fc.weight": torch.ones(1, 1).expand(10**9, 2048), "fc.bias": torch.ones(1)}
QUANTIZED = {"fc.weight": torch.ones(10, 2048, dtype=torch.int8)}
OTHER_FC = {"last_linear.weight": torch.ones(10, 2048)}
EMPTY_PATHS = {f"layer1.0.paths.{i}.conv2.weight": torch.empty(0, 0, 0, 0) for i in range(300)}
TWICE = {f"model.{key}": torch.zeros_like(value) for key, value in changed().items()}
WRONG = {
    "a key is missing": (changed("layer2.1.bn2.bias"), r"has no layer2\.1\.bn2\.bias"),
    "one too many": (changed(**{"layer1.0.se.fc.weight": torch.ones(1)}), r"has layer1\.0\.se\.fc\.weight"),
    "another shape": (changed(**{"layer2.0.bn1.weight": torch.ones(3)}), r"layer2\.0\.bn1\.weight is"),
    "basic blocks": (torchvision.models.resnet18(num_classes=3).state_dict(), "two convolutions"),
    "not a ResNet": (nn.Linear(2, 2).state_dict(), "first key is 'weight'"),
    "numbers only": ({"epoch": 3}, "no state_dict"),
    "a list": ([1, 2], "no state_dict"),
    "a whole model": (small_torchvision(), r"ResNet; save .*state_dict\(\)"),
    "quantized": (changed(**QUANTIZED), r"torch\.int8, not"),
    "one channel": (changed(**{"conv1.weight": torch.ones(64, 1, 7, 7)}), "first convolutions"),
    "three stages": (
        {key: value for key, value in changed().items() if not key.startswith("layer4")},
        r"model\.stages: ",
    ),
    "expanded": (changed(**EXPANDED), "larger than the file"),
    "more than a classifier": (changed(**{"prototypes.weight": torch.ones(1)}), "has prototypes"),
    "another last layer": (changed("fc.weight", "fc.bias", **OTHER_FC), r"has last_linear\.weight"),
    "many blocks": (changed(**{"layer1.99999.conv1.weight": torch.ones(1)}), "blocks are missing"),
    "many empty paths": (changed(**EMPTY_PATHS), r"blocks are missing|first convolutions"),
    "the same weights twice": (changed(**TWICE), r"two of its tensors are conv1\.weight"),
    "other pooling": ({"arch": "resnetblur50", "state_dict": changed()}, "resnetblur50 pools"),
}


@pytest.mark.parametrize(("content", "words"), WRONG.values(), ids=WRONG)
@zip_and_legacy
@pytest.mark.filterwarnings("ignore:.*source")
def test_other_contents_are_refused(content, words, save, tmp_path):
    save(content, tmp_path / "w.pt")
    with pytest.raises(UserError, match=words) as caught:
        load_weights(tmp_path / "w.pt")
    assert str(caught.value).startswith(f"{tmp_path / 'w.pt'}: ") and "\n" not in str(caught.value)


def test_devices_and_torchscript_are_refused(tmp_path):
    for name in ("/dev/zero", "/dev/null"):
        with pytest.raises(UserError, match="not a file"):
            load_weights(name)
    torch.jit.save(torch.jit.trace(small_torchvision().eval(), torch.ones(2, 3, 64, 64)), tmp_path / "w.pt")
    with pytest.raises(UserError, match="TorchScript"):
        load_weights(tmp_path / "w.pt")


# ---------------------------------------------------------------------------- hostile files


def archive(content):
    """Return a zip archive of torch.save with these bytes for its pickle."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        file.writestr("w/data.pkl", content)
        file.writestr("w/version", "3")
    return buffer.getvalue()


def endless_pickles(start):
    """Return pickles of 2^60 hashes of a nested tuple as a key, and of millions of empty objects."""
    pairs = [b"h" + bytes([i]) + b"h" + bytes([i]) + b"\x86q" + bytes([i + 1]) + b"0" for i in range(60)]
    bomb = b"K\1\x85q\0" + b"0" + b"".join(pairs) + b"}h\x3cK\1s."
    return archive(start + bomb), archive(start + b"}0" * 3_000_000 + b".")


ENDLESS = endless_pickles(b"\x80\x02")
OUR_ENDLESS = endless_pickles(b"\x80\x02X\x12\0\0\0resnext checkpoint0")
TOUCH = b"U\x0etouch executed"
REFUSED = [
    (b"", "is empty"),
    (b"hello", "not a file of weights"),
    (os.urandom(500), "."),
    (b"\x10" + b"\0" * 7 + b'{"a": 1', "."),
    (struct.pack("<Q", 2**60) + b"{", "."),
    (b"PK\x03\x04 and no more", "damaged"),
    (b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.\x80\x02M\xe9\x03.", "damaged|cut off"),
    # The unpickler in C would reserve 64 GiB for the memo's number; other claims are as long.
    (archive(b"\x80\x05Nr\xff\xff\xff\xff."), "."),
    (archive(b"\x80\x05B\xff\xff\xff\x7fx."), "."),
    (archive(b"\x80\x05\x8b\xff\xff\xff\x7fx."), "."),
    (archive(b"\x80\x05\x96\xff\xff\xff\xff\xff\0\0\0x."), "."),
    # Every way in which a pickle can name a function.
    (archive(b"cos\nsystem\n(" + TOUCH + b"tR."), "."),
    (archive(b"(" + TOUCH + b"ios\nsystem\n."), "."),
    (archive(b"(cos\nsystem\n" + TOUCH + b"o."), "."),
    (archive(b"\x80\x04\x8c\x02os\x8c\x06system\x93" + TOUCH + b"\x85R."), "."),
    (archive(b"\x80\x02cbuiltins\nexec\n" + TOUCH + b"\x85\x81."), "."),
    (archive(b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n}U\x08__code__cos\nsystem\nsb."), "."),
    *zip(ENDLESS + OUR_ENDLESS, ("neither text nor number", "parts") * 2, strict=True),
]


@pytest.mark.parametrize(("content", "words"), REFUSED, ids=range(len(REFUSED)))
def test_hostile_bytes_are_refused(content, words, tmp_path, monkeypatch):
    """Nothing is executed, and little memory is used."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "w.pt").write_bytes(content)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for read in (load_weights, read_checkpoint) if content in OUR_ENDLESS else (load_weights,):
        with pytest.raises(UserError, match=words):
            read(tmp_path / "w.pt")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1 << 18  # KiB
    assert [path.name for path in tmp_path.iterdir()] == ["w.pt"]


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


@pytest.mark.parametrize("name", attacks(""))
@zip_and_legacy
def test_nothing_in_a_file_is_executed(name, save, tmp_path):
    marker = tmp_path / "executed"
    save(attacks(marker)[name], tmp_path / "w.pt")
    if name == "value":
        load_weights(tmp_path / "w.pt")
    else:
        with pytest.raises(UserError):
            load_weights(tmp_path / "w.pt")
    assert not marker.exists()


@pytest.mark.parametrize("format", ["", "resnext checkpoint"], ids=["theirs", "ours"])
@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b"K\x02K\x03\x86", b"J\xff\xff\xff\x7fK\x03\x86"),  # a shape that its numbers do not fill
        (b"ctorch\nfloat8_e5m2\n", b"ctorch\nDoubleStorage\n"),  # a type that they do not make
        (b"ctorch\nfloat8_e5m2\n", b"cos\nsystem\n"),  # not a type
    ],
    ids=["shape", "type", "call"],
)
def test_tensors_of_untyped_storages(format, old, new, tmp_path):
    buffer, path = io.BytesIO(), tmp_path / "w.pt"
    torch.save({"format": format, "conv1.weight": torch.ones(2, 3).to(torch.float8_e5m2)}, buffer)
    with zipfile.ZipFile(buffer) as whole, zipfile.ZipFile(path, "w") as archive:
        for name in whole.namelist():
            content = whole.read(name)
            if name.endswith("data.pkl"):
                assert content.count(old) == 1
                content = content.replace(old, new)
            archive.writestr(name, content)
    with pytest.raises(UserError, match=r"w\.pt: .*(damaged|does not fit|not a checkpoint)"):
        load_weights(path)


@zip_and_legacy
def test_damaged_files(save, tmp_path):
    buffer = io.BytesIO()
    save(small_torchvision().state_dict(), buffer)
    content = buffer.getvalue()
    start = content.find(b"data.pkl") if save is torch.save else 0
    check_damaged(load_weights, tmp_path / "w.pt", content, start, start + 15_000)
