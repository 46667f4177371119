"""Checkpoints: written atomically, verified when read, and nothing in them can run code.

A checkpoint is a plain dict (`Checkpoint`) that `torch.load(path, weights_only=True)` reads too.
"""

import contextlib
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypedDict, cast

import torch
from torch import Tensor

from ..errors import InvalidFileError, UserError
from ..files import no_such_weights
from ..safe_pickle import read_archive

FORMAT = "resnext checkpoint"
VERSION = 1


class RngStates(TypedDict):
    """States of torch's generators; cuda None for a run on a CPU."""

    cpu: Tensor
    cuda: Tensor | None


class Checkpoint(TypedDict):
    """What a checkpoint holds beside its format and version."""

    model: dict[str, Tensor]  # torchvision's names
    optimizer: dict[str, Any]  # its state_dict
    scaler: dict[str, Any] | None  # likewise; None if not used
    ema: dict[str, Tensor] | None  # likewise
    progress: dict[str, Any]  # train_state.TrainProgress
    rng: RngStates
    config: str  # the resolved configuration as YAML
    classes: list[str]  # names in the order of the outputs
    preprocessing: dict[str, Any]  # image_size, mean, std (of pixel values 0...255)
    versions: dict[str, str]  # programs, hardware and data


KEYS: dict[str, type | tuple[type, ...]] = {
    **dict.fromkeys(("model", "optimizer", "progress", "rng", "preprocessing", "versions"), dict),
    **dict.fromkeys(("scaler", "ema"), (dict, type(None))),
    "version": int,
    "config": str,
    "classes": list,
}


# ---------------------------------------------------------------------------- writing


def write_checkpoint(content: Mapping[str, Any], folder: Path, names: list[str]) -> None:
    """Write a file once and link it to each name, last.pt last; keep the old last.pt as previous.pt.

    At every instant each name holds a whole file, old or new. An error leaves all as it was.
    """
    content = {"format": FORMAT, "version": VERSION, **content}
    temporary = folder / ".writing.pt"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _check_space(content, folder)
        # A killed run may have left this name as a link to last.pt: never write into it.
        temporary.unlink(missing_ok=True)
        with open(temporary, "xb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        # All links first, then the renames: last.pt after the others, previous.pt after last.pt.
        staged = [
            (_link(temporary, folder / name), folder / name) for name in sorted(names, key="last.pt".__eq__)
        ]
        if (folder / "last.pt").exists():
            staged.append((_link(folder / "last.pt", folder / "previous.pt"), folder / "previous.pt"))
        for link, target in staged:
            os.replace(link, target)
        _sync_folder(folder)
    except (OSError, RuntimeError) as error:  # torch's writer turns a full disk into RuntimeError
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise UserError(
            f"{folder}: the checkpoint could not be written ({reason}); the earlier ones are intact; free "
            "space or fix the folder, then continue with --resume"
        ) from error
    finally:
        for leftover in (temporary, *folder.glob(".*.link")):
            with contextlib.suppress(OSError):
                leftover.unlink()


def _check_space(content: object, folder: Path) -> None:
    needed = _tensor_bytes(content)
    free = shutil.disk_usage(folder).free
    if free < needed * 1.02 + (1 << 20):
        raise OSError(f"{needed / 2**20:.0f} MiB needed, {free / 2**20:.0f} MiB free on the disk")


def _tensor_bytes(content: object) -> int:
    if isinstance(content, Tensor):
        return content.nbytes
    if isinstance(content, dict):
        return sum(map(_tensor_bytes, content.values()))
    return sum(map(_tensor_bytes, content)) if isinstance(content, list | tuple) else 0


def _link(source: Path, target: Path) -> Path:
    """Link the file `source` to a hidden name beside `target`; copy it if the disk has no hard links."""
    link = target.with_name(f".{target.name}.link")
    link.unlink(missing_ok=True)
    try:
        os.link(source, link)
    except OSError:
        shutil.copyfile(source, link)
        with open(link, "rb") as file:
            os.fsync(file.fileno())
    return link


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# ---------------------------------------------------------------------------- reading


def find_checkpoint(path: Path, name: str) -> Path:
    """Return the checkpoint `name` of a run directory, or the file itself."""
    if path.is_dir():
        found = path / "checkpoints" / name
        if not found.exists():
            raise UserError(
                f"{path}: has no checkpoints/{name}; give a run directory in which an epoch was "
                "finished, or a checkpoint file"
            )
        return found
    if not path.exists():
        raise no_such_weights(str(path))
    return path


def read_latest(path: Path, warn: Callable[[str], None]) -> Checkpoint:
    """Read the checkpoint last.pt or, with a warning, previous.pt if last.pt is damaged or missing."""
    previous = path.with_name("previous.pt")
    try:
        return read_checkpoint(path)
    except UserError as error:
        if path.name != "last.pt" or not previous.exists():
            raise
        content = read_checkpoint(previous)
        warn(f"warning: {error}; continuing from {previous} instead")
        return content


def read_checkpoint(path: Path) -> Checkpoint:
    """Read and verify one of our checkpoints onto the CPU; nothing in the file is executed."""
    try:
        content = read_archive(path, strict=True)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None
    except InvalidFileError as error:
        raise UserError(
            f"{path}: not a checkpoint of this program: {error}; use another checkpoint"
        ) from None
    if not isinstance(content, dict) or str(content.get("format")) != FORMAT:
        raise UserError(f"{path}: not a checkpoint of this program; give one written by train.py")
    version = content.get("version")
    if isinstance(version, int) and version != VERSION:
        raise UserError(
            f"{path}: checkpoint version {version}, this program reads {VERSION}; use the program that "
            "wrote it"
        )
    for key, kind in KEYS.items():
        if key not in content:
            raise UserError(f"{path}: incomplete, {key} is missing; use another checkpoint")
        if not isinstance(content[key], kind):
            raise UserError(f"{path}: damaged, {key} has the wrong type; use another checkpoint")
    counts = [content["progress"].get(key) for key in ("epoch", "step", "global_step", "rows")]
    if not all(type(count) is int for count in counts):
        raise UserError(f"{path}: damaged, its progress counters are not integers; use another checkpoint")
    if not content["classes"] or not all(isinstance(name, str) for name in content["classes"]):
        raise UserError(f"{path}: damaged, its classes are not names; use another checkpoint")
    return cast(Checkpoint, content)


def check_state(module: torch.nn.Module, state: Mapping[str, object], path: Path | str) -> None:
    """Raise UserError with the first key of a state_dict that does not fit a module."""
    own = module.state_dict()
    for key in [*own, *state]:
        if key not in state:
            raise UserError(f"{path}: has no {key}; it belongs to another architecture")
        if key not in own:
            raise UserError(f"{path}: has {key}, unlike this network; it belongs to another architecture")
        value = state[key]
        if not isinstance(value, Tensor) or own[key].shape != value.shape:
            raise UserError(
                f"{path}: {key} is {tuple(getattr(value, 'shape', ()))}, this network's is "
                f"{tuple(own[key].shape)}; it belongs to another architecture"
            )
        if own[key].dtype != value.dtype:
            raise UserError(f"{path}: {key} is {value.dtype}, not {own[key].dtype}; use another checkpoint")
