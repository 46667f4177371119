"""Unlabeled images, as a command line names them: which files. Importing this does not import torch."""

import glob
import os
from collections.abc import Iterable, Iterator

from resnext.errors import UserError

from .walk import FORMATS, is_hidden, skipped, walk


def find_images(names: Iterable[str], lines: Iterable[bytes]) -> tuple[list[str], list[str], list[str]]:
    """Return (paths of files, what was not found, warnings), each image once, in the order of `names`.

    A name is a file, a folder (all images below it, sorted by path), a pattern such as "DIR/*.jpg"
    (sorted), or "-" for the names in `lines`. Raise UserError if there is no image at all.
    """
    found: dict[str, None] = {}
    problems: list[str] = []
    notes: list[str] = []
    for name in expand(names, lines, problems):
        if os.path.isdir(name):
            below = walk([os.fsencode(name)])
            notes += skipped(below, name)
            for path, error in below.unreadable.items():
                problems.append(f"{os.fsdecode(path)}: cannot be read ({error.strerror})")
            if not below.images[0] and not below.unreadable:
                problems.append(f"{name}: contains no images ({FORMATS})")
            found |= dict.fromkeys(map(os.fsdecode, below.images[0]))
        elif os.path.isfile(name):
            found[name] = None
        else:
            what = "is not a file" if os.path.lexists(name) else "no such file or folder"
            problems.append(f"{name}: {what}")
    if not found:
        others = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        what = problems[0] + others if problems else "-: standard input names no file"
        raise UserError(f"{what}; name images, folders, quoted patterns, or - for names from standard input")
    return list(found), problems, notes


def expand(names: Iterable[str], lines: Iterable[bytes], problems: list[str]) -> Iterator[str]:
    """Yield the files and folders that patterns and "-" stand for. Add unmatched patterns to `problems`."""
    for name in names:
        if name == "-":
            yield from (os.fsdecode(line.rstrip(b"\r\n")) for line in lines if line.strip())
            continue
        path = os.path.expanduser(name)
        if os.path.lexists(path) or not glob.has_magic(path):
            yield path
            continue
        matches = sorted(glob.glob(path, recursive=True))
        matches = [match for match in matches if not is_hidden(os.path.basename(os.fsencode(match)))]
        if not matches:
            problems.append(f"{name}: matches no file")
        yield from matches
