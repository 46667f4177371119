"""The state of a run: network, optimizer, loss scaler, EMA and progress; how it is built and saved."""

import contextlib
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from ..batch_plan import check_world_size, ghost_batches
from ..config import Config, OptimizerConfig, TrainConfig, to_yaml
from ..distributed import gradient_group, world_size
from ..errors import UserError
from ..models.ghost_batchnorm import kernels_work, use_ghost_batchnorm
from ..models.resnext import ResNeXt, build_model
from .evaluator import Row

Network = TypeVar("Network", bound=nn.Module)


@dataclass
class MetricSums:
    """Totals over training images: loss in nats, correct answers, images."""

    loss: float = 0.0
    top1: int = 0
    top5: int = 0
    images: int = 0

    def add(self, loss: float, top1: float, top5: float, images: int) -> None:
        """Add a step: mean loss, numbers of correct answers, number of images."""
        self.loss += loss * images
        self.top1 += int(top1)
        self.top5 += int(top5)
        self.images += images

    def as_row(self) -> dict[str, float]:
        """Return the mean loss, the errors in percent and the number of images."""
        return {
            "loss": self.loss / self.images,
            "top1_error": 100.0 * (self.images - self.top1) / self.images,
            "top5_error": 100.0 * (self.images - self.top5) / self.images,
            "images": self.images,
        }


@dataclass
class TrainProgress:
    """Where a run stands: plain numbers, stored in every checkpoint."""

    epoch: int = 1  # the epoch in progress
    step: int = 0  # finished steps of this epoch
    global_step: int = 0  # optimizer steps since the start
    interval: MetricSums = field(default_factory=MetricSums)  # since the last step row
    epoch_sums: MetricSums = field(default_factory=MetricSums)  # since the start of the epoch
    last: Row | None = None  # validation of the latest finished epoch
    best: Row | None = None  # validation of the epoch with the lowest top-1 error
    rows: int = 0  # rows of metrics.jsonl
    seconds: float = 0.0  # training and validation time

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "TrainProgress":
        sums = {name: MetricSums(**values[name]) for name in ("interval", "epoch_sums")}
        return cls(**values | sums)


class Average(AveragedModel):
    """Exponential moving average (EMA) of weights and running statistics; counters are the latest ones."""

    def __init__(self, model: nn.Module, decay: float):
        super().__init__(model)
        self.decay = decay

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        """Compute what get_ema_multi_avg_fn does, without waiting for the device in every step."""
        averaging = bool(self.n_averaged)
        averaged: list[tuple[Tensor, Tensor]] = []
        copied: list[tuple[Tensor, Tensor]] = []
        for kind in ("parameters", "buffers"):
            for own, latest in zip(getattr(self.module, kind)(), getattr(model, kind)(), strict=True):
                (averaged if averaging and own.is_floating_point() else copied).append((own, latest))
        if averaged:
            averages, values = zip(*averaged, strict=True)
            torch._foreach_lerp_(averages, values, 1 - self.decay)
        copies, values = zip(*copied, strict=True)
        torch._foreach_copy_(copies, values)
        self.n_averaged += 1


@dataclass
class TrainState:
    """The live objects of a run.

    `forward` is the model, compiled if configured, and wrapped in DistributedDataParallel if ranks exchange
    gradients.
    """

    config: Config
    classes: tuple[str, ...]
    versions: dict[str, str]
    device: torch.device
    model: ResNeXt
    forward: Callable[[Tensor], Tensor]
    criterion: nn.CrossEntropyLoss
    optimizer: torch.optim.SGD
    scaler: torch.amp.GradScaler
    ema: Average | None
    progress: TrainProgress

    def autocast(self) -> contextlib.AbstractContextManager:
        return autocast(self.device, self.config.train.precision)

    @property
    def layout(self) -> torch.memory_format:
        return memory_layout(self.config.train.channels_last, self.config.train.precision, self.device)

    @property
    def exchanges(self) -> bool:
        """Whether ranks exchange gradients."""
        return isinstance(self.forward, DistributedDataParallel)

    def exchange(self, last: bool) -> contextlib.AbstractContextManager:
        """Return the context of a micro-batch: ranks exchange gradients once, in the last one."""
        if last or not isinstance(self.forward, DistributedDataParallel):
            return contextlib.nullcontext()
        return self.forward.no_sync()

    def broadcast_buffers(self) -> None:
        """Give all ranks the running statistics of rank 0; they differ during training."""
        if isinstance(self.forward, DistributedDataParallel):
            for buffer in self.evaluated_model.buffers():
                dist.broadcast(buffer, 0, group=self.forward.process_group)

    @property
    def evaluated_model(self) -> nn.Module:
        """The network that is validated: the EMA if there is one."""
        return self.ema.module if self.ema else self.model


def autocast(device: torch.device, precision: str) -> contextlib.AbstractContextManager:
    """Return the context of a forward pass in a precision."""
    kind = {"fp32": None, "tf32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    return torch.autocast(device.type, kind) if kind else contextlib.nullcontext()


def memory_layout(channels_last: bool | None, precision: str, device: torch.device) -> torch.memory_format:
    """Return the layout of the network and its input images, which must agree or convolutions convert one.

    `channels_last` is the configuration key; None chooses by precision and device.
    """
    if channels_last is None:  # 1.5x faster on a CPU (docs/results.md)
        channels_last = device.type == "cpu" or precision in ("bf16", "fp16")
    return torch.channels_last if channels_last else torch.contiguous_format


def to_device(model: Network, config: Config, device: torch.device) -> Network:
    """Move a network to the device in the configured memory layout."""
    train = config.train
    layout = memory_layout(train.channels_last, train.precision, device)
    return model.to(device).to(memory_format=layout)


def build_train_state(
    config: Config, classes: tuple[str, ...], device: torch.device, versions: dict[str, str]
) -> TrainState:
    """Build the state of a new run from its configuration and seed."""
    train = config.train
    torch.manual_seed(config.run.seed)
    model = build_model(config.model, len(classes))
    model.activation_checkpointing = train.activation_checkpointing
    group = gradient_group(device, config.run.timeout)
    check_world_size(train, world_size())
    use_ghost_batchnorm(model, ghost_batches(train, world_size()) // world_size(), kernels_work(device))
    if train.frozen_stages is not None:
        model.freeze(train.frozen_stages)
    model = to_device(model, config, device)
    # The EMA is a deep copy, which SyncBatchNorm with its group does not allow: copy first.
    ema = None if train.ema_decay is None else Average(model, train.ema_decay)
    if train.sync_bn:
        if device.type != "cuda":
            raise UserError("train.sync_bn: needs GPUs; remove the key on a CPU")
        nn.SyncBatchNorm.convert_sync_batchnorm(model, group)  # in place
    optimizer = torch.optim.SGD(
        parameter_groups(model, config.optimizer),
        lr=config.optimizer.lr,
        momentum=config.optimizer.momentum,
        nesterov=config.optimizer.nesterov,
        fused=True if device.type == "cuda" else None,
    )
    init_momentum(optimizer)
    # Static shapes give one graph per batch size. With DDP outside, graphs end where its buckets end, and
    # gradients are exchanged during the backward pass.
    compiled: nn.Module = model
    if train.compile:
        compiled = cast(nn.Module, torch.compile(model, dynamic=False, mode=compile_mode(train, device)))
    return TrainState(
        config=config,
        classes=classes,
        versions=versions,
        device=device,
        model=model,
        forward=distribute(compiled, device, group),
        criterion=nn.CrossEntropyLoss(label_smoothing=train.label_smoothing),
        optimizer=optimizer,
        # At torch's default, 2**16, the first gradients of ResNeXt-50 overflow fp16.
        scaler=torch.amp.GradScaler(device.type, init_scale=2.0**10, enabled=train.precision == "fp16"),
        ema=ema,
        progress=TrainProgress(),
    )


def compile_mode(train: TrainConfig, device: torch.device) -> str:
    """Return torch.compile's mode: CUDA graphs where gradients live for a single forward and backward pass.

    A small network waits for the launches of its kernels; a graph launches them all at once.
    """
    graphs = device.type == "cuda" and train.accumulation_steps == 1 and world_size() == 1
    return "reduce-overhead" if graphs else "default"


def distribute(model: nn.Module, device: torch.device, group: dist.ProcessGroup | None) -> nn.Module:
    """Wrap a model in DistributedDataParallel if there is a group."""
    if group is None:
        return model
    wrapped = DistributedDataParallel(
        model,
        device_ids=[device] if device.type == "cuda" else None,
        gradient_as_bucket_view=True,
        process_group=group,
    )
    # Running statistics may differ until TrainState.broadcast_buffers. torch renamed the argument for this.
    wrapped.broadcast_buffers = False
    return wrapped


def parameter_groups(model: ResNeXt, optimizer: OptimizerConfig) -> list[dict[str, Any]]:
    """Return SGD's parameter groups; BatchNorm and the last layer are separate if configured separately."""
    norms, head, norm_weight_decay, head_scale = set(), set(), optimizer.weight_decay, 1.0
    if optimizer.norm_weight_decay is not None:
        found = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        norms = {id(parameter) for norm in found for parameter in norm.parameters()}
        norm_weight_decay = optimizer.norm_weight_decay
    if optimizer.head_lr is not None:
        head = set(map(id, model.fc.parameters()))
        head_scale = optimizer.head_lr / optimizer.lr
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for parameter in filter(lambda p: p.requires_grad, model.parameters()):
        groups.setdefault((id(parameter) in norms, id(parameter) in head), []).append(parameter)
    return [
        {
            "params": parameters,
            "weight_decay": norm_weight_decay if is_norm else optimizer.weight_decay,
            "lr_scale": head_scale if is_head else 1.0,
        }
        for (is_norm, is_head), parameters in groups.items()
    ]


def init_momentum(optimizer: torch.optim.SGD) -> None:
    """Give every trained parameter its momentum in the parameter's memory layout; new ones are 0.

    SGD would create momentum in its first step. If the loss scaler skips that step, the fused SGD leaves it
    uninitialized. The fused step also assumes that the strides equal the parameter's.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"] if group["momentum"] else ():
            state = optimizer.state[parameter]
            fresh, before = torch.zeros_like(parameter), state.get("momentum_buffer")
            state["momentum_buffer"] = fresh if before is None else fresh.copy_(before)


def checkpoint_content(training: TrainState) -> dict[str, Any]:
    """Return the state as the plain dict that checkpoint.write_checkpoint stores."""
    data = training.config.data
    cuda = torch.cuda.get_rng_state() if training.device.type == "cuda" else None
    return {
        "model": training.model.state_dict(),
        "optimizer": training.optimizer.state_dict(),
        "scaler": training.scaler.state_dict() or None,
        "ema": training.ema.state_dict() if training.ema else None,
        "progress": asdict(training.progress),
        "rng": {"cpu": torch.get_rng_state(), "cuda": cuda},
        "config": to_yaml(training.config),
        "classes": list(training.classes),
        "preprocessing": {"image_size": data.image_size, "mean": list(data.mean), "std": list(data.std)},
        "versions": training.versions,
    }
