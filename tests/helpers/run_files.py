"""What a run leaves behind: its rows and checkpoints, and how to compare them bit for bit."""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def rows(run: Path) -> list[dict[str, Any]]:
    """Return the rows of metrics.jsonl without their times, the only part that may differ."""
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [{key: value for key, value in json.loads(line).items() if key != "time"} for line in lines]


def row_count(run: Path) -> int:
    """Return the number of whole rows of a run that may still be writing them, or not have started."""
    path = run / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def read(run: Path, name: str = "last.pt") -> dict[str, Any]:
    """Return the content of a checkpoint of a run."""
    return torch.load(run / "checkpoints" / name, weights_only=True)


def state(run: Path, name: str = "last.pt") -> dict[str, Any]:
    """Return what must be equal in checkpoints of equal runs: all but time, versions and configuration."""
    content = read(run, name)
    content["progress"].pop("seconds")
    return {key: value for key, value in content.items() if key not in ("versions", "config")}


def tensors(content: dict[str, Any]) -> dict[str, Tensor]:
    """Return the weights, running statistics, momentum and averages of a checkpoint by name."""
    found = {f"model/{name}": tensor for name, tensor in content["model"].items()}
    found |= {f"ema/{name}": tensor for name, tensor in (content["ema"] or {}).items()}
    for number, entry in content["optimizer"]["state"].items():
        found[f"momentum/{number}"] = entry["momentum_buffer"]
    return found


def digest(tensors: Iterable[Tensor]) -> str:
    """Return a hash of tensors, bit for bit, with their types and shapes."""
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def fingerprint(run: Path, name: str = "last.pt") -> str:
    """Return a hash of all `tensors` of a checkpoint."""
    return digest(tensors(read(run, name)).values())


def assert_same(ours: object, theirs: object, where: str = "") -> None:
    """Assert that nested values are equal in type, order and value, and tensors in every bit."""
    assert type(ours) is type(theirs), f"{where}: {type(ours)} {type(theirs)}"
    if isinstance(ours, Tensor):
        assert digest([ours]) == digest([theirs]), f"{where}: {ours} {theirs}"
    elif isinstance(ours, dict):
        assert list(ours) == list(theirs), where
        for key in ours:
            assert_same(ours[key], theirs[key], f"{where}/{key}")
    elif isinstance(ours, list | tuple):
        assert len(ours) == len(theirs), where
        for number, pair in enumerate(zip(ours, theirs, strict=True)):
            assert_same(*pair, f"{where}/{number}")
    else:
        assert ours == theirs, f"{where}: {ours} {theirs}"


def assert_same_run(ours: Path, theirs: Path) -> None:
    """Assert that two runs agree in every row, and in every bit and number of last.pt and best.pt."""
    assert rows(ours) == rows(theirs)
    for name in ("last.pt", "best.pt"):
        first, second = state(ours, name), state(theirs, name)
        assert_same(tensors(first), tensors(second), name)
        assert_same(first["progress"], second["progress"], f"{name}/progress")
