"""check_data.py on class folders with everything that may be wrong with them."""

import contextlib
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
from commands import ROOT, Result, call, draw_folders, message, run_python, snapshot
from images import encode, noise, orientation
from PIL import Image
from shard_files import make

from data.walk import FORMATS

sys.path.insert(0, str(ROOT / "scripts"))
import check_data

COMMAND = [sys.executable, ROOT / "scripts/check_data.py"]


@pytest.fixture
def folder(tmp_path) -> Path:
    """Two classes of three good images each in train/ and val/."""
    return draw_folders(tmp_path / "set", {"cat": 3, "dog": 3}, size=40)


def check(folder: Path, workers: int = 1) -> tuple[Result, dict]:
    """Return the result and the --json report."""
    target = folder.parent / "report.json"
    result = call(check_data.main, folder, "--json", target, "--workers", workers)
    return result, json.loads(target.read_text()) if target.exists() else {}


def problems(report: dict) -> dict:
    return {kind: found for kind, found in report["problems"].items() if found}


def draw(
    path: Path, width: int = 40, height: int = 40, mode: str = "RGB", kind: str = "PNG", **options
) -> None:
    """Write an image of noise, different for each path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = noise(height, width, 3, seed=list(os.fsencode(path)))
    path.write_bytes(encode(Image.fromarray(pixels).convert(mode), kind, **options))


def test_good_folders(folder):
    before = snapshot(folder, folders=True)
    result, report = check(folder)
    assert (result.status, result.error) == (0, "")
    assert "fit for training" in result.output.splitlines() and "\r" not in result.output
    assert "train: 6 images in 2 classes, 3 (cat) to 3 (cat) each, median 3" in result.output
    assert report["pictures"] == {"train": 6, "val": 6}
    assert report["classes"] == {"train": {"cat": 3, "dog": 3}, "val": {"cat": 3, "dog": 3}}
    assert not problems(report) and not any(report["odd"].values()) and not any(report["duplicates"].values())
    assert report["warnings"] == report["ignored"] == []
    assert snapshot(folder, folders=True) == before


def test_shards(folder):
    """They get the report of their class folders."""
    cat = folder / "train/cat"
    draw(cat / "gray.jpg", mode="L", kind="JPEG")
    (cat / "cut.jpg").write_bytes(encode(noise(40, 40, 3), "JPEG")[:-99])
    shutil.copy(cat / "0.png", folder / "val/dog/same.png")
    for path in (folder / "val/cat").iterdir():
        path.unlink()
    expected = check(folder)[1]
    shards = make(folder, folder.parent / "shards", "--images", 4)
    for root in (shards, f"{shards}/{{train-{{0000..0001}},validation-0000}}.tar"):
        result = call(check_data.main, root, "--json", folder.parent / "shards.json")
        report = json.loads((folder.parent / "shards.json").read_text())
        assert result.status == 1 and report["problems"].keys() == expected["problems"].keys()
        (ours,), (theirs,) = report.pop("warnings"), expected["warnings"]
        assert ours.partition(": has")[2] == theirs.partition(": has")[2] != ""
        different = {key for key in report if report[key] != expected[key]}
        assert different == {"folder"}
    (shards / "extra.tar").touch()
    output = call(check_data.main, shards).output
    assert "are compressed or have no split in their name: 1 (extra.tar)" in output


def test_sizes(folder):
    draw(folder / "train/cat/wide.png", 100, 50)
    sizes = check(folder)[1]["sizes"]
    found = {key: [table[q] for q in ("0", "0.5", "1")] for key, table in sizes["train"].items()}
    bytes_of = sorted(path.stat().st_size for path in (folder / "train").rglob("*.png"))
    assert found == {
        "width": [40, 40, 100],
        "height": [40, 40, 50],
        "bytes": [bytes_of[0], bytes_of[3], bytes_of[-1]],
    }
    assert sizes["val"]["width"]["1"] == 40


def test_broken_files(folder):
    cat = folder / "train/cat"
    whole = encode(noise(40, 40, 3), "JPEG")
    (cat / "deeper").mkdir()
    for name, content in {
        "cat/cut.JPG": whole[: len(whole) // 2],
        "cat/empty.png": b"",
        "dog/empty.png": b"",  # equal, but not reported as a duplicate
        "cat/text.jpeg": b"not an image",
        "cat/deeper/below.png": b"\x89PNG",
        "cat/huge.bmp": b"",
    }.items():
        (folder / "train" / name).write_bytes(content)
    os.truncate(cat / "huge.bmp", 1 << 40)
    (cat / "link.png").symlink_to("nowhere")
    (cat / "self.png").symlink_to("self.png")
    os.mkfifo(cat / "pipe.png")
    (folder / "train/dog/back").symlink_to(folder / "train/dog")
    result, report = check(folder)
    assert result.status == 1 and problems(report).keys() == {"broken"}
    reasons = {
        "cut.JPG": "cannot be decoded",
        "empty.png": "empty",
        "text.jpeg": "cannot be decoded",
        "deeper/below.png": "cannot be decoded",
        "huge.bmp": "over 1 GiB, too large for an image",
        "link.png": "cannot be read (No such file",
        "self.png": "cannot be read (",
    }
    broken = report["problems"]["broken"]
    assert broken.keys() == {*(f"train/cat/{name}" for name in reasons), "train/dog/empty.png"}
    assert all(broken[f"train/cat/{name}"].startswith(reason) for name, reason in reasons.items())
    links, formats = report["warnings"]
    assert links.startswith(f"{folder / 'train'}: skipped links") and links.endswith("dog/back to dog")
    assert "unsupported formats: 1 (.png 1), such as cat/pipe.png" in formats
    assert f"Warnings\n  training also prints: 2\n    {links}\n" in result.output
    assert "broken files: 8" in result.output and "train/cat/empty.png: empty" in result.output
    assert "not fit for training" in result.output


def png_of_16_bits() -> bytes:
    """Return an RGB PNG with 16 bits per channel, which Pillow cannot write."""

    def part(kind: bytes, content: bytes) -> bytes:
        checksum = struct.pack(">I", zlib.crc32(kind + content))
        return struct.pack(">I", len(content)) + kind + content + checksum

    rows = b"".join(b"\0" + bytes(range(240)) for _ in range(40))
    start = part(b"IHDR", struct.pack(">IIBBBBB", 40, 40, 16, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + start + part(b"IDAT", zlib.compress(rows)) + part(b"IEND", b"")


def test_odd_files_are_harmless(folder):
    cat = folder / "train/cat"
    for name, options in {
        "gray.png": {"mode": "L"},
        "gray.jpg": {"mode": "L", "kind": "JPEG"},
        "cmyk.jpg": {"mode": "CMYK", "kind": "JPEG"},
        "named.JPEG": {"kind": "PNG"},
        "named.png": {"kind": "JPEG"},
        "small.png": {"width": 31, "height": 32},
        "fits.png": {"width": 32, "height": 160},
        "narrow.png": {"width": 32, "height": 161},
        "rotated.jpg": {"kind": "JPEG", "exif": orientation(6)},
        "upright.jpg": {"kind": "JPEG", "exif": orientation(1)},
        "glass.png": {"mode": "RGBA"},
    }.items():
        draw(cat / name, **options)
    (cat / "large.png").write_bytes(encode(Image.new("RGB", (10_001, 2_001))))
    (cat / "deep.png").write_bytes(encode(np.arange(1600, dtype=np.uint16).reshape(40, 40)))
    (cat / "deep_color.png").write_bytes(png_of_16_bits())
    frames = [Image.new("L", (40, 40), shade) for shade in (9, 99)]
    (cat / "moves.gif").write_bytes(encode(frames[0], "GIF", save_all=True, append_images=frames[1:]))
    result, report = check(folder)
    assert result.status == 0 and not problems(report)
    odd = {kind: {path.removeprefix("train/cat/") for path in found} for kind, found in report["odd"].items()}
    assert odd == {
        "gray": {"gray.png", "gray.jpg", "deep.png"},
        "cmyk": {"cmyk.jpg"},
        "deep": {"deep.png", "deep_color.png"},
        "format": {"named.JPEG", "named.png"},
        "orientation": {"rotated.jpg"},
        "alpha": {"glass.png"},
        "frames": {"moves.gif"},
        "small": {"small.png"},
        "large": {"large.png"},
        "aspect": {"narrow.png"},
    }
    assert "Odd, but harmless\n  gray: 3\n    train/cat/deep.png\n" in result.output


def test_ignored_files(folder):
    """System files and files beside the class folders are not listed; images there are a warning."""
    for name in ("train/dog/list.txt", "val/cat/.DS_Store", "train/readme.txt", "train/loose.PNG"):
        (folder / name).touch()
    result, report = check(folder)
    assert result.status == 0 and not problems(report) and "--flat-val" not in result.output
    assert report["ignored"] == ["train/dog/list.txt"]
    (warning,) = report["warnings"]
    assert warning.endswith("skipped images outside class folders: 1 (loose.PNG)")
    assert report["pictures"] == {"train": 6, "val": 6}


def test_classes_that_differ_or_are_empty(folder):
    train, val = folder / "train", folder / "val"
    (train / "bird").mkdir()
    (val / "ant").mkdir()
    draw(train / "cow/1.png")
    draw(val / "bird/1.png")
    result, report = check(folder)
    empty, unknown = problems(report)["refused"]
    assert result.status == 1 and problems(report).keys() == {"refused"}
    assert empty.startswith(f"{train / 'bird'}: contains no images ({FORMATS}); add some, or remove")
    assert unknown.startswith(f"{val}: class folder 'ant' is not a training class; use the same classes")
    (absent,) = report["warnings"]
    assert absent.startswith(f"{val}: has no images of 1 of 4 classes (cow)")
    assert "0 (bird) to 3 (cat) each" in result.output
    assert "Problems\n  training would stop with this error: 2\n" in result.output
    assert report["classes"]["val"] == {"bird": 1, "cat": 3, "cow": 0, "dog": 3}


def test_empty_splits(tmp_path):
    for split in ("train", "val"):
        (tmp_path / "set" / split).mkdir(parents=True)
    result, report = check(tmp_path / "set")
    train, val = (tmp_path / "set" / split for split in ("train", "val"))
    assert result.status == 1 and report["pictures"] == {"train": 0, "val": 0}
    assert problems(report)["refused"] == [
        f"{train}: contains no class folders; put images into {train}/CLASS/",
        f"{train}: contains no images of the known classes; check the path",
        f"{val}: contains no images of the known classes; check the path",
    ]


def test_val_without_class_folders(folder):
    val = folder / "val"
    for path in list(val.rglob("*.png")):
        path.rename(val / f"{path.parent.name}{path.name}")
    shutil.rmtree(val / "cat")
    shutil.rmtree(val / "dog")
    result, report = check(folder)
    flat, empty = problems(report)["refused"]
    assert result.status == 1 and report["pictures"] == {"train": 6, "val": 0}
    command = f"python scripts/prepare_imagenet.py TARS {folder} --flat-val {val} (TARS has the devkit)"
    assert flat.startswith(f"{val}: contains images outside class folders") and flat.endswith(command)
    assert empty == f"{val}: contains no images of the known classes; check the path"


def test_duplicates(folder):
    def copy(source: str, *targets: str) -> None:
        for target in targets:
            shutil.copy(folder / source, folder / target)

    copy("train/cat/0.png", "train/dog/same.png")
    copy("val/cat/0.png", "val/cat/same.png", "val/cat/third.png")
    result, report = check(folder)
    assert result.status == 0, "harmless within one split"
    assert report["duplicates"] == {
        "train": [["train/cat/0.png", "train/dog/same.png"]],
        "val": [["val/cat/0.png", "val/cat/same.png", "val/cat/third.png"]],
    }
    copy("train/dog/1.png", "val/dog/leak.png")
    copy("val/cat/0.png", "train/cat/leak.png")
    result, report = check(folder)
    assert result.status == 1 and problems(report) == {
        "train_and_val": [
            ["train/cat/leak.png", "val/cat/0.png", "val/cat/same.png", "val/cat/third.png"],
            ["train/dog/1.png", "val/dog/leak.png"],
        ]
    }
    assert "train/dog/1.png = val/dog/leak.png\n" in result.output
    assert len(report["duplicates"]["train"]) == 1 and not report["duplicates"]["val"]


def test_long_lists_and_unprintable_names(folder):
    """The console shows the first items and escapes names; the report has everything."""
    name = os.fsdecode(b"train/cat/\xff\n\x1b[31m.png")
    for broken in (name, *(f"train/dog/broken{number}.png" for number in range(39))):
        (folder / broken).touch()
    result, report = check(folder)
    assert len(report["problems"]["broken"]) == 40 and report["problems"]["broken"][name] == "empty"
    assert "\x1b" not in result.output and "\\udcff\\n\\x1b[31m.png" in result.output
    assert result.output.count(": empty") == 10
    assert f"and 30 more, in {folder.parent / 'report.json'}" in result.output
    assert "with --json FILE" in call(check_data.main, folder, "--workers", "1").output


def test_many_chunks(tmp_path):
    """Results of several workers arrive in any order; each belongs to its file."""
    folder = draw_folders(tmp_path / "set", {"cat": 90, "dog": 90}, size=32)
    numbers = range(0, 90, 7)
    for number in numbers:
        (folder / f"train/dog/{number}.png").write_bytes(b"")
        draw(folder / f"val/cat/{number}.png", 33, 200)
    _, report = check(folder, workers=2)
    assert set(report["problems"]["broken"]) == {f"train/dog/{number}.png" for number in numbers}
    assert set(report["odd"]["aspect"]) == {f"val/cat/{number}.png" for number in numbers}


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["none"], "none: no such folder"),
        (["set/train"], "data.dir set/train: has no train/"),
        (["set", "--workers", "0"], "--workers: must be at least 1"),
        (["set", "--json", "none/report.json"], "--json none/report.json: cannot be written"),
        (["set", "--json", "set"], "--json set: cannot be written"),
    ],
)
def test_wrong_usage(folder, arguments, text, monkeypatch):
    """It is reported before any work."""
    monkeypatch.chdir(folder.parent)
    monkeypatch.setattr(check_data, "inspect_all", lambda *_: pytest.fail("files were inspected"))
    assert text in message(call(check_data.main, *arguments))


def test_help_does_not_import_torch():
    code = (
        "import sys; sys.path.insert(0, 'scripts'); sys.argv[1:] = ['--help']; import check_data\n"
        "try: check_data.main()\nfinally: print('torch' in sys.modules)"
    )
    result = run_python("-c", code, cwd=ROOT)
    assert "Exit status 0: fit for training" in result.output and result.output.endswith("\nFalse\n")


# ---------------------------------------------------------------------------- processes that die

# Every Python process reads this at its start: a stand-in for decoders that crash or hang.
SABOTAGE = """
import os, signal, time
from PIL import Image

real = Image.open
def sabotaged(file, *arguments, **options):
    content = file.getvalue()
    if content.startswith(b"CRASH"):
        os.kill(os.getpid(), signal.SIGSEGV)
    if content.startswith(b"SLOW"):
        time.sleep(60)
    return real(file, *arguments, **options)
Image.open = sabotaged
"""


@pytest.fixture
def sabotage(tmp_path, monkeypatch) -> None:
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules/sitecustomize.py").write_text(SABOTAGE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "modules"))


@pytest.mark.usefixtures("sabotage")
def test_files_that_crash_the_decoder_are_found(tmp_path):
    folder = draw_folders(tmp_path / "set", {"cat": 50, "dog": 50})
    crashing = ("train/cat/7.png", "train/cat/8.png", "val/dog/49.png")
    for name in crashing:
        (folder / name).write_bytes(b"CRASH" + os.urandom(9))
    result, report = check(folder, workers=2)
    broken = report["problems"]["broken"]
    assert result.status == 1 and broken.keys() == set(crashing)
    assert all("its process died" in reason for reason in broken.values())
    assert report["sizes"]["val"]["width"] == dict.fromkeys(("0", "0.05", "0.5", "0.95", "1"), 8)
    assert report["pictures"] == {"train": 100, "val": 100} and len(report["odd"]["small"]) == 197


@pytest.mark.usefixtures("sabotage")
@pytest.mark.parametrize("how", ["Ctrl-C", "SIGINT", "SIGTERM", "SIGKILL"])
def test_stopped_at_once_without_orphans(folder, how):
    for path in folder.rglob("*.png"):
        path.write_bytes(b"SLOW")
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen([*COMMAND, folder, "--workers", "2"], start_new_session=True, **pipes)
    wait_until(lambda: len(living(process.pid)) >= 3)
    time.sleep(0.5)
    if how == "Ctrl-C":  # a terminal sends it to every process
        os.killpg(process.pid, signal.SIGINT)
    else:
        process.send_signal(getattr(signal, how))
    _, error = process.communicate(timeout=40)  # the slow files take 60 seconds
    wait_until(lambda: not living(process.pid))
    expected = {"SIGTERM": (143, ""), "SIGKILL": (-signal.SIGKILL, error.decode())}
    assert (process.returncode, error.decode()) == expected.get(how, (130, "interrupted\n"))


def living(session: int) -> list[int]:
    """Return the processes of a session, except zombies."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):  # it ends meanwhile
                state, _, _, its_session = (entry / "stat").read_text().rpartition(")")[2].split()[:4]
                if int(its_session) == session and state != "Z":
                    found.append(int(entry.name))
    return found


def wait_until(condition) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end, "timed out"
        time.sleep(0.02)


def test_broken_pipe(folder):
    """`check_data.py DIR | head -1` ends quietly."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen([*COMMAND, folder, "--workers", "1"], **pipes)
    process.stdout.close()
    assert process.stderr.read() == b""
    process.wait(60)
