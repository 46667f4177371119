"""What is about to run, in a few lines at the head of its log."""

from pathlib import Path

from ..config import DataConfig, network_name
from ..models.complexity import complexity
from .train_state import TrainState


def introduction(
    training: TrainState, train_images: int, val_images: int, output: Path, source: Path | None, resumed: bool
) -> str:
    """What is about to run, in a few lines."""
    config, progress = training.config, training.progress
    train = config.train
    parameters, macs = complexity(training.model, config.data.image_size)
    lines = [
        f"{network_name(config.model)}: {parameters:,} parameters, "
        f"{macs / 1e6:,.0f} M multiply-adds per image",
        f"{config.data.dataset}: {train_images:,} training and {val_images:,} validation images, "
        f"{len(training.classes)} classes, {config.data.image_size} pixels{view(config.data)}",
        f"global batch {train.batch_size}{processes(training)}, lr {config.optimizer.lr}, "
        f"{train.epochs} epochs, {train.precision} on {training.versions['device']}",
        f"run directory: {output}; top-1 and top-5 below are errors in percent",
    ]
    if source:
        lines.append(f"continuing from {source}: epoch {progress.epoch}, {progress.step} steps done")
    elif resumed:
        lines.append("nothing was saved in the run directory yet: starting from the beginning")
    return "\n".join(lines)


def processes(training: TrainState) -> str:
    """How many share a batch, for the introduction; nothing for one."""
    number = training.versions["processes"]
    return "" if number == "1" else f" of {number} processes"


def view(data: DataConfig) -> str:
    """How files become pictures, for the introduction; nothing for a set in memory."""
    if data.pipeline == "memory":
        return ""
    size = f" ({data.train_size} in training)" if data.train_size != data.image_size else ""
    return f"{size} from {data.resize}, {data.pipeline}, {data.decoder}"
