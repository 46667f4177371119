"""Count what a training step does on a GPU, without one: operators, kernels, bytes moved, bytes saved.

    python scripts/count_step.py                     ResNeXt-50 32x4d, batch 256, bf16, channels_last
    python scripts/count_step.py model.depth=101 train.batch_size=128

The rows are ours with plain BatchNorm and in groups of 32, torchvision's and timm's (if installed) in
torchvision's reference loop. Steps run eagerly on fake tensors, which have shapes but no memory. "Moved" is
what operators read and write if nothing stays in the cache (traffic.py says how it is counted), "saved" what
the forward pass keeps for the backward pass. The largest batch is a bound: saved tensors, weights, their
gradients and momentum in 80 GB, nothing else. Steps under torch.compile, which makes other kernels, are not
counted.
"""

import contextlib
import importlib.util
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]  # its own folder too, for python -P
import torch
from benchmark_steps import CLASSES, foreign_networks, place, reference_step
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from traffic import Traffic

from resnext.config import Config, network_name, parse_config, to_yaml
from resnext.engine.train_state import build_train_state, parameter_groups
from resnext.engine.trainer import train_step
from resnext.errors import UserError, command_parser, run_main

CPU = torch.device("cpu")
MEMORY = 80e9  # bytes
GROUP = 32


def main() -> None:
    parser = command_parser(__doc__)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="change what is counted")
    arguments = parser.parse_args()
    base = ["data.dir=unused", "train.batch_size=256", "train.precision=bf16", "train.channels_last=true"]
    config = parse_config("", "count_step", [*base, *arguments.overrides])
    rows = list(counts(config))
    print(f"{network_name(config.model)}, batch {config.train.batch_size}, {config.train.precision}\n")
    print("| network | operators | kernels | GB moved | MB saved an image | largest batch in 80 GB |")
    print("|---|---|---|---|---|---|")
    for name, row in rows:
        print(
            f"| {name} | {row['operators']:,} | {row['kernels']:,} | {row['moved'] / 1e9:.1f} | "
            f"{row['saved'] / 1e6:.1f} | {row['largest batch']:,} |"
        )


def counts(config: Config) -> Iterator[tuple[str, dict[str, int]]]:
    """(name, counts) of the steps to compare."""
    train, size = config.train, config.train.batch_size
    uncounted = {  # they need values, or hide what they do
        f"precision={train.precision}": train.precision in ("fp16", "auto"),
        "ema_decay": train.ema_decay is not None,
        "accumulation_steps": train.accumulation_steps > 1,
        "activation_checkpointing": train.activation_checkpointing,
        "compile": train.compile,
    }
    if importlib.util.find_spec("triton") is None:
        raise UserError(
            "triton is not installed, which our kernels need; it comes with builds of torch for CUDA"
        )
    for key in (key for key, given in uncounted.items() if given):
        raise UserError(f"train.{key}: steps with it cannot be counted; leave it out")
    others = list(foreign_networks(config))
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
    for name, network in others:
        network = place(network, config, CPU)
        with pretended_gpu():
            make_fake(network)
            yield name, count(reference_step(network, config, CPU, *batch(config)), network, size)


def count(step: Callable[[], object], model: nn.Module, images: int) -> dict[str, int]:
    """Of one step after a first one, which makes the momentum."""
    step()
    saved = {}  # memory by its address; held, so that no other gets the same
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
    """New tensors are fake and say that they are a GPU's, to code that asks; so SGD takes its defaults there.

    They are the CPU's to PyTorch, whose backward pass would look for a driver.
    """
    sgd = "torch.optim.sgd._default_to_fused_or_foreach"
    with (
        mock.patch.object(FakeTensor, "is_cuda", True, create=True),
        mock.patch(sgd, lambda *_, **__: (False, True)),
        FakeTensorMode(shape_env=ShapeEnv(), static_shapes=True, allow_non_fake_inputs=True),
    ):
        yield


def make_fake(model: nn.Module) -> None:
    """Its parameters and buffers become new ones, of their shapes and strides."""

    def fake(tensor: Tensor) -> Tensor:
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)

    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            setattr(module, name, nn.Parameter(fake(parameter), parameter.requires_grad))
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, fake(buffer))


def batch(config: Config) -> tuple[Tensor, Tensor]:
    """Images as a loader makes them, and labels."""
    size, pixels = config.train.batch_size, config.data.image_size
    images = torch.empty(size, 3, pixels, pixels).contiguous(memory_format=torch.channels_last)
    return images, torch.zeros(size, dtype=torch.int64)


if __name__ == "__main__":
    run_main(main)
