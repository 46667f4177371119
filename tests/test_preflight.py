"""train.py --check: what it finds, in which order, and that it leaves nothing behind."""

import io
import math
import multiprocessing
import re
import shlex
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import out_of_memory
import pytest
import torch
from commands import ROOT, Result, call, draw_folders, message, snapshot, tiny_yaml
from PIL import Image
from torchrun import Ended, Processes, Torchrun

import evaluate
import resnext.engine.inference
import resnext.engine.train_state
import train
from resnext.config import parse_config
from resnext.engine import checkpoint
from resnext.engine.train_state import build_train_state, checkpoint_content
from resnext.engine.trainer import train_step
from resnext.errors import run_main
from resnext.models.resnext import ResNeXt
from resnext.preflight import checks, measure
from resnext.preflight.measure import DataTimings, LoaderTiming, StepTiming

# How the results of a run without a fault begin, in their order; those of files and ranks come in between.
TOPICS = {
    "data": "data: ",
    "train": "first training batch: ",
    "val": "first validation batch: ",
    "files": "validation files: ",
    "shm": "shared memory: ",
    "output": "output: ",
    "disk": "disk: ",
    "step": "step: ",
    "ranks": "ranks: ",
    "rate": "learning rate: ",
    "time": "time: ",
}
FILES = "data.dataset=folder data.pipeline=fast augment.padding=0 data.workers=1"
NO_WORKERS = FILES.replace("workers=1", "workers=0")


@pytest.fixture(autouse=True)
def in_own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def checked(arguments: str) -> Result:
    """`--check` of a tiny run. It must leave every file and folder below the current one unchanged."""
    Path("tiny.yaml").write_text(tiny_yaml())
    start = [] if "--resume" in arguments else ["--config", "tiny.yaml"]
    before = snapshot(Path(), folders=True)
    result = call(train.main, *start, *shlex.split(arguments), "--check")
    assert snapshot(Path(), folders=True) == before
    assert multiprocessing.active_children() == []
    return well_formed(result)


def well_formed(result: Result) -> Result:
    """Results, then a last line that agrees with them and with the exit status."""
    *lines, last = result.output.splitlines()
    assert all(re.fullmatch(r"(ok|warning|error)  +\S.*", line) for line in lines), result
    errors, warnings = len(results(result, "error")), len(results(result, "warning"))
    counts = f"{errors} error{'' if errors == 1 else 's'}, {warnings} warning{'' if warnings == 1 else 's'}; "
    assert last.startswith(("not " if errors else "") + "ready: " + counts)
    assert result.status == (2 if errors else 0)
    return result


def results(result: Result, kind: str) -> list[str]:
    """The texts of one kind."""
    lines = result.output.splitlines()
    return [line.removeprefix(kind).strip() for line in lines if line.startswith(f"{kind} ")]


def assert_topics(result: Result, missing: str = "files shm ranks") -> None:
    """All results but the missing ones are ok."""
    expected = [topic for name, topic in TOPICS.items() if name not in missing.split()]
    found = results(result, "ok")
    assert len(found) == len(expected) and all(map(str.startswith, found, expected)), result.output


# ---------------------------------------------------------------------------- a run without a fault


def test_ready():
    result = checked("--output out/here")
    assert result.status == 0 and result.error == ""
    assert_topics(result)
    for text in (
        "data: glyphs, 40 training and 20 validation images, 10 classes with 4 training images each\n",
        "first training batch: 16 x 3 x 8 x 8 in ",
        "output: out/here, starting a new run",
        "step: 16 images, loss ",
        "learning rate: imagenet_step; 0.01 at the start, 0.01 at the end\n",
        " for 2 epochs of ",
        "(3 x step ",
        "0 errors, 0 warnings",
    ):
        assert text in result.output, text
    assert re.search(r"time: about \d+:[0-5]\d:[0-5]\d for ", result.output)
    command = shlex.split(result.output.splitlines()[-1].partition("start with: ")[2])
    assert command == ["python", "train.py", "--config", "tiny.yaml", "--output", "out/here"]
    assert call(train.main, *command[2:], "train.epochs=1").status == 0


@pytest.mark.parametrize(("files", "workers"), [(NO_WORKERS, "no workers"), (FILES, "1 worker")])
def test_ready_with_files(files, workers, monkeypatch):
    """Workers have ended when the step is measured."""
    before, alive = measure.measure_step, []

    def measure_step(*arguments):
        alive.extend(multiprocessing.active_children())
        return before(*arguments)

    monkeypatch.setattr(measure, "measure_step", measure_step)
    draw_folders(Path("data"), {"cat": 7, "dog": 5})
    result = checked(f"--data data train.batch_size=4 {files}")
    assert_topics(result, "ranks" if workers == "1 worker" else "ranks shm")
    assert "validation files: all 12 can be decoded\n" in result.output
    assert "2 classes with 5 to 7 training images each" in result.output
    assert result.output.count(f"{workers};") == 2
    assert ("enough for 1 worker per process" in result.output) == (workers == "1 worker")
    assert alive == []


def test_resumed_run(run_copy):
    result = checked(f"--resume {run_copy} train.epochs=5")
    assert_topics(result)
    assert f"output: {run_copy}, resuming from {run_copy}/checkpoints/last.pt" in result.output
    assert " for 3 epochs of " in result.output


def test_errors_before_the_check():
    Path("tiny.yaml").write_text(tiny_yaml())
    for arguments in (["--config", "tiny.yaml", "train.epoch=3"], ["--config", "tinny.yaml"], []):
        result = call(train.main, *arguments, "--check")
        message(result)
        assert result.output == ""


def test_ascii_console(monkeypatch):
    draw_folders(Path("Bilder–größer"), {"cat": 3, "dog": 3})
    Path("tiny.yaml").write_text(tiny_yaml())
    arguments = f"train.py --config tiny.yaml --data Bilder–größer {FILES} --output läuft --check"
    console = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "argv", arguments.split())
    monkeypatch.setattr(sys, "stdout", console)
    with pytest.raises(SystemExit) as end:
        run_main(train.main)
    result = well_formed(Result(end.value.code, console.buffer.getvalue().decode("ascii"), ""))
    assert_topics(result, "ranks")
    assert r"output: l\xe4uft, starting" in result.output


# ---------------------------------------------------------------------------- learning rate and time


@pytest.mark.parametrize(
    ("schedule", "epochs", "expected"),
    [
        ("name: imagenet_step", 20, "0.2 at the start, 0.2 at the end"),
        ("name: imagenet_step", 35, "0.2 at the start, 0.02 from epoch 31, 0.02 at the end"),
        ("name: cosine", 10, "0.2 at the start, 0.000548 at the end"),
        ("warmup_epochs: 5", 10, "0.0133 at the start, 0.2 after 5 epochs of warm-up, 0.2 at the end"),
        (
            "name: multistep, milestones: [1, 5, 7], warmup_epochs: 2",
            9,
            "0.0333 at the start, 0.02 after 2 epochs of warm-up, 0.002 from epoch 6, 0.0002 from epoch 8, "
            "0.0002 at the end",
        ),
    ],
)
def test_learning_rates(schedule, epochs, expected):
    text = f"schedule: {{{schedule}}}\ntrain: {{epochs: {epochs}}}\noptimizer: {{lr: 0.2}}\ndata: {{dir: x}}"
    kind, text = checks.learning_rates(parse_config(text, "test"), 3)
    assert kind == "ok" and text.partition("; ")[2] == expected


@pytest.mark.parametrize(
    ("workers", "on_gpu", "epoch"),
    [(4, True, 0.9 + 9 * 0.5 + 0.3), (4, False, 0.9 + 9 * 0.8 + 0.3), (0, True, 0.9 + 9 * 0.8 + 0.3)],
    ids=["overlapped", "on the same cores", "no workers"],
)
def test_time(workers, on_gpu, epoch):
    images = SimpleNamespace(is_cuda=on_gpu)
    training = LoaderTiming(images, images, 0.9, 0.5, workers, 10)
    validation = LoaderTiming(images, images, 0.1, 0.1, workers, 1)
    data = DataTimings(100, training, validation)
    kind, text = checks.remaining_time(900, data, StepTiming(0.3), 0.2)
    assert kind == "ok"
    assert f"about {checks.duration(900 * (epoch + 0.3))} for 900 epochs of {epoch:.3g} s training" in text


@pytest.mark.parametrize(("steps", "each"), [(100, 2.0), (2, 3.0)])
def test_pace_of_workers(steps, each, monkeypatch):
    """Workers deliver together: the pace is that of as many batches as there are workers."""
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(measure, "time", SimpleNamespace(perf_counter=lambda: clock.now))

    def batches(_):
        for number in range(steps):
            if number % 3 == 0:
                clock.now += 6.0
            yield torch.zeros(1), torch.zeros(1)

    loader = SimpleNamespace(loader=SimpleNamespace(num_workers=3), steps=steps, epoch=batches)
    timing = measure.time_loader(loader, torch.device("cpu"))
    assert (timing.first, timing.each, timing.workers) == (6.0, each, 3)


# ---------------------------------------------------------------------------- disk and shared memory


def limit_disk(monkeypatch, free: int, shm: bool = False) -> None:
    """Pretend that the disks, or /dev/shm, have `free` bytes."""
    real = shutil.disk_usage

    def usage(folder):
        limited = (str(folder) == "/dev/shm") == shm
        return SimpleNamespace(total=1 << 40, used=0, free=free) if limited else real(folder)

    monkeypatch.setattr(shutil, "disk_usage", usage)


@pytest.mark.parametrize(
    ("changes", "files"),
    [({}, 4), ({"run__keep_every": "7", "train__epochs": "50"}, 11), ({"train__ema_decay": "0.9"}, 4)],
    ids=["plain", "keep_every", "ema"],
)
@pytest.mark.parametrize("resumed", [False, True])
def test_room_for_checkpoints(changes, files, resumed, monkeypatch, tmp_path, run_copy):
    config = parse_config(tiny_yaml(**changes), "test")
    free = files * (int(checks.checkpoint_bytes(config, 10) * 1.02) + (1 << 20))
    if resumed:  # existing files count once, whatever their names
        stored = {path.stat().st_ino: path.stat().st_size for path in run_copy.rglob("*.pt")}
        free -= sum(stored.values())
    for missing, kind in ((0, "ok"), (1, "error")):
        with monkeypatch.context() as patch:
            limit_disk(patch, free - missing)
            found, text = checks.disk(config, 10, run_copy if resumed else tmp_path / "new")
        assert found == kind and text.startswith(f"disk: {files} checkpoints of ")
    assert "make room" in text and "--output" in text and str(tmp_path) in text
    assert ("run.keep_every (7)" in text) == ("run__keep_every" in changes)


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
    rest = checkpoint._tensor_bytes(content["rng"]) + (8 if training.ema else 0)  # the EMA's counter
    assert checks.checkpoint_bytes(config, 10) == checkpoint._tensor_bytes(content) - rest


# ---------------------------------------------------------------------------- what is wrong


Setup = Callable[[pytest.MonkeyPatch], None]


def folders(broken: str | None = None, empty: str | None = None, dogs: int = 2) -> Setup:
    """Draw data/, perhaps with a broken or an empty image; measure the first batches only."""

    def draw(patch: pytest.MonkeyPatch) -> None:
        patch.setattr(measure, "MEASURING", 0)
        root = draw_folders(Path("data"), {"cat": 2, "dog": dogs})
        if broken:
            (root / broken).write_bytes((root / broken).read_bytes()[:-60])
        if empty:
            (root / empty).touch()

    return draw


def one_color(_: object) -> None:
    for path in draw_folders(Path("my data"), {"cat": 2, "dog": 2}).rglob("*.png"):
        Image.new("RGB", (8, 8), (130, 130, 130)).save(path)


def limit_images(training: int = 1000, evaluation: int = 1000) -> Setup:
    """Pretend that memory holds only that many images at once."""
    forward = ResNeXt.forward

    def limited(self, images):
        if len(images) > (training if self.training else evaluation):
            out_of_memory.fail()
        return forward(self, images)

    return lambda patch: patch.setattr(ResNeXt, "forward", limited)


def infinite_logits(patch: pytest.MonkeyPatch) -> None:
    forward = ResNeXt.forward
    patch.setattr(ResNeXt, "forward", lambda self, images: forward(self, images) * math.inf)


def little_shared_memory(patch: pytest.MonkeyPatch) -> None:
    folders()(patch)
    limit_disk(patch, 100, shm=True)


def nothing(_: object) -> None:
    pass


FULL = r"E train.batch_size: a step on 16 images at once .*raise train.accumulation_steps \(now 1\), "
EXTREME = "data.mean=[0.5,0.5,0.5] data.std=[0.25,0.25,0.25]"
GRAY = "data.dataset=folder augment.padding=0 data.mean=[128,128,128] data.std=[64,64,64]"
FIRST = "first (training|validation) batch: .*"
LOOK = f"W {FIRST}all pixels are equal; .*check_data.py '{{cwd}}/my data'"
NOWHERE = "E data.dir {cwd}/nowhere: no such folder"
USED = "E --output run: is in use"
ALL_DATA = "data train val files shm time"

# name: (what to prepare, arguments, topics that are not ok, errors and warnings)
CASES: dict[str, tuple[Setup, str, str, list[str]]] = {
    "run in use": (nothing, "--output run", "output", [USED]),
    "folder in use": (nothing, "--output used", "output", ["E --output used: is in use"]),
    "below a file": (nothing, "--output used/file/x", "output", ["E --output used/file/x: cannot be"]),
    "other network": (nothing, "--resume run model.cardinality=2", "output", ["E model.cardinality: .*1"]),
    "no weights": (nothing, "model.pretrained=none.pt", "output", ["E {cwd}/none.pt: no such"]),
    "no data": (nothing, f"--data nowhere model.classes=3 {FILES}", ALL_DATA, [NOWHERE]),
    # The start comes first: the data must have its classes.
    "neither": (nothing, f"--data nowhere --output run {FILES}", f"output {ALL_DATA}", [USED, NOWHERE]),
    "download": (
        nothing,
        "--data sets data.dataset=cifar10 data.image_size=32",
        "data train val time",
        ["W data.dir {cwd}/sets: cifar10 is missing"],
    ),
    "broken file in memory": (
        folders(empty="train/dog/9.png"),
        "--data data data.dataset=folder",
        "data train val time",
        ["E {cwd}/data/train/dog/9.png: cannot be decoded"],
    ),
    "skipped file": (
        folders("train/cat/0.png"),
        f"--data data data.skip_broken=true {FILES}",
        "",
        ["W broken files skipped so far: 1, the latest: {cwd}/data/train/cat/0.png: cannot be decoded"],
    ),
    "pixel values": (nothing, EXTREME, "train val", [f"W {FIRST}pixel values 0...255"] * 2),
    "infinite pixels": (
        nothing,
        "data.std=[1e-45,1e-45,1e-45]",
        "train val step time",
        [f"E {FIRST}not finite", f"E {FIRST}not finite", "E train.precision: the loss"],
    ),
    "one color": (one_color, f"{GRAY} --data 'my data'", "train val", [LOOK] * 2),
    "empty classes": (
        nothing,
        "data.val_images=7",
        "",
        ["W data.val_images: 7 .* 3 classes .*(7).*raise it"],
    ),
    # The images are read without workers then.
    "shared memory": (
        little_shared_memory,
        f"--data data {FILES}",
        "shm",
        ["E data.workers: 1 .*--shm-size"],
    ),
    "disk": (lambda patch: limit_disk(patch, 1000), "", "disk", ["E disk: 4 checkpoints of "]),
    "step": (limit_images(8), "", "step time", [f"{FULL}set train.activation_checkpointing=true"]),
    "accumulated step": (limit_images(8), "train.accumulation_steps=2", "", []),
    "not the micro-batch": (
        lambda patch: patch.setattr(measure, "train_step", out_of_memory.fail),
        "train.activation_checkpointing=true",
        "step time",
        [f"{FULL}or lower"],
    ),
    "validation": (limit_images(1000, 15), "", "time", ["E train.eval_batch_size: 16 validation images"]),
    "small validation": (limit_images(1000, 15), "train.eval_batch_size=8", "", []),
    "loss": (infinite_logits, "", "step time", ["E train.precision: the loss of the first batch is nan"]),
}
for files in (FILES, NO_WORKERS):
    for broken, more, lost in (
        ("train/cat/0.png", "", "train time"),
        ("val/cat/0.png", "", "val files time"),
        # It would end the training after the first epoch: it is found anywhere, and never skipped.
        ("val/dog/6.png", "data.skip_broken=true train.eval_batch_size=2", "files"),
    ):
        problem = f"E {{cwd}}/data/{broken}: cannot be decoded"
        case = (folders(broken, dogs=7), f"--data data {more} {files}", lost, [problem])
        CASES[f"broken {broken}, {files[-9:]}"] = case


@pytest.mark.parametrize(("setup", "arguments", "missing", "problems"), CASES.values(), ids=CASES)
def test_faults(setup, arguments, missing, problems, run_copy, monkeypatch):
    """Each is reported in one line, and everything else is checked too."""
    Path("used").mkdir()
    Path("used/file").touch()
    setup(monkeypatch)
    result = checked(arguments)
    expected = [*problems, *(["W time: no estimate"] if "time" in missing else [])]
    for kind, letter in (("error", "E "), ("warning", "W ")):
        patterns = [pattern.removeprefix(letter) for pattern in expected if pattern.startswith(letter)]
        for text, pattern in zip(results(result, kind), patterns, strict=True):
            assert re.match(pattern.replace("{cwd}", str(Path.cwd())), text), text
    unused = "ranks" if "workers=1" in arguments else "ranks shm"
    assert_topics(result, f"{missing} {unused}" + ("" if "pipeline=fast" in arguments else " files"))
    if "step: " in result.output:  # on noise if no training batch could be read
        assert (" of noise" in result.output) == missing.startswith(("data", "output data", "train time"))


@pytest.mark.parametrize("error", out_of_memory.ERRORS, ids=str)
def test_every_form_of_running_out_of_memory(error, monkeypatch, finished_run, tmp_path):
    """In a step, and while the network moves to the device, in training and evaluation."""

    def full(*_, **__):
        raise error

    starting = (train.main, "--config", finished_run / "config.yaml", "--output", tmp_path / "run")
    resuming = (train.main, "--resume", finished_run, "--output", tmp_path / "other", "train.epochs=9")
    evaluating = (evaluate.main, finished_run, "--device", "cpu")
    for where, name, command, key in (
        (ResNeXt, "forward", starting, "train.batch_size: "),
        (resnext.engine.train_state, "to_device", starting, "train.batch_size: "),
        (torch.optim.SGD, "load_state_dict", resuming, "train.batch_size: "),
        (ResNeXt, "forward", evaluating, "--batch-size: "),
        (resnext.engine.inference, "InferenceNetwork", evaluating, "--device: "),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(where, name, full)
            text = message(call(*command))
        assert text.startswith(key) and "memory" in text
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        shutil.rmtree(tmp_path / "other", ignore_errors=True)


def test_other_failures_are_not_explained(monkeypatch, finished_run):
    def broken(*_):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(ResNeXt, "forward", broken)
    for work in (lambda: checked(""), lambda: call(evaluate.main, finished_run, "--device", "cpu")):
        with pytest.raises(RuntimeError, match="illegal memory access"):
            work()


def test_memory_of_a_gpu():
    timing = StepTiming(0.25, 30 << 30, 79 << 30)
    kind, text = checks.step(timing, 6.9, 256, True)
    assert kind == "ok"
    assert text.endswith("0.25 s; peak 30.0 GiB of 79.0 GiB GPU memory")
    kind, text = checks.step(timing._replace(peak=78 << 30), 6.9, 256, True)
    assert kind == "warning" and "train.accumulation_steps" in text


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu():
    result = checked("run.device=cuda train.precision=bf16")
    assert_topics(result)
    assert re.search(r"step: 16 images, .*; peak \S+ MiB of \S+ GiB GPU memory", result.output)


# ---------------------------------------------------------------------------- several ranks


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    with Processes(tmp_path_factory.mktemp("processes")) as processes:
        yield processes


def status(ended: Ended) -> int:
    """That of the first rank to end. If it failed, others may have been ended, as by torchrun."""
    assert set(ended.statuses) in ({0}, {2}, {2, -signal.SIGTERM}), ended
    return max(ended.statuses)


def both(processes: Processes, what: str, arguments: str) -> Ended:
    Path("tiny.yaml").write_text(tiny_yaml(run__timeout="120"))
    before = snapshot(Path(), folders=True)
    command = [*arguments.split(), "--config", "tiny.yaml", "--check"]
    ended = processes.run(2, what, *command, cwd=Path.cwd(), seconds=240)
    assert snapshot(Path(), folders=True) == before
    return ended


def together(processes: Processes, arguments: str) -> tuple[Result, list[str]]:
    """`--check` on two ranks, of which only rank 0 prints, and its errors."""
    ended = both(processes, "train", arguments)
    assert ended.outputs[1] == "", ended
    assert ended.errors == ["", ""], ended
    result = well_formed(Result(status(ended), ended.outputs[0], ended.errors[0]))
    assert "ranks: all 2 answer" in result.output
    return result, results(result, "error")


def test_torchrun(tmp_path):
    (tmp_path / "tiny.yaml").write_text(tiny_yaml(run__timeout="120"))
    with Torchrun(tmp_path, 2, ROOT / "train.py", "--config", "tiny.yaml", "--check") as job:
        assert job.wait(240) == 0, job.error
        result = well_formed(Result(0, job.output, job.error))
    assert_topics(result, "files shm")
    ranks = r"ranks: all 2 answer; an all-reduce of \S+ KiB takes .*s, all have the same data"
    assert re.search(ranks, result.output)
    assert "first training batch: 8 x 3" in result.output
    assert "step: 16 images" in result.output
    assert result.output.endswith("torchrun --nproc-per-node=2 train.py --config tiny.yaml\n")
    assert not (tmp_path / "runs").exists()


def test_two_ranks_without_data(processes, run_copy):
    """Both continue, and report the next error too."""
    result, (first, second) = together(processes, f"--data nowhere --output {run_copy} {FILES}")
    assert "is in use" in first
    assert f"data.dir {Path.cwd() / 'nowhere'}: no such folder" in second
    assert "step: 16 images of noise" in result.output


@pytest.mark.parametrize(
    ("arguments", "fragment"),
    [
        ("model.pretrained=nowhere.pt train.precision=fp32", "nowhere.pt: no such run"),
        ("model.pretrained=nowhere.pt train.precision=auto", "nowhere.pt: no such run"),
        ("train.bn_group=16", "train.bn_group: 16 "),
    ],
    ids=["no weights, fp32", "no weights, auto", "batch that they cannot share"],
)
def test_error_of_all_ranks(arguments, fragment, processes):
    """Rank 1 does not wait for rank 0, which has found the error."""
    result, (error,) = together(processes, arguments)
    assert fragment in error
    assert "first training batch: " in result.output


def test_files_of_two_ranks(processes, tmp_path):
    folders(dogs=3)(pytest.MonkeyPatch())
    result, errors = together(processes, f"--data data {FILES}")
    assert not errors and result.output.count("validation files: all 5 can be decoded\n") == 1
    shutil.rmtree("data")
    folders("val/cat/1.png")(pytest.MonkeyPatch())  # rank 0's files are intact, but not those of rank 1
    result, (error,) = together(processes, f"--data data {FILES}")
    assert error.startswith(f"rank 1: {tmp_path}/data/val/cat/1.png: cannot be decoded")
    assert "first validation batch: " in result.output and "validation files: " not in result.output
    assert "time: no estimate" in result.output


def test_rank_1_out_of_memory(processes):
    ended = both(processes, "out_of_memory:check_on_ranks", "alone")
    result = well_formed(Result(status(ended), ended.outputs[0], ""))
    first, second = results(result, "error")
    assert first.startswith("rank 1: train.batch_size: a step on 16 images")
    assert second.startswith("rank 1: train.eval_batch_size: 10 validation images")
    assert "ranks: all 2 answer" in result.output


def test_rank_1_out_of_memory_in_a_collective(processes):
    """Rank 0 waits for it, and cannot continue: one message, and both end."""
    ended = both(processes, "out_of_memory:check_on_ranks", "collective")
    assert ended.statuses[1] == status(ended) == 2
    (text,) = ended.messages
    assert text.startswith("train.batch_size: a step on 16 images")
    assert "ready: " not in ended.outputs[0]
