"""load_weights on files of any kind: types of numbers, and files that are wrong, damaged or malicious."""

import io
import os
import pickle
import resource
import struct
import sys
import zipfile

import pytest
import torch
import torchvision
from commands import ROOT, call
from damage import check_damaged
from foreign_networks import (
    SAVERS,
    Pycls,
    assert_equal,
    check,
    randomize_norms,
    small_torchvision,
    zip_and_legacy,
)
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from resnext import UserError, load_weights
from resnext.engine.checkpoint import read_checkpoint

sys.path.insert(0, str(ROOT / "scripts"))
import export


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


# ---------------------------------------------------------------------------- files of this program


@pytest.mark.parametrize("kind", [torch.float64, torch.float16, torch.float8_e4m3fn], ids=str)
def test_own_files_in_other_types(tmp_path, finished_run, kind):
    """A checkpoint and an exported file that somebody cast are read as float32, with the rounded values."""

    def cast(state):
        return {key: value.to(kind) if value.is_floating_point() else value for key, value in state.items()}

    content = read_checkpoint(finished_run / "checkpoints" / "best.pt")
    expected = {key: value.to(content["model"][key]) for key, value in cast(content["model"]).items()}
    torch.save(content | {"model": cast(content["model"])}, tmp_path / "w.pt")
    exported = tmp_path / "w.safetensors"
    assert call(export.main, finished_run, exported).status == 0
    with safe_open(exported, "pt") as file:
        metadata, state = file.metadata(), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    save_file(cast(state), exported, metadata)
    for path in (tmp_path / "w.pt", exported):
        model, info = load_weights(path)
        assert info.origin == "this program" and info.classes == tuple("0123456789")
        for key, value in model.state_dict().items():
            assert value.dtype == expected[key].dtype and torch.equal(value, expected[key]), key


def test_errors_in_the_configuration_of_own_files_name_the_file(tmp_path, finished_run):
    content = read_checkpoint(finished_run / "checkpoints" / "best.pt")
    for change, words in (("model: {depth: 12}", "model.depth: "), ("model: {dept: 1}", "model.dept")):
        torch.save(content | {"config": change}, tmp_path / "w.pt")
        with pytest.raises(UserError, match=words) as caught:
            load_weights(tmp_path / "w.pt")
        assert str(caught.value).startswith(f"{tmp_path / 'w.pt'}: ")


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
    "a narrow stem": (
        changed(**{"conv1.weight": torch.ones(16, 3, 3, 3), "layer1.0.conv2.weight": torch.ones(8, 3, 3, 3)}),
        "first convolutions",
    ),
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
