"""Folders of timm and transformers: config.json says how to prepare images and what the classes are called.

The folder also has the weights, which show the network, and transformers' preprocessor_config.json. The files
may come from a hub: nothing in them is executed, and no file name in them is followed.
"""

import json
import math
import re
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
# Arguments of timm's networks that change nothing in evaluation, those that the tensors show, and the only
# values of others that this program has.
INERT = ("drop_rate", "drop_path_rate", "drop_block_rate", "zero_init_last")
SHOWN = ("num_classes", "layers", "cardinality", "base_width")
USUAL = {"global_pool": "avg", "in_chans": 3, "label_offset": 0, "crop_mode": "center"}
FILTERS = {2: "bilinear", 3: "bicubic"}  # PIL's numbers, in files of transformers


@dataclass(frozen=True)
class FolderFacts:
    """What the files of a folder say: the program, the preprocessing, the classes, and the network.

    stated: the file with the preprocessing; None if there is none, and `data` is the usual one.
    labels: names of the outputs as config.json has them, not checked. shown: what the tensors must show.
    """

    origin: str
    data: DataConfig
    stated: str | None
    labels: object
    license: object
    shown: dict[str, object]

    def check(self, model: ModelConfig) -> None:
        """Raise InvalidFileError if the tensors are of another network than config.json's."""
        found = _shape(model) | {"num_classes": model.classes or 0}
        found |= {"depths": found["layers"], "layer_type": model.block_type}  # names of transformers
        for key, value in self.shown.items():
            if found[key] != value:
                difference = f"{key} (got {str(value)[:60]}, expected {found[key]})"
                raise InvalidFileError(f"{CONFIG}: describes another network than the tensors: {difference}")

    def class_names(self, outputs: int | None) -> tuple[str, ...] | None:
        """Return the names by output; raise InvalidFileError if they do not fit the outputs.

        None if there are none. Two kinds are none, as no class folders have these names: transformers'
        LABEL_0, LABEL_1, …, and ImageNet's phrases ("tench, Tinca tinca").
        """
        labels = self.labels
        if not labels or outputs is None:
            return None
        if isinstance(labels, dict):  # timm's may have gaps
            labels = list(({str(number): f"output {number}" for number in range(outputs)} | labels).values())
        names = as_names(labels) or ()
        phrases = len(names) == 1000 and names[0].startswith("tench") and names[-1].startswith("toilet ")
        if phrases or names == tuple(f"LABEL_{number}" for number in range(outputs)):
            return None
        if len(names) != outputs or len(set(names)) != outputs:
            key = "label_names" if self.origin == "timm" else "id2label"
            got = f"(got {len(names)} names, {len(set(names))} different, expected {outputs})"
            raise InvalidFileError(f"{CONFIG}: {key} does not name each output differently {got}")
        return names


def find_weights(folder: Path) -> Path:
    """Return the file of weights that timm would read. Raise InvalidFileError if there is none."""
    files = sorted(path for path in folder.iterdir() if path.is_file())
    choices = [[path for path in files if path.name == name] for name in PREFERRED]
    choices += [[path for path in files if path.name.endswith(suffix)] for suffix in SUFFIXES]
    found = next(filter(None, choices), None)
    if found is None:
        raise InvalidFileError(f"has {CONFIG}, but no weights, such as {PREFERRED[0]}")
    return found[0]


def read_facts(folder: Path) -> FolderFacts:
    """Read what config.json says. Raise InvalidFileError for what this program does not have."""
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
    stated = PREPROCESSOR if path.is_file() else None
    shown = {key: value for key, value in config.items() if key in ("depths", "layer_type")}
    return FolderFacts("transformers", data, stated, config.get("id2label"), config.get("license"), shown)


def _timm_facts(config: dict[str, object]) -> FolderFacts:
    # Old files are flat: pretrained_cfg's keys beside architecture, and labels for label_names.
    cfg = _mapping(config.get("pretrained_cfg", config), "pretrained_cfg")
    if config["architecture"] not in list(TIMM_TAGS):  # a list: it may be unhashable
        raise _refused(CONFIG, "architecture", config["architecture"], ", ".join(TIMM_TAGS))
    arguments = _mapping(config.get("model_args") or {}, "model_args")
    for key, value in arguments.items():
        if key not in (*INERT, *SHOWN, *USUAL):
            raise InvalidFileError(f"{CONFIG}: model_args.{key} is not supported (got {str(value)[:60]})")
    stated = {key: value for key, value in (cfg | config | arguments).items() if value is not None}
    for key, usual in USUAL.items():
        if stated.get(key, usual) != usual:
            raise _refused(CONFIG, key, stated[key], usual)
    shape = cfg.get("test_input_size") or cfg.get("input_size") or [3, 224, 224]
    if not isinstance(shape, list) or len(shape) != 3 or shape[0] != 3 or shape[1] != shape[2]:
        raise _refused(CONFIG, "input_size", shape, "3 channels of a square")
    crop = cfg.get("test_crop_pct") or cfg.get("crop_pct") or 0.875  # as timm's validate.py
    data = _data_config(
        CONFIG, shape[1], crop, cfg.get("interpolation") or "bicubic", cfg.get("mean"), cfg.get("std")
    )
    labels = config.get("label_names", cfg.get("label_names", cfg.get("labels")))
    shown = _timm_shape(str(config["architecture"]))
    shown |= {key: stated[key] for key in SHOWN if key in stated}
    return FolderFacts("timm", data, CONFIG, labels, cfg.get("license"), shown)


def _timm_shape(architecture: str) -> dict[str, object]:
    """Return what tensors show of timm's resnet50, wide_resnet50_2, resnext50_32x4d, and the like."""
    depth, *rest = map(int, re.findall(r"\d+", architecture))
    block_type = "basic" if depth in STAGES["basic"] else "bottleneck"
    layers = STAGES[block_type].get(depth, (2, 2, 2, 2))  # resnet26
    cardinality, width = rest if len(rest) == 2 else (1, 64 * sum(rest or [1]))
    return {"layers": list(layers), "cardinality": cardinality, "base_width": width, "block_type": block_type}


def _shape(model: ModelConfig) -> dict[str, object]:
    """Return the same of a network of this program."""
    sizes = {"cardinality": model.cardinality, "base_width": model.base_width}
    return {"layers": list(model.stages), **sizes, "block_type": model.block_type}


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
    factor = processor.get("rescale_factor", 1 / 255)
    if not isinstance(factor, int | float) or not math.isclose(255 * factor, 1, rel_tol=1e-6):
        raise _refused(PREPROCESSOR, "rescale_factor", factor, "1/255")
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
    if interpolation not in ("bilinear", "bicubic"):
        raise _refused(file, "the filter of resizing", interpolation, "bilinear or bicubic")
    data = DataConfig(image_size=size, resize=math.floor(size / crop), interpolation=interpolation)
    means, stds = STATISTICS["folder"]
    return replace(
        data, mean=_pixels(file, "mean", mean, 0, means), std=_pixels(file, "std", std, 1e-3, stds)
    )


def _pixels(file: str, name: str, values: object, low: float, usual: tuple[float, ...]) -> tuple[float, ...]:
    """Return three numbers of 0...1 as pixel values 0...255; the usual ones instead of null."""
    if values is None:
        return usual
    numbers = [v for v in values if isinstance(v, int | float)] if isinstance(values, list) else []
    if len(numbers) != 3 or not all(low <= number <= 10 for number in numbers):
        raise _refused(file, name, values, "3 numbers, as for pixels 0...1")
    return tuple(round(255 * number, 6) for number in numbers)


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
    shape, usual = _shape(model), "resnet18" if model.block_type == "basic" else "resnet50"
    name = next((name for name in TIMM_TAGS if _timm_shape(name) == shape), usual)
    arguments = {key: value for key, value in shape.items() if _timm_shape(name)[key] != value}
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
