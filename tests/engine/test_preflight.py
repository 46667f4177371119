"""train.py --check: what it finds, in which order, and that it leaves nothing behind."""

import io
import math
import multiprocessing
import os
import re
import shlex
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from commands import (
    ROOT,
    Result,
    call,
    draw_folders,
    message,
    snapshot,
    tiny_yaml,
)
from PIL import Image
from torchrun import Ended, Processes, Torchrun

import evaluate
import resnext.engine.train_state
import train
from resnext import preflight
from resnext.config import parse_config
from resnext.engine import checkpoint
from resnext.engine.train_state import build_train_state, checkpoint_content
from resnext.engine.trainer import train_step
from resnext.errors import run_main
from resnext.models.resnext import ResNeXt
from resnext.schedule import learning_rate

# How the findings of a run without fault begin, in their order.
TOPICS = [
    "data: ",
    "first training batch: ",
    "first validation batch: ",
    "output: ",
    "disk: ",
    "shared memory: ",
    "step: ",
    "learning rate: ",
    "time: ",
]
TOPICS_OF_FILES = [*TOPICS[:3], "validation files: ", *TOPICS[3:]]
FILES = {"data__dataset": "folder", "data__pipeline": "fast", "augment__padding": None, "data__workers": "1"}


@pytest.fixture(autouse=True)
def in_own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def checked(*arguments: object, **changes: str) -> Result:
    """`--check` of a tiny run; it must leave every file and folder below the current one as it was."""
    if "--resume" not in arguments:
        Path("tiny.yaml").write_text(tiny_yaml(**changes))
        arguments = ("--config", "tiny.yaml", *arguments)
    before = snapshot(Path(), folders=True)
    result = call(train.main, *arguments, "--check")
    assert snapshot(Path(), folders=True) == before
    assert multiprocessing.active_children() == []
    return well_formed(result)


def well_formed(result: Result) -> Result:
    """Findings, then a sum that agrees with them and with the exit status."""
    lines = result.output.splitlines()
    kinds = [re.fullmatch(r"(ok|warning|error|)  +\S.*", line) for line in lines[:-1]]
    assert all(kinds), result.output + result.error
    errors, warnings = (sum(kind[1] == name for kind in kinds) for name in ("error", "warning"))
    counts = f"{errors} error{'' if errors == 1 else 's'}, {warnings} warning{'' if warnings == 1 else 's'}; "
    assert lines[-1].startswith(("not " if errors else "") + "ready: " + counts), result.output
    assert result.status == (2 if errors else 0)
    return result


def findings(result: Result, kind: str) -> list[str]:
    """The texts of one kind."""
    lines = result.output.splitlines()
    return [line.removeprefix(kind).strip() for line in lines if line.startswith(f"{kind} ")]


def topics(result: Result) -> list[str]:
    """How the findings begin, of those that are ok or warnings."""
    return [
        next((topic for topic in TOPICS_OF_FILES if topic in line), line) for line in findings(result, "ok")
    ]


def only_error(result: Result, *fragments: str) -> str:
    (text,) = findings(result, "error")
    for fragment in fragments:
        assert fragment in text, f"{fragment!r} is not in: {text}"
    return text


# ---------------------------------------------------------------------------- a run without fault


def test_ready():
    result = checked("--output", "out/here")
    assert result.status == 0
    assert result.error == ""
    assert topics(result) == TOPICS
    assert findings(result, "error") == findings(result, "warning") == []
    for text in (
        "data: glyphs, 40 training and 20 validation images, 10 classes of 4 for training\n",
        "first training batch: 16 x 3 x 8 x 8 in ",
        "output: out/here, starting anew",
        "step: 16 images, loss ",
        " for 2 epochs of ",
        "(3 x step ",
        "an estimate",
    ):
        assert text in result.output, text
    assert re.search(r"time: about \d+:[0-5]\d:[0-5]\d for ", result.output)
    command = shlex.split(result.output.splitlines()[-1].partition("start with: ")[2])
    assert command == ["python", "train.py", "--config", "tiny.yaml", "--output", "out/here"]
    assert call(train.main, *command[2:], "train.epochs=1").status == 0


@pytest.mark.parametrize("workers", ["0", "1"])
def test_ready_with_files(workers, tmp_path, monkeypatch):
    """Workers are gone when the step is measured."""
    before = preflight.measure_step
    alive = []

    def measure_step(*arguments):
        alive.extend(multiprocessing.active_children())
        return before(*arguments)

    monkeypatch.setattr(preflight, "measure_step", measure_step)
    draw_folders(tmp_path / "data", {"cat": 7, "dog": 5})
    result = checked("--data", "data", **FILES | {"data__workers": workers, "train__batch_size": "4"})
    assert topics(result) == TOPICS_OF_FILES
    assert "validation files: all 12 can be decoded\n" in result.output
    assert "2 classes of 5 to 7 for training" in result.output
    assert ("1 worker;" if workers == "1" else "no workers;") in result.output
    expected = "enough for 1 worker of each" if workers == "1" else "not needed"
    assert f"shared memory: {expected}" in result.output
    assert alive == []


def test_a_run_that_goes_on(run_copy):
    result = checked("--resume", run_copy, "train.epochs=5")
    assert topics(result) == TOPICS
    assert f"output: {run_copy}, going on from {run_copy}/checkpoints/last.pt" in result.output
    assert " for 3 epochs of " in result.output


@pytest.mark.parametrize(
    "arguments",
    [["--config", "tiny.yaml", "train.epoch=3"], ["--config", "tinny.yaml"], []],
    ids=["key", "config", "none"],
)
def test_command_lines_end_as_ever(arguments):
    Path("tiny.yaml").write_text(tiny_yaml())
    result = call(train.main, *arguments, "--check")
    message(result)
    assert result.output == ""


def test_console_of_ascii_characters(tmp_path, monkeypatch):
    """Names are spelt with escapes, and nothing else is needed."""
    draw_folders(tmp_path / "Bilder–größer", {"cat": 3, "dog": 3})
    (tmp_path / "tiny.yaml").write_text(tiny_yaml(**FILES))
    arguments = ["--config", "tiny.yaml", "--data", "Bilder–größer", "--output", "läuft", "--check"]
    console = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
    monkeypatch.setattr(sys, "stdout", console)
    with pytest.raises(SystemExit) as end:
        run_main(train.main)
    result = well_formed(Result(end.value.code, console.buffer.getvalue().decode("ascii"), ""))
    assert topics(result) == TOPICS_OF_FILES
    assert r"output: l\xe4uft, starting anew" in result.output


# ---------------------------------------------------------------------------- learning rate


def curve(result: Result) -> tuple[list[str], list[str], str]:
    """(labels and rows of the drawing, the line below the axis)."""
    lines = result.output.splitlines()
    start = next(i for i, line in enumerate(lines) if "learning rate: " in line) + 1
    block = lines[start : start + 10]
    assert all(len(line) <= 9 + 72 for line in block)
    rows = [line.partition("|") for line in block[:8]]
    assert all(bar for _, bar, _ in rows)
    assert re.fullmatch(r" +\+-+", block[8])
    width = block[8].count("-")
    return [label.strip() for label, _, _ in rows], [row.ljust(width) for _, _, row in rows], block[9]


def heights(rows: list[str]) -> list[int]:
    """In which row, counted from below, each column has its mark."""
    found = []
    for column in zip(*reversed(rows), strict=True):
        assert column.count("*") == 1
        found.append(column.index("*"))
    return found


def test_curve_of_steps():
    result = checked(
        schedule__name="multistep",
        schedule__milestones="[30, 60]",
        train__epochs="90",
        optimizer__lr="0.1",
    )
    labels, rows, below = curve(result)
    assert labels == ["0.1", "", "", "", "", "", "", "0.001"]
    assert below.split() == ["epoch", "1", "epoch", "90"]
    levels = heights(rows)
    third = len(levels) / 3
    assert sorted(set(levels)) == [0, 1, 7]  # a hundredth, a tenth, all
    assert levels == sorted(levels, reverse=True)
    assert [levels.count(level) for level in (7, 1, 0)] == pytest.approx([third] * 3, abs=1)
    jump = levels.index(1)
    assert all(rows[i][jump] == "|" for i in range(1, 6))


def test_curve_of_a_cosine():
    changes = {"schedule__name": "cosine", "train__epochs": "10", "optimizer__lr": "0.2"}
    labels, rows, below = curve(checked(**changes))
    assert labels[0] == "0.2"
    assert float(labels[-1]) < 0.01
    assert below.split() == ["epoch", "1", "epoch", "10"]
    levels = heights(rows)
    width, steps = len(levels), 30
    config = parse_config(tiny_yaml(**changes), "test")
    done = [column * (steps - 1) // (width - 1) for column in range(width)]
    rates = [learning_rate(config.schedule, 0.2, 10, d // 3 + 1, d % 3, 3) for d in done]
    assert levels == [round((rate - rates[-1]) / (0.2 - rates[-1]) * 7) for rate in rates]
    assert set(levels) == set(range(8))


def test_curve_of_a_warm_up():
    labels, rows, _ = curve(checked(schedule__name="cosine", schedule__warmup_epochs="5", train__epochs="10"))
    levels = heights(rows)
    top = levels.index(7)
    assert levels[: top + 1] == sorted(levels[: top + 1])
    assert levels[top:] == sorted(levels[top:], reverse=True)
    assert top / len(levels) == pytest.approx(0.5, abs=0.1)
    assert labels[0] == "0.01"


def test_curve_of_one_rate():
    labels, rows, _ = curve(checked())
    assert labels == ["0.01", *[""] * 7]
    assert set(heights(rows)) == {7}


# ---------------------------------------------------------------------------- disk and shared memory


def small_disk(monkeypatch, free: Callable[[str], int | None]) -> None:
    """Free bytes by folder; None: what there is."""
    real = shutil.disk_usage

    def usage(folder):
        bytes = free(str(folder))
        return real(folder) if bytes is None else SimpleNamespace(total=1 << 40, used=0, free=bytes)

    monkeypatch.setattr(shutil, "disk_usage", usage)


def needed(**changes: str) -> int:
    config = parse_config(tiny_yaml(**changes), "test")
    return int(preflight.checkpoint_bytes(config, 10) * 1.02) + (1 << 20)


@pytest.mark.parametrize(
    ("changes", "files"),
    [({}, 4), ({"run__keep_every": "7", "train__epochs": "50"}, 11), ({"train__ema_decay": "0.9"}, 4)],
    ids=["plain", "keep_every", "ema"],
)
def test_room_for_checkpoints(changes, files, monkeypatch, tmp_path):
    free = files * needed(**changes)
    small_disk(monkeypatch, lambda folder: None if folder == "/dev/shm" else free)
    assert f"disk: {files} checkpoints of " in checked(**changes).output
    free -= 1
    result = checked(**changes)
    text = only_error(result, f"disk: {files} checkpoints of ", "make room", "--output", str(tmp_path))
    assert ("run.keep_every (7)" in text) == ("run__keep_every" in changes)
    assert topics(result) == [topic for topic in TOPICS if topic != "disk: "]


def test_checkpoints_of_a_run_that_goes_on_are_counted_once(run_copy, monkeypatch):
    files = (run_copy / "checkpoints").glob("*.pt")
    stored = sum({path.stat().st_ino: path.stat().st_size for path in files}.values())
    free = 4 * needed() - stored
    small_disk(monkeypatch, lambda folder: None if folder == "/dev/shm" else free)
    assert checked("--resume", run_copy).status == 0
    free -= 1
    only_error(checked("--resume", run_copy), "disk: ")


@pytest.mark.parametrize(
    "changes",
    [[], ["train.ema_decay=0.9"], ["optimizer.momentum=0", "optimizer.nesterov=false"]],
    ids=["plain", "ema", "no momentum"],
)
def test_bytes_of_a_checkpoint(changes):
    config = parse_config(tiny_yaml(), "test", changes)
    training = build_train_state(config, tuple("0123456789"), torch.device("cpu"), {})
    train_step(training, torch.randn(4, 3, 8, 8), torch.arange(4), 0.01)
    content = checkpoint_content(training)
    rest = checkpoint._tensor_bytes(content["rng"]) + (8 if training.ema else 0)  # the average's counter
    assert preflight.checkpoint_bytes(config, 10) == checkpoint._tensor_bytes(content) - rest


def test_too_little_shared_memory(monkeypatch, tmp_path):
    """The pictures are looked at all the same."""
    draw_folders(tmp_path / "data", {"cat": 3, "dog": 3})
    small_disk(monkeypatch, lambda folder: 100 if folder == "/dev/shm" else None)
    result = checked("--data", "data", **FILES)
    only_error(result, "data.workers: 1 workers need", "lower data.workers", "--shm-size")
    assert topics(result) == [topic for topic in TOPICS_OF_FILES if topic != "shared memory: "]
    assert result.output.index("disk: ") < result.output.index("data.workers: ")
    assert "6 x 3 x 8 x 8" in result.output


# ---------------------------------------------------------------------------- the run directory


@pytest.mark.parametrize("content", ["run", "thesis"])
def test_output_in_use(content, run_copy):
    if content == "thesis":
        shutil.rmtree(run_copy)
        run_copy.mkdir()
        (run_copy / "thesis.tex").write_text("mine")
    result = checked("--output", run_copy)
    only_error(result, f"--output {run_copy}: is in use already", "--resume", "--output")
    assert topics(result) == [topic for topic in TOPICS if topic != "output: "]


def test_output_below_a_file():
    Path("file").write_text("mine")
    only_error(checked("--output", "file/out"), "--output file/out: cannot be created", "choose another")


def test_checkpoint_of_another_network(run_copy):
    result = checked("--resume", run_copy, "model.cardinality=2")
    only_error(result, "model.cardinality: the checkpoint has 1", "start another run")
    assert "time: about" in result.output


def test_weights_to_start_from_are_missing():
    only_error(
        checked(model__pretrained="nowhere.pt"), "nowhere.pt: no such run directory or file of weights"
    )


# ---------------------------------------------------------------------------- data


def test_no_data():
    """All that needs no pictures is checked."""
    result = checked("--data", "nowhere", "model.classes=3", **FILES)
    only_error(result, f"data.dir {Path.cwd() / 'nowhere'}: no such folder", "--data DIR")
    assert result.output.startswith("error")
    assert topics(result) == ["output: ", "disk: ", "step: ", "learning rate: "]
    assert "16 images of noise" in result.output
    assert [text.partition(":")[0] for text in findings(result, "warning")] == ["shared memory", "time"]


def test_no_data_and_output_in_use(run_copy):
    result = checked("--data", "nowhere", "--output", run_copy, **FILES)
    first, second = findings(result, "error")
    assert "is in use already" in first, "the checkpoint, whose classes the data is to have, comes first"
    assert f"data.dir {Path.cwd() / 'nowhere'}: no such folder" in second
    assert result.output.splitlines()[-1].startswith("not ready: 2 errors, 2 warnings; ")


def test_download_is_left_to_the_training():
    result = checked("--data", "datasets", data__dataset="cifar10", data__image_size="32")
    assert result.status == 0
    text, time = findings(result, "warning")
    assert f"data.dir {Path.cwd() / 'datasets'}: cifar10 is missing" in text
    assert "--data DIR" in text
    assert time.startswith("time: not estimated")
    assert not Path("datasets").exists()


@pytest.mark.parametrize("workers", ["0", "1"])
@pytest.mark.parametrize("split", ["train", "val"])
def test_broken_picture(split, workers, tmp_path):
    for path in sorted((draw_folders(tmp_path / "data", {"cat": 2, "dog": 2}) / split).rglob("*.png"))[:1]:
        path.write_bytes(path.read_bytes()[:-60])
    result = checked("--data", "data", **FILES | {"data__workers": workers})
    only_error(result, f"{tmp_path}/data/{split}/cat/0.png: cannot be decoded", "replace or remove the file")
    val = ("first validation batch: ", "validation files: ")
    lost = ("first training batch: ",) if split == "train" else val
    assert topics(result) == [topic for topic in TOPICS_OF_FILES if topic not in (*lost, "time: ")]
    assert ("of noise" in result.output) == (split == "train")


@pytest.mark.parametrize("workers", ["0", "1"])
@pytest.mark.parametrize("skip", ["false", "true"])
def test_broken_picture_behind_the_first_batches(skip, workers, tmp_path, monkeypatch):
    """It would end the training after an epoch of hours; found once, wherever it lies, and never skipped."""
    monkeypatch.setattr(preflight, "MEASURING", 0)
    path = draw_folders(tmp_path / "data", {"cat": 2, "dog": 7}) / "val" / "dog" / "6.png"
    path.write_bytes(path.read_bytes()[:-60])
    changes = {"data__workers": workers, "data__skip_broken": skip, "train__eval_batch_size": "2"}
    result = checked("--data", "data", **FILES | changes)
    only_error(result, f"{path}: cannot be decoded", "replace or remove the file")
    assert topics(result) == [topic for topic in TOPICS_OF_FILES if topic != "validation files: "]


def test_broken_picture_that_may_be_skipped(tmp_path):
    path = draw_folders(tmp_path / "data", {"cat": 2, "dog": 2}) / "train" / "cat" / "0.png"
    path.write_bytes(path.read_bytes()[:-60])
    result = checked("--data", "data", **FILES | {"data__skip_broken": "true"})
    assert result.status == 0
    (text,) = findings(result, "warning")
    assert text.startswith(f"1 broken files skipped so far: {path}: cannot be decoded")


def test_broken_picture_of_a_set_in_memory(tmp_path):
    (draw_folders(tmp_path / "data", {"cat": 2, "dog": 2}) / "train" / "dog" / "9.png").touch()
    result = checked("--data", "data", data__dataset="folder")
    only_error(result, "data/train/dog/9.png: cannot be decoded")
    assert "step: 16 images of noise" in result.output


@pytest.mark.parametrize(
    ("changes", "kind", "fragments"),
    [
        (["data.mean=[0.5, 0.5, 0.5]", "data.std=[0.25, 0.25, 0.25]"], "warning", ["pixel values 0...255"]),
        (["data.std=[1e-45, 1e-45, 1e-45]"], "error", ["not finite"]),
    ],
)
def test_implausible_pixels(changes, kind, fragments):
    texts = findings(checked(*changes), kind)
    assert len(texts) >= 2
    for text in texts[:2]:
        assert all(fragment in text for fragment in ["batch: ", "data.mean and data.std", *fragments])


def test_pictures_of_one_colour(tmp_path):
    for path in draw_folders(tmp_path / "my data", {"cat": 2, "dog": 2}).rglob("*.png"):
        Image.new("RGB", (8, 8), (130, 130, 130)).save(path)
    statistics = {"data__mean": "[128, 128, 128]", "data__std": "[64, 64, 64]"}
    result = checked("--data", "my data", data__dataset="folder", augment__padding="0", **statistics)
    look = f"look at the pictures (python scripts/check_data.py '{tmp_path}/my data')"
    texts = findings(result, "warning")
    assert len(texts) == 2
    assert all("all pixels are the same" in text and look in text for text in texts)


def test_classes_without_images():
    (text,) = findings(checked(data__val_images="7"), "warning")
    assert text == "data.val_images: 7 images leave 3 classes without any (7); raise it"


# ---------------------------------------------------------------------------- a step


def fits(monkeypatch, training: int | None = None, evaluation: int | None = None) -> None:
    """A network that finds memory for so many images at once."""
    forward = ResNeXt.forward

    def limited(self, images):
        most = training if self.training else evaluation
        if most is not None and len(images) > most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return forward(self, images)

    monkeypatch.setattr(ResNeXt, "forward", limited)


def test_out_of_memory(monkeypatch):
    fits(monkeypatch, training=8)
    result = checked()
    keys = ("train.batch_size", "train.accumulation_steps (now 1)", "train.activation_checkpointing=true")
    only_error(result, *keys, "a step on 16 images at once")
    assert findings(result, "warning")[0].startswith("time: not estimated")
    remedied = checked("train.accumulation_steps=2")
    assert remedied.status == 0


OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    torch.AcceleratorError("CUDA error: out of memory"),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    torch.distributed.DistBackendError("NCCL error\nLast error:\nCuda failure 2 'out of memory'"),
    RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried 9 bytes"),
    MemoryError(),
]


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=str)
def test_every_form_of_running_out_of_memory(error, monkeypatch, finished_run, tmp_path):
    """In a step, and while the network goes to the device, in training, evaluation and prediction."""

    def full(*_, **__):
        raise error

    starting = (train.main, "--config", finished_run / "config.yaml", "--output", tmp_path / "run")
    resuming = (train.main, "--resume", finished_run, "--output", tmp_path / "other", "train.epochs=9")
    evaluating = (evaluate.main, finished_run, "--device", "cpu")
    step = "train.batch_size: a step on 16 images at once does not fit"
    for where, name, command, words in (
        (ResNeXt, "forward", starting, step),
        (resnext.engine.train_state, "to_device", starting, step),
        (torch.optim.SGD, "load_state_dict", resuming, step),
        (ResNeXt, "forward", evaluating, "--batch-size: the device has no memory for 16 images"),
        (resnext.engine.train_state, "to_device", evaluating, "--device: it has no memory for the network"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(where, name, full)
            assert message(call(*command)).startswith(words)
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        shutil.rmtree(tmp_path / "other", ignore_errors=True)


def test_another_failure_is_not_explained_as_one_of_memory(monkeypatch, finished_run):
    def broken(*_):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(ResNeXt, "forward", broken)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        call(evaluate.main, finished_run, "--device", "cpu")


def test_out_of_memory_in_the_step(monkeypatch):
    """Where the forward and backward pass alone was all right."""

    def short(*_):
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried 9 bytes")

    monkeypatch.setattr(preflight, "train_step", short)
    text = only_error(checked("train.activation_checkpointing=true"), "train.batch_size: a step on 16 images")
    assert "train.activation_checkpointing" not in text


def test_out_of_memory_in_validation(monkeypatch):
    fits(monkeypatch, evaluation=15)
    result = checked()
    only_error(result, "train.eval_batch_size: 16 validation images", "lower it")
    assert "step: 16 images, " in result.output
    assert checked("train.eval_batch_size=8").status == 0


def test_other_failures_are_no_findings(monkeypatch):
    def broken(*_):
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(preflight, "train_step", broken)
    with pytest.raises(RuntimeError, match="shapes do not match"):
        checked()


def test_loss_that_is_not_finite(monkeypatch):
    forward = ResNeXt.forward
    monkeypatch.setattr(ResNeXt, "forward", lambda self, images: forward(self, images) * math.inf)
    only_error(checked(), "the loss of the first batch is nan", "train.precision")


def test_long_step_is_estimated(monkeypatch):
    """Of a few images, which are made more until they take a moment."""
    monkeypatch.setattr(preflight, "LONG_STEP", 0.0)
    monkeypatch.setattr(preflight, "MEASURING", 1e-9)
    monkeypatch.setattr(preflight, "train_step", lambda *_: pytest.fail("a whole step was made"))
    result = checked()
    assert re.search(
        r"step: 16 images, loss \S+ at the start, about .*, estimated from 4 images\n", result.output
    )
    assert "time: about" in result.output
    result = checked("train.bn_group=2", "train.batch_size=12")  # 6 groups need 12 images
    assert "estimated from 12 images" in result.output


def test_memory_of_a_gpu():
    step = preflight.Step(0.25, 6.9, None, 30 << 30, 79 << 30)
    kind, text, _ = preflight.step_finding(step, 256, True)
    assert kind == "ok"
    assert text.endswith("0.25 s; 30.0 GiB of 79.0 GiB GPU memory at most")
    kind, text, _ = preflight.step_finding(step._replace(peak=78 << 30), 256, True)
    assert kind == "warning"
    assert "train.accumulation_steps" in text


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu():
    result = checked("run.device=cuda", "train.precision=bf16")
    assert topics(result) == TOPICS
    assert re.search(r"step: 16 images, .*; \S+ MiB of \S+ GiB GPU memory at most", result.output)


@pytest.mark.parametrize(
    ("few", "most", "each", "before", "done", "seconds"),
    [
        (4, 100, 0.1, 3, [4, 4, 8, 16, 32], 3.2),  # twice as many each time, until it takes a moment
        (4, 10, 0.1, 3, [4, 4, 8, 10], 1.0),
        (4, 10, 10.0, 0, [4], 40.0),  # the first alone takes too long
        (10, 10, 0.5, 30, [10, 10], 5.0),  # compiled first
    ],
)
def test_growing_part(few, most, each, before, done, seconds, monkeypatch):
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(preflight, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    seen = []

    def work(number: int) -> None:
        clock.now += each * number + (before if not seen else 0)
        seen.append(number)

    found = preflight.grow(work, few, most, torch.device("cpu"))
    assert found == (done[-1], pytest.approx(seconds))
    assert seen == done


# ---------------------------------------------------------------------------- time


@pytest.mark.parametrize(
    ("workers", "on_gpu", "epoch"),
    [(4, True, 0.9 + 9 * 0.5 + 0.3), (4, False, 0.9 + 9 * 0.8 + 0.3), (0, True, 0.9 + 9 * 0.8 + 0.3)],
    ids=["overlapped", "on the same cores", "no workers"],
)
def test_time(workers, on_gpu, epoch):
    images = SimpleNamespace(is_cuda=on_gpu)
    reading = preflight.LoaderTiming(images, images, 0.9, 0.5, workers, 10)
    single = preflight.LoaderTiming(images, images, 0.1, 0.1, workers, 1)
    data = preflight.Data(100, reading, single, None, None)
    config = parse_config("train: {epochs: 1000}\ndata: {dir: x}", "test")
    step = preflight.Step(0.3, 2.3, None, 0, 0)
    (kind, text, _) = preflight.time_finding(config, step, 0.2, data, 100)
    assert kind == "ok"
    assert f"about {preflight.hours(900 * (epoch + 0.3))} for 900 epochs of {epoch:.3g} s training" in text


def test_hours():
    assert [preflight.hours(seconds) for seconds in (0.4, 59.6, 3725, 100 * 3600)] == [
        "0:00:00",
        "0:01:00",
        "1:02:05",
        "100:00:00",
    ]


def test_pace_of_workers(monkeypatch):
    """Workers deliver together: the pace is that of as many batches as there are workers."""
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(preflight, "time", SimpleNamespace(perf_counter=lambda: clock.now))

    def batches(count: int):
        for number in range(count):
            if number % 3 == 0:
                clock.now += 6.0
            yield torch.zeros(1), torch.zeros(1)

    for steps, each in ((100, 2.0), (2, 3.0)):
        stream = SimpleNamespace(
            loader=SimpleNamespace(num_workers=3), steps=steps, epoch=lambda _, steps=steps: batches(steps)
        )
        reading = preflight.read_batches(stream, torch.device("cpu"))
        assert (reading.first, reading.each, reading.workers) == (6.0, each, 3)


# ---------------------------------------------------------------------------- several processes


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    with Processes(tmp_path_factory.mktemp("processes")) as processes:
        yield processes


def together(processes: Processes, *arguments: object, **changes: str) -> Result:
    """`--check` in two processes, of which only the first says anything."""
    ended = both(processes, "train", *arguments, **changes)
    assert ended.outputs[1] == "", ended
    assert ended.errors == ["", ""], ended
    return well_formed(Result(status(ended), ended.outputs[0], ended.errors[0]))


def status(ended: Ended) -> int:
    """That of the first to end; where it failed, others may have been told to end, as by torchrun."""
    assert set(ended.statuses) in ({0}, {2}, {2, -signal.SIGTERM}), ended
    return max(ended.statuses)


def both(processes: Processes, what: str, *arguments: object, **changes: str) -> Ended:
    Path("tiny.yaml").write_text(tiny_yaml(**{"run__timeout": "60"} | changes))
    before = snapshot(Path(), folders=True)
    command = [*map(str, arguments), "--config", "tiny.yaml", "--check"]
    ended = processes.run(2, what, *command, cwd=Path.cwd(), seconds=60)
    assert snapshot(Path(), folders=True) == before
    return ended


def test_torchrun(tmp_path):
    (tmp_path / "tiny.yaml").write_text(tiny_yaml(run__timeout="60"))
    with Torchrun(tmp_path, 2, ROOT / "train.py", "--config", "tiny.yaml", "--check") as job:
        assert job.wait(60) == 0, job.error
        result = well_formed(Result(0, job.output, job.error))
    expected = [*TOPICS[:7], "processes: ", *TOPICS[7:]]
    lines = findings(result, "ok")
    assert [topic in line for topic, line in zip(expected, lines, strict=True)] == [True] * 10
    assert re.search(
        r"processes: all 2 answer; a sum of \S+ KiB takes .*s, each has the same data", result.output
    )
    assert "first training batch: 8 x 3" in result.output
    assert "step: 16 images" in result.output
    assert result.output.endswith("torchrun --nproc-per-node=2 train.py --config tiny.yaml\n")
    assert not (tmp_path / "runs").exists()


def test_two_processes_without_data(processes, run_copy):
    """Both go on, and tell the next error too."""
    result = together(processes, "--data", "nowhere", "--output", run_copy, **FILES)
    first, second = findings(result, "error")
    assert "is in use already" in first
    assert f"data.dir {Path.cwd() / 'nowhere'}: no such folder" in second
    assert "step: 16 images of noise" in result.output
    assert "processes: all 2 answer" in result.output


@pytest.mark.parametrize("precision", ["fp32", "auto"])
def test_two_processes_without_weights(precision, processes):
    """The second does not wait for the first, which has found that there are none."""
    result = together(processes, model__pretrained="nowhere.pt", train__precision=precision)
    only_error(result, f"{Path.cwd() / 'nowhere.pt'}: no such run directory or file of weights")
    assert "processes: all 2 answer" in result.output


def test_batch_that_two_processes_cannot_share(processes):
    result = together(processes, train__bn_group="16")
    only_error(result, "train.bn_group: 16 makes 1 groups", "--nproc-per-node")
    assert "processes: all 2 answer" in result.output
    assert "first training batch: " in result.output


def test_broken_picture_of_the_second_process(processes, tmp_path):
    path = draw_folders(tmp_path / "data", {"cat": 4, "dog": 4}) / "val" / "cat" / "1.png"
    path.write_bytes(path.read_bytes()[:-60])
    result = together(processes, "--data", "data", **FILES)
    only_error(result, f"process 1: {path}: cannot be decoded", "replace or remove the file")
    assert "first validation batch: " in result.output
    assert "validation files: " not in result.output, "the first process's are whole, but not all"
    assert "time: not estimated" in result.output


def test_whole_pictures_of_two_processes(processes, tmp_path):
    draw_folders(tmp_path / "data", {"cat": 4, "dog": 5})
    result = together(processes, "--data", "data", **FILES)
    assert topics(result).count("validation files: ") == 1
    assert "validation files: all 9 can be decoded\n" in result.output


def short_of_memory(when: str, *arguments: str) -> None:
    """In each process: a check, in which only the second finds no memory."""
    if os.environ["RANK"] == "1":

        def short(*_):
            raise torch.OutOfMemoryError("CUDA out of memory.")

        if when == "alone":
            ResNeXt.forward = short
        else:
            preflight.train_step = short
    sys.argv = ["train.py", *arguments]
    run_main(train.main)


def test_second_process_out_of_memory(processes):
    ended = both(processes, "test_preflight:short_of_memory", "alone")
    result = well_formed(Result(status(ended), ended.outputs[0], ""))
    first, second = findings(result, "error")
    assert first.startswith("process 1: train.batch_size: a step on 16 images")
    assert second.startswith("process 1: train.eval_batch_size: 10 validation images")
    assert "processes: all 2 answer" in result.output


def test_second_process_out_of_memory_in_the_exchange(processes):
    """The first waits for it, and cannot go on: one message, and the end of both."""
    ended = both(processes, "test_preflight:short_of_memory", "in the exchange")
    assert ended.statuses[1] == status(ended) == 2
    (text,) = ended.messages
    assert text.startswith("train.batch_size: a step on 16 images")
    assert "ready: " not in ended.outputs[0]
