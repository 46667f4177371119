"""lua_flags.py: published command lines give our configurations, every flag has its place, errors help."""

import shlex
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))
import lua_flags
from commands import ROOT, call, expect, message, run_script

from resnext.config import Config, differences, find_config, parse_config, read_config

IMAGENET = "th main.lua -dataset imagenet -bottleneckType resnext_C -depth 50 -baseWidth 4 -cardinality 32 "
IMAGENET += "-batchSize 256 -nGPU 8 -nThreads 8 -shareGradInput true -data [imagenet-folder]"
CIFAR = "th main.lua -dataset cifar10 -bottleneckType resnext_C -depth 29 -baseWidth 64 -cardinality 16 "
CIFAR += "-weightDecay 5e-4 -batchSize 128 -nGPU 8 -nThreads 8 -shareGradInput true"
FACEBOOK = "th main.lua {} -batchSize 256 -nThreads 8 -shareGradInput true -data [imagenet-folder]"
RECOMPUTE = {"train.activation_checkpointing": True}


def translated(command: str) -> tuple[str, Config]:
    """Return the YAML text of a command line, and the configuration that train.py reads from it."""
    result = call(lua_flags.main, *shlex.split(command))
    assert result.status == 0, result.error
    assert max(map(len, result.output.splitlines()[3:])) <= 110
    return result.output, parse_config(result.output, "my.yaml")


def changes(before: Config, command: str) -> dict[str, object]:
    """Return what a translated command line changes in a configuration."""
    return {key: new for key, _, new in differences(before, translated(command)[1])}


@pytest.mark.parametrize(
    ("command", "config", "expected"),
    [
        (IMAGENET, "resnext50_32x4d", {"data.workers": 1}),
        (
            IMAGENET.replace("resnext_C", "resnet").replace("-baseWidth 4 -cardinality 32", ""),
            "resnet50",
            {"data.workers": 1},
        ),
        (FACEBOOK.format("-depth 34 -nGPU 4"), "resnet34", {"data.workers": 2}),
        (FACEBOOK.format("-netType preresnet -depth 200 -nGPU 8"), "resnet200", {"data.workers": 1}),
        (CIFAR, "cifar10_resnext29_16x64d", {}),
        (CIFAR.replace("-cardinality 16", "-cardinality 8"), "cifar10_resnext29_8x64d", {}),
        (CIFAR.replace("cifar10", "cifar100"), "cifar100_resnext29_16x64d", {}),
        (
            CIFAR.replace("-batchSize 128 -nGPU 8", "-batchSize 64 -nGPU 4 -LR 0.05"),
            "cifar10_resnext29_16x64d",
            {"train.batch_size": 64, "train.eval_batch_size": 64, "optimizer.lr": 0.05},
        ),
        (
            CIFAR.replace("-batchSize 128 -nGPU 8", "-batchSize 32 -nGPU 2 -LR 0.025"),
            "cifar10_resnext29_16x64d",
            {"train.batch_size": 32, "train.eval_batch_size": 32, "optimizer.lr": 0.025},
        ),
    ],
)
def test_published_commands(command, config, expected):
    assert changes(read_config(find_config(config)), command) == RECOMPUTE | expected


@pytest.mark.parametrize("depth", [20, 110, 1202])
def test_published_cifar_commands_of_facebook(depth):
    command = f"th main.lua -dataset cifar10 -nGPU 2 -batchSize 128 -depth {depth}"
    assert changes(read_config(find_config(f"cifar10_resnet{depth}")), command) == {}


def test_command_lines_in_any_wrapping():
    text = translated(CIFAR)[0]
    assert translated(CIFAR.removeprefix("th main.lua "))[0] == text
    assert translated(shlex.quote("CUDA_VISIBLE_DEVICES=0,1 " + CIFAR.replace(" -b", " \\\n-b")))[0] == text


def test_defaults_of_the_lua_code_are_stated():
    text, config = translated("-depth 50 -netType resnext")
    assert "workers: 2" in text and "batch_size: 32" in text and "epochs" not in text
    assert (config.model.cardinality, config.model.base_width) == (1, 64)
    assert (config.train.batch_size, config.train.bn_group, config.train.epochs) == (32, 32, 100)
    text, config = translated("-depth 29 -dataset cifar10")
    assert config.train.epochs == 300 and "fb.resnet.torch has none of 29 layers" in text
    text, config = translated("")
    assert "because no flag is one of ResNeXt's" in text
    assert (config.model.depth, config.model.block_type, config.train.epochs) == (34, "basic", 90)


def test_twenty_layers_of_either_program():
    """Depth 20 is 6n+2 of fb.resnet.torch's basic blocks and 9n+2 of ResNeXt's bottlenecks."""
    models = [
        translated(f"-dataset cifar10 -depth 20 {flags}")[1].model
        for flags in ("", "-bottleneckType resnet", "-baseWidth 64 -cardinality 1")
    ]
    assert [m.block_type for m in models] == ["basic", "bottleneck", "bottleneck"]
    assert [m.stages for m in models] == [(3, 3, 3), (2, 2, 2), (2, 2, 2)]
    assert [m.shortcut for m in models] == ["A", "B", "B"]


FACEBOOK_KEYS = {"model.architecture": "resnet", "train.epochs": 90}


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("-nGPU 4", {"train.bn_group": 8, "data.workers": 1}),
        ("-nGPU 3", {"train.bn_group": None, "data.workers": 1}),
        ("-cudnn deterministic", {"run.deterministic": True}),
        ("-precision half", {"train.precision": "fp16"}),
        ("-nThreads 7", {"data.workers": 7}),
        ("-nThreads 7 -nGPU 2", {"data.workers": 4, "train.bn_group": 16}),
        ("-batchSize 64", {"train.batch_size": 64, "train.bn_group": 64, "train.eval_batch_size": 64}),
        ("-netType resnet", FACEBOOK_KEYS),
        ("-netType preresnet", FACEBOOK_KEYS | {"model.preactivation": True}),
        ("-netType preresnet -cardinality 8", {"model.preactivation": True, "model.cardinality": 8}),
        ("-bottleneckType resnet", {"model.architecture": "resnet"}),
        ("-bottleneckType resnext_B", {"model.block": "B"}),
        ("-shortcutType A", {"model.shortcut": "A"}),
        ("-shareGradInput true", {"train.activation_checkpointing": True}),
        ("-optnet true", {"train.activation_checkpointing": True}),
        ("-shareGradInput false -optnet false -testOnly false -tenCrop false -nEpochs 0 -nClasses 0", {}),
        ("-backend cunn -cudnn fastest -gen elsewhere", {}),
        ("-data DIR -save DIR -resume none -retrain none -optimState none", {}),
        ("-manualSeed 7 -nEpochs 90", {"run.seed": 7, "train.epochs": 90}),
        ("-LR 1e-2 -momentum 0.5", {"optimizer.lr": 0.01, "optimizer.momentum": 0.5}),
        ("-weightDecay 0", {"optimizer.weight_decay": 0.0}),
        ("-baseWidth 4 -cardinality 32", {"model.base_width": 4, "model.cardinality": 32}),
        ("-shortcutType C", {"model.shortcut": "C"}),
        ("-resetClassifier true -nClasses 37", {"model.classes": 37, "model.reset_classifier": True}),
        ("-retrain old/model_9.t7", {"model.pretrained": "old/model_9.t7"}),
        ("-retrain model.t7 -resume DIR", {}),
    ],
)
def test_keys_of_each_flag(flags, expected):
    if "-netType" not in flags:
        flags += " -netType resnext"
    assert changes(translated("-depth 50 -netType resnext")[1], f"-depth 50 {flags}") == expected


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        ("", "# python train.py --config my.yaml --data DIR"),
        ("-data '/a b'", "# python train.py --config my.yaml --data '/a b'"),
        ("-save s -nGPU 2", "# torchrun --nproc-per-node=2 train.py --config my.yaml --data DIR --output s"),
        ("-resume L", "# python train.py --config my.yaml --data DIR --resume L --output runs/my"),
        ("-resume L -save ./L", "# python train.py --config my.yaml --data DIR --resume L --output runs/my"),
        ("-resume L -save s", "# python train.py --config my.yaml --data DIR --resume L --output s"),
        ("-tenCrop true", "# python evaluate.py runs/my --ten-crop"),
        ("-testOnly true -retrain m.t7", "# python evaluate.py m.t7 --data DIR"),
        ("-testOnly true -retrain m.t7 -resume L", "# python evaluate.py L --data DIR"),
        (
            "-testOnly true -tenCrop true -retrain m.t7 -precision half -data D",
            "# python evaluate.py m.t7 --data D --ten-crop --precision fp16",
        ),
    ],
)
def test_commands(flags, line):
    assert line in translated(f"-depth 50 {flags}")[0].splitlines()


def test_testing_needs_no_network_flags():
    assert translated("-retrain m.t7 -dataset cifar10 -testOnly true")[1] == parse_config("", "defaults")


def test_notes_stand_at_their_keys():
    text, _ = translated("-depth 50 -nGPU 4 -nThreads 8 -manualSeed 3 -backend cunn -resume L -epochNumber 9")
    assert "  # -nGPU 4: " in text.split("  batch_size: 32\n")[1].split("  bn_group: 8\n")[0]
    assert "\n  # -nThreads 8: DataLoader workers" in text
    assert "  # -manualSeed 3: " in text.split("run:")[1].split("\n  seed: 3\n")[0]
    expect(text.split("model:")[0], ("-backend cunn: ", "-resume L: ", "-epochNumber 9: ", "antialiasing"))
    assert "-nThreads 2 (default): " in translated("-depth 50")[0]
    assert "first GPUs got one more image" in translated("-depth 50 -nGPU 3")[0].replace("\n#   ", " ")


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("-deph 50", ["'-deph'", "-depth?"]),
        ("-batchsize 50", ["-batchSize?"]),
        ("--depth 50", ["-depth?"]),
        ("-depth=50", ["-depth?"]),
        ("-dep 50", ["'-dep'", "-depth?"]),
        ("-qwxz 50", ["-qwxz", "-resetClassifier"]),
        ("-depth 50 29", ["'29'", "-flag value"]),
        ("-depth 50 -depth 29", ["-depth", "twice"]),
        ("-depth", ["-depth", "no value"]),
        ("-testOnly -depth 50", ["-testOnly true"]),
        ("-depth fifty", ["-depth", "integer", "fifty"]),
        ("-depth 5e1", ["-depth", "integer"]),
        ("-LR fast", ["-LR", "number"]),
        ("-LR 0", ["-LR", "above 0"]),
        ("-LR nan", ["-LR"]),
        ("-momentum 0 -depth 50", ["-momentum", "Nesterov"]),
        ("-batchSize 0", ["-batchSize", "at least 1"]),
        ("-nGPU 0", ["-nGPU", "at least 1"]),
        ("-nEpochs -1", ["-nEpochs", "at least 0"]),
        ("-manualSeed -1", ["-manualSeed", "at least 0"]),
        ("-nThreads 999", ["-nThreads", "at most 256"]),
        ("-testOnly yes", ["-testOnly", "true or false"]),
        ("-dataset cifar", ["-dataset", "cifar10"]),
        ("-shortcutType D", ["-shortcutType", "A, B, C"]),
        ("-bottleneckType resnext_A", ["-bottleneckType", "did you mean resnext_"]),
        ("-precision double -depth 50", ["-precision", "not offered"]),
        ("-shareGradInput true -optnet true", ["-optnet", "-shareGradInput"]),
        ("-resetClassifier true -depth 50", ["-resetClassifier", "-nClasses"]),
        ("-netType resnext", ["-depth", "34", "50, 101, 152"]),
        ("-retrain m.t7", ["-depth", "describe.py m.t7"]),
        ("-resume checkpoints", ["-depth", "describe.py checkpoints"]),
        ("-depth 200 -netType resnet", ["-depth 200", "preresnet"]),
        ("-depth 200 -cardinality 32", ["-depth 200"]),
        ("-depth 34 -cardinality 32", ["-depth 34", "50, 101, 152"]),
        ("-depth 33", ["-depth 33", "18, 34, 50, 101, 152"]),
        ("-depth 30 -dataset cifar10", ["-depth 30", "6n+2"]),
        ("-depth 30 -dataset cifar10 -cardinality 8", ["-depth 30", "9n+2"]),
        ("-depth 2 -dataset cifar10", ["-depth", "at least 4"]),
        ("-depth 29 -dataset cifar10 -netType resnet", ["-depth 29: resnet", "6n+2"]),
        ("-depth 29 -dataset cifar10 -tenCrop true", ["-tenCrop"]),
        ("-testOnly true", ["-testOnly", "-retrain"]),
        ("-depth 50 -epochNumber 31", ["-epochNumber", "-resume"]),
        ("-depth 50 -optimState o.t7", ["-optimState", "-resume"]),
        ("-depth 50 -nGPU 64", ["-nGPU 64", "-batchSize 32"]),
        (["th main.lua -data 'a"], ["quot"]),
        (["-data", "a\nmodel: {depth: 101}"], ["-data"]),
    ],
)
def test_errors_name_the_flag(command, words):
    arguments = command.split() if isinstance(command, str) else command
    expect(message(call(lua_flags.main, *arguments)), words)


def test_output_is_written_once(tmp_path):
    target = tmp_path / "lua.yaml"
    result = run_script("scripts/lua_flags.py", *shlex.split(CIFAR), "--output", target, cwd=tmp_path)
    assert result.status == 0 and str(target) in result.output
    text = target.read_text()
    assert f"# python train.py --config {target} --data datasets\n" in text
    assert differences(read_config(target), translated(CIFAR)[1]) == []
    assert "exists" in message(call(lua_flags.main, "-depth", "101", f"--output={target}"))
    assert target.read_text() == text
    assert "cannot be written" in message(call(lua_flags.main, "-depth", "101", "--output", "none/such.yaml"))


@pytest.mark.parametrize("word", ["--help", "-help"])
def test_help(word):
    result = call(lua_flags.main, word)
    assert result.status == 0 and "th main.lua" in result.output


def test_the_page_names_every_flag():
    flags = (ROOT / "docs" / "torch7.md").read_text(encoding="utf-8").split("## Files")[0]
    assert [flag for flag in lua_flags.FLAGS if f"-{flag}" not in flags] == []
    assert len(lua_flags.FLAGS) == 31
