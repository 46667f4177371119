"""The processes that torchrun started: their group, and what they tell each other.

There is one process per GPU, or several on CPUs. Sums, votes and errors go over gloo and never wait for a
device; gradients go over a group of their own, see `gradient_group`. Without torchrun, everything here
works for the one process alone.
"""

import contextlib
import ctypes
import datetime
import functools
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from .errors import TORCHRUN, UserError, report_error

T = TypeVar("T")
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def local_rank() -> int:
    """Return the number of this process on its machine."""
    return int(os.environ["LOCAL_RANK"]) if dist.is_initialized() else 0


@contextlib.contextmanager
def process_group(timeout: int) -> Iterator[None]:
    """Join the processes that torchrun started into one group; no wait for another exceeds `timeout` s.

    The process that fails first reports the failure, once.
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
            dist.barrier()  # no process leaves while another still reads what it sent
        except RuntimeError as error:
            raise _explained(error, timeout) from error
    except UserError as error:
        # torchrun terminates all processes once one fails; this one must survive until it has reported.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        with contextlib.suppress(RuntimeError):  # the store may have ended with the first machine
            if store.add("failures", 1) > 1:  # a consequence of the first failure
                sys.exit(2)
        report_error(error)
        sys.exit(2)
    time.sleep(0.1)  # gloo's threads drop their last tensors, for which they need the interpreter
    dist.destroy_process_group()


def _join(timeout: int) -> dist.Store:
    """Form the group and return its store."""
    seconds = datetime.timedelta(seconds=timeout)
    place = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    try:
        store, own_rank, size = next(dist.rendezvous("env://", timeout=seconds))
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":  # it keeps the keys of earlier attempts
            store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
        dist.init_process_group("gloo", store=store, rank=own_rank, world_size=size, timeout=seconds)
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"{place}: the processes did not find each other ({_first_line(error)}); start all of them with "
            "torchrun, and several machines with the same --rdzv-endpoint"
        ) from error
    return store


def _end_with_parent() -> None:
    """Ask Linux for SIGTERM if torchrun itself is killed, so that the run is saved and every process ends."""
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def _explained(error: RuntimeError, timeout: int) -> Exception:
    """Return a UserError if another process was lost, else the error itself."""
    text = str(error)
    if "imed out" in text or "imeout" in text:
        what = f"another process did not answer within {timeout} s (run.timeout)"
    elif "NCCL" in text:
        what = f"NCCL failed, or another process ended ({text.strip().splitlines()[-1][:200]})"
    elif any(words in text for words in ("gloo", "Connection", "Broken pipe")):
        what = "another process ended"
    else:
        return error
    return UserError(
        f"process {rank()} of {world_size()}: {what}; read the messages of the other processes, then restart "
        f"(train.py with --resume) ({_first_line(error)})"
    )


def _first_line(error: Exception) -> str:
    """Return the first line of a message without the place in gloo's sources."""
    return re.sub(r"^\[\S+\] ", "", (str(error).splitlines() or [type(error).__name__])[0])[:100]


def gradient_group(device: torch.device, timeout: int) -> dist.ProcessGroup | None:
    """Return the group that exchanges gradients and buffers on the device; None without torchrun."""
    if not dist.is_initialized():
        return None
    if device.type != "cuda":
        return dist.group.WORLD
    # NCCL aborts a process silently. The votes over gloo must notice a hang before it does.
    group = dist.new_group(backend="nccl", timeout=datetime.timedelta(seconds=timeout + 60))
    return cast(dist.ProcessGroup, group)  # every rank is a member


def broadcast_from_rank0(function: Callable[[], T]) -> T:
    """Call `function` on rank 0; return its result, or raise its UserError, on all ranks."""
    if world_size() == 1:
        return function()
    box: list[Any] = [None]
    if rank() == 0:
        try:
            box = [function()]
        except UserError as error:
            box = [error]
    dist.broadcast_object_list(box, device=torch.device("cpu"))
    if isinstance(box[0], UserError):
        raise box[0]
    return box[0]


def all_gather_objects(value: T) -> list[T]:
    """Return the values of all ranks, in order, on every rank; they travel through the host."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def sum_over_ranks(values: Tensor) -> Tensor:
    """Return float64 values on the host summed over the ranks in their order: always the same bits."""
    parts = [values]
    if world_size() > 1:
        parts = [torch.empty_like(values) for _ in range(world_size())]
        dist.all_gather(parts, values)
    return functools.reduce(torch.add, parts)


@contextlib.contextmanager
def local_rank0_first() -> Iterator[None]:
    """Let the first process of each machine run the body before the others, which find its work done.

    A UserError on one rank is raised on all of them.
    """
    problem = None
    if local_rank() != 0:
        dist.barrier()
    try:
        yield
    except UserError as error:
        problem = error
    if dist.is_initialized() and local_rank() == 0:
        dist.barrier()
    for other in all_gather_objects(problem):
        if other is not None:
            raise other
