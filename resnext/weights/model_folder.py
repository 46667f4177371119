"""Folders of timm and transformers: config.json says how to prepare images and what the classes are called.

Beside it are the weights, which show the network, and preprocessor_config.json of transformers. The files may
come from a hub: nothing in them is executed, and nothing in them names another file.
"""

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path

from ..config import STAGES, STATISTICS, Config, DataConfig, ModelConfig
from ..errors import InvalidFileError, UserError
from .foreign import as_names

CONFIG, PREPROCESSOR = "config.json", "preprocessor_config.json"
MAX_CONFIG = 16 << 20  # bytes; 22,000 classes with descriptions need 3 MiB
PREFERRED = ("model.safetensors", "pytorch_model.bin", "pytorch_model.pth", "model.pth")  # timm's order
SUFFIXES = (".safetensors", ".pth", ".pth.tar", ".bin")

# timm's names of networks that this program has, and the tag that a bare name stands for.
TIMM_TAGS = {
    "resnet18": "a1_in1k",
    "resnet26": "bt_in1k",
    "resnet34": "a1_in1k",
    "resnet50": "a1_in1k",
    "resnet101": "a1h_in1k",
    "resnet152": "a1h_in1k",
    "resnet200": None,  # untrained
    "resnext50_32x4d": "a1h_in1k",
    "resnext101_32x4d": "fb_ssl_yfcc100m_ft_in1k",
    "resnext101_32x8d": "tv_in1k",
    "resnext101_32x16d": "fb_wsl_ig1b_ft_in1k",
    "resnext101_32x32d": "fb_wsl_ig1b_ft_in1k",
    "resnext101_64x4d": "c1_in1k",
    "wide_resnet50_2": "racm_in1k",
    "wide_resnet101_2": "tv_in1k",
}
# Arguments of timm's networks that change nothing in evaluation, and those that the tensors show.
INERT = ("num_classes", "drop_rate", "drop_path_rate", "drop_block_rate", "zero_init_last")
SHOWN = ("layers", "cardinality", "base_width")
FILTERS = {2: "bilinear", 3: "bicubic"}  # PIL's numbers, in files of transformers


@dataclass(frozen=True)
class FolderFacts:
    """What the files of a folder say: the program, the preprocessing, and the classes, by output.

    stated: the file with the preprocessing; None if there is none, and `data` is the usual one.
    shown: what the tensors must show, by names in `SHOWN`.
    """

    origin: str
    data: DataConfig
    stated: str | None
    classes: tuple[str, ...] | None
    license: object
    shown: dict[str, object]

    def check(self, model: ModelConfig) -> None:
        """Raise InvalidFileError if the tensors are of another network than config.json's."""
        found: dict[str, object] = {"layers": list(model.stages)}
        found |= {"cardinality": model.cardinality, "base_width": model.base_width}
        for key, value in self.shown.items():
            if found[key] != value:
                raise _refused(CONFIG, key, value, f"{found[key]}, as in the tensors")


def find_weights(folder: Path) -> Path:
    """Return the file of weights that timm would take. Raise InvalidFileError if there is none."""
    files = sorted(path for path in folder.iterdir() if path.is_file())
    choices = [[path for path in files if path.name == name] for name in PREFERRED]
    choices += [[path for path in files if path.name.endswith(suffix)] for suffix in SUFFIXES]
    found = next(filter(None, choices), None)
    if found is None:
        raise InvalidFileError(f"has {CONFIG}, but no weights, such as {PREFERRED[0]}")
    return found[0]


def read_facts(folder: Path) -> FolderFacts:
    """Read what config.json says. Raise InvalidFileError for a network or preprocessing that is not ours."""
    config = _read_json(folder / CONFIG)
    if "architecture" in config:
        return _timm_facts(config)
    if config.get("model_type") != "resnet":
        raise _refused(CONFIG, "model_type", config.get("model_type"), "resnet, or an architecture of timm")
    for key, expected in (("downsample_in_bottleneck", False), ("downsample_in_first_stage", False)):
        if config.get(key, expected) is not expected:
            raise _refused(CONFIG, key, config[key], expected)  # a stride, which the tensors do not show
    if config.get("hidden_act", "relu") != "relu":
        raise _refused(CONFIG, "hidden_act", config["hidden_act"], "relu")
    path = folder / PREPROCESSOR
    data = _processor_data(_read_json(path)) if path.is_file() else DataConfig()
    stated, classes = PREPROCESSOR if path.is_file() else None, _class_names(config.get("id2label"))
    return FolderFacts("transformers", data, stated, classes, config.get("license"), {})


def _timm_facts(config: dict[str, object]) -> FolderFacts:
    # Old files are flat: pretrained_cfg's keys beside architecture, and labels for label_names.
    cfg = _mapping(config.get("pretrained_cfg", config), "pretrained_cfg")
    if config["architecture"] not in list(TIMM_TAGS):  # a list: it may be unhashable
        raise _refused(CONFIG, "architecture", config["architecture"], ", ".join(TIMM_TAGS))
    arguments = _mapping(config.get("model_args") or {}, "model_args")
    offset, mode = cfg.get("label_offset") or 0, cfg.get("crop_mode") or "center"
    same = {"global_pool": "avg", "in_chans": 3, "label_offset": 0, "crop_mode": "center"}
    for key, value in (arguments | {"label_offset": offset, "crop_mode": mode}).items():
        if key not in INERT + SHOWN and (key not in same or value != same[key]):
            raise _refused(CONFIG, key, value, same.get(key, "none"))
    shape = cfg.get("test_input_size") or cfg.get("input_size") or [3, 224, 224]
    if not isinstance(shape, list) or len(shape) != 3 or shape[0] != 3 or shape[1] != shape[2]:
        raise _refused(CONFIG, "input_size", shape, "3 channels of a square")
    crop = cfg.get("test_crop_pct") or cfg.get("crop_pct") or 0.875  # as timm's validate.py
    data = _data_config(
        CONFIG, shape[1], crop, cfg.get("interpolation") or "bicubic", cfg.get("mean"), cfg.get("std")
    )
    classes = _class_names(config.get("label_names", cfg.get("label_names", cfg.get("labels"))))
    shown = {key: value for key, value in arguments.items() if key in SHOWN}
    return FolderFacts("timm", data, CONFIG, classes, cfg.get("license"), shown)


def _processor_data(processor: dict[str, object]) -> DataConfig:
    """Return the preprocessing of ConvNextImageProcessor: resize to size / crop_pct, then crop."""
    kind = processor.get("image_processor_type", processor.get("feature_extractor_type"))
    size = processor.get("size", 224)
    size = size.get("shortest_edge") if isinstance(size, dict) else size
    if not str(kind).startswith("ConvNext"):
        raise _refused(PREPROCESSOR, "image_processor_type", kind, "ConvNextImageProcessor")
    if isinstance(size, int) and size >= 384:
        raise _refused(PREPROCESSOR, "size", size, "below 384, from which on it distorts the image")
    for key in ("do_resize", "do_rescale", "do_normalize"):
        if not processor.get(key, True):
            raise _refused(PREPROCESSOR, key, processor[key], True)
    code = processor.get("resample", 2)
    name = FILTERS.get(code, code) if isinstance(code, int) else code
    crop, mean, std = (processor.get(key) for key in ("crop_pct", "image_mean", "image_std"))
    return _data_config(PREPROCESSOR, size, 224 / 256 if crop is None else crop, name, mean, std)


def _data_config(
    file: str, size: object, crop: object, interpolation: object, mean: object, std: object
) -> DataConfig:
    """Check values of a file, and return the preprocessing: floor(size / crop) pixels, then crop `size`."""
    if not isinstance(size, int) or not 8 <= size <= 4096:
        raise _refused(file, "the image size", size, "8 to 4096 pixels")
    if not isinstance(crop, int | float) or not 0.5 <= crop <= 1:
        raise _refused(file, "crop_pct", crop, "0.5 to 1")
    if interpolation != "bilinear" and interpolation != "bicubic":
        raise _refused(file, "the filter of resizing", interpolation, "bilinear or bicubic")
    data = DataConfig(image_size=size, resize=math.floor(size / crop), interpolation=interpolation)
    means, stds = STATISTICS["folder"]
    return replace(
        data, mean=_pixels(file, "mean", mean, -10, means), std=_pixels(file, "std", std, 1e-3, stds)
    )


def _pixels(file: str, name: str, values: object, low: float, usual: tuple[float, ...]) -> tuple[float, ...]:
    """Return three numbers of 0...1 as pixel values 0...255; the usual ones instead of null."""
    if values is None:
        return usual
    numbers = [v for v in values if isinstance(v, int | float)] if isinstance(values, list) else []
    if len(numbers) != 3 or not all(low <= number <= 10 for number in numbers):
        raise _refused(file, name, values, "3 numbers, as for pixels 0...1")
    return tuple(round(255 * number, 6) for number in numbers)


def _class_names(value: object) -> tuple[str, ...] | None:
    """Return names, a list or a map from numbers, by output; None if they are incomplete or ambiguous.

    Also None for ImageNet's phrases ("tench, Tinca tinca"): its class folders have other names.
    """
    if isinstance(value, dict):
        value = [value.get(str(number)) for number in range(len(value))]
    names = as_names(value)
    if not names or len(set(names)) < len(names):
        return None
    phrases = len(names) == 1000 and names[0].startswith("tench") and names[-1].startswith("toilet tissue")
    return None if phrases else names


def _read_json(path: Path) -> dict[str, object]:
    if path.stat().st_size > MAX_CONFIG:
        raise InvalidFileError(f"{path.name}: is larger than {MAX_CONFIG >> 20} MiB")
    try:
        return _mapping(json.loads(path.read_bytes()), path.name)
    except (ValueError, RecursionError) as error:
        raise InvalidFileError(f"{path.name}: is damaged ({str(error)[:80]})") from None


def _mapping(value: object, name: str) -> dict[str, object]:
    if not isinstance(value, dict):
        raise InvalidFileError(f"{name}: is not a JSON object")
    return value


def _refused(file: str, key: str, value: object, expected: object) -> InvalidFileError:
    return InvalidFileError(f"{file}: {key} is not supported (got {str(value)[:60]}, expected {expected})")


def timm_config(config: Config, classes: tuple[str, ...] | None) -> dict[str, object]:
    """Return config.json of a network in form C; timm then prepares images as this program evaluates them.

    Widths and depths without a timm name are in model_args. Raise UserError if timm has no such network.
    """
    model, data = config.model, config.data
    if model.stem != "imagenet" or model.shortcut != "B" or model.preactivation:
        raise UserError(
            "OUTPUT/: timm has no such network (needs stem=imagenet, shortcut=B, preactivation=false); "
            "name a .safetensors file"
        )
    width, arguments = model.base_width, dict[str, object]()
    name = f"resnext{model.depth}_{model.cardinality}x{width}d"
    if model.cardinality == 1:
        name = f"resnet{model.depth}" if width == 64 else f"wide_resnet{model.depth}_{width / 64:g}"
    if name not in TIMM_TAGS or STAGES[model.block_type].get(model.depth) != model.stages:
        name = "resnet18" if model.block_type == "basic" else "resnet50"
        arguments = {"layers": model.stages, "cardinality": model.cardinality, "base_width": width}
    return {
        "architecture": name,
        "num_classes": model.classes,
        "num_features": 512 if model.block_type == "basic" else 2048,
        "global_pool": "avg",
        "model_args": arguments,
        **({"label_names": classes} if classes else {}),
        "pretrained_cfg": {
            "custom_load": False,
            "input_size": [3, data.image_size, data.image_size],
            "interpolation": "bicubic" if data.pipeline == "torch7" else data.interpolation,
            "crop_pct": crop_pct(data.image_size, data.resize),
            "crop_mode": "center",
            "mean": [round(value / 255, 12) for value in data.mean],
            "std": [round(value / 255, 12) for value in data.std],
            "num_classes": model.classes,
            "first_conv": "conv1",
            "classifier": "fc",
        },
    }


def crop_pct(size: int, resize: int) -> float:
    """Return the share of the resized side that the crop takes, so that floor(size / share) is `resize`."""
    share = size / resize
    return share if math.floor(size / share) == resize else math.nextafter(share, 0)
