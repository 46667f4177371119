"""Write the features of images under trained weights: the input of the last layer, or any layer's output.

    python scripts/extract_features.py RUN photos/ --output features.npz
    python scripts/extract_features.py RUN photos/ --output features.safetensors --layer layer3
    python scripts/extract_features.py RUN photos/ --output maps.npz --layer layer4.2.conv2 --no-pool

IMAGE is a file, a folder, a quoted pattern, or - for names from standard input, as for predict.py. The file
holds `features`, float32 (images, channels), `paths`, and `layer`; .safetensors has the latter two in its
metadata, the paths as JSON. It appears complete or not at all. An image that cannot be read is named and
skipped; the exit status is then 2.
"""

import difflib
import importlib.util
import json
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import numpy as np

from data.unlabeled import find_images
from resnext.arguments import check_limits, image_parser
from resnext.errors import UserError, run_main
from resnext.files import check_source, check_target, whole_file

if TYPE_CHECKING:
    from torch import Tensor, nn

INPUT = "fc_input"  # the input of the last layer, fc


def main() -> None:
    parser = image_parser(__doc__)
    add = parser.add_argument
    add("--output", required=True, metavar="FILE", help="a name that ends in .npz or .safetensors")
    layer_help = f"a module of the network (default: {INPUT}, after global average pooling)"
    add("--layer", default=INPUT, metavar="NAME", help=layer_help)
    pool_help = "keep height and width: features are (images, channels, h, w)"
    add("--no-pool", action="store_true", help=pool_help)
    arguments = parser.parse_intermixed_args()
    check_limits(arguments)
    check_source(arguments.weights)
    check_format(arguments.output)
    paths, broken, notes = find_images(arguments.images, sys.stdin.buffer if "-" in arguments.images else ())
    check_target("--output", Path(arguments.output), [arguments.weights, *paths])
    for line in [*(f"warning: {problem}" for problem in broken), *notes]:
        print(line, file=sys.stderr)
    named = len(paths) + len(broken)

    from data.unlabeled_loader import unlabeled_batches
    from resnext.engine.inference import check_all_read, run_images
    from resnext.weights.load import load_weights

    model, info = load_weights(arguments.weights)
    latest = watch(model, arguments.layer, pool=not arguments.no_pool)
    logits = run_images(model, info, paths, arguments, unlabeled_batches, broken)
    shape = write_features(logits, latest, arguments.output, arguments.layer)
    print(f"wrote {arguments.output}: {' x '.join(map(str, shape))}, {arguments.layer}")
    check_all_read(broken, named)


def check_format(output: str) -> None:
    """Raise UserError if the name's suffix is unknown, or the format's package is missing."""
    suffix = Path(output).suffix
    if suffix not in WRITERS:
        raise UserError(f"--output {output}: the name must end in {' or '.join(WRITERS)}")
    if suffix == ".safetensors" and importlib.util.find_spec("safetensors") is None:
        raise UserError(
            f"--output {output}: needs the package safetensors; pip install safetensors, or use .npz"
        )


def watch(model: "nn.Module", layer: str, pool: bool) -> list["Tensor"]:
    """Return a list that holds, after each forward pass, the layer's features alone: float32, on the device.

    With `pool`, maps (N, C, h, w) are averaged to (N, C).
    """
    latest: list[Tensor] = []

    def keep(tensor: "Tensor") -> None:
        # At once and into new memory: the ReLU that may follow works in place.
        pooled = pool and tensor.dim() == 4
        latest[:] = [tensor.float().mean((2, 3)) if pooled else tensor.float().clone()]

    if layer == INPUT:
        model.fc.register_forward_pre_hook(lambda _, inputs: keep(inputs[0]))
    else:
        find_layer(model, layer).register_forward_hook(lambda _, inputs, output: keep(output))
    return latest


def find_layer(model: "nn.Module", name: str) -> "nn.Module":
    """Return the module with that output; raise UserError with similar names if there is none."""
    from torch.nn import ModuleList, Sequential

    modules = dict(model.named_modules())
    del modules[""]
    module = modules.get(name)
    while isinstance(module, Sequential):  # the network runs a stage block by block
        module = module[-1]
    if module is None or isinstance(module, ModuleList):
        close = difflib.get_close_matches(name, [INPUT, *modules], n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(close)}?" if close else f"{INPUT}, layer1, layer1.0.conv2 are some"
        raise UserError(f"--layer: the network has no layer {name!r}; {hint}")
    return module


def write_features(
    batches: Iterable[tuple[list[str], "Tensor"]], latest: list["Tensor"], output: str, layer: str
) -> tuple[int, ...]:
    """Write the features of all images and return their shape.

    They wait in a temporary file until the number of images that could be read is known.
    """
    names: list[str] = []
    target = Path(output).resolve()
    with whole_file(output, "--output") as path, tempfile.TemporaryFile(dir=target.parent) as waiting:
        for paths, _ in batches:
            (features,) = latest
            names += paths
            waiting.write(features.contiguous().cpu().numpy())
        waiting.flush()
        if not names:
            raise UserError("none of the images could be read (see the warnings); no file was written")
        shape = (len(names), *features.shape[1:])
        WRITERS[target.suffix](path, np.memmap(waiting, np.float32, "r", shape=shape), names, layer)
    return shape


def write_npz(path: Path, features: np.ndarray, names: list[str], layer: str) -> None:
    with open(path, "wb") as file:
        np.savez(file, features=features, paths=np.array(names), layer=np.array(layer))


def write_safetensors(path: Path, features: np.ndarray, names: list[str], layer: str) -> None:
    from safetensors.numpy import save_file

    save_file({"features": features}, path, {"paths": json.dumps(names), "layer": layer})


WRITERS: dict[str, Callable[[Path, np.ndarray, list[str], str], None]] = {
    ".npz": write_npz,
    ".safetensors": write_safetensors,
}


if __name__ == "__main__":
    run_main(main)
