"""Networks of the Lua code read from .t7: the oracle's, and variants written here from random networks."""

import io
import json
import lzma

import numpy as np
import pytest
import torch
from commands import call, draw_folders
from lua_files import Module, convolution, find, network_tree, pool, relu, sequential, share_memory, to_t7
from oracle import GOLDEN, SHARED, fill_parameters, golden, network_input, relative_error

import evaluate
import train
from resnext import ResNeXt, UserError, load_weights
from resnext.config import read_config
from resnext.engine.train_state import build_train_state
from resnext.engine.trainer import train_step
from resnext.engine.warm_start import resume_from_lua
from resnext.models.resnext import build_model
from resnext.schedule import learning_rate
from resnext.weights.load import load_lua_run

FACTS = golden("oracle.json")["models"]
MODELS = sorted((SHARED / "models").glob("*/model*.t7.xz"))
needs_oracle = pytest.mark.skipif(not SHARED.exists(), reason="the reference files are not there")


def unpacked(source, target):
    target.write_bytes(lzma.decompress(source.read_bytes()))
    return target


def arrays(folder):
    return dict(np.load(io.BytesIO(lzma.decompress((folder / "data.npz.xz").read_bytes()))))


def random_model(seed=0, **options):
    """With running statistics and scales that are all different."""
    torch.manual_seed(seed)
    model = ResNeXt(**options)
    for name, value in model.state_dict().items():
        if value.ndim == 1 and not name.startswith("fc"):
            value.uniform_(0.5, 1.5)
    return model.eval()


@torch.no_grad()
def assert_same(model, other, size=32, tolerance=1e-5):
    pictures = torch.randn(2, 3, size, size, dtype=next(model.parameters()).dtype)
    assert relative_error(other.to(pictures.dtype)(pictures), model(pictures)) <= tolerance


# ---------------------------------------------------------------------------- the original's files


def check_model(model, info, name):
    """Against the description of a reference network, its parameters and its outputs."""
    facts, found = FACTS[name], info.config.model
    options = facts["options"]
    if options["bottleneckType"] != "resnet":
        assert (found.cardinality, found.base_width) == (options["cardinality"], options["baseWidth"])
        assert found.block == options["bottleneckType"][-1]
    assert (found.depth, found.stem[:5]) == (options["depth"], options["dataset"][:5])
    assert info.origin == "Torch7" and info.classes is None and found.classes == facts["n_classes"]
    expected = build_model(found, found.classes)
    fill_parameters(expected)
    for ours, theirs in zip(model.parameters(), expected.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    pictures = network_input(facts["input"]["shape"], facts["input"]["offset"])
    with torch.no_grad():
        assert relative_error(model.double()(pictures), golden(f"{name}.npz")["logits_eval"]) <= 1e-6


@pytest.mark.parametrize("source", sorted(GOLDEN.glob("*.t7.xz")), ids=lambda p: p.name)
def test_a_model_of_the_original(source, tmp_path):
    check_model(*load_weights(unpacked(source, tmp_path / "model.t7")), source.name.partition("-")[0])


@needs_oracle
@pytest.mark.parametrize("source", MODELS, ids=lambda p: f"{p.parent.name}-{p.name}")
def test_all_models_of_the_original(source, tmp_path):
    model, info = load_weights(unpacked(source, tmp_path / "model.t7"))
    expected = arrays(source.parent)["file_logits_eval_float"]
    facts = FACTS[source.parent.name]["input"]
    with torch.no_grad():
        output = model(network_input(facts["shape"], facts["offset"]).float())
    assert relative_error(output, expected) <= 2e-6
    check_model(model, info, source.parent.name)


@pytest.fixture(scope="module")
def lua_run(tmp_path_factory):
    """The original's checkpoint directory after epoch 2."""
    folder = tmp_path_factory.mktemp("lua")
    for name in ("model_2.t7", "optimState_2.t7"):
        unpacked(SHARED / "ckpt" / f"{name}.xz", folder / name)
    (folder / "latest.t7").write_bytes((SHARED / "ckpt" / "latest.t7").read_bytes())
    return folder


LUA_OPTIONS = [
    "model.stem=cifar",
    "model.depth=11",
    "model.cardinality=2",
    "model.base_width=8",
    "train.epochs=4",
    "train.batch_size=8",
    "optimizer.weight_decay=5e-4",
    "schedule.name=cifar_step",
    "run.device=cpu",
    "run.tensorboard=false",
]


@needs_oracle
@pytest.mark.parametrize(
    ("dtype", "form"), [(torch.float64, "C"), (torch.float32, "C"), (torch.float64, "B")]
)
def test_a_run_of_the_original_goes_on(lua_run, dtype, form):
    meta = json.loads((SHARED / "ckpt" / "meta.json").read_text())
    config = read_config(None, [*LUA_OPTIONS, "data.dataset=cifar10", f"model.block={form}"])
    training = build_train_state(config, tuple("0123456789"), torch.device("cpu"), {})
    assert resume_from_lua(training, load_lua_run(lua_run)) == []
    assert (training.progress.epoch, training.progress.global_step) == (3, 6)
    training.model.to(dtype).train()
    for state in training.optimizer.state.values():
        state["momentum_buffer"] = state["momentum_buffer"].to(dtype)
    expected = meta["resumed_f64_epochs" if dtype == torch.float64 else "epochs"][-1]
    losses = []
    for step, batch in enumerate(meta["train_batches"]):
        rate = learning_rate(config.schedule, config.optimizer.lr, 4, 3, step, 3)
        assert rate == expected["lr"]
        pictures = network_input(meta["batch_shape"], batch["input_offset"]).to(dtype)
        losses.append(float(train_step(training, pictures, torch.tensor(batch["target"]) - 1, rate)[0]))
    assert relative_error(losses, expected["losses"]) <= (1e-12 if dtype == torch.float64 else 1e-5)
    batch = meta["eval_batch"]
    with torch.no_grad():
        output = training.model.eval()(network_input(meta["batch_shape"], batch["input_offset"]).to(dtype))
    loss = torch.nn.functional.cross_entropy(output, torch.tensor(batch["target"]) - 1)
    assert relative_error(float(loss), expected["test_loss"]) <= (1e-12 if dtype == torch.float64 else 1e-5)


@needs_oracle
def test_the_command_line_continues_a_lua_run(lua_run, tmp_path):
    pictures = draw_folders(tmp_path / "pictures", {f"{number}": 2 for number in range(10)}, size=32)
    (tmp_path / "lua.yaml").touch()
    arguments = ["--config", tmp_path / "lua.yaml", "--data", pictures, "--resume", lua_run]
    output, before = tmp_path / "run", sorted(lua_run.iterdir())
    result = call(train.main, *arguments, "--output", output, *LUA_OPTIONS, "train.epochs=3")
    assert result.status == 0, result.error
    assert "epoch 3, 0 steps done" in result.output and "* epoch 3/3" in result.output
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert {row["epoch"] for row in rows} == {3} and rows[-1]["global_step"] == 6 + 3
    assert sorted(lua_run.iterdir()) == before
    assert call(train.main, "--resume", output, "train.epochs=4").status == 0
    result = call(
        train.main, *arguments, "--output", tmp_path / "b", *LUA_OPTIONS, "optimizer.weight_decay=1e-4"
    )
    assert "optimizer.weight_decay=0.0005, this has 0.0001" in result.output.replace(
        "5.0e-4", "0.0005"
    ).replace("1.0e-4", "0.0001")
    for words, changes in (("model.cardinality=2", ["model.cardinality=4"]), ("--config is missing", None)):
        command = arguments if changes else arguments[2:]
        result = call(train.main, *command, "--output", tmp_path / "c", *LUA_OPTIONS, *(changes or []))
        assert result.status == 2 and words in result.error
    assert not (tmp_path / "c").exists()


def test_a_run_as_the_lua_code_would_have_left_it(tmp_path):
    """Steps here, written as checkpoints.lua does, and on from there: as if never stopped."""
    config = read_config(None, [*LUA_OPTIONS, "data.dataset=cifar10", "model.depth=20", "optimizer.lr=0.01"])
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randn(8, 3, 32, 32, generator=generator) for _ in range(4)]
    labels = torch.arange(8)

    def steps(training, pictures):
        training.model.train()
        return [float(train_step(training, part, labels, 0.01)[0]) for part in pictures]

    training = build_train_state(config, tuple("0123456789"), torch.device("cpu"), {})
    steps(training, batches[:2])
    flat = share_memory(training.model)
    state = [training.optimizer.state[p]["momentum_buffer"] for p in training.model.parameters()]
    optimizer = {"dfdx": torch.cat([m.reshape(-1) for m in state]), "evalCounter": 2, "momentum": 0.9}
    (tmp_path / "model_7.t7").write_bytes(to_t7(network_tree(training.model, nested=True), cuda=True))
    (tmp_path / "optimState_7.t7").write_bytes(to_t7(optimizer, cuda=True))
    latest = {"epoch": 7, "modelFile": "checkpoints/model_7.t7", "optimFile": "checkpoints/optimState_7.t7"}
    (tmp_path / "latest.t7").write_bytes(to_t7(latest))
    resumed = build_train_state(config, tuple("0123456789"), torch.device("cpu"), {})
    assert resume_from_lua(resumed, load_lua_run(tmp_path)) == []
    assert (resumed.progress.epoch, resumed.progress.global_step) == (8, 2)
    pairs = zip(training.model.parameters(), resumed.model.parameters(), strict=True)
    for before, after in pairs:
        momenta = [t.optimizer.state[p]["momentum_buffer"] for t, p in ((training, before), (resumed, after))]
        assert torch.equal(before, after) and torch.equal(*momenta)
    assert relative_error(steps(resumed, batches[2:]), steps(training, batches[2:])) <= 1e-3
    optimizer["dfdx"] = flat[:-1]
    (tmp_path / "optimState_7.t7").write_bytes(to_t7(optimizer))
    with pytest.raises(UserError, match="momentum is not that of the network"):
        load_lua_run(tmp_path)
    (tmp_path / "optimState_7.t7").unlink()
    with pytest.raises(UserError, match="names, is not there"):
        load_lua_run(tmp_path)


def test_a_single_lua_file_is_not_resumed(tmp_path):
    (tmp_path / "model_1.t7").write_bytes(b"")
    result = call(
        train.main, "--config", "demo.yaml", "--resume", tmp_path / "model_1.t7", "--output", tmp_path / "a"
    )
    assert result.status == 2 and "a single Lua file; give its folder" in result.error
    for option in ("--json", "--csv"):
        result = call(evaluate.main, tmp_path, option, tmp_path / "model_1.t7")
        assert result.status == 2 and "the name of a run file" in result.error
    assert (tmp_path / "model_1.t7").read_bytes() == b""


@needs_oracle
def test_evaluate_takes_a_lua_file_and_directory(lua_run, tmp_path):
    pictures = draw_folders(tmp_path / "pictures", {f"{number}": 2 for number in range(10)}, size=32)
    for source in (lua_run, lua_run / "model_2.t7"):
        result = call(evaluate.main, source, "--data", pictures)
        assert result.status == 0, result.error
        assert (
            "weights of Torch7: resnext-11 (2x8d), 10 classes; their pictures" in result.output
            and "mean 125.3" in result.output
        )
        assert "20 images" in result.output
    (pictures / "val" / "9").rename(pictures / "val" / "other")
    assert call(evaluate.main, lua_run, "--data", pictures).status == 0  # the file names no classes
    draw_folders(tmp_path / "three", {"a": 1, "b": 1, "c": 1}, size=32)
    result = call(evaluate.main, lua_run, "--data", tmp_path / "three")
    assert result.status == 2 and "there are 3 class folders, and the network has 10 classes" in result.error


# ---------------------------------------------------------------------------- variants

CIFAR = {"stem": "cifar", "cardinality": 3, "base_width": 5, "classes": 7}
NETWORKS = {
    "cifar 20": {"stages": (2, 2, 2)},
    "cifar C shortcuts": {"stages": (2, 1, 3), "shortcut": "C"},
    "cifar B": {"stages": (2, 2, 2), "form": "B"},
    "cifar pre": {"stages": (2, 2, 2), "preactivation": True},
    "cifar pre C shortcuts": {"stages": (1, 2, 1), "preactivation": True, "shortcut": "C"},
    "cifar pre B": {"stages": (1, 2, 1), "preactivation": True, "form": "B"},
    "imagenet": {"stem": "imagenet", "stages": (2, 1, 3, 1)},
    "imagenet pre": {"stem": "imagenet", "stages": (1, 2, 1, 2), "preactivation": True},
    "resnet": {"stages": (1, 2, 1), "cardinality": 1, "base_width": 64},
}


@pytest.mark.parametrize("nested", [False, True], ids=["flat", "nested"])
@pytest.mark.parametrize("options", NETWORKS.values(), ids=NETWORKS)
def test_every_network(options, nested, tmp_path):
    options = CIFAR | options
    model = random_model(**options)
    (tmp_path / "m.t7").write_bytes(to_t7(network_tree(model, nested)))
    found, info = load_weights(tmp_path / "m.t7")
    named = info.config.model
    assert named.stages == options["stages"] and named.classes == 7
    assert named.shortcut == options.get("shortcut", "B") and named.block == options.get("form", "C")
    assert (named.cardinality, named.base_width) == (options["cardinality"], options["base_width"])
    assert named.preactivation == options.get("preactivation", False) and named.stem == options["stem"]
    assert not found.training
    assert_same(model, found)


def changed_tree(change, **options):
    model = random_model(**{**CIFAR, "stages": (1, 1, 1), **options})
    tree = network_tree(model)
    return model, change(tree, model) or tree


def shared(tree, model):
    share_memory(model)
    return network_tree(model)


def biases(tree, model):
    for module in find(tree, "cudnn.SpatialConvolution"):
        module.fields["bias"] = torch.zeros(module.fields["nOutputPlane"])


def other_shapes(tree, model):
    for module in find(tree, "cudnn.SpatialConvolution"):
        weight, groups = module.fields["weight"], module.fields["groups"]
        module.fields["weight"] = (
            weight.view(groups, -1, *weight.shape[1:]) if groups > 1 else weight.flatten(1)
        )
        if groups == 1:
            module.name = "nn.SpatialConvolutionMM"


def deviations(tree, model):
    for module in find(tree, "nn.SpatialBatchNormalization"):
        variance = module.fields.pop("running_var")
        module.fields["running_std"] = (variance.double() + 1e-5).rsqrt().float()


def other_eps(tree, model):
    for module in find(tree, "nn.SpatialBatchNormalization"):
        module.fields["eps"] = 1e-3
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eps = 1e-3


def not_affine(tree, model):
    for module in find(tree, "nn.SpatialBatchNormalization"):
        del module.fields["weight"], module.fields["bias"]
    for name, value in model.state_dict().items():
        if name.endswith("running_mean"):
            value.mul_(0.01)
        elif value.ndim == 1 and not name.startswith("fc") and "running" not in name:
            (value.fill_(1) if name.endswith("weight") else value.zero_() if name.endswith("bias") else None)


def no_last_bias(tree, model):
    find(tree, "nn.Linear")[0].fields["bias"] = None
    model.fc.bias.data.zero_()


def strided(tree, model):
    for module in find(tree, "cudnn.SpatialConvolution"):
        module.fields["weight"] = module.fields["weight"].transpose(0, 1).contiguous().transpose(0, 1)


def replicas(tree, model):
    return Module("nn.DataParallelTable", {"modules": [tree, tree]})


VARIANTS = [shared, biases, other_shapes, deviations, other_eps, not_affine, no_last_bias, strided, replicas]


@pytest.mark.parametrize("change", VARIANTS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("ascii", [False, True], ids=["binary", "text"])
def test_variants_of_files(change, ascii, tmp_path):
    model, tree = changed_tree(change)
    (tmp_path / "m.t7").write_bytes(to_t7(tree, ascii=ascii, cuda=not ascii))
    assert_same(model, load_weights(tmp_path / "m.t7")[0])


@pytest.mark.parametrize("kind", [torch.float64, torch.float16])
@pytest.mark.parametrize("ascii", [False, True], ids=["binary", "text"])
def test_doubles_and_halves(kind, ascii, tmp_path):
    torch.manual_seed(0)
    model, tree = changed_tree(lambda tree, model: network_tree(rounding(model, kind)))
    (tmp_path / "m.t7").write_bytes(to_t7(tree, ascii=ascii))
    found, expected = load_weights(tmp_path / "m.t7")[0].state_dict(), model.float().state_dict()
    for key, value in expected.items():
        assert found[key].dtype == value.dtype and torch.equal(found[key], value), key


def rounding(model, kind):
    """With values that float32 cannot hold, in another type."""
    for value in model.double().parameters():
        value.data += 1e-12
    return model.to(kind)


def test_exact_in_double_precision(tmp_path):
    model, tree = changed_tree(lambda tree, model: network_tree(rounding(model, torch.float64)))
    (tmp_path / "m.t7").write_bytes(to_t7(tree))
    found, _ = load_weights(tmp_path / "m.t7", dtype=torch.float64)
    assert torch.equal(found.fc.bias, model.fc.bias)
    assert_same(model, found, tolerance=1e-12)


def test_statistics_of_halves(tmp_path):
    """What is added to a variance is not lost in its rounding."""

    def change(tree, model):
        tree = network_tree(model.half())
        for module in find(tree, "nn.SpatialBatchNormalization"):
            module.fields["eps"] = 1.1e-4
        return tree

    model, tree = changed_tree(change)
    (tmp_path / "m.t7").write_bytes(to_t7(tree))
    found, _ = load_weights(tmp_path / "m.t7")
    assert torch.equal(found.bn1.running_var, (model.bn1.running_var.double() + 1e-4).float())


def test_zero_padded_shortcuts(tmp_path):
    """Only doublings: the original's own first block, 64 to 256, cannot be run."""
    tree = network_tree(random_model(**{**CIFAR, "stages": (1, 1, 1), "shortcut": "A"}))
    (tmp_path / "m.t7").write_bytes(to_t7(tree))
    assert load_weights(tmp_path / "m.t7")[1].config.model.shortcut == "A"


# ---------------------------------------------------------------------------- what is refused


def early_stride(tree, model):
    first, second = find(tree, "cudnn.SpatialConvolution")[5:7]
    first.fields |= {"dW": 2, "dH": 2}
    second.fields |= {"dW": 1, "dH": 1}


def with_bias(tree, model):
    find(tree, "cudnn.SpatialConvolution")[0].fields["bias"] = torch.ones(64)


def other_module(tree, model):
    tree.fields["modules"].insert(3, Module("nn.SpatialDropout", {"p": 0.5}))


def used_twice(tree, model):
    blocks = tree.fields["modules"][3].fields["modules"]
    blocks.append(blocks[0])


def inside_itself(tree, model):
    tree.fields["modules"].append(tree)


def many_times(tree, model):
    for _ in range(60):
        tree = sequential(tree, tree)
    return sequential(*[relu()] * 3, tree)


def replicas_of_itself(tree, model):
    found = Module("nn.DataParallelTable", {})
    found.fields["modules"] = [found]
    return found


def infinite(tree, model):
    find(tree, "cudnn.SpatialConvolution")[3].fields["nOutputPlane"] = float("inf")


def no_network(tree, model):
    return {"epoch": 3}


def too_few_weights(tree, model):
    convolution_ = find(tree, "cudnn.SpatialConvolution")[3]
    convolution_.fields["weight"] = convolution_.fields["weight"][:-1]


def expanded(tree, model):
    module = find(tree, "nn.Linear")[0]
    module.fields |= {"weight": torch.ones(1, 1).expand(10**9, 1024), "bias": torch.ones(1).expand(10**9)}


def no_last_layer(tree, model):
    tree.fields["modules"].pop()


def other_pool(tree, model):
    tree.fields["modules"][3] = pool("nn.SpatialMaxPooling", 2, 2)


def basic_blocks(tree, model):
    branch = find(tree, "nn.ConcatTable")[0].fields["modules"][0].fields["modules"]
    del branch[:3]
    branch[0] = convolution(torch.nn.Conv2d(64, 15, 3, padding=1, bias=False))


REFUSED = {
    early_stride: "layer2.0.conv1: kernel 1x1, stride 2x2",
    with_bias: "conv1: has a bias",
    other_module: "a module 'nn.SpatialDropout'",
    used_twice: "used twice",
    inside_itself: "holds itself",
    many_times: "nested|used twice|holds itself",
    replicas_of_itself: "holds itself",
    infinite: "nOutputPlane of a cudnn.SpatialConvolution is inf",
    no_network: "no network",
    too_few_weights: "do not make",
    expanded: "larger than the file",
    no_last_layer: "nothing stands where linear should",
    other_pool: "where avgpool should|stands where",
    basic_blocks: "blocks have two convolutions",
}


@pytest.mark.parametrize(("change", "words"), REFUSED.items(), ids=lambda f: getattr(f, "__name__", ""))
def test_other_networks_are_refused(change, words, tmp_path):
    _, tree = changed_tree(change)
    (tmp_path / "m.t7").write_bytes(to_t7(tree))
    with pytest.raises(UserError, match=words) as caught:
        load_weights(tmp_path / "m.t7")
    assert "m.t7" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("ascii", [False, True], ids=["binary", "text"])
def test_damaged_files_are_refused(ascii, tmp_path):
    content = to_t7(changed_tree(lambda *_: None)[1], ascii=ascii)
    generator, path = np.random.default_rng(0), tmp_path / "m.t7"
    for end in [*range(0, 300, 17), *generator.integers(300, len(content) - 1, 15)]:
        path.write_bytes(content[:end])
        with pytest.raises(UserError):
            load_weights(path)
    for _ in range(60):
        changed = bytearray(content)
        for place in generator.integers(0, 20_000, 3):
            changed[place % len(content)] = generator.integers(256)
        path.write_bytes(changed)
        try:
            load_weights(path)
        except UserError as error:
            assert "\n" not in str(error)
