"""Runs that start from trained weights (model.pretrained) or continue a run of the Lua code."""

import json

import pytest
import torch
import torch.nn.functional as F
from commands import call, draw_folders, message
from lua_files import network_tree, share_memory, to_t7
from oracle import SHARED, network_input, relative_error, unpack

import evaluate
import train
from resnext import UserError
from resnext.config import read_config
from resnext.engine.checkpoint import read_checkpoint
from resnext.engine.train_state import build_train_state
from resnext.engine.trainer import train_step
from resnext.engine.warm_start import resume_from_lua
from resnext.models.block_forms import convert_form
from resnext.schedule import learning_rate
from resnext.weights.load import load_lua_run, load_weights


def assert_close(model, reference):
    """Compare all but the last layer; at a rate of 1e-9 nothing moves."""
    for (name, a), b in zip(model.named_parameters(), reference.parameters(), strict=True):
        if not name.startswith("fc."):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


@pytest.fixture
def start(tmp_path, finished_run):
    """Start the run `new` from the weights of another; return (how it ended, those weights)."""

    def start(*overrides):
        arguments = ["--config", finished_run / "config.yaml", "--output", tmp_path / "new"]
        settings = [f"model.pretrained={finished_run}", "train.epochs=1", "optimizer.lr=1e-9", *overrides]
        return call(train.main, *arguments, *settings), load_weights(finished_run)[0]

    return start


@pytest.fixture
def folder_settings(folder_run):
    """Overrides for the class folders cat and dog."""
    images = folder_run.parent / "pictures"
    return ["data.dataset=folder", f"data.dir={images}", "data.train_images=null", "data.val_images=null"]


def resume(tmp_path, *overrides):
    return call(train.main, "--resume", tmp_path / "new", *overrides)


def test_a_run_starts_from_the_weights_of_another(tmp_path, start):
    result, before = start()
    assert result.status == 0, result.error
    assert "last layer included" in result.output
    after = load_weights(tmp_path / "new")[0]
    assert_close(after, before)
    torch.testing.assert_close(after.fc.weight, before.fc.weight, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(after.fc.bias, before.fc.bias, rtol=1e-6, atol=1e-6)
    resumed = resume(tmp_path, "train.epochs=2")
    assert resumed.status == 0 and "starting from the weights" not in resumed.output


def test_other_classes_get_a_new_last_layer(tmp_path, start, folder_settings):
    result, before = start(*folder_settings, "data.mean=null", "data.std=null")
    assert result.status == 0, result.error
    assert "a new last layer of 2 classes" in result.output
    after = load_weights(tmp_path / "new")[0]
    assert after.fc.weight.shape[0] == 2
    assert_close(after, before)


def test_a_new_last_layer_for_classes_that_match(tmp_path, start):
    result, before = start("model.reset_classifier=true")
    assert result.status == 0 and "a new last layer of 10 classes" in result.output
    after = load_weights(tmp_path / "new")[0]
    assert not torch.equal(after.fc.weight, before.fc.weight)
    assert_close(after, before)
    assert resume(tmp_path, "train.epochs=2").status == 0


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("model.pretrained=nowhere", "nowhere: no such"),
        ("model.base_width=2", "another architecture; set model.base_width="),
        ("model.shortcut=B", "another architecture; set model.shortcut=A"),
    ],
)
def test_weights_that_cannot_be_used(tmp_path, start, override, words):
    assert words in message(start(override)[0])
    assert not (tmp_path / "new").exists()


# ---------------------------------------------------------------------------- parts of the network


@pytest.mark.parametrize(
    "extra", [[], ["train.ema_decay=0.5", "train.accumulation_steps=2", "train.bn_group=4"]]
)
def test_frozen_stages_keep_their_bits(tmp_path, start, extra):
    result, before = start("train.frozen_stages=1", "optimizer.lr=0.1", *extra)
    assert result.status == 0, result.error

    def unchanged():
        after = load_weights(tmp_path / "new")[0].state_dict()
        return {key for key, value in before.state_dict().items() if torch.equal(value, after[key])}

    frozen = {key for key in before.state_dict() if key.startswith(("conv1", "bn1", "layer1."))}
    assert unchanged() == frozen
    assert resume(tmp_path, "train.epochs=2").status == 0
    assert unchanged() >= frozen
    assert message(resume(tmp_path, "train.frozen_stages=2")).startswith("train.frozen_stages: ")


def test_head_lr_is_the_rate_of_the_last_layer(finished_run):
    """The first step of SGD is proportional to the rate."""
    steps = {}
    for head_lr in ("0.03", "null"):
        overrides = ["optimizer.lr=0.01", f"optimizer.head_lr={head_lr}"]
        config = read_config(finished_run / "config.yaml", overrides)
        training = build_train_state(config, tuple("0123456789"), torch.device("cpu"), {})
        training.model.train()
        before = {name: p.detach().clone() for name, p in training.model.named_parameters()}
        generator = torch.Generator().manual_seed(0)
        images, labels = torch.randn(16, 3, 8, 8, generator=generator), torch.arange(16) % 10
        train_step(training, images, labels, rate=0.005)  # halfway down a schedule
        steps[head_lr] = {name: p.detach() - before[name] for name, p in training.model.named_parameters()}
    for name, step in steps["null"].items():
        factor = 3 if name.startswith("fc.") else 1
        torch.testing.assert_close(steps["0.03"][name], factor * step, rtol=1e-3, atol=1e-7)


def test_head_lr_survives_a_resume(tmp_path, start):
    result, _ = start("optimizer.head_lr=0.03", "optimizer.norm_weight_decay=0", "optimizer.lr=0.01")
    assert result.status == 0, result.error
    assert resume(tmp_path, "train.epochs=2").status == 0
    groups = read_checkpoint(tmp_path / "new" / "checkpoints" / "last.pt")["optimizer"]["param_groups"]
    assert [(group["weight_decay"], group["lr_scale"]) for group in groups] == [(1e-4, 1), (0, 1), (1e-4, 3)]
    assert message(resume(tmp_path, "optimizer.head_lr=null")).startswith("optimizer.head_lr: ")


# ---------------------------------------------------------------------------- other files


def test_weights_of_another_program_and_form(tmp_path, start, finished_run):
    """A state_dict without names of classes keeps its last layer; form C becomes form B."""
    torch.save(load_weights(finished_run)[0].state_dict(), tmp_path / "w.pth")
    result, before = start(f"model.pretrained={tmp_path / 'w.pth'}", "model.block=B")
    assert result.status == 0, result.error
    assert "(torchvision or timm), last layer included (the file names no classes" in result.output
    assert "data.mean=[125.3,123.0,113.9] data.std" in result.output
    after, info = load_weights(tmp_path / "new")
    assert info.config.model.block == "B"
    state = convert_form(after.state_dict(), 1, "B", "C")
    for name, parameter in before.named_parameters():
        torch.testing.assert_close(state[name], parameter, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("form", ["C", "B"])
def test_a_file_without_a_last_layer(tmp_path, start, finished_run, folder_settings, form):
    """Its frozen backbone keeps its bits; the last layer is a new one that learns."""
    backbone = load_weights(finished_run)[0].state_dict()
    del backbone["fc.weight"], backbone["fc.bias"]
    torch.save(backbone, tmp_path / "w.pth")
    frozen = ["train.frozen_stages=3", "train.ema_decay=0.5", f"model.pretrained={tmp_path / 'w.pth'}"]
    result, _ = start(*folder_settings, *frozen, f"model.block={form}")
    assert result.status == 0, result.error
    assert "a new last layer of 2 classes (the file has none)" in result.output
    after = load_weights(tmp_path / "new")[0]
    assert after.fc.weight.shape == (2, 1024)
    state = convert_form(after.state_dict(), 1, form, "C")
    assert all(torch.equal(value, state[key]) for key, value in backbone.items())


def test_the_former_name_of_the_key(tmp_path, finished_run):
    lines = (finished_run / "config.yaml").read_text().splitlines()
    old = "\n".join(line for line in lines if not line.startswith("  pretrained:"))
    (tmp_path / "old.yaml").write_text(old.replace("\ntrain:", f"\ntrain:\n  weights: {finished_run}"))
    assert read_config(tmp_path / "old.yaml").model.pretrained == str(finished_run)


# ---------------------------------------------------------------------------- runs of the Lua code

needs_oracle = pytest.mark.skipif(not SHARED.exists(), reason="the reference files are missing")


@pytest.fixture(scope="module")
def lua_run(tmp_path_factory):
    """The original's checkpoint directory after epoch 2."""
    folder = tmp_path_factory.mktemp("lua")
    for name in ("model_2.t7", "optimState_2.t7"):
        unpack(SHARED / "ckpt" / f"{name}.xz", folder / name)
    (folder / "latest.t7").write_bytes((SHARED / "ckpt" / "latest.t7").read_bytes())
    return folder


LUA_OPTIONS = ["model.stem=cifar", "model.depth=11", "model.cardinality=2", "model.base_width=8"]
LUA_OPTIONS += ["train.epochs=4", "train.batch_size=8", "optimizer.weight_decay=5e-4"]
LUA_OPTIONS += ["schedule.name=cifar_step", "run.device=cpu", "run.tensorboard=false"]


def lua_training(*options):
    config = read_config(None, [*LUA_OPTIONS, "data.dataset=cifar10", *options])
    return config, build_train_state(config, tuple("0123456789"), torch.device("cpu"), {})


@needs_oracle
@pytest.mark.parametrize(
    ("dtype", "form", "bound"),
    [(torch.float64, "C", 1e-12), (torch.float32, "C", 1e-5), (torch.float64, "B", 1e-12)],
)
def test_resume_a_run_of_the_original(lua_run, dtype, form, bound):
    meta = json.loads((SHARED / "ckpt" / "meta.json").read_text())
    config, training = lua_training(f"model.block={form}")
    assert resume_from_lua(training, load_lua_run(lua_run)) == []
    assert (training.progress.epoch, training.progress.global_step) == (3, 6)
    training.model.to(dtype).train()
    for state in training.optimizer.state.values():
        state["momentum_buffer"] = state["momentum_buffer"].to(dtype)
    expected = meta["resumed_f64_epochs" if dtype == torch.float64 else "epochs"][-1]

    def batch(facts):
        images = network_input(meta["batch_shape"], facts["input_offset"]).to(dtype)
        return images, torch.tensor(facts["target"]) - 1

    losses = []
    for step, facts in enumerate(meta["train_batches"]):
        rate = learning_rate(config.schedule, config.optimizer.lr, 4, 3, step, 3)
        assert rate == expected["lr"]
        losses.append(float(train_step(training, *batch(facts), rate)[0]))
    assert relative_error(losses, expected["losses"]) <= bound
    images, labels = batch(meta["eval_batch"])
    with torch.no_grad():
        loss = F.cross_entropy(training.model.eval()(images), labels)
    assert relative_error(float(loss), expected["test_loss"]) <= bound


@needs_oracle
def test_resume_a_lua_run_by_command(lua_run, tmp_path):
    images = draw_folders(tmp_path / "images", {f"{number}": 2 for number in range(10)}, size=32)
    (tmp_path / "lua.yaml").touch()
    arguments = ["--config", tmp_path / "lua.yaml", "--data", images, "--resume", lua_run]
    output, before = tmp_path / "run", sorted(lua_run.iterdir())
    result = call(train.main, *arguments, "--output", output, *LUA_OPTIONS, "train.epochs=3")
    assert result.status == 0, result.error
    assert "epoch 3, 0 steps done" in result.output and "* epoch 3/3" in result.output
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert {row["epoch"] for row in rows} == {3} and rows[-1]["global_step"] == 6 + 3
    assert sorted(lua_run.iterdir()) == before
    assert call(train.main, "--resume", output, "train.epochs=4").status == 0
    changed = [*LUA_OPTIONS, "optimizer.weight_decay=1e-4"]
    result = call(train.main, *arguments, "--output", tmp_path / "b", *changed)
    said = result.output.replace("5.0e-4", "0.0005").replace("1.0e-4", "0.0001")
    assert "optimizer.weight_decay=0.0005, this has 0.0001" in said
    wrong = [*arguments, *LUA_OPTIONS, "model.cardinality=4"]
    for words, command in (("model.cardinality=2", wrong), ("--config", [*arguments[2:], *LUA_OPTIONS])):
        result = call(train.main, *command, "--output", tmp_path / "c")
        assert result.status == 2 and words in result.error
    assert not (tmp_path / "c").exists()


BASIC = ["model.architecture=resnet", "model.cardinality=null", "model.base_width=null", "model.depth=8"]


@pytest.mark.parametrize(
    "network",
    [["model.depth=20"], BASIC, [*BASIC, "model.preactivation=true"]],
    ids=["bottleneck", "basic", "basic pre"],
)
def test_resume_a_run_written_as_the_lua_code_does(network, tmp_path):
    """Train, write checkpoints.lua's files, resume from them, and continue as if never stopped."""
    options = [*network, "optimizer.lr=0.01"]
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randn(8, 3, 32, 32, generator=generator) for _ in range(4)]

    def steps(training, batches):
        training.model.train()
        return [float(train_step(training, images, torch.arange(8), 0.01)[0]) for images in batches]

    def momenta(training):
        return [training.optimizer.state[p]["momentum_buffer"] for p in training.model.parameters()]

    training = lua_training(*options)[1]
    steps(training, batches[:2])
    share_memory(training.model)
    flat = torch.cat([momentum.reshape(-1) for momentum in momenta(training)])
    optimizer = {"dfdx": flat, "evalCounter": 2, "momentum": 0.9}
    (tmp_path / "model_7.t7").write_bytes(to_t7(network_tree(training.model, nested=True), cuda=True))
    (tmp_path / "optimState_7.t7").write_bytes(to_t7(optimizer, cuda=True))
    latest = {"epoch": 7, "modelFile": "checkpoints/model_7.t7", "optimFile": "checkpoints/optimState_7.t7"}
    (tmp_path / "latest.t7").write_bytes(to_t7(latest))
    resumed = lua_training(*options)[1]
    assert resume_from_lua(resumed, load_lua_run(tmp_path)) == []
    assert (resumed.progress.epoch, resumed.progress.global_step) == (8, 2)
    for part in (momenta, lambda training: training.model.parameters()):
        assert all(map(torch.equal, part(training), part(resumed)))
    assert relative_error(steps(resumed, batches[2:]), steps(training, batches[2:])) <= 1e-3
    changes = (
        ({"dfdx": flat[:-1]}, "momentum"),
        ({"evalCounter": 0.5}, "step count"),
        ([], "optimizer's state"),
    )
    for change, words in changes:
        content = optimizer | change if isinstance(change, dict) else "text"
        (tmp_path / "optimState_7.t7").write_bytes(to_t7(content))
        with pytest.raises(UserError, match=words):
            load_lua_run(tmp_path)
    (tmp_path / "optimState_7.t7").unlink()
    with pytest.raises(UserError, match=r"optimState_7\.t7.* is missing"):
        load_lua_run(tmp_path)
    for change, words in (({"epoch": 0}, "finished epochs"), ({"optimFile": 1}, "names no optimFile")):
        (tmp_path / "latest.t7").write_bytes(to_t7(latest | change))
        with pytest.raises(UserError, match=words):
            load_lua_run(tmp_path)


def test_a_single_lua_file_is_not_resumed(tmp_path):
    file = tmp_path / "model_1.t7"
    file.write_bytes(b"")
    result = call(train.main, "--config", "demo.yaml", "--resume", file, "--output", tmp_path / "a")
    assert result.status == 2 and "a single Lua file" in result.error
    for option in ("--json", "--csv"):
        result = call(evaluate.main, tmp_path, option, file)
        assert result.status == 2 and "looks like a file of a run" in result.error
    assert file.read_bytes() == b""


@needs_oracle
def test_evaluate_a_lua_file_and_directory(lua_run, tmp_path):
    images = draw_folders(tmp_path / "images", {f"{number}": 2 for number in range(10)}, size=32)
    for source in (lua_run, lua_run / "model_2.t7"):
        result = call(evaluate.main, source, "--data", images)
        assert result.status == 0, result.error
        assert "weights of Torch7: resnext-11 (2x8d), 10 classes" in result.output
        assert "mean 125.3" in result.output and "20 images" in result.output
    (images / "val" / "9").rename(images / "val" / "other")
    assert call(evaluate.main, lua_run, "--data", images).status == 0  # the file names no classes
    draw_folders(tmp_path / "three", {"a": 1, "b": 1, "c": 1}, size=32)
    result = call(evaluate.main, lua_run, "--data", tmp_path / "three")
    assert result.status == 2 and "3 class folders" in result.error
