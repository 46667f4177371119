"""Shared by all command lines: the exception for errors that users can fix, help texts, exit statuses."""

import argparse
import os
import sys
from collections.abc import Callable
from typing import NoReturn

TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class UserError(Exception):
    """An error that the user can fix; the message names the key or file, and the fix."""


class InvalidFileError(ValueError):
    """The reason why a file cannot be read; callers that know its name convert it to UserError."""


class CommandParser(argparse.ArgumentParser):
    """A parser whose errors are UserErrors: one line."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")


def command_parser(document: str | None) -> CommandParser:
    """Return a parser whose help is a script's docstring, which `python -OO` removes."""
    summary, _, details = (document or "").partition("\n")
    return CommandParser(
        description=summary, epilog=details, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def expand_home(word: str) -> str:
    """Return a word of the command line with ~ expanded, also after `=`, where shells do not expand it."""
    name, equals, path = word.partition("=") if not word.startswith("~") else ("", "", word)
    return f"{name}{equals}{os.path.expanduser(path)}"


def env_rank(name: str) -> int:
    """Return RANK or LOCAL_RANK if torchrun started this process, else 0; does not import torch."""
    return int(os.environ[name]) if all(variable in os.environ for variable in TORCHRUN) else 0


def report_error(error: UserError) -> None:
    """Print the one error message."""
    print(f"error: {error}", file=sys.stderr, flush=True)


def run_main(main: Callable[[], int | None]) -> None:
    """Run a command; UserError and the OSError of a file become one `error:` line and exit status 2."""
    sys.argv[1:] = map(expand_home, sys.argv[1:])
    if hasattr(sys.stdout, "reconfigure"):  # file names may have characters that the console cannot show
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        sys.exit(main() or 0)
    except UserError as error:
        if env_rank("LOCAL_RANK") == 0:  # the other ranks of this machine have the same message
            report_error(error)
        sys.exit(2)
    except BrokenPipeError:  # the reader of our output has exited
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        if error.filename is None:
            raise
        report_error(UserError(f"{error.filename}: {error.strerror}; check the path and its permissions"))
        sys.exit(2)
    except KeyboardInterrupt:  # before training has started, or a second Ctrl-C
        print("interrupted", file=sys.stderr)
        sys.exit(130)
