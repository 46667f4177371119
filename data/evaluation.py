"""The data of an evaluation: a run's, with what the options of evaluate.py change."""

import argparse
from dataclasses import replace
from pathlib import Path

from resnext.config import Config, DataConfig
from resnext.errors import UserError


def evaluation_data(config: Config, classes_known: bool, options: argparse.Namespace) -> DataConfig:
    """Return the data section of the weights' configuration with evaluate.py's options in it.

    `classes_known` says whether the file of weights names its classes.
    """
    data = config.data
    if data.pipeline == "memory":
        for name in ("ten_crop", "image_size", "resize", "interpolation"):
            if getattr(options, name):
                raise UserError(
                    f"--{name.replace('_', '-')}: works on files, and this dataset is in memory at "
                    f"{data.image_size} pixels (data.pipeline); omit the option"
                )
    size = options.image_size or data.image_size
    resize = options.resize or size * data.resize // data.image_size
    if options.image_size and config.model.stem == "imagenet" and size < 32:
        raise UserError(f"--image-size: {size} is less than the network's stride; use 32 or more")
    if resize < size:
        raise UserError(f"--resize: {resize} is less than the crop of {size}; raise it")
    folder = options.data or data.dir
    # A folder with val/ is an image folder, not the CIFAR that a network with such a stem suggests.
    has_val = (Path(folder or "").expanduser() / "val").is_dir()
    is_folder = not classes_known and (has_val or bool(options.val_list))
    if options.val_list and data.dataset != "folder" and not is_folder:
        raise UserError(f"--val-list: names image files, and this run reads {data.dataset}; omit the option")
    if options.data and data.dataset == "glyphs" and not is_folder:
        raise UserError(f"--data {options.data}: this run draws its images (glyphs); omit --data")
    return replace(
        data,
        dataset="folder" if is_folder else data.dataset,
        dir=folder,
        val_list=options.val_list or (None if options.data else data.val_list),  # it names the run's files
        image_size=size,
        resize=resize,
        interpolation=options.interpolation or data.interpolation,
        workers=data.workers if options.workers is None else options.workers,
        class_order=options.class_order,
        max_pixels=options.max_pixels or data.max_pixels,
    )
