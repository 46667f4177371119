"""Agreement with the original: numbers computed by the Lua code, in double precision.

Networks (forward and backward pass of one step, then evaluation), four epochs of training through the
project's own step, learning rates, error counts, and the CIFAR transforms. golden/make.py says how the
numbers were trimmed.
"""

import importlib.util

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from oracle import (
    GOLDEN,
    SHARED,
    batch_norms,
    fill_parameters,
    fill_running_statistics,
    golden,
    h,
    network_input,
    relative_error,
    running_statistics,
    split_like,
    statistics_error,
    summary,
)

from data.augment import cifar_crop, normalize
from resnext.config import STATISTICS, ScheduleConfig, read_config
from resnext.engine.evaluator import count_correct, evaluate, sum_crops
from resnext.engine.train_state import MetricSums, autocast, build_train_state, init_momentum
from resnext.engine.trainer import train_step
from resnext.models.resnext import build_model
from resnext.schedule import learning_rate

FACTS = golden("oracle.json")
CPU = torch.device("cpu")
STRICT, LOOSE = 1e-10, 1e-9  # of one step, of a training


# ---------------------------------------------------------------------------- networks


def configure(options, *more):
    """Return the project's configuration for the original's options."""
    kind = options["bottleneckType"]
    resnet, basic = kind in ("resnet", "basic"), kind == "basic"
    settings = {
        "model.stem": "imagenet" if options["dataset"] == "imagenet" else "cifar",
        "model.architecture": "resnet" if resnet else "resnext",
        "model.depth": options["depth"],
        "model.block_type": "basic" if basic else "bottleneck",
        "model.cardinality": options.get("cardinality", "null"),
        "model.base_width": options.get("baseWidth", "null"),
        "model.block": "C" if resnet else kind.removeprefix("resnext_"),
        "model.preactivation": str(options.get("preactivation", False)).lower(),
        "model.shortcut": options["shortcutType"],
        "data.dataset": options["dataset"].replace("imagenet", "folder"),
    }
    return read_config(None, [*(f"{key}={value}" for key, value in settings.items()), *more])


class Case:
    """One network, filled by the formula and run: training-mode forward, backward, evaluation."""

    def __init__(self, name):
        facts = FACTS["models"][name]
        self.facts, self.theirs = facts, golden(f"{name}.npz")
        self.model = build_model(configure(facts["options"]).model, facts["n_classes"]).double()
        fill_parameters(self.model)
        fill_running_statistics(self.model)
        images = network_input(facts["input"]["shape"], facts["input"]["offset"])
        labels = torch.tensor(facts["labels_1based"]) - 1
        logits = self.model.train()(images)
        loss = F.cross_entropy(logits, labels)
        loss.backward()
        self.logits_train, self.loss = logits.detach(), loss.item()
        self.gradients = [p.grad for p in self.model.parameters()]
        self.means, self.variances = running_statistics(self.model)
        with torch.no_grad():
            self.logits_eval = self.model.eval()(images)


@pytest.fixture(scope="module", params=FACTS["models"])
def case(request):
    return Case(request.param)


def test_shapes_logits_and_loss(case):
    assert [list(p.shape) for p in case.model.parameters()] == case.facts["parameter_shapes"]
    assert relative_error(case.logits_train, case.theirs["logits_train"]) < STRICT
    assert case.loss == pytest.approx(case.facts["loss_train"], rel=STRICT)
    assert relative_error(case.logits_eval, case.theirs["logits_eval"]) < STRICT


def test_gradients(case):
    theirs = case.theirs
    check_summaries(case.gradients, theirs, "grad", STRICT)
    # Stored values: small tensors whole, samples of the large ones (every fourth for ImageNet's).
    flat = [g.numpy().ravel() for g in case.gradients]
    samples = [summary([g])["val"] for g in case.gradients]
    norms = list(theirs["grad_norm"])
    if "grad_small" in theirs:
        small = [i for i, g in enumerate(flat) if g.size <= 1024]
        large = [i for i, g in enumerate(flat) if g.size > 1024]
        check_pieces([flat[i] for i in small], theirs["grad_small"], [norms[i] for i in small], STRICT)
        check_pieces([samples[i] for i in large], theirs["grad_val"], [norms[i] for i in large], STRICT)
    else:
        check_pieces([s[::4] for s in samples], theirs["grad_val"], norms, STRICT)


def check_summaries(tensors, theirs, prefix, bound):
    """Compare norms, sums and projections relative to the norms; a sum of n elements to norm · sqrt(n)."""
    ours, norms = summary(tensors), theirs[f"{prefix}_norm"]
    roots = np.array([t.numel() for t in tensors]) ** 0.5
    for key, scale in (("norm", norms), ("sum", norms * roots), ("proj", norms)):
        assert relative_error(ours[key], theirs[f"{prefix}_{key}"], scale) < bound, key


def check_pieces(ours, flat, scales, bound):
    """Compare the pieces of `flat` with `ours`, each relative to its scale."""
    assert sum(o.size for o in ours) == flat.size
    for a, b, scale in zip(ours, split_like(flat, ours), scales, strict=True):
        assert relative_error(a, b, scale) < bound


def test_running_statistics(case):
    for ours, key in ((case.means, "bn_mean_after"), (case.variances, "bn_var_after")):
        if key in case.theirs:
            assert statistics_error(ours, case.theirs[key]) < STRICT
            continue
        norms = case.theirs[f"{key}_norm"]
        assert relative_error([np.linalg.norm(o) for o in ours], norms, norms) < STRICT
        projections = [o @ h(np.arange(o.size)) for o in ours]
        assert relative_error(projections, case.theirs[f"{key}_proj"], norms) < STRICT
        assert statistics_error([o[:4] for o in ours], case.theirs[f"{key}_val"]) < STRICT
    assert all(n.num_batches_tracked == 1 for n in batch_norms(case.model))


# ---------------------------------------------------------------------------- a training


@pytest.fixture(scope="module")
def run():
    """Return the state after the four epochs of the original's training loop, and the facts of each epoch."""
    facts = FACTS["trajectory"]
    options = facts["options"]
    config = configure(
        options,
        "schedule.name=cifar_step",
        f"train.epochs={options['nEpochs']}",
        f"train.batch_size={facts['batch_shape'][0]}",
        f"optimizer.lr={options['LR']}",
        f"optimizer.momentum={options['momentum']}",
        f"optimizer.weight_decay={options['weightDecay']}",
    )
    training = build_train_state(config, tuple("0123456789"), CPU, {})
    training.model.double()
    init_momentum(training.optimizer)
    fill_parameters(training.model)
    logits = []
    training.model.register_forward_hook(
        lambda module, inputs, output: logits.append(output.detach().clone())
    )
    batches = [
        (network_input(facts["batch_shape"], b["input_offset"]), torch.tensor(b["target"]) - 1)
        for b in [*facts["train_batches"], facts["eval_batch"]]
    ]
    epochs = []
    for epoch in range(1, config.train.epochs + 1):
        training.model.train()
        logits.clear()
        rate = learning_rate(config.schedule, config.optimizer.lr, config.train.epochs, epoch)
        found = {"lr": rate, "losses": []}
        sums = MetricSums()
        for images, labels in batches[:-1]:
            loss, top1, top5 = train_step(training, images, labels, rate).tolist()
            sums.add(loss, top1, top5, len(labels))
            found["losses"].append(loss)
        found["test"] = evaluate(training.model, batches[-1:], training.autocast).as_row()
        found |= {
            "train": sums.as_row(),
            "logits": [*logits],
            "statistics": running_statistics(training.model),
        }
        epochs.append(found)
    return training, epochs


@pytest.mark.parametrize("epoch", range(1, 5))
def test_trajectory(run, epoch):
    ours, theirs = run[1][epoch - 1], FACTS["trajectory"]["epochs"][epoch - 1]
    assert ours["lr"] == theirs["lr"]
    assert ours["losses"] == pytest.approx(theirs["losses"], rel=LOOSE)
    for split in ("train", "test"):
        for name, key in (("top1_error", "top1"), ("top5_error", "top5"), ("loss", "loss")):
            assert ours[split][name] == pytest.approx(theirs[f"{split}_{key}"], rel=LOOSE)
    theirs = golden("trajectory.npz")
    *train, test = ours["logits"]
    for number, logits in enumerate(train, 1):
        assert relative_error(logits, theirs[f"train_logits_epoch{epoch}_iter{number}"]) < LOOSE
    assert relative_error(test, theirs[f"eval_logits_epoch{epoch}"]) < LOOSE
    for values, name in zip(ours["statistics"], ("mean", "var"), strict=True):
        assert statistics_error(values, theirs[f"bn_{name}_epoch{epoch}"]) < LOOSE


@pytest.mark.parametrize("group", ["params", "dfdx"])
def test_trajectory_end(run, group):
    training, _ = run
    parameters = list(training.model.parameters())
    if group == "dfdx":
        parameters = [training.optimizer.state[p]["momentum_buffer"] for p in parameters]
    theirs = golden("trajectory.npz")
    check_summaries(parameters, theirs, f"final_{group}", LOOSE)
    pieces = [summary([p])["val"] for p in parameters]
    check_pieces(pieces, theirs[f"final_{group}_val"], theirs[f"final_{group}_norm"], LOOSE)


# ---------------------------------------------------------------------------- rates and errors


@pytest.mark.parametrize(
    "case", golden("learning_rate.json"), ids=lambda c: f"{c['dataset']}-{c['nEpochs']}-{c['LR']}"
)
def test_learning_rates_are_the_same_doubles(case):
    name = "imagenet_step" if case["dataset"] == "imagenet" else "cifar_step"
    ours = [
        learning_rate(ScheduleConfig(name=name), case["LR"], case["nEpochs"], epoch)
        for epoch in range(1, len(case["lr"]) + 1)
    ]
    assert ours == case["lr"]


@pytest.mark.parametrize("case", golden("compute_score.json"))
def test_error_counts(case):
    output = torch.tensor(case["output"], dtype=torch.float64)
    labels = torch.tensor(case["target"]) - 1
    expected = [round(len(labels) * (1 - case[key] / 100)) for key in ("top1", "top5")]
    assert count_correct(sum_crops(output, case["nCrops"]), labels).tolist() == expected
    batches = [(output, labels)]
    score = evaluate(torch.nn.Identity(), batches, lambda: autocast(CPU, "fp32"), crops=case["nCrops"])
    assert score.top1_error == pytest.approx(case["top1"], rel=1e-14)
    assert score.top5_error == pytest.approx(case["top5"], rel=1e-14)


# ---------------------------------------------------------------------------- CIFAR transforms


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar_transforms(name):
    facts, theirs = FACTS["cifar"][name], golden("cifar_transforms.npz")
    i = np.arange(8 * 3 * 32 * 32) + facts["pixel_offset"]
    pixels = ((i % 4093 * 2654435761) % 2**32 >> 16 & 255).astype(np.uint8).reshape(8, 3, 32, 32)
    images = torch.from_numpy(pixels).permute(0, 2, 3, 1).contiguous()
    mean, std = (torch.tensor(values) for values in STATISTICS[name])
    mirrored, x, y = (torch.tensor([draw[i]["value"] for draw in facts["draws"]]) for i in range(3))
    assert (mirrored < 0.5).any() and (mirrored >= 0.5).any() and (x != y).all()
    ours = cifar_crop(images, mirrored < 0.5, x, y, 4, mean, std)
    assert np.abs(ours.numpy() - theirs[f"{name}_train"]).max() < 1e-6
    assert np.abs(normalize(images, mean, std).numpy() - theirs[f"{name}_val"]).max() < 1e-6


# ---------------------------------------------------------------------------- the copies


@pytest.mark.skipif(not SHARED.is_dir(), reason="the complete reference data is not there")
def test_golden_files_are_faithful_copies(tmp_path):
    spec = importlib.util.spec_from_file_location("make_golden", GOLDEN / "make.py")
    make = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make)
    make.main(SHARED, tmp_path)
    for path in tmp_path.iterdir():
        kept = golden(path.name) if path.suffix != ".xz" else None
        if path.suffix == ".json":
            assert kept == golden(path)
        elif path.suffix == ".xz":
            assert (GOLDEN / path.name).read_bytes() == path.read_bytes()
        else:
            fresh = golden(path)
            assert kept.keys() == fresh.keys()
            assert all(np.array_equal(kept[key], fresh[key]) for key in kept), path.name
