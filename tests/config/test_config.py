"""The configuration: its defaults, its files, what it prints, and that errors in it cost no PyTorch."""

import dataclasses
import json
import os
import random

import pytest
import yaml
from commands import ROOT, call, run_python, run_script, tiny_yaml

import train
from resnext.config import (
    CONFIG_FOLDER,
    SECTIONS,
    Config,
    all_keys,
    differences,
    find_config,
    parse_config,
    read_config,
    to_yaml,
)
from resnext.errors import UserError

FILES = sorted(path.name for path in CONFIG_FOLDER.glob("*.yaml"))
KEYS = [f"{section}.{key}" for section, key, _ in all_keys(Config())]


def given(config: Config) -> dict[str, object]:
    return {f"{section}.{key}": value for section, key, value in all_keys(config)}


# ---------------------------------------------------------------------------- defaults and files


def test_defaults_are_the_originals_imagenet_recipe():
    config = parse_config("", "defaults")
    assert given(config) == {
        "model.architecture": "resnext",
        "model.stem": "imagenet",
        "model.depth": 50,
        "model.stages": (3, 4, 6, 3),
        "model.cardinality": 32,
        "model.base_width": 4,
        "model.block": "C",
        "model.shortcut": "B",
        "model.preactivation": False,
        "model.zero_gamma": False,
        "model.classes": None,
        "data.dataset": "folder",
        "data.dir": None,
        "data.download": True,
        "data.pipeline": "fast",
        "data.decoder": "simplejpeg",
        "data.interpolation": "bicubic",
        "data.image_size": 224,
        "data.train_size": 224,
        "data.resize": 256,
        "data.workers": None,
        "data.characters": None,
        "data.class_order": None,
        "data.max_pixels": 178_956_970,
        "data.skip_broken": False,
        "data.train_images": None,
        "data.val_images": None,
        # mean {0.485, 0.456, 0.406} and std {0.229, 0.224, 0.225} of pixels in 0...1
        "data.mean": (123.675, 116.28, 103.53),
        "data.std": (58.395, 57.12, 57.375),
        "augment.mirror": 0.5,
        "augment.padding": 0,
        "augment.min_area": 0.08,
        "augment.jitter": 0.4,
        "augment.lighting": 0.1,
        "augment.policy": None,
        "augment.erasing": 0.0,
        "augment.mixup": 0.0,
        "augment.cutmix": 0.0,
        "augment.repeats": 1,
        "train.epochs": 100,
        "train.batch_size": 256,
        "model.pretrained": None,
        "model.reset_classifier": False,
        "train.frozen_stages": None,
        "train.eval_batch_size": 256,
        "train.accumulation_steps": 1,
        "train.bn_group": None,
        "train.sync_bn": False,
        "train.label_smoothing": 0.0,
        "train.precision": "fp32",
        "train.channels_last": None,
        "train.compile": False,
        "train.activation_checkpointing": False,
        "train.clip_grad_norm": None,
        "train.ema_decay": None,
        "optimizer.lr": 0.1,
        "optimizer.head_lr": None,
        "optimizer.momentum": 0.9,
        "optimizer.nesterov": True,
        "optimizer.weight_decay": 1e-4,
        "optimizer.norm_weight_decay": None,
        "schedule.name": "imagenet_step",
        "schedule.milestones": None,
        "schedule.gamma": 0.1,
        "schedule.min_lr": 0.0,
        "schedule.warmup_epochs": 0,
        "run.seed": 0,
        "run.device": "auto",
        "run.deterministic": False,
        "run.log_interval": 50,
        "run.save_interval": None,
        "run.keep_every": None,
        "run.tensorboard": True,
        "run.timeout": 600,
    }


@pytest.mark.parametrize(
    "text", ["", "\n", "# only a remark\n", "---\n", "null", "~", "train:\nmodel:\n", "{}"]
)
def test_nothing_given_is_the_defaults(text):
    assert parse_config(text, "text") == parse_config("", "defaults")


def test_widths_and_depths_by_default():
    assert parse_config("model: {architecture: resnet}", "t").model.base_width == 64
    assert parse_config("model: {architecture: resnet}", "t").model.cardinality == 1
    assert parse_config("model: {depth: 101}", "t").model.stages == (3, 4, 23, 3)
    assert parse_config("model: {depth: 152}", "t").model.stages == (3, 8, 36, 3)
    assert parse_config("model: {stem: cifar}", "t").model.depth == 29
    assert parse_config("model: {stem: cifar, depth: 164}", "t").model.stages == (18, 18, 18)
    assert parse_config("model: {stages: [2, 2, 2, 2]}", "t").model.depth == 26
    assert parse_config("model: {stem: cifar}", "t").data.image_size == 32
    assert parse_config("data: {dataset: cifar10}", "t").data.mean == (125.3, 123.0, 113.9)
    assert parse_config("data: {dataset: cifar100}", "t").data.std == (68.2, 65.4, 70.4)
    assert parse_config("train: {batch_size: 48}", "t").train.eval_batch_size == 48


def test_pipelines_by_default():
    """Small sets are held in memory, without the augmentation of files; class folders are streamed."""
    memory = [
        parse_config(text, "t")
        for text in (
            "model: {stem: cifar}",
            "model: {stem: cifar}\ndata: {dataset: cifar10}",
            "data: {dataset: glyphs, image_size: 32}",
            "data: {pipeline: memory, image_size: 32}",
        )
    ]
    for config in memory:
        assert (config.data.pipeline, config.data.train_size, config.data.resize) == ("memory", 32, 32)
        assert (config.augment.min_area, config.augment.jitter, config.augment.lighting) == (1, 0, 0)
    for name in ("fast", "torch7"):
        config = parse_config(f"model: {{stem: cifar}}\ndata: {{pipeline: {name}, image_size: 64}}", "t")
        assert (config.data.pipeline, config.data.train_size, config.data.resize) == (name, 64, 73)
        assert (config.augment.min_area, config.augment.jitter, config.augment.lighting) == (0.08, 0.4, 0.1)
    resized = parse_config("data: {image_size: 288, train_size: 176, resize: 288}", "t").data
    assert (resized.image_size, resized.train_size, resized.resize) == (288, 176, 288)


@pytest.mark.parametrize("name", FILES)
def test_file_of_configs(name):
    path = CONFIG_FOLDER / name
    config = read_config(path)
    assert parse_config(to_yaml(config), "resolved") == config
    first = path.read_text(encoding="utf-8").splitlines()[0]
    assert first.startswith(f"# python train.py --config {name}"), "the command comes first"


def test_recipes_of_the_lua_code():
    """README of facebookresearch/ResNeXt: 8 GPUs, batch 128, weight decay 5e-4, 300 epochs."""
    for classes in (10, 100):
        for width in (8, 16):
            config = read_config(find_config(f"cifar{classes}_resnext29_{width}x64d"))
            assert (config.model.depth, config.model.cardinality, config.model.base_width) == (29, width, 64)
            assert not config.model.preactivation
            assert (config.train.batch_size, config.train.bn_group, config.train.epochs) == (128, 16, 300)
            assert (config.optimizer.lr, config.optimizer.weight_decay) == (0.1, 5e-4)
            assert config.schedule.name == "cifar_step"
            assert (config.data.dataset, config.augment.padding) == (f"cifar{classes}", 4)


def test_recipes_of_the_paper():
    """Section 5.3: pre-activation blocks, batch 256 on 8 GPUs, drops at epochs 150 and 225."""
    for classes in (10, 100):
        for width in (8, 16):
            config = read_config(find_config(f"cifar{classes}_preresnext29_{width}x64d"))
            assert config.model.preactivation
            assert (config.train.batch_size, config.train.bn_group, config.train.epochs) == (256, 32, 300)
            assert config.optimizer.weight_decay == 5e-4
            assert config.schedule.milestones == (150, 225)


# ---------------------------------------------------------------------------- names


@pytest.mark.parametrize("name", FILES)
def test_name_is_looked_up_in_configs(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_config(name) == CONFIG_FOLDER / name
    assert find_config(name.removesuffix(".yaml")) == CONFIG_FOLDER / name
    assert find_config(str(CONFIG_FOLDER / name)) == CONFIG_FOLDER / name


def test_own_file_comes_before_configs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo.yaml").write_text("train: {epochs: 77}")
    assert read_config(find_config("demo.yaml")).train.epochs == 77
    assert read_config(find_config("./demo.yaml")).train.epochs == 77


# ---------------------------------------------------------------------------- printing

TEXTS = [
    "datasets",
    "/data/imagenet",
    "../my data",
    "~/data",
    "C:\\data",
    "12:30",
    "1e-4",
    "0x10",
    "007",
    ".5",
    ".inf",
    ".nan",
    "no",
    "Null",
    "~",
    "y",
    "a: b",
    "a #b",
    "- a",
    "*a",
    "&a",
    "!a",
    "%a",
    "@a",
    "{a}",
    "[a]",
    "'a'",
    '"a"',
    "a\\nb",
    "line\nbreak",
    "tab\there",
    "",
    " ",
    " a ",
    "ümläut",
    "数据",
    "😀 data",
    "\x7f",
    "\u2028",
    "\udce9",
    "x" * 200,
    ("long words " * 30).strip(),
]


def random_config(random: random.Random) -> dict[str, dict[str, object]]:
    """Some keys of each section with valid values; each key now and then."""
    values = {name: {} for name in SECTIONS}

    def put(name: str, *choices) -> object:
        section, key = name.split(".")
        if random.random() < 0.5:
            values[section][key] = random.choice(choices)
        return values[section].get(key)

    def real(low: float, high: float) -> float:
        return random.choice([random.uniform(low, high), low + (high - low) * 10 ** random.uniform(-20, 0)])

    architecture = put("model.architecture", "resnext", "resnet")
    cifar = put("model.stem", "imagenet", "cifar") == "cifar"
    if random.random() < 0.5:
        put("model.stages", *[[random.randint(1, 40) for _ in range(3 if cifar else 4)] for _ in range(5)])
    else:
        put("model.depth", *((11, 20, 29, 164) if cifar else (50, 101, 152)))
    if architecture != "resnet":
        put("model.cardinality", 1, 2, 64, 100)
        put("model.base_width", 1, 4, 40)
        put("model.block", "A", "B", "C")
    put("model.shortcut", "A", "B", "C")
    put(random.choice(["model.preactivation", "model.zero_gamma"]), True, False)
    put("model.classes", 1, 2, 1000)
    small = put("data.dataset", "folder", "cifar10", "cifar100", "glyphs")
    if small == "glyphs":
        put("data.characters", None, "ABC", "01")
    put("data.dir", None, *TEXTS)
    put("data.download", True, False)
    put("data.image_size", *((32,) if small in ("cifar10", "cifar100") else (20, 32, 224, 320)))
    files = small in (None, "folder")
    pipeline = put("data.pipeline", None, "memory", *(("fast", "torch7") if files else ()))
    if pipeline is None:
        pipeline = "fast" if files and not cifar else "memory"
    put("data.decoder", "simplejpeg", "pillow")
    put("data.interpolation", "bilinear", "bicubic")
    if pipeline != "memory":
        put("data.train_size", None, 8, 176)
        put("data.resize", None, 320, 8192)
    put("data.workers", None, 0, 256)
    put("data.class_order", None, "string", "natural")
    put("data.max_pixels", 1, 178_956_970, 10**12)
    put("data.skip_broken", True, False)
    put("data.train_images", None, 1, 50000)
    put("data.val_images", None, 1, 10000)
    put("data.mean", None, [real(-300, 300) for _ in range(3)], [1, 2, 3])
    put("data.std", None, [real(0, 300) for _ in range(3)], [1e-5, 1e-10, 1e5])
    put("augment.mirror", 0, 1, 0.5, real(0, 1))
    if pipeline == "memory":
        put("augment.padding", 0, 4, 7)
        put("augment.min_area", None, 1)
        put("augment.jitter", None, 0)
        put("augment.lighting", None, 0)
    else:
        put("augment.min_area", None, 1, 0.25, real(0, 1))
        put("augment.jitter", None, 0, 1, real(0, 1))
        put("augment.lighting", None, 0, 3, real(0, 1))
        put("augment.policy", None, *(("randaugment", "trivialaugment") if pipeline == "fast" else ()))
        put("augment.repeats", 1, 3)
    put("augment.erasing", 0, 1, real(0, 1))
    put("augment.mixup", 0, 0.2, real(0, 9))
    put("augment.cutmix", 0, 1, real(0, 9))
    parts, groups, group = (random.choice([1, 2, 3, 5]) for _ in range(3))
    values["train"]["batch_size"] = parts * groups * group
    values["train"]["accumulation_steps"] = parts
    if random.random() < 0.5:
        values["train"]["bn_group"] = group
    else:
        put("train.sync_bn", True, False)
    put("train.epochs", 1, 7, 1000)
    put("model.pretrained", None, *TEXTS)
    put("model.reset_classifier", True, False)
    put("train.frozen_stages", None, 0, 3)
    put("optimizer.head_lr", None, 0.1, 2)
    put("train.label_smoothing", 0, 0.1, real(0, 1))
    put("train.eval_batch_size", None, 1, 100)
    put("train.precision", "auto", "fp32", "tf32", "bf16", "fp16")
    put("train.channels_last", None, True, False)
    if not put("train.compile", True, False):
        put("train.activation_checkpointing", True, False)
    put("train.clip_grad_norm", None, 1, real(0, 10))
    put("train.ema_decay", None, 0.999, real(0, 1) or 0.5)
    put("optimizer.lr", 1, 0.1, real(0, 10))
    momentum = put("optimizer.momentum", 0, 0.9, real(0, 1))
    if momentum == 0:
        values["optimizer"]["nesterov"] = False
    else:
        put("optimizer.nesterov", True, False)
    put("optimizer.weight_decay", 0, 1e-4, 5e-4, 1e-5, 1e-20)
    put("optimizer.norm_weight_decay", None, 0, 1e-4, 1e-20)
    if put("schedule.name", "imagenet_step", "cifar_step", "multistep", "cosine") == "multistep":
        values["schedule"]["milestones"] = sorted(random.sample(range(1, 1000), random.randint(1, 5)))
    put("schedule.gamma", 0.1, 0.5, real(0, 1))
    if values["schedule"].get("name") != "cosine":
        put("schedule.min_lr", 0, 1e-6, real(0, 1))
    if values["train"].get("epochs") != 1:
        put("schedule.warmup_epochs", 0, 5)
    put("run.seed", 0, 1, 2**63 - 1)
    put("run.device", "auto", "cpu", "cuda")
    put("run.deterministic", True, False)
    put("run.log_interval", 1, 10**30)
    put("run.save_interval", None, 1, 500)
    put("run.keep_every", None, 1, 10)
    put("run.tensorboard", True, False)
    put("run.timeout", 1, 600, 86400)
    return values


RANDOM = [random_config(random.Random(seed)) for seed in range(120)]


def same(a: object, b: object) -> bool:
    """Equal in value and type, inside lists too."""
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


def test_random_configurations_reach_every_key():
    for name in KEYS:
        section, key = name.split(".")
        values = [json.dumps(config[section][key]) for config in RANDOM if key in config[section]]
        assert len(set(values)) >= 2, name


def test_values_are_read_as_they_are_written():
    for values in RANDOM:
        config = parse_config(yaml.safe_dump(values, allow_unicode=True), "random")
        read = given(config)
        for section, keys in values.items():
            for key, value in keys.items():
                if value is not None:
                    kind = float if isinstance(read[f"{section}.{key}"], float) else None
                    assert same(
                        [float(v) for v in value]
                        if key in ("mean", "std")
                        else (kind(value) if kind else value),
                        read[f"{section}.{key}"],
                    ), (section, key, value)


def test_printed_configuration_is_the_same_configuration():
    for values in RANDOM:
        config = parse_config(yaml.safe_dump(values), "random")
        printed = to_yaml(config)
        again = parse_config(printed, "printed")
        assert again == config, differences(config, again)
        assert to_yaml(again) == printed


def test_printed_configuration_is_the_same_for_other_readers():
    for values in RANDOM:
        config = parse_config(yaml.safe_dump(values), "random")
        loaded = yaml.safe_load(to_yaml(config))
        assert list(loaded) == list(SECTIONS)
        for section, key, value in all_keys(config):
            assert same(loaded[section][key], value), (section, key, value, loaded[section][key])


@pytest.mark.parametrize("text", TEXTS, ids=lambda text: ascii(text)[:20])
def test_any_folder_name_survives_printing(text):
    config = parse_config("", "defaults")
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, dir=text))
    printed = to_yaml(config)
    printed.encode()  # as it is written to config.yaml
    assert parse_config(printed, "printed").data.dir == text
    assert yaml.safe_load(printed)["data"]["dir"] == text


def test_every_key_is_explained():
    lines = [line for line in to_yaml(parse_config("", "defaults")).splitlines() if line.startswith("  ")]
    assert len(lines) == len(KEYS)
    for line, name in zip(lines, KEYS, strict=True):
        before, mark, comment = line.partition("  # ")
        assert before.strip().startswith(f"{name.split('.')[1]}: ")
        assert mark, name
        assert len(comment) >= 5, f"{name}: {comment!r} explains nothing"


def test_keys_have_one_meaning():
    """No key's name is in two sections, so that a misplaced one can be answered with the right place."""
    names = [name.split(".")[1] for name in KEYS]
    assert len(names) == len(set(names))


# ---------------------------------------------------------------------------- overrides


def test_overrides_beat_the_file_and_the_last_one_wins():
    text = "train: {epochs: 3, batch_size: 32}\nmodel: {stem: cifar, depth: 20}"
    overrides = ["train.epochs=4", "optimizer.lr=1e-3", "train.epochs=5", "model.stages=[2, 2, 2]"]
    config = parse_config(text, "text", overrides)
    assert (config.train.epochs, config.train.batch_size, config.optimizer.lr) == (5, 32, 1e-3)
    assert config.model.stages == (2, 2, 2)


@pytest.mark.parametrize(
    ("override", "name", "value"),
    [
        ("optimizer.weight_decay=1e-4", "optimizer.weight_decay", 1e-4),
        ("optimizer.weight_decay=.5E-3", "optimizer.weight_decay", 5e-4),
        ("optimizer.lr=1", "optimizer.lr", 1.0),
        ("optimizer.lr=+1.", "optimizer.lr", 1.0),
        ("model.classes=", "model.classes", None),
        ("model.classes=null", "model.classes", None),
        ("data.dir=null", "data.dir", None),
        ("data.dir='null'", "data.dir", "null"),
        ("data.dir=a=b", "data.dir", "a=b"),
        ("data.dir=2012", "data.dir", "2012"),
        ("data.dir=no", "data.dir", "no"),
        ("data.dir=/a b/c", "data.dir", "/a b/c"),
        ("train.compile=true", "train.compile", True),
        ("model.block='B'", "model.block", "B"),
        ("schedule.warmup_epochs= 5", "schedule.warmup_epochs", 5),
    ],
)
def test_override(override, name, value):
    assert same(given(parse_config("", "defaults", [override]))[name], value)


def test_override_mends_a_contradiction_of_the_file():
    text = "train: {batch_size: 30, bn_group: 16}"
    with pytest.raises(UserError, match=r"train\.bn_group"):
        parse_config(text, "text")
    assert parse_config(text, "text", ["train.batch_size=32"]).train.bn_group == 16


def test_data_option_beats_all(tmp_path):
    (tmp_path / "c.yaml").write_text("data: {dir: a}")
    result = call(
        train.main, "--config", tmp_path / "c.yaml", "data.dir=b", "--data", "c d", "--print-config"
    )
    assert yaml.safe_load(result.output)["data"]["dir"] == os.path.abspath("c d")


def test_overrides_between_options(tmp_path):
    (tmp_path / "c.yaml").write_text("")
    result = call(
        train.main,
        *("train.epochs=3", "--config", tmp_path / "c.yaml", "run.seed=4", "--print-config"),
        *("optimizer.lr=0.5", "--output", "x", "--resume", "run.log_interval=7"),
    )
    loaded = yaml.safe_load(result.output)
    assert (loaded["train"]["epochs"], loaded["run"]["seed"]) == (3, 4)
    assert (loaded["optimizer"]["lr"], loaded["run"]["log_interval"]) == (0.5, 7)


# ---------------------------------------------------------------------------- command lines

TORCH_FREE = """
import contextlib, io, json, os, runpy, sys

script, *command_lines = json.loads(sys.argv[1])
sys.path[0] = os.path.dirname(script)
for arguments in command_lines:
    sys.argv = [script, *arguments]
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            runpy.run_path(script, run_name="__main__")
    except SystemExit as stop:
        print(stop.code, "torch" in sys.modules, *arguments)
"""


@pytest.mark.parametrize("script", ["train.py", "evaluate.py"])
def test_no_torch_for_help_and_configuration_errors(script, tmp_path):
    (tmp_path / "bad.yaml").write_text("train: {epoch: 3}")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    lines = {
        "train.py": [
            (0, ["--help"]),
            (0, ["--config", "demo.yaml", "--print-config"]),
            (0, ["--print-config"]),
            (2, []),
            (2, ["--config", "bad.yaml"]),
            (2, ["--config", "nowhere.yaml"]),
            (2, ["--config", "demo.yaml", "train.epochs=x"]),
            (2, ["--config", "demo.yaml", "--no-such-option"]),
            (2, ["--config", "demo.yaml", "--output", "out"]),
            (2, ["--config", "demo.yaml", "--output", "bad.yaml/out"]),
            (2, ["--config", "demo.yaml", "--resume", "nowhere"]),
            (2, ["--resume", "out"]),
        ],
        "evaluate.py": [
            (0, ["--help"]),
            (2, []),
            (2, ["nowhere"]),
            (2, ["out", "--batch-size", "0"]),
            (2, ["out", "--json", "nowhere/result.json"]),
        ],
    }[script]
    command = json.dumps([str(ROOT / script), *(arguments for _, arguments in lines)])
    result = run_python("-c", TORCH_FREE, command, cwd=tmp_path)
    assert result.output.splitlines() == [" ".join([str(s), "False", *a]) for s, a in lines], result.error


def test_package_without_torch(tmp_path):
    code = "import sys, resnext.config, resnext.errors; print('torch' in sys.modules)"
    assert run_python("-c", code, cwd=ROOT).output.strip() == "False"


@pytest.mark.parametrize("script", ["train.py", "evaluate.py"])
def test_help(script, tmp_path):
    result = run_script(script, "--help", cwd=tmp_path)
    assert result.status == 0
    assert f"python {script} " in result.output, "the commands to start from"
    assert "--data" in result.output


def test_print_config(tmp_path):
    result = run_script("train.py", "--config", "demo", "train.epochs=3", "--print-config", cwd=tmp_path)
    assert (result.status, result.error) == (0, "")
    assert parse_config(result.output, "printed") == read_config(find_config("demo"), ["train.epochs=3"])
    assert list(tmp_path.iterdir()) == []


def test_config_of_a_run_repeats_it(finished_run, tmp_path):
    """config.yaml of a run directory is a valid --config and says what else made the run."""
    text = (finished_run / "config.yaml").read_text(encoding="utf-8")
    assert read_config(finished_run / "config.yaml") == parse_config(tiny_yaml(), "tiny")
    for name in ("python", "torch", "torchvision", "numpy", "pillow", "commit", "device", "data"):
        assert f"\n# {name}: " in f"\n{text}", name
