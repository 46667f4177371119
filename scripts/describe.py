"""What networks cost: parameters, multiply-adds, activations, memory; in all or layer by layer.

    python scripts/describe.py                                  every configuration of configs/
    python scripts/describe.py resnext50_32x4d                  one of them, layer by layer
    python scripts/describe.py runs/demo --json layers.json     the same of a run or a file of weights

Multiply-adds (MACs) are those of convolutions and linear layers, activations the elements of the
convolutions' outputs (as the RegNet paper counts), both for one image. Nothing is trained or downloaded,
and only weights that are read take memory. Configurations of class folders count 1000 classes.
"""

import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from resnext.config import CONFIG_FOLDER, Config, find_config, network_name, read_config
from resnext.errors import UserError, command_parser, run_main
from resnext.files import check_source, check_target, write_file

CLASSES = {"folder": 1000, "cifar10": 10, "cifar100": 100, "glyphs": 10}
MIB = 2**20


def main() -> None:
    parser = command_parser(__doc__)
    parser.add_argument(
        "source", nargs="?", metavar="CONFIG|RUN|WEIGHTS", help="default: a table of all configurations"
    )
    parser.add_argument("--json", metavar="FILE", help="write the exact numbers there too")
    arguments = parser.parse_args()
    source = arguments.source
    check_arguments(source, arguments.json)
    result = all_networks() if source is None else one_network(source)
    text = table_of_networks(result) if source is None else table_of_layers(result)
    try:
        if arguments.json:
            write_file("--json", arguments.json, json.dumps(result, indent=2) + "\n")
    finally:
        print(text, flush=True)


def check_arguments(source: str | None, target: str | None) -> None:
    """What can be said before anything is computed."""
    if source is not None and not is_config(source) and not weights_exist(source):
        raise UserError(f"{source}: no such configuration, run directory or file of weights; check the path")
    if target is None:
        return
    check_target("--json", Path(target))
    if source is not None and Path(source).resolve() == Path(target).resolve():
        raise UserError(f"--json {target}: is what is described; name another file for the result")
    if Path(target).suffix in (".yaml", ".safetensors"):
        raise UserError(f"--json {target}: is called as a configuration or weights are; name a .json file")


def is_config(source: str) -> bool:
    """Whether a name means a configuration; the others are runs and weights."""
    path = Path(source)
    if path.suffix in (".yaml", ".yml"):
        return True
    return not weights_exist(source) and path.parent == Path() and not path.suffix


def weights_exist(source: str) -> bool:
    """Whether load_weights has something to look at."""
    try:
        check_source(source)
    except UserError:
        return False
    return True


def read_named(source: str) -> Config:
    """The configuration, from configs/ where the name has no folder."""
    try:
        return read_config(find_config(source))
    except UserError as error:  # which speaks of train.py's option
        raise UserError(str(error).removeprefix("--config ")) from None


# ---------------------------------------------------------------------------- counting


def totals(name: str, config: Config, model: Any = None) -> tuple[dict[str, Any], Any]:
    """(the costs of a network as JSON holds them, the network); `model` defaults to `config`'s, on meta."""
    import torch

    from resnext.models.complexity import complexity
    from resnext.models.resnext import build_model

    if model is None:
        with torch.device("meta"):
            model = build_model(config.model, config.model.classes or CLASSES[config.data.dataset])
    layers: list[dict[str, Any]] = []
    hooks = watch(model, layers)
    parameters, macs = complexity(model, config.data.image_size)
    for hook in hooks:
        hook.remove()
    costs = {
        "name": name,
        "network": network_name(config.model),
        "classes": getattr(model.fc, "out_features", None),
        "image_size": config.data.image_size,
        "parameters": parameters,
        "macs": macs,
        "activations": sum(layer["activations"] for layer in layers),
        "weight_bytes": sum(tensor.nbytes for tensor in model.state_dict().values()),
        "layers": layers,
    }
    return costs, model


def watch(model: Any, layers: list[dict[str, Any]]) -> list[Any]:
    """Hooks that append a row to `layers` for each module without parts that runs."""
    from torch import nn

    def row_of(name: str):
        def append(module: nn.Module, _: Any, output: Any) -> None:
            convolves = isinstance(module, nn.Conv2d)
            multiplies = convolves or isinstance(module, nn.Linear)
            layers.append(
                {
                    "module": name,
                    "kind": type(module).__name__,
                    "output": list(output.shape[1:]),
                    "parameters": sum(p.numel() for p in module.parameters()),
                    # each weight of a filter is used once at each place of the output
                    "macs": module.weight.numel() * output.shape[2:].numel() if multiplies else 0,
                    "activations": output.numel() if convolves else 0,
                }
            )

        return append

    return [
        module.register_forward_hook(row_of(name))
        for name, module in model.named_modules()
        if not list(module.children()) and not isinstance(module, nn.Identity)
    ]


def training_bytes(model: Any, size: int) -> int:
    """Bytes that autograd keeps for each image of a training batch in fp32; `model` is on meta.

    What 3 images keep less what 2 do: weights and per-channel statistics, which do not grow with the
    batch, cancel out. A tensor that several layers keep counts once.
    """
    import torch
    import torch.nn.functional as F
    from torch.autograd.graph import saved_tensors_hooks

    def kept(images: int) -> int:
        tensors = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            tensors[tensor.untyped_storage()._cdata] = tensor  # kept alive, so that no address comes twice
            return tensor

        with torch.device("meta"), saved_tensors_hooks(pack, lambda tensor: tensor):
            labels = torch.zeros(images, dtype=torch.long)
            F.cross_entropy(model(torch.empty(images, 3, size, size)), labels)
        return sum(tensor.untyped_storage().nbytes() for tensor in tensors.values())

    training = model.training
    model.train()
    try:
        return kept(3) - kept(2)
    finally:
        model.train(training)


def all_networks() -> list[dict[str, Any]]:
    """`totals` of every configuration, without the layers."""
    networks = []
    for path in sorted(CONFIG_FOLDER.glob("*.yaml")):
        network, _ = totals(path.stem, read_config(path))
        del network["layers"]
        networks.append(network)
    return networks


def one_network(source: str) -> dict[str, Any]:
    """`totals` and the memory of training for a configuration, a run or a file of weights."""
    if is_config(source):
        network, model = totals(source, read_named(source))
    else:
        from resnext import load_weights

        model, info = load_weights(source)
        network, model = totals(source, info.config, model.to("meta"))
    network["training_bytes_per_image"] = training_bytes(model, network["image_size"])
    return network


# ---------------------------------------------------------------------------- printing


def table_of_networks(networks: list[dict[str, Any]]) -> str:
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


def table_of_layers(network: dict[str, Any]) -> str:
    size, weights = network["image_size"], network["weight_bytes"] / MIB
    columns = ["parameters", "macs", "activations"]
    rows = [
        [
            layer["module"],
            layer["kind"],
            " x ".join(map(str, layer["output"])),
            *(f"{layer[column]:,}" if layer[column] else "" for column in columns),
        ]
        for layer in network["layers"]
    ]
    rows.append(["total", "", "", *(f"{network[column]:,}" for column in columns)])
    kept = network["training_bytes_per_image"] / MIB
    last = "no last layer" if network["classes"] is None else f"{network['classes']} classes"
    about = f"{network['network']}, {last}, input 3 x {size} x {size}"
    lines = [
        f"{network['name']}: {about}",
        "",
        align(["module", "kind", "output", "parameters", "MACs", "activations"], rows, left=2),
        "",
        f"weights: {weights:.1f} MiB in fp32, running statistics included",
        f"training: {kept:.1f} MiB for each image of a batch, estimated: the activations that autograd keeps",
        "in fp32 for the backward pass, counted in a forward pass without data; to that come three times",
        f"the weights ({3 * weights:.1f} MiB: they, their gradients, the momentum) and workspace",
    ]
    return "\n".join(lines)


def align(header: list[str], rows: list[list[str]], left: int = 1) -> str:
    """Columns of even width, the first `left` of them set to the left."""
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
