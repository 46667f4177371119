"""The device of a process: its choice, precision and numerical switches, and running out of its memory."""

import contextlib
import os
import re
from collections.abc import Iterator

import torch
import torch.distributed as dist

from .batch_plan import micro_batch_size
from .config import Config, Precision
from .distributed import all_gather_objects, local_rank
from .errors import UserError


def select_device(name: str) -> torch.device:
    """Return the device for run.device; each of several processes on a machine has its own GPU."""
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise UserError("run.device: this machine has no CUDA device (got cuda); use auto or cpu")
    if name == "cpu" or not available:
        share_cores()
        return torch.device("cpu")
    if local_rank() >= torch.cuda.device_count():
        raise UserError(
            f"--nproc-per-node: process {local_rank()} of this machine has no GPU (the machine has "
            f"{torch.cuda.device_count()}); start fewer processes, or use run.device=cpu"
        )
    torch.cuda.set_device(local_rank())
    return torch.device("cuda", local_rank()) if dist.is_initialized() else torch.device("cuda")


def share_cores() -> None:
    """Divide the CPU cores among the processes of this machine; torchrun's default is one thread each."""
    several = int(os.environ["LOCAL_WORLD_SIZE"]) if dist.is_initialized() else 1
    if several > 1 and os.environ.get("OMP_NUM_THREADS") == "1":
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // several))


def has_instructions(device: torch.device, precision: str) -> bool:
    """Return whether a device computes natively in a precision; emulation is many times slower than fp32."""
    if precision not in ("bf16", "fp16"):
        return True
    if device.type == "cuda":
        return precision == "fp16" or torch.cuda.is_bf16_supported(including_emulation=False)
    # The first heeds ATEN_CPU_CAPABILITY; the second counts AVX-512 without instructions for bf16.
    if torch.backends.cpu.get_cpu_capability() != "AVX512" or not torch.backends.mkldnn.is_available():
        return False
    if precision == "fp16":
        return torch.ops.mkldnn._is_mkldnn_fp16_supported()
    native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return native and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def choose_precision(precision: Precision, device: torch.device) -> Precision:
    """Resolve `auto`: bf16 if the devices of all ranks have it, else fp32."""
    if precision != "auto":
        return precision
    return "bf16" if all(all_gather_objects(has_instructions(device, "bf16"))) else "fp32"


def slow_precision(precision: str, device: torch.device, option: str) -> list[str]:
    """Return a warning if the device emulates the precision that `option`, a key or flag, selected."""
    if has_instructions(device, precision):
        return []
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "this CPU"
    return [
        f"warning: {option.strip('= ')}: {name} has no {precision} instructions and emulates them, many "
        f"times slower than fp32; use {option}fp32"
    ]


def configure_backends(precision: str, deterministic: bool, training: bool = True) -> None:
    """Set process-wide switches: TF32, deterministic algorithms, and autotuning.

    Only training autotunes. Autotuning chooses kernels by time, so two evaluations could round differently.
    """
    # The newer fp32_precision makes torch.export fail afterwards.
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision == "tf32"
    torch.backends.cudnn.benchmark = training and not deterministic
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        # Filling would write every new tensor twice.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # not stubbed


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether a device or the machine ran out of memory; each CUDA library words this differently."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    words = r"out of memory|can't allocate memory|ALLOC\w*_FAILED"
    return isinstance(error, RuntimeError) and re.search(words, str(error)) is not None


@contextlib.contextmanager
def explain_out_of_memory(text: str, kind: type[UserError] = UserError) -> Iterator[None]:
    """Turn running out of memory into an error of this kind with this text."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise kind(text) from None


def explain_step_errors(
    config: Config, device: torch.device, kind: type[UserError] = UserError
) -> contextlib.AbstractContextManager[None]:
    """Turn running out of memory in a training step into an error that names the keys that save memory."""
    train = config.train
    recomputing = train.activation_checkpointing or train.compile  # these exclude each other
    saving = "" if recomputing else ", set train.activation_checkpointing=true"
    return explain_out_of_memory(
        f"train.batch_size: a step on {micro_batch_size(train)} images at once does not fit into the memory "
        f"of {device_name(device)}; raise train.accumulation_steps (now {train.accumulation_steps}){saving}, "
        "or lower train.batch_size",
        kind,
    )


def device_name(device: torch.device) -> str:
    if device.type != "cuda":
        return "this machine"
    total = torch.cuda.get_device_properties(device).total_memory
    return f"{torch.cuda.get_device_name(device)} ({total / 2**30:,.1f} GiB)"
