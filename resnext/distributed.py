"""The process and its surroundings: the device, and the request to stop.

One process for now; SIGTERM, SIGINT, SIGUSR1 and SIGHUP only set a flag, which the trainer reads between
steps, so that a checkpoint is never torn and no step is half done.
"""

import os
import signal
import types

import torch

from .errors import UserError

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)


class StopRequest:
    """Context manager that notes a stop signal. A second Ctrl-C interrupts at once."""

    def __init__(self):
        self.signal: signal.Signals | None = None
        self._before: dict[int, object] = {}

    def __enter__(self) -> "StopRequest":
        for number in STOP_SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:  # nohup ignores SIGHUP
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, _: types.FrameType | None) -> None:
        if self.signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = signal.Signals(number)

    def requested(self) -> bool:
        return self.signal is not None


def choose_device(name: str) -> torch.device:
    """The device of run.device."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError(
            f"WORLD_SIZE={os.environ['WORLD_SIZE']}: training in several processes is not "
            "supported yet; start one process"
        )
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("run.device: cuda is asked for, but there is none; use auto or cpu")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def set_numerics(precision: str, deterministic: bool) -> None:
    """Process-wide switches: TF32 only where asked for, deterministic algorithms, autotuning."""
    kind = "tf32" if precision == "tf32" else "ieee"
    torch.backends.cuda.matmul.fp32_precision = kind
    torch.backends.cudnn.conv.fp32_precision = kind
    torch.backends.cudnn.benchmark = not deterministic
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
