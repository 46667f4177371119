"""Checkpoints: plain on disk, whole at every instant, verified when read, harmless whatever is in them."""

import errno
import functools
import io
import itertools
import os
import random
import shutil
import signal
import struct
import time
import tracemalloc
import zipfile
from collections import namedtuple
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from commands import call, message, run_script, snapshot
from failures import FULL_DISK, Killed, always_fail, fail_at, run_killed
from run_files import assert_same, row_count, rows

import evaluate
import train
from resnext.config import parse_config, read_config
from resnext.engine.checkpoint import KEYS, Checkpoint, read_checkpoint, read_latest, write_checkpoint
from resnext.engine.train_state import TrainProgress
from resnext.errors import UserError


def content_number(number: int) -> Checkpoint:
    """Return a small checkpoint that can be told from others by its number."""
    return {
        "model": {"weight": torch.full((7,), float(number)), "steps": torch.tensor(number)},
        "optimizer": {"state": {0: {"momentum_buffer": torch.ones(7)}}, "param_groups": [{"lr": 0.1}]},
        "scaler": None,
        "ema": None,
        "progress": asdict(TrainProgress(epoch=number, best={"top1_error": 12.5})),
        "rng": {"cpu": torch.arange(16, dtype=torch.uint8), "cuda": None},
        "config": "train: {epochs: 3}\n",
        "classes": ["cat", "dog"],
        "preprocessing": {"image_size": 8, "mean": [1.0, 2.0, 3.0], "std": [1.0, 2.0, 3.0]},
        "versions": {"torch": "2"},
    }


def number(path: Path) -> int:
    return read_checkpoint(path)["progress"]["epoch"]


def numbers(folder: Path) -> dict[str, int]:
    """Return the number under each name in a folder, hidden files included."""
    return {path.name: number(path) for path in folder.iterdir()}


# ---------------------------------------------------------------------------- what is written


def test_checkpoint_of_a_run_is_plain(finished_run):
    folder = finished_run / "checkpoints"
    content = torch.load(folder / "last.pt", weights_only=True)
    assert set(content) == {"format", *KEYS}
    assert (content["format"], content["version"]) == ("resnext checkpoint", 1)

    def walk(value: object) -> None:
        assert isinstance(value, dict | list | str | bool | int | float | None | torch.Tensor), type(value)
        for item in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
            walk(item)

    walk(content)
    progress = content["progress"]
    assert (progress["epoch"], progress["step"], progress["global_step"]) == (3, 0, 6)
    assert progress["rows"] == row_count(finished_run)
    assert content["classes"] == list("0123456789")
    assert content["preprocessing"] == {"image_size": 8, "mean": [128.0] * 3, "std": [64.0] * 3}
    assert parse_config(content["config"], "content") == read_config(finished_run / "config.yaml")
    assert torch.__version__.startswith(content["versions"]["torch"])
    assert content["scaler"] is content["ema"] is None
    content["model"] = dict(content["model"])  # torch keeps the OrderedDict
    assert_same(read_checkpoint(folder / "last.pt"), content)
    found = numbers(folder)
    assert found.keys() == {"last.pt", "best.pt", "previous.pt"}
    assert (found["last.pt"], found["previous.pt"]) == (3, 2)


def test_what_is_written_is_what_is_read(tmp_path):
    folder = tmp_path / "a" / "checkpoints"
    for step in (1, 2, 3):
        write_checkpoint(content_number(step), folder, ["last.pt", "best.pt"] if step == 2 else ["last.pt"])
    assert numbers(folder) == {"last.pt": 3, "previous.pt": 2, "best.pt": 2}
    written = {"format": "resnext checkpoint", "version": 1, **content_number(3)}
    assert_same(read_checkpoint(folder / "last.pt"), written)


@pytest.mark.parametrize("code", [errno.EPERM, errno.EXDEV, errno.EOPNOTSUPP, errno.EMLINK])
def test_disks_without_hard_links(code, tmp_path, monkeypatch):
    always_fail(monkeypatch, os, "link", OSError(code, os.strerror(code)))
    for step in (1, 2):
        write_checkpoint(content_number(step), tmp_path, ["last.pt", "best.pt"])
    assert numbers(tmp_path) == {"last.pt": 2, "best.pt": 2, "previous.pt": 1}


# ---------------------------------------------------------------------------- writing that fails

BEFORE = {"last.pt": 2, "best.pt": 1, "previous.pt": 1}
IO_ERROR = OSError(errno.EIO, os.strerror(errno.EIO))
NO_LINKS = OSError(errno.EPERM, os.strerror(errno.EPERM))
TORCH_FULL = RuntimeError(
    "[enforce fail at inline_container.cc:858] . PytorchStreamWriter failed writing file data/1: file write"
    " failed\nframe #0: c10::ThrowEnforceNotMet(...)"
)


def stop_saving(patch: pytest.MonkeyPatch, after: int, error: BaseException) -> None:
    """Let torch.save fail when `after` bytes are on the disk."""

    def save(content, file):
        whole = io.BytesIO()
        torch.serialization.save(content, whole)
        file.write(whole.getvalue()[:after])
        file.flush()
        raise error

    patch.setattr(torch, "save", save)


def stop_copying(patch: pytest.MonkeyPatch, number: int) -> None:
    """Let copy `number` fail halfway, on a disk without hard links."""
    real, calls = shutil.copyfile, itertools.count(1)

    def copy(source, target):
        if next(calls) < number:
            return real(source, target)
        Path(target).write_bytes(Path(source).read_bytes()[:1000])
        raise FULL_DISK

    always_fail(patch, os, "link", NO_LINKS)
    patch.setattr(shutil, "copyfile", copy)


def fill_disk(patch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    patch.setattr(shutil, "disk_usage", lambda _: usage(1 << 40, 1 << 40, 1000))


def write_before(folder: Path) -> Path:
    """Leave last.pt (2), previous.pt (1) and best.pt (1) in a folder."""
    write_checkpoint(content_number(1), folder, ["last.pt", "best.pt"])
    write_checkpoint(content_number(2), folder, ["last.pt"])
    return folder


def write_and_fail(folder: Path) -> None:
    """Write number 3, which must fail with a message that says where and what to do."""
    with pytest.raises(UserError) as caught:
        write_checkpoint(content_number(3), folder, ["last.pt", "best.pt"])
    text = str(caught.value)
    assert text.startswith(f"{folder}: ") and "could not be written" in text and "--resume" in text
    assert "\n" not in text


FAILURES = {
    **{f"save at {n}": (lambda patch, n=n: stop_saving(patch, n, FULL_DISK)) for n in (0, 1, 1000, 2000)},
    "torch's own error": lambda patch: stop_saving(patch, 1000, TORCH_FULL),
    "error without a text": lambda patch: stop_saving(patch, 1000, OSError()),
    "RuntimeError without a text": lambda patch: stop_saving(patch, 1000, RuntimeError("")),
    "full disk": fill_disk,
    **{f"fsync {n}": (lambda patch, n=n: fail_at(patch, os, "fsync", n, IO_ERROR)) for n in (1, 2)},
    **{f"rename {n}": (lambda patch, n=n: fail_at(patch, os, "replace", n, IO_ERROR)) for n in (1, 2, 3)},
    **{f"copy {n}": (lambda patch, n=n: stop_copying(patch, n)) for n in (1, 2, 3)},
}
LATE = ("fsync 2", "rename 2", "rename 3")  # some names are new already


@pytest.mark.parametrize("name", FAILURES)
def test_a_failed_save_leaves_whole_files(name, tmp_path):
    folder = write_before(tmp_path / "checkpoints")
    with pytest.MonkeyPatch.context() as patch:
        FAILURES[name](patch)
        write_and_fail(folder)
    found = numbers(folder)
    assert found.keys() == BEFORE.keys()
    if name not in LATE:
        assert found == BEFORE
    assert all(found[key] in (BEFORE[key], 2 if key == "previous.pt" else 3) for key in found)
    write_checkpoint(content_number(4), folder, ["last.pt", "best.pt"])  # there is room again
    assert numbers(folder) == {"last.pt": 4, "best.pt": 4, "previous.pt": found["last.pt"]}


def test_folder_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("mine")
    write_and_fail(tmp_path / "file" / "checkpoints")
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("links", [True, False], ids=["links", "no links"])
@pytest.mark.parametrize("function", ["fsync", "link", "replace", "open"])
def test_killed_at_any_call(function, links, tmp_path):
    """End a process before its n-th call of a function, for every n there is, and later ones while saving."""

    def write(folder: Path) -> None:
        write_checkpoint(content_number(3), folder, ["last.pt", "best.pt"])

    with pytest.MonkeyPatch.context() as patch:
        if not links:
            always_fail(patch, os, "link", NO_LINKS)
        for call_number in itertools.count(1):
            folder = write_before(tmp_path / str(call_number))
            killed = run_killed(functools.partial(write, folder), os, function, call_number)
            expect_whole_after_kill(folder)
            if not killed:
                break
    assert call_number > 1


def expect_whole_after_kill(folder: Path) -> None:
    """Expect whole files now, after another kill in the middle of the next save, and after that save."""
    last, best = number(folder / "last.pt"), number(folder / "best.pt")
    assert last in (2, 3) and best in (1, 3)
    with pytest.MonkeyPatch.context() as patch:
        stop_saving(patch, 100, Killed())
        with pytest.raises(Killed):
            write_checkpoint(content_number(4), folder, ["last.pt"])
    assert (number(folder / "last.pt"), number(folder / "best.pt")) == (last, best)
    write_checkpoint(content_number(4), folder, ["last.pt"])
    assert numbers(folder) == {"last.pt": 4, "best.pt": best, "previous.pt": last}


def test_killed_a_hundred_times_while_saving(tmp_path):
    """kill -9 at a random instant of a process that does nothing but save, each time the next number."""
    moments, seen, longest = random.Random(0), [0], 0.05
    ballast = {"weights": torch.arange(2**18, dtype=torch.float32)}  # a megabyte takes a moment to write
    for _ in range(100):
        child = os.fork()
        if child == 0:
            for n in itertools.count(seen[-1] + 1):
                write_checkpoint(content_number(n) | {"ballast": ballast}, tmp_path, ["last.pt", "best.pt"])
        time.sleep(moments.uniform(0.002, longest))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        before = seen[-1]
        if (tmp_path / "last.pt").exists():
            lines = []
            content = read_latest(tmp_path / "last.pt", lines.append)
            assert lines == [] and torch.equal(content["ballast"]["weights"], ballast["weights"])
            seen.append(number(tmp_path / "last.pt"))
            assert number(tmp_path / "best.pt") - seen[-1] in (0, 1)  # it is renamed first
            if (tmp_path / "previous.pt").exists():
                assert seen[-1] - number(tmp_path / "previous.pt") in (1, 2)
        longest *= 1.2 if seen[-1] == before else 0.95  # about half of the processes save, on any machine
    assert seen == sorted(seen) and seen[-1] > 10


# ---------------------------------------------------------------------------- reading damaged files


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> tuple[bytes, Checkpoint]:
    """The bytes of a small checkpoint and what is in it."""
    path = tmp_path_factory.mktemp("whole") / "last.pt"
    write_checkpoint(content_number(1), path.parent, ["last.pt"])
    return path.read_bytes(), read_checkpoint(path)


def cut_off(raw: bytes) -> Iterator[bytes]:
    for length in [*range(0, len(raw), 7), *range(len(raw) - 70, len(raw))]:
        yield raw[:length]


def flip_bits(raw: bytes) -> Iterator[bytes]:
    """Flip a bit of every fourth byte, and every bit of an entry of the directory, which has no checksum."""
    start = raw.rindex(b"PK\x01\x02", 0, raw.rindex(b"archive/data/0"))
    bits = [(offset, offset * 5 // 4 % 8) for offset in range(0, len(raw), 4)]
    for offset, bit in [*bits, *itertools.product(range(start, start + 46), range(8))]:
        yield raw[:offset] + bytes([raw[offset] ^ 1 << bit]) + raw[offset + 1 :]


def overwrite(raw: bytes) -> Iterator[bytes]:
    draw = random.Random(0)
    for _ in range(200):
        start, length = draw.randrange(len(raw)), draw.choice([2, 16, 200])
        yield raw[:start] + draw.randbytes(length) + raw[start + length :]


def remove_or_double(raw: bytes) -> Iterator[bytes]:
    draw = random.Random(1)
    for _ in range(100):
        start, length = draw.randrange(len(raw)), draw.choice([1, 16, 200])
        yield raw[:start] + raw[start + length :]
        yield raw[: start + length] + raw[start:]


@pytest.mark.parametrize("damage", [cut_off, flip_bits, overwrite, remove_or_double])
def test_damaged_anywhere(damage: Callable[[bytes], Iterator[bytes]], whole, tmp_path):
    """What is not refused must be the original."""
    raw, content = whole
    path, accepted, refused = tmp_path / "damaged.pt", 0, 0
    for changed in damage(raw):
        path.write_bytes(changed)
        try:
            found = read_checkpoint(path)
        except UserError as error:
            assert str(path) in str(error) and "\n" not in str(error)
            refused += 1
        else:
            assert_same(found, content)
            accepted += 1
    with zipfile.ZipFile(io.BytesIO(raw)) as archive:
        payload = sum(entry.file_size for entry in archive.infolist())
    assert (damage is not cut_off or not accepted) and (damage is not flip_bits or refused > payload / 4)


def damage_largest(path: Path) -> str:
    """Change a bit of the largest entry, which torch.load alone would not notice; return the entry's name."""
    raw = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        entry = max(archive.infolist(), key=lambda entry: entry.file_size)
    raw[entry.header_offset + entry.file_size // 2 + 200] ^= 0x10
    path.unlink()  # it may be a link to another name
    path.write_bytes(raw)
    return entry.filename


def test_large_tensors_are_verified_too(run_copy):
    """And a checkpoint other than last.pt has no predecessor."""
    path = run_copy / "checkpoints" / "best.pt"
    with pytest.raises(UserError, match=f"damaged or cut off .*{damage_largest(path)}"):
        read_latest(path, pytest.fail)


# ---------------------------------------------------------------------------- the predecessor


def test_damaged_checkpoint_is_replaced_by_its_predecessor(finished_run, run_copy):
    damage_largest(run_copy / "checkpoints" / "last.pt")
    result = run_script("train.py", "--resume", run_copy, cwd=run_copy.parent)
    assert result.status == 0, result.error
    assert "warning: " in result.output and "previous.pt instead" in result.output
    assert "warning: " in (run_copy / "log.txt").read_text(encoding="utf-8")
    assert rows(run_copy) == rows(finished_run)
    again, before = (read_checkpoint(run / "checkpoints" / "last.pt") for run in (run_copy, finished_run))
    assert_same([again["model"], again["optimizer"]], [before["model"], before["optimizer"]])


def test_predecessor_is_not_given_up_for_a_damaged_checkpoint(finished_run, tmp_path):
    """While a run continues from previous.pt, some name holds a whole checkpoint at every rename."""
    for call_number in itertools.count(1):
        run = shutil.copytree(finished_run, tmp_path / str(call_number))
        checkpoints = run / "checkpoints"
        damage_largest(checkpoints / "last.pt")
        with pytest.MonkeyPatch.context() as patch:
            ours = lambda _, target: Path(target).parent == checkpoints  # noqa: B023, E731
            fail_at(patch, os, "replace", call_number, FULL_DISK, counts=ours)
            result = call(train.main, "--resume", run)
        content = read_latest(checkpoints / "last.pt", lambda line: None)
        assert content["progress"]["epoch"] in (2, 3)
        if result.status == 0:
            break
        message(result)
    assert call_number > 2


def test_predecessor_is_used_when_the_latest_is_damaged_and_named(finished_run, run_copy):
    last = run_copy / "checkpoints" / "last.pt"
    damage_largest(last)
    result = call(train.main, "--resume", last)
    assert result.status == 0, result.error
    assert "previous.pt" in result.output
    assert rows(run_copy) == rows(finished_run)


def test_predecessor_is_used_when_the_latest_is_missing(finished_run, run_copy):
    (run_copy / "checkpoints" / "last.pt").unlink()
    result = call(train.main, "--resume", run_copy)
    assert result.status == 0, result.error
    assert "previous.pt" in result.output
    assert rows(run_copy) == rows(finished_run)


def test_both_damaged(run_copy):
    damage_largest(run_copy / "checkpoints" / "last.pt")
    damage_largest(run_copy / "checkpoints" / "previous.pt")
    before = snapshot(run_copy)
    assert "damaged or cut off" in message(call(train.main, "--resume", run_copy))
    assert snapshot(run_copy) == before


# ---------------------------------------------------------------------------- hostile files


def with_pickle(path: Path, source: bytes, data: bytes) -> Path:
    """Write the archive `source` with another data.pkl, in its attributes as torch writes it."""
    with zipfile.ZipFile(io.BytesIO(source)) as old, zipfile.ZipFile(path, "w") as new:
        for entry in old.infolist():
            content = data if entry.filename.endswith("/data.pkl") else old.read(entry)
            new.writestr(entry.filename, content)
        for entry in new.filelist:  # zipfile's own default is another one
            entry.external_attr = 0
    return path


def test_pickle_damaged_behind_a_right_checksum(whole, tmp_path):
    """Whatever the unpickler does with a broken program ends in a UserError; an honest one passes."""
    raw, original = whole
    with zipfile.ZipFile(io.BytesIO(raw)) as archive:
        program = archive.read("archive/data.pkl")
    path = with_pickle(tmp_path / "pickle.pt", raw, program)
    assert_same(read_checkpoint(path), original)
    for offset in range(len(program)):
        changed = [
            program[:offset],
            program[:offset] + bytes([program[offset] ^ (1 << offset // 3 % 8)]) + program[offset + 1 :],
            program[:offset] + b"." + program[offset + 1 :],
        ]
        with_pickle(path, raw, changed[offset % 3])
        try:
            content = read_checkpoint(path)
        except UserError as error:
            assert str(path) in str(error)
            continue
        assert content["format"] == "resnext checkpoint"


NAMES = ("os mkdir", "posix mkdir", "pathlib Path.mkdir", "torch.hub os.mkdir", "builtins eval", "torch load")
NAMES += ("torch.jit load", "numpy load", "zipfile ZipFile", "functools partial", "train run")
NAMES += ("resnext.engine.checkpoint write_checkpoint", "torch._utils _rebuild_parameter")


@pytest.mark.parametrize("name", NAMES)
def test_no_function_is_called(name, whole, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    program = "\x80\x02c{}\n{}\nU\x05pwned\x85R.".format(*name.split())
    path = with_pickle(tmp_path / "hostile.pt", whole[0], program.encode("latin-1"))
    with pytest.raises(UserError, match=f"not a checkpoint of this program.*more than tensors.*{name}"):
        read_checkpoint(path)
    assert os.listdir(tmp_path) == ["hostile.pt"]


DOUBLING = b"".join(
    b"h" + bytes([i]) + b"h" + bytes([i]) + b"\x86q" + bytes([i + 1]) + b"0" for i in range(60)
)
ENDLESS = {
    "2^60 parts": (b"\x80\x02K\1q\x000" + DOUBLING + b"h\x3c.", "repeats its parts"),
    "a list that holds itself": (b"\x80\x02]q\0h\0a.", "repeats its parts"),
    "millions of parts in a frame": (
        b"\x80\x04\x95" + struct.pack("<Q", 6_000_001) + b"}0" * 3_000_000 + b".",
        "over 4,000,000 parts",
    ),
    "a number of 800 bits": (b"\x80\x02\x8ad" + b"\x7f" * 100 + b".", "more than tensors"),
    "a dtype": (b"\x80\x02ctorch\nFloatStorage\n.", "more than tensors"),
}


@pytest.mark.parametrize("name", ENDLESS)
def test_pickles_without_end_or_meaning(name, whole, tmp_path):
    program, words = ENDLESS[name]
    path = with_pickle(tmp_path / "w.pt", whole[0], program)
    with pytest.raises(UserError, match=words):
        read_checkpoint(path)


@pytest.mark.parametrize("exponent", [28, 50], ids=["256 MiB", "1 PiB"])
def test_small_file_takes_no_large_memory(exponent, whole, tmp_path):
    """bytearray(n) is allowed by torch's unpickler, and makes any number of bytes out of ten."""
    length = b"\x8a\x08" + struct.pack("<q", 1 << exponent)
    with_pickle(tmp_path / "bomb.pt", whole[0], b"\x80\x02cbuiltins\nbytearray\n" + length + b"\x85R.")
    tracemalloc.start()
    try:
        with pytest.raises(UserError, match="not a checkpoint of this program"):
            read_checkpoint(tmp_path / "bomb.pt")
        assert tracemalloc.get_traced_memory()[1] < 1 << 24
    finally:
        tracemalloc.stop()


def test_entries_that_share_their_bytes(tmp_path):
    """The directory of a zip names the same 1 MiB a thousand times."""
    path = tmp_path / "overlap.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", bytes(1 << 20))
        archive.filelist.extend([archive.infolist()[0]] * 1000)
    with pytest.raises(UserError, match=r"overlap\.pt.*entries overlap"):
        read_checkpoint(path)


@pytest.mark.parametrize("compression", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_compressed_archive_is_not_unpacked(compression, tmp_path, monkeypatch):
    with zipfile.ZipFile(tmp_path / "bomb.pt", "w", compression) as archive:
        archive.writestr("archive/data.pkl", bytes(1 << 24))
    assert (tmp_path / "bomb.pt").stat().st_size < 1 << 16
    monkeypatch.setattr(zipfile.ZipFile, "open", lambda *_: pytest.fail("is unpacked"))
    with pytest.raises(UserError, match="a compressed archive, which"):
        read_checkpoint(tmp_path / "bomb.pt")


def test_size_of_an_entry_is_not_believed(whole, tmp_path):
    """The directory promises 1 GiB in a file of 2 KiB."""
    raw = bytearray(whole[0])
    start = raw.rindex(b"PK\x01\x02")
    raw[start + 20 : start + 28] = struct.pack("<II", 1 << 30, 1 << 30)
    (tmp_path / "huge.pt").write_bytes(raw)
    with pytest.raises(UserError, match=r"huge\.pt"):
        read_checkpoint(tmp_path / "huge.pt")


@pytest.mark.parametrize("name", ["", "nowhere.pt"])
def test_not_a_file(name, tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        read_checkpoint(tmp_path / name)


# ---------------------------------------------------------------------------- senseless contents


def replace(run: Path, **changes: object) -> Path:
    """Leave a run last.pt alone, with other contents; `...` removes a key."""
    path = run / "checkpoints" / "last.pt"
    content = torch.load(path, weights_only=True) | changes
    for other in path.parent.iterdir():
        other.unlink()
    torch.save({key: value for key, value in content.items() if value is not ...}, path)
    return path


VALUES = {"missing": ..., "5": 5, "None": None, "text": "text", "[]": [], "{}": {}, "tensor": torch.zeros(3)}
QUICK = {(key, "missing") for key in ("format", *KEYS)} | {
    ("version", "5"),
    ("classes", "[]"),
    ("config", "None"),
}
QUICK |= {(key, "{}") for key in ("model", "optimizer", "progress", "rng", "scaler", "ema", "versions")}
QUICK |= {("model", "tensor"), ("preprocessing", "text")}
ENTRIES = [
    pytest.param(key, value, marks=() if (key, value) in QUICK else pytest.mark.slow)
    for key in ("format", *KEYS)
    for value in VALUES
]


@pytest.mark.parametrize(("key", "value"), ENTRIES)
def test_missing_or_senseless_entries(key, value, run_copy):
    """Each entry of a checkpoint may be anything: one message, or it was not needed."""
    path = replace(run_copy, **{key: VALUES[value]})
    before = snapshot(run_copy)
    for main, arguments in (
        (evaluate.main, [path, "--batch-size", "20"]),
        (train.main, ["--resume", run_copy, "train.epochs=3"]),
    ):
        result = call(main, *arguments)
        if result.status != 0:  # without our format, the weights are taken for another program's
            foreign = main is evaluate.main and key == "format"
            assert ("--data" if foreign else "last.pt") in message(result)
            assert snapshot(run_copy) == before


SENSELESS = {
    "wide": {"config": "model: {stem: cifar, depth: 11, cardinality: 1, base_width: 1000000}"},
    "deep": {"config": "model: {stem: cifar, stages: [1, 1, 2000]}"},
    "endless": {"config": "model: {stem: cifar, cardinality: " + "9" * 30 + "}"},
    "another network": {"config": "model: {stem: cifar, depth: 11}"},
    "no configuration": {"config": "zebra"},
    "long configuration": {"config": "#" * (1 << 21)},
    "more classes": {"classes": [str(number) for number in range(1000)]},
    "classes that are no texts": {"classes": [0] * 10},
    "weights that are no tensors": {"model": {"conv1.weight": 5}},
    "weights of another shape": {"model": {"conv1.weight": torch.zeros(1).expand(10**6, 10**6)}},
}


@pytest.mark.parametrize("name", SENSELESS)
def test_senseless_networks(name, run_copy):
    path = replace(run_copy, **SENSELESS[name])
    assert "last.pt" in message(call(evaluate.main, path))
    arguments = ["--resume", path, "--output", run_copy.parent / "out"]
    assert "last.pt" in message(call(train.main, *arguments))


def test_weights_that_are_larger_than_their_file(run_copy):
    """One number, seen as a tensor of any shape, is no weight."""
    model = torch.load(run_copy / "checkpoints" / "last.pt", weights_only=True)["model"]
    small = {key: value[(0,) * value.ndim].clone().expand(value.shape) for key, value in model.items()}
    text = message(call(evaluate.main, replace(run_copy, model=small)))
    assert "last.pt" in text and "larger than the file" in text


def test_an_average_that_is_missing(run_copy):
    """As if the configuration of the run had asked for one."""
    path = run_copy / "checkpoints" / "last.pt"
    config = torch.load(path, weights_only=True)["config"]
    assert config.count("ema_decay: null") == 1
    replace(run_copy, config=config.replace("ema_decay: null", "ema_decay: 0.9"))
    result = call(train.main, "--resume", run_copy, "train.epochs=3", "train.ema_decay=0.9")
    assert "last.pt: has no " in message(result)


@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8])
def test_momentum_of_another_shape(dtype, run_copy):
    optimizer = torch.load(run_copy / "checkpoints" / "last.pt", weights_only=True)["optimizer"]
    optimizer["state"][0]["momentum_buffer"] = torch.zeros(1, dtype=dtype).expand(10**7, 10**7)
    replace(run_copy, optimizer=optimizer)
    assert "last.pt" in message(call(train.main, "--resume", run_copy, "train.epochs=3"))
