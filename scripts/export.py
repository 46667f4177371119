"""Write trained weights in a form that other programs read, and check that they compute the same there.

    python scripts/export.py runs/resnext50_32x4d resnext50.pth       torchvision's and timm's state_dict
    python scripts/export.py WEIGHTS resnext50.safetensors            the same, with classes and preprocessing
    python scripts/export.py WEIGHTS resnext50.pt2 --fold-batchnorm   torch.export program
    python scripts/export.py WEIGHTS resnext50.onnx --image-size 320  ONNX

WEIGHTS is whatever evaluate.py takes. Networks in form A or B are written in form C, which computes the
same. Programs take batches of any size, and pictures of one: (pixels 0...255 - mean) / std. The file is
read back by the program it is for (torchvision's ResNet where it has the network, torch.export, onnxruntime),
and appears only when the logits of two random pictures agree to 1e-4 of the largest.
"""

import argparse
import importlib.util
import io
import json
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from resnext.config import Config, network_name, to_yaml
from resnext.errors import UserError, command_parser, run_main
from resnext.files import check_source

NEEDED = {".pth": [], ".safetensors": ["safetensors"], ".pt2": [], ".onnx": ["onnx", "onnxscript"]}
PROGRAMS = (".pt2", ".onnx")
TOLERANCE = 1e-4  # of the largest logit


def main() -> None:
    arguments = parse_arguments()
    output = Path(arguments.output)
    check_arguments(arguments.weights, output, arguments.fold_batchnorm, arguments.image_size)

    import torch

    from resnext.weights.load import check_classifier, load_weights

    original, info = load_weights(arguments.weights)
    check_classifier(info)
    network, config = in_form_c(original, info.config)
    size = arguments.image_size or config.data.image_size
    pictures = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    after = "" if info.steps is None else f" after {info.steps} steps"
    facts = metadata(config, info.classes, f"{info.origin}, {info.weights}{after}", size)
    exported = fold_batchnorm(network) if arguments.fold_batchnorm else network
    content = WRITERS[output.suffix](exported, facts, pictures)
    with torch.no_grad():
        expected = original(pictures)
    parity = write_checked(output, content, lambda path: verdict(path, config, pictures, expected))
    megabytes = output.stat().st_size / 2**20
    print(f"wrote {output}: {facts['architecture']}, {config.model.classes} classes, {megabytes:.1f} MiB")
    print(f"weights: {facts['origin']}")
    print(f"input: RGB, float32 (batch, 3, {size}, {size}), (pixels 0...255 - mean) / std,")
    print(f"       mean {facts['mean']}, std {facts['std']}")
    print(parity)
    if output.suffix == ".pth":
        print("a state_dict says neither classes nor preprocessing: a .safetensors or a checkpoint does")


def parse_arguments() -> argparse.Namespace:
    parser = command_parser(__doc__)
    parser.add_argument(
        "weights", metavar="WEIGHTS", help="a run directory, a checkpoint or a file of weights"
    )
    parser.add_argument("output", metavar="OUTPUT", help="the file to write: " + ", ".join(NEEDED))
    parser.add_argument(
        "--fold-batchnorm",
        action="store_true",
        help=".pt2, .onnx: fold each BatchNorm that follows a convolution into it",
    )
    parser.add_argument(
        "--image-size", type=int, metavar="N", help=".pt2, .onnx: pictures of N pixels; default: the weights'"
    )
    return parser.parse_args()


def check_arguments(source: str, output: Path, fold: bool, image_size: int | None) -> None:
    """What can be said before anything is read."""
    check_source(source)
    if output.suffix not in NEEDED:
        raise UserError(f"{output}: the name must end in {', '.join(NEEDED)}, which says what to write")
    if output.exists() or output.is_symlink():
        raise UserError(f"{output}: exists already; remove it or name another file")
    if not output.resolve().parent.is_dir():
        raise UserError(f"{output}: its folder does not exist; make it, or name another file")
    if output.suffix not in PROGRAMS:
        for option, given in (("--fold-batchnorm", fold), ("--image-size", image_size is not None)):
            if given:
                raise UserError(
                    f"{option}: is for {' and '.join(PROGRAMS)}; {output.suffix} holds the weights of the "
                    "unchanged network under its names; leave the option out"
                )
    if image_size is not None and not 8 <= image_size <= 4096:
        raise UserError(f"--image-size: must be from 8 to 4096, not {image_size}")
    missing = [name for name in NEEDED[output.suffix] if not importlib.util.find_spec(name)]
    if missing:
        raise UserError(f"{output}: {' and '.join(missing)} not installed; pip install {' '.join(missing)}")


# ---------------------------------------------------------------------------- the network


def in_form_c(model: Any, config: Config) -> tuple[Any, Config]:
    """The same function as a new network in form C, and its configuration, without this machine's paths."""
    from resnext.models.block_forms import convert_form

    state = convert_form(model.state_dict(), config.model.cardinality, config.model.block, "C")
    # torchvision and safetensors want plain layout; a run's weights are channels_last.
    state = {name: tensor.contiguous() for name, tensor in state.items()}
    config = replace(
        config,
        model=replace(config.model, block="C", classes=model.fc.out_features, pretrained=None),
        data=replace(config.data, dir=None),
    )
    return own_network(config, state), config


def own_network(config: Config, state: dict[str, Any]) -> Any:
    """Our own network for a configuration, in evaluation mode, with these weights."""
    import torch

    from resnext.models.resnext import build_model

    with torch.device("meta"):
        model = build_model(config.model, config.model.classes)
    model.load_state_dict(state, assign=True)
    return model.eval()


def torchvision_network(config: Config, state: dict[str, Any]) -> Any:
    """torchvision's network for a configuration that it has."""
    import torch
    from torchvision.models.resnet import Bottleneck, ResNet

    model = config.model
    with torch.device("meta"):
        network = ResNet(
            Bottleneck,
            list(model.stages),
            num_classes=model.classes,
            groups=model.cardinality,
            width_per_group=model.base_width,
        )
    network.load_state_dict(state, assign=True)
    return network.eval()


def fold_batchnorm(model: Any) -> Any:
    """A copy in which BatchNorms are part of the convolutions that they follow.

    The names tell: bnN follows convN, and 1 follows 0 in a shortcut. Pre-activation networks keep bn0
    and final_bn, which follow an addition. `model` is in form C and evaluation mode.
    """
    import copy

    from torch import nn
    from torch.nn.utils.fusion import fuse_conv_bn_eval

    model = copy.deepcopy(model)
    for module in list(model.modules()):
        for first, second in (("conv1", "bn1"), ("conv2", "bn2"), ("conv3", "bn3"), ("0", "1")):
            convolution, norm = getattr(module, first, None), getattr(module, second, None)
            if isinstance(convolution, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                setattr(module, first, fuse_conv_bn_eval(convolution, norm))
                setattr(module, second, nn.Identity())
    return model


def metadata(config: Config, classes: tuple[str, ...] | None, origin: str, image_size: int) -> dict[str, str]:
    """What the weights do not say: texts, as safetensors and ONNX hold them."""
    from resnext.weights.load import EXPORTED

    data = config.data
    return {
        "format": EXPORTED,
        "architecture": network_name(config.model),
        "classes": json.dumps(classes),
        "mean": json.dumps(data.mean),
        "std": json.dumps(data.std),
        "image_size": str(image_size),
        "resize": str(image_size * data.resize // data.image_size),
        "origin": origin,
        "config": to_yaml(config),
    }


# ---------------------------------------------------------------------------- writing


def to_pth(model: Any, facts: dict[str, str], pictures: Any) -> bytes:
    """A bare dict of tensors."""
    import torch

    buffer = io.BytesIO()
    torch.save(dict(model.state_dict()), buffer)
    return buffer.getvalue()


def to_safetensors(model: Any, facts: dict[str, str], pictures: Any) -> bytes:
    from safetensors.torch import save

    return save(dict(model.state_dict()), facts)


def to_pt2(model: Any, facts: dict[str, str], pictures: Any) -> bytes:
    """A torch.export program; the metadata is its extra file resnext.json."""
    import torch

    program = torch.export.export(model, (pictures,), dynamic_shapes=batch_of_any_size())
    buffer = io.BytesIO()
    torch.export.save(program, buffer, extra_files={"resnext.json": json.dumps(facts)})
    return buffer.getvalue()


def to_onnx(model: Any, facts: dict[str, str], pictures: Any) -> bytes:
    """An ONNX model, weights included, with the metadata as its properties."""
    import torch

    program = torch.onnx.export(
        model,
        (pictures,),
        dynamo=True,
        dynamic_shapes=batch_of_any_size(),
        input_names=["pictures"],
        output_names=["logits"],
        verbose=False,
    )
    program.model.metadata_props.update(facts)
    return program.model_proto.SerializeToString()


def batch_of_any_size() -> tuple[dict[int, Any]]:
    import torch

    return ({0: torch.export.Dim("batch")},)


WRITERS = {".pth": to_pth, ".safetensors": to_safetensors, ".pt2": to_pt2, ".onnx": to_onnx}


def write_checked(output: Path, content: bytes, check: Callable[[Path], str]) -> str:
    """Write under another name, have that file checked, give it its name; `check`'s text."""
    temporary = output.resolve().with_name(f".{os.getpid()}{output.suffix}")
    try:
        with open(temporary, "xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        said = check(temporary)
        os.rename(temporary, output)
    except OSError as error:
        raise UserError(
            f"{output}: cannot be written ({error.strerror or error}); name another file"
        ) from None
    finally:
        temporary.unlink(missing_ok=True)
    return said


# ---------------------------------------------------------------------------- reading back


def verdict(path: Path, config: Config, pictures: Any, expected: Any) -> str:
    """How the file's logits differ from the original network's, in words; a UserError where too much."""
    reader, found = read_back(path, config, pictures)
    if found is None:
        return f"parity was not checked: {reader}"
    difference = (found - expected).abs().max().item()
    largest = expected.abs().max().item()
    relative = difference / (largest or 1.0)
    text = f"logits differ by {difference:.2g} at most, {relative:.1g} of the largest ({largest:.4g})"
    if not relative <= TOLERANCE:  # not a number either
        raise UserError(
            f"{path.suffix}: read back by {reader}, {text}, over {TOLERANCE:g}; nothing is written"
        )
    return f"read back by {reader}: {text}"


def read_back(path: Path, config: Config, pictures: Any) -> tuple[str, Any]:
    """(who reads the file, its logits of `pictures` or None)."""
    import torch

    if path.suffix == ".onnx":
        if not importlib.util.find_spec("onnxruntime"):
            return "onnxruntime is not installed (pip install onnxruntime)", None
        import onnxruntime

        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        return "onnxruntime", torch.from_numpy(session.run(None, {"pictures": pictures.numpy()})[0])
    if path.suffix == ".pt2":
        reader, network = "torch.export", torch.export.load(path).module()
    else:
        reader, network = rebuild(read_state(path), config)
    with torch.no_grad():
        return reader, network(pictures)


def read_state(path: Path) -> dict[str, Any]:
    import torch

    if path.suffix == ".pth":
        return torch.load(path, map_location="cpu", weights_only=True)
    from safetensors.torch import load_file

    return load_file(path)


def rebuild(state: dict[str, Any], config: Config) -> tuple[str, Any]:
    """(whose network, the network) with these weights: torchvision's where it has it, else our own."""
    model = config.model
    if model.stem == "imagenet" and model.shortcut == "B" and not model.preactivation:
        return "torchvision's ResNet, every key", torchvision_network(config, state)
    return "this program (torchvision has no such network), every key", own_network(config, state)


if __name__ == "__main__":
    run_main(main)
