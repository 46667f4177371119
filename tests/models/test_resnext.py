"""Networks compared with torchvision, with published counts, and with a plain functional reference.

The reference states the original's definition (models/resnext.lua, preresnet.lua) in a few lines
of torch.nn.functional, for every stem, form, shortcut, and activation order. Forms A, B, and C are
also compared with each other, and every shipped configuration is built and counted.
"""

import importlib
import itertools
import math
from functools import partial

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from config_counts import CONFIG_COUNTS
from networks import stir
from torch import nn

import resnext
from resnext.config import CONFIG_FOLDER, ModelConfig, parse_config, read_config
from resnext.engine.train_state import build_train_state, init_momentum
from resnext.engine.trainer import train_step
from resnext.errors import UserError
from resnext.models.block_forms import convert_form
from resnext.models.complexity import complexity
from resnext.models.resnext import ResNeXt, build_model

META = torch.device("meta")


def error(ours, theirs):
    """Return the largest difference, relative to the largest value."""
    assert ours.shape == theirs.shape
    return ((ours - theirs).abs().max() / theirs.abs().max().clamp_min(1e-30)).item()


def random_model(*args, **kwargs):
    """Return a float64 network with random BatchNorm parameters and statistics."""
    torch.manual_seed(7)
    model = stir(ResNeXt(*args, **kwargs).double())
    nn.init.uniform_(model.fc.bias, -0.3, 0.3)
    return model


def images(*shape):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def loss(logits):
    """Return a loss in which each logit has another weight."""
    return (logits * torch.linspace(-1, 2, logits.numel(), dtype=logits.dtype).view_as(logits)).sum()


def gradients(model, x):
    """Return (logits, {name: gradient}) of a training-mode step."""
    model.train().zero_grad()
    logits = model(x)
    loss(logits).backward()
    return logits.detach(), {name: p.grad for name, p in model.named_parameters()}


# ---------------------------------------------------------------------------- torchvision

TORCHVISION = ["resnet18", "resnet34", "resnet50", "resnext50_32x4d", "resnext101_32x8d", "resnext101_64x4d"]


@pytest.mark.parametrize("name", [*TORCHVISION, "resnet101", "resnet152"])
def test_state_is_torchvisions(name):
    with META:
        ours = getattr(resnext, name)().state_dict()
        theirs = getattr(torchvision.models, name)().state_dict()
    assert {k: (v.shape, v.dtype) for k, v in ours.items()} == {
        k: (v.shape, v.dtype) for k, v in theirs.items()
    }
    assert list(ours) == list(theirs)


@pytest.mark.parametrize("name", TORCHVISION)
def test_logits_are_torchvisions(name):
    torch.manual_seed(0)
    ours = getattr(resnext, name)(classes=40).double()
    with META:
        theirs = getattr(torchvision.models, name)(num_classes=40)
    theirs.load_state_dict(ours.state_dict(), assign=True)
    x = images(2, 3, 64, 64)
    with torch.no_grad():
        assert error(ours.train()(x), theirs.train()(x)) < 1e-12
        if "101" not in name:
            assert error(ours.eval()(x), theirs.eval()(x)) < 1e-12


@pytest.mark.parametrize("name", ["resnet18", "resnet34"])
def test_basic_blocks_are_torchvisions_and_timms_to_the_bit(name):
    ours = stir(getattr(resnext, name)(classes=12)).eval()
    for make in (getattr(torchvision.models, name), partial(timm.create_model, name)):
        theirs = make(num_classes=12).eval()
        theirs.load_state_dict(ours.state_dict())
        back = getattr(resnext, name)(classes=12).eval()
        back.load_state_dict(theirs.state_dict())
        x = images(2, 3, 64, 64).float()
        with torch.no_grad():
            assert torch.equal(ours(x), theirs(x)) and torch.equal(ours(x), back(x))


# ---------------------------------------------------------------------------- counts


@pytest.mark.parametrize("form", "ABC")
def test_complexity_leaves_the_model_alone(form):
    model = ResNeXt((1, 1, 1), 2, 4, 10, stem="cifar", form=form)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    assert complexity(model, 16)[0] == sum(p.numel() for p in model.parameters())
    assert model.training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    complexity(model.eval(), 16)
    assert not model.training


def test_every_shipped_configuration_is_counted():
    assert {path.stem for path in CONFIG_FOLDER.glob("*.yaml")} == set(CONFIG_COUNTS)


@pytest.mark.parametrize("name", CONFIG_COUNTS)
def test_shipped_configurations(name):
    config = read_config(CONFIG_FOLDER / f"{name}.yaml")
    classes = {"cifar10": 10, "cifar100": 100, "glyphs": 10, "folder": 1000}[config.data.dataset]
    with META:
        model = build_model(config.model, config.model.classes or classes)
    assert complexity(model, config.data.image_size) == CONFIG_COUNTS[name]
    assert (model.final_bn is not None) == ("preresnext" in name or name == "resnet200")


def test_counts_of_basic_blocks_by_formula():
    """ResNet-20 to 1202: 19 to 1,201 convolutions of 16, 32 and 64 channels, and a linear layer."""
    for depth in (20, 32, 44, 56, 110, 1202):
        n = (depth - 2) // 6
        weights = 27 * 16 + 9 * (
            2 * n * 16**2 + 16 * 32 + (2 * n - 1) * 32**2 + 32 * 64 + (2 * n - 1) * 64**2
        )
        norms = 2 * (16 + 2 * n * (16 + 32 + 64))
        macs = 1024 * (27 * 16 + 9 * 2 * n * 16**2) + 256 * 9 * (16 * 32 + (2 * n - 1) * 32**2)
        macs += 64 * 9 * (32 * 64 + (2 * n - 1) * 64**2) + 640
        assert CONFIG_COUNTS[f"cifar10_resnet{depth}"] == (weights + norms + 650, macs)


# ---------------------------------------------------------------------------- functional reference


class Reference:
    """The network by its definition. `used` collects the names of its parameters."""

    def __init__(self, model, stages, cardinality, stem, form, shortcut, preactivation, basic=0):
        self.state = dict(model.named_parameters())
        self.stages, self.cardinality, self.stem, self.form = stages, cardinality, stem, form
        self.shortcut, self.preactivation = shortcut, preactivation
        self.basic = basic  # channels of the first stage of basic blocks
        self.used = set()

    def get(self, key):
        self.used.add(key)
        return self.state[key]

    def conv(self, x, key, stride=1, groups=1):
        weight = self.get(f"{key}.weight")
        return F.conv2d(x, weight, None, stride, weight.shape[-1] // 2, groups=groups)

    def bn(self, x, key):
        mean = x.mean((0, 2, 3), keepdim=True)
        variance = (x - mean).square().mean((0, 2, 3), keepdim=True)
        weight, bias = (self.get(f"{key}.{name}").view(1, -1, 1, 1) for name in ("weight", "bias"))
        return (x - mean) / (variance + 1e-5).sqrt() * weight + bias

    def bn_relu(self, x, key):
        return self.bn(x, key).clamp_min(0)

    def branch(self, x, block, stride):
        if self.basic:
            x = self.bn_relu(self.conv(x, f"{block}.conv1", stride), f"{block}.bn1")
            return self.conv(x, f"{block}.conv2")
        grouped = self.form == "C"
        paths = [block] if grouped else [f"{block}.paths.{i}" for i in range(self.cardinality)]
        outputs = []
        for path in paths:
            y = self.bn_relu(self.conv(x, f"{path}.conv1"), f"{path}.bn1")
            y = self.conv(y, f"{path}.conv2", stride, self.cardinality if grouped else 1)
            outputs.append(self.bn_relu(y, f"{path}.bn2"))
        if self.form == "A":
            return sum(self.conv(y, f"{path}.conv3") for y, path in zip(outputs, paths, strict=True))
        return self.conv(torch.cat(outputs, 1), f"{block}.conv3")

    def skip(self, x, block, outputs, stride):
        if self.shortcut == "C" or (self.shortcut == "B" and x.shape[1] != outputs):
            x = self.conv(x, f"{block}.downsample.0", stride)
            return x if self.preactivation else self.bn(x, f"{block}.downsample.1")
        x = F.avg_pool2d(x, 1, stride)
        return torch.cat([x, x.new_zeros(len(x), outputs - x.shape[1], *x.shape[2:])], 1)

    def block(self, x, block, outputs, stride, activation):
        if not self.preactivation:
            y = self.bn(self.branch(x, block, stride), f"{block}.bn{2 if self.basic else 3}")
            return (y + self.skip(x, block, outputs, stride)).clamp_min(0)
        y = x if activation == "none" else self.bn_relu(x, f"{block}.bn0")
        skipped = y if activation == "shared" else x
        return self.branch(y, block, stride) + self.skip(skipped, block, outputs, stride)

    def __call__(self, x):
        imagenet = self.stem == "imagenet"
        x = self.conv(x, "conv1", 2 if imagenet else 1)
        if imagenet or not self.preactivation:
            x = self.bn_relu(x, "bn1")
        if imagenet:
            x = F.max_pool2d(x, 3, 2, 1)
        for stage, blocks in enumerate(self.stages):
            for index in range(blocks):
                activation = "branch" if index else "shared"
                if imagenet and stage == index == 0:
                    activation = "none"
                stride = 2 if stage > 0 and index == 0 else 1
                x = self.block(
                    x, f"layer{stage + 1}.{index}", (self.basic or 256) * 2**stage, stride, activation
                )
        if self.preactivation:
            x = self.bn_relu(x, "final_bn")
        return F.linear(x.flatten(2).mean(2), self.get("fc.weight"), self.get("fc.bias"))


STAGES = {"cifar": (2, 1, 1), "imagenet": (2, 1, 1, 1)}


@pytest.mark.parametrize(
    "stem, preactivation, form, shortcut",
    list(itertools.product(["cifar", "imagenet"], [False, True], "ABC", "ABC")),
)
def test_network_is_its_definition(stem, preactivation, form, shortcut):
    options = {"stem": stem, "form": form, "shortcut": shortcut, "preactivation": preactivation}
    model = random_model(STAGES[stem], 3, 5, 7, **options)
    check_definition(model, Reference(model, STAGES[stem], 3, **options))


@pytest.mark.parametrize(
    "stem, preactivation, shortcut", list(itertools.product(["cifar", "imagenet"], [False, True], "ABC"))
)
def test_network_of_basic_blocks_is_its_definition(stem, preactivation, shortcut):
    options = {"stem": stem, "form": "C", "shortcut": shortcut, "preactivation": preactivation}
    model = random_model(STAGES[stem], 1, 6, 7, block_type="basic", **options)
    check_definition(model, Reference(model, STAGES[stem], 1, basic=6, **options))


@pytest.mark.parametrize("preactivation", [False, True])
def test_training_of_basic_blocks_is_its_definition(preactivation):
    """Six steps of the program in float64 against the reference and optim.sgd's formula."""
    text = "model: {architecture: resnet, stem: cifar, depth: 14}\ndata: {dataset: cifar10, dir: unused}\n"
    config = parse_config(text, "test", [f"model.preactivation={str(preactivation).lower()}"])
    training = build_train_state(config, tuple("0123456789"), torch.device("cpu"), {})
    training.model.double().train()
    init_momentum(training.optimizer)
    parameters = {name: p.detach().clone() for name, p in training.model.named_parameters()}
    options = {"stem": "cifar", "form": "C", "shortcut": "A", "preactivation": preactivation}
    reference = Reference(training.model, (2, 2, 2), 1, basic=16, **options)
    velocities = {name: torch.zeros_like(p) for name, p in parameters.items()}
    labels = torch.arange(8)
    for step in range(6):
        x = torch.randn(8, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(step))
        ours = train_step(training, x, labels, 0.1)[0]
        reference.state = {name: p.requires_grad_() for name, p in parameters.items()}
        theirs = F.cross_entropy(reference(x), labels)
        gradients = torch.autograd.grad(theirs, list(parameters.values()))
        assert abs(ours / theirs.detach() - 1) < 1e-10
        with torch.no_grad():
            for (name, p), gradient in zip(parameters.items(), gradients, strict=True):
                gradient = gradient + 1e-4 * p
                velocities[name] = 0.9 * velocities[name] + gradient
                parameters[name] = p - 0.1 * (gradient + 0.9 * velocities[name])
    for name, p in training.model.named_parameters():
        assert error(p.detach(), parameters[name]) < 1e-10, name


def check_definition(model, reference):
    x = images(2, 3, 13, 10) if reference.stem == "cifar" else images(2, 3, 45, 38)
    logits, ours = gradients(model, x)
    model.zero_grad(set_to_none=True)
    expected = reference(x)
    names, parameters = zip(*model.named_parameters(), strict=True)
    theirs = torch.autograd.grad(loss(expected), parameters)
    assert error(logits, expected.detach()) < 1e-12
    assert reference.used == set(ours) == set(names)
    for name, gradient in zip(names, theirs, strict=True):
        assert error(ours[name], gradient) < 1e-10, name


@pytest.mark.parametrize("form", "ABC")
def test_path_width_follows_the_stage(form):
    """D = n · base_width / 64 in a stage of n features, whatever the cardinality."""
    model = ResNeXt((1, 1, 1), 2, 14, 10, stem="cifar", form=form)
    for features, stage in ((64, model.layer1), (128, model.layer2), (256, model.layer3)):
        width = features * 14 // 64
        shapes = [p.shape for n, p in stage.named_parameters() if n.endswith("conv2.weight")]
        expected = [(2 * width, width, 3, 3)] if form == "C" else [(width, width, 3, 3)] * 2
        assert [tuple(s) for s in shapes] == expected


# ---------------------------------------------------------------------------- forms A, B, C

NETWORKS = {  # stages, options, image size
    "cifar": ((2, 1, 1), {"stem": "cifar"}, 12),
    "cifar-preactivation": ((2, 1, 1), {"stem": "cifar", "preactivation": True}, 12),
    "imagenet": ((1, 1, 1, 1), {"shortcut": "C"}, 36),
    "imagenet-preactivation": ((1, 2, 1, 1), {"preactivation": True, "shortcut": "A"}, 36),
}


@pytest.mark.parametrize("network", NETWORKS)
def test_forms_compute_the_same_function(network):
    stages, options, size = NETWORKS[network]
    x = images(2, 3, size, size)
    original = random_model(stages, 4, 6, 7, **options)
    start = {k: v.clone() for k, v in original.state_dict().items()}
    logits, expected = gradients(original, x)
    after = original.state_dict()
    with torch.no_grad():
        evaluated = original.eval()(x)
    for form in "AB":
        model = ResNeXt(stages, 4, 6, 7, form=form, **options).double()
        model.load_state_dict(convert_form(start, 4, "C", form))
        ours, found = gradients(model, x)
        assert error(ours, logits) < 1e-12
        found = convert_form(found, 4, form, "C")
        assert found.keys() == expected.keys()
        assert all(error(found[k], expected[k]) < 1e-10 for k in expected)
        buffers = convert_form(model.state_dict(), 4, form, "C")
        assert buffers.keys() == after.keys()
        assert all(error(buffers[k].double(), after[k].double()) < 1e-12 for k in after)
        with torch.no_grad():
            assert error(model.eval()(x), evaluated) < 1e-12


@pytest.mark.parametrize("source, target", [(a, b) for a in "ABC" for b in "ABC"])
@pytest.mark.parametrize("network", NETWORKS)
def test_conversions_round_trip_and_copy(network, source, target):
    stages, options, _ = NETWORKS[network]
    state = random_model(stages, 4, 6, 7, form=source, **options).state_dict()
    before = {k: v.clone() for k, v in state.items()}
    there = convert_form(state, 4, source, target)
    with META:
        expected = ResNeXt(stages, 4, 6, 7, form=target, **options).state_dict()
    assert {k: v.shape for k, v in there.items()} == {k: v.shape for k, v in expected.items()}
    back = convert_form(there, 4, target, source)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[k], state[k]) for k in state)
    pointers = {v.untyped_storage().data_ptr() for v in there.values()}
    assert len(pointers) == len(there), "two tensors share memory"
    for value in there.values():
        value.fill_(9)
    assert all(torch.equal(v, before[k]) for k, v in state.items())


def test_conversion_arranges_paths():
    """Path i: rows i·D...(i+1)·D of form C's 1x1 and 3x3, and those columns of the last 1x1."""
    state = random_model((1, 1, 1), 4, 6, 3, stem="cifar").state_dict()
    paths = convert_form(state, 4, "C", "A")
    for i in range(4):
        rows = slice(i * 12, (i + 1) * 12)
        for leaf in ("conv1.weight", "bn1.bias", "conv2.weight", "bn2.running_var"):
            assert torch.equal(paths[f"layer2.0.paths.{i}.{leaf}"], state[f"layer2.0.{leaf}"][rows])
        last = state["layer2.0.conv3.weight"]
        assert torch.equal(paths[f"layer2.0.paths.{i}.conv3.weight"], last[:, rows])
    assert "layer2.0.conv3.weight" in convert_form(state, 4, "C", "B")


# ---------------------------------------------------------------------------- initialization


@pytest.mark.parametrize("form", "ABC")
@pytest.mark.parametrize("preactivation", [False, True])
@pytest.mark.parametrize("stem", ["cifar", "imagenet"])
def test_initialization(stem, form, preactivation):
    torch.manual_seed(11)
    stages = (1, 1, 1) if stem == "cifar" else (1, 1, 1, 1)
    model = ResNeXt(stages, 4, 16, 100, stem=stem, form=form, preactivation=preactivation)
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            assert module.bias is None
            values = module.weight.detach().double().flatten()
            outputs, _, height, width = module.weight.shape
            scaled = values / math.sqrt(2 / (height * width * outputs))
            n = scaled.numel()  # 5 standard errors of mean, variance and fourth moment of N(0, 1)
            assert abs(scaled.mean()) < 5 / math.sqrt(n), name
            assert abs(scaled.square().mean() - 1) < 5 * math.sqrt(2 / n), name
            assert abs(scaled.pow(4).mean() - 3) < 5 * math.sqrt(96 / n), name
        elif isinstance(module, nn.BatchNorm2d):
            assert (module.weight == 1).all() and (module.bias == 0).all(), name
            assert (module.running_mean == 0).all() and (module.running_var == 1).all()
            assert (module.eps, module.momentum) == (1e-5, 0.1)
        elif isinstance(module, nn.Linear):
            bound = 1 / math.sqrt(module.in_features)
            values = module.weight.detach().double() / bound
            assert (module.bias == 0).all()
            assert 0.999 < values.abs().max() <= 1
            assert abs(values.mean()) < 5 / math.sqrt(3 * values.numel())
            assert abs(values.square().mean() - 1 / 3) < 5 * math.sqrt(4 / 45 / values.numel())


def test_initialization_follows_the_seed():
    weights = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        weights.append(ResNeXt((1, 1, 1), 2, 4, 10, stem="cifar").conv1.weight)
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


@pytest.mark.parametrize("form", "ABC")
def test_zero_gamma_starts_blocks_as_their_shortcut(form):
    model = ResNeXt((2, 1, 1), 2, 4, 10, stem="cifar", form=form, zero_gamma=True)
    norms = {n: m for n, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)}
    for name, norm in norms.items():
        assert (norm.weight == (0 if name.endswith("bn3") else 1)).all(), name
    x = torch.rand(2, 256, 6, 6)
    assert torch.equal(model.layer1[1](x), x)


# ---------------------------------------------------------------------------- how it runs


@pytest.mark.parametrize("preactivation", [False, True])
@pytest.mark.parametrize(
    "stages, stride, sizes",
    [((1, 1, 1), 4, ((1, 1), (15, 22), (40, 64))), ((1, 1, 1, 1), 32, ((32, 32), (33, 70), (224, 224)))],
    ids=["cifar", "imagenet"],
)
def test_images_of_any_size(stages, stride, sizes, preactivation):
    stem = "cifar" if len(stages) == 3 else "imagenet"
    model = ResNeXt(stages, 2, 4, 5, stem=stem, preactivation=preactivation).eval()
    for size in sizes:
        x = torch.rand(2, 3, *size)
        assert model(x).shape == (2, 5) and model(x).isfinite().all()
        channels = 128 * 2 ** len(stages)
        assert model.forward_features(x).shape == (2, channels, *(-(-side // stride) for side in size))


@pytest.mark.parametrize("preactivation", [False, True])
@pytest.mark.parametrize("form", "ABC")
def test_input_does_not_change(form, preactivation):
    """ReLU works in place, but neither the input nor a shortcut's operand may change."""
    x = torch.randn(2, 3, 10, 10)
    before = x.clone()
    model = ResNeXt((1, 1, 1), 2, 4, 5, stem="cifar", form=form, preactivation=preactivation)
    model(x)
    assert torch.equal(x, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("form", "ABC")
def test_activation_checkpointing_changes_no_bit(network, form, dtype):
    stages, options, size = NETWORKS[network]
    x = images(2, 3, size, size).to(dtype)
    results = []
    for checkpointing in (False, True):
        model = random_model(stages, 2, 6, 7, form=form, **options).to(dtype)
        model.activation_checkpointing = checkpointing
        for _ in range(2):
            logits, found = gradients(model, x)
        results.append({"logits": logits, **found, **dict(model.named_buffers())})
    plain, recomputed = results
    assert plain.keys() == recomputed.keys()
    assert all(torch.equal(plain[k], recomputed[k]) for k in plain)
    assert plain["fc.weight"].abs().max() > 0
    counts = [v for k, v in recomputed.items() if k.endswith("num_batches_tracked")]
    assert counts and all(c == 2 for c in counts)


def test_activation_checkpointing_keeps_fewer_activations():
    """Only the inputs of blocks are kept between the passes."""
    kept = {}
    for checkpointing in (False, True):
        model = random_model((2, 2, 2), 2, 8, 7, stem="cifar")
        model.activation_checkpointing = checkpointing
        sizes = []

        def pack(tensor, sizes=sizes):
            sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            model(images(2, 3, 12, 12))
        kept[checkpointing] = sum(sizes)
    assert kept[True] < kept[False] / 3


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("form", "ABC")
def test_channels_last_agrees(network, form):
    stages, options, size = NETWORKS[network]
    x = images(2, 3, size, size)
    plain, expected = gradients(random_model(stages, 2, 6, 7, form=form, **options), x)
    model = random_model(stages, 2, 6, 7, form=form, **options).to(memory_format=torch.channels_last)
    logits, found = gradients(model, x.to(memory_format=torch.channels_last))
    assert error(logits, plain) < 1e-12
    assert all(error(found[k], expected[k]) < 1e-10 for k in expected)


# ---------------------------------------------------------------------------- names and arguments

IMAGENET_NAMES = ("resnet50", "resnet101", "resnext50_32x4d", "resnext101_32x4d", "resnext101_32x8d")
IMAGENET_NAMES += ("resnext101_64x4d", "resnext152_32x4d", "resnet18", "resnet34", "resnet152")
CIFAR_NAMES = ("resnext29_8x64d", "resnext29_16x64d", "resnet20", "resnet32", "resnet44", "resnet56")
CIFAR_NAMES += ("resnet110", "resnet1202")
NAMED = {  # parameters with 1000 or 10 classes
    **{name: CONFIG_COUNTS[name][0] for name in IMAGENET_NAMES},
    **{name: CONFIG_COUNTS[f"cifar10_{name}"][0] for name in CIFAR_NAMES},
    "resnet200": 64_673_832,  # timm's
}


def test_every_exported_name_can_be_imported():
    expected = {"ResNeXt", "build_model", "convert_form", "load_weights", "UserError", *NAMED}
    assert set(resnext.__all__) == expected
    namespace = {}
    for name in resnext.__all__:
        exec(f"from resnext import {name}", namespace)
        assert callable(namespace[name])
    with pytest.raises(ImportError):
        exec("from resnext import resnext51")
    with pytest.raises(AttributeError, match="resnext51"):
        _ = importlib.import_module("resnext").resnext51


def test_named_networks():
    with META:
        for name, parameters in NAMED.items():
            model = getattr(resnext, name)(classes=10 if name in CIFAR_NAMES else 1000)
            assert sum(p.numel() for p in model.parameters()) == parameters, name
        model = resnext.resnext50_32x4d(classes=7, form="B", shortcut="C", preactivation=True)
    assert model.fc.out_features == 7 and len(model.layer1[0].paths) == 32
    assert len(model.layer1[1].downsample) == 1 and model.final_bn is not None


def test_build_model_follows_the_configuration():
    bottleneck = partial(ModelConfig, block_type="bottleneck")
    options = {"cardinality": 3, "base_width": 5, "block": "A", "shortcut": "C", "zero_gamma": True}
    config = bottleneck(stem="cifar", stages=(1, 2, 1), **options)
    model = build_model(config, 6)
    same = ResNeXt((1, 2, 1), 3, 5, 6, stem="cifar", form="A", shortcut="C", zero_gamma=True)
    assert str(model) == str(same) and (model.layer2[1].bn3.weight == 0).all()
    config = bottleneck(stages=(1, 1, 1, 2), cardinality=1, base_width=64, shortcut="B", preactivation=True)
    same = ResNeXt((1, 1, 1, 2), 1, 64, 5, preactivation=True)
    assert str(build_model(config, 5)) == str(same)


@pytest.mark.parametrize(
    "word, arguments",
    [
        ("stem", {"stem": "mnist"}),
        ("form", {"form": "D"}),
        ("block_type", {"block_type": "wide"}),
        ("basic", {"block_type": "basic"}),
        ("basic", {"block_type": "basic", "cardinality": 1, "form": "B"}),
        ("shortcut", {"shortcut": "identity"}),
        *(("number of stages", {"stages": stages}) for stages in ((1, 1, 1), ())),
        ("number of stages", {"stem": "cifar"}),
        ("blocks of a stage", {"stages": (1, 0, 1, 1)}),
        *((name, {name: 0}) for name in ("cardinality", "base_width")),
        ("classes", {"classes": -1}),
    ],
)
def test_wrong_arguments(word, arguments):
    with pytest.raises(UserError, match=word):
        ResNeXt(**arguments)


def test_wrong_conversions():
    for source, target in (("C", "D"), ("c", "A"), ("", "B"), ("C", "AB")):
        with pytest.raises(UserError, match="forms are A, B and C"):
            convert_form({}, 2, source, target)
    state = ResNeXt((1, 1, 1), 4, 4, 3, stem="cifar").state_dict()
    with pytest.raises(UserError, match="16 channels do not make 5 paths"):
        convert_form(state, 5, "C", "B")
