"""prepare_imagenet.py on small archives in the official layout: results, resuming, hostile input."""

import errno
import fcntl
import hashlib
import io
import itertools
import os
import random
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import archives
import pytest
from commands import ROOT, call, message, run_python, run_script, snapshot
from PIL import Image
from torchvision.datasets import imagenet

from data.decode import decode
from data.imagenet_archives import DEVKIT, TRAIN, VAL

sys.path.insert(0, str(ROOT / "scripts"))
import prepare_imagenet

SCRIPT = ROOT / "scripts" / "prepare_imagenet.py"


def expected() -> dict[str, bytes]:
    """Return what OUTPUT must hold."""
    files = {
        f"train/{wnid}/{name}": content
        for wnid, count in archives.COUNTS.items()
        for name, content in archives.class_members(wnid, count)
    }
    return files | {
        f"val/{archives.VAL_CLASSES[name]}/{name}": content for name, content in archives.val_members()
    }


def of_split(split: str) -> dict[str, bytes]:
    return {path: content for path, content in expected().items() if path.startswith(split)}


def found(output: Path, splits=("train", "val")) -> dict[str, bytes]:
    paths = [path for split in splits for path in (output / split).rglob("*") if path.is_file()]
    return {str(path.relative_to(output)): path.read_bytes() for path in paths}


@pytest.fixture(autouse=True)
def no_sync(monkeypatch):
    """Do not wait for the disk."""
    monkeypatch.setattr(os, "sync", lambda: None)


@pytest.fixture
def one_process(monkeypatch):
    """Scale images in this process."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: ())


@pytest.fixture
def tars(tmp_path) -> Path:
    """Return a folder with the three archives."""
    folder = tmp_path / "tars"
    folder.mkdir()
    (folder / TRAIN).write_bytes(archives.tar(archives.train_members()))
    (folder / VAL).write_bytes(archives.tar(archives.val_members()))
    (folder / DEVKIT).write_bytes(archives.devkit())
    return folder


@pytest.fixture
def output(tmp_path) -> Path:
    return tmp_path / "out" / "imagenet"


def prepare(tars: Path, output: Path, *options):
    return call(prepare_imagenet.main, tars, output, "--no-hash", *options)


def finish(tars: Path, output: Path, *options, files: dict[str, bytes] | None = None) -> str:
    """Run to the end, which must give `files`, or all; return what was printed."""
    result = prepare(tars, output, *options)
    assert result.status == 0, result.error
    assert found(output) == (expected() if files is None else files)
    return result.output


def refused(tars: Path, output: Path, *options) -> str:
    return message(prepare(tars, output, *options))


# ---------------------------------------------------------------------------- results


def test_class_folders_hold_the_original_files(tars, output):
    result = run_script(SCRIPT, tars, output, "--no-hash", cwd=tars)
    assert (result.status, result.error) == (0, "")
    assert found(output) == expected()
    assert "train: complete, 9 images in 3 classes (the official set has 1,281,167 in 1,000)" in result.output
    assert "val: complete, 7 images in 3 classes (the official set has 50,000 in 1,000)" in result.output
    assert "\r" not in result.output, "a progress bar in a pipe"
    assert sorted(os.listdir(output)) == [".prepare_imagenet", "train", "val"]


def test_help_needs_no_torch():
    result = run_python("-X", "importtime", SCRIPT, "--help", cwd=ROOT)
    assert result.status == 0 and "was not measured" in " ".join(result.output.split())
    imported = {line.rpartition("|")[2].strip() for line in result.error.splitlines()}
    assert "tarfile" in imported and "torch" not in imported


def test_complete_output_does_not_change(tars, output):
    finish(tars, output)
    before = snapshot(output / "train") | snapshot(output / "val")
    assert "train: already complete, 9 images in 3 classes" in finish(tars, output)
    for name in (TRAIN, VAL, DEVKIT):
        (tars / name).unlink()
    printed = finish(tars, output)
    assert "train: already complete" in printed and "val: already complete" in printed
    assert snapshot(output / "train") | snapshot(output / "val") == before


def test_each_set_alone(tars, output):
    (tars / VAL).rename(tars / "later")
    assert f"val: skipped, {VAL} missing" in finish(tars, output, files=of_split("train"))
    (tars / TRAIN).unlink()
    (tars / "later").rename(tars / VAL)
    printed = finish(tars, output)
    assert "skipped" not in printed and "train: already complete" in printed


def test_no_complete_set(tars, output):
    (tars / TRAIN).unlink()
    (tars / DEVKIT).unlink()
    text = refused(tars, output)
    assert f"has neither {TRAIN} nor {VAL} with {DEVKIT}" in text
    assert not output.exists()
    assert "no such folder" in refused(tars / "none", output)


def test_archives_may_be_in_output(tars):
    finish(tars, tars)


def test_missing_files_of_complete_sets(tars, output):
    finish(tars, output)
    shutil.rmtree(output / "train/n01440764")
    next((output / "val").rglob("*.JPEG")).unlink()
    finish(tars, output)
    (tars / TRAIN).write_bytes(archives.tar(archives.train_members()[:2]))
    assert "train/n01484850: is not in the archive" in refused(tars, output)


def test_official_archives_are_required_and_hashed_once(tars, output, monkeypatch):
    text = message(call(prepare_imagenet.main, tars, output))
    md5s = {name: hashlib.md5((tars / name).read_bytes()).hexdigest() for name in (TRAIN, VAL, DEVKIT)}
    for fragment in (DEVKIT, md5s[DEVKIT], imagenet.ARCHIVE_META["devkit"][1], "--no-hash"):
        assert fragment in text
    assert found(output) == {}

    def run(**wrong: str):
        for key, name in (("train", TRAIN), ("val", VAL), ("devkit", DEVKIT)):
            monkeypatch.setitem(imagenet.ARCHIVE_META, key, (name, wrong.get(key, md5s[name])))
        return call(prepare_imagenet.main, tars, output)

    assert TRAIN in message(run(train="0" * 32))
    assert not (output / "val").exists(), "extracted before all archives were verified"
    assert run(val="0" * 32).status == 0  # its md5 was right, and the file has not changed: not read again
    assert found(output) == expected()
    os.utime(tars / VAL, (1, 1))
    assert VAL in message(run(val="0" * 32))


# ---------------------------------------------------------------------------- stopped and resumed


class Killed(BaseException):
    """The end of the program where none of its handlers expects it."""


def kill(*_):
    raise Killed


RESIZE = ("--max-side", "8")


@pytest.mark.parametrize("how, options", [("before", ()), ("middle", RESIZE), ("after", ())])
def test_stopped_at_each_step_and_resumed(tars, tmp_path, monkeypatch, one_process, how, options):
    """Stop before, in the middle of, or after every write and rename."""
    wanted = expected()
    if options:
        wanted = {path: prepare_imagenet.encode(content, path, 8, 90) for path, content in wanted.items()}
    steps, when = itertools.count(1), 0

    def stopping(owner, name: str) -> None:
        real = getattr(owner, name)

        def step(*arguments):
            if next(steps) != when:
                return real(*arguments)
            if how == "middle" and name == "write":
                real(arguments[0], arguments[1][: len(arguments[1]) // 2])
            if how == "after":
                real(*arguments)
            raise Killed

        patch.setattr(owner, name, step)

    for when in itertools.count(1):
        output, steps = tmp_path / str(when), itertools.count(1)
        with monkeypatch.context() as patch:
            stopping(prepare_imagenet, "write")
            stopping(os, "rename")
            stopping(os, "replace")
            try:
                assert prepare(tars, output, *options).status == 0
                break
            except Killed:
                pass
        for split in ("train", "val"):
            part = {path: content for path, content in wanted.items() if path.startswith(split)}
            assert found(output, [split]) in ({}, part), "an incomplete set has its final name"
        finish(tars, output, *options, files=wanted)
    assert when > 2 * len(wanted)


@pytest.mark.parametrize(
    "options, rounds",
    [((), 3), *(pytest.param(options, 8, marks=pytest.mark.slow) for options in ((), RESIZE))],
)
def test_killed_and_resumed(tmp_path, output, options, rounds):
    """kill -9 at random moments, then one run to the end."""
    counts = {f"n{number:08}": 60 for number in range(8)}
    tars = tmp_path / "tars"
    tars.mkdir()
    (tars / TRAIN).write_bytes(archives.tar(archives.train_members(counts)))
    rng, kills = random.Random(1), 0
    while kills < rounds:
        command = [sys.executable, SCRIPT, tars, output, "--no-hash", *options]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        process.stdout.readline()  # the work begins
        time.sleep(rng.random() * (0.8 if options else 0.06))
        process.kill()
        process.stdout.close()
        status = process.wait()
        assert not (output / "train").exists() or len(found(output)) == 480
        if status == -signal.SIGKILL:
            kills += 1
        else:  # it had finished before the signal came
            shutil.rmtree(output)
    wanted = {
        f"train/{wnid}/{name}": prepare_imagenet.encode(content, name, 8, 90) if options else content
        for wnid, count in counts.items()
        for name, content in archives.class_members(wnid, count)
    }
    finish(tars, output, *options, files=wanted)


@pytest.mark.parametrize(
    "error, status, text",
    [
        (KeyboardInterrupt(), 130, "stopped; run the same command again to resume\ninterrupted\n"),
        (OSError(errno.ENOSPC, "No space left"), 2, ".JPEG: cannot be written (No space left); fix that"),
    ],
)
def test_interrupted_or_disk_full(tars, output, monkeypatch, error, status, text):
    write = Path.write_bytes

    def fail(path: Path, content: bytes) -> int:
        if path.name != "n01484850_7.JPEG":
            return write(path, content)
        write(path, content[:99])
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", fail)
        result = prepare(tars, output)
    assert result.status == status and text in (message(result) if status == 2 else result.error)
    assert "run the same command again to resume\n" in result.error
    finish(tars, output)


def test_files_are_on_the_disk_before_they_get_their_names(tars, output, monkeypatch):
    """After a power cut, a path that exists is complete."""
    events = []

    def record(owner, name: str) -> None:
        real = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *arguments: events.append(name) or real(*arguments))

    for owner, name in ((os, "sync"), (os, "rename"), (prepare_imagenet, "write")):
        record(owner, name)
    finish(tars, output)
    assert set(events) == {"sync", "rename", "write"}
    assert ("write", "rename") not in itertools.pairwise(events)


# ---------------------------------------------------------------------------- OUTPUT


def test_output_in_use(tars, output):
    output.mkdir(parents=True)
    (output / "thesis.tex").write_text("years of work")
    assert "holds 'thesis.tex'" in refused(tars, output)
    (output / "thesis.tex").unlink()
    for split, text in (("train", "this program did not create it"), ("val", f"--flat-val {output / 'val'}")):
        (output / split).mkdir()
        assert text in refused(tars, output)
        (output / split).rmdir()
    finish(tars, output)
    with open(output / ".prepare_imagenet/lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert "another process" in refused(tars, output)
    finish(tars, output)
    (output.parent / "file").touch()
    assert "is not a folder" in refused(tars, output.parent / "file")


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"verified": 1, "complete": {}}'])
def test_damaged_state(tars, output, content):
    (output / ".prepare_imagenet").mkdir(parents=True)
    (output / ".prepare_imagenet/state.json").write_text(content)
    assert "state.json: damaged" in refused(tars, output)


# ---------------------------------------------------------------------------- broken and hostile archives

# A valid name in each kind of tar, the name of its first member, and where a message finds them.
NAMES = {
    "train": ("n01484851.tar", "n01440764.tar", TRAIN),
    "class": ("n01443537_99.JPEG", "n01443537_0.JPEG", f"{TRAIN}: n01443537.tar"),
    "val": ("ILSVRC2012_val_00000008.JPEG", "ILSVRC2012_val_00000001.JPEG", VAL),
    "devkit": ("", "", DEVKIT),
}


def place(tars: Path, where: str, extra=(), end: bool = True) -> None:
    """Write the devkit, or an archive with `extra` after the members of the tar `where`."""
    members = archives.train_members()
    if where == "devkit":
        (tars / DEVKIT).write_bytes(archives.devkit()[: None if end else 99])
    elif where == "val":
        (tars / VAL).write_bytes(archives.tar([*archives.val_members(), *extra], end))
    elif where == "train":
        (tars / TRAIN).write_bytes(archives.tar([*members, *extra], end))
    else:
        members[1] = (members[1][0], archives.tar([*archives.class_members("n01443537", 3), *extra], end))
        (tars / TRAIN).write_bytes(archives.tar(members))


BROKEN = [
    ("train", "symbolic link"),
    ("class", "name in an extended header"),
    ("class", "size over the limit"),
    ("val", "name above"),
    *((where, "cut off") for where in NAMES),
]


@pytest.mark.parametrize("where, case", BROKEN)
def test_broken_archives(tars, output, where, case):
    name, first, source = NAMES[where]
    cases = {
        **archives.hostile(name, first),
        "size over the limit": ("is too large", [(archives.header(name, 10**9), b"x")]),
        "cut off": ("cut off", []),
    }
    phrase, extra = cases[case]
    place(tars, where, extra, end=case != "cut off")
    before = snapshot(tars.parent, folders=True)
    text = refused(tars, output).replace(str(tars.parent), "")  # the folder has the test's name
    assert source in text and phrase in text
    after = snapshot(tars.parent, folders=True)
    assert {path: x for path, x in after.items() if not path.startswith("out")} == before
    for path in output.rglob("*"):
        assert not path.is_symlink() and path.name not in ("evil.JPEG", "readme.txt")
    assert not (output / "train").exists()
    done = {path: path.stat().st_ino for path in (output / ".prepare_imagenet/train").glob("n01440764")}
    assert len(done) == (where == "class"), "classes before the broken one are finished"
    place(tars, where)
    finish(tars, output)  # the good archive, with the files of the first run
    assert all((output / "train" / path.name).stat().st_ino == inode for path, inode in done.items())


def test_harmless_peculiarities(tars, output):
    """Times in extended headers, a leading ./ and the folder itself: tar programs write them."""
    folder = (archives.header("./", 0, type=tarfile.DIRTYPE), b"")
    place(tars, "class", [archives.pax("mtime=1.5"), ("./n01443537_77.JPEG", archives.encoded(1)), folder])
    finish(tars, output, files=expected() | {"train/n01443537/n01443537_77.JPEG": archives.encoded(1)})


# ---------------------------------------------------------------------------- --max-side


def test_scaled_and_encoded(tars, output):
    images = [  # content, size afterward
        (archives.encoded(1, (60, 40), quality=97), (32, 21)),
        (archives.encoded(2, (20, 31), quality=97), (20, 31)),
        (archives.encoded(3, (31, 60), format="PNG"), (17, 32)),
        (archives.encoded(4, (20, 10), format="PNG"), (20, 10)),
        (archives.encoded(5, (60, 40), "L"), (32, 21)),
        (archives.encoded(6, (12, 9), "L"), (12, 9)),
        (archives.encoded(7, (12, 9), "CMYK"), (12, 9)),
        (archives.encoded(8, (600, 2)), (32, 1)),
    ]
    members = [(f"n01440764_{n}.JPEG", content) for n, (content, _) in enumerate(images)]
    (tars / TRAIN).write_bytes(archives.tar([("n01440764.tar", archives.tar(members))]))
    (tars / VAL).unlink()
    result = prepare(tars, output, "--max-side", "32", "--quality", "80")
    assert result.status == 0, result.error
    assert "longer side at most 32, JPEG quality 80; the effect on accuracy was not measured" in result.output
    files = found(output)
    assert len(files) == len(images)
    for n, (original, size) in enumerate(images):
        content = files[f"train/n01440764/n01440764_{n}.JPEG"]
        with Image.open(io.BytesIO(content)) as image:
            assert (image.format, image.mode, image.size) == ("JPEG", "RGB", size)
        wanted = io.BytesIO()
        pixels = Image.fromarray(decode(original, str(n)))
        if max(pixels.size) > 32:
            pixels = pixels.resize(size, Image.Resampling.LANCZOS)
        pixels.save(wanted, "JPEG", quality=80)  # Pillow's default is 4:2:0
        unchanged = n == 1
        assert (content == original) == unchanged
        assert unchanged or content == wanted.getvalue()


def test_one_output_has_one_encoding(tars, output, monkeypatch, one_process):
    assert prepare(tars, output, *RESIZE).status == 0
    before = snapshot(output)
    for options in ((), ("--max-side", "9"), (*RESIZE, "--quality", "91")):
        assert "was started with --max-side 8 --quality 90" in refused(tars, output, *options)
    assert snapshot(output) == before
    assert prepare(tars, output, *RESIZE, "--quality", "90").status == 0
    other = output.with_name("other")
    with monkeypatch.context() as patch:  # stopped before the first file is written
        patch.setattr(prepare_imagenet, "make_set", kill)
        with pytest.raises(Killed):
            prepare(tars, other)
    assert "was started without --max-side" in refused(tars, other, *RESIZE)
    finish(tars, other)
    assert "was started without --max-side" in refused(tars, other, *RESIZE)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (("--max-side", "0"), "--max-side: must be at least 1 (got 0)"),
        (("--quality", "80"), "add --max-side"),
        ((*RESIZE, "--quality", "96"), "between 1 and 95 (got 96)"),
        ((*RESIZE, "--quality", "0"), "between 1 and 95 (got 0)"),
        ((*RESIZE, "--flat-val", "x"), "remove --max-side"),
    ],
)
def test_bad_options(tars, output, options, text):
    assert text in refused(tars, output, *options)
    assert not output.exists()


def test_a_broken_image_is_named(tars, output):
    place(tars, "class", [("n01443537_9.JPEG", archives.encoded(1)[:300])])
    text = refused(tars, output, *RESIZE)
    assert f"{TRAIN}: n01443537.tar: n01443537_9.JPEG: cannot be decoded" in text


# ---------------------------------------------------------------------------- --flat-val


@pytest.fixture
def flat(output) -> Path:
    """Return a flat val/ that somebody extracted, beside a train/ and a file of theirs."""
    (output / "val").mkdir(parents=True)
    (output / "train" / "n01440764").mkdir(parents=True)
    (output / "notes.txt").write_text("mine")
    for name, content in archives.val_members():
        (output / "val" / name).write_bytes(content)
    return output / "val"


@pytest.fixture
def elsewhere(tars, output, flat, tmp_path) -> Path:
    """Return a flat folder outside OUTPUT, which does not exist."""
    shutil.move(flat, tmp_path / "flat")
    shutil.rmtree(output)
    return tmp_path / "flat"


def test_flat_val_is_sorted_in_place(tars, output, flat):
    (tars / TRAIN).unlink()
    (tars / VAL).unlink()
    (flat / "readme.txt").write_text("stays")
    inodes = {path.name: path.stat().st_ino for path in flat.glob("*.JPEG")}
    printed = finish(tars, output, "--flat-val", flat, files=of_split("val") | {"val/readme.txt": b"stays"})
    assert {path.name: path.stat().st_ino for path in flat.rglob("*.JPEG")} == inodes, "copied, not moved"
    assert "val: complete, 7 images in 3 classes" in printed
    assert "val: already complete" in prepare(tars, output, "--flat-val", flat).output


def test_flat_val_from_elsewhere_and_train_from_its_tar(tars, output, elsewhere):
    finish(tars, output, "--flat-val", elsewhere, files=of_split("val"))
    assert list(elsewhere.iterdir()) == []
    assert "train: complete, 9" in finish(tars, output)


def test_flat_val_stopped_at_each_move(tars, output, flat, monkeypatch):
    real = os.rename
    for count in range(len(archives.VAL_IDS) - 1):
        calls = iter([real, kill])
        with monkeypatch.context() as patch:
            patch.setattr(os, "rename", lambda *paths, calls=calls: next(calls)(*paths))
            with pytest.raises(Killed):
                prepare(tars, output, "--flat-val", flat)
        assert sorted(path.name for path in flat.rglob("*.JPEG")) == sorted(
            name for name, _ in archives.val_members()
        )
        if count == 2:
            assert "exists, and this program did not create it" in refused(tars, output)
    with monkeypatch.context() as patch:  # all images are moved, but not yet recorded
        patch.setattr(prepare_imagenet.Work, "finish", kill)
        with pytest.raises(Killed):
            prepare(tars, output, "--flat-val", flat)
    assert "val: complete, 7 images" in finish(tars, output, "--flat-val", flat, files=of_split("val"))


def test_flat_val_refusals(tars, output, flat, monkeypatch):
    first, last = "ILSVRC2012_val_00000001.JPEG", "ILSVRC2012_val_00000008.JPEG"
    aside, wrong, right = (
        output / "aside",
        flat / archives.SYNSETS[1] / first,
        flat / archives.SYNSETS[3] / first,
    )

    def check(phrase: str) -> None:
        before = snapshot(flat, folders=True)
        assert phrase in refused(tars, output, "--flat-val", flat)
        assert snapshot(flat, folders=True) == before, "moved images although it refused"

    (flat / first).rename(aside)
    check(f"lacks {first}")
    (flat / first).symlink_to(aside)
    check("is not a plain file")
    (flat / first).unlink()
    wrong.parent.mkdir()
    aside.rename(wrong)
    check(f"belongs to class {archives.SYNSETS[3]}")
    right.parent.mkdir()
    wrong.rename(right)
    (flat / first).write_bytes(b"another")
    check("nothing is overwritten")
    (flat / first).unlink()
    (flat / last).write_bytes(b"one too many")
    check(f"has {last}, which is not in the ground truth")
    (flat / last).unlink()

    def other_disk(*_):
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", other_disk)
        assert "on one writable disk" in refused(tars, output, "--flat-val", flat)
    assert "no such folder" in refused(tars, output, "--flat-val", flat / "none")
    finish(tars, output, "--flat-val", flat, files=of_split("val"))
    (tars / DEVKIT).unlink()
    assert f"has no {DEVKIT}" in refused(tars, output, "--flat-val", flat)


def test_flat_val_and_the_archive_do_not_mix(tars, output, elsewhere, monkeypatch):
    (tars / TRAIN).unlink()
    with monkeypatch.context() as patch:
        patch.setattr(prepare_imagenet, "write_image", kill)
        with pytest.raises(Killed):
            prepare(tars, output)
    assert "continue without --flat-val" in refused(tars, output, "--flat-val", elsewhere)
    finish(tars, output, files=of_split("val"))
