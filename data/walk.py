"""The only directory walker: the images below folders, for training, evaluation, prediction and check_data.

Names and paths are bytes, as the file system stores them, whatever the locale. The walker skips hidden and
system entries. It finds every real folder and file once, however many links lead to it, and prefers the
real location to a link.
"""

import mimetypes
import os
import stat
from array import array
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

# What Pillow reads. Only the first image of a file counts.
EXTENSIONS = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff"),
    *(".ppm", ".pgm", ".pbm", ".pnm", ".jp2", ".avif"),
)
FORMATS = "JPEG, PNG, WebP, GIF, TIFF, BMP, PNM, JPEG 2000, AVIF"  # the same, for messages
SUFFIXES = tuple(map(str.encode, EXTENSIONS))
# Entries that operating systems, file servers and archivers leave behind, besides names with a leading dot.
SYSTEM_NAMES = {
    *(b"@eadir", b"__macosx", b"thumbs.db", b"desktop.ini", b"lost+found", b"$recycle.bin", b"#recycle"),
    *(b"@recycle", b"@recently-snapshot", b"#snapshot", b"system volume information", b"__pycache__"),
}
KNOWN_TYPES = mimetypes.MimeTypes()  # without the system's own types, so that all machines agree


def is_hidden(name: bytes) -> bool:
    """Return whether an entry is hidden or a system's, so neither a class nor an image."""
    return name.startswith(b".") or name.lower() in SYSTEM_NAMES


def is_image(name: bytes) -> bool:
    """Return whether a name has the extension of a supported format."""
    return name.lower().endswith(SUFFIXES)


def may_be_image(name: bytes) -> bool:
    """Return whether an unsupported file may be meant as an image: .heic, or an unknown extension."""
    kind, _ = KNOWN_TYPES.guess_type(to_text(name), strict=False)
    return kind is None or kind.startswith("image/")


def to_text(name: bytes) -> str:
    """Decode a name, the same in every locale; bytes that are not UTF-8 become lone surrogates."""
    return name.decode("utf-8", "surrogateescape")


def to_bytes(text: str) -> bytes:
    """Return the bytes that to_text decoded."""
    return text.encode("utf-8", "surrogateescape")


def leads_to_folder(entry: os.DirEntry[bytes]) -> bool:
    """Return whether an entry is a folder or a link to one."""
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


@dataclass
class Found:
    """What lies below the roots of a walk, as full paths."""

    images: list[list[bytes]]  # per root, sorted
    directories: dict[bytes, int] = field(default_factory=dict)  # every folder read: modification time in ns
    unsupported: list[bytes] = field(default_factory=list)  # files that may be images of other formats
    others: list[bytes] = field(default_factory=list)  # other visible files
    repeated: list[tuple[bytes, bytes]] = field(default_factory=list)  # (link, folder or file found before)
    unreadable: dict[bytes, OSError] = field(default_factory=dict)  # folders


def walk(roots: Sequence[bytes]) -> Found:
    """Find all images below the folders `roots`, each for the first root that leads to it."""
    found = Found([[] for _ in roots])
    seen = _ancestors(roots)  # device and inode of the folders above the roots and of those read
    files: dict[int, array] = {}  # device: inodes of the images, 8 bytes each
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
                pending.append((root, entry.path))  # after all real folders
            elif not is_image(entry.name):
                (found.unsupported if may_be_image(entry.name) else found.others).append(entry.path)
            elif entry.is_symlink():
                links.append((root, entry.path))
            elif entry.is_file(follow_symlinks=False):
                found.images[root].append(entry.path)
                inodes.append(entry.inode())
            else:
                found.unsupported.append(entry.path)  # reading a pipe would block
    _add_links(found, links, files)
    for images in found.images:
        images.sort()
    return found


def _ancestors(roots: Sequence[bytes]) -> dict[tuple[int, int], bytes]:
    """Return the folders above the roots, by name and by real location, except those inside a root."""
    real = [os.path.realpath(root) for root in roots]
    above: set[bytes] = set()
    for path in (*map(os.path.abspath, roots), *real):
        while path != os.path.dirname(path):
            path = os.path.dirname(path)
            above.add(path)
    inside = tuple(root + b"/" for root in real)
    statuses = {folder: os.stat(folder) for folder in above if not (folder + b"/").startswith(inside)}
    return {(status.st_dev, status.st_ino): folder for folder, status in statuses.items()}


def _add_links(found: Found, links: list[tuple[int, bytes]], files: dict[int, array]) -> None:
    """Add links to images not found yet. Reading a broken link reports it later."""
    known = {device: set(inodes) for device, inodes in files.items()} if links else {}
    for root, path in links:
        try:
            status = os.stat(path)
        except OSError:
            found.images[root].append(path)
            continue
        inodes = known.setdefault(status.st_dev, set())
        if not stat.S_ISREG(status.st_mode):
            found.unsupported.append(path)
        elif status.st_ino in inodes:
            found.repeated.append((path, os.path.realpath(path)))
        else:
            inodes.add(status.st_ino)
            found.images[root].append(path)


def skipped(found: Found, folder: Path | str) -> list[str]:
    """Return warnings about what the walk skipped below `folder`: repeated links and unsupported files."""

    def short(path: bytes) -> str:
        return to_text(path.removeprefix(os.fsencode(folder) + b"/"))

    notes = []
    if found.repeated:
        path, first = found.repeated[0]
        notes.append(
            f"warning: {folder}: skipped links to files or folders that are included already: "
            f"{len(found.repeated):,}, such as {short(path)} to {short(first)}"
        )
    if found.unsupported:
        endings = (os.path.splitext(to_text(path))[1].lower() for path in found.unsupported)
        counts = Counter(ending or "no extension" for ending in endings)
        kinds = ", ".join(f"{ending} {count:,}" for ending, count in counts.most_common(5))
        notes.append(
            f"warning: {folder}: skipped files of unsupported formats: {len(found.unsupported):,} ({kinds}), "
            f"such as {short(found.unsupported[0])}; convert them to JPEG or PNG"
        )
    return notes
