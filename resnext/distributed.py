"""The processes of torchrun and their devices: who has which images, sums, and the request to stop.

One process a GPU, or several on CPUs. What the processes tell each other (sums, the stop, who failed) goes
over gloo and never waits for a device; gradients go over a group of their own, see `gradient_group`.
Without torchrun all of this is done for the one process alone.
"""

import contextlib
import ctypes
import datetime
import os
import re
import signal
import sys
import time
import types
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from .batchnorm import slice_sizes
from .config import Config, Train
from .errors import TORCHRUN, UserError, report_error

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)


# ---------------------------------------------------------------------------- the group


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def local_rank() -> int:
    """The number of this process on its machine."""
    return int(os.environ["LOCAL_RANK"]) if dist.is_initialized() else 0


@contextlib.contextmanager
def process_group(timeout: int) -> Iterator[None]:
    """Inside, the processes that torchrun started are one group; no wait for another exceeds `timeout` s.

    A failure is reported once, by the process that failed first.
    """
    missing = [name for name in TORCHRUN if name not in os.environ]
    if missing:
        if os.environ.get("WORLD_SIZE", "1") != "1":
            raise UserError(
                f"WORLD_SIZE={os.environ['WORLD_SIZE']} is set, but not {', '.join(missing)}; start several "
                "processes with torchrun, or unset WORLD_SIZE for one"
            )
        yield
        return
    _end_with_parent()
    store = _join(timeout)
    try:
        try:
            yield
            dist.barrier()  # nobody leaves while another still reads what it sent
        except RuntimeError as error:
            raise _explained(error, timeout) from error
    except UserError as error:
        # torchrun terminates all once one fails; the one that reports the error must survive until it has.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        with contextlib.suppress(RuntimeError):  # the store may have gone with the first machine
            if store.add("failures", 1) > 1:  # what follows from another's end need not be told
                sys.exit(2)
        report_error(error)
        sys.exit(2)
    time.sleep(0.1)  # gloo's threads drop their last tensors, for which they need the interpreter
    dist.destroy_process_group()


def _join(timeout: int) -> Any:
    """Form the group; returns its store."""
    seconds = datetime.timedelta(seconds=timeout)
    place = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    try:
        store, number, size = next(dist.rendezvous("env://", timeout=seconds))
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":  # where the last attempt left its own
            store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
        dist.init_process_group("gloo", store=store, rank=number, world_size=size, timeout=seconds)
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"{place}: the processes did not find each other ({_first_line(error)}); start all of them with "
            "torchrun, and several machines with the same --rdzv-endpoint"
        ) from error
    return store


def _end_with_parent() -> None:
    """Linux sends SIGTERM when torchrun itself is killed: the run is saved and no process stays behind."""
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def _explained(error: RuntimeError, timeout: int) -> Exception:
    """A UserError where another process was lost, else the error itself."""
    text = str(error)
    if "imed out" in text or "imeout" in text:
        what = f"another process did not answer within {timeout} s (run.timeout)"
    elif "NCCL" in text:
        what = f"NCCL failed, or another process is gone ({text.strip().splitlines()[-1][:200]})"
    elif any(words in text for words in ("gloo", "Connection", "Broken pipe")):
        what = "another process is gone"
    else:
        return error
    return UserError(
        f"process {rank()} of {world_size()}: {what}; see what the others say, then start again, train.py "
        f"with --resume ({_first_line(error)})"
    )


def _first_line(error: Exception) -> str:
    """Without the place in gloo's sources."""
    return re.sub(r"^\[\S+\] ", "", (str(error).splitlines() or [type(error).__name__])[0])[:100]


def gradient_group(device: torch.device, timeout: int) -> Any:
    """The group over which gradients and buffers on the device are exchanged; None where alone."""
    if not dist.is_initialized():
        return None
    if device.type != "cuda":
        return dist.group.WORLD
    # NCCL ends a process without a word: the votes over gloo are to notice a hang before it does.
    return dist.new_group(backend="nccl", timeout=datetime.timedelta(seconds=timeout + 60))


# ---------------------------------------------------------------------------- telling each other


def from_first(function: Callable[[], Any]) -> Any:
    """What `function` returns, or the UserError that it raises, in the first process: in all of them."""
    if world_size() == 1:
        return function()
    box: list[Any] = [None, None]
    if rank() == 0:
        try:
            box[0] = function()
        except UserError as error:
            box[1] = str(error)
    dist.broadcast_object_list(box, device=torch.device("cpu"))
    if box[1] is not None:
        raise UserError(box[1])
    return box[0]


def gather(value: Any) -> list[Any]:
    """The values of all processes, in order, in each of them; on the host."""
    if world_size() == 1:
        return [value]
    values = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def sum_over_ranks(values: Tensor) -> Tensor:
    """float64 values on the host added up over the processes, in their order: the same bits every time."""
    if world_size() == 1:
        return values
    parts = [torch.empty_like(values) for _ in range(world_size())]
    dist.all_gather(parts, values)
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total


@contextlib.contextmanager
def first_on_machine() -> Iterator[None]:
    """The first process of each machine does what is inside before the others: they find it done.

    A UserError of one process is raised in all of them.
    """
    problem = None
    if local_rank() != 0:
        dist.barrier()
    try:
        yield
    except UserError as error:
        problem = str(error)
    if dist.is_initialized() and local_rank() == 0:
        dist.barrier()
    for other in gather(problem):
        if other is not None:
            raise UserError(other)


# ---------------------------------------------------------------------------- images


def shares(images: int, train: Train, ranks: int) -> list[list[int]]:
    """How many images of a global batch each process has: [accumulation part][rank].

    Contiguous near-equal slices of the batch, a part after the other, in the order of the ranks; they end
    where BatchNorm's groups do.
    """
    parts = train.accumulation_steps
    groups = _groups(train, ranks)
    sizes = slice_sizes(images, parts * groups)
    each = groups // ranks
    starts = range(0, parts * groups, each)
    flat = [sum(sizes[start : start + each]) for start in starts]
    return [flat[part * ranks : (part + 1) * ranks] for part in range(parts)]


def share_positions(images: int, train: Train) -> np.ndarray:
    """int64: where in a global batch the images of this process are."""
    sizes = np.array(shares(images, train, world_size()))
    ends = np.cumsum(sizes).reshape(sizes.shape)[:, rank()]
    own = sizes[:, rank()]
    return np.concatenate([np.arange(end - size, end) for end, size in zip(ends, own, strict=True)])


def check_ranks(train: Train, ranks: int) -> None:
    """A UserError where a global batch cannot be shared by so many processes."""
    part = train.batch_size // train.accumulation_steps
    groups = part if train.bn_group is None else part // train.bn_group
    if train.bn_group is not None and groups % ranks:
        valid = ", ".join(str(n) for n in range(1, groups + 1) if groups % n == 0)
        raise UserError(
            f"train.bn_group: {train.bn_group} makes {groups} groups of {part} images, which {ranks} "
            f"processes cannot share; start {valid} (--nproc-per-node), or choose another bn_group"
        )
    if ranks > groups:
        raise UserError(
            f"train.batch_size: {part} images at a time are too few for {ranks} processes; raise it, or "
            "start fewer (--nproc-per-node)"
        )


def check_last_batch(config: Config, images: int, ranks: int) -> None:
    """A UserError where BatchNorm cannot work on the batches of an epoch, of which the last is smaller.

    It needs two values per channel; and SyncBN an image in each process.
    """
    train = config.train
    last = (images - 1) % train.batch_size + 1
    if train.sync_bn and any(0 in part for part in shares(last, train, ranks) if any(part)):
        raise UserError(
            f"train.sync_bn: the last batch of an epoch has {last} images, too few for {ranks} processes; "
            "choose another train.batch_size"
        )
    if _batchnorm_works(config, images, ranks):
        return
    others = sorted(range(2, 2 * train.batch_size + 1), key=lambda size: abs(size - train.batch_size))
    works = (
        size
        for size in others
        if _can_be_shared(replace(train, batch_size=size), ranks)
        and _batchnorm_works(replace(config, train=replace(train, batch_size=size)), images, ranks)
    )
    remedy = next((f"choose another, such as train.batch_size={size}" for size in works), "add images")
    raise UserError(
        f"train.batch_size: with {images:,} training images and batches of {train.batch_size} the last has "
        f"{last}, and BatchNorm somewhere a single value per channel (one image, of 1x1 at the end of the "
        f"network), which has no variance; {remedy}, or a larger data.image_size"
    )


def _batchnorm_works(config: Config, images: int, ranks: int) -> bool:
    """Whether BatchNorm has two values per channel or more in all batches of an epoch of so many images."""
    train, model = config.train, config.model
    strides = 32 if model.stem == "imagenet" else 4
    if config.data.train_size > strides or train.frozen_stages == len(model.stages):
        return True
    slices = train.accumulation_steps * (1 if train.sync_bn else _groups(train, ranks))
    last = (images - 1) % train.batch_size + 1
    return all(max(1, batch // slices) > 1 for batch in {last, min(images, train.batch_size)})


def _can_be_shared(train: Train, ranks: int) -> bool:
    part, rest = divmod(train.batch_size, train.accumulation_steps)
    if rest or (train.bn_group and (part < train.bn_group or part % train.bn_group)):
        return False
    try:
        check_ranks(train, ranks)
    except UserError:
        return False
    return True


def _groups(train: Train, ranks: int) -> int:
    """Into how many slices with statistics of their own BatchNorm cuts an accumulation part."""
    if train.bn_group is None:
        return ranks
    return train.batch_size // train.accumulation_steps // train.bn_group


# ---------------------------------------------------------------------------- stopping


class StopRequest:
    """Context manager that notes a stop signal; signals only set a flag.

    The trainer asks between steps, so that a checkpoint is never torn and no step is half done. A second
    Ctrl-C interrupts a single process at once.
    """

    def __init__(self):
        self.signal: signal.Signals | None = None  # agreed by all processes
        self._noted: signal.Signals | None = None
        self._asked = 0
        self._vote: tuple[Tensor, Any] | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopRequest":
        for number in STOP_SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:  # nohup ignores SIGHUP
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        if kind is None:
            self._count()
        elif dist.is_initialized():
            return  # torchrun's SIGTERM must not come ahead of the message: see process_group
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, _: types.FrameType | None) -> None:
        if self._noted is not None and number == signal.SIGINT and not dist.is_initialized():
            raise KeyboardInterrupt
        self._noted = signal.Signals(number)

    def requested(self) -> bool:
        """Whether to stop. All processes must ask equally often, and get the same answer.

        They vote, and the next time count the votes, which have arrived meanwhile. Votes go round a ring:
        of many processes each 64 add a question to those that pass without a vote.
        """
        self._asked += 1
        if world_size() == 1:
            self.signal = self._noted
        elif self.signal is None and self._asked % (1 + world_size() // 64) == 0:
            self._count()
            if self.signal is None:
                highest = torch.tensor(int(self._noted or 0))
                self._vote = highest, dist.all_reduce(highest, dist.ReduceOp.MAX, async_op=True)
        return self.signal is not None

    def _count(self) -> None:
        if self._vote:
            highest, work = self._vote
            work.wait()
            self.signal = signal.Signals(int(highest)) if highest else None
            self._vote = None


# ---------------------------------------------------------------------------- the device


def choose_device(name: str) -> torch.device:
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
    return "bf16" if all(gather(has_instructions(device, "bf16"))) else "fp32"


def slow_precision(precision: str, device: torch.device, option: str) -> list[str]:
    """A warning where the device emulates a precision that was asked for; `option` is how it was."""
    if has_instructions(device, precision):
        return []
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "this CPU"
    return [
        f"warning: {option.strip('= ')}: {name} has no {precision} instructions and emulates them, many "
        f"times slower than fp32; use {option}fp32"
    ]


def memory_short(error: BaseException) -> bool:
    """Whether a device or the machine has run out of memory; CUDA's libraries each have their own words."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    words = r"out of memory|can't allocate memory|ALLOC\w*_FAILED"
    return isinstance(error, RuntimeError) and re.search(words, str(error)) is not None


@contextlib.contextmanager
def memory_explained(text: str, kind: type[UserError] = UserError) -> Iterator[None]:
    """Inside, running out of memory is a UserError with this text."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not memory_short(error):
            raise
        raise kind(text) from None


def set_numerics(precision: str, deterministic: bool, training: bool = True) -> None:
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
