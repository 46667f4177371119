"""What only a GPU can show: half precision, no waiting in the step, the CPU's counts, exact resume."""

import copy
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from commands import draw_folders

from data.loader import eval_batches, train_batches
from data.sets import load_set
from resnext.config import parse_config
from resnext.distributed import set_numerics
from resnext.evaluation import evaluate
from resnext.state import autocast, prepare
from resnext.trainer import train_step

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
ROOT = Path(__file__).resolve().parent.parent
SMALL = [
    "model.stem=cifar",
    "model.depth=11",
    "model.cardinality=8",
    "model.base_width=8",
    "data.dataset=glyphs",
    "data.train_images=512",
    "data.val_images=101",
    "train.batch_size=64",
]


def training_on(device: str, *overrides: str):
    config = parse_config("", "test", [*SMALL, *overrides])
    set_numerics(config.train.precision, config.run.deterministic)
    training = prepare(config, tuple("0123456789"), torch.device(device), {})
    training.model.train()
    return training


def batches_for(training, split: str = "train"):
    config = training.config
    images = load_set(config.data, split)
    if split == "val":
        return eval_batches(images, config.data, config.train.eval_batch_size, training.device)
    return train_batches(images, config, training.device)


@pytest.mark.parametrize("compiled", ["false", "true"])
@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16", "fp16"])
def test_training_lowers_the_loss(precision, compiled):
    training = training_on("cuda", f"train.precision={precision}", f"train.compile={compiled}")
    batches = batches_for(training)
    losses = [
        train_step(training, images, labels, 0.05)[0].item()
        for epoch in range(1, 9)
        for images, labels in batches.epoch(epoch)
    ]
    assert sum(losses[-8:]) < 0.8 * sum(losses[:8])


AUGMENTED = ("augment.erasing=0.5", "augment.mixup=0.2", "augment.cutmix=1")
FILES = ("data.dataset=folder", "data.pipeline=fast", "data.image_size=32", "data.workers=2")


@pytest.mark.parametrize(
    "extra",
    [(), AUGMENTED, (*FILES, *AUGMENTED), ("train.accumulation_steps=2", "train.bn_group=16")],
    ids=["plain", "augmented", "files", "parts"],
)
def test_a_step_never_waits_for_the_device(extra, tmp_path):
    draw_folders(tmp_path, dict.fromkeys("0123456789", 20), size=50)
    extra = (*extra, f"data.dir={tmp_path}")
    training = training_on("cuda", "train.precision=bf16", "train.ema_decay=0.9", *extra)
    batches = batches_for(training)
    for images, labels in batches.epoch(1):
        train_step(training, images, labels, 0.01)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for images, labels in batches.epoch(2):
            train_step(training, images, labels, 0.01)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_evaluation_counts_are_those_of_the_cpu():
    on_gpu, on_cpu = training_on("cuda"), training_on("cpu")
    for images, labels in batches_for(on_gpu).epoch(1):
        train_step(on_gpu, images, labels, 0.05)
    on_cpu.model.load_state_dict(copy.deepcopy(on_gpu.model.state_dict()))
    scores = [
        evaluate(t.model, batches_for(t, "val"), lambda t=t: autocast(t.device, "fp32"))
        for t in (on_gpu, on_cpu)
    ]
    assert scores[0].images == scores[1].images == 101
    assert (scores[0].top1_errors, scores[0].top5_errors) == (scores[1].top1_errors, scores[1].top5_errors)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_resume_is_bit_exact_in_deterministic_mode(tmp_path, precision):
    settings = [
        *SMALL,
        f"train.precision={precision}",
        "train.epochs=4",
        "run.device=cuda",
        "run.deterministic=true",
        "run.log_interval=2",
    ]

    def command(name: str, *arguments: str) -> list[str]:
        script = [sys.executable, str(ROOT / "train.py"), "--config", "demo.yaml", *settings, *arguments]
        return [*script, "--output", str(tmp_path / name)]

    subprocess.run(command("whole"), check=True, timeout=300)
    process = subprocess.Popen(command("stopped"))
    metrics = tmp_path / "stopped" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if metrics.exists() and metrics.read_bytes().count(b"\n") >= 3:
            process.send_signal(signal.SIGTERM)
            break
        time.sleep(0.005)
    assert process.wait(timeout=60) == 0
    subprocess.run(command("stopped", "--resume"), check=True, timeout=300)
    states, rows = [], []
    for name in ("whole", "stopped"):
        content = torch.load(tmp_path / name / "checkpoints" / "last.pt", weights_only=True)
        states.append(content["model"])
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        rows.append([{k: v for k, v in json.loads(line).items() if k != "time"} for line in lines])
    assert rows[0] == rows[1]
    assert all(torch.equal(states[0][k].cpu(), states[1][k].cpu()) for k in states[0])


def test_files_make_the_same_batches_as_on_a_cpu(tmp_path):
    """Copies on a side stream, mirror, colours and mixing: the pixels of the CPU to rounding."""
    draw_folders(tmp_path, {"cat": 20, "dog": 20}, size=50)
    keys = ["data.pipeline=fast", f"data.dir={tmp_path}", "data.image_size=32", "data.workers=2"]
    more = ["train.batch_size=8", "augment.erasing=0.5", "augment.mixup=0.2", "augment.cutmix=1"]
    config = parse_config("", "test", [*keys, *more])
    files = load_set(config.data, "train")
    host, device = (
        list(train_batches(files, config, torch.device(kind), print).epoch(1)) for kind in ("cpu", "cuda")
    )
    for (images, labels), (images_there, labels_there) in zip(host, device, strict=True):
        torch.testing.assert_close(images_there.cpu(), images, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(labels_there.cpu(), labels)
    host, device = (list(eval_batches(files, config.data, 8, torch.device(kind))) for kind in ("cpu", "cuda"))
    for (images, labels), (images_there, labels_there) in zip(host, device, strict=True):
        assert torch.equal(images_there.cpu(), images) and torch.equal(labels_there.cpu(), labels)
