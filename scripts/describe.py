"""Describe what networks cost: parameters, multiply-adds, activations, memory; in total or layer by layer.

    python scripts/describe.py                                  every configuration in configs/
    python scripts/describe.py resnext50_32x4d                  one of them, layer by layer
    python scripts/describe.py runs/demo --json layers.json     a run, or a file of weights

Multiply-adds (MACs) are those of convolutions and linear layers. Activations are the elements of the
convolutions' outputs, as in the RegNet paper. Both are for one image. Nothing is trained, and
only weights that are read take memory. Configurations of class folders count 1000 classes.
"""

import json
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from resnext.classes import USUAL_CLASSES
from resnext.config import CONFIG_FOLDER, Config, find_config, network_name, read_config
from resnext.errors import UserError, command_parser, run_main
from resnext.files import check_source, check_target, write_file

if TYPE_CHECKING:
    from torch import Tensor, nn

MIB = 2**20
Row = dict[str, Any]  # a JSON object


def main() -> None:
    parser = command_parser(__doc__)
    parser.add_argument(
        "source", nargs="?", metavar="CONFIG|RUN|WEIGHTS", help="default: a table of all configurations"
    )
    parser.add_argument("--json", metavar="FILE", help="also write the exact numbers to a file")
    arguments = parser.parse_args()
    source, target = arguments.source, arguments.json
    if source is not None:
        is_config(source)  # UserError if it is nothing of the kind
    if target is not None:
        check_target("--json", Path(target))
        if source is not None and Path(source).resolve() == Path(target).resolve():
            raise UserError(f"--json {target}: is what is described; choose another file")
        if Path(target).suffix in (".yaml", ".safetensors"):
            raise UserError(f"--json {target}: is a name of configurations or weights; choose a .json file")
    result = all_networks() if source is None else one_network(source)
    text = table_of_networks(result) if source is None else table_of_layers(result)
    try:
        if target is not None:
            write_file("--json", target, json.dumps(result, indent=2) + "\n")
    finally:
        print(text, flush=True)


def is_config(source: str) -> bool:
    """Return whether a name is a configuration, not a run or weights; raise UserError if it is neither."""
    path = Path(source)
    if path.suffix in (".yaml", ".yml"):
        return True
    try:
        check_source(source)
    except UserError:
        if path.suffix or path.parent != Path():
            raise
        return True
    return False


# ---------------------------------------------------------------------------- counting


def all_networks() -> list[Row]:
    """Return the costs of every configuration, without the layers."""
    networks = []
    for path in sorted(CONFIG_FOLDER.glob("*.yaml")):
        config = read_config(path)
        networks.append(costs(path.stem, config, build(config)))
        del networks[-1]["layers"]
    return networks


def one_network(source: str) -> Row:
    """Return the costs of a configuration, a run, or a file of weights, and the memory of its training."""
    if is_config(source):
        config = read_config(find_config(source, "CONFIG"))
        model = build(config)
    else:
        from resnext import load_weights

        model, info = load_weights(source)
        config, model = info.config, model.to("meta")
    return costs(source, config, model) | {
        "training_bytes_per_image": training_bytes(model, config.data.image_size)
    }


def build(config: Config) -> "nn.Module":
    """Build a configuration's network on the meta device."""
    import torch

    from resnext.models.resnext import build_model

    with torch.device("meta"):
        return build_model(config.model, config.model.classes or USUAL_CLASSES[config.data.dataset])


def costs(name: str, config: Config, model: "nn.Module") -> Row:
    """Return the costs of a network as JSON holds them; its layers are the modules without children."""
    import torch
    from torch import Tensor, nn
    from torch.utils.flop_counter import FlopCounterMode

    size = config.data.image_size
    outputs: dict[str, torch.Size] = {}
    leaves = {
        name: module
        for name, module in model.named_modules()
        if not list(module.children()) and not isinstance(module, nn.Identity)
    }

    def remember(module: nn.Module, inputs: object, output: Tensor, name: str) -> None:
        outputs[name] = output.shape[1:]

    hooks = [leaf.register_forward_hook(partial(remember, name=name)) for name, leaf in leaves.items()]
    model.eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.empty(1, 3, size, size, device="meta"))
    for hook in hooks:
        hook.remove()
    operations = counter.get_flop_counts()  # two per multiply-add
    layers = [
        {
            "module": name,
            "kind": type(leaves[name]).__name__,
            "output": list(shape),
            "parameters": sum(p.numel() for p in leaves[name].parameters()),
            "macs": sum(operations.get(f"{type(model).__name__}.{name}", {}).values()) // 2,
            "activations": shape.numel() if isinstance(leaves[name], nn.Conv2d) else 0,
        }
        for name, shape in outputs.items()
    ]
    return {
        "name": name,
        "network": network_name(config.model),
        "classes": getattr(model.fc, "out_features", None),
        "image_size": size,
        "parameters": sum(p.numel() for p in model.parameters()),
        "macs": counter.get_total_flops() // 2,
        "activations": sum(layer["activations"] for layer in layers),
        "weight_bytes": sum(tensor.nbytes for tensor in model.state_dict().values()),
        "layers": layers,
    }


def training_bytes(model: "nn.Module", size: int) -> int:
    """Return the bytes that autograd keeps per image of a training batch in fp32; `model` is on meta.

    They are what 3 images keep less what 2 keep: weights and per-channel statistics, which do not grow with
    the batch, cancel out. A tensor that several layers keep counts once.
    """
    import torch
    import torch.nn.functional as F

    def kept(images: int) -> int:
        tensors = {}

        def pack(tensor: "Tensor") -> "Tensor":
            tensors[tensor.untyped_storage()._cdata] = tensor  # kept alive, so that no address is reused
            return tensor

        with torch.device("meta"), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            labels = torch.zeros(images, dtype=torch.long)
            F.cross_entropy(model(torch.empty(images, 3, size, size)), labels)
        return sum(tensor.untyped_storage().nbytes() for tensor in tensors.values())

    model.train()
    return kept(3) - kept(2)


# ---------------------------------------------------------------------------- printing


def table_of_networks(networks: list[Row]) -> str:
    header = ["configuration", "parameters", "GMACs", "activations (M)", "weights (MiB)", "input"]
    rows = [
        [
            network["name"],
            f"{network['parameters']:,}",
            f"{network['macs'] / 1e9:.3f}",
            f"{network['activations'] / 1e6:.2f}",
            f"{network['weight_bytes'] / MIB:.1f}",
            f"{network['image_size']} px",
        ]
        for network in networks
    ]
    return align(header, rows)


def table_of_layers(network: Row) -> str:
    size, weights = network["image_size"], network["weight_bytes"] / MIB
    columns = ["parameters", "macs", "activations"]
    rows = [
        [layer["module"], layer["kind"], " x ".join(map(str, layer["output"]))]
        + [f"{layer[column]:,}" if layer[column] else "" for column in columns]
        for layer in network["layers"]
    ]
    rows.append(["total", "", "", *(f"{network[column]:,}" for column in columns)])
    kept = network["training_bytes_per_image"] / MIB
    last = "no last layer" if network["classes"] is None else f"{network['classes']} classes"
    table = align(["module", "kind", "output", "parameters", "MACs", "activations"], rows, left=2)
    return f"""{network["name"]}: {network["network"]}, {last}, input 3 x {size} x {size}

{table}

weights: {weights:.1f} MiB in fp32, running statistics included
training: {kept:.1f} MiB per image of a batch, estimated: the activations that autograd keeps in fp32 for
the backward pass, counted in a forward pass without data; in addition, three times the weights
({3 * weights:.1f} MiB: weights, gradients, momentum) and workspace"""


def align(header: list[str], rows: list[list[str]], left: int = 1) -> str:
    """Return columns of even width, the first `left` of them aligned to the left."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = []
    for row in [header, ["-" * width for width in widths], *rows]:
        cells = [
            cell.ljust(width) if number < left else cell.rjust(width)
            for number, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


if __name__ == "__main__":
    run_main(main)
