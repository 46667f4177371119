"""Bad input ends with one message that names key or file and remedy, and status 2; no file is touched.

Most command lines are run inside this process, through the same `run_command` as in a process of
their own; the last tests start new processes.
"""

import errno
import os
import pickle
import re
import shutil
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from commands import call, draw_folders, message, run_script, snapshot, tiny_yaml
from PIL import Image

import evaluate
import train
from resnext.engine.logger import RunLogger

# ---------------------------------------------------------------------------- configuration files

CONFIGS = {
    # unknown, misspelt and misplaced keys
    "misspelt key": ("model: {depht: 29}", "unknown key model.depht", "did you mean model.depth?"),
    "misspelt key of another section": ("run: {epoch: 3}", "run.epoch", "did you mean train.epochs?"),
    "unknown key": ("augment: {zebra: 1}", "unknown key augment.zebra", "mirror, padding"),
    "key of another section": ("train: {lr: 0.1}", "unknown key train.lr", "use optimizer.lr"),
    "unknown section": ("zebra: {a: 1}", "unknown section 'zebra'", "model, data, augment, train"),
    "misspelt section": ("modle: {depth: 50}", "unknown section 'modle'", "did you mean section model?"),
    "key without a section": ("epochs: 3", "unknown section 'epochs'", "use train.epochs"),
    "line of an unknown key": ("train:\n  epochs: 3\n  epoch: 3", "line 3", "did you mean train.epochs?"),
    "key that is a list": ("train: {[1, 2]: 3}", "line 1", "a key must be a plain word, not a list"),
    "key that is a mapping": ("? {a: b}\n: 3", "line 1", "a key must be a plain word, not a mapping"),
    # duplicates
    "duplicate key": ("train:\n  epochs: 3\n  epochs: 4", "line 3", "train.epochs", "first on line 2"),
    "duplicate key, same value": ("train: {epochs: 3, epochs: 3}", "duplicate key train.epochs", "keep one"),
    "duplicate section": ("train: {}\nmodel: {}\ntrain: {}", "line 3", "duplicate key train", "on line 1"),
    "duplicate key in quotes": ('train: {epochs: 3, "epochs": 4}', "duplicate key train.epochs"),
    # sections
    "section is a number": ("model: 3", "model is a section", "not '3'"),
    "section is a list": ("model: [1, 2]", "model is a section", "not a list"),
    "file is a list": ("- model\n- data", "must hold sections such as 'model:'", "not a list"),
    "file is a word": ("resnext50", "must hold sections such as 'model:'", "not 'resnext50'"),
    # types
    "text for an integer": ("train: {epochs: many}", "train.epochs", "an integer", "not 'many'"),
    "leading zero": ("train: {epochs: 010}", "train.epochs", "an integer", "not '010'"),
    "float for an integer": ("train: {epochs: 1.5}", "train.epochs", "an integer", "not '1.5'"),
    "exponent for an integer": ("train: {epochs: 1e3}", "train.epochs", "an integer", "not '1e3'"),
    "list for an integer": ("train: {epochs: [1]}", "train.epochs", "an integer", "not a list"),
    "mapping for an integer": ("train: {epochs: {a: 1}}", "train.epochs", "an integer", "not a mapping"),
    "true for an integer": ("train: {epochs: true}", "train.epochs", "an integer", "not 'true'"),
    "integer in quotes": ("train: {epochs: '3'}", "train.epochs", "an integer", "in quotes"),
    "nothing for an integer": ("train: {epochs: }", "train.epochs", "an integer"),
    "null for an integer": ("train: {epochs: null}", "train.epochs", "an integer"),
    "endless integer": ("train: {epochs: 1" + "0" * 5000 + "}", "train.epochs", "an integer"),
    "other digits": ("train: {epochs: ٣}", "train.epochs", "plain digits"),
    "number for a list": ("model: {stages: 3}", "model.stages", "a list such as [1, 2, 3]", "not '3'"),
    "empty list": ("model: {stages: []}", "model.stages", "a list such as", "an empty list"),
    "list in a list": ("data: {mean: [1, [2], 3]}", "data.mean", "a number", "not a list"),
    "text in a list": ("model: {stages: [1, x, 1]}", "model.stages", "an integer", "not 'x'"),
    "1 for true": ("train: {compile: 1}", "train.compile", "true or false", "not '1'"),
    "text for a number": ("optimizer: {lr: high}", "optimizer.lr", "a number such as 0.1", "not 'high'"),
    "number in quotes": ("optimizer: {lr: '0.1'}", "optimizer.lr", "a number", "in quotes"),
    "fraction": ("optimizer: {lr: 1/10}", "optimizer.lr", "a number", "not '1/10'"),
    "true in quotes": ("data: {download: 'true'}", "data.download", "true or false", "in quotes"),
    "list for a text": ("data: {dir: [a]}", "data.dir", "a text", "not a list"),
    "unknown choice": (
        "train: {precision: fp8}",
        "train.precision",
        "auto, fp32, tf32, bf16, fp16",
        "not 'fp8'",
    ),
    "choice in capitals": ("train: {precision: BF16}", "train.precision", "did you mean bf16?"),
    # what YAML makes of plain words
    "no": ("run: {deterministic: no}", "run.deterministic", "true or false", "not 'no'"),
    "yes": ("train: {compile: yes}", "train.compile", "true or false", "not 'yes'"),
    "hexadecimal": ("train: {epochs: 0x10}", "train.epochs", "plain digits", "not '0x10'"),
    "underscore": ("train: {epochs: 1_000}", "train.epochs", "plain digits", "not '1_000'"),
    "sexagesimal": ("train: {epochs: 12:30}", "train.epochs", "plain digits", "not '12:30'"),
    "nan": ("optimizer: {lr: nan}", "optimizer.lr", "a number", "not 'nan'"),
    ".nan": ("optimizer: {lr: .nan}", "optimizer.lr", "a number", "not '.nan'"),
    ".inf": ("optimizer: {lr: .inf}", "optimizer.lr", "a number", "not '.inf'"),
    "infinite by its exponent": ("optimizer: {lr: 1e999}", "optimizer.lr", "'1e999'"),
    "infinite mean": ("data: {mean: [1, 1e999, 1]}", "data.mean", "'1e999'"),
    "nan in a list": ("data: {std: [1, nan, 1]}", "data.std", "a number", "not 'nan'"),
    # what YAML can do besides
    "tab": ("train:\n\tepochs: 3", "line 2", "not valid YAML", r"'\t'"),
    "unclosed": ("train: {epochs: 3", "line 1", "not valid YAML"),
    "colon": ("train: epochs: 3", "line 1", "not valid YAML"),
    "undefined alias": ("train: *nowhere", "line 1", "not valid YAML", "undefined alias 'nowhere'"),
    "merge key": ("train: &t {epochs: 3}\nrun: {<<: *t}", "line 2", "unknown key run.<<"),
    "alias of itself": ("model: &m {stages: *m}", "model.stages", "a list such as", "not a mapping"),
    "list in itself": ("model: {stages: &s [1, *s]}", "model.stages", "an integer", "not a list"),
    "billion laughs": (
        "data: {mean: [&a [1, 1], &b [*a, *a], &c [*b, *b], &d [*c, *c], [*d, *d]]}",
        "data.mean",
        "not a list",
    ),
    "python call as a section": ("train: !!python/object/apply:os.mkdir [pwned]", "python/object"),
    "python object as a section": ("train: !!python/object:os.x {epochs: 3}", "python/object"),
    "python call as a value": ("train: {epochs: !!python/object/apply:os.abort 3}", "python/object"),
    "python call as a key": ("train: {!!python/name:os.abort epochs: 3}", "python/name"),
    "python object as the file": ("!!python/object:os.x {}", "python/object"),
    "python tuple": ("model: {stages: !!python/tuple [3, 4, 6, 3]}", "python/tuple"),
    "own tag": ("train: {epochs: !mine 3}", "line 1", "!mine"),
    "two documents": ("train: {epochs: 3}\n---\nmodel: {}\n", "line 2", "not valid YAML", "document"),
    "YAML 3": ("%YAML 3.0\n---\ntrain: {}", "line 1", "not valid YAML"),
    "deep lists": ("[" * 100_000, "nested too deeply"),
    "deep mappings": ("model: " + "{a: " * 100_000, "nested too deeply"),
    # files that are no configuration
    "control characters": (b"\x00\x01\x02", "not valid YAML"),
    "binary": (bytes(range(256)), "not a YAML text file", "give a configuration"),
    "Latin-1": ("# café\n".encode("latin-1"), "not a YAML text file"),
    "UTF-16": ("train: {epochs: 3}".encode("utf-16"), "not a YAML text file"),
    "over 1 MB": (b"#" * (1 << 20) + b"\n", "over 1 MB", "give a YAML file"),
    # ranges
    "no epochs": ("train: {epochs: 0}", "train.epochs must be at least 1, not 0"),
    "negative epochs": ("train: {epochs: -1}", "train.epochs must be at least 1, not -1"),
    "batch of none": ("train: {batch_size: 0}", "train.batch_size must be at least 1"),
    "lr 0": ("optimizer: {lr: 0}", "optimizer.lr must be above 0"),
    "negative lr": ("optimizer: {lr: -0.1}", "optimizer.lr must be above 0, not -0.1"),
    "momentum 1": ("optimizer: {momentum: 1}", "optimizer.momentum must be below 1"),
    "negative decay": ("optimizer: {weight_decay: -1e-4}", "optimizer.weight_decay must be at least 0"),
    "mirror in percent": ("augment: {mirror: 50}", "augment.mirror must be at most 1"),
    "ema decay 1": ("train: {ema_decay: 1}", "train.ema_decay must be below 1"),
    "seed too large": ("run: {seed: 9223372036854775808}", "run.seed must be at most"),
    "negative seed": ("run: {seed: -1}", "run.seed must be at least 0"),
    "stage without blocks": ("model: {stages: [3, 0, 6, 3]}", "model.stages must be at least 1, not 0"),
    "std 0": ("data: {std: [1, 0, 1]}", "data.std must be above 0"),
    "gamma 1": ("schedule: {gamma: 1}", "schedule.gamma must be below 1"),
    "image size 1": ("data: {image_size: 1}", "data.image_size must be at least 8"),
    # keys that contradict each other
    "depth not 9n+2": ("model: {stem: cifar, depth: 28}", "model.depth: 28", "9n+2", "use 20 or 29"),
    "depth below 11": ("model: {stem: cifar, depth: 5}", "model.depth: 5", "9n+2", "use 11 or 20"),
    "depth 34": ("model: {depth: 34}", "model.depth: 34", "50, 101 or 152", "model.stages"),
    "depth 29 on imagenet": ("model: {depth: 29}", "model.depth: 29", "50, 101 or 152"),
    "three stages on imagenet": (
        "model: {stages: [1, 1, 1]}",
        "model.stages",
        "imagenet has 4 stages, not 3",
    ),
    "four stages on cifar": ("model: {stem: cifar, stages: [1, 1, 1, 1]}", "cifar has 3 stages, not 4"),
    "stages and depth": ("model: {stages: [3, 4, 6, 3], depth: 101}", "makes 50 layers", "remove one"),
    "resnet of cardinality 2": (
        "model: {architecture: resnet, cardinality: 2}",
        "model.architecture",
        "remove",
    ),
    "resnet of width 4": ("model: {architecture: resnet, base_width: 4}", "model.architecture", "resnext"),
    "zero gamma without BN": ("model: {zero_gamma: true, preactivation: true}", "model.zero_gamma", "false"),
    "accumulation": (
        "train: {accumulation_steps: 3}",
        "train.accumulation_steps: 3",
        "train.batch_size, 256",
    ),
    "bn_group": ("train: {bn_group: 7}", "train.bn_group: 7", "does not divide the 256 images"),
    "bn_group of a part": (
        "train: {bn_group: 128, accumulation_steps: 4}",
        "train.bn_group",
        "the 64 images",
    ),
    "compile, activation_checkpointing": (
        "train: {compile: true, activation_checkpointing: true}",
        "train.compile",
        "train.activation_checkpointing",
        "remove one of the two",
    ),
    "bn_group, sync_bn": (
        "train: {bn_group: 16, sync_bn: true}",
        "train.sync_bn",
        "train.bn_group",
        "remove",
    ),
    "no milestones": ("schedule: {name: multistep}", "schedule.milestones", "such as [150, 225]"),
    "idle milestones": ("schedule: {milestones: [30]}", "schedule.milestones", "imagenet_step", "remove it"),
    "descending milestones": (
        "schedule: {name: multistep, milestones: [60, 30]}",
        "must ascend, not [60, 30]",
    ),
    "equal milestones": ("schedule: {name: multistep, milestones: [30, 30]}", "must ascend, not [30, 30]"),
    "min_lr above lr": ("schedule: {name: cosine, min_lr: 1}", "schedule.min_lr", "optimizer.lr"),
    "long warm-up": ("schedule: {warmup_epochs: 100}", "schedule.warmup_epochs: 100", "train.epochs, 100"),
    "nesterov alone": ("optimizer: {momentum: 0}", "optimizer.nesterov", "optimizer.momentum above 0"),
    "wide padding": (
        "data: {pipeline: memory}\naugment: {padding: 224}",
        "augment.padding: 224",
        "data.image_size, 224",
    ),
    "padding of files": ("augment: {padding: 4}", "augment.padding", "of fast are", "data.pipeline=memory"),
    "padding with torch7": (
        "data: {pipeline: torch7}\naugment: {padding: 4}",
        "augment.padding: crops of torch7 are not padded",
        "remove the key",
    ),
    "policy with torch7": (
        "data: {pipeline: torch7}\naugment: {policy: randaugment}",
        "augment.policy: needs 8-bit pictures",
        "data.pipeline=fast",
    ),
    "unknown policy": ("augment: {policy: randaug}", "augment.policy", "did you mean randaugment?"),
    "unknown pipeline": ("data: {pipeline: slow}", "data.pipeline", "memory, fast, torch7", "not 'slow'"),
    "unknown decoder": ("data: {decoder: turbojpeg}", "data.decoder", "simplejpeg, pillow"),
    "unknown interpolation": ("data: {interpolation: nearest}", "data.interpolation", "bilinear, bicubic"),
    "files of glyphs": (
        "data: {dataset: glyphs, pipeline: fast}",
        "data.pipeline: glyphs is held in memory, not fast",
        "remove the key",
    ),
    "files of CIFAR": ("data: {dataset: cifar10, pipeline: torch7}", "data.pipeline: cifar10 is held in"),
    "resize below image_size": (
        "data: {image_size: 288, resize: 256}",
        "data.resize: 256",
        "data.image_size, 288",
        "raise it",
    ),
    "train_size in memory": (
        "data: {pipeline: memory, train_size: 160}",
        "data.train_size: a set in memory has one size",
        "remove the key",
    ),
    "resize in memory": ("data: {dataset: glyphs, resize: 32}", "data.resize", "data.image_size"),
    "jitter in memory": (
        "data: {pipeline: memory}\naugment: {jitter: 0.4}",
        "augment.jitter: works on files",
    ),
    "lighting of CIFAR": ("data: {dataset: cifar10}\naugment: {lighting: 0.1}", "augment.lighting", "memory"),
    "min_area of glyphs": ("data: {dataset: glyphs}\naugment: {min_area: 0.5}", "augment.min_area", "memory"),
    "repeats in memory": ("model: {stem: cifar}\naugment: {repeats: 3}", "augment.repeats", "remove the key"),
    "policy in memory": (
        "model: {stem: cifar}\naugment: {policy: trivialaugment}",
        "augment.policy: works on files",
        "data.pipeline=fast",
    ),
    "workers -1": ("data: {workers: -1}", "data.workers must be at least 0, not -1"),
    "1000 workers": ("data: {workers: 1000}", "data.workers must be at most 256"),
    "min_area 0": ("augment: {min_area: 0}", "augment.min_area must be above 0"),
    "min_area in percent": ("augment: {min_area: 8}", "augment.min_area must be at most 1"),
    "jitter 2": ("augment: {jitter: 2}", "augment.jitter must be at most 1, not 2"),
    "negative lighting": ("augment: {lighting: -0.1}", "augment.lighting must be at least 0"),
    "erasing in percent": ("augment: {erasing: 25}", "augment.erasing must be at most 1"),
    "negative mixup": ("augment: {mixup: -0.2}", "augment.mixup must be at least 0"),
    "negative cutmix": ("augment: {cutmix: -1}", "augment.cutmix must be at least 0"),
    "repeats 0": ("augment: {repeats: 0}", "augment.repeats must be at least 1, not 0"),
    "label_smoothing 1": ("train: {label_smoothing: 1}", "train.label_smoothing must be below 1"),
    "negative decay of BN": ("optimizer: {norm_weight_decay: -1}", "optimizer.norm_weight_decay must be at"),
    "cifar of 64 pixels": ("data: {dataset: cifar10, image_size: 64}", "data.image_size", "32", "remove"),
    "mean of 2": ("data: {mean: [1, 2]}", "data.mean", "needs 3 numbers", "not 2"),
    "std of 4": ("data: {std: [1, 2, 3, 4]}", "data.std", "needs 3 numbers", "not 4"),
}

# The original's options (opts.lua), as keys of any section or of none.
ORIGINAL_OPTIONS = {
    "dataset": "data.dataset",
    "manualSeed": "run.seed",
    "precision": "train.precision",
    "nEpochs": "train.epochs",
    "batchSize": "train.batch_size",
    "LR": "optimizer.lr",
    "momentum": "optimizer.momentum",
    "weightDecay": "optimizer.weight_decay",
    "netType": "model.architecture",
    "bottleneckType": "model.block",
    "depth": "model.depth",
    "baseWidth": "model.base_width",
    "cardinality": "model.cardinality",
    "shortcutType": "model.shortcut",
    "nClasses": "model.classes",
    "nThreads": "data.workers",
    "shareGradInput": "train.activation_checkpointing",
    "optnet": "train.activation_checkpointing",
}

OVERRIDES = {
    "no equals sign": ("train.epochs", "'train.epochs'", "section.key=value, such as train.epochs=30"),
    "a word": ("demo", "'demo'", "section.key=value"),
    "no section": ("epochs=3", "'epochs=3'", "use train.epochs"),
    "no key": ("train.=3", "train.", "keys of train: epochs"),
    "nothing before the sign": ("=3", "'=3'", "sections are model"),
    "unknown section": ("zebra.x=3", "'zebra.x=3'", "sections are model"),
    "unknown key": ("train.zebra=3", "unknown key train.zebra", "keys of train: epochs"),
    "misspelt key": ("train.epoch=3", "unknown key train.epoch", "did you mean train.epochs?"),
    "the original's": ("train.batchSize=3", "unknown key train.batchSize", "use train.batch_size"),
    "another trainer's workers": ("data.num_workers=8", "data.num_workers", "use data.workers"),
    "another trainer's sizes": ("data.train_crop_size=176", "data.train_crop_size", "use data.train_size"),
    "another trainer's policy": ("augment.auto_augment=ra", "augment.auto_augment", "use augment.policy"),
    "another trainer's mixing": ("train.mixup_alpha=0.2", "train.mixup_alpha", "use augment.mixup"),
    "another trainer's smoothing": ("train.smoothing=0.1", "train.smoothing", "use train.label_smoothing"),
    "files in memory": ("augment.jitter=0.4", "augment.jitter: works on files", "data.pipeline=fast"),
    "nothing after the sign": ("train.epochs=", "train.epochs must be an integer"),
    "no choice": ("schedule.name=", "schedule.name must be one of imagenet_step"),
    "text for a number": ("optimizer.lr=fast", "optimizer.lr must be a number", "not 'fast'"),
    "two signs": ("train.epochs=3=4", "train.epochs must be an integer", "not '3=4'"),
    "unclosed list": ("model.stages=[1,2", "'model.stages=[1,2'", "not valid YAML"),
    "bare list": ("model.stages=1,1,1", "model.stages must be a list such as"),
    "out of range": ("augment.mirror=2", "augment.mirror must be at most 1"),
    "contradiction": ("train.bn_group=7", "train.bn_group: 7 does not divide the 16 images"),
    "tag": ("train.epochs=!!python/name:os.abort 3", "train.epochs=", "python/name"),
    "not UTF-8": ("data.dir=\udce9", "data.dir", "not valid YAML"),
}


@pytest.fixture(autouse=True)
def in_own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def refused(folder: Path, main, *arguments: object) -> str:
    """The message of a command line that must fail and leave every file below `folder` as it was."""
    before = snapshot(folder)
    text = message(call(main, *arguments))
    assert snapshot(folder) == before
    return text


def expect(text: str, fragments: tuple[str, ...]) -> None:
    for fragment in fragments:
        assert fragment in text, f"{fragment!r} is not in: {text}"


@pytest.mark.parametrize("case", CONFIGS)
def test_bad_configuration(case, tmp_path):
    content, *fragments = CONFIGS[case]
    content = content.encode() if isinstance(content, str) else content
    (tmp_path / "bad.yaml").write_bytes(content)
    text = refused(tmp_path, train.main, "--config", "bad.yaml", "--output", "out")
    expect(text, tuple(fragments))
    section = any(f"{name}." in text for name in train.Config.__dataclass_fields__)
    assert "bad.yaml" in text or section, f"neither file nor key: {text}"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("option", "section"),
    [
        (option, section)
        for option, key in ORIGINAL_OPTIONS.items()
        for section in ("model", "data", "train", "optimizer", "run", None)
        if key != f"{section}.{option}"
    ],
)
def test_option_of_the_original(option, section, tmp_path):
    key = ORIGINAL_OPTIONS[option]
    text = f"{section}: {{{option}: 1}}" if section else f"{option}: 1"
    (tmp_path / "bad.yaml").write_text(text)
    text = refused(tmp_path, train.main, "--config", "bad.yaml")
    expect(text, ("bad.yaml, line 1", option, f"use {key}"))


@pytest.mark.parametrize("case", OVERRIDES)
def test_bad_override(case, tmp_path):
    override, *fragments = OVERRIDES[case]
    (tmp_path / "tiny.yaml").write_text(tiny_yaml())
    expect(refused(tmp_path, train.main, "--config", "tiny.yaml", override), tuple(fragments))


# ---------------------------------------------------------------------------- command lines


@dataclass(frozen=True)
class Place:
    """An empty folder, which is also the current one, and runs to spoil."""

    folder: Path
    finished: Path
    of_folders: Path

    def train(self, *arguments: object, **changes: str) -> list[object]:
        """Arguments of a tiny run into out/."""
        (self.folder / "tiny.yaml").write_text(tiny_yaml(**changes))
        return ["--config", "tiny.yaml", "--output", "out", *arguments]

    def pictures(self, cat: int = 3, dog: int = 3) -> Path:
        """A data set of class folders, data/, to spoil."""
        return draw_folders(self.folder / "data", {"cat": cat, "dog": dog})

    def on_pictures(self, **changes: str) -> list[object]:
        return self.train("--data", "data", **{"data__dataset": "folder", **changes})

    def on_files(self, **changes: str) -> list[object]:
        """The same, the pictures read by workers."""
        return self.on_pictures(**{"data__pipeline": "fast", "augment__padding": None, **changes})

    def run(self) -> Path:
        """A run directory, run/."""
        return shutil.copytree(self.finished, self.folder / "run")

    def inside_an_epoch(self) -> Path:
        """A run directory whose last checkpoint was saved after a step of epoch 2."""
        path = self.run() / "checkpoints" / "last.pt"
        content = torch.load(path, weights_only=True)
        content["progress"] |= {"epoch": 2, "step": 1}
        path.unlink()  # best.pt may be the same file
        torch.save(content, path)
        return path.parent.parent


@pytest.fixture
def place(tmp_path, finished_run, folder_run) -> Place:
    return Place(tmp_path, finished_run, folder_run)


LINES = []


def line(main, *fragments: str):
    """A bad command line: the decorated function prepares a Place and returns the arguments.

    In what the message must hold, DATA is the absolute path of data/.
    """

    def add(prepare):
        LINES.append(pytest.param(main, prepare, fragments, id=prepare.__name__))
        return prepare

    return add


# What --config names


@line(train.main, "--config is missing", "--config demo.yaml")
def no_config(place):
    return []


@line(train.main, "--config is missing", "--config demo.yaml")
def resume_without_config(place):
    return ["--resume"]


@line(train.main, "--config demmo.yaml", "no such file", "did you mean demo.yaml?")
def config_misspelt(place):
    return ["--config", "demmo.yaml"]


@line(train.main, "no such file", "did you mean cifar10_resnext29_8x64d.yaml?")
def config_of_configs_misspelt(place):
    return ["--config", "cifar10_resnext29_8x64"]


@line(train.main, "--config nowhere/demo.yml", "no such file", "did you mean demo.yaml?")
def config_in_missing_folder(place):
    return ["--config", "nowhere/demo.yml"]


@line(train.main, "--config folder", "no such file")
def config_is_a_folder(place):
    (place.folder / "folder").mkdir()
    return ["--config", "folder"]


# The data


@line(train.main, "data.dir: folder needs a folder", "--data DIR")
def no_data_folder_named(place):
    return place.train(data__dataset="folder")


@line(train.main, "data.dir: cifar10 needs a folder", "--data DIR")
def no_cifar_folder_named(place):
    return place.train(data__dataset="cifar10", data__image_size="32")


@line(train.main, "data.dir DATA: no such folder", "--data DIR")
def missing_data(place):
    return place.on_pictures()


@line(train.main, "data.dir DATA: is a file", "unpack it", "--data DIR")
def data_is_a_file(place):
    (place.folder / "data").touch()
    return place.on_pictures()


@line(train.main, "data.dir DATA: has no train/", "train/CLASS/")
def no_train_folder(place):
    shutil.rmtree(place.pictures() / "train")
    return place.on_pictures()


@line(train.main, "data.dir DATA: has no val/", "val/CLASS/")
def no_val_folder(place):
    shutil.rmtree(place.pictures() / "val")
    return place.on_pictures()


@line(
    train.main,
    "DATA/val: holds pictures",
    "class folders",
    "python scripts/prepare_imagenet.py TARS DATA --flat-val DATA/val",
)
def flat_val(place):
    val = place.pictures() / "val"
    for number, path in enumerate(sorted(val.rglob("*.png"))):
        path.rename(val / f"ILSVRC2012_val_{number + 1:08}.JPEG")
    for name in ("cat", "dog"):
        (val / name).rmdir()
    return place.on_files()


@line(train.main, "DATA/train: contains no class folders", "put images into")
def flat_train(place):
    train = place.pictures() / "train"
    for path in sorted(train.rglob("*.png")):
        path.rename(train / f"{path.parent.name}{path.name}")
    for name in ("cat", "dog"):
        (train / name).rmdir()
    return place.on_files()


@line(train.main, "DATA/train/dog: contains no images", "add some")
def empty_class_of_files(place):
    place.pictures(dog=0)
    return place.on_files()


@line(train.main, "DATA/val: class folder 'zebra' is not in train/", "use the same classes")
def class_only_in_val_of_files(place):
    (place.pictures() / "val" / "zebra").mkdir()
    return place.on_files()


@line(train.main, "DATA/train: contains no class folders", "put images into")
def no_classes(place):
    (place.folder / "data" / "train").mkdir(parents=True)
    return place.on_pictures()


@line(train.main, "DATA/train/dog: contains no images", "add some")
def empty_class(place):
    place.pictures(dog=0)
    return place.on_pictures()


@line(train.main, "DATA/train/dog: contains no images (JPEG, PNG, WebP, GIF")
def class_of_other_files(place):
    (place.pictures(dog=0) / "train" / "dog" / "notes.txt").write_text("no picture")
    return place.on_pictures()


@line(train.main, "DATA/val: class folder 'zebra' is not in train/", "use the same classes")
def class_only_in_val(place):
    (place.pictures() / "val" / "zebra").mkdir()
    return place.on_pictures()


@line(train.main, "model.classes: 3", "the data has 2 classes", "remove the key")
def other_number_of_classes(place):
    place.pictures()
    return place.on_pictures(model__classes="3")


@line(train.main, "model.classes: 100", "the data has 10 classes")
def other_number_of_glyphs(place):
    return place.train(model__classes="100")


@line(train.main, "DATA/train/cat/9.JPEG: cannot be decoded", "replace or remove the file")
def no_jpeg_at_all(place):
    (place.pictures() / "train" / "cat" / "9.JPEG").write_bytes(b"GARBAGE" * 100)
    return place.on_pictures()


@line(train.main, "DATA/val/dog/9.jpg: cannot be decoded", "replace or remove the file")
def truncated_jpeg(place):
    path = place.pictures() / "val" / "dog" / "9.jpg"
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[:-500])
    return place.on_pictures()


@line(train.main, "DATA/train/dog/9.png: cannot be decoded", "replace or remove the file")
def empty_picture(place):
    (place.pictures() / "train" / "dog" / "9.png").touch()
    return place.on_pictures()


@line(train.main, "DATA/train/dog/9.png: cannot be read", "No such file")
def dangling_link(place):
    (place.pictures() / "train" / "dog" / "9.png").symlink_to("nowhere.png")
    return place.on_pictures()


@line(train.main, "data.image_size")
def pictures_larger_than_memory(place):
    place.pictures()
    return place.on_pictures(data__image_size="1000000")


@line(train.main, "data.train_images")
def more_glyphs_than_memory(place):
    return place.train(data__train_images="10000000000000")


@line(train.main, "data.image_size")
def glyphs_larger_than_memory(place):
    return place.train(data__image_size="10000000")


@line(
    train.main, "data.dir DATA: cifar10 is missing", "data.download=true", "cifar-10-python.tar.gz into DATA"
)
def cifar_missing(place):
    return place.train(
        "--data", "data", data__dataset="cifar10", data__image_size="32", data__download="false"
    )


@line(
    train.main,
    "data.dir DATA: cifar10",
    "damaged",
    "cifar-10-python.tar.gz",
    "delete it",
    "data.download=true",
)
def cifar_damaged(place):
    (place.folder / "data" / "cifar-10-batches-py").mkdir(parents=True)
    (place.folder / "data" / "cifar-10-batches-py" / "data_batch_1").write_bytes(b"damaged")
    (place.folder / "data" / "cifar-10-python.tar.gz").write_bytes(b"damaged")
    return place.train(
        "--data", "data", data__dataset="cifar10", data__image_size="32", data__download="false"
    )


@line(train.main, "data.dir DATA: cifar100", "cifar-100-python.tar.gz")
def cifar_folder_is_a_file(place):
    (place.folder / "data").touch()
    return place.train("--data", "data", data__dataset="cifar100", data__image_size="32")


# The network and the machine


@line(train.main, "model.cardinality")
def endless_cardinality(place):
    return place.train(model__cardinality="1" + "0" * 30)


@line(train.main, "model.base_width")
def endless_width(place):
    return place.train(model__base_width="1000000")


@line(train.main, "model.stages")
def very_deep_network(place):
    return place.train(model__depth=None, model__stages="[1, 1, 3000]")


@line(train.main, "optimizer.lr")
def rate_beyond_float32(place):
    return place.train(optimizer__lr="1e300")


@line(train.main, "optimizer.weight_decay")
def decay_beyond_float32(place):
    return place.train(optimizer__weight_decay="1e300")


@line(train.main, "train.sync_bn: needs GPUs", "remove the key")
def sync_bn_on_a_cpu(place):
    return place.train(train__sync_bn="true")


# --output


@line(train.main, "--output file/out: ", "choose another directory")
def output_below_a_file(place):
    (place.folder / "file").write_text("mine")
    return [*place.train()[:3], "file/out"]


@line(train.main, "--output file: is in use", "choose another directory")
def output_is_a_file(place):
    (place.folder / "file").write_text("mine")
    return [*place.train()[:3], "file"]


@line(train.main, "--output run: is in use already", "--resume", "choose another directory")
def output_is_a_run(place):
    place.run()
    return [*place.train()[:3], "run"]


@line(train.main, "--output runs/tiny: is in use already", "--resume")
def default_output_is_in_use(place):
    place.run().rename("tiny")
    (place.folder / "runs").mkdir()
    shutil.move("tiny", "runs")
    return place.train()[:2]


@line(train.main, "--output mine: is in use already")
def output_holds_other_things(place):
    (place.folder / "mine").mkdir()
    (place.folder / "mine" / "thesis.tex").write_text("mine")
    return [*place.train()[:3], "mine"]


@line(train.main, "--output mine: is in use already")
def resume_in_a_folder_of_other_things(place):
    (place.folder / "mine").mkdir()
    (place.folder / "mine" / "thesis.tex").write_text("mine")
    return [*place.train()[:3], "mine", "--resume"]


@line(train.main, "--output run: is in use already")
def resume_of_another_run_into_a_used_one(place):
    place.run()
    other = shutil.copytree(place.finished, place.folder / "other")
    return ["--output", "run", "--resume", other / "checkpoints" / "last.pt"]


@line(train.main, "--output run: is in use already")
def resume_of_an_earlier_checkpoint_into_its_own_run(place):
    return ["--output", "run", "--resume", place.run() / "checkpoints" / "best.pt"]


# --resume


@line(train.main, "nowhere: no such run directory or file of weights", "check the path")
def resume_nowhere(place):
    return ["--resume", "nowhere"]


@line(train.main, "--resume nowhere: no such run directory or checkpoint", "check the path")
def resume_nowhere_with_a_config(place):
    return [*place.train(), "--resume", "nowhere"]


@line(train.main, "--resume folder: not a run directory", "no config.yaml")
def resume_an_empty_folder(place):
    (place.folder / "folder").mkdir()
    return ["--resume", "folder"]


@line(train.main, "--resume data: not a run directory", "give one that train.py wrote")
def resume_a_folder_of_pictures(place):
    place.pictures()
    return [*place.train(), "--resume", "data"]


@line(train.main, "--resume", "best.pt", "say with --output DIR")
def resume_a_checkpoint_to_nowhere(place):
    return ["--resume", place.run() / "checkpoints" / "best.pt"]


@line(train.main, "model.cardinality: the checkpoint has 1, the configuration 2", "start another run")
def resume_another_network(place):
    place.run()
    return ["--resume", "run", "model.cardinality=2"]


@line(train.main, "model.depth: the checkpoint has 11, the configuration 20", "start another run")
def resume_with_the_config_of_another_network(place):
    place.run()
    return ["--config", place.train(model__depth="20")[1], "--output", "run", "--resume"]


@line(train.main, "model.classes: 3", "the data has 10 classes", "remove the key")
def resume_with_another_number_of_classes(place):
    place.run()
    return ["--resume", "run", "model.classes=3"]


@line(train.main, "last.pt: was trained on other classes (2 of them) than the data has (3)", "--data")
def resume_on_other_data(place):
    shutil.copytree(place.of_folders, place.folder / "run")
    draw_folders(place.folder / "data", {"cat": 2, "dog": 2, "zebra": 2})
    return ["--resume", "run", "--data", "data"]


@line(train.main, "last.pt: was trained on other classes", "--data")
def resume_on_data_with_other_names(place):
    shutil.copytree(place.of_folders, place.folder / "run")
    draw_folders(place.folder / "data", {"cat": 2, "zebra": 2})
    return ["--resume", "run", "--data", "data"]


@line(train.main, "train.batch_size: the checkpoint has 16, the configuration 8", "finished with the same")
def resume_inside_an_epoch_with_another_batch(place):
    place.inside_an_epoch()
    return ["--resume", "run", "train.batch_size=8"]


@line(train.main, "run.seed: the checkpoint has 0, the configuration 1", "finished with the same")
def resume_inside_an_epoch_with_another_seed(place):
    place.inside_an_epoch()
    return ["--resume", "run", "run.seed=1"]


@line(train.main, "data.train_images: the checkpoint has 40, the configuration 30", "finished with the same")
def resume_inside_an_epoch_with_fewer_pictures(place):
    place.inside_an_epoch()
    return ["--resume", "run", "data.train_images=30"]


@line(train.main, "train.ema_decay: the checkpoint has null, the configuration 0.9", "start another run")
def resume_with_an_average_from_now_on(place):
    place.run()
    return ["--resume", "run", "train.ema_decay=0.9"]


@line(train.main, "run/config.yaml, line 1", "unknown key train.zebra")
def resume_with_a_damaged_config(place):
    (place.run() / "config.yaml").write_text("train: {zebra: 3}")
    return ["--resume", "run"]


# evaluate.py


@line(evaluate.main, "nowhere: no such run directory or file of weights", "check the path")
def evaluate_nowhere(place):
    return ["nowhere"]


@line(evaluate.main, "folder: has no checkpoints/best.pt", "or a checkpoint file")
def evaluate_an_empty_folder(place):
    (place.folder / "folder").mkdir()
    return ["folder"]


@line(evaluate.main, "run: has no checkpoints/best.pt", "an epoch was finished")
def evaluate_before_the_first_epoch(place):
    (place.run() / "checkpoints" / "best.pt").unlink()
    return ["run"]


@line(evaluate.main, "--batch-size: must be at least 1, not 0")
def evaluate_batches_of_none(place):
    return [place.run(), "--batch-size", "0"]


@line(evaluate.main, "--json nowhere/result.json: cannot be written", "a folder that exists")
def evaluate_into_a_missing_folder(place):
    return [place.run(), "--json", "nowhere/result.json"]


@line(evaluate.main, "--json run: cannot be written", "name a file")
def evaluate_into_a_folder(place):
    return [place.run(), "--json", "run"]


@line(evaluate.main, "data: no such folder", "--data DIR")
def evaluate_on_missing_data(place):
    return [place.of_folders, "--data", "data"]


@line(evaluate.main, "--data data: its classes (3)", "trained on (2)", "give the data of the run")
def evaluate_on_other_classes(place):
    draw_folders(place.folder / "data", {"cat": 2, "dog": 2, "zebra": 2})
    return [place.of_folders, "--data", "data"]


@line(evaluate.main, "--data data: its classes", "give the data of the run")
def evaluate_on_classes_with_other_names(place):
    draw_folders(place.folder / "data", {"cat": 2, "zebra": 2})
    return [place.of_folders, "--data", "data"]


@pytest.mark.parametrize(("main", "prepare", "fragments"), LINES)
def test_bad_command_line(main, prepare, fragments, place):
    arguments = prepare(place)
    fragments = [fragment.replace("DATA", str(place.folder / "data")) for fragment in fragments]
    expect(refused(place.folder, main, *arguments), fragments)


def test_a_split_is_not_taken_for_a_class(place):
    """The message on a missing train/ or val/ asks of other folders whether they are classes."""
    data, wanted = place.folder / "data", "put images into train/CLASS/ and val/CLASS/"
    for missing, other in (("train", "val"), ("val", "train")):
        shutil.rmtree(place.pictures() / missing)
        text = refused(place.folder, train.main, *place.on_pictures())
        assert text == f"data.dir {data}: has no {missing}/; {wanted}"
        shutil.rmtree(data / other)


def test_class_only_in_train(place):
    """Its absence is told, and errors are those of the pictures that there are."""
    shutil.rmtree(place.pictures() / "val" / "dog")
    val = place.folder / "data" / "val"
    for arguments in (place.on_pictures(train__epochs="1"), place.on_files(train__epochs="1")):
        result = call(train.main, *arguments)
        assert result.status == 0, result.error
        told = f"warning: {val}: has no images of 1 of 2 classes (dog); errors are computed over the others"
        assert result.output.splitlines().count(told) == 1
        assert "folder: 6 training and 3 validation images, 2 classes" in result.output
        assert re.search(r"^last validation error: top-1 \S+ \([0-3]/3\)", result.output, re.MULTILINE)
        shutil.rmtree(place.folder / "out")


def test_no_folder_is_left_behind(place):
    arguments = place.on_pictures()
    before = snapshot(place.folder, folders=True)
    message(call(train.main, *arguments))
    assert snapshot(place.folder, folders=True) == before


@pytest.mark.parametrize(
    "arguments",
    [["--config"], ["--config", "tiny.yaml", "--output"], ["--resume"], ["--config", "tiny.yaml", "--data"]],
    ids=lambda arguments: arguments[-1],
)
def test_name_too_long(arguments, tmp_path):
    (tmp_path / "tiny.yaml").write_text(tiny_yaml(data__dataset="folder", data__dir="data"))
    result = call(train.main, *arguments, "long" * 2000)
    assert result.status == 2
    assert result.error.startswith("error: ")


def test_simplejpeg_is_not_installed(place, monkeypatch):
    monkeypatch.setattr("data.decode.simplejpeg", None)
    place.pictures()
    text = message(call(train.main, *place.on_files()))
    expect(text, ("data.decoder: simplejpeg is not installed", "pip install simplejpeg", "pillow"))
    result = call(train.main, *place.on_files(data__decoder="pillow", train__epochs="1"), "--resume")
    assert result.status == 0, result.error


def test_more_workers_than_shared_memory(place):
    place.pictures()
    large = {"data__workers": "256", "train__batch_size": "10000", "data__image_size": "1024"}
    text = message(call(train.main, *place.on_files(**large)))
    expect(text, ("data.workers: 256 workers need", "/dev/shm has", "lower data.workers", "--shm-size"))


@pytest.mark.parametrize("workers", ["0", "1"])
@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("skip", ["false", "true"])
def test_broken_file_met_on_the_way(workers, split, skip, place):
    """Named, with the remedy; where files may be skipped, those of training are, those of validation not."""
    path = place.pictures() / split / "dog" / "1.png"
    whole = path.read_bytes()
    path.write_bytes(whole[:-60])
    arguments = place.on_files(data__workers=workers, data__skip_broken=skip, train__epochs="1")
    if (split, skip) == ("train", "true"):
        result = call(train.main, *arguments)
        assert result.status == 0, result.error
        assert result.output.count("data/train/dog/1.png: cannot be decoded") == 1
        return
    text = message(call(train.main, *arguments))
    expect(text, (f"data/{split}/dog/1.png: cannot be decoded", "replace or remove the file"))
    path.write_bytes(whole)
    result = call(train.main, *arguments, "--resume")
    assert result.status == 0, result.error


def test_picture_too_thin_to_be_scaled(place):
    Image.new("RGB", (60_000, 1)).save(place.pictures() / "val" / "dog" / "9.png")
    text = message(call(train.main, *place.on_files(data__workers="0")))
    expect(text, ("data/val/dog/9.png: 60000x1 pixels are too thin", "replace or remove the file"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("script", ["train", "evaluate"])
def test_no_gpu(script, place):
    if script == "train":
        text = refused(place.folder, train.main, *place.train(run__device="cuda"))
    else:
        text = refused(place.folder, evaluate.main, place.run(), "--device", "cuda")
    expect(text, ("run.device: cuda", "use auto or cpu"))


def test_several_processes(place, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    text = refused(place.folder, train.main, *place.train())
    expect(text, ("WORLD_SIZE=2 is set", "not RANK", "torchrun"))


def test_a_stray_rank_does_not_make_a_run_of_several(place, monkeypatch):
    """The guard of a used directory stands, and messages are said."""
    place.run()
    arguments = [*place.train(), "--output", "run"]
    before = snapshot(place.folder)
    for name in ("RANK", "LOCAL_RANK"):
        monkeypatch.setenv(name, "1")
    expect(refused(place.folder, train.main, *arguments), ("is in use already",))
    assert snapshot(place.folder) == before
    assert call(train.main, "--config", "demo.yaml", "--print-config").output.startswith("model:")


def test_killed_ahead_of_its_configuration(place):
    """A requeued job starts there; another folder with a log.txt is none of ours."""
    for name, status in (("log.txt", 0), ("thesis.tex", 2)):
        (place.folder / "begun").mkdir(exist_ok=True)
        (place.folder / "begun" / name).touch()
        arguments = place.train()
        result = call(train.main, *arguments, "--output", place.folder / "begun", "--resume", "--check")
        assert result.status == status, result.output


@pytest.mark.parametrize("name", ["checkpoints/last.pt", "metrics.jsonl", "config.yaml"])
def test_results_do_not_replace_a_run(name, place):
    place.run()
    before = snapshot(place.folder)
    for option in ("--json", "--csv"):
        text = message(call(evaluate.main, place.folder / "run", option, place.folder / "run" / name))
        expect(text, (option, "called as a file of a run"))
    assert snapshot(place.folder) == before


def test_used_directory_stays_as_it_is(place):
    """Not even a second, slower look at it changes anything, whatever is asked of it."""
    place.run()
    before = snapshot(place.folder)
    for arguments in (
        ["--config", "demo.yaml", "--output", "run"],
        ["--config", "demo.yaml", "--output", "run", "--data", "nowhere"],
        ["--config", "demo.yaml", "--output", "run/"],
        ["--config", "demo.yaml", "--output", place.folder / "run"],
        ["--resume", "run", "train.epochs=0"],
        ["--resume", "run", "run.seed=x"],
    ):
        message(call(train.main, *arguments))
        assert snapshot(place.folder) == before


@pytest.mark.parametrize("name", ["row", "say"])
def test_disk_full_while_logging(name, place, monkeypatch):
    """Not bad input, but the user's to mend: what was saved is whole and the run can go on."""
    arguments = place.train(train__epochs="5")
    real, calls = getattr(RunLogger, name), []

    def fill(self, *values, **options):
        calls.append(values)
        if len(calls) == 5:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(self, *values, **options)

    with monkeypatch.context() as patch:
        patch.setattr(RunLogger, name, fill)
        text = message(call(train.main, *arguments))
    expect(text, ("out", "No space left on device", "--resume"))
    result = call(train.main, "--resume", "out")
    assert result.status == 0, result.error
    assert "finished: 5 epochs" in result.output


# ---------------------------------------------------------------------------- checkpoint files


class Hostile:
    """Pickled, an order to write a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut_off(path):
    path.write_bytes(path.read_bytes()[:-1000])


def cut_in_half(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def make_empty(path):
    path.write_bytes(b"")


def make_text(path):
    path.write_text("not a checkpoint\n")


def make_foreign_weights(path):
    torch.save(torchvision.models.squeezenet1_1().state_dict(), path)


def make_foreign_checkpoint(path):
    torch.save({"state_dict": {"weight": torch.zeros(3)}, "epoch": 3, "best_acc1": 76.1}, path)


def make_tensor(path):
    torch.save(torch.zeros(3), path)


def make_old_torch_file(path):
    content = torch.load(path, weights_only=True)
    torch.save(content, path, _use_new_zipfile_serialization=False)


def make_newer(path):
    content = torch.load(path, weights_only=True)
    torch.save(content | {"version": 2}, path)


def make_incomplete(path):
    content = torch.load(path, weights_only=True)
    del content["optimizer"]
    torch.save(content, path)


def make_hostile(path):
    content = torch.load(path, weights_only=True)
    torch.save(content | {"versions": Hostile(path.parent / "pwned")}, path)


def make_hostile_pickle(path):
    path.write_bytes(pickle.dumps(Hostile(path.parent / "pwned")))


def make_compressed(path):
    """A small file that would take 64 MiB."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\0" * (1 << 26))


def make_config_bad(path):
    content = torch.load(path, weights_only=True)
    torch.save(content | {"config": "train: {zebra: 1}"}, path)


SPOILERS = {
    flip_a_bit: ("damaged", "use another checkpoint"),
    cut_off: ("damaged or cut off", "use another checkpoint"),
    cut_in_half: ("damaged or cut off", "use another checkpoint"),
    make_empty: ("not a checkpoint of this program", "use another checkpoint"),
    make_text: ("not a checkpoint of this program", "use another checkpoint"),
    make_foreign_weights: ("not a checkpoint of this program", "give one written by train.py"),
    make_foreign_checkpoint: ("not a checkpoint of this program", "give one written by train.py"),
    make_tensor: ("not a checkpoint of this program", "give one written by train.py"),
    make_old_torch_file: ("not a checkpoint of this program", "use another checkpoint"),
    make_newer: ("version 2", "this program reads 1", "use the program that wrote it"),
    make_incomplete: ("optimizer is missing", "use another checkpoint"),
    make_hostile: ("not a checkpoint of this program", "mkdir"),
    make_hostile_pickle: ("not a checkpoint of this program", "use another checkpoint"),
    make_compressed: ("a compressed archive", "torch.save never writes"),
    make_config_bad: ("unknown key train.zebra",),
}
# evaluate.py takes other programs' weights too.
EVALUATED = {
    make_empty: ("last.pt", "is empty", "give a .pt"),
    make_text: ("last.pt", "not a file of weights", "give a .pt"),
    make_hostile_pickle: ("last.pt", "not a file of weights", "give a .pt"),
    make_foreign_weights: ("last.pt", "its first key is 'features.0.weight'", "use another file"),
    make_foreign_checkpoint: ("last.pt", "its first key is 'weight'", "use another file"),
    make_tensor: ("last.pt", "holds no state_dict", "use another file"),
    make_old_torch_file: ("--data: is missing",),
}


@pytest.mark.parametrize("use", ["evaluate", "resume the run", "branch from the file"])
@pytest.mark.parametrize("spoil", SPOILERS, ids=lambda spoil: spoil.__name__)
def test_bad_checkpoint(spoil, use, run_copy, tmp_path):
    checkpoints = run_copy / "checkpoints"
    (checkpoints / "best.pt").unlink()
    (checkpoints / "previous.pt").unlink()
    spoil(checkpoints / "last.pt")
    main, arguments = {
        "evaluate": (evaluate.main, [checkpoints / "last.pt", "--json", "result.json"]),
        "resume the run": (train.main, ["--resume", run_copy, "train.epochs=3"]),
        "branch from the file": (train.main, ["--resume", checkpoints / "last.pt", "--output", "out"]),
    }[use]
    text = refused(tmp_path, main, *arguments)
    words = ("last.pt", *SPOILERS[spoil])
    expect(text, EVALUATED.get(spoil, words) if use == "evaluate" else words)
    assert not (checkpoints / "pwned").exists()


# ---------------------------------------------------------------------------- in new processes


def test_process_bad_configuration(tmp_path):
    (tmp_path / "bad.yaml").write_text("train:\n  epochs: 3\n  batchSize: 3\n")
    text = message(run_script("train.py", "--config", "bad.yaml", cwd=tmp_path))
    assert text == "bad.yaml, line 3: unknown key train.batchSize; use train.batch_size"
    assert os.listdir(tmp_path) == ["bad.yaml"]


def test_process_used_directory(place):
    arguments = [*place.train()[:3], "run"]
    place.run()
    before = snapshot(place.folder)
    result = run_script("train.py", *arguments, cwd=place.folder)
    assert "--output run: is in use already" in message(result)
    assert result.output == ""
    assert snapshot(place.folder) == before


def test_process_broken_picture(place):
    arguments = truncated_jpeg(place)
    before = snapshot(place.folder)
    text = message(run_script("train.py", *arguments, cwd=place.folder))
    assert "data/val/dog/9.jpg: cannot be decoded" in text
    assert snapshot(place.folder) == before


def test_process_hostile_checkpoint(place):
    checkpoint = place.run() / "checkpoints" / "best.pt"
    make_hostile(checkpoint)
    before = snapshot(place.folder)
    text = message(run_script("evaluate.py", "run", "--json", "result.json", cwd=place.folder))
    assert "best.pt: not a checkpoint of this program" in text
    assert snapshot(place.folder, folders=False) == before
    assert not (checkpoint.parent / "pwned").exists()


def test_resume_without_the_latest_checkpoint_names_another(run_copy):
    """Starting anew would replace best.pt."""
    for name in ("last.pt", "previous.pt"):
        (run_copy / "checkpoints" / name).unlink()
    before = snapshot(run_copy)
    expect(message(call(train.main, "--resume", run_copy)), ("last.pt", "best.pt", "--output"))
    assert snapshot(run_copy) == before


def test_half_of_the_first_checkpoint_is_no_checkpoint(run_copy):
    """A run killed while it first saved starts anew."""
    for path in (run_copy / "checkpoints").glob("*.pt"):
        path.unlink()
    (run_copy / "checkpoints" / ".writing.pt").write_bytes(b"half")
    result = call(train.main, "--resume", run_copy)
    assert result.status == 0, result.error
    assert "finished: 2 epochs" in result.output
    assert (run_copy / "checkpoints" / "last.pt").exists()
