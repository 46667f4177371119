"""Make a function fail, or a process end, at the n-th call."""

import errno
import itertools
import os
from collections.abc import Callable
from typing import Any

import pytest

FULL_DISK = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class Killed(BaseException):
    """An end that no code may catch."""


def fail_at(
    patch: pytest.MonkeyPatch,
    owner: object,
    name: str,
    number: int,
    error: BaseException,
    counts: Callable[..., bool] = lambda *_, **__: True,
) -> list[tuple[Any, ...]]:
    """Let call `number`, from 1, of `owner.name` raise; return the list of the calls, which grows.

    Only calls whose arguments satisfy `counts` are counted.
    """
    real, calls = getattr(owner, name), []

    def failing(*arguments: Any, **options: Any) -> Any:
        if counts(*arguments, **options):
            calls.append(arguments)
            if len(calls) == number:
                raise error
        return real(*arguments, **options)

    patch.setattr(owner, name, failing)
    return calls


def always_fail(patch: pytest.MonkeyPatch, owner: object, name: str, error: BaseException) -> None:
    """Let every call of `owner.name` raise."""

    def failing(*_: Any, **__: Any) -> None:
        raise error

    patch.setattr(owner, name, failing)


def run_killed(work: Callable[[], None], owner: object, name: str, number: int) -> bool:
    """Run `work` in a forked process that ends at once before call `number` of `owner.name`.

    Return whether it ended there, rather than finished. Anything else is an AssertionError.
    """
    child = os.fork()
    if child == 0:
        try:
            end_at(owner, name, number)
            work()
            os._exit(0)
        finally:
            os._exit(1)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, 9)
    return status == 9


def end_at(owner: object, name: str, number: int) -> None:
    """Let this process end at once, cleaning up nothing, before call `number` of `owner.name`."""
    real, calls = getattr(owner, name), itertools.count(1)

    def ending(*arguments: Any, **options: Any) -> Any:
        if next(calls) == number:
            os._exit(9)
        return real(*arguments, **options)

    setattr(owner, name, ending)
