"""Features of pictures from trained weights: what enters the last layer, or any layer's output.

    python scripts/extract_features.py RUN photos/ --output features.npz
    python scripts/extract_features.py RUN photos/ --output features.safetensors --layer layer3
    python scripts/extract_features.py RUN photos/ --output maps.npz --layer layer4.2.conv2 --no-pool

PICTURE is a file, a folder, a quoted pattern, or - for names from standard input, as for predict.py. The
file holds `features`, float32 (pictures, channels), `paths` and `layer`; .safetensors has the latter two in
its metadata, the paths as JSON. It appears whole or not at all. A picture that cannot be read is named and
left out, the others are done; the exit status is then 2.
"""

import argparse
import difflib
import importlib.util
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]  # its own folder too, for python -P
import numpy as np
from predict import (
    Network,
    argument_parser,
    find_inputs,
    load_network,
    report_broken,
    scores,
    whole_file,
)

from resnext.errors import UserError, run_main

INPUT = "fc_input"  # what enters the last layer, fc


def main() -> None:
    parser = argument_parser(__doc__)
    add = parser.add_argument
    add("--output", required=True, metavar="FILE", help="a name that ends in .npz or .safetensors")
    add(
        "--layer",
        default=INPUT,
        metavar="NAME",
        help=f"a module of the network (default: {INPUT}, after global average pooling)",
    )
    add(
        "--no-pool",
        action="store_true",
        help="keep height and width: features are (pictures, channels, h, w)",
    )
    arguments = parser.parse_intermixed_args()
    suffix = Path(arguments.output).suffix
    if suffix not in WRITERS:
        raise UserError(f"--output {arguments.output}: the name must end in {' or '.join(WRITERS)}")
    if suffix == ".safetensors" and importlib.util.find_spec("safetensors") is None:
        raise UserError(
            f"--output {arguments.output}: needs the package safetensors; pip install safetensors, or name "
            "the file .npz"
        )
    paths, broken = find_inputs(arguments)
    named = len(paths) + len(broken)
    network = load_network(arguments, classifier=False)
    taken = watch(network.model, arguments.layer, pool=not arguments.no_pool)
    collect(network, taken, paths, arguments, broken)
    report_broken(broken, named)


def watch(model: Any, layer: str, pool: bool) -> list[Any]:
    """A list that will hold, after each forward pass, the layer's features alone: float32 on the device.

    Maps (N, C, h, w) are averaged to (N, C) with `pool`.
    """
    taken: list[Any] = []

    def take(tensor: Any) -> None:
        # At once and into new memory: the ReLU that may follow works in place.
        pooled = pool and tensor.dim() == 4
        taken[:] = [tensor.float().mean((2, 3)) if pooled else tensor.float().clone()]

    if layer == INPUT:
        model.fc.register_forward_pre_hook(lambda _, inputs: take(inputs[0]))
    else:
        find_layer(model, layer).register_forward_hook(lambda _, inputs, output: take(output))
    return taken


def find_layer(model: Any, name: str) -> Any:
    """The module whose output is that layer's; a UserError with similar names where there is none."""
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


def collect(
    network: Network, taken: list[Any], paths: list[str], arguments: argparse.Namespace, broken: list[str]
) -> None:
    """Write the features of all pictures; until their number is known they wait on the disk."""
    read: list[str] = []
    target = Path(arguments.output).resolve()
    with whole_file(arguments.output) as path, tempfile.TemporaryFile(dir=target.parent) as waiting:
        for names, _ in scores(network, paths, arguments, broken):
            (features,) = taken
            read += names
            waiting.write(features.contiguous().cpu().numpy())
        waiting.flush()
        if not read:
            raise UserError(
                f"none of the {len(paths):,} pictures could be read (see the warnings); no file was written"
            )
        shape = (len(read), *features.shape[1:])
        array = np.memmap(waiting, np.float32, "r", shape=shape)
        WRITERS[target.suffix](path, array, read, arguments.layer)
    print(f"wrote {arguments.output}: {' x '.join(map(str, shape))}, {arguments.layer}")


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
