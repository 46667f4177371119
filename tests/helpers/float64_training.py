"""Four training steps in float64: by the program on any number of ranks, and by hand as a plain loop.

`torchrun.Processes` runs the functions; each writes what it trained, by the names of `run_files.tensors`.
"""

import re
from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from run_files import digest, tensors
from torch import Tensor, nn

from resnext.batch_plan import local_indices
from resnext.config import Config, parse_config
from resnext.distributed import all_gather_objects, process_group, rank, sum_over_ranks
from resnext.engine.train_state import build_train_state
from resnext.engine.trainer import train_step, warm_up_ddp
from resnext.models.resnext import build_model

BATCHES = (64, 64, 37, 3)
CLIP, DECAY, MOMENTUM, WEIGHT_DECAY, SMOOTHING, RATES = 2.0, 0.7, 0.9, 1e-3, 0.1, (0.1, 0.05, 0.02, 0.01)


def configuration(accumulation: int, bn_group: int) -> Config:
    return parse_config(
        f"""
        model: {{stem: cifar, depth: 11, cardinality: 2, base_width: 4}}
        data: {{dataset: glyphs, image_size: 8}}
        train: {{batch_size: 64, accumulation_steps: {accumulation}, bn_group: {bn_group},
                 clip_grad_norm: {CLIP}, ema_decay: {DECAY}, label_smoothing: {SMOOTHING}}}
        optimizer: {{momentum: {MOMENTUM}, weight_decay: {WEIGHT_DECAY}}}
        run: {{seed: 3}}
        """,
        "test",
    )


def batches() -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    for count in BATCHES:
        images = torch.randn(count, 3, 8, 8, dtype=torch.float64, generator=generator)
        yield images, torch.randint(10, (count,), generator=generator)


def train_by_program(accumulation: int, bn_group: int, target: str) -> None:
    """Take the program's own steps on each rank, and check that the ranks agree."""
    torch.set_default_dtype(torch.float64)
    config = configuration(accumulation, bn_group)
    results = []
    with process_group(60):
        ours = build_train_state(config, tuple("0123456789"), torch.device("cpu"), {})
        warm_up_ddp(ours)
        ours.model.train()
        for (images, labels), rate in zip(batches(), RATES, strict=True):
            own = torch.from_numpy(local_indices(len(images), config.train))
            results.append(sum_over_ranks(train_step(ours, images[own], labels[own], rate, len(images))))
        parts = {name: getattr(ours, name).state_dict() for name in ("model", "ema", "optimizer")}
        found = tensors(parts)
        learned = [found[name] for name in found if not re.search("running|num_batches", name)]
        assert len(set(all_gather_objects(digest(learned)))) == 1, "weights, momentum or EMA differ"
        before = digest(ours.ema.module.buffers())
        ours.broadcast_buffers()
        settled = all_gather_objects(digest(ours.ema.module.buffers()))
        assert len(set(settled)) == 1
        if rank() == 0:
            assert settled[0] == before, "those of rank 0"
            torch.save(found | {"results": torch.stack(results)}, target)


class BatchNormByHand(nn.Module):
    """BatchNorm over slices of the batch as numpy cuts them; running statistics from the first slice."""

    def __init__(self, norm: nn.BatchNorm2d, slices: int):
        super().__init__()
        self.weight, self.bias, self.slices, self.eps = norm.weight, norm.bias, slices, norm.eps
        self.mean, self.var = norm.running_mean.clone(), norm.running_var.clone()

    def forward(self, x: Tensor) -> Tensor:
        out = []
        for indices in np.array_split(np.arange(len(x)), self.slices):
            part = x[indices]
            if not len(part):
                continue
            mean = part.mean((0, 2, 3), keepdim=True)
            squares = ((part - mean) ** 2).mean((0, 2, 3), keepdim=True)
            out.append((part - mean) / (squares + self.eps).sqrt())
            if len(out) == 1:
                count = part.numel() / part.shape[1]
                unbiased = squares.detach().flatten() * count / (count - 1)
                self.mean = 0.9 * self.mean + 0.1 * mean.detach().flatten()
                self.var = 0.9 * self.var + 0.1 * unbiased
        return torch.cat(out) * self.weight[:, None, None] + self.bias[:, None, None]


def train_by_hand(accumulation: int, bn_group: int, target: str) -> None:
    """Take the same steps as a plain loop over whole batches: one mean loss, one backward pass."""
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(3)
    model = build_model(configuration(accumulation, bn_group).model, 10)
    norms = {}
    for name, norm in [(n, m) for n, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)]:
        norms[name] = BatchNormByHand(norm, 64 // bn_group)
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, norms[name])
    parameters = dict(model.named_parameters())
    momenta = [torch.zeros_like(p) for p in parameters.values()]
    averages: list[Tensor] = []
    results = []
    for (images, labels), rate in zip(batches(), RATES, strict=True):
        output = model(images)
        smoothed = (1 - SMOOTHING) * F.one_hot(labels, 10) + SMOOTHING / 10
        loss = -(smoothed * output.log_softmax(1)).sum(1).mean()
        gradients = torch.autograd.grad(loss, list(parameters.values()))
        total = torch.sqrt(sum((gradient**2).sum() for gradient in gradients))
        assert total > CLIP, "nothing is clipped, which this should test"
        with torch.no_grad():
            for parameter, momentum, gradient in zip(parameters.values(), momenta, gradients, strict=True):
                gradient = gradient * (CLIP / (total + 1e-6)) + WEIGHT_DECAY * parameter
                momentum.mul_(MOMENTUM).add_(gradient)
                parameter -= rate * (gradient + MOMENTUM * momentum)  # Nesterov
        right = output.argsort(1, descending=True) == labels[:, None]
        results.append(torch.stack([loss.detach(), right[:, 0].sum(), right[:, :5].sum()]))
        now = [p.detach().clone() for p in parameters.values()]
        averages = [DECAY * a + (1 - DECAY) * p for a, p in zip(averages or now, now, strict=True)]
    found = {f"model/{name}": p.detach() for name, p in parameters.items()}
    found |= {f"ema/module.{name}": a for name, a in zip(parameters, averages, strict=True)}
    found |= {f"momentum/{number}": momentum for number, momentum in enumerate(momenta)}
    found |= {f"model/{name}.running_mean": norm.mean for name, norm in norms.items()}
    found |= {f"model/{name}.running_var": norm.var for name, norm in norms.items()}
    torch.save(found | {"results": torch.stack(results)}, target)
