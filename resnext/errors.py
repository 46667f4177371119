"""What the command lines share: the one exception for what a user can cause and mend, help, exit status."""

import argparse
import os
import sys
from collections.abc import Callable

TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class UserError(Exception):
    """Something the user can mend; the message names the key or file and the remedy."""


class InvalidFileError(ValueError):
    """Why a file cannot be read; whoever knows its name makes it a UserError."""


def command_parser(document: str | None) -> argparse.ArgumentParser:
    """A parser whose help is a script's docstring, which `python -OO` leaves out."""
    summary, _, details = (document or "").partition("\n")
    return argparse.ArgumentParser(
        description=summary, epilog=details, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def expand_home(word: str) -> str:
    """A word of the command line with ~ expanded, which shells leave alone behind a =."""
    name, equals, path = word.partition("=") if not word.startswith("~") else ("", "", word)
    return f"{name}{equals}{os.path.expanduser(path)}"


def env_rank(name: str) -> int:
    """RANK or LOCAL_RANK of a process that torchrun started, else 0; costs no import of torch."""
    return int(os.environ[name]) if all(variable in os.environ for variable in TORCHRUN) else 0


def report_error(error: UserError) -> None:
    """The one message."""
    print(f"error: {error}", file=sys.stderr, flush=True)


def run_main(main: Callable[[], int | None]) -> None:
    """Run a command line: a UserError or a file's OSError becomes one `error:` message, status 2."""
    sys.argv[1:] = map(expand_home, sys.argv[1:])
    if hasattr(sys.stdout, "reconfigure"):  # names may have what the console cannot show
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        sys.exit(main() or 0)
    except UserError as error:
        if env_rank("LOCAL_RANK") == 0:  # the others on this machine would say the same
            report_error(error)
        sys.exit(2)
    except BrokenPipeError:  # the reader of our output has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        if error.filename is None:
            raise
        print(f"error: {error.filename}: {error.strerror}; check the path and its rights", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:  # ahead of the training, or a second Ctrl-C
        print("interrupted", file=sys.stderr)
        sys.exit(130)
