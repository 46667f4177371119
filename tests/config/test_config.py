"""The configuration: defaults, files, printing, overrides, and command lines that must not import torch."""

import dataclasses
import json
import os

import pytest
import yaml
from commands import ROOT, call, run_python, run_script, tiny_yaml

import train
from resnext.config import (
    CONFIG_FOLDER,
    KEYS,
    all_keys,
    differences,
    find_config,
    parse_config,
    read_config,
    to_yaml,
)

FILES = sorted(path.name for path in CONFIG_FOLDER.glob("*.yaml"))
DEFAULTS = """
model: {architecture: resnext, stem: imagenet, depth: 50, block_type: bottleneck, stages: [3, 4, 6, 3],
  cardinality: 32, base_width: 4, block: C, shortcut: B, preactivation: false, zero_gamma: false,
  classes: null, pretrained: null, reset_classifier: false}
data: {dataset: folder, characters: null, dir: null, download: true, pipeline: fast, decoder: simplejpeg,
  interpolation: bicubic, image_size: 224, train_size: 224, resize: 256, workers: null, class_order: null,
  max_pixels: 178956970, train_list: null, val_list: null, skip_broken: false,
  train_images: null, val_images: null,
  # mean {0.485, 0.456, 0.406} and std {0.229, 0.224, 0.225} of pixels in 0...1
  mean: [123.675, 116.28, 103.53], std: [58.395, 57.12, 57.375]}
augment: {mirror: 0.5, padding: 0, min_area: 0.08, jitter: 0.4, lighting: 0.1, policy: null, erasing: 0.0,
  mixup: 0.0, cutmix: 0.0, repeats: 1}
train: {epochs: 100, batch_size: 256, eval_batch_size: 256, frozen_stages: null, accumulation_steps: 1,
  bn_group: null, sync_bn: false, label_smoothing: 0.0, precision: fp32, channels_last: null,
  compile: false, activation_checkpointing: false, clip_grad_norm: null, ema_decay: null}
optimizer: {lr: 0.1, head_lr: null, momentum: 0.9, nesterov: true, weight_decay: 1.0e-4,
  norm_weight_decay: null}
schedule: {name: imagenet_step, milestones: null, gamma: 0.1, min_lr: 0.0, warmup_epochs: 0}
run: {seed: 0, device: auto, deterministic: false, log_interval: 50, save_interval: null,
  keep_every: null, tensorboard: true, timeout: 600}
"""


def same(a: object, b: object) -> bool:
    """Return whether two values are equal and have the same types, inside lists too."""
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


def assert_reads(text: str, config: object) -> None:
    """Assert that a YAML reader that guesses types finds every key of a configuration, in order."""
    loaded = yaml.safe_load(text)
    assert [f"{section}.{key}" for section, keys in loaded.items() for key in keys] == list(KEYS)
    for name, value in all_keys(config).items():
        section, key = name.split(".")
        assert same(loaded[section][key], value), (name, value)


# ---------------------------------------------------------------------------- defaults and files


def test_defaults_are_the_originals_imagenet_recipe():
    assert_reads(DEFAULTS, parse_config("", "defaults"))


@pytest.mark.parametrize(
    "text", ["", "\n", "# only a comment\n", "---\n", "null", "~", "train:\nmodel:\n", "{}"]
)
def test_nothing_given_is_the_defaults(text):
    assert parse_config(text, "text") == parse_config("", "defaults")


@pytest.mark.parametrize("name", FILES)
def test_file_of_configs(name, tmp_path, monkeypatch):
    """It starts with its command, survives printing, and is found by name from any directory."""
    path = CONFIG_FOLDER / name
    config = read_config(path)
    assert parse_config(to_yaml(config), "resolved") == config
    assert path.read_text(encoding="utf-8").startswith(f"# python train.py --config {name}")
    monkeypatch.chdir(tmp_path)
    for word in (name, name.removesuffix(".yaml"), str(path)):
        assert find_config(word) == path


@pytest.mark.parametrize("classes", [10, 100])
@pytest.mark.parametrize("width", [8, 16])
@pytest.mark.parametrize("source", ["Lua README", "paper"])
def test_cifar_recipes(source, width, classes):
    """The README of the Lua code: batch 128 on 8 GPUs. The paper, section 5.3: pre-activation, batch 256."""
    paper = source == "paper"
    config = read_config(find_config(f"cifar{classes}_{'preresnext' if paper else 'resnext'}29_{width}x64d"))
    assert (config.model.depth, config.model.cardinality, config.model.base_width) == (29, width, 64)
    assert config.model.preactivation == paper
    batch = (256, 32) if paper else (128, 16)
    assert (config.train.batch_size, config.train.bn_group, config.train.epochs) == (*batch, 300)
    assert (config.optimizer.lr, config.optimizer.weight_decay) == (0.1, 5e-4)
    schedule = ("multistep", (150, 225)) if paper else ("cifar_step", None)
    assert (config.schedule.name, config.schedule.milestones) == schedule
    assert (config.data.dataset, config.augment.padding) == (f"cifar{classes}", 4)


def test_own_file_comes_before_configs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo.yaml").write_text("train: {epochs: 77}")
    assert read_config(find_config("demo.yaml")).train.epochs == 77
    assert read_config(find_config("./demo.yaml")).train.epochs == 77


# ---------------------------------------------------------------------------- printing

# fmt: off
TEXTS = [
    "datasets", "/data/imagenet", "../my data", "~/data", "C:\\data", "12:30", "1e-4", "0x10", "007", ".5",
    ".inf", ".nan", "no", "Null", "~", "y", "a: b", "a #b", "- a", "*a", "&a", "!a", "%a", "@a", "{a}",
    "[a]", "'a'",
    '"a"', "a\\nb", "line\nbreak", "tab\there", "", " ", " a ", "ümläut", "数据", "😀 data", "\x7f", "\u2028",
    "\udce9", "x" * 200, ("long words " * 30).strip(),
]
CHOICES = {  # valid values of every key
    "model.architecture": ["resnext", "resnet"], "model.stem": ["imagenet", "cifar"], "model.depth": [50,
    101],
    "model.stages": [[3, 4, 6, 3], [1, 40, 2, 1]], "model.cardinality": [1, 100], "model.base_width": [1, 40],
    "model.block_type": ["basic", "bottleneck"],
    "model.block": ["A", "B", "C"], "model.shortcut": ["A", "B", "C"], "model.preactivation": [True, False],
    "model.zero_gamma": [True, False], "model.classes": [None, 1, 1000], "model.pretrained": [None, *TEXTS],
    "model.reset_classifier": [True, False], "data.dataset": ["folder", "cifar10", "cifar100", "glyphs"],
    "data.characters": [None, "ABC", "01"], "data.dir": [None, *TEXTS], "data.download": [True, False],
    "data.pipeline": ["memory", "fast", "torch7"], "data.decoder": ["simplejpeg", "pillow"],
    "data.interpolation": ["bilinear", "bicubic"], "data.image_size": [8, 224], "data.train_size": [8, 176],
    "data.resize": [320, 8192], "data.workers": [None, 0, 256], "data.class_order": [None, "string",
    "natural"],
    "data.train_list": [None, *TEXTS], "data.val_list": [None, *TEXTS],
    "data.max_pixels": [1, 178_956_970, 10**12], "data.skip_broken": [True, False],
    "data.train_images": [None, 1, 50000], "data.val_images": [None, 1, 10000],
    "data.mean": [[1, 2, 3], [-299.9, 1e-20, 3]], "data.std": [[1e-5, 1e-10, 1e5], [0.1, 99.7, 3]],
    "augment.mirror": [0, 1, 0.5, 1e-17], "augment.padding": [0, 7], "augment.min_area": [1, 0.25, 1e-9],
    "augment.jitter": [0, 1, 1 / 3], "augment.lighting": [0, 3, 0.7],
    "augment.policy": [None, "randaugment", "trivialaugment"], "augment.erasing": [0, 1,
    0.123456789012345678],
    "augment.mixup": [0, 0.2, 8.7], "augment.cutmix": [0, 1, 1e-19], "augment.repeats": [1, 3],
    "train.epochs": [1, 1000], "train.batch_size": [1, 10**6], "train.eval_batch_size": [1, 100],
    "train.frozen_stages": [None, 0, 3], "train.accumulation_steps": [1, 4], "train.bn_group": [None, 32],
    "train.sync_bn": [True, False], "train.label_smoothing": [0, 0.1, 2 / 3],
    "train.precision": ["auto", "fp32", "tf32", "bf16", "fp16"], "train.channels_last": [None, True, False],
    "train.compile": [True, False], "train.activation_checkpointing": [True, False],
    "train.clip_grad_norm": [None, 1, 9.87], "train.ema_decay": [None, 0.999, 1e-18],
    "optimizer.lr": [1, 0.1, 1 / 3], "optimizer.head_lr": [None, 0.1, 2], "optimizer.momentum": [0, 0.9,
    0.123],
    "optimizer.nesterov": [True, False], "optimizer.weight_decay": [0, 1e-4, 5e-4, 1e-5, 1e-20],
    "optimizer.norm_weight_decay": [None, 0, 1e-4, 1e-20],
    "schedule.name": ["imagenet_step", "cifar_step", "cosine"], "schedule.milestones": [[1], [150, 225]],
    "schedule.gamma": [0.1, 0.5, 1 / 7], "schedule.min_lr": [0, 1e-6, 0.7], "schedule.warmup_epochs": [0, 5],
    "run.seed": [0, 1, 2**63 - 1], "run.device": ["auto", "cpu", "cuda"], "run.deterministic": [True, False],
    "run.log_interval": [1, 10**30], "run.save_interval": [None, 1, 500], "run.keep_every": [None, 1, 10],
    "run.tensorboard": [True, False], "run.timeout": [1, 600, 86400],
}
CONTEXT = {  # what some keys need
    "model.block_type": {"model": {"architecture": "resnet", "stem": "cifar", "depth": 20}},
    "data.characters": {"data": {"dataset": "glyphs"}}, "augment.padding": {"data": {"pipeline": "memory"}},
    "optimizer.momentum": {"optimizer": {"nesterov": False}},
    "schedule.milestones": {"schedule": {"name": "multistep"}},
}
# fmt: on


def test_choices_cover_every_key():
    assert CHOICES.keys() == KEYS.keys()
    assert all(len(choices) >= 2 for choices in CHOICES.values())


@pytest.mark.parametrize("name", CHOICES)
def test_values_survive_reading_and_printing(name):
    """Values are read as they are written; the printed text is the same to this and to other readers."""
    section, key = name.split(".")
    for value in CHOICES[name]:
        values = CONTEXT.get(name, {})
        values = values | {section: values.get(section, {}) | {key: value}}
        config = parse_config(yaml.safe_dump(values, allow_unicode=True), "written")
        found = all_keys(config)[name]
        if isinstance(found, float):
            value = float(value)
        elif key in ("mean", "std"):
            value = list(map(float, value))
        assert same(value, found), (value, found)
        printed = to_yaml(config)
        again = parse_config(printed, "printed")
        assert again == config, differences(config, again)
        assert to_yaml(again) == printed
        assert_reads(printed, config)


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
    for line, name in zip(lines, KEYS, strict=True):
        before, _, comment = line.partition("  # ")
        assert before.strip().startswith(f"{name.split('.')[1]}: ")
        assert len(comment) >= 5, name


def test_keys_have_one_meaning():
    """No two sections share a key, so an error can tell where a misplaced key belongs."""
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
    ("override", "value"),
    [
        ("optimizer.weight_decay=1e-4", 1e-4),
        ("optimizer.weight_decay=.5E-3", 5e-4),
        ("optimizer.lr=1", 1.0),
        ("optimizer.lr=+1.", 1.0),
        ("model.classes=", None),
        ("model.classes=null", None),
        ("data.dir=null", None),
        ("data.dir='null'", "null"),
        ("data.dir=a=b", "a=b"),
        ("data.dir=2012", "2012"),
        ("data.dir=no", "no"),
        ("data.dir=/a b/c", "/a b/c"),
        ("train.compile=true", True),
        ("model.block='B'", "B"),
        ("schedule.warmup_epochs= 5", 5),
    ],
)
def test_override(override, value):
    assert same(all_keys(parse_config("", "defaults", [override]))[override.partition("=")[0]], value)


def test_key_of_an_earlier_version_is_read():
    assert parse_config("train: {weights: w.pt}", "old").model.pretrained == "w.pt"


def test_options_and_overrides_in_any_order(tmp_path):
    """--data beats data.dir, and an override after --resume is not its value."""
    (tmp_path / "c.yaml").write_text("data: {dir: a}")
    result = call(
        train.main,
        *("data.dir=b", "train.epochs=3", "--config", tmp_path / "c.yaml", "--data", "c d", "--print-config"),
        *("optimizer.lr=0.5", "--output", "x", "--resume", "run.log_interval=7"),
    )
    loaded = yaml.safe_load(result.output)
    assert loaded["data"]["dir"] == os.path.abspath("c d")
    assert (loaded["train"]["epochs"], loaded["run"]["log_interval"], loaded["optimizer"]["lr"]) == (
        3,
        7,
        0.5,
    )


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
COMMAND_LINES = {
    "train.py": """
        0 --help
        0 --config demo.yaml --print-config
        0 --print-config
        2
        2 --config bad.yaml
        2 --config nowhere.yaml
        2 --config demo.yaml train.epochs=x
        2 --config demo.yaml --no-such-option
        2 --config demo.yaml --output out
        2 --config demo.yaml --output bad.yaml/out
        2 --config demo.yaml --resume nowhere
        2 --resume out
    """,
    "evaluate.py": """
        0 --help
        2
        2 nowhere
        2 out --batch-size 0
        2 out --json nowhere/result.json
    """,
}


@pytest.mark.parametrize("script", COMMAND_LINES)
def test_no_torch_for_help_and_configuration_errors(script, tmp_path):
    (tmp_path / "bad.yaml").write_text("train: {epoch: 3}")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    lines = [line.split() for line in COMMAND_LINES[script].strip().splitlines()]
    command = json.dumps([str(ROOT / script), *(arguments for _, *arguments in lines)])
    result = run_python("-c", TORCH_FREE, command, cwd=tmp_path)
    expected = [" ".join([status, "False", *arguments]) for status, *arguments in lines]
    assert result.output.splitlines() == expected, result.error


def test_package_without_torch():
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


def test_config_of_a_run_repeats_it(finished_run):
    """config.yaml of a run directory is a valid --config, and its header names versions, device, and data."""
    text = (finished_run / "config.yaml").read_text(encoding="utf-8")
    assert read_config(finished_run / "config.yaml") == parse_config(tiny_yaml(), "tiny")
    for name in ("python", "torch", "torchvision", "numpy", "pillow", "commit", "device", "data"):
        assert f"\n# {name}: " in f"\n{text}", name
