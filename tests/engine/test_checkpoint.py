"""Checkpoints: plain on disk, whole at every instant, verified when read, harmless whatever is in them."""

import errno
import io
import itertools
import json
import os
import random
import shutil
import signal
import struct
import time
import tracemalloc
import zipfile
from collections import namedtuple
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from commands import call, message, run_script, snapshot

import evaluate
import train
from resnext.config import parse_config, read_config
from resnext.engine.checkpoint import read_checkpoint, read_latest, write_checkpoint
from resnext.engine.train_state import TrainProgress
from resnext.errors import UserError

DOCUMENTED = {
    "format",
    "version",
    "model",
    "optimizer",
    "scaler",
    "ema",
    "progress",
    "rng",
    "config",
    "classes",
    "preprocessing",
    "versions",
}


def content_number(number: int) -> dict:
    """A small checkpoint that can be told from others by its number."""
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


def same(a: object, b: object) -> bool:
    """Equal in type and value, tensors bit by bit."""
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, dict) and isinstance(b, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


def number(path: Path) -> int:
    return read_checkpoint(path)["progress"]["epoch"]


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


# ---------------------------------------------------------------------------- what is written


def test_checkpoint_of_a_run_is_plain(finished_run):
    path = finished_run / "checkpoints" / "last.pt"
    content = torch.load(path, weights_only=True)
    assert set(content) == DOCUMENTED
    assert (content["format"], content["version"]) == ("resnext checkpoint", 1)

    def walk(value: object) -> None:
        assert isinstance(value, dict | list | str | bool | int | float | None | torch.Tensor), type(value)
        for item in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
            walk(item)

    walk(content)
    progress = content["progress"]
    assert (progress["epoch"], progress["step"], progress["global_step"]) == (3, 0, 6)
    assert progress["rows"] == len((finished_run / "metrics.jsonl").read_text().splitlines())
    assert content["classes"] == list("0123456789")
    assert content["preprocessing"] == {"image_size": 8, "mean": [128.0] * 3, "std": [64.0] * 3}
    assert parse_config(content["config"], "content") == read_config(finished_run / "config.yaml")
    assert torch.__version__.startswith(content["versions"]["torch"])
    assert content["scaler"] is None
    assert content["ema"] is None


def test_names_of_a_run(finished_run):
    assert names(finished_run / "checkpoints") == {"last.pt", "best.pt", "previous.pt"}
    assert number(finished_run / "checkpoints" / "last.pt") == 3
    assert number(finished_run / "checkpoints" / "previous.pt") == 2


def test_what_is_written_is_what_is_read(tmp_path):
    write_checkpoint(content_number(1), tmp_path / "a" / "checkpoints", ["last.pt", "best.pt"])
    for name in ("last.pt", "best.pt"):
        content = read_checkpoint(tmp_path / "a" / "checkpoints" / name)
        assert same(content, {"format": "resnext checkpoint", "version": 1, **content_number(1)})


def test_last_keeps_its_predecessor(tmp_path):
    for step in (1, 2, 3):
        write_checkpoint(content_number(step), tmp_path, ["last.pt", "best.pt"] if step == 2 else ["last.pt"])
    assert {name: number(tmp_path / name) for name in names(tmp_path)} == {
        "last.pt": 3,
        "previous.pt": 2,
        "best.pt": 2,
    }


@pytest.mark.parametrize("code", [errno.EPERM, errno.EXDEV, errno.EOPNOTSUPP, errno.EMLINK])
def test_disks_without_hard_links(code, tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "link", refuse)
    for step in (1, 2):
        write_checkpoint(content_number(step), tmp_path, ["last.pt", "best.pt"])
    found = {name: number(tmp_path / name) for name in names(tmp_path)}
    assert found == {"last.pt": 2, "best.pt": 2, "previous.pt": 1}


# ---------------------------------------------------------------------------- writing that fails


def fail_at(monkeypatch, module: object, function: str, call_number: int, error: BaseException) -> list:
    """Let the n-th call of module.function raise; returns a list of the calls so far."""
    real, calls = getattr(module, function), []

    def failing(*arguments, **options):
        calls.append(arguments)
        if len(calls) == call_number:
            raise error
        return real(*arguments, **options)

    monkeypatch.setattr(module, function, failing)
    return calls


def torch_save_stops(after: int, error: BaseException):
    """torch.save that fails when so many bytes are on the disk."""

    def save(content, file):
        whole = io.BytesIO()
        torch.serialization.save(content, whole)
        file.write(whole.getvalue()[:after])
        file.flush()
        raise error

    return save


@pytest.fixture
def folder(tmp_path) -> Path:
    """A folder with last.pt (2), previous.pt (1) and best.pt (1)."""
    write_checkpoint(content_number(1), tmp_path / "checkpoints", ["last.pt", "best.pt"])
    write_checkpoint(content_number(2), tmp_path / "checkpoints", ["last.pt"])
    return tmp_path / "checkpoints"


def expect_whole(folder: Path, untouched: bool) -> None:
    """Nothing temporary is left, and each name holds its old content or, in its whole, the new."""
    assert names(folder) == {"last.pt", "best.pt", "previous.pt"}
    found = {name: number(folder / name) for name in names(folder)}
    if untouched:
        assert found == {"last.pt": 2, "best.pt": 1, "previous.pt": 1}
    assert found["last.pt"] in (2, 3)
    assert found["best.pt"] in (1, 3)
    assert found["previous.pt"] in (1, 2)


def attempt(folder: Path) -> None:
    """Write number 3, which must fail with a message that says where and what to do."""
    with pytest.raises(UserError) as caught:
        write_checkpoint(content_number(3), folder, ["last.pt", "best.pt"])
    assert str(folder) in str(caught.value)
    assert "could not be written" in str(caught.value)
    assert "--resume" in str(caught.value)
    assert "\n" not in str(caught.value)


FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
TORCH_FULL = RuntimeError(
    "[enforce fail at inline_container.cc:858] . PytorchStreamWriter failed writing file data/1: file write"
    " failed\nframe #0: c10::ThrowEnforceNotMet(...)"
)


@pytest.mark.parametrize("error", [FULL, TORCH_FULL, OSError(), RuntimeError("")], ids=lambda e: repr(e)[:24])
@pytest.mark.parametrize("after", [0, 1, 1000, 2000])
def test_torch_save_fails(after, error, folder, monkeypatch):
    monkeypatch.setattr(torch, "save", torch_save_stops(after, error))
    attempt(folder)
    expect_whole(folder, untouched=True)


def test_disk_is_nearly_full(folder, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(1 << 40, 1 << 40, 1000))
    attempt(folder)
    expect_whole(folder, untouched=True)


@pytest.mark.parametrize("call_number", [1, 2])
def test_fsync_fails(call_number, folder, monkeypatch):
    calls = fail_at(monkeypatch, os, "fsync", call_number, OSError(errno.EIO, "Input/output error"))
    attempt(folder)
    assert len(calls) == call_number
    expect_whole(folder, untouched=call_number == 1)


@pytest.mark.parametrize("call_number", [1, 2, 3])
def test_rename_fails(call_number, folder, monkeypatch):
    calls = fail_at(monkeypatch, os, "replace", call_number, OSError(errno.EIO, "Input/output error"))
    attempt(folder)
    assert len(calls) == call_number
    expect_whole(folder, untouched=call_number == 1)


@pytest.mark.parametrize("call_number", [1, 2, 3])
def test_copy_fails_where_there_are_no_hard_links(call_number, folder, monkeypatch):
    real, calls = shutil.copyfile, []

    def copy_half(source, target):
        calls.append(target)
        if len(calls) < call_number:
            return real(source, target)
        Path(target).write_bytes(Path(source).read_bytes()[:1000])
        raise FULL

    def refuse(*_, **__):
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    monkeypatch.setattr(shutil, "copyfile", copy_half)
    attempt(folder)
    assert len(calls) == call_number
    expect_whole(folder, untouched=call_number == 1)


def test_folder_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("mine")
    attempt(tmp_path / "file" / "checkpoints")
    assert (tmp_path / "file").read_text() == "mine"


def test_writing_works_again_when_there_is_room(folder):
    with pytest.MonkeyPatch.context() as patch:
        fail_at(patch, os, "replace", 2, FULL)
        attempt(folder)
    write_checkpoint(content_number(4), folder, ["last.pt", "best.pt"])
    assert number(folder / "last.pt") == number(folder / "best.pt") == 4
    assert number(folder / "previous.pt") in (2, 3)
    assert names(folder) == {"last.pt", "best.pt", "previous.pt"}


def expect_whole_after_kill(folder: Path) -> None:
    """Whole files now, after another kill in the middle of the next save, and after the next save."""
    last, best = number(folder / "last.pt"), number(folder / "best.pt")
    assert last in (2, 3)
    assert best in (1, 3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "save", torch_save_stops(100, Killed()))
        with pytest.raises(Killed):
            write_checkpoint(content_number(4), folder, ["last.pt"])
    assert (number(folder / "last.pt"), number(folder / "best.pt")) == (last, best)
    write_checkpoint(content_number(4), folder, ["last.pt"])
    assert (number(folder / "last.pt"), number(folder / "best.pt")) == (4, best)
    assert number(folder / "previous.pt") == last
    assert names(folder) == {"last.pt", "best.pt", "previous.pt"}


class Killed(BaseException):
    """What no code may catch."""


@pytest.mark.parametrize("links", [True, False], ids=["links", "no links"])
@pytest.mark.parametrize("function", ["fsync", "link", "replace", "open"])
def test_killed_at_any_call(function, links, tmp_path):
    """A process that ends at once, before its n-th call of a function, for every n there is."""
    for call_number in itertools.count(1):
        folder = tmp_path / str(call_number)
        write_checkpoint(content_number(1), folder, ["last.pt", "best.pt"])
        write_checkpoint(content_number(2), folder, ["last.pt"])
        child = os.fork()
        if child == 0:
            try:
                killed_while_writing(folder, function, call_number, links)
            finally:
                os._exit(1)
        _, status = os.waitpid(child, 0)
        expect_whole_after_kill(folder)
        if os.waitstatus_to_exitcode(status) == 0:
            break
        assert os.waitstatus_to_exitcode(status) == 9
    assert call_number > 1 or (function, links) == ("link", False)


def killed_while_writing(folder: Path, function: str, call_number: int, links: bool) -> None:
    real, calls = getattr(os, function), itertools.count(1)

    def killing(*arguments, **options):
        if next(calls) == call_number:
            os._exit(9)
        return real(*arguments, **options)

    setattr(os, function, killing)
    if not links:

        def refuse(*_, **__):
            raise OSError(errno.EPERM, "Operation not permitted")

        os.link = refuse
    write_checkpoint(content_number(3), folder, ["last.pt", "best.pt"])
    os._exit(0)


def test_killed_a_hundred_times_while_saving(tmp_path):
    """kill -9 at a random instant of a process that does nothing but save, each time one number on."""
    moments, seen = random.Random(0), [0]
    ballast = {"weights": torch.arange(2**18, dtype=torch.float32)}  # a megabyte takes a moment to write
    for _ in range(100):
        child = os.fork()
        if child == 0:
            for n in itertools.count(seen[-1] + 1):
                write_checkpoint(content_number(n) | {"ballast": ballast}, tmp_path, ["last.pt", "best.pt"])
        time.sleep(moments.uniform(0.002, 0.06))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        if (tmp_path / "last.pt").exists():
            lines = []
            content = read_latest(tmp_path / "last.pt", lines.append)
            assert lines == [] and torch.equal(content["ballast"]["weights"], ballast["weights"])
            seen.append(number(tmp_path / "last.pt"))
            assert number(tmp_path / "best.pt") - seen[-1] in (0, 1)  # it is renamed first
            if (tmp_path / "previous.pt").exists():
                assert seen[-1] - number(tmp_path / "previous.pt") in (1, 2)
    assert seen == sorted(seen) and seen[-1] > 50


# ---------------------------------------------------------------------------- reading damaged files


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> tuple[bytes, dict]:
    """The bytes of a small checkpoint and what is in it."""
    path = tmp_path_factory.mktemp("whole") / "last.pt"
    write_checkpoint(content_number(1), path.parent, ["last.pt"])
    return path.read_bytes(), read_checkpoint(path)


def expect_refused_or_same(path: Path, content: dict) -> bool:
    """Whether the file was refused, with a UserError; what is read instead must be the original."""
    try:
        found = read_checkpoint(path)
    except UserError as error:
        assert str(path) in str(error)
        assert "\n" not in str(error)
        return True
    assert same(found, content)
    return False


def test_cut_off_anywhere(whole, tmp_path):
    raw, content = whole
    path = tmp_path / "cut.pt"
    for length in [*range(0, len(raw), 7), *range(len(raw) - 70, len(raw))]:
        path.write_bytes(raw[:length])
        assert expect_refused_or_same(path, content), f"{length} of {len(raw)} bytes were accepted"


def test_a_bit_flipped_anywhere(whole, tmp_path):
    """A bit of every fourth byte; every bit of an entry of the zip's directory, which no checksum covers."""
    raw, content = whole
    path = tmp_path / "flipped.pt"
    with zipfile.ZipFile(io.BytesIO(raw)) as archive:
        entry = archive.getinfo("archive/data/0")
        payload = sum(entry.file_size for entry in archive.infolist())
    start = raw.rindex(b"PK\x01\x02", 0, raw.rindex(entry.filename.encode()))
    bits = [(offset, offset * 5 // 4 % 8) for offset in range(0, len(raw), 4)]
    bits += [(offset, bit) for offset in range(start, start + 46) for bit in range(8)]
    refused = 0
    for offset, bit in bits:
        flipped = bytearray(raw)
        flipped[offset] ^= 1 << bit
        path.write_bytes(flipped)
        refused += expect_refused_or_same(path, content)
    assert refused > payload / 4


def test_a_run_of_bytes_overwritten(whole, tmp_path):
    raw, content = whole
    draw = random.Random(0)
    path = tmp_path / "overwritten.pt"
    for _ in range(200):
        start, length = draw.randrange(len(raw)), draw.choice([2, 16, 200])
        path.write_bytes(raw[:start] + draw.randbytes(length) + raw[start + length :])
        expect_refused_or_same(path, content)


def test_a_part_missing_or_doubled(whole, tmp_path):
    raw, content = whole
    draw = random.Random(1)
    path = tmp_path / "shifted.pt"
    for _ in range(100):
        start, length = draw.randrange(len(raw)), draw.choice([1, 16, 200])
        path.write_bytes(raw[:start] + raw[start + length :])
        expect_refused_or_same(path, content)
        path.write_bytes(raw[: start + length] + raw[start:])
        expect_refused_or_same(path, content)


def test_large_tensors_are_verified_too(run_copy):
    """A bit of a weight changes the checksum of its record, which torch.load alone would not notice."""
    path = run_copy / "checkpoints" / "last.pt"
    raw = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        entry = max(archive.infolist(), key=lambda entry: entry.file_size)
    raw[entry.header_offset + entry.file_size // 2 + 200] ^= 0x10
    path.unlink()
    path.write_bytes(raw)
    with pytest.raises(UserError, match=f"damaged \\(checksum of {entry.filename}\\)"):
        read_checkpoint(path)


# ---------------------------------------------------------------------------- the predecessor


def damage(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.unlink()  # it may be a link to another name
    path.write_bytes(raw)


def rows(run: Path) -> list[dict]:
    """The rows of metrics.jsonl without their times."""
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [{key: value for key, value in json.loads(line).items() if key != "time"} for line in lines]


def test_damaged_checkpoint_is_replaced_by_its_predecessor(finished_run, run_copy):
    damage(run_copy / "checkpoints" / "last.pt")
    result = run_script("train.py", "--resume", run_copy, cwd=run_copy.parent)
    assert result.status == 0, result.error
    assert "warning: " in result.output
    assert "last.pt: damaged" in result.output
    assert "previous.pt instead" in result.output
    assert "warning: " in (run_copy / "log.txt").read_text(encoding="utf-8")
    assert rows(run_copy) == rows(finished_run)
    again, before = (read_checkpoint(run / "checkpoints" / "last.pt") for run in (run_copy, finished_run))
    assert same(again["model"], before["model"])
    assert same(again["optimizer"], before["optimizer"])


def test_predecessor_is_not_given_up_for_a_damaged_checkpoint(finished_run, tmp_path):
    """While a run goes on from previous.pt, some name holds a whole checkpoint at every rename."""
    for call_number in itertools.count(1):
        run = shutil.copytree(finished_run, tmp_path / str(call_number))
        checkpoints = run / "checkpoints"
        damage(checkpoints / "last.pt")
        with pytest.MonkeyPatch.context() as patch:
            real, calls = os.replace, []

            def failing(source, target, real=real, calls=calls, at=call_number, folder=checkpoints):
                if Path(target).parent == folder:
                    calls.append(target)
                    if len(calls) == at:
                        raise FULL
                return real(source, target)

            patch.setattr(os, "replace", failing)
            result = call(train.main, "--resume", run)
        content = read_latest(checkpoints / "last.pt", lambda line: None)
        assert content["progress"]["epoch"] in (2, 3)
        if result.status == 0:
            break
        message(result)
    assert call_number > 2


def test_predecessor_is_used_when_the_latest_is_gone(finished_run, run_copy):
    (run_copy / "checkpoints" / "last.pt").unlink()
    result = call(train.main, "--resume", run_copy)
    assert result.status == 0, result.error
    assert "previous.pt" in result.output
    assert rows(run_copy) == rows(finished_run)


def test_both_damaged(run_copy):
    damage(run_copy / "checkpoints" / "last.pt")
    damage(run_copy / "checkpoints" / "previous.pt")
    before = snapshot(run_copy)
    assert ".pt: damaged" in message(call(train.main, "--resume", run_copy))
    assert snapshot(run_copy) == before


def test_other_checkpoints_have_no_predecessor(run_copy):
    damage(run_copy / "checkpoints" / "best.pt")
    with pytest.raises(UserError, match=r"best\.pt: damaged"):
        read_latest(run_copy / "checkpoints" / "best.pt", pytest.fail)


# ---------------------------------------------------------------------------- hostile files

# Pickle of protocol 2 by hand: what no honest writer would write.
CALL = "\x80\x02c{}\n{}\n{}\x85R."


def with_pickle(path: Path, source: bytes, data: bytes) -> None:
    """The archive `source` with another data.pkl; to its checksums and attributes as torch writes it."""
    with zipfile.ZipFile(io.BytesIO(source)) as old, zipfile.ZipFile(path, "w") as new:
        for entry in old.infolist():
            content = data if entry.filename.endswith("/data.pkl") else old.read(entry)
            new.writestr(entry.filename, content)
        for entry in new.filelist:  # zipfile's own default is another one
            entry.external_attr = 0


def pickle_of(raw: bytes) -> bytes:
    with zipfile.ZipFile(io.BytesIO(raw)) as archive:
        return archive.read("archive/data.pkl")


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_pickle_damaged_behind_a_right_checksum(whole, tmp_path):
    """Whatever the pickle machine does with a broken program ends in a UserError."""
    raw, _ = whole
    program = pickle_of(raw)
    path = tmp_path / "pickle.pt"
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


def test_honest_pickle_passes(whole, tmp_path):
    """What is refused below is refused for its pickle alone."""
    with_pickle(tmp_path / "honest.pt", whole[0], pickle_of(whole[0]))
    assert same(read_checkpoint(tmp_path / "honest.pt"), whole[1])


@pytest.mark.parametrize(
    ("module", "function"),
    [
        ("os", "mkdir"),
        ("posix", "mkdir"),
        ("pathlib", "Path.mkdir"),
        ("torch.hub", "os.mkdir"),
        ("builtins", "eval"),
        ("torch", "load"),
        ("torch.jit", "load"),
        ("numpy", "load"),
        ("zipfile", "ZipFile"),
        ("functools", "partial"),
        ("train", "run"),
        ("resnext.engine.checkpoint", "write_checkpoint"),
    ],
)
def test_no_function_is_called(module, function, whole, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with_pickle(
        tmp_path / "hostile.pt", whole[0], CALL.format(module, function, "U\x05pwned").encode("latin-1")
    )
    with pytest.raises(UserError, match="not a checkpoint of this program"):
        read_checkpoint(tmp_path / "hostile.pt")
    assert names(tmp_path) == {"hostile.pt"}


@pytest.mark.parametrize("exponent", [28, 50], ids=["256 MiB", "1 PiB"])
def test_small_file_takes_no_large_memory(exponent, whole, tmp_path):
    """bytearray(n) is allowed to torch's unpickler, and makes any number of bytes out of ten."""
    length = b"\x8a\x08" + struct.pack("<q", 1 << exponent)
    program = b"\x80\x02cbuiltins\nbytearray\n" + length + b"\x85R."
    with_pickle(tmp_path / "bomb.pt", whole[0], program)
    tracemalloc.start()
    try:
        with pytest.raises(UserError, match="not a checkpoint of this program"):
            read_checkpoint(tmp_path / "bomb.pt")
        assert tracemalloc.get_traced_memory()[1] < 1 << 24
    finally:
        tracemalloc.stop()


def test_entries_that_share_their_bytes(tmp_path):
    """A zip whose directory names the same 1 MiB a thousand times."""
    entries, size = 1000, 1 << 20
    path = tmp_path / "overlap.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", bytes(size))
        entry = archive.infolist()[0]
        entry.external_attr = 0
        for _ in range(entries):
            archive.filelist.append(entry)
    with pytest.raises(UserError, match=r"overlap\.pt"):
        read_checkpoint(path)


@pytest.mark.parametrize("compression", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_compressed_archive_is_not_unpacked(compression, whole, tmp_path, monkeypatch):
    with zipfile.ZipFile(tmp_path / "bomb.pt", "w", compression) as archive:
        archive.writestr("archive/data.pkl", bytes(1 << 24))
    assert (tmp_path / "bomb.pt").stat().st_size < 1 << 16
    monkeypatch.setattr(zipfile.ZipFile, "open", lambda *_: pytest.fail("is unpacked"))
    with pytest.raises(UserError, match="a compressed archive, which"):
        read_checkpoint(tmp_path / "bomb.pt")


def test_size_of_an_entry_is_not_believed(whole, tmp_path):
    """A directory that promises 1 GiB in a file of 2 KiB."""
    raw = bytearray(whole[0])
    start = raw.rindex(b"PK\x01\x02")
    raw[start + 20 : start + 28] = struct.pack("<II", 1 << 30, 1 << 30)
    (tmp_path / "huge.pt").write_bytes(raw)
    with pytest.raises(UserError, match=r"huge\.pt"):
        read_checkpoint(tmp_path / "huge.pt")


def test_not_a_file(tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        read_checkpoint(tmp_path)
    with pytest.raises(UserError, match="cannot be read"):
        read_checkpoint(tmp_path / "nowhere.pt")


def replace(path: Path, **changes: object) -> None:
    """Rewrite a checkpoint with other contents; ... leaves a key out."""
    content = torch.load(path, weights_only=True) | changes
    path.unlink(missing_ok=True)
    torch.save({key: value for key, value in content.items() if value is not ...}, path)


@pytest.mark.parametrize("value", [..., 5, None, "text", [], {}, torch.zeros(3)], ids=lambda v: repr(v)[:9])
@pytest.mark.parametrize("key", sorted(DOCUMENTED))
def test_missing_or_senseless_entries(key, value, run_copy):
    """Each entry of a checkpoint may be anything: one message, or it was not needed."""
    path = run_copy / "checkpoints" / "last.pt"
    (run_copy / "checkpoints" / "previous.pt").unlink()
    replace(path, **{key: value})
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
    path = run_copy / "checkpoints" / "last.pt"
    replace(path, **SENSELESS[name])
    assert "last.pt" in message(call(evaluate.main, path))
    arguments = ["--resume", path, "--output", run_copy.parent / "out"]
    assert "last.pt" in message(call(train.main, *arguments))


def test_weights_that_are_larger_than_their_file(run_copy):
    """One number, seen as a tensor of any shape, is no weight."""
    path = run_copy / "checkpoints" / "last.pt"
    content = torch.load(path, weights_only=True)
    weights = {
        key: value[(0,) * value.ndim].clone().expand(value.shape) for key, value in content["model"].items()
    }
    replace(path, model=weights)
    assert "last.pt" in message(call(evaluate.main, path))


@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8])
def test_momentum_of_another_shape(dtype, run_copy):
    path = run_copy / "checkpoints" / "last.pt"
    (path.parent / "previous.pt").unlink()
    optimizer = torch.load(path, weights_only=True)["optimizer"]
    optimizer["state"][0]["momentum_buffer"] = torch.zeros(1, dtype=dtype).expand(10**7, 10**7)
    replace(path, optimizer=optimizer)
    assert "last.pt" in message(call(train.main, "--resume", run_copy, "train.epochs=3"))
