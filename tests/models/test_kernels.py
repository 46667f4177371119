"""The CUDA kernels without a GPU: values in triton's interpreter, machine code, launches, and shapes."""

import re
import subprocess
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy
import pytest
import torch
from commands import ROOT, run_python
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from resnext.models import ghost_batchnorm, resnext

triton = pytest.importorskip("triton", reason="triton comes with CUDA builds of torch only")
from triton.backends.compiler import GPUTarget  # noqa: E402


@pytest.mark.parametrize(
    "chosen", ["test_case or nan", "not test_case and not nan"], ids=["kernels", "networks"]
)
def test_in_the_interpreter(chosen):
    """Run interpreted.py in a new process, because triton chooses its mode when it is imported."""
    found = [tuple(map(int, module.__version__.split(".")[:2])) for module in (triton, numpy)]
    if found[0] < (3, 7) and found[1] >= (2, 4):
        pytest.skip(f"the interpreter of triton {triton.__version__} needs NumPy below 2.4")
    file = ROOT / "tests" / "helpers" / "interpreted.py"
    arguments = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", chosen, file)
    result = run_python(*arguments, cwd=ROOT, TRITON_INTERPRET="1", CUDA_VISIBLE_DEVICES="")
    assert result.status == 0, result.output[-6000:] + result.error[-2000:]


# ---------------------------------------------------------------------------- machine code

FLOAT32 = ("part", "statistics", "running_mean", "running_var", "weight", "bias", "sums", "dweight", "dbias")
FORWARD, BACKWARD = ({"ROWS": values // cols, "COLS": cols} for values, cols in ((2048, 64), (4096, 128)))
VARIANTS = [
    ("partial_statistics", FORWARD),
    *(("merge_statistics", {"SPLIT": s, "COLS": c, "COUNT": True}) for s, c in ((1, 64), (1024, 4))),
    *(("merge_gradients", {"SPLIT": s, "COLS": c}) for s, c in ((1, 64), (1024, 4))),
    *(("apply", {**FORWARD, "SHORTCUT": shortcut, "RELU": True}) for shortcut in (False, True)),
    *(
        ("partial_gradients", {**BACKWARD, "SHORTCUT": shortcut, "TWO": two, "RELU": True})
        for shortcut in (False, True)
        for two in (False, True)
    ),
    *(("input_gradient", {**BACKWARD, "MASKED": masked, "RELU": True}) for masked in (False, True)),
]


def kind(argument: str, constants: dict) -> str:
    """Return the type of an argument of a kernel for bf16 images."""
    if argument in constants:
        return "constexpr"
    if not argument.endswith("_ptr"):
        return "fp32" if argument in ("eps", "momentum") else "i32"
    leaf = argument.removesuffix("_ptr")
    return "*i64" if leaf == "batches" else "*fp32" if leaf in FLOAT32 else "*bf16"


@pytest.mark.parametrize("capability", [80, 90, 100])
def test_machine_code(capability, tmp_path, monkeypatch):
    """bf16: no value is spilled from the registers, and images are read and written 128 bits at a time."""
    from triton.compiler import ASTSource

    from resnext.models import kernels

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    needed = (tools / "cuobjdump", tools / ("ptxas-blackwell" if capability >= 100 else "ptxas"))
    if missing := [tool.name for tool in needed if not tool.exists()]:
        pytest.skip(f"this triton comes without {', '.join(missing)}")
    for name, constants in VARIANTS:
        kernel = getattr(kernels, name)
        signature = {argument: kind(argument, constants) for argument in kernel.arg_names}
        aligned = {
            (i,): [["tt.divisibility", 16]]
            for i, argument in enumerate(kernel.arg_names)
            if argument.endswith("_ptr") or argument == "C"
        }
        source = ASTSource(kernel, signature, constants, aligned)
        binary = triton.compile(source, target=GPUTarget("cuda", capability, 32))
        (tmp_path / "cubin").write_bytes(binary.asm["cubin"])
        command = [tools / "cuobjdump", "-res-usage", tmp_path / "cubin"]
        usage = subprocess.run(command, capture_output=True, text=True).stdout
        numbers = {k: int(v) for k, v in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
        assert numbers["STACK"] == numbers["LOCAL"] == 0, (name, constants, numbers)
        assert numbers["REG"] <= 200, (name, constants, numbers)
        if "ROWS" in constants:  # 128 threads, 8 values at a time
            loads = re.findall(r"ld\.global\S*", binary.asm["ptx"])
            wide = sum(".v4.b32" in load for load in loads)
            assert wide >= constants["ROWS"] * constants["COLS"] // (128 * 8), (name, loads)
            assert not any("16" in load for load in loads), (name, loads)


# ---------------------------------------------------------------------------- launches


class PretendedDriver:
    """The answers that triton expects of a GPU; it only records the launches."""

    def __init__(self):
        self.launches: list[tuple] = []
        self.utils = SimpleNamespace(
            load_binary=lambda name, code, *_: (None, hash(code), 32, 0, 1024),
            get_device_properties=lambda _: {"max_shared_mem": 232448},
        )

    get_current_device = staticmethod(lambda: 0)
    get_current_stream = staticmethod(lambda _: 0)
    get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))

    def launcher_cls(self, source, metadata):
        def run(*arguments):
            *grid, _, function, _, _, _, _ = arguments[:9]
            for a in arguments[9:]:
                grid.append((a.data_ptr() % 16, a.dtype) if isinstance(a, torch.Tensor) else a)
            self.launches.append((metadata.name, function, *grid))

        return run


@pytest.mark.parametrize("shortcut", [False, True])
def test_later_launches_are_those_of_triton(monkeypatch, tmp_path, shortcut):
    """Known kernels have the same grids and arguments; other arguments launch other kernels."""
    from triton.runtime.driver import driver

    from resnext.models import fused_norm, kernels

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(fused_norm, "COMPILED", {})
    pretended = PretendedDriver()
    monkeypatch.setattr(driver, "_active", pretended)

    def step(images: int, dtype: torch.dtype = torch.bfloat16, offset: int = 0) -> list[tuple]:
        pretended.launches.clear()
        memory = torch.zeros(images * 64 * 16 + offset, dtype=dtype)[offset:]
        x = memory.view(images, 4, 4, 64).permute(0, 3, 1, 2)
        weight, bias, mean, var = (torch.ones(64) for _ in range(4))
        skip = x if shortcut else None
        options = (weight, bias, mean, var, torch.tensor(0), 2, 0.1, 1e-5, True)
        y, statistics = fused_norm.norm_forward(x, skip, *options)
        saved = y if shortcut else None
        fused_norm.norm_backward(y, None, x, saved, weight, bias, statistics, shortcut, True)
        return list(pretended.launches)

    first = step(4)
    assert len(first) == 6 and len(fused_norm.COMPILED) == 6
    with monkeypatch.context() as context:
        context.setattr(triton.JITFunction, "run", None)  # needed only once
        assert step(4) == first
    for other in (step(3), step(4, torch.float32)):
        assert other != first and len(other) == 6
    unaligned = step(4, offset=1)
    assert [launch[0] for launch in unaligned] == [launch[0] for launch in first]
    changed = {a[0] for a, b in zip(first, unaligned, strict=True) if a[1] != b[1]}  # other machine code
    assert changed == {"partial_statistics", "apply", "partial_gradients", "input_gradient"}
    assert step(4) == first
    for name in {name for name, _ in VARIANTS}:
        getattr(kernels, name).device_caches.clear()


# ---------------------------------------------------------------------------- shapes


@pytest.mark.parametrize("shortcut", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_shapes_on_fake_cuda_tensors(dtype, shortcut):
    from resnext.models.fused_norm import norm_relu

    with FakeTensorMode(), torch.device("cuda"):
        x = torch.empty(6, 24, 5, 4, dtype=dtype).contiguous(memory_format=torch.channels_last)
        weight, bias, mean, var = (torch.empty(24) for _ in range(4))
        skip = x if shortcut else None
        options = (weight, bias, mean, var, None, 3, 0.1, 1e-5, True)
        for y in norm_relu(x, skip, *options):
            assert (y.dtype, y.device, y.shape, y.stride()) == (x.dtype, x.device, x.shape, x.stride())
        y, statistics = torch.ops.resnext.norm_forward(x, skip, *options)
        assert y.stride() == x.stride()
        assert statistics.dtype == torch.float32 and statistics.shape == (2, 3, 24)
        saved = y if shortcut else None
        dx, dshortcut, dweight, dbias = torch.ops.resnext.norm_backward(
            y, None, x, saved, weight, bias, statistics, shortcut, True
        )
        assert (dx.dtype, dx.shape, dx.stride()) == (dtype, x.shape, x.stride())
        assert dshortcut.dtype == dtype and dshortcut.shape == (x.shape if shortcut else (0,))
        assert dweight.shape == dbias.shape == (24,) and dweight.dtype == torch.float32


# ---------------------------------------------------------------------------- passes over memory


class Operators(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        self.calls.append((operator._schema.name, args))
        return operator(*args, **(kwargs or {}))


def test_a_step_makes_no_other_pass(monkeypatch):
    """The operators do BatchNorm, ReLU, and all but one of the additions of ResNeXt-50."""
    for module in (ghost_batchnorm, resnext):
        monkeypatch.setattr(module, "on_gpu", lambda x: True)
    with FakeTensorMode(), Operators() as operators:
        network = resnext.resnext50_32x4d()
        ghost_batchnorm.use_ghost_batchnorm(network, 2, fused=True)
        operators.calls.clear()
        x = torch.empty(4, 3, 64, 64).contiguous(memory_format=torch.channels_last)
        network(x).sum().backward()
    names = Counter(name for name, _ in operators.calls)
    backward = [args for name, args in operators.calls if name == "resnext::norm_backward"]
    assert names["resnext::norm_forward"] == len(backward) == 53
    assert sum(args[1] is not None for args in backward) == 15  # of the 16 blocks' outputs, but the last
    assert names["aten::add"] == 1  # of the gradients of max-pooling's output
    assert not any("batch_norm" in name or "relu" in name or "threshold" in name for name in names)
