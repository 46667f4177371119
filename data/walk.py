"""Which pictures lie below folders: the one walker, for training, evaluation, prediction and check_data.

Names and paths are bytes, as the file system has them, whatever the locale. Hidden and system entries are
never looked at. Every real folder and file is found once, however many links lead to it, and where it really
is if that is below the folders too.
"""

import mimetypes
import os
import stat
from array import array
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

# What Pillow reads; of files with several pictures the first is taken.
EXTENSIONS = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff"),
    *(".ppm", ".pgm", ".pbm", ".pnm", ".jp2", ".avif"),
)
FORMATS = "JPEG, PNG, WebP, GIF, TIFF, BMP, PNM, JPEG 2000, AVIF"  # the same for people
SUFFIXES = tuple(map(str.encode, EXTENSIONS))
# Entries that operating systems, file servers and archivers leave behind; so are all that begin with a dot.
SYSTEM_NAMES = {
    *(b"@eadir", b"__macosx", b"thumbs.db", b"desktop.ini", b"lost+found", b"$recycle.bin", b"#recycle"),
    *(b"@recycle", b"@recently-snapshot", b"#snapshot", b"system volume information", b"__pycache__"),
}
KNOWN_TYPES = mimetypes.MimeTypes()  # the same on every machine: without the system's own


def is_hidden(name: bytes) -> bool:
    """Whether an entry is one of the system's, and no class or picture."""
    return name.startswith(b".") or name.lower() in SYSTEM_NAMES


def is_image(name: bytes) -> bool:
    return name.lower().endswith(SUFFIXES)


def may_be_image(name: bytes) -> bool:
    """Whether a file that is not taken could be meant as a picture: .heic, or a name that says nothing."""
    kind, _ = KNOWN_TYPES.guess_type(to_text(name), strict=False)
    return kind is None or kind.startswith("image/")


def to_text(name: bytes) -> str:
    """A name as text, the same in every locale; bytes that are not UTF-8 become lone surrogates."""
    return name.decode("utf-8", "surrogateescape")


def to_bytes(text: str) -> bytes:
    """The bytes that to_text made a text of."""
    return text.encode("utf-8", "surrogateescape")


@dataclass
class Found:
    """What lies below the roots of a walk, as full paths."""

    pictures: list[list[bytes]]  # of each root, sorted
    directories: dict[bytes, int] = field(default_factory=dict)  # all that were read: modification time in ns
    left_out: list[bytes] = field(default_factory=list)  # files that may be pictures, of formats not taken
    others: list[bytes] = field(default_factory=list)  # other visible files
    repeated: list[tuple[bytes, bytes]] = field(default_factory=list)  # (link, folder or file found already)
    unreadable: dict[bytes, OSError] = field(default_factory=dict)  # folders


def walk(roots: Sequence[bytes]) -> Found:
    """All pictures below the folders `roots`, each for the first root that leads to it."""
    found = Found([[] for _ in roots])
    seen = _ancestors(roots)  # device and inode of the folders that were read, or lie above
    files: dict[int, array] = {}  # device: inodes of the pictures, 8 bytes each
    links: list[tuple[int, bytes]] = []
    pending = deque(sorted(enumerate(roots), key=lambda pair: os.path.islink(pair[1])))
    while pending:
        root, folder = pending.popleft()
        try:
            status = os.stat(folder)
            identity = (status.st_dev, status.st_ino)
            if identity in seen:
                found.repeated.append((folder, seen[identity]))
                continue
            seen[identity] = folder
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except OSError as error:
            found.unreadable[folder] = error
            continue
        found.directories[folder] = status.st_mtime_ns
        inodes = files.setdefault(status.st_dev, array("Q"))
        for entry in entries:
            if is_hidden(entry.name):
                continue
            if entry.is_dir(follow_symlinks=False):
                pending.appendleft((root, entry.path))
            elif leads_to_folder(entry):
                pending.append((root, entry.path))  # after all real ones
            elif is_image(entry.name) and not (entry.is_symlink() or entry.is_file(follow_symlinks=False)):
                found.left_out.append(entry.path)  # a pipe would be waited for
            elif not is_image(entry.name):
                (found.left_out if may_be_image(entry.name) else found.others).append(entry.path)
            elif entry.is_symlink():
                links.append((root, entry.path))
            else:
                found.pictures[root].append(entry.path)
                inodes.append(entry.inode())
    _add_links(found, links, files)
    for pictures in found.pictures:
        pictures.sort()
    return found


def _ancestors(roots: Sequence[bytes]) -> dict[tuple[int, int], bytes]:
    """The folders above the roots, where they are named and where they really are; none in a root."""
    real = [os.path.realpath(root) for root in roots]
    parents = {os.path.dirname(path) for path in (*map(os.path.abspath, roots), *real)}
    above = {folder for parent in parents for folder in _upwards(parent)}
    inside = tuple(root + b"/" for root in real)
    statuses = {folder: os.stat(folder) for folder in above if not (folder + b"/").startswith(inside)}
    return {(status.st_dev, status.st_ino): folder for folder, status in statuses.items()}


def _upwards(folder: bytes) -> Iterator[bytes]:
    """A folder and those above it."""
    yield folder
    while folder != os.path.dirname(folder):
        folder = os.path.dirname(folder)
        yield folder


def leads_to_folder(entry: os.DirEntry) -> bool:
    """Whether an entry is a folder or a link to one."""
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _add_links(found: Found, links: list[tuple[int, bytes]], files: dict[int, array]) -> None:
    """Links to pictures not found already; one that leads nowhere is told when it is read."""
    known = {device: set(inodes) for device, inodes in files.items()} if links else {}
    for root, path in links:
        try:
            status = os.stat(path)
        except OSError:
            found.pictures[root].append(path)
            continue
        if not stat.S_ISREG(status.st_mode):
            found.left_out.append(path)
            continue
        inodes = known.setdefault(status.st_dev, set())
        if status.st_ino in inodes:
            found.repeated.append((path, os.path.realpath(path)))
        else:
            inodes.add(status.st_ino)
            found.pictures[root].append(path)


def left_out(found: Found, folder: Path | str) -> list[str]:
    """Warnings of what is not taken below `folder`: links to what is there already, unknown formats."""

    def short(path: bytes) -> str:
        return to_text(path.removeprefix(os.fsencode(folder) + b"/"))

    notes = []
    if found.repeated:
        path, first = found.repeated[0]
        notes.append(
            f"warning: {folder}: left out are links to what is there already: {len(found.repeated):,}, such "
            f"as {short(path)} to {short(first)}"
        )
    if found.left_out:
        endings = Counter(
            os.path.splitext(to_text(path))[1].lower() or "no ending" for path in found.left_out
        )
        kinds = ", ".join(f"{ending} {count:,}" for ending, count in endings.most_common(5))
        notes.append(
            f"warning: {folder}: left out are files of no known format: "
            f"{len(found.left_out):,} ({kinds}), such as {short(found.left_out[0])}; convert them to JPEG "
            "or PNG"
        )
    return notes
