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
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .errors import TORCHRUN, UserError, report_error

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


def broadcast_from_rank0(function: Callable[[], Any]) -> Any:
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


def all_gather_objects(value: Any) -> list[Any]:
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
def local_rank0_first() -> Iterator[None]:
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
    for other in all_gather_objects(problem):
        if other is not None:
            raise UserError(other)
