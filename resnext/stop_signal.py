"""The request to stop: signals, agreed on by all processes."""

import signal
import types
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .distributed import world_size

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)


class StopSignal:
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

    def __enter__(self) -> "StopSignal":
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
