"""The images of one tar shard, in WebDataset's convention: where each lies, its label, its name.

A sample consists of adjacent members with the same key, the name up to the first dot of its last part:
dir/0001.jpg, dir/0001.cls, dir/0001.json. Nothing of the images is read.
"""

import json
import re
import tarfile
from collections.abc import Iterator
from itertools import groupby
from typing import NamedTuple

from resnext.errors import UserError

from .imagenet_archives import check_end, reading
from .walk import EXTENSIONS, FORMATS, is_hidden, is_image, to_bytes

MEMBER = re.compile(r"((?:.*/)?[^/.]+)\.([^/]+)", re.DOTALL)  # key, extension
LARGEST = {"image": 1 << 30, "cls": 1 << 10, "json": 1 << 24}  # bytes


class Sample(NamedTuple):
    """An image of a shard."""

    name: bytes  # below its class folder
    label: int
    offset: int  # bytes from the start of the shard
    size: int  # bytes


def read_samples(path: str) -> list[Sample]:
    """Return the samples of a shard, in its order. Raise UserError with the member if one is not usable."""
    samples = []
    with reading(path), open(path, "rb") as file:
        if file.read(2) == b"\x1f\x8b":
            raise UserError(f"{path}: is compressed with gzip; decompress it")
    with reading(path), tarfile.open(path, "r:", encoding="utf-8") as tar:  # with surrogateescape
        members = list(_members(tar, path))
        check_end(tar, path, len(members))
        for key, parts in groupby(members, lambda member: member[0]):
            sample = _sample(tar, f"{path}: sample {_short(key)}", [part[1:] for part in parts])
            samples += [sample] if sample else []
    return samples


def _short(name: str) -> str:
    return ascii(name)[:100]


def _members(tar: tarfile.TarFile, path: str) -> Iterator[tuple[str, str, tarfile.TarInfo]]:
    """Yield (key, extension, member) of the visible files, which must be plain ones."""
    for member in tar:
        name = member.name.removeprefix("./")
        hidden = any(is_hidden(part) for part in to_bytes(name).split(b"/"))
        found = MEMBER.fullmatch(name)
        if member.isdir() or hidden or not found or re.match(r"__[^/]*__($|/)", name):
            continue
        if not member.isreg() or member.issparse():
            raise UserError(f"{path}: member {_short(name)} is not a plain file; pack the shard without it")
        yield found[1], found[2].lower(), member


def _sample(tar: tarfile.TarFile, where: str, members: list[tuple[str, tarfile.TarInfo]]) -> Sample | None:
    """Return the image of a sample, or None if its members are neither image nor label."""
    parts = dict(members)
    if len(parts) < len(members):
        raise UserError(f"{where} has two members with one extension; give each image a key of its own")
    images = [member for extension, member in members if f".{extension}" in EXTENSIONS]
    details = _json(tar, where, parts["json"]) if "json" in parts else {}
    if len(images) != 1:
        labeled = "cls" in parts or "label" in details
        if not images and not labeled and not any(is_image(to_bytes(ext)) for ext in parts):
            return None
        found = f"has {len(images)} images (got {' '.join(map(_short, parts))}, expected one of {FORMATS})"
        raise UserError(f"{where} {found}; a key ends at its first dot: rename or remove the member")
    (image,) = images
    if "cls" in parts:
        text = _content(tar, where, parts["cls"], "cls").decode("latin-1").strip()
    else:
        text = str(details.get("label"))
    if not re.fullmatch("[0-9]{1,6}", text):
        problem = f"has no class number (got {_short(text)} in .cls or in label of .json)"
        raise UserError(f"{where} {problem}; write the number of its class there, from 0")
    if image.size > LARGEST["image"]:
        raise UserError(f"{where} has {image.size:,} bytes, too large for an image; remove it")
    name, folder = str(details.get("filename") or image.name), f"{details.get('class')}/"
    name = name.removeprefix(folder) if name.startswith(folder) else name.rpartition("/")[2]
    return Sample(to_bytes(name), int(text), image.offset_data, image.size)


def _content(tar: tarfile.TarFile, where: str, member: tarfile.TarInfo, kind: str) -> bytes:
    file = tar.extractfile(member)
    if file is None or member.size > LARGEST[kind]:
        raise UserError(f"{where} has a .{kind} of {member.size:,} bytes, which is too large; remove it")
    return file.read()


def _json(tar: tarfile.TarFile, where: str, member: tarfile.TarInfo) -> dict[str, object]:
    try:
        details = json.loads(_content(tar, where, member, "json"))
        details = details if isinstance(details, dict) else {}
        to_bytes(str(details.get("filename")))  # some escapes do not stand for text
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: its .json cannot be read ({str(error)[:100]!a}); repair it") from None
    return details
