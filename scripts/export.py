"""Write trained weights in a form that other programs read, and check that they compute the same there.

    python scripts/export.py runs/resnext50_32x4d resnext50.pth       torchvision's and timm's state_dict
    python scripts/export.py WEIGHTS resnext50.safetensors            the same, with classes and preprocessing
    python scripts/export.py WEIGHTS resnext50.pt2 --fold-batchnorm   torch.export program
    python scripts/export.py WEIGHTS resnext50.onnx --image-size 320  ONNX
    python scripts/export.py WEIGHTS resnext50/                       folder for timm: local-dir:resnext50

WEIGHTS is whatever evaluate.py reads. Networks in form A or B are written in form C, which computes the same.
Programs take batches of any size, and images of one size: (pixels 0...255 - mean) / std. The file is read
back by the program that it is for (torchvision's ResNet if it has the network, torch.export, onnxruntime,
timm).
It appears only if the logits of two random images agree to 1e-4 of the largest.
"""

import argparse
import importlib.util
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from resnext.arguments import check_limits
from resnext.errors import UserError, command_parser, run_main
from resnext.files import check_source, whole_file

NEEDED = {".pth": [], ".safetensors": ["safetensors"], ".pt2": [], ".onnx": ["onnx", "onnxscript"]}
NEEDED["/"] = ["safetensors"]  # a folder
PROGRAMS = (".pt2", ".onnx")


def parse_arguments() -> argparse.Namespace:
    parser = command_parser(__doc__)
    add = parser.add_argument
    add("weights", metavar="WEIGHTS", help="a run directory, a checkpoint, or a file of weights")
    add("output", metavar="OUTPUT", help="what to write, by its end: " + ", ".join(NEEDED))
    fold_help = ".pt2, .onnx: fold each BatchNorm that follows a convolution into it"
    add("--fold-batchnorm", action="store_true", help=fold_help)
    size_help = ".pt2, .onnx: images of N pixels; default: the weights'"
    add("--image-size", type=int, metavar="N", help=size_help)
    return parser.parse_args()


def check_arguments(arguments: argparse.Namespace) -> None:
    """Raise UserError for what is wrong before anything is read."""
    check_source(arguments.weights)
    output = Path(arguments.output)
    suffix = kind_of(arguments.output)
    if suffix not in NEEDED:
        raise UserError(f"{output}: the name must end in {', '.join(NEEDED)}, which says what to write")
    if output.exists() or output.is_symlink():
        raise UserError(f"{output}: exists already; remove it or name another file")
    if not output.resolve().parent.is_dir():
        raise UserError(f"{output}: its folder does not exist; create it, or name another file")
    given = {"--fold-batchnorm": arguments.fold_batchnorm, "--image-size": arguments.image_size is not None}
    for option in (option for option, value in given.items() if value and suffix not in PROGRAMS):
        raise UserError(
            f"{option}: is for {' and '.join(PROGRAMS)}; {suffix} holds the weights of the unchanged network "
            "under its names; omit the option"
        )
    check_limits(arguments)
    missing = [name for name in NEEDED[suffix] if not importlib.util.find_spec(name)]
    if missing:
        raise UserError(f"{output}: {' and '.join(missing)} not installed; pip install {' '.join(missing)}")


def kind_of(output: str) -> str:
    """Return the suffix that says what to write; "/" for a folder."""
    return "/" if output.endswith("/") else Path(output).suffix


def main() -> None:
    arguments = parse_arguments()
    check_arguments(arguments)
    output, suffix = Path(arguments.output), kind_of(arguments.output)

    from resnext.weights import export, model_folder
    from resnext.weights.load import check_classifier, load_weights

    original, info = load_weights(arguments.weights)
    check_classifier(info)
    network, config = export.in_form_c(original, info.config)
    size = arguments.image_size or config.data.image_size
    images = export.random_images(size)
    facts = export.metadata(config, info, size)
    exported = export.fold_batchnorm(network) if arguments.fold_batchnorm else network
    if suffix == "/":
        timm_config = model_folder.timm_config(config, info.classes)
    else:
        content = export.WRITERS[suffix](exported, facts, images)
    with whole_file(arguments.output) as path:
        if suffix == "/":
            export.write_folder(path, exported, timm_config)
        else:
            path.write_bytes(content)
        parity = export.check_parity(path, config, images, original)
    files = output.iterdir() if suffix == "/" else (output,)
    megabytes = sum(file.stat().st_size for file in files) / 2**20
    print(f"wrote {output}: {facts['architecture']}, {config.model.classes} classes, {megabytes:.1f} MiB")
    print(f"weights: {facts['origin']}")
    print(f"input: RGB, float32 (batch, 3, {size}, {size}), (pixels 0...255 - mean) / std,")
    print(f"       mean {facts['mean']}, std {facts['std']}")
    print(parity)
    if suffix == ".pth":
        print("a state_dict has neither classes nor preprocessing; a .safetensors or a checkpoint does")


if __name__ == "__main__":
    run_main(main)
