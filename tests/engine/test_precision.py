"""What train.precision=auto means on which hardware; a run keeps the precision that it started with."""

import json
import os
from pathlib import Path

import pytest
import torch
from commands import ROOT, Result, call, run_python, tiny

import evaluate
import resnext.device
import resnext.engine.inference
import train
from resnext.config import parse_config
from resnext.device import choose_precision, configure_backends, has_instructions, slow_precision

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
WARNING = (
    "warning: train.precision: this CPU has no bf16 instructions and emulates them, many times slower than "
    "fp32; use train.precision=fp32"
)


@pytest.mark.parametrize(
    ("capability", "avx512_bf16", "amx", "onednn", "expected"),
    [
        ("AVX512", True, False, True, "bf16"),
        ("AVX512", False, True, True, "bf16"),
        ("AVX512", False, False, True, "fp32"),  # AVX-512 alone: oneDNN says yes, and emulates
        ("AVX2", True, True, True, "fp32"),  # ATEN_CPU_CAPABILITY=avx2
        ("AVX512", True, False, False, "fp32"),
        ("DEFAULT", False, False, False, "fp32"),
    ],
)
def test_auto_on_a_cpu(monkeypatch, capability, avx512_bf16, amx, onednn, expected):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512_bf16)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: onednn)
    assert choose_precision("auto", CPU) == expected
    assert choose_precision("tf32", CPU) == "tf32", "a precision that is named stays"
    assert (slow_precision("bf16", CPU, "train.precision=") == []) == (expected == "bf16")


@pytest.mark.parametrize("native", [True, False])
def test_auto_on_a_gpu(monkeypatch, native):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: native)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Tesla T4")
    assert choose_precision("auto", CUDA) == ("bf16" if native else "fp32")
    assert has_instructions(CUDA, "fp16")
    expected = [] if native else ["warning: --precision: Tesla T4 has no bf16 instructions"]
    assert [line[:55] for line in slow_precision("bf16", CUDA, "--precision ")] == expected


def test_auto_if_one_rank_has_none(monkeypatch):
    monkeypatch.setattr(resnext.device, "all_gather_objects", lambda own: [own, False])
    monkeypatch.setattr(resnext.device, "has_instructions", lambda *_: True)
    assert choose_precision("auto", CPU) == "fp32"


@pytest.fixture
def switches(monkeypatch):
    """Restore torch's process-wide switches afterwards."""
    names = (
        (torch.backends.cudnn, "benchmark"),
        (torch.backends.cudnn, "allow_tf32"),
        (torch.backends.cuda.matmul, "allow_tf32"),
        (torch.utils.deterministic, "fill_uninitialized_memory"),
    )
    before = [getattr(owner, name) for owner, name in names]
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")  # so that it is restored
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    torch.use_deterministic_algorithms(False)  # other tests may leave it on
    yield
    for (owner, name), value in zip(names, before, strict=True):
        setattr(owner, name, value)
    torch.use_deterministic_algorithms(False)


@pytest.mark.filterwarnings("error")
def test_switches(switches):
    """TF32 comes and goes; only training autotunes convolutions, and never in deterministic mode."""
    for precision in ("tf32", "fp32", "bf16", "tf32", "fp32"):
        configure_backends(precision, deterministic=False)
        allowed = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
        assert allowed == (precision == "tf32",) * 2 and torch.backends.cudnn.benchmark
    configure_backends("bf16", deterministic=False, training=False)
    assert not torch.backends.cudnn.benchmark and not torch.are_deterministic_algorithms_enabled()
    configure_backends("bf16", deterministic=True)
    assert not torch.backends.cudnn.benchmark and torch.are_deterministic_algorithms_enabled()
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert not torch.utils.deterministic.fill_uninitialized_memory, "nothing is read before it is written"


def test_evaluation_does_not_choose_kernels_by_time(switches, finished_run, monkeypatch):
    torch.backends.cudnn.benchmark = True
    chosen, real = [], resnext.engine.inference.evaluate

    def noted(*arguments, **options):
        chosen.append(torch.backends.cudnn.benchmark)
        return real(*arguments, **options)

    monkeypatch.setattr(resnext.engine.inference, "evaluate", noted)
    assert call(evaluate.main, finished_run, "--device", "cpu").status == 0
    assert chosen == [False]


def test_two_variables_make_any_cpu_one_without_bf16():
    code = (
        "import torch; from resnext.device import choose_precision; "
        "print(choose_precision('auto', torch.device('cpu')))"
    )
    environment = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}
    assert run_python("-c", code, cwd=ROOT, **environment).output == "fp32\n"


@pytest.fixture
def has_bf16(monkeypatch, tmp_path):
    """Return a function that sets whether this machine has bf16."""
    monkeypatch.chdir(tmp_path)
    Path("tiny.yaml").touch()
    return lambda native: monkeypatch.setattr(
        resnext.device, "has_instructions", lambda _, precision: native or precision == "fp32"
    )


def run(*arguments: str) -> Result:
    result = call(train.main, "--config", "tiny.yaml", "--output", "run", *tiny(), *arguments)
    assert result.status == 0, result.error
    return result


def precisions() -> set[str]:
    """Return what config.yaml and the checkpoint say."""
    checkpoint = torch.load("run/checkpoints/last.pt", weights_only=True)
    texts = [Path("run/config.yaml").read_text(), checkpoint["config"]]
    return {parse_config(text, "test").train.precision for text in texts}


@pytest.mark.parametrize(("native", "expected"), [(True, "bf16"), (False, "fp32")])
def test_a_run_records_what_auto_was(has_bf16, native, expected):
    has_bf16(native)
    result = run("train.precision=auto", "train.epochs=1")
    assert f", {expected} on " in result.output and "warning" not in result.output
    assert precisions() == {expected}


def test_a_run_keeps_its_precision_elsewhere(has_bf16):
    """Started in bf16, it continues in bf16 on a CPU that has none, and warns."""
    has_bf16(True)
    run("train.precision=auto", "train.epochs=1")
    has_bf16(False)
    result = run("--resume", "train.precision=auto", "train.epochs=2")
    assert result.output.splitlines()[0] == WARNING
    assert "train.precision bf16 →" not in result.output and precisions() == {"bf16"}
    result = run("--resume", "train.precision=fp32", "train.epochs=3")
    assert "train.precision bf16 → fp32" in result.output
    assert WARNING not in result.output and precisions() == {"fp32"}


def test_check_and_evaluation_warn_too(has_bf16):
    has_bf16(False)
    run("train.precision=bf16", "train.epochs=1")
    result = call(train.main, "--resume", "run", "--check", "train.epochs=2", "run.device=cpu")
    assert WARNING.replace("warning: ", "warning  ") in result.output.splitlines()
    result = call(evaluate.main, "run", "--device", "cpu", "--json", "a.json")
    expected = WARNING.replace("train.precision=", "--precision ").replace("train.precision", "--precision")
    assert result.error == f"{expected}\n"
    result = call(evaluate.main, "run", "--device", "cpu", "--precision", "auto", "--json", "b.json")
    assert result.error == ""
    reports = [json.loads(Path(name).read_text()) for name in ("a.json", "b.json")]
    assert [report["precision"] for report in reports] == ["bf16", "fp32"]
