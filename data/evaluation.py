"""The data of an evaluation: a run's, with what the options of evaluate.py change."""

from dataclasses import replace
from pathlib import Path
from typing import Literal

from resnext.config import Config, DataConfig
from resnext.errors import UserError

DATA_OPTIONS = (
    "folder",
    "ten_crop",
    "image_size",
    "resize",
    "interpolation",
    "workers",
    "class_order",
    "max_pixels",
)


def evaluation_data(
    config: Config,
    *,
    classes_known: bool = True,
    folder: str | None = None,
    ten_crop: bool = False,
    image_size: int | None = None,
    resize: int | None = None,
    interpolation: Literal["bilinear", "bicubic"] | None = None,
    workers: int | None = None,
    class_order: Literal["string", "natural"] | None = None,
    max_pixels: int | None = None,
) -> DataConfig:
    """Return the data section of the weights' configuration with the given options; None changes nothing.

    `classes_known` says whether the file of weights names its classes.
    """
    data = config.data
    if data.pipeline == "memory":
        files_only = {
            "--ten-crop": ten_crop,
            "--image-size": image_size,
            "--resize": resize,
            "--interpolation": interpolation,
        }
        for option in (option for option, value in files_only.items() if value):
            raise UserError(
                f"{option}: works on files, and this dataset is in memory at {data.image_size} pixels "
                "(data.pipeline); omit the option"
            )
    size = image_size or data.image_size
    resize = resize or size * data.resize // data.image_size
    if image_size and config.model.stem == "imagenet" and size < 32:
        raise UserError(f"--image-size: {size} is less than the network's stride; use 32 or more")
    if resize < size:
        raise UserError(f"--resize: {resize} is less than the crop of {size}; raise it")
    folder = folder or data.dir
    # A folder with val/ is an image folder, not the CIFAR that a network with such a stem suggests.
    is_folder = not classes_known and (Path(folder or "").expanduser() / "val").is_dir()
    return replace(
        data,
        dataset="folder" if is_folder else data.dataset,
        dir=folder,
        image_size=size,
        resize=resize,
        interpolation=interpolation or data.interpolation,
        workers=data.workers if workers is None else workers,
        class_order=class_order,
        max_pixels=max_pixels or data.max_pixels,
    )
