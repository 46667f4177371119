"""Trained weights, whoever wrote them: `load_weights` tells by content what a file is.

Read are checkpoints of this program, state_dicts of torchvision, timm, mmpretrain, pycls, MoCo, SwAV and
the CIFAR models of bearpaw and prlz77 (.pt, .pth, .safetensors), and Torch7's .t7. Nothing in a file is
executed, and a small file takes little memory. The network is inferred from the tensors.
"""

import contextlib
import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import safe_pickle
from ..config import Config, complete, network_name, parse_config
from ..engine.checkpoint import FORMAT, Checkpoint, check_state, find_checkpoint, read_checkpoint
from ..errors import InvalidFileError, UserError
from ..models.resnext import ResNeXt, build_model
from . import foreign, lua_modules, t7

TORCHVISION = "torchvision:"
EXPORTED = "resnext weights"  # metadata "format" of scripts/export.py's .safetensors


@dataclass(frozen=True)
class WeightsInfo:
    """What is known of loaded weights.

    file: where they were. origin: whose file it is. weights: which of its weights these are, for people.
    config: network (config.model), preprocessing and data set (config.data); of our own checkpoints the
    run's. classes: names in the order of the outputs, None where the file does not say. steps: of the
    optimiser, likewise.
    """

    file: str
    origin: str
    weights: str
    config: Config
    classes: tuple[str, ...] | None
    steps: int | None = None

    @property
    def outputs(self) -> int | None:
        """Size of the last layer; None where the file has none."""
        return len(self.classes or ()) or self.config.model.classes


@dataclass(frozen=True)
class LuaCheckpoint:
    """A Lua run after its latest epoch: network, epochs and optimiser steps done.

    momentum: of each parameter, under our names; None before the first step. options: of optim.sgd.
    """

    model: ResNeXt
    info: WeightsInfo
    epoch: int
    steps: int
    momentum: dict[str, Tensor] | None
    options: dict[str, Any]


def load_weights(source: Path | str, dtype: torch.dtype = torch.float32) -> tuple[ResNeXt, WeightsInfo]:
    """The network in a file, run directory or Lua checkpoint directory, and what is known of it.

    "torchvision:NAME", NAME such as resnext50_32x4d or resnext50_32x4d:IMAGENET1K_V1, is downloaded once.
    The network is in evaluation mode, on the CPU, in `dtype`, whatever the file's floating-point types are.
    That of a file without a last layer has an Identity in its place, and puts out the pooled features.
    Raises UserError for whatever cannot be read.
    """
    by_name = str(source).startswith(TORCHVISION)
    path = Path(source) if by_name else find_weights(Path(source).expanduser())
    with _readable(path):
        state, info = _torchvision(str(source)) if by_name else _read(path)
        return _network(state, info, dtype), info


def load_lua_run(folder: Path) -> LuaCheckpoint:
    """The state in a directory that checkpoints.lua wrote: latest.t7, model_N.t7, optimState_N.t7."""
    with _readable(folder):
        run = lua_modules.read_run(folder)
        state, info = _infer(run.network.state, folder, "Torch7", "weights")
        model = _network(state, info)
        flat, momentum = run.optimizer.get("dfdx"), None
        shapes = {key: run.network.state[key].shape for key in run.network.parameters}
        if isinstance(flat, Tensor):
            sizes = [shape.numel() for shape in shapes.values()]
            if flat.ndim != 1 or len(flat) != sum(sizes) or flat.stride(0) != 1:
                raise InvalidFileError("the optimiser's momentum is not that of the network")
            parts = zip(shapes.items(), flat.split(sizes), strict=True)
            momentum = {key: part.view(shape) for (key, shape), part in parts}
        options = {key: value for key, value in run.optimizer.items() if isinstance(value, float | bool)}
        steps = options.get("evalCounter", 0)
        if not (steps >= 0 and float(steps).is_integer()):
            raise InvalidFileError("the optimiser's number of steps is none")
    return LuaCheckpoint(model, info, run.epoch, int(steps), momentum, options)


def preprocessing(info: WeightsInfo) -> str:
    """Whose weights these are and what they are fed, for people: of other programs' it is assumed."""
    data, model = info.config.data, info.config.model
    resized = {"memory": "", "torch7": ", resized as in Torch7"}
    how = resized.get(data.pipeline, f", resized {data.interpolation}")
    mean, std = (", ".join(f"{value:g}" for value in values) for values in (data.mean, data.std))
    last = "no last layer" if info.outputs is None else f"{info.outputs:,} classes"
    return (
        f"weights of {info.origin}: {network_name(model)}, {last}; their pictures, as is usual there: "
        f"{data.image_size} pixels{how}, mean {mean}, deviation {std} of 0...255"
    )


def check_classifier(info: WeightsInfo) -> None:
    """A UserError where the file has no last layer, for those who want classes."""
    if info.outputs is None:
        raise UserError(
            f"{info.file}: has no last layer, so it names no classes; train one with "
            f"model.pretrained={info.file}"
        )


def find_weights(path: Path) -> Path:
    """The file that a run directory (best.pt) or a Lua checkpoint directory (its latest) stands for."""
    if (path / "latest.t7").is_file():
        with _readable(path):
            return lua_modules.model_file(path)
    return find_checkpoint(path, "best.pt")


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[None]:
    """What a damaged or foreign file raises becomes one UserError that names it."""
    try:
        yield
    except InvalidFileError as error:
        raise UserError(f"{path}: {error}; use another file") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None
    except UserError as error:  # of a configuration that was inferred
        raise error if str(path) in str(error) else UserError(f"{path}: {error}") from None
    except (
        ArithmeticError,
        AttributeError,
        LookupError,
        MemoryError,
        RuntimeError,
        TypeError,
        ValueError,
    ) as error:
        # A hostile file may always think of something that no check does.
        reason = (str(error).splitlines() or [""])[0][:100]
        raise UserError(f"{path}: damaged ({type(error).__name__}: {reason}); use another file") from error


# ---------------------------------------------------------------------------- one kind of file each
# Each gives a state_dict under our names, of whatever types, and the Info.


def _read(path: Path) -> tuple[dict[str, Any], WeightsInfo]:
    if not path.is_file():
        raise UserError(f"{path}: is no file; give a .pt, .pth, .safetensors or .t7")
    with open(path, "rb") as file:
        head = file.read(64)
    if head.startswith(b"PK"):
        return _own(path) if _is_own(path) else _pickled(path, safe_pickle.read_archive(path))
    if head.startswith(safe_pickle.LEGACY_START):
        return _pickled(path, safe_pickle.read_legacy(path.read_bytes()))
    if head[8:9] == b"{" and not t7.is_binary(head):
        return _safetensors(path)
    if t7.is_t7(head):
        return _infer(lua_modules.read_network(path).state, path, "Torch7", "weights")
    raise UserError(
        f"{path}: is {'not a file of weights' if head else 'empty'}; give a .pt, .pth, .safetensors or .t7"
    )


def _is_own(path: Path) -> bool:
    """Whether it is a checkpoint of this program, as far as a glance tells."""
    with safe_pickle.open_archive(path) as archive:
        names_ = [name for name in archive.namelist() if name.endswith("/data.pkl")]
        return any(FORMAT.encode() in archive.read(name) for name in names_)


def _own(path: Path) -> tuple[dict[str, Any], WeightsInfo]:
    content = read_checkpoint(path)
    config = parse_config(content["config"], str(path))
    averaged = "averaged weights" if content["ema"] is not None else "weights"
    classes, steps = tuple(content["classes"]), content["progress"]["global_step"]
    return evaluated_state(content), WeightsInfo(str(path), "this program", averaged, config, classes, steps)


def evaluated_state(content: Checkpoint) -> dict[str, Any]:
    """The state_dict that validation speaks of: the average's where there is one."""
    if content["ema"] is None:
        return dict(content["model"])
    prefix = "module."
    average = {key: value for key, value in content["ema"].items() if str(key).startswith(prefix)}
    return {key.removeprefix(prefix): value for key, value in average.items()}


def _pickled(path: Path, content: Any) -> tuple[dict[str, Tensor], WeightsInfo]:
    state, which, others = foreign.find_state(content)
    if sum(value.numel() for value in state.values()) > path.stat().st_size:
        raise InvalidFileError("its tensors are larger than the file")
    origin, state = foreign.translate(state, others)
    return _infer(state, path, origin, which, foreign.class_names(others))


def _safetensors(path: Path) -> tuple[dict[str, Tensor], WeightsInfo]:
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError:
        raise UserError(f"{path}: needs the package safetensors; pip install safetensors") from None
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise InvalidFileError(f"damaged ({str(error)[:100]})") from None
    if not state:
        raise InvalidFileError("holds no tensors")
    if metadata.get("format") == EXPORTED:
        return _exported(state, path, metadata)
    plain: dict[str, Tensor] = {}
    for key, value in state.items():
        foreign.add(plain, foreign.unwrapped(key), value)
    origin, plain = foreign.translate(plain, {})
    return _infer(plain, path, origin, "weights")


def _exported(
    state: dict[str, Tensor], path: Path, metadata: Mapping[str, str]
) -> tuple[dict[str, Tensor], WeightsInfo]:
    """scripts/export.py's own."""
    try:
        config = parse_config(metadata["config"], str(path))
        classes = json.loads(metadata.get("classes", "null"))
    except (KeyError, ValueError):
        raise InvalidFileError("its metadata is not scripts/export.py's") from None
    if classes is not None and not (isinstance(classes, list) and all(isinstance(c, str) for c in classes)):
        raise InvalidFileError("its metadata's classes are no names")
    return state, WeightsInfo(
        str(path), "this program", "exported weights", config, classes and tuple(classes)
    )


def _torchvision(source: str) -> tuple[dict[str, Tensor], WeightsInfo]:
    """Weights that torchvision publishes, with the preprocessing that it states for them."""
    import torchvision

    name, _, version = source.removeprefix(TORCHVISION).partition(":")
    try:
        known = torchvision.models.get_model_weights(name)
        weights = known[version] if version else known.DEFAULT
    except (ValueError, KeyError):
        raise UserError(
            f"{source}: torchvision has no such weights; give torchvision:resnext50_32x4d, "
            "torchvision:resnext50_32x4d:IMAGENET1K_V1 or the like"
        ) from None
    try:
        state = weights.get_state_dict(progress=sys.stderr.isatty(), check_hash=True, map_location="cpu")
    except Exception as error:  # of network, disk and hash
        reason = str(error).splitlines()[0][:200]
        raise UserError(
            f"{source}: {weights.url} cannot be had ({reason}); fetch it yourself and give the file"
        ) from None
    state, info = _infer(state, source, "torchvision", f"{weights}")
    view = weights.transforms()
    data = replace(
        info.config.data,
        image_size=view.crop_size[0],
        train_size=view.crop_size[0],
        resize=view.resize_size[0],
        interpolation=view.interpolation.value,
        mean=tuple(255 * value for value in view.mean),
        std=tuple(255 * value for value in view.std),
    )
    return state, replace(info, config=complete(replace(info.config, data=data)))


# ---------------------------------------------------------------------------- the network


def _infer(
    state: dict[str, Tensor],
    path: Path | str,
    origin: str,
    which: str,
    classes: tuple[str, ...] | None = None,
) -> tuple[dict[str, Tensor], WeightsInfo]:
    """Network and preprocessing of tensors under our names, and these whole."""
    network = foreign.architecture(state)
    config = foreign.configuration(network, origin)
    for key in [key for key in state if key.endswith("running_mean")]:
        state.setdefault(key.replace("running_mean", "num_batches_tracked"), torch.tensor(0))  # old files
    classes = classes if classes and len(classes) == network.classes else None
    return state, WeightsInfo(str(path), origin, which, config, classes)


def _network(state: dict[str, Any], info: WeightsInfo, dtype: torch.dtype = torch.float32) -> ResNeXt:
    """The network with these weights, which become `dtype`, and whole numbers int64."""
    with torch.device("meta"):  # no memory before the shapes are known to be the file's
        model = build_model(info.config.model, info.outputs).to(dtype)
    for key, own in model.state_dict().items():
        value = state.get(key)
        # Whole numbers where weights should be are quantised, and refused.
        if isinstance(value, Tensor) and (value.is_floating_point() or not own.is_floating_point()):
            state[key] = value.to(own.dtype)
    check_state(model, state, info.file)
    model.load_state_dict({key: value.contiguous() for key, value in state.items()}, assign=True)
    return model.eval()
