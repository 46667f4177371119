"""Tar shards and Parquet files for tests: of our script, of other programs, and damaged."""

import io
import json
import sys
import tarfile
from collections.abc import Iterable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from commands import ROOT, call

sys.path.insert(0, str(ROOT / "scripts"))
import make_shards

Member = tuple[str | tarfile.TarInfo, bytes]


def make(source: Path, output: Path, *options: object) -> Path:
    """Run make_shards.py; return `output`."""
    result = call(make_shards.main, source, output, *options)
    assert result.status == 0, result.error
    return output


def pack(path: Path, members: Iterable[Member], **options) -> Path:
    """Write a tar with these members; `options` are tarfile's."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", encoding="utf-8", errors="surrogateescape", **options) as tar:
        for head, content in members:
            member = tarfile.TarInfo(head) if isinstance(head, str) else head
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def sample(
    key: str, label: object, image: bytes, extension: str = "jpg", /, **details: object
) -> list[Member]:
    """Return the members of a sample; without a label, those of its image and json alone."""
    members: list[Member] = [(f"{key}.{extension}", image)]
    if label is not None:
        members.append((f"{key}.cls", f"{label}\n".encode()))
    return members + ([(f"{key}.json", json.dumps(details).encode())] if details else [])


def to_parquet(folders: Path, output: Path, files: int = 2, label: str = "label", **options: object) -> Path:
    """Write the images of class folders as the hub does; `options` change the rows and the names."""
    classes = sorted(path.name for path in (folders / "train").iterdir())
    names = options.get("names", classes)
    feature = {"names": names, "_type": "ClassLabel"} if names else {"_type": "Value"}
    features = {"img": {"_type": "Image"}, label: feature}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    output.mkdir(parents=True, exist_ok=True)
    for split, name in (("train", "train"), ("val", "validation")):
        paths = sorted((folders / split).rglob("*.*"), key=lambda path: path.parts[:-3:-1])  # not by class
        for number in range(files):
            part = paths[number::files]
            rows = [{"bytes": path.read_bytes(), "path": named(path, options)} for path in part]
            labels = [classes.index(path.parent.name) + options.get("shift", 0) for path in part]
            table = pa.table({"img": rows, label: labels}).replace_schema_metadata(metadata)
            target = output / f"{name}-{number:05}-of-{files:05}-0123abcd.parquet"
            pq.write_table(table, target, row_group_size=5)
    return output


def named(path: Path, options: dict[str, object]) -> str | None:
    return None if options.get("unnamed") else path.name
