"""The program in other modes of the interpreter, in read-only folders, and with names of any bytes."""

import ast
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from commands import ROOT, Result, call, draw_folders, message, run_python, tiny
from PIL import Image
from run_files import rows

import evaluate
import train
from resnext.errors import command_parser, run_main

sys.path.insert(0, str(ROOT / "scripts"))
import plot_curves

PATHS = sorted([*ROOT.glob("*.py"), *ROOT.glob("scripts/*.py")])
SCRIPTS = [path for path in PATHS if "run_main(main)" in path.read_text(encoding="utf-8")]
STRICT = (
    "-W",
    "error",
    "-P",
)  # warnings are errors, and python does not search the script's folder for modules
BARE = ("-OO", *STRICT)  # also without docstrings and assertions


def training(folder: Path, output: Path, **keys: str | None) -> list[object]:
    """Return the arguments of an epoch on the class folders in `folder`/data."""
    (folder / "tiny.yaml").touch()
    settings = tiny(data__dataset="folder", data__dir=str(folder / "data"), train__epochs="1", **keys)
    return ["--config", folder / "tiny.yaml", "--output", output, *settings]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """Return a run on class folders with a DataLoader worker, by the plain interpreter."""
    folder = tmp_path_factory.mktemp("plain")
    draw_folders(folder / "data", {"cat": 9, "dog": 9}, size=12)
    fast = {"data__pipeline": "fast", "data__resize": "9", "data__workers": "1", "augment__padding": None}
    result = call(train.main, *training(folder, folder / "run", **fast))
    assert result.status == 0, result.error
    return folder / "run"


@pytest.fixture(scope="module")
def evaluated(run) -> dict:
    """Return the JSON of its evaluation."""
    target = run.parent / "plain.json"
    assert call(evaluate.main, run, "--json", target).status == 0
    return json.loads(target.read_text())


def run_without_rights(*arguments: object, folder: Path) -> Result:
    """Run `python arguments` where neither the current folder nor the home folder is writable."""
    command = [sys.executable, *map(str, arguments)]
    if os.geteuid() == 0:  # root may write in spite of permissions
        if shutil.which("setpriv") is None:
            pytest.skip("needs setpriv, or another user than root")
        command = ["setpriv", "--bounding-set=-all", "--inh-caps=-all", *command]
    folder.chmod(0o555)
    environment = os.environ | {"HOME": str(folder), "XDG_CACHE_HOME": str(folder)}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    return Result(done.returncode, done.stdout, done.stderr)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_help_without_docstrings(script):
    result = run_python(*BARE, script, "--help", cwd="/")
    assert (result.status, result.error) == (0, "")
    assert result.output.startswith(f"usage: {script.name} ")
    assert "show this help message and exit" in result.output
    summary = ast.get_docstring(ast.parse(script.read_text(encoding="utf-8"))).partition("\n")[0]
    assert summary not in result.output


def test_help_is_the_docstring():
    assert command_parser("What it does.\n\n    like this\n").format_help().count("\n\n    like this\n") == 1
    assert train.__doc__.partition("\n")[2].strip() in call(train.main, "--help").output


def test_no_assertion_is_needed():
    """python -O removes them."""
    paths = [*PATHS, *(path for folder in ("resnext", "data") for path in ROOT.glob(f"{folder}/**/*.py"))]
    assert len(paths) > 40
    for path in paths:
        assert not any(isinstance(node, ast.Assert) for node in ast.walk(ast.parse(path.read_bytes()))), path


def test_a_strict_training_gives_the_same_numbers(run, tmp_path):
    arguments = ["--config", run / "config.yaml", "--output", tmp_path / "run", "run.tensorboard=true"]
    result = run_python(*STRICT, ROOT / "train.py", *arguments, cwd="/")
    assert (result.status, result.error) == (0, "")
    assert rows(tmp_path / "run") == rows(run)


def test_a_strict_evaluation_in_a_read_only_folder(run, evaluated, tmp_path):
    arguments = (*BARE, ROOT / "evaluate.py", run, "--json", "/dev/stderr")
    result = run_without_rights(*arguments, folder=tmp_path)
    assert result.status == 0, result.error
    assert json.loads(result.error) == evaluated


def test_a_strict_process_of_torchrun(run, evaluated, tmp_path):
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=1")
    arguments = (*torchrun, ROOT / "evaluate.py", run, "--json", tmp_path / "result.json")
    result = run_python(*arguments, cwd=tmp_path, PYTHONWARNINGS="error", PYTHONSAFEPATH="1")
    assert result.status == 0, result.error
    found = json.loads((tmp_path / "result.json").read_text())
    assert found["top1_error"] == evaluated["top1_error"] and found["images"] == evaluated["images"]


def test_strict_workers_decode_in_spite_of_warnings(tmp_path):
    """check_data.py starts new interpreters. Damaged EXIF data does not damage the image."""
    draw_folders(tmp_path, {"cat": 1, "dog": 1}, size=40)
    exif = Image.Exif()
    exif[271] = "the name of the camera's maker"
    Image.new("RGB", (50, 40)).save(tmp_path / "train" / "cat" / "exif.jpg", exif=exif.tobytes()[:30])
    result = run_python(*BARE, ROOT / "scripts/check_data.py", tmp_path, "--workers", "1", cwd="/")
    assert (result.status, result.error) == (0, "")
    assert "train: 3 images" in result.output and "\nfit for training\n" in result.output


def test_benchmark_finds_its_other_modules():
    """It imports them late, so that --help does not show whether it finds them."""
    code = "runpy.run_path('scripts/benchmark.py'); print(find_spec('benchmark_data'))"
    result = run_python("-I", "-c", f"import runpy; from importlib.util import find_spec; {code}", cwd=ROOT)
    assert (result.status, result.error) == (0, "") and "benchmark_data.py" in result.output


def test_a_training_in_a_read_only_folder(tmp_path):
    result = run_without_rights(ROOT / "train.py", "--config", "demo.yaml", folder=tmp_path)
    text = message(result)
    assert f"runs/demo: cannot be created below {tmp_path};" in text and "--output DIR" in text


def test_names_of_any_bytes(tmp_path, monkeypatch):
    """The console escapes the names of run directories and classes that it cannot show."""
    cat, output = os.fsdecode(b"c\xe4t"), tmp_path / os.fsdecode(b"r\xfcn")
    draw_folders(tmp_path / "data", {cat: 9, "dög": 9})

    def ascii_console(main, *arguments: object) -> str:
        console = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
        monkeypatch.setattr(sys, "argv", ["program", *map(str, arguments)])
        monkeypatch.setattr(sys, "stdout", console)
        with pytest.raises(SystemExit) as end:
            run_main(main)
        assert end.value.code == 0
        console.flush()
        return console.buffer.getvalue().decode("ascii")

    printed = ascii_console(train.main, *training(tmp_path, output))
    assert r"r\udcfcn/checkpoints" in printed
    assert r"r\udcfcn/checkpoints" in (output / "log.txt").read_text(encoding="utf-8")
    printed = ascii_console(evaluate.main, output, "--per-class")
    assert r"c\udce4t" in printed and r"d\xf6g" in printed
    printed = ascii_console(plot_curves.main, output)
    assert printed.endswith("r\\udcfcn/curves.png\n") and (output / "curves.png").stat().st_size > 1000
