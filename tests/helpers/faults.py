"""train.py with a fault in one of the processes of a job; `torchrun.Processes` runs `drive`."""

import os
import shutil
import sys
import time
from collections.abc import Callable

import resnext.distributed
import resnext.engine.checkpoint
import resnext.engine.trainer
import train
from resnext.errors import run_main


def drive(fault: str, rank: int, arguments: list[str]) -> None:
    """Run train.py with a fault in one process; this is called inside `Processes`."""
    if int(os.environ.get("RANK", "0")) == rank:
        FAULTS[fault]()
    if fault == "busy":  # on all ranks
        be_busy()
    sys.argv = ["train.py", *arguments]
    run_main(train.main)


def at_step_8(act: Callable[[], float]) -> None:
    """Call `act` before the eighth step, and multiply that step's result by what it returns."""
    original = resnext.engine.trainer.train_step

    def step(training, *rest):
        factor = act() if training.progress.global_step == 7 else 1
        return original(training, *rest) * factor

    resnext.engine.trainer.train_step = step


def fill_disk() -> float:
    def full(*_):
        raise OSError(28, "No space left on device")

    resnext.engine.checkpoint.os.fsync = full
    return 1


def fill_memory() -> None:
    shutil.disk_usage = lambda _: shutil._ntuple_diskusage(1000, 1000, 0)


def have_a_bug() -> None:
    def broken(*_):
        raise RuntimeError("a bug of ours")

    resnext.engine.trainer.train_step = broken


def be_busy() -> None:
    """Behave as a machine on which torchrun's SIGTERM is quicker than a message."""
    report_error = resnext.distributed.report_error

    def late(error):
        time.sleep(2)
        report_error(error)

    resnext.distributed.report_error = late


FAULTS = {
    "loss": lambda: at_step_8(lambda: float("nan")),
    "disk": lambda: at_step_8(fill_disk),
    "memory": fill_memory,
    "bug": have_a_bug,
    "busy": lambda: None,
}
