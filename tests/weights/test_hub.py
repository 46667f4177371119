"""Weights by name: names and preprocessing against timm's registry, downloads from a stand-in for the hub."""

import json
import re
import sys

import pytest
import timm
import torch
from commands import ROOT, Result, draw_folders, run_python
from hub_server import Repository, serve
from test_model_folder import folder, pickled, transformers_folder

from resnext import UserError, load_weights
from resnext.models.resnext import build_model
from resnext.weights import foreign, hub
from resnext.weights.load import _infer
from resnext.weights.model_folder import MAX_CONFIG, TIMM_TAGS

NAMES = [name for name in timm.list_pretrained() if name.partition(".")[0] in TIMM_TAGS]


# ---------------------------------------------------------------------------- names


def test_tags_are_timms():
    """A bare name has timm's tag, and every name its repository."""
    assert len(NAMES) > 70
    for name in NAMES:
        cfg = timm.models.get_pretrained_cfg(name)
        assert hub.parse_name(f"timm:{name}") == (f"timm:{name}", cfg.hf_hub_id, None)
    for name, tag in TIMM_TAGS.items():
        if tag is None:
            assert not timm.list_pretrained(f"{name}.*") and name in timm.list_models()
        else:
            default = timm.models.get_pretrained_cfg(name)
            assert hub.parse_name(f"timm:{name}")[1] == default.hf_hub_id == f"timm/{name}.{tag}"


def test_the_table_lists_all_networks_that_are_ours():
    """Another name of timm has other tensors, or says how it differs without tensors."""
    for name in timm.list_models(module="resnet"):
        if not re.search(r"18|26|50", name):  # other depths of the same kinds, which take long to build
            continue
        with torch.device("meta"):
            theirs = timm.create_model(name, num_classes=10).state_dict()
            try:
                _, info = _infer(dict(theirs), name, "timm", "weights")
                ours = build_model(info.config.model, 10).state_dict()
                fits = {key: v.shape for key, v in ours.items()} == {
                    key: v.shape for key, v in theirs.items()
                }
            except (UserError, foreign.InvalidFileError):
                fits = False
        assert fits == (name in TIMM_TAGS or re.search(r"blur\d+$|aa\d+$", name) is not None), name


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("timm:seresnext50_32x4d", "no such weights for this program; give one of resnet18"),
        ("timm:resnetaa50.a1h_in1k", "no such weights"),
        ("timm:resnet200", "no such weights"),
        ("timm:", "not a name"),
        ("timm:resnet50.a1_in1k/../x", "not a name"),
        ("hf:../../etc/passwd", "not a name"),
        ("hf:a/b/c", "not a name"),
        ("hf:a/b@../x", "not a name"),
        ("hf:a/b@x/y", "not a name"),
        ("hf:a\n", "not a name"),
        ("timm/resnet18.a1_in1k", r"file of weights; did you mean hf:timm/resnet18\.a1_in1k\?"),
        ("hf-hub:microsoft/resnet-50@main", "did you mean hf:microsoft/resnet-50@main"),
        ("https://huggingface.co/timm/resnet18.a1_in1k", "did you mean hf:timm/resnet18"),
        ("runs/resnet18", "check the path"),
    ],
)
def test_other_names(source, words):
    with pytest.raises(UserError, match=words):
        load_weights(source)


def test_huggingface_hub_is_optional(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UserError, match=r"timm:resnet50: .*pip install huggingface_hub"):
        load_weights("timm:resnet50")


# ---------------------------------------------------------------------------- downloads

CHILD = f"""
import importlib, json, sys
sys.path[:0] = {[str(ROOT), str(ROOT / "scripts"), str(ROOT / "tests/helpers")]!r}
from commands import call
results = [vars(call(importlib.import_module(name).main, *words)) for name, *words in json.loads(sys.argv[1])]
print(json.dumps(results))
"""


def run_all(commands, tmp_path, **environment):
    """Run commands, [module, arguments…], in one new process, which is needed to change HF_ENDPOINT."""
    environment |= {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_DISABLE_TELEMETRY": "1"}
    done = run_python(
        "-c", CHILD, json.dumps([list(map(str, c)) for c in commands]), cwd=tmp_path, **environment
    )
    assert done.status == 0, done.error
    return [Result(**result) for result in json.loads(done.output)]


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Return the files of a timm folder."""
    return folder(tmp_path_factory.mktemp("small"), {"license": "mit"})


def files(path):
    return {file.name: file.read_bytes() for file in path.iterdir()}


def test_every_command_takes_a_name(tmp_path, small):
    """The license is printed before the download, and nothing is downloaded twice or offline."""
    pictures = draw_folders(tmp_path / "pictures", {f"c{i}": 2 for i in range(5)})
    image = next((pictures / "val").rglob("*.png"))
    name = "timm:resnet50"  # a1_in1k
    settings = ["data.dataset=folder", "data.image_size=32", "data.workers=0", "model.stages=[1,2,1,1]"]
    settings += ["model.cardinality=4", "model.base_width=6", "train.epochs=1", "train.batch_size=8"]
    settings += ["run.device=cpu", "run.tensorboard=false", f"model.pretrained={name}"]
    commands = [
        ["evaluate", name, "--data", pictures, "--workers", "0", "--json", "scores.json"],
        ["predict", name, image, "--workers", "0"],
        ["extract_features", name, image, "--workers", "0", "--output", "features.npz"],
        ["describe", name],
        ["export", name, "small.safetensors"],
        ["train", "--data", pictures, "--output", "run", "--config", "my.yaml", *settings],
    ]
    (tmp_path / "my.yaml").touch()
    hosted = {"timm/resnet50.a1_in1k": Repository(files(small), "cc-by-nc-4.0")}
    with serve(hosted) as server:
        results = run_all(commands, tmp_path, HF_ENDPOINT=server.url, HF_TOKEN="hf_secret")
        gets = [path for method, path in server.requests if method == "GET" and "/resolve/" in path]
        assert len(gets) == 2 and gets[0].endswith("config.json") and gets[1].endswith("model.safetensors")
        assert server.tokens == {"Bearer hf_secret"}
    for command, result in zip(commands, results, strict=True):
        assert result.status == 0, (command, result.error)
    license = "timm/resnet50.a1_in1k: license cc-by-nc-4.0 (non-commercial); downloading model.safetensors"
    assert license in results[0].error and not any("license" in result.error for result in results[1:])
    stated = "as config.json says: 32 pixels, resized bilinear, mean 127.5"
    assert stated in results[0].output and stated in results[1].error
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert scores["checkpoint"] == "timm:resnet50.a1_in1k" and scores["resize"] == 36
    assert (
        "weights of timm:resnet50.a1_in1k (timm), last layer included"
        in (tmp_path / "run/log.txt").read_text()
    )
    assert f'pretrained: "{name}"' in (tmp_path / "run/config.yaml").read_text()
    (tmp_path / "small.safetensors").unlink()
    # Without the server, the cache will do.
    again = [["describe", "hf:timm/resnet50.a1_in1k@main"], ["describe", "timm:resnet18"]]
    for environment in ({"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": server.url}):
        results = run_all(again, tmp_path, **environment)
        assert [result.status for result in results] == [0, 2]
        assert "timm:resnet18.a1_in1k: is not in the cache, and cannot be downloaded" in results[1].error


def test_kinds_of_repositories(tmp_path, small):
    """transformers' files, a pickle, old flat configurations, and a licence in config.json only."""
    whole, theirs = files(small), transformers_folder(tmp_path / "theirs")
    old = {"config.json": whole["config.json"], "pytorch_model.bin": pickled(small)}
    hosted = {
        "o/theirs": Repository(files(theirs)),
        "o/old": Repository(old),
        "o/both": Repository(whole | {"pytorch_model.bin": b"is not read", "run.py": b"1 / 0"}),
    }
    with serve(hosted) as server:
        commands = [["export", f"hf:{name}", f"{name[2:]}.pth"] for name in hosted]
        results = run_all(commands, tmp_path, HF_ENDPOINT=server.url)
        assert not any("run.py" in path for _, path in server.requests)
        assert not any("bin" in path for _, path in server.requests if "both" in path)
    for (name, result), path in zip(zip(hosted, results, strict=True), (theirs, small, small), strict=True):
        assert result.status == 0, result.error
        license = "unknown, see its model card" if name == "o/theirs" else "mit"
        assert f"{name}: license {license}; downloading" in result.error
        expected = load_weights(path)[0].state_dict()
        found = load_weights(tmp_path / f"{name[2:]}.pth")[0].state_dict()
        assert all(torch.equal(found[key], value) for key, value in expected.items())


def test_what_a_hub_may_answer(tmp_path, small):
    whole = files(small)
    escape = '"../../../../../escaped"'
    cases = {
        "o/none": (None, "the hub has no o/none, or it is private"),
        "o/gated": (Repository({}, error=(403, "GatedRepo")), "accept its terms"),
        "o/rev": (Repository({}, error=(404, "RevisionNotFound")), "no such revision"),
        "o/down": (Repository({}, error=(503, "")), "is not in the cache, and cannot be downloaded"),
        "o/empty": (Repository({}), "o/empty has no config.json"),
        "o/bare": (
            Repository({"config.json": whole["config.json"]}),
            "no model.safetensors or pytorch_model.bin",
        ),
        "o/large": (Repository(whole, headers={"X-Linked-Size": str(1 << 50)}), "has 1125899906842624 bytes"),
        "o/config": (Repository({"config.json": b" " * (MAX_CONFIG + 1)}), "config.json has 16777217 bytes"),
        "o/unsized": (Repository(whole, headers={"Content-Length": None}), "config.json has None bytes"),
        "o/etag": (Repository(whole, headers={"ETag": escape}), "not safe"),
        "o/commit": (Repository(whole, headers={"X-Repo-Commit": "../../../../escaped"}), "not safe"),
        "o/list": (Repository({"config.json": b"[]"}), "is not a JSON object"),
        "o/evil": (
            Repository({"config.json": whole["config.json"], "pytorch_model.bin": pickled(None)}),
            "damaged|holds",
        ),
    }
    hosted = {name: repository for name, (repository, _) in cases.items() if repository}
    with serve(hosted) as server:
        results = run_all([["describe", f"hf:{name}"] for name in cases], tmp_path, HF_ENDPOINT=server.url)
    for (name, (_, words)), result in zip(cases.items(), results, strict=True):
        text = result.error.splitlines()[-1]  # the license may be printed before it
        assert result.status == 2 and text.startswith(f"error: hf:{name}: ") and re.search(words, text), text
    assert {path.name for path in tmp_path.iterdir()} == {"hf"}
    assert not list(tmp_path.rglob("*escaped*")) and not (tmp_path.parent / "escaped").exists()
