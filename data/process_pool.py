"""Processes for scripts that read many files, and their progress bar."""

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor

from tqdm import tqdm

from resnext.errors import UserError


@contextlib.contextmanager
def process_pool(workers: int) -> Iterator[ProcessPoolExecutor]:
    """Start processes that end at once if an exception or a signal ends the block, or if this one dies."""
    handler = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), end_with_parent) as pool:
        try:
            # `submit` starts the workers. They inherit the mask: only this process handles Ctrl-C.
            mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
            started = [pool.submit(int) for _ in range(workers)]
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            if started[0].exception():
                raise UserError("--workers: worker processes die as they start; free memory or start fewer")
            yield pool
        except BaseException:
            for child in multiprocessing.active_children():
                child.kill()
            raise
        finally:
            signal.signal(signal.SIGTERM, handler)


def end_with_parent() -> None:
    """Let a worker exit when the parent process has ended for whatever reason."""

    def wait() -> None:
        if parent := multiprocessing.parent_process():
            parent.join()
            os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def progress(title: str, total: int, unit: str) -> tqdm:
    """Return a progress bar on standard error; without a terminal it prints a line every 30 seconds."""
    seconds = 0.1 if sys.stderr.isatty() else 30
    return tqdm(
        desc=title,
        total=total,
        unit=unit,
        unit_scale=unit == "B",
        leave=False,
        delay=seconds,
        mininterval=seconds,
        miniters=1,
    )
