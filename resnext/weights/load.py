"""Load trained weights of any supported program: `load_weights` recognizes a file by its content.

It reads checkpoints of this program, state_dicts of torchvision, timm, mmpretrain, pycls, MoCo, SwAV and
the CIFAR models of bearpaw and prlz77 (.pt, .pth, .safetensors), Torch7's .t7, and folders of timm and
transformers, local or on the hub. Nothing in a file is executed, and a small file needs little memory. The
network is inferred from the tensors.
"""

import contextlib
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeAlias

import torch
from torch import Tensor

from .. import safe_pickle
from ..config import Config, DataConfig, complete, network_name, parse_config
from ..engine.checkpoint import FORMAT, check_state, find_checkpoint, read_checkpoint
from ..errors import InvalidFileError, UserError
from ..files import is_published
from ..models.resnext import ResNeXt, build_model
from . import foreign, hub, lua_modules, model_folder, t7

TORCHVISION = "torchvision:"
LFS_POINTER = b"version https://git-lfs.github.com/spec/v1"
EXPORTED = "resnext weights"  # metadata "format" of scripts/export.py's .safetensors


@dataclass(frozen=True)
class WeightsInfo:
    """What is known about loaded weights.

    file: where they were. origin: the program that wrote them. weights: which of the file's weights these
    are, for log lines. config: the run's configuration for our own checkpoints; for other programs only the
    network (config.model) and the preprocessing (config.data) mean something. classes: names in the order of
    the outputs, None if the file has none. steps: of the optimizer, None if the file does not say. stated:
    what says the preprocessing, None if it is the usual one of the origin.
    """

    file: str
    origin: str
    weights: str
    config: Config
    classes: tuple[str, ...] | None
    steps: int | None = None
    stated: str | None = None

    @property
    def outputs(self) -> int | None:
        """Size of the last layer; None if the file has none."""
        return len(self.classes or ()) or self.config.model.classes

    def with_classes(self, names: Sequence[str], file: str) -> "WeightsInfo":
        """Return the same with names of the outputs from a file; raise UserError if they do not fit."""
        if self.classes is not None and self.origin == "this program":
            raise UserError(f"--class-names: {self.file} names its classes; remove the option")
        if len(names) != self.outputs:
            raise UserError(
                f"--class-names {file}: names {len(names)} classes (the network of {self.file} has "
                f"{self.outputs}); write one name per line, in the order of the outputs"
            )
        return replace(self, classes=tuple(names))


@dataclass(frozen=True)
class LuaCheckpoint:
    """A Lua run after its latest epoch: network, finished epochs and optimizer steps.

    momentum: of each parameter, under our names; None before the first step. options: of optim.sgd.
    """

    model: ResNeXt
    info: WeightsInfo
    epoch: int
    steps: int
    momentum: dict[str, Tensor] | None
    options: dict[str, float | bool]


Weights: TypeAlias = tuple[dict[str, Tensor], WeightsInfo]


def load_weights(source: Path | str, dtype: torch.dtype = torch.float32) -> tuple[ResNeXt, WeightsInfo]:
    """Return the network in a file, run directory (its best.pt) or Lua checkpoint directory, and its facts.

    Also in a folder with config.json and weights, as timm and transformers save them. Names of published
    weights are downloaded once: torchvision:resnext50_32x4d, torchvision:resnext50_32x4d:IMAGENET1K_V1,
    timm:resnext50_32x4d.a1_in1k, hf:OWNER/REPO. The network is in evaluation mode, on the CPU, in `dtype`,
    whatever floating-point types the file has. If the file has no last layer, that is an Identity, and the
    output is the pooled features. Raise UserError for a file that cannot be read.
    """
    name = str(source)
    if not is_published(name):
        path = _find_file(Path(source).expanduser())
        name = str(path)
    elif not name.startswith(TORCHVISION):
        name, path = hub.download(name)
    with _naming(name):
        if name.startswith(TORCHVISION):
            state, info = _torchvision(name)
        else:
            state, info = _folder(path, name) if path.is_dir() else _read(path)
        return _build(state, info, dtype), info


def load_lua_run(folder: Path) -> LuaCheckpoint:
    """Return the state in a directory that checkpoints.lua wrote: latest.t7, model_N.t7, optimState_N.t7."""
    with _naming(folder):
        state, epoch, optimizer = lua_modules.read_run(folder)
        parameters = {key: state[key].shape for key in lua_modules.learned_keys(state)}
        flat, momentum = optimizer.get("dfdx"), None
        if isinstance(flat, Tensor):
            sizes = [shape.numel() for shape in parameters.values()]
            if flat.ndim != 1 or len(flat) != sum(sizes) or flat.stride(0) != 1:
                raise InvalidFileError("the optimizer's momentum does not fit the network")
            parts = zip(parameters.items(), flat.split(sizes), strict=True)
            momentum = {key: part.view(shape) for (key, shape), part in parts}
        pairs = [(str(key), value) for key, value in optimizer.items()]
        options = {key: value for key, value in pairs if isinstance(value, float | bool)}
        steps = options.get("evalCounter", 0)
        if not (steps >= 0 and float(steps).is_integer()):
            raise InvalidFileError(f"the optimizer's step count is not a whole number (got {steps})")
        state, info = _infer(state, folder, "Torch7", "weights")
        return LuaCheckpoint(_build(state, info), info, epoch, int(steps), momentum, options)


def preprocessing(info: WeightsInfo) -> str:
    """Describe weights of another program, and the preprocessing stated or assumed for them."""
    data, model = info.config.data, info.config.model
    resized = {"memory": "", "torch7": ", resized as in Torch7"}
    how = resized.get(data.pipeline, f", resized {data.interpolation}")
    mean, std = (", ".join(f"{value:g}" for value in values) for values in (data.mean, data.std))
    last = "no last layer" if info.outputs is None else f"{info.outputs:,} classes"
    return (
        f"weights of {info.origin}: {network_name(model)}, {last}; preprocessing, "
        f"{f'as {info.stated} says' if info.stated else 'as is usual there'}: "
        f"{data.image_size} pixels{how}, mean {mean}, std {std} (of 0...255)"
    )


def check_classifier(info: WeightsInfo) -> None:
    """Raise UserError if the file has no last layer, for callers that need classes."""
    if info.outputs is None:
        raise UserError(
            f"{info.file}: has no last layer, so it names no classes; train one with "
            f"model.pretrained={info.file}"
        )


@contextlib.contextmanager
def _naming(path: Path | str) -> Iterator[None]:
    """Turn whatever a damaged or foreign file raises into one UserError that names the file."""
    try:
        yield
    except UserError:
        raise
    except InvalidFileError as error:
        raise UserError(f"{path}: {error}; use another file") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None
    except Exception as error:  # last resort: whatever else a malicious file triggers
        reason = (str(error).splitlines() or [""])[0][:100]
        raise UserError(f"{path}: damaged ({type(error).__name__}: {reason}); use another file") from error


def _find_file(path: Path) -> Path:
    """Return the file that a run directory (best.pt) or a Lua run's directory (its latest) stands for.

    A folder with config.json, of timm or transformers, stands for itself.
    """
    if (path / model_folder.CONFIG).is_file():
        return path
    if not (path / "latest.t7").is_file():
        return find_checkpoint(path, "best.pt")
    with _naming(path):
        return lua_modules.named_file(path, lua_modules.read_latest(path), "modelFile")


# ---------------------------------------------------------------------------- one function per kind of file


def _read(path: Path) -> Weights:
    """Return the state_dict under our names, in the file's types, and what is known about it."""
    if not path.is_file():
        raise UserError(f"{path}: is not a file; give a .pt, .pth, .safetensors or .t7")
    with open(path, "rb") as file:
        head = file.read(64)
    if head.startswith(b"PK"):
        return _own(path) if _is_own(path) else _pickled(path, safe_pickle.read_archive(path))
    if head.startswith(safe_pickle.LEGACY_START):
        return _pickled(path, safe_pickle.read_legacy(path.read_bytes()))
    if head[8:9] == b"{" and not t7.is_binary(head):
        return _safetensors(path)
    if t7.is_t7(head):
        return _infer(lua_modules.read_network(path), path, "Torch7", "weights")
    if head.startswith(LFS_POINTER):
        raise UserError(f"{path}: is a Git LFS pointer, not the weights; download them with `git lfs pull`")
    raise UserError(
        f"{path}: is {'not a file of weights' if head else 'empty'}; give a .pt, .pth, .safetensors or .t7"
    )


def _is_own(path: Path) -> bool:
    """Return whether a file looks like a checkpoint of this program."""
    with safe_pickle.open_archive(path) as archive:
        pickles = [name for name in archive.namelist() if name.endswith("/data.pkl")]
        return any(FORMAT.encode() in archive.read(name) for name in pickles)


def _own(path: Path) -> Weights:
    content = read_checkpoint(path)
    state, which = content["model"], "weights"
    if content["ema"] is not None:  # these are the weights that were validated
        prefix, which = "module.", "averaged weights"
        average = {key: value for key, value in content["ema"].items() if str(key).startswith(prefix)}
        state = {key.removeprefix(prefix): value for key, value in average.items()}
    config = _configure(path, lambda: parse_config(content["config"], "its configuration"))
    classes, steps = tuple(content["classes"]), content["progress"]["global_step"]
    return state, WeightsInfo(str(path), "this program", which, config, classes, steps)


def _pickled(path: Path, content: object) -> Weights:
    state, which, others = foreign.find_state(content)
    if sum(value.numel() for value in state.values()) > path.stat().st_size:
        raise InvalidFileError("its tensors are larger than the file")
    origin, state = foreign.translate(state, others)
    return _infer(state, path, origin, which, foreign.class_names(others))


def _safetensors(path: Path) -> Weights:
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
    if metadata.get("format") == EXPORTED:
        return _exported(state, path, metadata)
    origin, state = foreign.translate(foreign.unwrap(state.items()), {})
    return _infer(state, path, origin, "weights")


def _exported(state: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> Weights:
    try:
        text, classes = metadata["config"], json.loads(metadata.get("classes", "null"))
    except (KeyError, ValueError):
        raise InvalidFileError("its metadata is not from scripts/export.py") from None
    names = foreign.as_names(classes)
    if classes is not None and names is None:
        raise InvalidFileError("the classes in its metadata are not names")
    config = _configure(path, lambda: parse_config(text, "its configuration"))
    return state, WeightsInfo(str(path), "this program", "exported weights", config, names)


def _folder(folder: Path, name: str) -> Weights:
    """Return the weights in a folder of timm or transformers, as `name`, with what its config.json says."""
    facts = model_folder.read_facts(folder)
    file = model_folder.find_weights(folder)
    with _naming(f"{name}: {file.name}"):
        state, info = _read(file)
    facts.check(info.config.model)
    classes = facts.class_names(info.config.model.classes)
    return _infer(state, name, facts.origin, info.weights, classes, facts.data, facts.stated)


def _torchvision(source: str) -> Weights:
    """Download weights that torchvision publishes, and use the preprocessing that it states for them."""
    try:
        import torchvision
    except ImportError:
        raise UserError(f"{source}: needs torchvision; install it: pip install torchvision") from None
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
    except Exception as error:  # of network, disk or hash
        reason = str(error).splitlines()[0][:200]
        raise UserError(
            f"{source}: {weights.url} could not be downloaded ({reason}); download it and pass the file"
        ) from None
    view = weights.transforms()
    data = DataConfig(
        image_size=view.crop_size[0],
        resize=view.resize_size[0],
        interpolation=view.interpolation.value,
        mean=tuple(round(255 * value, 9) for value in view.mean),
        std=tuple(round(255 * value, 9) for value in view.std),
    )
    return _infer(state, source, "torchvision", f"{weights}", data=data)


# ---------------------------------------------------------------------------- the network


def _infer(
    state: dict[str, Tensor],
    path: Path | str,
    origin: str,
    which: str,
    classes: tuple[str, ...] | None = None,
    data: DataConfig | None = None,
    stated: str | None = None,
) -> Weights:
    """Infer the network and, unless `data` says it, the preprocessing of tensors under our names."""
    network = foreign.architecture(state)
    data = data or foreign.data_config(network, origin)
    config = _configure(path, lambda: complete(Config(model=network, data=data)))
    for key in [key for key in state if key.endswith("running_mean")]:
        state.setdefault(key.replace("running_mean", "num_batches_tracked"), torch.tensor(0))  # old files
    classes = classes if classes and len(classes) == network.classes else None
    return state, WeightsInfo(str(path), origin, which, config, classes, stated=stated)


def _configure(path: Path | str, make: Callable[[], Config]) -> Config:
    """Return the configuration that `make` returns; its UserError gets the name of the file."""
    try:
        return make()
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def _build(state: dict[str, Tensor], info: WeightsInfo, dtype: torch.dtype = torch.float32) -> ResNeXt:
    """Return the network with these weights, converted to `dtype`, and integers to int64."""
    with torch.device("meta"):  # no memory until the shapes are known to be the file's
        model = build_model(info.config.model, info.outputs).to(dtype)
    for key, own in model.state_dict().items():
        value = state.get(key)
        # Integers in place of weights are quantized; check_state refuses them.
        if isinstance(value, Tensor) and (value.is_floating_point() or not own.is_floating_point()):
            state[key] = value.to(own.dtype)
    check_state(model, state, info.file)
    model.load_state_dict({key: value.contiguous() for key, value in state.items()}, assign=True)
    # contiguous() keeps channels_last strides of 1x1 convolutions, which would choose other kernels.
    return model.eval().to(memory_format=torch.contiguous_format)
