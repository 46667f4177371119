"""check_data.py on class folders with everything that may be wrong with them."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from commands import ROOT, Result, draw_folders, message, run_script, snapshot
from PIL import Image

from data.walk import FORMATS

SCRIPT = "scripts/check_data.py"
ODD = ("gray", "cmyk", "deep", "format", "orientation", "alpha", "frames", "small", "large", "aspect")


@pytest.fixture
def folder(tmp_path) -> Path:
    """Two classes of three pictures each in train/ and val/, all fine."""
    return draw_folders(tmp_path / "set", {"cat": 3, "dog": 3}, size=40)


def check(folder: Path, *options: object) -> tuple[Result, dict]:
    """The result with two workers and the --json report."""
    target = folder.parent / "report.json"
    result = run_script(SCRIPT, folder, "--json", target, "--workers", "2", *options, cwd=folder.parent)
    assert "Traceback" not in result.error
    return result, json.loads(target.read_text()) if target.exists() else {}


def draw(
    path: Path, size: tuple[int, int] = (40, 40), mode: str = "RGB", kind: str = "PNG", **options
) -> Path:
    """A picture of noise, another one for each path."""
    generator = np.random.default_rng(list(os.fsencode(path)))
    noise = generator.integers(0, 256, (size[1], size[0], 3), np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(noise).convert(mode).save(path, kind, **options)
    return path


def problems(report: dict) -> dict:
    return {kind: found for kind, found in report["problems"].items() if found}


def test_a_good_set(folder):
    before = snapshot(folder, folders=True)
    result, report = check(folder)
    assert (result.status, result.error) == (0, "")
    assert "fit for training" in result.output.splitlines() and "\r" not in result.output
    assert "train: 6 pictures in 2 classes, 3 (cat) to 3 (cat) each, median 3" in result.output
    assert report["pictures"] == {"train": 6, "val": 6}
    assert report["classes"] == {"train": {"cat": 3, "dog": 3}, "val": {"cat": 3, "dog": 3}}
    assert not problems(report) and not any(report["odd"].values()) and not any(report["duplicates"].values())
    assert report["warnings"] == report["ignored"] == []
    assert snapshot(folder, folders=True) == before


def test_sizes(folder):
    draw(folder / "train/cat/wide.png", (100, 50))
    _, report = check(folder)
    sizes = report["sizes"]["train"]
    assert (sizes["width"]["0"], sizes["width"]["0.5"], sizes["width"]["1"]) == (40, 40, 100)
    assert (sizes["height"]["0"], sizes["height"]["0.5"], sizes["height"]["1"]) == (40, 40, 50)
    bytes_of = [path.stat().st_size for path in (folder / "train").rglob("*.png")]
    assert (sizes["bytes"]["0"], sizes["bytes"]["1"]) == (min(bytes_of), max(bytes_of))
    assert report["sizes"]["val"]["width"]["1"] == 40


def test_broken_files(folder):
    cat = folder / "train/cat"
    whole = draw(folder / "val/dog/whole.jpg", kind="JPEG").read_bytes()
    (cat / "cut.JPG").write_bytes(whole[: len(whole) // 2])
    (cat / "empty.png").touch()
    (folder / "val/cat/empty.png").touch()  # alike, but no duplicate to be told of
    (cat / "text.jpeg").write_text("no picture")
    (cat / "link.png").symlink_to("nowhere")
    (cat / "self.png").symlink_to("self.png")
    os.mkfifo(cat / "pipe.png")
    (folder / "train/dog/back").symlink_to(folder / "train/dog")
    with open(cat / "huge.bmp", "wb") as file:
        file.truncate(1 << 40)
    (cat / "deeper").mkdir()
    (cat / "deeper/below.png").write_bytes(b"\x89PNG")
    result, report = check(folder)
    assert result.status == 1
    names = (
        "cut.JPG",
        "empty.png",
        "text.jpeg",
        "link.png",
        "self.png",
        "huge.bmp",
        "deeper/below.png",
    )
    assert problems(report).keys() == {"broken"}
    broken = report["problems"]["broken"]
    assert broken.keys() == {*(f"train/cat/{name}" for name in names), "val/cat/empty.png"}
    assert broken["train/cat/empty.png"] == "empty"
    assert broken["train/cat/text.jpeg"].startswith("cannot be decoded")
    assert "No such file" in broken["train/cat/link.png"]
    back = "left out are links to what is there already: 1, such as dog/back to dog"
    pipe = (
        "left out are files of no known format: 1 (.png 1), such as cat/pipe.png; convert them to JPEG or PNG"
    )
    assert report["warnings"] == [f"{folder / 'train'}: {back}", f"{folder / 'train'}: {pipe}"]
    assert f"Warnings\n  training says too: 2\n    {folder / 'train'}: {back}\n" in result.output
    assert "broken files: 8" in result.output and "train/cat/empty.png: empty" in result.output
    assert "not fit for training" in result.output


def test_odd_files_do_no_harm(folder):
    cat = folder / "train/cat"
    draw(cat / "gray.png", mode="L")
    draw(cat / "gray.jpg", mode="L", kind="JPEG")
    draw(cat / "cmyk.jpg", mode="CMYK", kind="JPEG")
    draw(cat / "named.JPEG", kind="PNG")
    draw(cat / "named.png", kind="JPEG")
    draw(cat / "small.png", (31, 32))
    draw(cat / "fits.png", (32, 160))
    draw(cat / "narrow.png", (32, 161))
    draw(cat / "large.png", (10_001, 2_001))
    Image.fromarray(np.arange(1600, dtype=np.uint16).reshape(40, 40)).save(cat / "deep.png")
    exif = Image.Exif()
    exif[274] = 6
    draw(cat / "turned.jpg", kind="JPEG", exif=exif)
    exif[274] = 1
    draw(cat / "upright.jpg", kind="JPEG", exif=exif)
    draw(cat / "glass.png", mode="RGBA")
    frames = [Image.fromarray(np.full((40, 40), shade, np.uint8)) for shade in (9, 99)]
    frames[0].save(cat / "moves.gif", save_all=True, append_images=frames[1:])
    (cat / "deep_colour.png").write_bytes(png_of_16_bits())
    result, report = check(folder)
    assert result.status == 0, result.output
    odd = {kind: {path.removeprefix("train/cat/") for path in found} for kind, found in report["odd"].items()}
    assert odd == {
        "gray": {"gray.png", "gray.jpg", "deep.png"},
        "cmyk": {"cmyk.jpg"},
        "deep": {"deep.png", "deep_colour.png"},
        "format": {"named.JPEG", "named.png"},
        "orientation": {"turned.jpg"},
        "alpha": {"glass.png"},
        "frames": {"moves.gif"},
        "small": {"small.png"},
        "large": {"large.png"},
        "aspect": {"narrow.png"},
    }
    assert tuple(odd) == ODD
    assert not problems(report)
    assert "Odd, but no obstacle\n  gray: 3\n    train/cat/deep.png\n" in result.output


def png_of_16_bits() -> bytes:
    """RGB, 16 bits a channel, which Pillow cannot write."""
    import struct
    import zlib

    def part(kind: bytes, content: bytes) -> bytes:
        return (
            struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        )

    rows = b"".join(b"\0" + bytes(range(240)) for _ in range(40))
    start = part(b"IHDR", struct.pack(">IIBBBBB", 40, 40, 16, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + start + part(b"IDAT", zlib.compress(rows)) + part(b"IEND", b"")


def test_ignored_files(folder):
    (folder / "train/cat/picture.heic").write_bytes(b"?")
    (folder / "train/dog/list.txt").touch()
    (folder / "val/cat/.DS_Store").touch()
    (folder / "train/readme.txt").touch()
    result, report = check(folder)
    assert result.status == 0
    assert report["ignored"] == ["train/dog/list.txt"], (
        "system files and those beside the classes are not told"
    )
    assert report["warnings"] == [
        f"{folder / 'train'}: left out are files of no known format: 1 (.heic 1), such as "
        "cat/picture.heic; convert them to JPEG or PNG"
    ]
    assert report["pictures"] == {"train": 6, "val": 6}


def test_loose_pictures(folder):
    draw(folder / "train/loose.PNG")
    result, report = check(folder)
    assert result.status == 0 and not problems(report)
    assert report["warnings"] == [
        f"{folder / 'train'}: left out are pictures outside class folders: 1 (loose.PNG)"
    ]
    assert report["pictures"]["train"] == 6
    assert "--flat-val" not in result.output


def test_classes_that_differ_or_are_empty(folder):
    (folder / "train/bird").mkdir()
    draw(folder / "train/cow/1.png")
    draw(folder / "val/bird/1.png")
    (folder / "val/ant").mkdir()
    result, report = check(folder)
    assert result.status == 1
    train, val = folder / "train", folder / "val"
    assert problems(report) == {
        "refused": [
            f"{train / 'bird'}: holds no pictures ({FORMATS}); add some, or remove the class from train/ and "
            "val/",
            f"{val}: class folder 'ant' is not in train/; the classes of train/ and val/ must be the same",
        ]
    }
    assert report["warnings"] == [
        f"{val}: has no pictures of 1 of 4 classes (cow); errors are over the others"
    ]
    assert "0 (bird) to 3 (cat) each" in result.output
    assert "Problems\n  training ends with this error: 2\n" in result.output
    (train / "bird").rmdir()
    shutil.rmtree(val / "bird")
    (val / "ant").rmdir()
    result, report = check(folder)
    assert result.status == 0, "a class only in train/ is no obstacle"
    assert report["warnings"] == [
        f"{val}: has no pictures of 1 of 3 classes (cow); errors are over the others"
    ]
    assert report["classes"]["val"] == {"cat": 3, "cow": 0, "dog": 3}


def test_nothing_at_all(tmp_path):
    for split in ("train", "val"):
        (tmp_path / "set" / split).mkdir(parents=True)
    result, report = check(tmp_path / "set")
    train, val = (tmp_path / "set" / split for split in ("train", "val"))
    assert result.status == 1
    assert report["pictures"] == {"train": 0, "val": 0}
    assert problems(report)["refused"] == [
        f"{train}: holds no class folders; put pictures into {train}/CLASS/",
        f"{train}: holds no pictures of the known classes; check the path",
        f"{val}: holds no pictures of the known classes; check the path",
    ]


def test_flat_val(folder):
    for path in list((folder / "val").rglob("*.png")):
        path.rename(folder / "val" / f"{path.parent.name}{path.name}")
    for name in ("cat", "dog"):
        (folder / "val" / name).rmdir()
    result, report = check(folder)
    val = folder / "val"
    assert result.status == 1 and problems(report) == {
        "refused": [
            f"{val}: holds pictures outside class folders; for ImageNet's validation set: python "
            f"scripts/prepare_imagenet.py TARS {folder} --flat-val {val} (TARS has the devkit)",
            f"{val}: holds no pictures of the known classes; check the path",
        ]
    }
    assert report["pictures"] == {"train": 6, "val": 0}


def test_duplicates(folder):
    def copy(source: str, *targets: str) -> None:
        for target in targets:
            (folder / target).write_bytes((folder / source).read_bytes())

    copy("train/cat/0.png", "train/dog/same.png")
    copy("val/cat/0.png", "val/cat/same.png", "val/cat/third.png")
    result, report = check(folder)
    assert result.status == 0, "within one set they do no harm"
    assert report["duplicates"] == {
        "train": [["train/cat/0.png", "train/dog/same.png"]],
        "val": [["val/cat/0.png", "val/cat/same.png", "val/cat/third.png"]],
    }
    copy("train/dog/1.png", "val/dog/leak.png")
    copy("val/cat/0.png", "train/cat/leak.png")
    result, report = check(folder)
    assert result.status == 1
    assert problems(report) == {
        "train_and_val": [
            ["train/cat/leak.png", "val/cat/0.png", "val/cat/same.png", "val/cat/third.png"],
            ["train/dog/1.png", "val/dog/leak.png"],
        ]
    }
    assert "train/dog/1.png = val/dog/leak.png\n" in result.output
    assert len(report["duplicates"]["train"]) == 1 and not report["duplicates"]["val"]


def test_long_lists_are_cut_on_the_console_only(folder):
    for number in range(40):
        (folder / f"train/cat/broken{number}.png").touch()
    result, report = check(folder)
    assert len(report["problems"]["broken"]) == 40
    assert result.output.count(": empty") == 10
    assert f"and 30 more, in {folder.parent / 'report.json'}" in result.output
    assert "with --json FILE" in run_script(SCRIPT, folder, cwd=folder).output


def test_names_that_cannot_be_printed(folder):
    name = os.fsdecode(b"train/cat/\xff\n\x1b[31m.png")
    (folder / name).touch()
    result, report = check(folder)
    assert result.status == 1
    assert report["problems"]["broken"] == {name: "empty"}
    assert "\x1b" not in result.output and "\\udcff\\n\\x1b[31m.png" in result.output


def test_many_chunks_in_order(tmp_path):
    """More files than a task takes, so that results come in any order: each must stay with its file."""
    folder = draw_folders(tmp_path / "set", {"cat": 90, "dog": 90}, size=32)
    for number in range(0, 90, 7):
        (folder / f"train/dog/{number}.png").write_bytes(b"")
        draw(folder / f"val/cat/{number}.png", (33, 200))
    _, report = check(folder)
    assert set(report["problems"]["broken"]) == {f"train/dog/{number}.png" for number in range(0, 90, 7)}
    assert set(report["odd"]["aspect"]) == {f"val/cat/{number}.png" for number in range(0, 90, 7)}


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["none"], "none: no such folder"),
        (["set/train"], "data.dir set/train: has no train/; it must hold train/CLASS/*.jpg"),
        (["set", "--workers", "0"], "--workers: must be at least 1"),
        (["set", "--json", "none/report.json"], "--json none/report.json: cannot be written"),
        (["set", "--json", "set"], "--json set: cannot be written"),
    ],
)
def test_wrong_usage(folder, arguments, text):
    for path in folder.rglob("*.png"):
        path.write_bytes(b"")  # so that work ahead of the refusal would end with status 1
    assert text in message(run_script(SCRIPT, *arguments, cwd=folder.parent))


def test_help_needs_no_torch():
    code = "import sys; sys.path.insert(0, 'scripts'); import check_data; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout == "False\n"
    result = run_script(SCRIPT, "--help", cwd=ROOT)
    assert result.status == 0 and "Exit status 0: fit for training" in result.output


# ---------------------------------------------------------------------------------------------------------
# Processes that die

# Read by every Python process at its start: a stand-in for decoders that crash or take long.
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
    for name in ("train/cat/7.png", "train/cat/8.png", "val/dog/49.png"):
        (folder / name).write_bytes(b"CRASH" + os.urandom(9))
    result, report = check(folder)
    assert result.status == 1
    assert report["problems"]["broken"].keys() == {"train/cat/7.png", "train/cat/8.png", "val/dog/49.png"}
    assert all("died" in reason for reason in report["problems"]["broken"].values())
    assert report["sizes"]["val"]["width"] == dict.fromkeys(("0", "0.05", "0.5", "0.95", "1"), 8)
    assert report["pictures"] == {"train": 100, "val": 100} and len(report["odd"]["small"]) == 197


@pytest.mark.usefixtures("sabotage")
@pytest.mark.parametrize("how", ["Ctrl-C", "SIGINT alone", "SIGTERM", "SIGKILL"])
def test_stopped_at_once_without_orphans(folder, how):
    for path in folder.rglob("*.png"):
        path.write_bytes(b"SLOW")
    command = [sys.executable, ROOT / SCRIPT, folder, "--workers", "2"]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
    )
    wait_until(lambda: len(living(process.pid)) >= 3)
    time.sleep(0.5)
    start = time.monotonic()
    if how == "Ctrl-C":  # a terminal sends it to every process
        os.killpg(process.pid, signal.SIGINT)
    else:
        process.send_signal(signal.SIGINT if how == "SIGINT alone" else getattr(signal, how))
    _, error = process.communicate(timeout=20)
    assert time.monotonic() - start < 15, "waited for the slow file"
    wait_until(lambda: not living(process.pid))
    if how == "SIGKILL":
        assert process.returncode == -signal.SIGKILL
    else:
        assert process.returncode == (143 if how == "SIGTERM" else 130)
        assert error.decode() == ("" if how == "SIGTERM" else "interrupted\n")


def living(session: int) -> list[int]:
    """Processes of a session, without those that only wait to be noticed."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):  # it ends meanwhile
                state, _, _, its_session = (entry / "stat").read_text().rpartition(")")[2].split()[:4]
                if int(its_session) == session and state != "Z":
                    found.append(int(entry.name))
    return found


def wait_until(condition) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end, "timed out"
        time.sleep(0.02)


def test_broken_pipe(folder):
    """`check_data.py DIR | head -1` ends quietly."""
    command = [sys.executable, ROOT / SCRIPT, folder, "--workers", "1"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=os.environ)
    process.stdout.close()
    assert process.stderr.read() == b""
    process.wait(20)
