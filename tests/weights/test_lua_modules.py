"""Networks of the Lua code read from .t7: the oracle's, and variants written from random networks."""

import io
import lzma
from functools import partial

import numpy as np
import pytest
import torch
from damage import check_damaged
from lua_files import Module, convolution, find, network_tree, pool, relu, sequential, share_memory, to_t7
from oracle import GOLDEN, SHARED, fill_parameters, golden, network_input, relative_error, unpack

from resnext import ResNeXt, UserError, load_weights
from resnext.models.resnext import build_model

FACTS = golden("oracle.json")["models"]
MODELS = [*sorted(GOLDEN.glob("*.t7.xz")), *sorted(SHARED.glob("[bm]*/*/model*.t7.xz"))]


def write_t7(tmp_path, value, **options):
    (tmp_path / "m.t7").write_bytes(to_t7(value, **options))
    return tmp_path / "m.t7"


def random_model(**options):
    """Return a network whose running statistics and scales all differ."""
    torch.manual_seed(0)
    model = ResNeXt(**options)
    for name, value in model.state_dict().items():
        if value.ndim == 1 and not name.startswith("fc"):
            value.uniform_(0.5, 1.5)
    return model.eval()


@torch.no_grad()
def assert_same(model, other, tolerance=1e-5):
    images = torch.randn(2, 3, 32, 32, dtype=next(model.parameters()).dtype)
    assert relative_error(other.to(images.dtype)(images), model(images)) <= tolerance


# ---------------------------------------------------------------------------- the original's files


@pytest.mark.parametrize("source", MODELS, ids=lambda p: f"{p.parent.name}-{p.name}")
@torch.no_grad()
def test_models_of_the_original(source, tmp_path):
    model, info = load_weights(unpack(source, tmp_path / "model.t7"))
    complete = source.is_relative_to(SHARED)
    name = source.parent.name if complete else source.name.partition("-")[0]
    facts, found = FACTS[name], info.config.model
    images = network_input(facts["input"]["shape"], facts["input"]["offset"])
    if complete:
        arrays = np.load(io.BytesIO(lzma.decompress((source.parent / "data.npz.xz").read_bytes())))
        assert relative_error(model(images.float()), arrays["file_logits_eval_float"]) <= 2e-6
    options = facts["options"]
    assert found.preactivation == options.get("preactivation", False)
    if options["bottleneckType"] == "basic":
        assert found.block_type == "basic"
    elif options["bottleneckType"] != "resnet":
        assert (found.cardinality, found.base_width) == (options["cardinality"], options["baseWidth"])
        assert found.block == options["bottleneckType"][-1]
    assert (found.depth, found.stem[:5]) == (options["depth"], options["dataset"][:5])
    assert info.origin == "Torch7" and info.classes is None and found.classes == facts["n_classes"]
    expected = build_model(found, found.classes)
    fill_parameters(expected)
    for ours, theirs in zip(model.parameters(), expected.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert relative_error(model.double()(images), golden(f"{name}.npz")["logits_eval"]) <= 1e-6


# ---------------------------------------------------------------------------- variants

CIFAR = {"stem": "cifar", "cardinality": 3, "base_width": 5, "classes": 7}
BASIC = {"block_type": "basic", "cardinality": 1, "base_width": 16}
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
    "basic": BASIC | {"stages": (2, 3, 1), "shortcut": "A"},
    "basic B": BASIC | {"stages": (1, 2, 2)},
    "basic pre": BASIC | {"stages": (2, 2, 2), "preactivation": True, "shortcut": "A"},
    "basic pre C": BASIC | {"stages": (1, 1, 2), "preactivation": True, "shortcut": "C"},
    "basic imagenet": BASIC | {"stem": "imagenet", "stages": (2, 1, 1, 2), "base_width": 64},
    # Not run: the original's own first block with shortcut A, 64 to 256 channels, does not work.
    "cifar A shortcuts": {"stages": (1, 1, 1), "shortcut": "A"},
}


@pytest.mark.parametrize("nested", [False, True], ids=["flat", "nested"])
@pytest.mark.parametrize("options", NETWORKS.values(), ids=NETWORKS)
def test_every_network(options, nested, tmp_path):
    expected = {"shortcut": "B", "form": "C", "preactivation": False} | CIFAR | options
    model = random_model(**(CIFAR | options))
    found, info = load_weights(write_t7(tmp_path, network_tree(model, nested)))
    named = info.config.model
    assert {key: getattr(named, "block" if key == "form" else key) for key in expected} == expected
    assert not found.training
    if named.shortcut != "A" or named.block_type == "basic":
        assert_same(model, found)


CONVOLUTION, NORM = "cudnn.SpatialConvolution", "nn.SpatialBatchNormalization"


def changed_tree(change):
    """Return (a network, its tree after `change(tree, model)`, which may return another tree)."""
    model = random_model(**CIFAR, stages=(1, 1, 1))
    tree = network_tree(model)
    return model, change(tree, model) or tree


def shared(tree, model):
    share_memory(model)
    return network_tree(model)


def biases(tree, model):
    for module in find(tree, CONVOLUTION):
        module.fields["bias"] = torch.zeros(module.fields["nOutputPlane"])


def other_shapes(tree, model):
    for module in find(tree, CONVOLUTION):
        weight, groups = module.fields["weight"], module.fields["groups"]
        if groups > 1:
            module.fields["weight"] = weight.view(groups, -1, *weight.shape[1:])
        else:
            module.name, module.fields["weight"] = "nn.SpatialConvolutionMM", weight.flatten(1)


def deviations(tree, model):
    for module in find(tree, NORM):
        variance = module.fields.pop("running_var")
        module.fields["running_std"] = (variance.double() + 1e-5).rsqrt().float()


def other_eps(tree, model):
    for module in find(tree, NORM):
        module.fields["eps"] = 1e-3
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eps = 1e-3


def not_affine(tree, model):
    for module in find(tree, NORM):
        del module.fields["weight"], module.fields["bias"]
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.mul_(0.01)
            module.weight.data.fill_(1)
            module.bias.data.zero_()


def no_last_bias(tree, model):
    find(tree, "nn.Linear")[0].fields["bias"] = None
    model.fc.bias.data.zero_()


def strided(tree, model):
    for module in find(tree, CONVOLUTION):
        module.fields["weight"] = module.fields["weight"].transpose(0, 1).contiguous().transpose(0, 1)


def replicas(tree, model):
    return Module("nn.DataParallelTable", {"modules": [tree, tree]})


VARIANTS = [shared, biases, other_shapes, deviations, other_eps, not_affine, no_last_bias, strided, replicas]


@pytest.mark.parametrize(("change", "ascii"), [*((change, False) for change in VARIANTS), (strided, True)])
def test_variants_of_files(change, ascii, tmp_path):
    model, tree = changed_tree(change)
    assert_same(model, load_weights(write_t7(tmp_path, tree, ascii=ascii, cuda=not ascii))[0])


def rounded(dtype, tree, model):
    """Return the tree of the network in another type, with values that float32 cannot hold."""
    for value in model.double().parameters():
        value.data += 1e-12
    return network_tree(model.to(dtype))


@pytest.mark.parametrize(
    ("dtype", "ascii"), [(torch.float64, False), (torch.float16, False), (torch.float64, True)]
)
def test_doubles_and_halves_become_float32(dtype, ascii, tmp_path):
    model, tree = changed_tree(partial(rounded, dtype))
    found = load_weights(write_t7(tmp_path, tree, ascii=ascii))[0].state_dict()
    for key, value in model.float().state_dict().items():
        assert found[key].dtype == value.dtype and torch.equal(found[key], value), key


def test_double_precision_is_exact(tmp_path):
    model, tree = changed_tree(partial(rounded, torch.float64))
    found, _ = load_weights(write_t7(tmp_path, tree), dtype=torch.float64)
    assert torch.equal(found.fc.bias, model.fc.bias)
    assert_same(model, found, tolerance=1e-12)


def test_eps_added_to_half_precision_statistics_is_not_rounded_away(tmp_path):
    def change(tree, model):
        tree = network_tree(model.half())
        for module in find(tree, NORM):
            module.fields["eps"] = 1.1e-4
        return tree

    model, tree = changed_tree(change)
    found, _ = load_weights(write_t7(tmp_path, tree))
    assert torch.equal(found.bn1.running_var, (model.bn1.running_var.double() + 1e-4).float())


# ---------------------------------------------------------------------------- what is refused


def set_fields(name, number=0, **fields):
    return lambda tree, model: find(tree, name)[number].fields.update(fields)


def set_modules(change):
    """Replace the modules of the network by those that `change` returns."""
    return lambda tree, model: tree.fields.update(modules=change(tree.fields["modules"]))


def used_twice(tree, model):
    blocks = tree.fields["modules"][3].fields["modules"]
    blocks.append(blocks[0])


def nested(levels, copies):
    """Return relus in so many levels of containers, each of which has so many copies of the next."""
    tree = relu()
    for _ in range(levels):
        tree = sequential(*[tree] * copies)
    return lambda *_: tree


def replicas_of_itself(tree, model):
    found = Module("nn.DataParallelTable", {})
    found.fields["modules"] = [found]
    return found


def too_few_weights(tree, model):
    fields = find(tree, CONVOLUTION)[3].fields
    fields["weight"] = fields["weight"][:-1]


def basic_blocks(tree, model):
    branch = find(tree, "nn.ConcatTable")[0].fields["modules"][0].fields["modules"]
    branch[:4] = [convolution(torch.nn.Conv2d(64, 15, 3, padding=1, bias=False))]


def norms_after_additions(tree, model):
    """Move the last BN of each block behind the addition, as in the published resnet-50.t7."""
    tree = network_tree(random_model(**CIFAR, stages=(2, 1, 1)))
    for stage in tree.fields["modules"][3:6]:
        for block in stage.fields["modules"]:
            branch = block.fields["modules"][0].fields["modules"][0]
            block.fields["modules"].insert(2, branch.fields["modules"].pop())
    return tree


EXPANDED = {"weight": torch.ones(1, 1).expand(10**9, 1024), "bias": torch.ones(1).expand(10**9)}
REFUSED = {
    "early stride": (set_fields(CONVOLUTION, 5, dW=2, dH=2), r"layer2\.0\.conv1: kernel 1x1, stride 2x2"),
    "with bias": (set_fields(CONVOLUTION, bias=torch.ones(64)), "conv1: has a bias"),
    "other module": (
        set_modules(lambda all: [*all[:3], Module("nn.SpatialDropout", {}), *all[3:]]),
        "'nn.SpatialDropout'",
    ),
    "used twice": (used_twice, "used twice"),
    "inside itself": (lambda tree, model: tree.fields["modules"].append(tree), "holds itself"),
    "many modules": (nested(18, 2), "over 100,000 others"),
    "many levels": (nested(55, 1), "over 50 levels"),
    "replicas of itself": (replicas_of_itself, "holds itself"),
    "infinite": (set_fields(CONVOLUTION, 3, nOutputPlane=float("inf")), "nOutputPlane of a .* is inf"),
    "no network": (lambda tree, model: {"epoch": 3}, "no network"),
    "too few weights": (too_few_weights, "do not make"),
    "expanded": (set_fields("nn.Linear", **EXPANDED), "larger than the file"),
    "no last layer": (set_modules(lambda all: all[:-1]), "got end, expected linear"),
    "other pool": (
        set_modules(lambda all: [*all[:3], pool("nn.SpatialMaxPooling", 2, 2), *all[4:]]),
        "got maxpool, expected avgpool",
    ),
    "mixed blocks": (basic_blocks, r"layer1\.0\.conv2: kernel 1x1"),
    "norms after additions": (norms_after_additions, "BN after the addition, as in the published resnet-50"),
}


@pytest.mark.parametrize(("change", "words"), REFUSED.values(), ids=REFUSED)
def test_other_networks_are_refused(change, words, tmp_path):
    with pytest.raises(UserError, match=words) as caught:
        load_weights(write_t7(tmp_path, changed_tree(change)[1]))
    assert "m.t7" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("ascii", [False, True], ids=["binary", "text"])
def test_damaged_files_are_refused(ascii, tmp_path):
    content = to_t7(changed_tree(lambda *_: None)[1], ascii=ascii)
    cuts, changes = (3, 15) if ascii else (15, 60)  # text is slow to read
    check_damaged(load_weights, tmp_path / "m.t7", content, 0, 20_000, cuts, changes)
