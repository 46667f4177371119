"""The state of a run: network, optimiser, scaler, average and progress, made and restored."""

import contextlib
import inspect
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from ..batch_plan import check_world_size
from ..config import Config, OptimizerConfig, to_yaml
from ..distributed import gradient_group, world_size
from ..errors import UserError
from ..models.ghost_batchnorm import kernels_work, use_ghost_batchnorm
from ..models.resnext import ResNeXt, build_model


@dataclass
class MetricSums:
    """Totals over training images: loss in nats, correct answers, images."""

    loss: float = 0.0
    top1: int = 0
    top5: int = 0
    images: int = 0

    def add(self, loss: float, top1: float, top5: float, images: int) -> None:
        self.loss += loss * images
        self.top1 += int(top1)
        self.top5 += int(top5)
        self.images += images

    def as_row(self) -> dict[str, float]:
        return {
            "loss": self.loss / self.images,
            "top1_error": 100.0 * (self.images - self.top1) / self.images,
            "top5_error": 100.0 * (self.images - self.top5) / self.images,
            "images": self.images,
        }


@dataclass
class TrainProgress:
    """Where a run stands; plain numbers, kept in every checkpoint."""

    epoch: int = 1  # the epoch in progress
    step: int = 0  # steps of it that are done
    global_step: int = 0  # optimiser steps since the start
    interval: MetricSums = field(default_factory=MetricSums)  # since the last step row
    epoch_sums: MetricSums = field(default_factory=MetricSums)  # since the start of the epoch
    last: dict[str, Any] | None = None  # validation of the latest finished epoch
    best: dict[str, Any] | None = None  # and of the one with the lowest top-1 error
    rows: int = 0  # rows of metrics.jsonl
    seconds: float = 0.0  # training and validation time

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "TrainProgress":
        values = dict(values)
        for name in ("interval", "epoch_sums"):
            values[name] = MetricSums(**values[name])
        return cls(**values)


class Average(AveragedModel):
    """Exponential average of a network's weights and running statistics, and the counters of the latest."""

    def __init__(self, model: nn.Module, decay: float):
        super().__init__(model)
        self.decay = decay

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        """As AveragedModel with get_ema_multi_avg_fn, which would wait for the device in each step."""
        averaging, averaged, copied = bool(self.n_averaged), [], []
        for kind in ("parameters", "buffers"):
            for own, latest in zip(getattr(self.module, kind)(), getattr(model, kind)(), strict=True):
                (averaged if averaging and own.is_floating_point() else copied).append((own, latest))
        if averaged:
            torch._foreach_lerp_(*zip(*averaged, strict=True), 1 - self.decay)
        torch._foreach_copy_(*zip(*copied, strict=True))
        self.n_averaged += 1


@dataclass
class TrainState:
    """The live objects of a run.

    `forward` is the model, compiled where that is asked for, and in DistributedDataParallel where
    processes exchange gradients.
    """

    config: Config
    classes: tuple[str, ...]
    versions: dict[str, str]
    device: torch.device
    model: nn.Module
    forward: Callable[[Tensor], Tensor]
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    ema: Average | None
    progress: TrainProgress

    def autocast(self) -> contextlib.AbstractContextManager:
        return autocast(self.device, self.config.train.precision)

    @property
    def layout(self) -> torch.memory_format:
        return memory_layout(self.config, self.device)

    @property
    def exchanges(self) -> bool:
        """Whether gradients are averaged over processes."""
        return isinstance(self.forward, DistributedDataParallel)

    def exchange(self, last: bool) -> contextlib.AbstractContextManager:
        """The context of an accumulation part: gradients are exchanged once, in the last."""
        return contextlib.nullcontext() if last or not self.exchanges else self.forward.no_sync()

    def broadcast_buffers(self) -> None:
        """Running statistics, which differ in training, become those of the first process everywhere."""
        if self.exchanges:
            for buffer in self.evaluated_model.buffers():
                dist.broadcast(buffer, 0, group=self.forward.process_group)

    @property
    def evaluated_model(self) -> nn.Module:
        """What validation and best.pt speak of: the averaged weights where there are any."""
        return self.ema.module if self.ema else self.model


def autocast(device: torch.device, precision: str) -> contextlib.AbstractContextManager:
    """The context in which a forward pass runs at a precision."""
    kind = {"fp32": None, "tf32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    return torch.autocast(device.type, kind) if kind else contextlib.nullcontext()


def memory_layout(config: Config, device: torch.device) -> torch.memory_format:
    """That of the network, and of images ahead of its forward pass: else convolutions convert one of them."""
    channels_last = config.train.channels_last
    if channels_last is None:  # 1.5x faster on a CPU (docs/results.md)
        channels_last = device.type == "cpu" or config.train.precision in ("bf16", "fp16")
    return torch.channels_last if channels_last else torch.contiguous_format


def to_device(model: nn.Module, config: Config, device: torch.device) -> nn.Module:
    """Move a network to the device in the configured memory layout."""
    return model.to(device=device, memory_format=memory_layout(config, device))


def build_train_state(
    config: Config, classes: tuple[str, ...], device: torch.device, versions: dict[str, str]
) -> TrainState:
    """A fresh run: network, optimiser, scaler and average, from the seed."""
    train = config.train
    torch.manual_seed(config.run.seed)
    model = build_model(config.model, len(classes))
    model.activation_checkpointing = train.activation_checkpointing
    group = gradient_group(device, config.run.timeout)
    check_world_size(train, world_size())
    groups = 1
    if train.bn_group is not None:
        groups = train.batch_size // train.accumulation_steps // train.bn_group // world_size()
    use_ghost_batchnorm(model, groups, kernels_work(device))
    if train.frozen_stages is not None:
        model.freeze(train.frozen_stages)
    model = to_device(model, config, device)
    ema = None
    if train.ema_decay is not None:  # a copy, which SyncBN with its group would not allow
        ema = Average(model, train.ema_decay)
    if train.sync_bn:
        if device.type != "cuda":
            raise UserError("train.sync_bn: needs GPUs; remove the key on a CPU")
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model, group)
    optimizer = torch.optim.SGD(
        parameter_groups(model, config.optimizer),
        lr=config.optimizer.lr,
        momentum=config.optimizer.momentum,
        nesterov=config.optimizer.nesterov,
        fused=True if device.type == "cuda" else None,
    )
    init_momentum(optimizer)
    # Static shapes: one graph for each batch size. DDP outside: graphs then end where its buckets do, and
    # their gradients are exchanged during the backward pass.
    compiled = torch.compile(model, dynamic=False) if train.compile else model
    return TrainState(
        config=config,
        classes=classes,
        versions=versions,
        device=device,
        model=model,
        forward=distribute(compiled, device, group),
        optimizer=optimizer,
        # At torch's 2**16 the first gradients of ResNeXt-50 overflow fp16.
        scaler=torch.amp.GradScaler(device.type, init_scale=2.0**10, enabled=train.precision == "fp16"),
        ema=ema,
        progress=TrainProgress(),
    )


def distribute(model: nn.Module, device: torch.device, group: Any) -> nn.Module:
    """The model in DistributedDataParallel where there is a group."""
    if group is None:
        return model
    known = inspect.signature(DistributedDataParallel).parameters
    buffers = (
        "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    )  # older torch
    return DistributedDataParallel(
        model,
        device_ids=[device] if device.type == "cuda" else None,
        gradient_as_bucket_view=True,
        process_group=group,
        **{buffers: False},  # see Training.settle_buffers
    )


def parameter_groups(model: ResNeXt, optimizer: OptimizerConfig) -> list[dict[str, Any]]:
    """What is learned, as one group; BatchNorm's and the last layer's apart where keys of theirs say how."""
    norms, head = set(), set()
    if optimizer.norm_weight_decay is not None:
        found = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        norms = {id(parameter) for norm in found for parameter in norm.parameters()}
    if optimizer.head_lr is not None:
        head = set(map(id, model.fc.parameters()))
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for parameter in filter(lambda p: p.requires_grad, model.parameters()):
        groups.setdefault((id(parameter) in norms, id(parameter) in head), []).append(parameter)
    return [
        {
            "params": parameters,
            "weight_decay": optimizer.norm_weight_decay if is_norm else optimizer.weight_decay,
            "lr_scale": optimizer.head_lr / optimizer.lr if is_head else 1.0,
        }
        for (is_norm, is_head), parameters in groups.items()
    ]


def init_momentum(optimizer: torch.optim.SGD) -> None:
    """Give every learned parameter its momentum, in the parameter's memory layout; 0 where there was none.

    SGD makes it in its first step, the fused one without a value where the loss scaler skips that step; and
    the fused step takes other strides for the parameter's.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"] if group["momentum"] else ():
            state = optimizer.state[parameter]
            fresh, before = torch.zeros_like(parameter), state.get("momentum_buffer")
            state["momentum_buffer"] = fresh if before is None else fresh.copy_(before)


def checkpoint_content(training: TrainState) -> dict[str, Any]:
    """The state as the plain dict that checkpoint.write_checkpoint stores."""
    data = training.config.data
    cuda = training.device.type == "cuda"
    return {
        "model": training.model.state_dict(),
        "optimizer": training.optimizer.state_dict(),
        "scaler": training.scaler.state_dict() or None,
        "ema": training.ema.state_dict() if training.ema else None,
        "progress": asdict(training.progress),
        "rng": {
            "cpu": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state() if cuda else None,
        },
        "config": to_yaml(training.config),
        "classes": list(training.classes),
        "preprocessing": {
            "image_size": data.image_size,
            "mean": list(data.mean),
            "std": list(data.std),
        },
        "versions": training.versions,
    }
