"""Checkpoints: written atomically, read verified, and nothing in them can run code.

A checkpoint is a plain dict that `torch.load(path, weights_only=True)` reads:

    format, version   what this is
    model             state_dict (torchvision's names)
    optimizer, scaler, ema     state_dicts; scaler and ema None where not used
    progress          see state.Progress
    rng               generator states of torch
    config            the resolved configuration as YAML text
    classes           names, in the order of the outputs
    preprocessing     image_size, mean, std (pixel values 0...255)
    versions          programs, hardware and data that made it
"""

import contextlib
import os
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ..config import Config, differences, to_text
from ..errors import InvalidFileError, UserError
from ..safe_pickle import verify_pickle

FORMAT = "resnext checkpoint"
VERSION = 1
KEYS = {
    "model": dict,
    "optimizer": dict,
    "scaler": (dict, type(None)),
    "ema": (dict, type(None)),
    "progress": dict,
    "rng": dict,
    "config": str,
    "classes": list,
    "preprocessing": dict,
    "versions": dict,
}


# ---------------------------------------------------------------------------- writing


def write_checkpoint(content: dict[str, Any], folder: Path, names: list[str]) -> None:
    """Write once, then appear under each name, last.pt last; its predecessor is kept.

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
        # All links first, then the renames: last.pt after the others, its predecessor after it.
        staged = [
            (_link(temporary, folder / name), folder / name) for name in sorted(names, key="last.pt".__eq__)
        ]
        if (folder / "last.pt").exists():
            staged.append((_link(folder / "last.pt", folder / "previous.pt"), folder / "previous.pt"))
        for link, target in staged:
            os.replace(link, target)
        _sync_folder(folder)
    except (OSError, RuntimeError) as error:  # torch's writer turns a full disk into RuntimeError
        raise UserError(
            f"{folder}: the checkpoint could not be written ({_first_line(error)}); the "
            "earlier ones are whole; make room or mend the folder, then continue with --resume"
        ) from error
    finally:
        for leftover in (temporary, *folder.glob(".*.link")):
            with contextlib.suppress(OSError):
                leftover.unlink()


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


def _check_space(content: Any, folder: Path) -> None:
    needed = _tensor_bytes(content)
    free = shutil.disk_usage(folder).free
    if free < needed * 1.02 + (1 << 20):
        raise OSError(f"{needed / 2**20:.0f} MiB needed, {free / 2**20:.0f} MiB free on the disk")


def _tensor_bytes(content: Any) -> int:
    if isinstance(content, torch.Tensor):
        return content.nbytes
    if isinstance(content, dict):
        return sum(map(_tensor_bytes, content.values()))
    return sum(map(_tensor_bytes, content)) if isinstance(content, list | tuple) else 0


def _link(source: Path, target: Path) -> Path:
    """A hidden name beside `target` for the file `source`; a copy where the disk knows no hard links."""
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
    """The checkpoint that a run directory (its `name`) or a file stands for."""
    if path.is_dir():
        found = path / "checkpoints" / name
        if not found.exists():
            raise UserError(
                f"{path}: has no checkpoints/{name}; give a run directory in which an epoch was "
                "finished, or a checkpoint file"
            )
        return found
    if not path.exists():
        raise UserError(f"{path}: no such run directory or file of weights; check the path")
    return path


def read_latest(path: Path, warn: Callable[[str], None]) -> dict[str, Any]:
    """The checkpoint last.pt; where it is damaged or gone its predecessor, with a warning."""
    previous = path.with_name("previous.pt")
    try:
        return read_checkpoint(path)
    except UserError as error:
        if path.name != "last.pt" or not previous.exists():
            raise
        content = read_checkpoint(previous)
        warn(f"warning: {error}; continuing from {previous} instead")
        return content


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Load and verify one of our checkpoints onto the CPU; nothing in the file is executed."""
    verify_archive(path)
    _verify_pickle(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the unpickler raises many kinds on foreign and hostile files
        raise UserError(
            f"{path}: not a checkpoint of this program: it holds more than tensors and plain "
            f"values ({_first_line(error)})"
        ) from None
    if not isinstance(content, dict) or str(content.get("format")) != FORMAT:
        raise UserError(f"{path}: not a checkpoint of this program; give one written by train.py")
    if type(content.get("version")) is not int or content["version"] != VERSION:
        raise UserError(
            f"{path}: checkpoint version {content.get('version')}, this program reads {VERSION}; "
            "use the program that wrote it"
        )
    for key, kind in KEYS.items():
        if key not in content:
            raise UserError(f"{path}: incomplete, {key} is missing; use another checkpoint")
        if not isinstance(content[key], kind):
            raise UserError(f"{path}: damaged, {key} is not what it should be; use another checkpoint")
    counts = [content["progress"].get(key) for key in ("epoch", "step", "global_step", "rows")]
    if not all(type(count) is int for count in counts):
        raise UserError(f"{path}: damaged, its progress is no count of steps; use another checkpoint")
    if not content["classes"] or not all(isinstance(name, str) for name in content["classes"]):
        raise UserError(f"{path}: damaged, its classes are no names; use another checkpoint")
    if _tensor_bytes(content) > path.stat().st_size:  # a few numbers expanded to any shape
        raise UserError(f"{path}: its tensors are larger than the file; use another checkpoint")
    return content


def verify_archive(path: Path) -> None:
    """A UserError for anything but a whole, uncompressed zip whose checksums are right."""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            size = path.stat().st_size
            if any(e.compress_type != zipfile.ZIP_STORED or e.file_size > size for e in entries):
                raise UserError(
                    f"{path}: a compressed archive, which torch.save never writes; give another file (of a "
                    "TorchScript program save the state_dict)"
                )
            if sum(e.file_size for e in entries) > size:
                raise UserError(f"{path}: damaged (its entries overlap); use another checkpoint")
            if any(e.external_attr & 0x10 for e in entries):  # marked as a folder: torch would read zeros
                raise UserError(f"{path}: damaged (an entry is marked as a folder); use another checkpoint")
            broken = archive.testzip()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except UserError:
        raise
    except Exception as error:  # zipfile raises several kinds on damaged directories
        with open(path, "rb") as file:
            ours = file.read(2) == b"PK"
        what = "damaged or cut off" if ours else "not a checkpoint of this program"
        raise UserError(f"{path}: {what} ({error}); use another checkpoint") from None
    if broken:
        raise UserError(f"{path}: damaged (checksum of {broken}); use another checkpoint")


def _verify_pickle(path: Path) -> None:
    """Refuse a pickle that names anything but tensors, before torch reads it."""
    with zipfile.ZipFile(path) as archive:
        pickles = [archive.read(name) for name in archive.namelist() if name.endswith("data.pkl")]
    try:
        for content in pickles:
            verify_pickle(content)
    except InvalidFileError as error:
        raise UserError(f"{path}: not a checkpoint of this program, or damaged: {error}") from None


def check_state(module: torch.nn.Module, state: dict[str, Any], path: Path | str) -> None:
    """A UserError that names the first key of a state_dict that does not fit a module."""
    own = module.state_dict()
    for key in [*own, *state]:
        if key not in state:
            raise UserError(f"{path}: has no {key}; it belongs to another architecture")
        if key not in own:
            raise UserError(f"{path}: has {key}, which this network lacks; another architecture")
        if not isinstance(state[key], torch.Tensor) or own[key].shape != state[key].shape:
            raise UserError(
                f"{path}: {key} is {tuple(getattr(state[key], 'shape', ()))}, this network's is "
                f"{tuple(own[key].shape)}; it belongs to another architecture"
            )
        if own[key].dtype != state[key].dtype:
            raise UserError(
                f"{path}: {key} is {state[key].dtype}, not {own[key].dtype}; use another checkpoint"
            )


# ---------------------------------------------------------------------------- resuming

FOR_THE_WHOLE_RUN = ("train.ema_decay", "optimizer.norm_weight_decay", "optimizer.head_lr")
# Inside an epoch the rest of its steps is only defined while these stay as they were.
FIXED_INSIDE_EPOCH = (
    "data.train_images",
    "augment.repeats",
    "train.batch_size",
    "train.accumulation_steps",
    "run.seed",
    "run.log_interval",
)


def check_resume(old: Config, new: Config, step: int) -> list[str]:
    """What changed since the checkpoint, as log lines; a UserError where it cannot go on."""
    lines = []
    for key, before, now in differences(old, new):
        before, now = to_text(before), to_text(now)
        if key in ("model.pretrained", "model.reset_classifier"):  # only a start
            continue
        if key.startswith("model.") and key != "model.classes":
            raise UserError(
                f"{key}: the checkpoint has {before}, the configuration {now}; a run goes on with "
                "its own network; start another run for another one"
            )
        if key == "train.frozen_stages" or (key in FOR_THE_WHOLE_RUN and "null" in (before, now)):
            raise UserError(
                f"{key}: the checkpoint has {before}, the configuration {now}; it can neither start nor end "
                "inside a run; start another run"
            )
        if step and key in FIXED_INSIDE_EPOCH:
            raise UserError(
                f"{key}: the checkpoint has {before}, the configuration {now}; it was saved after "
                f"step {step} of an epoch, which must be finished with the same value"
            )
        lines.append(f"changed since the checkpoint: {key} {before} → {now}")
    return lines
