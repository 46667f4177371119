"""Files for other programs: the network in form C, its writers, and reading back what was written."""

import copy
import importlib.util
import io
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from ..config import Config, network_name, to_yaml
from ..errors import UserError
from ..models.block_forms import convert_form
from ..models.resnext import ResNeXt, build_model
from .load import EXPORTED, WeightsInfo
from .model_folder import CONFIG, PREFERRED

TOLERANCE = 1e-4  # of the largest logit
FOLLOWS = {"bn1": "conv1", "bn2": "conv2", "bn3": "conv3", "1": "0"}  # "0" and "1" are a shortcut's


def random_images(size: int) -> Tensor:
    """Return the two images that the logits are compared on, float32 (2, 3, size, size)."""
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))


def in_form_c(model: ResNeXt, config: Config) -> tuple[nn.Module, Config]:
    """Return the same function as a new network in form C, and its configuration without local paths."""
    state = convert_form(model.state_dict(), config.model.cardinality, config.model.block, "C")
    # torchvision and safetensors want contiguous tensors; a run's weights are channels_last.
    state = {name: tensor.contiguous() for name, tensor in state.items()}
    config = replace(
        config,
        model=replace(config.model, block="C", classes=len(state["fc.bias"]), pretrained=None),
        data=replace(config.data, dir=None),
    )
    return rebuild(config, state), config


def rebuild(config: Config, state: dict[str, Tensor], torchvision: bool = False) -> nn.Module:
    """Return the network of a configuration, this program's or torchvision's, with every key of `state`."""
    model = config.model
    with torch.device("meta"):
        if torchvision:
            from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

            network: nn.Module = ResNet(
                BasicBlock if model.block_type == "basic" else Bottleneck,
                list(model.stages),
                num_classes=model.classes,
                groups=model.cardinality,
                width_per_group=model.base_width,
            )
        else:
            network = build_model(model, model.classes)
    network.load_state_dict(state, assign=True)
    return network.eval()


def fold_batchnorm(model: nn.Module) -> nn.Module:
    """Return a copy in which each BatchNorm that follows a convolution is part of it.

    Pre-activation networks keep bn0 and final_bn, which follow an addition. `model` is in form C and
    evaluation mode.
    """
    model = copy.deepcopy(model)
    for module in list(model.modules()):
        for second, first in FOLLOWS.items():
            convolution, norm = getattr(module, first, None), getattr(module, second, None)
            if isinstance(convolution, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                setattr(module, first, fuse_conv_bn_eval(convolution, norm))
                setattr(module, second, nn.Identity())
    return model


def metadata(config: Config, info: WeightsInfo, image_size: int) -> dict[str, str]:
    """Return what the tensors do not say, as texts, which safetensors and ONNX hold."""
    data, after = config.data, "" if info.steps is None else f" after {info.steps} steps"
    return {
        "format": EXPORTED,
        "architecture": network_name(config.model),
        "classes": json.dumps(info.classes),
        "mean": json.dumps(data.mean),
        "std": json.dumps(data.std),
        "image_size": str(image_size),
        "resize": str(image_size * data.resize // data.image_size),
        "origin": f"{info.origin}, {info.weights}{after}",
        "config": to_yaml(config),
    }


# ---------------------------------------------------------------------------- writing
# Each writer returns the bytes of a file, from the network, its metadata, and example images.


def to_pth(model: nn.Module, facts: dict[str, str], images: Tensor) -> bytes:
    """A bare dict of tensors."""
    buffer = io.BytesIO()
    torch.save(dict(model.state_dict()), buffer)
    return buffer.getvalue()


def to_safetensors(model: nn.Module, facts: dict[str, str], images: Tensor) -> bytes:
    """The tensors, with the metadata."""
    from safetensors.torch import save

    return save(dict(model.state_dict()), facts)


def to_pt2(model: nn.Module, facts: dict[str, str], images: Tensor) -> bytes:
    """A torch.export program; the metadata is its extra file resnext.json."""
    program = torch.export.export(model, (images,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    buffer = io.BytesIO()
    torch.export.save(program, buffer, extra_files={"resnext.json": json.dumps(facts)})
    return buffer.getvalue()


def to_onnx(model: nn.Module, facts: dict[str, str], images: Tensor) -> bytes:
    """An ONNX model, weights included, with the metadata as its properties."""
    program = torch.onnx.export(
        model,
        (images,),
        dynamo=True,
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        input_names=["pictures"],
        output_names=["logits"],
        verbose=False,
    )
    program = cast(torch.onnx.ONNXProgram, program)  # None only without dynamo
    program.model.metadata_props.update(facts)
    return program.model_proto.SerializeToString()


Writer = Callable[[nn.Module, dict[str, str], Tensor], bytes]
WRITERS: dict[str, Writer] = {
    ".pth": to_pth,
    ".safetensors": to_safetensors,
    ".pt2": to_pt2,
    ".onnx": to_onnx,
}


def write_folder(path: Path, model: nn.Module, config: dict[str, object]) -> None:
    """Write a new folder that timm reads, with this config.json."""
    path.mkdir()
    (path / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
    (path / PREFERRED[0]).write_bytes(to_safetensors(model, {"format": "pt"}, torch.empty(0)))


# ---------------------------------------------------------------------------- reading back


@torch.no_grad()
def check_parity(path: Path, config: Config, images: Tensor, original: nn.Module) -> str:
    """Return how much a file's logits differ from the original network's; raise UserError if too much."""
    reader, found = read_back(path, config, images)
    if found is None:
        return f"parity was not checked: {reader}"
    expected = original(images)
    difference, largest = (found - expected).abs().max().item(), expected.abs().max().item()
    relative = difference / (largest or 1.0)
    text = f"logits differ by {difference:.2g} at most, {relative:.1g} of the largest ({largest:.4g})"
    if not relative <= TOLERANCE:  # also NaN
        raise UserError(
            f"{path.suffix}: read back by {reader}, {text}, over {TOLERANCE:g}; nothing is written"
        )
    return f"read back by {reader}: {text}"


def read_back(path: Path, config: Config, images: Tensor) -> tuple[str, Tensor | None]:
    """Return the program that reads the file, and its logits of the images; None if it is not installed."""
    if path.is_dir():
        if not importlib.util.find_spec("timm"):
            return read_back(path / PREFERRED[0], config, images)
        import timm

        return "timm", timm.create_model(f"local-dir:{path}", pretrained=True).eval()(images)
    if path.suffix == ".onnx":
        if not importlib.util.find_spec("onnxruntime"):
            return "onnxruntime is not installed (pip install onnxruntime)", None
        import onnxruntime

        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        return "onnxruntime", torch.from_numpy(session.run(None, {"pictures": images.numpy()})[0])
    if path.suffix == ".pt2":
        return "torch.export", torch.export.load(path).module()(images)
    if path.suffix == ".pth":
        state = torch.load(path, map_location="cpu", weights_only=True)
    else:
        from safetensors.torch import load_file

        state = load_file(path)
    model = config.model
    if model.stem == "imagenet" and model.shortcut == "B" and not model.preactivation:
        return "torchvision's ResNet, every key", rebuild(config, state, torchvision=True)(images)
    reader = "this program (torchvision has no such network), every key"
    return reader, rebuild(config, state)(images)
