"""Count what a training step does on a GPU, without a GPU: operators, kernels, bytes moved, bytes saved.

    python scripts/count_step.py                     ResNeXt-50 32x4d, batch 256, bf16, channels_last
    python scripts/count_step.py model.depth=101 train.batch_size=128

The rows are our network with plain BatchNorm and in groups of 32, and torchvision's and timm's (if
installed) in torchvision's reference loop. Steps run eagerly on fake tensors, which have shapes but no
memory. "Moved" is what operators read and write if nothing stays in the cache (see Traffic). "Saved" is what
the forward pass keeps for the backward pass. The largest batch is a bound: only saved tensors, weights,
gradients, and momentum count in the 80 GB. Steps under torch.compile, which creates other kernels, are not
counted.
"""

import contextlib
import importlib.util
import math
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]  # its own folder too, for python -P
import torch
from benchmark_steps import CLASSES, GROUP, reference_step, references
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from resnext.config import Config, network_name, parse_config, to_yaml
from resnext.engine.train_state import build_train_state, parameter_groups
from resnext.engine.trainer import train_step
from resnext.errors import UserError, command_parser, run_main

CPU = torch.device("cpu")
MEMORY = 80e9  # bytes

# Operators that only allocate memory, or view it.
FREE = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view"}
# Operators that do not read their first argument.
OVERWRITTEN = {"copy_", "fill_", "zero_", "zeros_like", "ones_like", "full_like", "new_zeros", "new_ones"}
OVERWRITTEN |= {"new_full"}
NORMS = {"native_batch_norm", "cudnn_batch_norm", "_native_batch_norm_legit", "_batch_norm_with_update"}
NORM_GRADIENTS = {"native_batch_norm_backward", "cudnn_batch_norm_backward", "batch_norm_backward"}
# For lists of tensors: tensors per launch by the number of lists, elements per block, blocks per launch.
LISTED, CHUNK, BLOCKS = {1: 110, 2: 64, 3: 48, 4: 36, 5: 30}, 65536, 320


def main() -> None:
    parser = command_parser(__doc__)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="change what is counted")
    arguments = parser.parse_args()
    base = ["data.dir=unused", "train.batch_size=256", "train.precision=bf16", "train.channels_last=true"]
    config = parse_config("", "count_step", [*base, *arguments.overrides])
    rows = list(counts(config))
    print(f"{network_name(config.model)}, batch {config.train.batch_size}, {config.train.precision}\n")
    print("| network | operators | kernels | GB moved | MB saved per image | largest batch in 80 GB |")
    print("|---|---|---|---|---|---|")
    for name, row in rows:
        print(
            f"| {name} | {row['operators']:,} | {row['kernels']:,} | {row['moved'] / 1e9:.1f} | "
            f"{row['saved'] / 1e6:.1f} | {row['largest batch']:,} |"
        )


def counts(config: Config) -> Iterator[tuple[str, dict[str, int]]]:
    """Yield (name, counts) of the steps to compare."""
    train, size = config.train, config.train.batch_size
    uncounted = {  # they need values, or hide what they do
        "precision": train.precision in ("fp16", "auto"),
        "ema_decay": train.ema_decay is not None,
        "accumulation_steps": train.accumulation_steps > 1,
        "activation_checkpointing": train.activation_checkpointing,
        "compile": train.compile,
    }
    if importlib.util.find_spec("triton") is None:
        raise UserError("triton: is not installed, and our kernels need it; install a CUDA build of torch")
    for key in (key for key, used in uncounted.items() if used):
        raise UserError(f"train.{key}: steps with {getattr(train, key)} cannot be counted; change the key")
    layout = torch.channels_last if train.channels_last else torch.contiguous_format
    others = [(name, make) for name, make, used, _ in references(config, CPU) if used == layout]
    variants = {"ours": []}
    if train.bn_group is None and size > GROUP and size % GROUP == 0:
        variants[f"ours, bn_group={GROUP}"] = [f"train.bn_group={GROUP}"]
    for name, overrides in variants.items():
        varied = parse_config(to_yaml(config), "count_step", overrides)
        with mock.patch("resnext.engine.train_state.kernels_work", lambda _: True):
            training = build_train_state(varied, tuple(map(str, range(CLASSES))), CPU, {})
        training.model.train()
        with pretended_gpu():
            make_fake(training.model)
            training.optimizer = torch.optim.SGD(
                parameter_groups(training.model, varied.optimizer), 0.1, varied.optimizer.momentum, fused=True
            )
            step = partial(train_step, training, *batch(varied), 0.1)
            yield name, count(step, training.model, size)
    for name, make in others:
        network = make().to(memory_format=layout)
        with pretended_gpu():
            make_fake(network)
            step = reference_step(network, config, CPU, *batch(config))
            yield name.partition(",")[0], count(step, network, size)


def count(step: Callable[[], object], model: nn.Module, images: int) -> dict[str, int]:
    """Return the counts of one step after a first one, which creates the momentum."""
    step()
    saved = {}  # storages by address; kept alive, so that no address is reused
    own = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            saved[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), Traffic() as traffic:
        step()
    kept = sum(storage.nbytes() for storage in saved.values())
    fixed = 3 * sum(p.nbytes for p in model.parameters())  # weights, gradients, momentum
    return {
        "operators": traffic.calls.total(),
        "kernels": traffic.kernels.total(),
        "moved": traffic.bytes.total(),
        "saved": kept // images,
        "largest batch": int((MEMORY - fixed) * images // kept),
    }


@contextlib.contextmanager
def pretended_gpu() -> Iterator[None]:
    """Create fake tensors that claim to be on a GPU, so that SGD also uses its defaults there.

    To PyTorch they are on the CPU: its backward pass would look for a driver otherwise.
    """
    sgd = "torch.optim.sgd._default_to_fused_or_foreach"
    with (
        mock.patch.object(FakeTensor, "is_cuda", True, create=True),
        mock.patch(sgd, lambda *_, **__: (False, True)),
        FakeTensorMode(shape_env=ShapeEnv(), static_shapes=True, allow_non_fake_inputs=True),
    ):
        yield


def make_fake(model: nn.Module) -> None:
    """Replace parameters and buffers by new ones of the same shapes and strides."""

    def fake(tensor: Tensor) -> Tensor:
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)

    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            setattr(module, name, nn.Parameter(fake(parameter), parameter.requires_grad))
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, fake(buffer))


def batch(config: Config) -> tuple[Tensor, Tensor]:
    """Return images in the layout of a loader, and labels."""
    size, pixels = config.train.batch_size, config.data.image_size
    images = torch.empty(size, 3, pixels, pixels).contiguous(memory_format=torch.channels_last)
    return images, torch.zeros(size, dtype=torch.int64)


# ---------------------------------------------------------------------------- bytes and kernels


class Traffic(TorchDispatchMode):
    """Counts calls, kernels, and bytes read and written of each operator except views.

    An operator reads each tensor among its arguments, and writes what it returns or changes. `extra_bytes`
    adds what some read twice.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.kernels: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        out = function(*args, **kwargs)
        name, returns = function._overloadpacket.__name__, function._schema.returns
        view = returns and all(r.alias_info is not None and not r.alias_info.is_write for r in returns)
        if function.namespace == "prim" or name in FREE or view:
            return out
        given, read, written = {}, [], []
        for number, argument in enumerate(function._schema.arguments):
            value = args[number] if number < len(args) else kwargs.get(argument.name)
            tensors = given[argument.name] = [t for t in pytree.tree_leaves(value) if isinstance(t, Tensor)]
            if not argument.is_out and not (name in OVERWRITTEN and number == 0):
                read += tensors
            # A fused optimizer changes gradients only if it unscales them.
            if argument.alias_info and argument.alias_info.is_write and argument.name != "grads":
                written += tensors
        there = {id(t) for t in written}
        written += [t for t in pytree.tree_leaves(out) if isinstance(t, Tensor) and id(t) not in there]
        if not read and not written:  # type queries, profiler marks
            return out
        self.calls[name] += 1
        self.kernels[name] += kernels(name, args, given)
        self.bytes[name] += sum(map(size, {id(t): t for t in read}.values())) + sum(map(size, written))
        self.bytes[name] += extra_bytes(name, args)
        return out


def size(tensor: Tensor) -> int:
    """Return the bytes of a tensor's elements; an expanded one has them in memory once."""
    lengths = [n for n, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride or not n]
    return math.prod(lengths) * tensor.element_size()


def extra_bytes(name: str, args: tuple) -> int:
    """Return the bytes beyond reading each argument once."""
    if name in NORMS or name == "norm_forward":  # statistics first, then the values
        return size(args[0])
    if name in NORM_GRADIENTS:  # the same for the gradient and the input
        return size(args[0]) + size(args[1])
    if name == "norm_backward":  # (dy, dy2, x, y, …, shortcut, relu) of models/fused_norm.py
        _, dy2, x, *_, shortcut, _ = args
        return size(x) * (2 if shortcut or dy2 is None else 3)  # a sum of two gradients is also written
    if name == "convolution_backward":  # reads the output's gradient for both others
        return size(args[0]) if args[-1][0] and args[-1][1] else 0
    if name == "max_pool2d_with_indices_backward":
        return -size(args[1])  # the indices suffice
    return 0


def kernels(name: str, args: tuple, given: dict[str, list[Tensor]]) -> int:
    """Return the kernels that an operator starts on a GPU; convolutions may start more of their own."""
    if name in NORMS or name in ("norm_forward", "norm_backward"):
        return 3
    if name in NORM_GRADIENTS:
        return 2
    if name == "convolution_backward":
        return sum(args[-1])
    if name == "max_pool2d_with_indices_backward":
        return 2  # zeros first
    if name.startswith(("_foreach", "_fused")):
        lists = [tensors for tensors in given.values() if len(tensors) > 1]
        if lists:
            blocks = sum(-(-t.numel() // CHUNK) for t in lists[0])
            return max(-(-len(lists[0]) // LISTED[len(lists)]), -(-blocks // BLOCKS))
    return 1


if __name__ == "__main__":
    run_main(main)
