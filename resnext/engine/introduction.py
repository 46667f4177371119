"""What is about to run, in a few lines at the head of its log."""

from pathlib import Path

from ..config import network_name
from ..models.complexity import complexity
from .train_state import TrainState


def introduction(
    training: TrainState, train_images: int, val_images: int, output: Path, source: Path | None, resumed: bool
) -> str:
    """Describe the network, the dataset, the recipe, and where the run goes and starts from."""
    config, progress, versions = training.config, training.progress, training.versions
    train, data = config.train, config.data
    parameters, macs = complexity(training.model, data.image_size)
    images = f"{data.image_size} pixels"
    if data.pipeline != "memory":
        size = f" ({data.train_size} in training)" if data.train_size != data.image_size else ""
        images += f"{size} from {data.resize}, {data.pipeline}, {data.decoder}"
    processes = "" if versions["processes"] == "1" else f" of {versions['processes']} processes"
    lines = [
        f"{network_name(config.model)}: {parameters:,} parameters, "
        f"{macs / 1e6:,.0f} M multiply-adds per image",
        f"{data.dataset}: {train_images:,} training and {val_images:,} validation images, "
        f"{len(training.classes)} classes, {images}",
        f"global batch {train.batch_size}{processes}, lr {config.optimizer.lr}, "
        f"{train.epochs} epochs, {train.precision} on {versions['device']}",
        f"run directory: {output}; top-1 and top-5 below are errors in percent",
    ]
    if source:
        lines.append(f"continuing from {source}: epoch {progress.epoch}, {progress.step} steps done")
    elif resumed:
        lines.append("nothing was saved in the run directory yet: starting from the beginning")
    return "\n".join(lines)
