"""Invalid input ends with one message that names the key or file and the fix, and with exit status 2.

No file changes. Most commands run inside this process; the last tests start new processes. The tables of bad
configurations are in config/test_parser.py and config/test_validate.py.
"""

import errno
import os
import pickle
import re
import shlex
import shutil
import subprocess
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from commands import call, draw_folders, expect, message, refused, run_script, snapshot, tiny_yaml
from PIL import Image

import evaluate
import train
from resnext.engine.logger import RunLogger

# ---------------------------------------------------------------------------- places


@dataclass(frozen=True)
class Place:
    """The current directory, with tiny.yaml, and runs to copy."""

    folder: Path
    finished: Path
    of_folders: Path

    def prepare(self, setup: str) -> None:
        """Create what the words of a setup name.

           cat3: a class folder with 3 images in data/train and data/val; run,
        other: a finished run in a folder of
           that name; image_run: a run on images in run/; in_epoch: run/ was stopped after a step of epoch 2;
           cut_jpeg: a truncated image.
        """
        words = setup.split()
        classes = {word[:-1]: int(word[-1]) for word in words if word[-1].isdigit()}
        if classes:
            draw_folders(self.folder / "data", classes)
        for word in {"run", "other"} & set(words):
            shutil.copytree(self.finished, self.folder / word)
        if "image_run" in words:
            shutil.copytree(self.of_folders, self.folder / "run")
        if "in_epoch" in words:
            path = self.folder / "run" / "checkpoints" / "last.pt"
            content = torch.load(path, weights_only=True)
            content["progress"] |= {"epoch": 2, "step": 1}
            path.unlink()  # best.pt may be the same file
            torch.save(content, path)
        if "cut_jpeg" in words:
            path = self.folder / "data" / "val" / "dog" / "9.jpg"
            Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)).save(path)
            path.write_bytes(path.read_bytes()[:-500])


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch, finished_run, folder_run) -> Place:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.yaml").write_text(tiny_yaml())
    return Place(tmp_path, finished_run, folder_run)


# Beginnings of command lines.
TINY = "--config tiny.yaml --output out"
IMAGES = f"{TINY} --data data data.dataset=folder"
FILES = f"{IMAGES} data.pipeline=fast augment.padding=0"
CIFAR = f"{TINY} --data data data.dataset=cifar10 data.image_size=32 data.download=false"
NO_CLASSES = "rmdir data/train/cat data/train/dog"

# fmt: off
TRAIN = [  # id, setup, shell commands that spoil it, arguments of train.py, fragments of the message
    ("no config", "", "", "", "--config is missing", "--config demo.yaml"),
    ("resume without config", "", "", "--resume", "--config is missing"),
    ("misspelled config", "", "", "--config demmo.yaml", "--config demmo.yaml", "did you mean demo.yaml?"),
    ("misspelled long config", "", "", "--config cifar10_resnext29_8x64",
     "no such file", "did you mean cifar10_resnext29_8x64d.yaml?"),
    ("config in missing folder", "", "", "--config nowhere/demo.yml", "no such file",
     "did you mean demo.yaml?"),
    ("config without its option", "", "", "demo.yaml", "did you mean --config demo.yaml?"),
    ("unknown option", "", "", f"{TINY} --epochs 3", "unrecognized arguments: --epochs", "--help"),
    ("folder for drawn digits", "", "mkdir data", f"{TINY} --data data", "glyphs are drawn, not read"),
    ("config is a folder", "", "mkdir folder", "--config folder", "--config folder", "no such file"),
    # data
    ("no data folder", "", "", f"{TINY} data.dataset=folder", "data.dir: ", "--data DIR"),
    ("no CIFAR folder", "", "", f"{TINY} data.dataset=cifar10 data.image_size=32", "data.dir: ",
     "--data DIR"),
    ("missing data", "", "", IMAGES, "data.dir DATA: no such folder", "with train/ and val/"),
    ("data is a file", "", "touch data", IMAGES, "data.dir DATA: is a file", "with train/ and val/"),
    ("no train folder", "cat3 dog3", "rm -r data/train", IMAGES, "data.dir DATA: has no train/",
     "train/CLASS/"),
    ("no val folder", "cat3 dog3", "rm -r data/val", IMAGES, "data.dir DATA: has no val/", "val/CLASS/"),
    ("flat val", "cat3 dog3",
     "cd data/val; for i in 0 1 2; do mv cat/$i.png ILSVRC2012_val_0000000$i.JPEG; done; rm -r cat dog",
     FILES,
     "DATA/val: ", "python scripts/prepare_imagenet.py TARS DATA --flat-val DATA/val"),
    ("flat train", "cat3 dog3", f"mv data/train/cat/* data/train; rm data/train/dog/*; {NO_CLASSES}", FILES,
     "DATA/train: ", "class folders"),
    ("no classes", "", "mkdir -p data/train", IMAGES, "DATA/train: ", "class folders"),
    ("empty class", "cat3 dog0", "", IMAGES, "DATA/train/dog: ", "add some"),
    ("empty class of files", "cat3 dog0", "", FILES, "DATA/train/dog: ", "add some"),
    ("class of other files", "cat3 dog0", "echo text > data/train/dog/notes.txt", IMAGES,
     "DATA/train/dog: ", "(JPEG, PNG, WebP, GIF"),
    ("class only in val", "cat3 dog3", "mkdir data/val/zebra", IMAGES, "DATA/val: class folder 'zebra'"),
    ("class only in val of files", "cat3 dog3", "mkdir data/val/zebra", FILES,
     "DATA/val: class folder 'zebra'"),
    ("other number of classes", "cat3 dog3", "", f"{IMAGES} model.classes=3",
     "model.classes: 3", "the data has 2 classes"),
    ("other number of glyphs", "", "", f"{TINY} model.classes=100", "model.classes: 100",
     "the data has 10 classes"),
    ("no JPEG at all", "cat3 dog3", "echo GARBAGE > data/train/cat/9.JPEG", IMAGES,
     "DATA/train/cat/9.JPEG: cannot be decoded", "replace or remove the file"),
    ("truncated JPEG", "cat3 dog3 cut_jpeg", "", IMAGES, "DATA/val/dog/9.jpg: cannot be decoded"),
    ("empty image", "cat3 dog3", "touch data/train/dog/9.png", IMAGES,
     "DATA/train/dog/9.png: cannot be decoded"),
    ("dangling link", "cat3 dog3", "ln -s nowhere.png data/train/dog/9.png", IMAGES,
     "DATA/train/dog/9.png: cannot be read", "No such file"),
    ("images larger than memory", "cat3 dog3", "", f"{IMAGES} data.image_size=1000000", "data.image_size"),
    ("glyphs larger than memory", "", "", f"{TINY} data.image_size=10000000", "data.image_size"),
    ("more glyphs than memory", "", "", f"{TINY} data.train_images=10000000000000", "data.train_images"),
    ("CIFAR missing", "", "", CIFAR, "data.dir DATA: cifar10 is missing", "data.download=true"),
    ("CIFAR damaged", "", "mkdir -p data/cifar-10-batches-py; echo damaged | tee data/cifar-10-python.tar.gz "
     "data/cifar-10-batches-py/data_batch_1", CIFAR, "data.dir DATA: cifar10", "damaged"),
    ("CIFAR folder is a file", "", "touch data", CIFAR.replace("10", "100").replace("=false", "=true"),
     "data.dir DATA: cifar100", "cifar-100-python.tar.gz"),
    # network and machine
    ("endless cardinality", "", "", f"{TINY} model.cardinality=1{'0' * 30}", "model.cardinality"),
    ("endless width", "", "", f"{TINY} model.base_width=1000000", "model.base_width"),
    ("very deep network", "", "", f"{TINY} 'model.stages=[1, 1, 3000]' model.depth=null", "model.stages"),
    ("lr beyond float32", "", "", f"{TINY} optimizer.lr=1e300", "optimizer.lr"),
    ("weight decay beyond float32", "", "", f"{TINY} optimizer.weight_decay=1e300", "optimizer.weight_decay"),
    ("sync_bn on a CPU", "", "", f"{TINY} train.sync_bn=true", "train.sync_bn: needs GPUs"),
    # --output
    ("output below a file", "", "touch file", f"{TINY} --output file/out", "--output file/out: ",
     "choose another"),
    ("output is a file", "", "touch file", f"{TINY} --output file", "--output file: is in use",
     "choose another"),
    ("output is a run", "run", "", f"{TINY} --output run", "--output run: is in use already", "--resume"),
    ("default output is in use", "run", "mkdir runs; mv run runs/tiny", "--config tiny.yaml",
     "--output runs/tiny: is in use already", "--resume"),
    ("output has other files", "", "mkdir mine; touch mine/thesis.tex", f"{TINY} --output mine",
     "--output mine: is in use already"),
    ("resume in a folder of other files", "", "mkdir mine; touch mine/thesis.tex",
     f"{TINY} --output mine --resume",
     "--output mine: is in use already"),
    ("resume of another run into a used one", "run other", "",
     "--output run --resume other/checkpoints/last.pt",
     "--output run: is in use already"),
    ("resume of an earlier checkpoint into its run", "run", "",
     "--output run --resume run/checkpoints/best.pt",
     "--output run: is in use already"),
    # --resume
    ("resume nowhere", "", "", "--resume nowhere", "nowhere: no such run directory or file of weights"),
    ("resume nowhere with a config", "", "", f"{TINY} --resume nowhere",
     "--resume nowhere: no such run directory"),
    ("resume an empty folder", "", "mkdir folder", "--resume folder", "--resume folder: ", "no config.yaml"),
    ("resume a folder of images", "cat3 dog3", "", f"{TINY} --resume data",
     "--resume data: not a run directory"),
    ("resume a checkpoint to nowhere", "run", "", "--resume run/checkpoints/best.pt", "best.pt",
     "--output DIR"),
    ("resume another network", "run", "", "--resume run model.cardinality=2",
     "model.cardinality: the checkpoint has 1, the configuration 2"),
    ("resume with another config", "run", "", "--config tiny.yaml model.depth=20 --output run --resume",
     "model.depth: the checkpoint has 11, the configuration 20"),
    ("resume with another number of classes", "run", "", "--resume run model.classes=3",
     "model.classes: 3", "the data has 10 classes"),
    ("resume on other data", "image_run cat2 dog2 zebra2", "", "--resume run --data data", "last.pt: ",
     "other classes"),
    ("resume on renamed data", "image_run cat2 zebra2", "", "--resume run --data data", "last.pt: ",
     "other classes"),
    ("another batch inside an epoch", "run in_epoch", "", "--resume run train.batch_size=8",
     "train.batch_size: the checkpoint has 16, the configuration 8"),
    ("another seed inside an epoch", "run in_epoch", "", "--resume run run.seed=1",
     "run.seed: the checkpoint has 0, the configuration 1"),
    ("fewer images inside an epoch", "run in_epoch", "", "--resume run data.train_images=30",
     "data.train_images: the checkpoint has 40, the configuration 30"),
    ("resume with a new average", "run", "", "--resume run train.ema_decay=0.9",
     "train.ema_decay: the checkpoint has null, the configuration 0.9"),
    ("resume with a damaged config", "run", "echo 'train: {zebra: 3}' > run/config.yaml", "--resume run",
     "run/config.yaml, line 1", "unknown key train.zebra"),
]
EVALUATE = [
    ("evaluate nowhere", "", "", "nowhere", "nowhere: no such run directory or file of weights"),
    ("evaluate a name", "", "", "hf-hub:timm/resnet18.a1_in1k", "did you mean hf:timm/resnet18.a1_in1k?"),
    ("evaluate an empty folder", "", "mkdir folder", "folder", "folder: has no checkpoints/best.pt"),
    ("evaluate before the first epoch", "run", "rm run/checkpoints/best.pt", "run",
     "run: has no checkpoints/best.pt"),
    ("batches of none", "run", "", "run --batch-size 0", "--batch-size: must be from 1"),
    ("result in a missing folder", "run", "", "run --json nowhere/result.json",
     "--json nowhere/result.json: "),
    ("result is a folder", "run", "", "run --json run", "--json run: cannot be written"),
    ("evaluate on missing data", "image_run", "", "run --data data", "data: no such folder"),
    ("evaluate on other classes", "image_run cat2 dog2 zebra2", "", "run --data data",
     "--data data: its classes (3)"),
    ("evaluate on renamed classes", "image_run cat2 zebra2", "", "run --data data",
     "--data data: its classes"),
]
# fmt: on


@pytest.mark.parametrize(
    ("main", "row"),
    [pytest.param(train.main, row, id=row[0]) for row in TRAIN]
    + [pytest.param(evaluate.main, row, id=row[0]) for row in EVALUATE],
)
def test_bad_command_line(main, row, place):
    _, setup, spoil, arguments, *fragments = row
    place.prepare(setup)
    subprocess.run(spoil, shell=True, cwd=place.folder, check=True, stdout=subprocess.DEVNULL)
    text = refused(place.folder, main, *shlex.split(arguments))
    expect(text, [fragment.replace("DATA", str(place.folder / "data")) for fragment in fragments])


def arguments_of(words: str, *more: object) -> list[object]:
    return [*shlex.split(words), *more]


# ---------------------------------------------------------------------------- data


def test_a_split_is_not_mistaken_for_a_class(place):
    """If train/ or val/ is missing, the message does not take the other for a class folder."""
    data, expected = place.folder / "data", "put images into train/CLASS/ and val/CLASS/"
    for missing, other in (("train", "val"), ("val", "train")):
        place.prepare("cat3 dog3")
        shutil.rmtree(data / missing)
        text = refused(place.folder, train.main, *arguments_of(IMAGES))
        assert text == f"data.dir {data}: has no {missing}/; {expected}"
        shutil.rmtree(data / other)


@pytest.mark.parametrize("words", [IMAGES, FILES], ids=["memory", "files"])
def test_class_only_in_train(words, place):
    """A warning names the class, and errors are those of the images that exist."""
    place.prepare("cat3 dog3")
    shutil.rmtree("data/val/dog")
    result = call(train.main, *arguments_of(words, "train.epochs=1"))
    assert result.status == 0, result.error
    warning = f"warning: {place.folder / 'data' / 'val'}: has no "
    found = [line for line in result.output.splitlines() if line.startswith(warning)]
    assert len(found) == 1 and "1 of 2 classes (dog)" in found[0]
    assert "folder: 6 training and 3 validation images, 2 classes" in result.output
    assert re.search(r"^last validation error: top-1 \S+ \([0-3]/3\)", result.output, re.MULTILINE)


def test_no_folder_is_left_behind(place):
    before = snapshot(place.folder, folders=True)
    message(call(train.main, *arguments_of(IMAGES)))
    assert snapshot(place.folder, folders=True) == before


@pytest.mark.parametrize("words", ["--config", f"{TINY} --output", "--resume", f"{TINY} --data"])
def test_name_too_long(words):
    result = call(train.main, *arguments_of(words, "long" * 2000, "data.dataset=folder"))
    assert result.status == 2
    assert result.error.startswith("error: ")


def test_simplejpeg_is_not_installed(place, monkeypatch):
    monkeypatch.setattr("data.decode.simplejpeg", None)
    place.prepare("cat3 dog3")
    text = message(call(train.main, *arguments_of(FILES)))
    expect(text, ("data.decoder: simplejpeg is not installed", "pip install simplejpeg", "pillow"))
    result = call(train.main, *arguments_of(FILES, "data.decoder=pillow", "train.epochs=1", "--resume"))
    assert result.status == 0, result.error


def test_more_workers_than_shared_memory(place):
    place.prepare("cat3 dog3")
    large = ("data.workers=256", "train.batch_size=10000", "data.image_size=1024")
    text = message(call(train.main, *arguments_of(FILES, *large)))
    expect(text, ("data.workers: 256 workers need", "/dev/shm has", "lower data.workers", "--shm-size"))


@pytest.mark.parametrize(
    ("workers", "split", "skip"),
    [("0", "train", "false"), ("1", "train", "true"), ("1", "val", "false"), ("0", "val", "true")],
)
def test_broken_file_found_during_training(workers, split, skip, place):
    """The error names the file and the fix; data.skip_broken skips training files, not validation files."""
    place.prepare("cat3 dog3")
    path = place.folder / "data" / split / "dog" / "1.png"
    whole = path.read_bytes()
    path.write_bytes(whole[:-60])
    arguments = arguments_of(FILES, f"data.workers={workers}", f"data.skip_broken={skip}", "train.epochs=1")
    broken = f"data/{split}/dog/1.png: cannot be decoded"
    if (split, skip) == ("train", "true"):
        result = call(train.main, *arguments)
        assert result.status == 0, result.error
        assert result.output.count(broken) == 1
        return
    expect(message(call(train.main, *arguments)), (broken, "replace or remove the file"))
    path.write_bytes(whole)
    result = call(train.main, *arguments, "--resume")
    assert result.status == 0, result.error


def test_image_too_thin_to_be_resized(place):
    place.prepare("cat3 dog3")
    Image.new("RGB", (60_000, 1)).save("data/val/dog/9.png")
    text = message(call(train.main, *arguments_of(FILES, "data.workers=0")))
    expect(text, ("data/val/dog/9.png: 60000x1 pixels", "replace or remove the file"))


# ---------------------------------------------------------------------------- devices and directories


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize(
    ("main", "words"), [(train.main, f"{TINY} run.device=cuda"), (evaluate.main, "run --device cuda")]
)
def test_no_gpu(main, words, place):
    place.prepare("run")
    expect(refused(place.folder, main, *arguments_of(words)), ("run.device: ", "use auto or cpu"))


def test_incomplete_torchrun_environment(place, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    text = refused(place.folder, train.main, *arguments_of(TINY))
    expect(text, ("WORLD_SIZE=2 is set", "not RANK", "torchrun"))


def test_stray_rank_variables_are_ignored(place, monkeypatch):
    """A used directory is still protected, and messages still appear."""
    place.prepare("run")
    for name in ("RANK", "LOCAL_RANK"):
        monkeypatch.setenv(name, "1")
    expect(refused(place.folder, train.main, *arguments_of(TINY, "--output", "run")), ("is in use already",))
    assert call(train.main, "--config", "demo.yaml", "--print-config").output.startswith("model:")


@pytest.mark.parametrize(("name", "status"), [("log.txt", 0), ("thesis.tex", 2)])
def test_killed_before_its_configuration(name, status):
    """A requeued job may start in a folder that has only log.txt, but not in one with other files."""
    Path("begun").mkdir()
    for file in {"log.txt", name}:
        Path("begun", file).touch()
    result = call(train.main, *arguments_of(TINY, "--output", "begun", "--resume", "--check"))
    assert result.status == status, result.output


@pytest.mark.parametrize("name", ["checkpoints/last.pt", "metrics.jsonl", "config.yaml"])
@pytest.mark.parametrize("option", ["--json", "--csv"])
def test_results_do_not_replace_a_run(option, name, place):
    place.prepare("run")
    text = refused(place.folder, evaluate.main, place.folder / "run", option, place.folder / "run" / name)
    expect(text, (option, "looks like a file of a run"))


@pytest.mark.parametrize(
    "words",
    [
        "--config demo.yaml --output run --data nowhere",
        "--config demo.yaml --output run/",
        "--config demo.yaml --output FOLDER/run",
        "--resume run train.epochs=0",
        "--resume run run.seed=x",
    ],
)
def test_used_directory_does_not_change(words, place):
    place.prepare("run")
    refused(place.folder, train.main, *arguments_of(words.replace("FOLDER", str(place.folder))))


@pytest.mark.parametrize("name", ["row", "say"])
def test_disk_full_while_logging(name, monkeypatch):
    """The message says what to do: what was saved is complete, and the run can be resumed."""
    real, calls = getattr(RunLogger, name), []

    def fill(self, *values, **options):
        calls.append(values)
        if len(calls) == 5:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(self, *values, **options)

    with monkeypatch.context() as patch:
        patch.setattr(RunLogger, name, fill)
        text = message(call(train.main, *arguments_of(TINY, "train.epochs=5")))
    expect(text, ("out", "No space left on device", "--resume"))
    result = call(train.main, "--resume", "out")
    assert result.status == 0, result.error
    assert "finished: 5 epochs" in result.output


def test_resume_without_the_latest_checkpoint_names_another(run_copy):
    """Starting over would replace best.pt."""
    for name in ("last.pt", "previous.pt"):
        (run_copy / "checkpoints" / name).unlink()
    expect(refused(run_copy, train.main, "--resume", run_copy), ("last.pt", "best.pt", "--output"))


def test_half_of_the_first_checkpoint_is_no_checkpoint(run_copy):
    """A run that was killed during its first save starts over."""
    for path in (run_copy / "checkpoints").glob("*.pt"):
        path.unlink()
    (run_copy / "checkpoints" / ".writing.pt").write_bytes(b"half")
    result = call(train.main, "--resume", run_copy)
    assert result.status == 0, result.error
    assert "finished: 2 epochs" in result.output
    assert (run_copy / "checkpoints" / "last.pt").exists()


# ---------------------------------------------------------------------------- checkpoint files


class Hostile:
    """An object whose pickle creates a folder."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def hostile(path: Path) -> Hostile:
    return Hostile(path.parent / "pwned")


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def make_hostile(path: Path) -> None:
    edit(path, lambda content: content | {"versions": hostile(path)})


def make_compressed(path: Path) -> None:
    """A small file that would take 64 MiB."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\0" * (1 << 26))


def edit(path: Path, change: Callable[[dict], dict], **options: bool) -> None:
    torch.save(change(torch.load(path, weights_only=True)), path, **options)


def without_optimizer(content: dict) -> dict:
    return {key: value for key, value in content.items() if key != "optimizer"}


FOREIGN = {"state_dict": {"weight": torch.zeros(3)}, "epoch": 3, "best_acc1": 76.1}
# fmt: off
NOT_OURS = "not a checkpoint of this program"
SPOILERS = {  # how: (function, fragment of the message, what evaluate.py says if it reads such files)
    "flipped bit": (flip_a_bit, "damaged", ""),
    "cut off": (lambda path: os.truncate(path, path.stat().st_size - 1000), "damaged or cut off", ""),
    "cut in half": (lambda path: os.truncate(path, path.stat().st_size // 2), "damaged or cut off", ""),
    "empty": (lambda path: os.truncate(path, 0), NOT_OURS, "is empty"),
    "text": (lambda path: path.write_text("not a checkpoint\n"), NOT_OURS, "not a file of weights"),
    "foreign weights": (lambda path: torch.save(torchvision.models.squeezenet1_1().state_dict(), path),
     NOT_OURS,
                        "'features.0.weight'"),
    "foreign checkpoint": (lambda path: torch.save(FOREIGN, path), NOT_OURS, "'weight'"),
    "tensor": (lambda path: torch.save(torch.zeros(3), path), NOT_OURS, "holds no state_dict"),
    "old format": (lambda path: edit(path, dict, _use_new_zipfile_serialization=False), NOT_OURS, "--data: "),
    "newer version": (lambda path: edit(path, lambda content: content | {"version": 2}), "version 2", ""),
    "incomplete": (lambda path: edit(path, without_optimizer), "optimizer is missing", ""),
    "hostile": (make_hostile, "mkdir", ""),
    "hostile pickle": (lambda path: path.write_bytes(pickle.dumps(hostile(path))), NOT_OURS,
                       "not a file of weights"),
    "compressed": (make_compressed, "a compressed archive", ""),
    "bad config": (lambda path: edit(path, lambda content: content | {"config": "train: {zebra: 1}"}),
                   "unknown key train.zebra", ""),
}
# fmt: on


@pytest.mark.parametrize("use", ["evaluate", "resume the run", "branch from the file"])
@pytest.mark.parametrize("how", SPOILERS)
def test_bad_checkpoint(how, use, run_copy, tmp_path):
    spoil, fragment, evaluated = SPOILERS[how]
    last = run_copy / "checkpoints" / "last.pt"
    for name in ("best.pt", "previous.pt"):
        last.with_name(name).unlink()
    spoil(last)
    main, arguments = {
        "evaluate": (evaluate.main, [last, "--json", "result.json"]),
        "resume the run": (train.main, ["--resume", run_copy, "train.epochs=3"]),
        "branch from the file": (train.main, ["--resume", last, "--output", "out"]),
    }[use]
    text = refused(tmp_path, main, *arguments)
    expect(text, [(use == "evaluate" and evaluated) or fragment])
    assert "last.pt" in text or evaluated == "--data: "
    assert not (last.parent / "pwned").exists()


# ---------------------------------------------------------------------------- in new processes


def test_process_bad_configuration(place):
    Path("bad.yaml").write_text("train:\n  epochs: 3\n  batchSize: 3\n")
    text = message(run_script("train.py", "--config", "bad.yaml", cwd=place.folder))
    assert text == "bad.yaml, line 3: unknown key train.batchSize; use train.batch_size"
    assert sorted(os.listdir()) == ["bad.yaml", "tiny.yaml"]


@pytest.mark.parametrize(
    ("setup", "words", "fragment"),
    [
        ("run", f"{TINY} --output run", "--output run: is in use already"),
        ("cat3 dog3 cut_jpeg", IMAGES, "data/val/dog/9.jpg: cannot be decoded"),
    ],
)
def test_process_of_train(setup, words, fragment, place):
    place.prepare(setup)
    before = snapshot(place.folder)
    result = run_script("train.py", *arguments_of(words), cwd=place.folder)
    assert fragment in message(result)
    assert snapshot(place.folder) == before


def test_process_hostile_checkpoint(place):
    place.prepare("run")
    checkpoint = place.folder / "run" / "checkpoints" / "best.pt"
    make_hostile(checkpoint)
    before = snapshot(place.folder)
    text = message(run_script("evaluate.py", "run", "--json", "result.json", cwd=place.folder))
    assert f"best.pt: {NOT_OURS}" in text
    assert snapshot(place.folder) == before
    assert not (checkpoint.parent / "pwned").exists()
