"""prepare_imagenet.py on small archives in the official layout: results, resuming, hostile input."""

import errno
import fcntl
import gzip
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

import numpy as np
import pytest
from commands import ROOT, call, message, run_python, run_script, snapshot
from PIL import Image
from scipy.io import savemat
from torchvision.datasets import imagenet

from data.decode import decode

sys.path.insert(0, str(ROOT / "scripts"))
import prepare_imagenet

TRAIN, VAL = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"
DEVKIT = "ILSVRC2012_devkit_t12.tar.gz"
META = "ILSVRC2012_devkit_t12/data/meta.mat"
TRUTH = "ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt"
COUNTS = {"n01440764": 2, "n01443537": 3, "n01484850": 4}
# ILSVRC2012_ID → WNID: not sorted, and the last is no leaf, as in the official file.
SYNSETS = {1: "n01484850", 2: "n01440764", 3: "n01443537", 4: "n00001740"}
VAL_IDS = [3, 1, 1, 2, 3, 3, 2]


def encoded(seed: int, size: tuple[int, int] = (9, 7), **options) -> bytes:
    noise = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)
    target = io.BytesIO()
    Image.fromarray(noise).save(target, **{"format": "JPEG"} | options)
    return target.getvalue()


def header(name: str, size: int, **fields) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.size = size
    for field, value in fields.items():
        setattr(info, field, value)
    return info


def tar(members, end: bool = True) -> bytes:
    """A tar of (name or TarInfo or finished header bytes, content); without its end mark if not `end`."""
    blocks = []
    for head, content in members:
        if isinstance(head, str):
            head = header(head, len(content))
        if isinstance(head, tarfile.TarInfo):
            head = head.tobuf(tarfile.USTAR_FORMAT)
        blocks += [head, content, bytes(-len(content) % 512)]
    return b"".join([*blocks, bytes(10240) if end else b""])


def class_members(wnid: str, count: int) -> list[tuple[str, bytes]]:
    return [(f"{wnid}_{number * 7}.JPEG", encoded(int(wnid[1:]) + number)) for number in range(count)]


def train_members(counts: dict[str, int] = COUNTS) -> list[tuple[str, bytes]]:
    return [(f"{wnid}.tar", tar(class_members(wnid, count))) for wnid, count in counts.items()]


def val_members() -> list[tuple[str, bytes]]:
    """Not in the order of their numbers, as in the official archive."""
    members = [(f"ILSVRC2012_val_{n:08}.JPEG", encoded(n)) for n in range(1, len(VAL_IDS) + 1)]
    return members[3:] + members[:3]


def meta(synsets: dict[int, str] = SYNSETS) -> bytes:
    names = ("ILSVRC2012_ID", "WNID", "words", "gloss", "num_children", "children", "wordnet_height")
    rows = np.empty((len(synsets), 1), [(name, object) for name in (*names, "num_train_images")])
    for row, (number, wnid) in enumerate(synsets.items()):
        leaf = wnid != "n00001740"
        words = f"thing {number}, other name"
        rows[row, 0] = (number, wnid, words, "a thing", 0 if leaf else 3, np.arange(0.0), 0 if leaf else 1, 9)
    target = io.BytesIO()
    savemat(target, {"synsets": rows}, do_compression=True)
    return target.getvalue()


def truth(ids=VAL_IDS) -> bytes:
    return "".join(f"{number}\n" for number in ids).encode()


def devkit(*members) -> bytes:
    folders = [
        (header(f"ILSVRC2012_devkit_t12{below}", 0, type=tarfile.DIRTYPE), b"") for below in ("", "/data")
    ]
    return gzip.compress(tar([*folders, *(members or ((META, meta()), (TRUTH, truth())))]))


def expected() -> dict[str, bytes]:
    """What OUTPUT must hold."""
    files = {
        f"train/{wnid}/{name}": content
        for wnid, n in COUNTS.items()
        for name, content in class_members(wnid, n)
    }
    ids = {f"ILSVRC2012_val_{n:08}.JPEG": number for n, number in enumerate(VAL_IDS, 1)}
    return files | {f"val/{SYNSETS[ids[name]]}/{name}": content for name, content in val_members()}


def found(output: Path, splits=("train", "val")) -> dict[str, bytes]:
    paths = [path for split in splits for path in (output / split).rglob("*") if path.is_file()]
    return {str(path.relative_to(output)): path.read_bytes() for path in paths}


@pytest.fixture
def tars(tmp_path) -> Path:
    """The three archives, whole."""
    folder = tmp_path / "tars"
    folder.mkdir()
    (folder / TRAIN).write_bytes(tar(train_members()))
    (folder / VAL).write_bytes(tar(val_members()))
    (folder / DEVKIT).write_bytes(devkit())
    return folder


@pytest.fixture
def output(tmp_path) -> Path:
    return tmp_path / "out" / "imagenet"


def prepare(tars: Path, output: Path, *options):
    return call(prepare_imagenet.main, tars, output, "--no-hash", *options)


def finish(tars: Path, output: Path, *options) -> str:
    """A run that must end well with the right files; returns its output."""
    result = prepare(tars, output, *options)
    assert result.status == 0, result.error
    assert found(output) == expected()
    return result.output


# ---------------------------------------------------------------------------- what it makes


def test_class_folders_hold_the_very_files(tars, output):
    result = run_script("scripts/prepare_imagenet.py", tars, output, "--no-hash", cwd=tars)
    assert (result.status, result.error) == (0, "")
    assert found(output) == expected()
    assert "train: complete, 9 images in 3 classes (the official set has 1,281,167 in 1,000)" in result.output
    assert "val: complete, 7 images in 3 classes (the official set has 50,000 in 1,000)" in result.output
    assert "\r" not in result.output, "a progress bar in a pipe"
    assert sorted(os.listdir(output)) == [".prepare_imagenet", "train", "val"]


def test_torchvision_reads_the_devkit_alike(tars, output, monkeypatch):
    finish(tars, output)
    md5 = hashlib.md5((tars / DEVKIT).read_bytes()).hexdigest()
    monkeypatch.setitem(imagenet.ARCHIVE_META, "devkit", (DEVKIT, md5))
    imagenet.parse_devkit_archive(tars)
    wnids = imagenet.load_meta_file(tars)[1]
    ours = {path.name: path.parent.name for path in (output / "val").rglob("*.JPEG")}
    assert [ours[name] for name in sorted(ours)] == wnids == [SYNSETS[number] for number in VAL_IDS]


def test_help_needs_no_torch():
    code = "import sys; sys.path.insert(0, 'scripts'); import prepare_imagenet; print('torch' in sys.modules)"
    assert run_python("-c", code, cwd=ROOT).output == "False\n"
    result = run_script("scripts/prepare_imagenet.py", "--help", cwd=ROOT)
    assert result.status == 0 and "was not measured" in " ".join(result.output.split())


def test_complete_output_is_left_alone(tars, output):
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
    result = prepare(tars, output)
    assert result.status == 0 and f"val: skipped, {VAL} missing" in result.output
    assert found(output) == {path: x for path, x in expected().items() if path.startswith("train/")}
    (tars / TRAIN).unlink()
    (tars / "later").rename(tars / VAL)
    printed = finish(tars, output)
    assert "skipped" not in printed and "train: already complete" in printed


def test_nothing_to_do(tars, output):
    (tars / TRAIN).unlink()
    (tars / DEVKIT).unlink()
    text = message(prepare(tars, output))
    assert "nothing to do" in text and TRAIN in text and DEVKIT in text
    assert not output.exists()
    assert "no such folder" in message(prepare(tars / "none", output))


# ---------------------------------------------------------------------------- hashes


def test_official_hash_is_demanded(tars, output):
    text = message(run_script("scripts/prepare_imagenet.py", tars, output, cwd=tars))
    md5 = hashlib.md5((tars / DEVKIT).read_bytes()).hexdigest()
    assert (
        DEVKIT in text and md5 in text and imagenet.ARCHIVE_META["devkit"][1] in text and "--no-hash" in text
    )
    assert found(output) == {}


def test_archives_are_hashed_once(tars, output, monkeypatch):
    def official(**wrong: str) -> None:
        for key, name in (("train", TRAIN), ("val", VAL), ("devkit", DEVKIT)):
            md5 = wrong.get(key) or hashlib.md5((tars / name).read_bytes()).hexdigest()
            monkeypatch.setitem(imagenet.ARCHIVE_META, key, (name, md5))

    official(train="0" * 32)
    assert TRAIN in message(call(prepare_imagenet.main, tars, output))
    assert not (output / "val").exists(), "began before all archives were known to be right"
    official(val="0" * 32)  # was right a moment ago and has not changed since: not read again
    assert call(prepare_imagenet.main, tars, output).status == 0
    assert found(output) == expected()
    os.utime(tars / VAL, (1, 1))
    assert VAL in message(call(prepare_imagenet.main, tars, output))


# ---------------------------------------------------------------------------- stopped and resumed


class Killed(BaseException):
    """Ends the program where no handler of its own expects it."""


@pytest.mark.parametrize("options", [(), ("--max-side", "8")])
def test_stopped_at_each_step_and_resumed(tars, tmp_path, monkeypatch, options):
    """Every file that is written and every rename, cut short before, in the middle or after."""
    steps = 0
    wanted = expected()
    if options:
        wanted = {path: prepare_imagenet.encode(content, path, 8, 90) for path, content in wanted.items()}
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: ())  # in this process
    real = {"write": prepare_imagenet.write, "rename": os.rename, "replace": os.replace}

    def stopping(name: str, when: int, how: str):
        def step(*arguments, **options):
            nonlocal steps
            steps += 1
            if steps == when and name == "write" and how == "middle":
                real[name](arguments[0], arguments[1][: len(arguments[1]) // 2])
            if steps == when and how == "after":
                real[name](*arguments, **options)
            if steps == when:
                raise Killed
            return real[name](*arguments, **options)

        return step

    for how in ("before", "middle", "after"):
        when = 0
        while True:
            when, steps = when + 1, 0
            output = tmp_path / f"{how}{when}"
            with monkeypatch.context() as patch:
                patch.setattr(os, "sync", lambda: None)
                patch.setattr(prepare_imagenet, "write", stopping("write", when, how))
                patch.setattr(os, "rename", stopping("rename", when, how))
                patch.setattr(os, "replace", stopping("replace", when, how))
                try:
                    prepare(tars, output, *options)
                except Killed:
                    for split in ("train", "val"):
                        part = {path: x for path, x in wanted.items() if path.startswith(split)}
                        assert found(output, [split]) in ({}, part), (
                            "a set that is not whole has its final name"
                        )
                    steps = -(10**9)
                    assert prepare(tars, output, *options).status == 0
                    assert found(output) == wanted
                else:
                    break
        assert when > 2 * len(expected())


@pytest.mark.parametrize("options", [(), pytest.param(("--max-side", "8"), marks=pytest.mark.slow)])
def test_killed_and_resumed(tmp_path, output, options):
    """kill -9 at random moments, again and again, until one run comes through."""
    tars = tmp_path / "tars"
    tars.mkdir()
    counts = {f"n{number:08}": 60 for number in range(8)}
    (tars / TRAIN).write_bytes(tar(train_members(counts)))
    command = [sys.executable, ROOT / "scripts" / "prepare_imagenet.py", tars, output, "--no-hash", *options]
    rng = random.Random(1)
    kills = 0
    for _ in range(8):
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        process.stdout.readline()  # the work begins
        time.sleep(rng.random() * (0.8 if options else 0.06))
        process.kill()
        process.stdout.close()
        kills += process.wait() == -signal.SIGKILL
        assert not (output / "train").exists() or len(found(output)) == 480
    assert kills
    result = prepare(tars, output, *options)
    assert result.status == 0, result.error
    files = found(output)
    assert len(files) == 480
    for wnid, count in counts.items():
        for name, content in class_members(wnid, count):
            if options:
                content = prepare_imagenet.encode(content, name, 8, 90)
            assert files[f"train/{wnid}/{name}"] == content


def test_interrupted_with_one_line_about_resuming(tars, output, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(prepare_imagenet, "extract", interrupt)
        result = prepare(tars, output)
    assert result.status == 130
    assert result.error == "stopped; run the same command again to resume\ninterrupted\n"
    finish(tars, output)


def test_disk_full(tars, output):
    """A limit on the size of files stands in for a full disk: writing fails in the middle of a image."""
    big = encoded(5, (100, 100))
    members = [*train_members()[:2], ("n01484850.tar", tar([("n01484850_1.JPEG", big)]))]
    (tars / TRAIN).write_bytes(tar(members))
    (tars / VAL).unlink()
    code = (
        "import resource, runpy, sys; sys.argv = sys.argv[1:]; "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096)); "
        "runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    assert len(big) > 4096
    script = ROOT / "scripts" / "prepare_imagenet.py"
    text = message(
        run_python("-c", code, script, tars, output, "--no-hash", cwd=tars, PYTHONPATH=str(script.parent))
    )
    assert "n01484850_1.JPEG: cannot be written" in text and "run the same command again" in text
    assert not (output / "train").exists()
    done = {path: path.stat().st_ino for path in (output / ".prepare_imagenet/train").rglob("*.JPEG")}
    assert len(done) == 5
    assert prepare(tars, output).status == 0
    assert (output / "train/n01484850/n01484850_1.JPEG").read_bytes() == big
    inodes = {path.stat().st_ino for path in (output / "train").rglob("*.JPEG")}
    assert set(done.values()) < inodes, "finished classes were made again"


def test_files_are_on_the_disk_before_they_get_their_names(tars, output, monkeypatch):
    """After a power cut, a path that exists is complete."""
    events = []
    real = os.rename

    def rename(source, target):
        events.append("rename")
        real(source, target)

    monkeypatch.setattr(os, "sync", lambda: events.append("sync"))
    monkeypatch.setattr(os, "rename", rename)
    monkeypatch.setattr(
        prepare_imagenet, "write", lambda path, x: events.append("write") or path.write_bytes(x)
    )
    finish(tars, output)
    for before, event in itertools.pairwise(events):
        assert (before, event) != ("write", "rename")


def test_missing_files_of_complete_sets(tars, output):
    finish(tars, output)
    shutil.rmtree(output / "train/n01440764")
    next((output / "val").rglob("*.JPEG")).unlink()
    finish(tars, output)
    (tars / TRAIN).write_bytes(tar(train_members()[:2]))
    assert "train/n01484850: is not in the archive" in message(prepare(tars, output))


# ---------------------------------------------------------------------------- OUTPUT


def test_output_in_use(tars, output):
    output.mkdir(parents=True)
    (output / "thesis.tex").write_text("years of work")
    assert "holds 'thesis.tex'" in message(prepare(tars, output))
    (output / "thesis.tex").unlink()
    (output / "train").mkdir()
    assert "train: exists, and this program did not create it" in message(prepare(tars, output))
    (output / "train").rmdir()
    (output / "val").mkdir()
    assert f"--flat-val {output / 'val'}" in message(prepare(tars, output))
    (output / "val").rmdir()
    finish(tars, output)
    file = output.parent / "file"
    file.touch()
    assert "is not a folder" in message(prepare(tars, file))


def test_archives_may_lie_in_output(tars):
    finish(tars, tars)


def test_two_at_once(tars, output):
    finish(tars, output)
    with open(output / ".prepare_imagenet/lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert "another process" in message(prepare(tars, output))
    finish(tars, output)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"verified": 1, "complete": {}}'])
def test_damaged_state(tars, output, content):
    (output / ".prepare_imagenet").mkdir(parents=True)
    (output / ".prepare_imagenet/state.json").write_text(content)
    assert "state.json: damaged" in message(prepare(tars, output))


# ---------------------------------------------------------------------------- broken and hostile archives


def place(tars: Path, where: str, extra, end: bool = True) -> None:
    """Put members behind the good ones of the train tar, of its second class or of the val tar."""
    if where == "train":
        (tars / TRAIN).write_bytes(tar([*train_members(), *extra], end))
    elif where == "class":
        members = train_members()
        members[1] = (members[1][0], tar([*class_members("n01443537", 3), *extra], end))
        (tars / TRAIN).write_bytes(tar(members))
    else:
        (tars / VAL).write_bytes(tar([*val_members(), *extra], end))


GOOD = {"train": "n01484851.tar", "class": "n01443537_99.JPEG", "val": "ILSVRC2012_val_00000008.JPEG"}
FIRST = {"train": "n01440764.tar", "class": "n01443537_0.JPEG", "val": "ILSVRC2012_val_00000001.JPEG"}


def negative_size(name: str) -> bytes:
    block = bytearray(header(name, 0).tobuf(tarfile.USTAR_FORMAT))
    block[124:136] = b"\xff" * 12
    block[148:156] = b"%06o\0 " % (sum(block[:148]) + sum(block[156:]) + 8 * 32)
    return bytes(block)


def pax(text: str) -> tuple[tarfile.TarInfo, bytes]:
    content = f"{len(text) + 4} {text}\n".encode()
    return header("pax", len(content), type=tarfile.XHDTYPE), content


def damaged(name: str) -> bytes:
    return header(name, 0).tobuf(tarfile.USTAR_FORMAT).replace(b"ustar", b"mustr")


HOSTILE = {  # what the message says, and which case it is
    "not a plain file, a symbolic link": lambda name: [
        (header(name, 0, type=tarfile.SYMTYPE, linkname="/etc/passwd"), b"")
    ],
    "not a plain file, a hard link": lambda name: [
        (header(name, 0, type=tarfile.LNKTYPE, linkname="../../evil"), b"")
    ],
    "not a plain file, a device": lambda name: [(header(name, 0, type=tarfile.CHRTYPE), b"")],
    "not a plain file, a pipe": lambda name: [(header(name, 0, type=tarfile.FIFOTYPE), b"")],
    "not a plain file, a folder": lambda name: [(header("folder", 0, type=tarfile.DIRTYPE), b"")],
    "not a plain file, unknown": lambda name: [(header(name, 3, type=b"Z"), b"abc")],
    "not a plain file, sparse": lambda name: [(header(name, 0, type=tarfile.GNUTYPE_SPARSE), b"")],
    "has an unexpected name, a long one": lambda name: [
        (header("././@LongLink", 3, type=b"L"), b"/a\0"),
        (name, b"x"),
    ],
    "has an unexpected name, from an extended header": lambda name: [pax("path=/evil.JPEG"), (name, b"x")],
    "has an unexpected name, absolute": lambda name: [(f"/{name}", b"x")],
    "has an unexpected name, above": lambda name: [(f"../{name}", b"x")],
    "has an unexpected name, below": lambda name: [(f"folder/{name}", b"x")],
    "has an unexpected name, another": lambda name: [("readme.txt", b"x")],
    "has an unexpected name, with a line end": lambda name: [(f"{name}\n", b"x")],
    "cut off or damaged, large": lambda name: [(header(name, 10**8), b"x")],
    "cut off or damaged, negative size": lambda name: [(negative_size(name), b"x")],
    "cut off or damaged, header": lambda name: [(damaged(name), b"")],
    "is too large": lambda name: [(header(name, 10**9), b"x")],
}


@pytest.mark.parametrize("where", ["train", "class", "val"])
@pytest.mark.parametrize("what", [*HOSTILE, "appears twice"])
def test_hostile_archives(tars, output, where, what):
    extra = [(FIRST[where], b"x")] if what == "appears twice" else HOSTILE[what](GOOD[where])
    place(tars, where, extra)
    before = snapshot(tars.parent, folders=True)
    text = message(prepare(tars, output)).replace(str(tars.parent), "")  # the folder has the test's name
    assert {"train": TRAIN, "class": f"{TRAIN}: n01443537.tar", "val": VAL}[where] in text
    if what != "is too large" or where == "class":  # in the other archives, headers are read first
        assert what.partition(",")[0] in text
    after = snapshot(tars.parent, folders=True)
    assert {path: x for path, x in after.items() if not path.startswith("out")} == before
    for path in output.rglob("*"):
        assert not path.is_symlink() and path.name not in ("evil.JPEG", "readme.txt")
    assert not (output / "train").exists()
    place(tars, where, [])
    finish(tars, output)  # the good archive, with what was done before


def test_harmless_peculiarities(tars, output):
    """Times in extended headers, a leading ./ and the folder itself: tar programs write them."""
    extra = [
        pax("mtime=1.5"),
        ("./n01443537_77.JPEG", encoded(1)),
        (header("./", 0, type=tarfile.DIRTYPE), b""),
    ]
    place(tars, "class", extra)
    assert prepare(tars, output).status == 0
    assert found(output) == expected() | {"train/n01443537/n01443537_77.JPEG": encoded(1)}


@pytest.mark.parametrize("where", ["train", "class", "val"])
def test_cut_off_anywhere(tars, tmp_path, where, monkeypatch):
    """At each block's border, beside it and in its middle. A tar is whole from its first empty block on."""
    monkeypatch.setattr(os, "sync", lambda: None)
    path = tars / (VAL if where == "val" else TRAIN)
    members = val_members() if where == "val" else train_members()
    inner = class_members("n01443537", 3)
    whole = tar(inner if where == "class" else members)
    complete = len(tar(inner if where == "class" else members, end=False)) + 512
    step = 2560 if where == "train" else 512
    borders = set(range(0, complete + 1024, step))
    offset = 0
    for _, content in inner if where == "class" else members:  # every member's border
        offset += 512 + -(-len(content) // 512) * 512
        borders |= {offset, offset + 512}
    output = tmp_path / "cut"
    for cut in sorted(border + aside for border in borders for aside in (-1, 0, 1, 200)):
        if cut < 0:
            continue
        if where == "class":
            path.write_bytes(tar([members[0], (members[1][0], whole[:cut]), members[2]]))
        else:
            path.write_bytes(whole[:cut])
        if cut < complete:
            text = message(prepare(tars, output))
            assert path.name in text and "cut off" in text
            assert not (output / "train").exists()
        else:
            finish(tars, output)
            shutil.rmtree(output)


def test_one_cut_class_leaves_the_others_usable(tars, output):
    place(tars, "class", [], end=False)
    message(prepare(tars, output))
    done = output / ".prepare_imagenet/train/n01440764"
    inode = done.stat().st_ino
    place(tars, "class", [])
    finish(tars, output)
    assert (output / "train/n01440764").stat().st_ino == inode


def test_empty_archives(tars, output):
    (tars / TRAIN).write_bytes(tar([]))
    assert f"{TRAIN}: is empty" in message(prepare(tars, output))
    (tars / TRAIN).write_bytes(tar([("n01440764.tar", tar([]))]))
    assert "n01440764.tar: is empty" in message(prepare(tars, output))


def test_devkit_cut_off(tars, output):
    whole = devkit()
    for cut in range(0, len(whole), 37):
        (tars / DEVKIT).write_bytes(whole[:cut])
        text = message(prepare(tars, output))
        assert DEVKIT in text and "cut off" in text, text
    (tars / DEVKIT).write_bytes(b"not gzip at all, but long enough for it")
    assert "damaged" in message(prepare(tars, output))


DEVKITS = {
    "has no ILSVRC2012_devkit_t12/data/meta.mat": lambda: devkit((TRUTH, truth())),
    "has no ILSVRC2012_devkit_t12/data/ILSVRC2012_val": lambda: devkit((META, meta())),
    "has no ILSVRC2012_devkit_t12/data/meta.mat; get": lambda: devkit(
        (header(META, 0, type=tarfile.SYMTYPE, linkname="/etc/passwd"), b""), (TRUTH, truth())
    ),
    "meta.mat cannot be read": lambda: devkit((META, b"rubbish" * 99), (TRUTH, truth())),
    "meta.mat cannot be read, cut off": lambda: devkit((META, meta()[:-20]), (TRUTH, truth())),
    "not unique or not of the form, evil": lambda: devkit(
        (META, meta(SYNSETS | {2: "../../evil"})), (TRUTH, truth())
    ),
    "not unique or not of the form, twice": lambda: devkit(
        (META, meta(SYNSETS | {2: SYNSETS[1]})), (TRUTH, truth())
    ),
    "line 7: '5' is not the number of a class": lambda: devkit((META, meta()), (TRUTH, truth([1] * 6 + [5]))),
    "line 7: '4' is not the number of a class": lambda: devkit((META, meta()), (TRUTH, truth([1] * 6 + [4]))),
    "line 2: '0' is not": lambda: devkit((META, meta()), (TRUTH, truth([1, 0, 1, 1, 1, 1, 1]))),
    "line 1: '-1' is not": lambda: devkit((META, meta()), (TRUTH, truth([-1]))),
    "line 1: '\\x00one' is not": lambda: devkit((META, meta()), (TRUTH, b"\0one\n")),
    "7 images, 6 lines": lambda: devkit((META, meta()), (TRUTH, truth(VAL_IDS[:-1]))),
    "7 images, 8 lines": lambda: devkit((META, meta()), (TRUTH, truth([*VAL_IDS, 1]))),
    "7 images, 0 lines": lambda: devkit((META, meta()), (TRUTH, b"")),
}


@pytest.mark.parametrize("what", DEVKITS)
def test_bad_devkits(tars, output, what):
    (tars / DEVKIT).write_bytes(DEVKITS[what]())
    assert (
        what.partition(", ")[0]
        if what.startswith(("meta", "not"))
        else what in message(prepare(tars, output)).replace(str(tars.parent), "")
    )
    assert found(output) == {}
    (tars / DEVKIT).write_bytes(devkit())
    finish(tars, output)


def test_devkit_may_hold_other_things(tars, output):
    link = header("ILSVRC2012_devkit_t12/link", 4000, type=tarfile.LNKTYPE, linkname="/etc/passwd")
    extra = [
        (link, b""),
        pax("path=a"),
        ("ILSVRC2012_devkit_t12/readme.txt", b"x"),
        (header("../up", 0), b""),
    ]
    (tars / DEVKIT).write_bytes(devkit(*extra, (META, meta()), (TRUTH, truth())))
    finish(tars, output)
    assert not (output.parent / "up").exists()


def test_ground_truth_may_have_other_line_ends(tars, output):
    (tars / DEVKIT).write_bytes(devkit((META, meta()), (TRUTH, truth().replace(b"\n", b"\r\n") + b"\n")))
    finish(tars, output)


def test_without_scipy(tars, output, monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.io", None)
    assert "pip install scipy" in message(prepare(tars, output))


# ---------------------------------------------------------------------------- --max-side


@pytest.fixture
def assorted(tars) -> dict[str, bytes]:
    """A train tar of all kinds of images."""
    noise = Image.open(io.BytesIO(encoded(3, (60, 40))))
    kinds = {
        "1": encoded(1, (60, 40), quality=97),
        "2": encoded(2, (20, 31), quality=97),
        "3": encoded(3, (31, 60), format="PNG"),
        "4": encoded(4, (20, 10), format="PNG"),
        "5": saved(noise.convert("L"), "JPEG"),
        "6": saved(noise.convert("L").resize((12, 9)), "JPEG"),
        "7": saved(noise.convert("CMYK").resize((12, 9)), "JPEG"),
        "8": encoded(8, (600, 2)),
    }
    members = {f"n01440764_{number}.JPEG": content for number, content in kinds.items()}
    (tars / TRAIN).write_bytes(tar([("n01440764.tar", tar(members.items()))]))
    (tars / VAL).unlink()
    return members


def saved(image: Image.Image, kind: str) -> bytes:
    target = io.BytesIO()
    image.save(target, kind)
    return target.getvalue()


def test_scaled_and_encoded(assorted, tars, output):
    result = prepare(tars, output, "--max-side", "32", "--quality", "80")
    assert result.status == 0, result.error
    assert "longer side at most 32, JPEG quality 80; the effect on accuracy was not measured" in result.output
    files = {Path(path).name: content for path, content in found(output).items()}
    assert files.keys() == assorted.keys()
    sizes = {}
    for name, content in files.items():
        with Image.open(io.BytesIO(content)) as image:
            assert (image.format, image.mode) == ("JPEG", "RGB")
            sizes[name[10]] = image.size
        original = Image.fromarray(decode(assorted[name], name))
        unchanged = name[10] == "2"
        assert (content == assorted[name]) == unchanged
        if not unchanged:
            if max(original.size) > 32:
                original = original.resize(image.size, Image.Resampling.LANCZOS)
            wanted = io.BytesIO()
            original.save(wanted, "JPEG", quality=80)  # Pillow's default is 4:2:0
            assert content == wanted.getvalue()
    assert sizes == {
        "1": (32, 21),
        "2": (20, 31),
        "3": (17, 32),
        "4": (20, 10),
        "5": (32, 21),
        "6": (12, 9),
        "7": (12, 9),
        "8": (32, 1),
    }


def test_one_output_holds_one_kind(tars, output, monkeypatch):
    assert prepare(tars, output, "--max-side", "8").status == 0
    before = snapshot(output)
    for options in ((), ("--max-side", "9"), ("--max-side", "8", "--quality", "91")):
        text = message(prepare(tars, output, *options))
        assert "was started with --max-side 8 --quality 90" in text
    assert snapshot(output) == before
    assert prepare(tars, output, "--max-side", "8", "--quality", "90").status == 0
    other = output.with_name("other")
    with monkeypatch.context() as patch:  # stopped before the first file is there
        patch.setattr(prepare_imagenet, "make_set", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            prepare(tars, other)
    assert "was started without --max-side" in message(prepare(tars, other, "--max-side", "8"))
    finish(tars, other)
    assert "was started without --max-side" in message(prepare(tars, other, "--max-side", "8"))


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (("--max-side", "0"), "--max-side: must be at least 1, not 0"),
        (("--quality", "80"), "needs --max-side"),
        (("--max-side", "9", "--quality", "96"), "between 1 and 95, not 96"),
        (("--max-side", "9", "--quality", "0"), "between 1 and 95, not 0"),
        (("--max-side", "9", "--flat-val", "x"), "leave out --max-side"),
    ],
)
def test_bad_options(tars, output, options, text):
    assert text in message(prepare(tars, output, *options))
    assert not output.exists()


def test_a_broken_image_is_named(tars, output):
    place(tars, "class", [("n01443537_9.JPEG", encoded(1)[:300])])
    text = message(prepare(tars, output, "--max-side", "8"))
    assert f"{TRAIN}: n01443537.tar: n01443537_9.JPEG: cannot be decoded" in text


# ---------------------------------------------------------------------------- --flat-val


@pytest.fixture
def flat(output) -> Path:
    """A val/ that was unpacked flat, beside a train/ of someone else's making."""
    (output / "val").mkdir(parents=True)
    (output / "train" / "n01440764").mkdir(parents=True)
    (output / "notes.txt").write_text("mine")
    for name, content in val_members():
        (output / "val" / name).write_bytes(content)
    return output / "val"


def sorted_val() -> dict[str, bytes]:
    return {path: content for path, content in expected().items() if path.startswith("val/")}


def test_flat_val_is_sorted_in_place(tars, output, flat):
    (tars / TRAIN).unlink()
    (tars / VAL).unlink()
    (flat / "readme.txt").write_text("stays")
    inodes = {path.name: path.stat().st_ino for path in flat.glob("*.JPEG")}
    result = run_script(
        "scripts/prepare_imagenet.py", tars, output, "--flat-val", flat, "--no-hash", cwd=tars
    )
    assert (result.status, result.error) == (0, "")
    assert found(output, ["val"]) == sorted_val() | {"val/readme.txt": b"stays"}
    assert {path.name: path.stat().st_ino for path in flat.rglob("*.JPEG")} == inodes, "copied, not moved"
    assert "val: complete, 7 images in 3 classes" in result.output
    assert "val: already complete" in prepare(tars, output, "--flat-val", flat).output


def test_flat_val_from_elsewhere_and_train_from_its_tar(tars, output, flat, tmp_path):
    shutil.move(flat, tmp_path / "flat")
    shutil.rmtree(output)
    assert prepare(tars, output, "--flat-val", tmp_path / "flat").status == 0
    assert found(output) == sorted_val()
    assert list((tmp_path / "flat").iterdir()) == []
    assert "train: complete, 9" in finish(tars, output)


def test_flat_val_stopped_at_each_move(tars, output, flat, monkeypatch):
    real = os.rename
    for _ in range(len(VAL_IDS) - 1):
        moves = []

        def once(source, target, moves=moves):
            if moves:
                raise Killed
            moves.append(target)
            real(source, target)

        with monkeypatch.context() as patch:
            patch.setattr(os, "rename", once)
            with pytest.raises(Killed):
                prepare(tars, output, "--flat-val", flat)
        assert sorted(path.name for path in flat.rglob("*.JPEG")) == sorted(name for name, _ in val_members())
        if _ == 2:
            text = message(prepare(tars, output))
            assert "exists, and this program did not create it" in text
    with monkeypatch.context() as patch:  # all is moved, but not yet recorded
        patch.setattr(prepare_imagenet.Work, "finish", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            prepare(tars, output, "--flat-val", flat)
    assert "val: complete, 7 images" in prepare(tars, output, "--flat-val", flat).output
    assert found(output, ["val"]) == sorted_val()


def test_flat_val_refusals(tars, output, flat, monkeypatch):
    def refused() -> str:
        before = snapshot(flat, folders=True)
        text = message(prepare(tars, output, "--flat-val", flat))
        assert snapshot(flat, folders=True) == before, "moved in spite of the refusal"
        return text

    first = "ILSVRC2012_val_00000001.JPEG"
    (flat / first).rename(output / "aside")
    assert f"lacks {first}" in refused()
    (flat / first).symlink_to(output / "aside")
    assert "is not a plain file" in refused()
    (flat / first).unlink()
    (flat / SYNSETS[1]).mkdir()
    (output / "aside").rename(flat / SYNSETS[1] / first)
    assert f"belongs to class {SYNSETS[3]}" in refused()
    (flat / SYNSETS[3]).mkdir()
    (flat / SYNSETS[1] / first).rename(flat / SYNSETS[3] / first)
    (flat / first).write_bytes(b"another")
    assert "nothing is overwritten" in refused()
    (flat / first).unlink()
    (flat / "ILSVRC2012_val_00000008.JPEG").write_bytes(b"one too many")
    assert "has ILSVRC2012_val_00000008.JPEG, which is not in the ground truth" in refused()
    (flat / "ILSVRC2012_val_00000008.JPEG").unlink()

    def other_disk(*_):
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", other_disk)
        assert "must be on one disk" in message(prepare(tars, output, "--flat-val", flat))
    assert "no such folder" in message(prepare(tars, output, "--flat-val", flat / "none"))
    assert prepare(tars, output, "--flat-val", flat).status == 0
    assert found(output, ["val"]) == sorted_val()
    (tars / DEVKIT).unlink()
    assert f"has no {DEVKIT}" in message(prepare(tars, output, "--flat-val", flat))


def test_flat_val_and_the_archive_do_not_mix(tars, output, flat, monkeypatch, tmp_path):
    shutil.move(flat, tmp_path / "flat")
    shutil.rmtree(output)
    (tars / TRAIN).unlink()

    def stop(*_):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(prepare_imagenet, "write_image", stop)
        with pytest.raises(Killed):
            prepare(tars, output)
    text = message(prepare(tars, output, "--flat-val", tmp_path / "flat"))
    assert "the archive is being unpacked" in text
    assert prepare(tars, output).status == 0 and found(output) == sorted_val()
