"""The device of a process: choice, precision, numerical switches, and running out of its memory."""

import contextlib
import os
import re
from collections.abc import Iterator

import torch
import torch.distributed as dist

from .config import Config
from .distributed import all_gather_objects, local_rank
from .errors import UserError


def select_device(name: str) -> torch.device:
    """The device of run.device; of several processes on a machine each has its own GPU."""
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise UserError("run.device: cuda is asked for, but there is none; use auto or cpu")
    if name == "cpu" or not available:
        share_cores()
        return torch.device("cpu")
    if local_rank() >= torch.cuda.device_count():
        raise UserError(
            f"process {local_rank()} of this machine has no GPU, there are {torch.cuda.device_count()}; "
            "start fewer with --nproc-per-node, or use run.device=cpu"
        )
    torch.cuda.set_device(local_rank())
    return torch.device("cuda", local_rank()) if dist.is_initialized() else torch.device("cuda")


def share_cores() -> None:
    """Threads of the CPU: torchrun's default is one for each of several processes, which wastes cores."""
    several = int(os.environ["LOCAL_WORLD_SIZE"]) if dist.is_initialized() else 1
    if several > 1 and os.environ.get("OMP_NUM_THREADS") == "1":
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // several))


def has_instructions(device: torch.device, precision: str) -> bool:
    """Whether a device computes in a precision itself; else it is emulated, many times slower than fp32."""
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


def choose_precision(precision: str, device: torch.device) -> str:
    """What `auto` stands for: bf16 where the devices of all processes have it, else fp32."""
    if precision != "auto":
        return precision
    return "bf16" if all(all_gather_objects(has_instructions(device, "bf16"))) else "fp32"


def slow_precision(precision: str, device: torch.device, option: str) -> list[str]:
    """A warning where the device emulates a precision that was asked for; `option` is how it was."""
    if has_instructions(device, precision):
        return []
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "this CPU"
    return [
        f"warning: {option.strip('= ')}: {name} has no {precision} instructions and emulates them, many "
        f"times slower than fp32; use {option}fp32"
    ]


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device or the machine has run out of memory; CUDA's libraries each have their own words."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    words = r"out of memory|can't allocate memory|ALLOC\w*_FAILED"
    return isinstance(error, RuntimeError) and re.search(words, str(error)) is not None


@contextlib.contextmanager
def explain_out_of_memory(text: str, kind: type[UserError] = UserError) -> Iterator[None]:
    """Inside, running out of memory is a UserError with this text."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise kind(text) from None


def configure_backends(precision: str, deterministic: bool, training: bool = True) -> None:
    """Process-wide switches: TF32 only where asked for, deterministic algorithms, autotuning in training.

    Autotuning chooses by time: two evaluations could round otherwise, and count another error.
    """
    # The newer fp32_precision makes torch.export fail afterwards.
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision == "tf32"
    torch.backends.cudnn.benchmark = training and not deterministic
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # a pass over each new tensor


def explain_step_errors(
    config: Config, device: torch.device, kind: type[UserError] = UserError
) -> contextlib.AbstractContextManager:
    """Inside, running out of memory is an error that names the keys which save some."""
    train = config.train
    recomputing = train.activation_checkpointing or train.compile  # which exclude each other
    saving = "" if recomputing else ", set train.activation_checkpointing=true"
    return explain_out_of_memory(
        f"train.batch_size: a step on {train.batch_size // train.accumulation_steps} images at once does "
        f"not fit into the memory of {device_name(device)}; raise train.accumulation_steps (now "
        f"{train.accumulation_steps}){saving}, or lower train.batch_size",
        kind,
    )


def device_name(device: torch.device) -> str:
    if device.type != "cuda":
        return "this machine"
    total = torch.cuda.get_device_properties(device).total_memory
    return f"{torch.cuda.get_device_name(device)} ({total / 2**30:,.1f} GiB)"
