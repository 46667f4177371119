"""The request to stop by a signal, which all ranks agree on."""

import signal
from types import FrameType, TracebackType

import torch
import torch.distributed as dist
from torch import Tensor

from .distributed import STOP_SIGNALS, world_size


class StopSignal:
    """Context manager that records stop signals; its handlers only set a flag.

    The trainer asks between steps, so no checkpoint is torn and no step is half done. A second Ctrl-C
    interrupts a single process immediately.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None  # agreed on by all ranks
        self._received: signal.Signals | None = None
        self._calls = 0
        self._vote: tuple[Tensor, dist.Work] | None = None
        self._handlers: dict[signal.Signals, signal._HANDLER] = {}

    def __enter__(self) -> "StopSignal":
        for number in STOP_SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:  # nohup ignores SIGHUP
                self._handlers[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self._count()
        elif dist.is_initialized():
            return  # torchrun's SIGTERM must not arrive before the message is printed: see process_group
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _handle(self, number: int, _: FrameType | None) -> None:
        if self._received is not None and number == signal.SIGINT and not dist.is_initialized():
            raise KeyboardInterrupt
        self._received = signal.Signals(number)

    def requested(self) -> bool:
        """Return whether to stop. All ranks must call this equally often, and get the same answer.

        They vote, and count the votes at the next call, when these have arrived. Votes travel around a ring:
        every 64 ranks add one call between two votes.
        """
        self._calls += 1
        if world_size() == 1:
            self.signal = self._received
        elif self.signal is None and self._calls % (1 + world_size() // 64) == 0:
            self._count()
            if self.signal is None:
                highest = torch.tensor(int(self._received or 0))
                self._vote = highest, dist.all_reduce(highest, dist.ReduceOp.MAX, async_op=True)
        return self.signal is not None

    def _count(self) -> None:
        if self._vote:
            highest, work = self._vote
            work.wait()
            self.signal = signal.Signals(int(highest)) if highest else None
            self._vote = None
