"""The one exception for what a user can cause and mend, and how the command lines report it."""

import sys
from collections.abc import Callable


class UserError(Exception):
    """Something the user can mend; the message names the key or file and the remedy."""


def run_command(main: Callable[[], int | None]) -> None:
    """Run a command line: a UserError becomes one `error:` message on stderr and exit status 2."""
    try:
        sys.exit(main() or 0)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:  # before the trainer has taken over the signals: nothing to save yet
        print("interrupted", file=sys.stderr)
        sys.exit(130)
