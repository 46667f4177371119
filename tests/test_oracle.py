"""Agreement with the original: numbers computed by the Lua code, in double precision.

Networks (one training step's forward and backward, then evaluation), a four-epoch training
through the project's own step, rates and counts, learning rates, error counts, and the CIFAR
transforms. golden/make.py says how the numbers were trimmed.
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
from resnext.config import STATISTICS, ScheduleConfig, parse_config
from resnext.engine.evaluator import count_correct, evaluate, sum_crops
from resnext.engine.train_state import MetricSums, autocast, build_train_state, init_momentum
from resnext.engine.trainer import train_step
from resnext.models.resnext import build_model
from resnext.schedule import learning_rate

FACTS = golden("oracle.json")
CPU = torch.device("cpu")
STRICT = 1e-10


# ---------------------------------------------------------------------------- networks


def configuration(options, more=""):
    """The project's configuration for the original's options."""
    resnet = options["bottleneckType"] == "resnet"
    return parse_config(
        f"""
        model:
            stem: {"imagenet" if options["dataset"] == "imagenet" else "cifar"}
            architecture: {"resnet" if resnet else "resnext"}
            depth: {options["depth"]}
            cardinality: {options["cardinality"]}
            base_width: {options["baseWidth"]}
            block: {"C" if resnet else options["bottleneckType"].removeprefix("resnext_")}
            shortcut: {options["shortcutType"]}
        data: {{dataset: {options["dataset"].replace("imagenet", "folder")}}}
        {more}
        """,
        "test",
    )


class Case:
    """One network, filled by the formula and run: training-mode forward, backward, evaluation."""

    def __init__(self, name):
        facts = FACTS["models"][name]
        self.name, self.facts, self.theirs = name, facts, golden(f"{name}.npz")
        self.model = build_model(configuration(facts["options"]).model, facts["n_classes"]).double()
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


def test_parameter_shapes(case):
    shapes = [list(p.shape) for p in case.model.parameters()]
    assert shapes == case.facts["parameter_shapes"]


def test_training_logits_and_loss(case):
    assert relative_error(case.logits_train, case.theirs["logits_train"]) < STRICT
    assert case.loss == pytest.approx(case.facts["loss_train"], rel=STRICT)


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
    """Norms, sums and projections, relative to the norms; a sum of n elements to norm · sqrt(n)."""
    ours, norms = summary(tensors), theirs[f"{prefix}_norm"]
    roots = np.array([t.numel() for t in tensors]) ** 0.5
    for key, scale in (("norm", norms), ("sum", norms * roots), ("proj", norms)):
        assert relative_error(ours[key], theirs[f"{prefix}_{key}"], scale) < bound, key


def check_pieces(ours, flat, scales, bound):
    """Pieces of `flat` the size of `ours`, each relative to its scale."""
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


def test_evaluation_logits(case):
    assert relative_error(case.logits_eval, case.theirs["logits_eval"]) < STRICT


# ---------------------------------------------------------------------------- a training


@pytest.fixture(scope="module")
def run():
    """The four epochs of the original's training loop, through train_step and evaluate."""
    facts = FACTS["trajectory"]
    options = facts["options"]
    config = configuration(
        options,
        f"""
        train: {{epochs: {options["nEpochs"]}, batch_size: {facts["batch_shape"][0]}}}
        optimizer: {{lr: {options["LR"]}, momentum: {options["momentum"]},
                     weight_decay: {options["weightDecay"]}}}
        schedule: {{name: cifar_step}}
        """,
    )
    training = build_train_state(config, tuple("0123456789"), CPU, {})
    training.model.double()
    init_momentum(training.optimizer)
    fill_parameters(training.model)
    logits = []
    training.model.register_forward_hook(lambda module, inputs, output: logits.append(output.detach()))
    batches = [
        (network_input(facts["batch_shape"], b["input_offset"]), torch.tensor(b["target"]) - 1)
        for b in [*facts["train_batches"], facts["eval_batch"]]
    ]
    epochs = []
    for epoch in range(1, config.train.epochs + 1):
        training.model.train()
        rate = learning_rate(config.schedule, config.optimizer.lr, config.train.epochs, epoch)
        sums, losses = MetricSums(), []
        for images, labels in batches[:-1]:
            loss, top1, top5 = train_step(training, images, labels, rate).tolist()
            sums.add(loss, top1, top5, len(labels))
            losses.append(loss)
        score = evaluate(training.model, batches[-1:], training.autocast)
        epochs.append(
            {
                "lr": rate,
                "losses": losses,
                "train": sums.as_row(),
                "test": score.as_row(),
                "logits": [x.clone() for x in logits],
                "statistics": running_statistics(training.model),
            }
        )
        logits.clear()
    return training, epochs


LOOSE = 1e-9
EPOCHS = range(1, 5)


@pytest.mark.parametrize("epoch", EPOCHS)
def test_trajectory_losses_and_errors(run, epoch):
    ours, theirs = run[1][epoch - 1], FACTS["trajectory"]["epochs"][epoch - 1]
    assert ours["lr"] == theirs["lr"]
    assert ours["losses"] == pytest.approx(theirs["losses"], rel=LOOSE)
    for split in ("train", "test"):
        for name, key in (("top1_error", "top1"), ("top5_error", "top5"), ("loss", "loss")):
            assert ours[split][name] == pytest.approx(theirs[f"{split}_{key}"], rel=LOOSE)


@pytest.mark.parametrize("epoch", EPOCHS)
def test_trajectory_logits_and_statistics(run, epoch):
    ours, theirs = run[1][epoch - 1], golden("trajectory.npz")
    *train, test = ours["logits"]
    for number, logits in enumerate(train, 1):
        assert relative_error(logits, theirs[f"train_logits_epoch{epoch}_iter{number}"]) < LOOSE
    assert relative_error(test, theirs[f"eval_logits_epoch{epoch}"]) < LOOSE
    means, variances = ours["statistics"]
    assert statistics_error(means, theirs[f"bn_mean_epoch{epoch}"]) < LOOSE
    assert statistics_error(variances, theirs[f"bn_var_epoch{epoch}"]) < LOOSE


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


class SumCrops(torch.nn.Module):
    def __init__(self, crops):
        super().__init__()
        self.crops = crops

    def forward(self, x):
        return sum_crops(x, self.crops)


@pytest.mark.parametrize("case", golden("compute_score.json"))
def test_error_counts(case):
    output = torch.tensor(case["output"], dtype=torch.float64)
    labels = torch.tensor(case["target"]) - 1
    expected = [round(len(labels) * (1 - case[key] / 100)) for key in ("top1", "top5")]
    assert count_correct(sum_crops(output, case["nCrops"]), labels).tolist() == expected
    model = SumCrops(case["nCrops"])
    score = evaluate(model, [(output, labels)], lambda: autocast(CPU, "fp32"))
    assert score.top1_error == pytest.approx(case["top1"], rel=1e-14)
    assert score.top5_error == pytest.approx(case["top5"], rel=1e-14)


# ---------------------------------------------------------------------------- CIFAR transforms


@pytest.fixture(params=["cifar10", "cifar100"])
def pictures(request):
    """(name, uint8 pictures (8, 32, 32, 3), mean, std)"""
    offset = FACTS["cifar"][request.param]["pixel_offset"]
    i = np.arange(8 * 3 * 32 * 32) + offset
    pixels = ((i % 4093 * 2654435761) % 2**32 >> 16 & 255).astype(np.uint8).reshape(8, 3, 32, 32)
    mean, std = (torch.tensor(values) for values in STATISTICS[request.param])
    return request.param, torch.from_numpy(pixels).permute(0, 2, 3, 1).contiguous(), mean, std


def test_cifar_training_transform(pictures):
    name, images, mean, std = pictures
    draws = FACTS["cifar"][name]["draws"]
    mirrored, x, y = (torch.tensor([d[i]["value"] for d in draws]) for i in range(3))
    ours = cifar_crop(images, mirrored < 0.5, x, y, 4, mean, std)
    theirs = golden("cifar_transforms.npz")[f"{name}_train"]
    assert (mirrored < 0.5).any() and (mirrored >= 0.5).any() and (x != y).all()
    assert np.abs(ours.numpy() - theirs).max() < 1e-6


def test_cifar_validation_transform(pictures):
    name, images, mean, std = pictures
    theirs = golden("cifar_transforms.npz")[f"{name}_val"]
    assert np.abs(normalize(images, mean, std).numpy() - theirs).max() < 1e-6


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
