"""The data of an evaluation: a run's, with what the options of evaluate.py change."""

import argparse
from dataclasses import replace
from pathlib import Path

from resnext.config import IMAGE_FILES, Config, DataConfig
from resnext.errors import UserError

from .shard_files import is_sharded


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
    val_list = options.val_list or (None if options.data else data.val_list)  # it names the run's files
    # Files of images, not the CIFAR that a network with such a stem suggests.
    if not classes_known or data.dataset in IMAGE_FILES:
        if folder and not val_list and is_sharded(folder):
            data = replace(data, dataset="shards")
        elif val_list or data.dataset == "shards" or (Path(folder or "").expanduser() / "val").is_dir():
            data = replace(data, dataset="folder")
    if val_list and data.dataset != "folder":
        raise UserError(f"--val-list: names image files, and this run reads {data.dataset}; omit the option")
    if options.data and data.dataset == "glyphs":
        raise UserError(f"--data {options.data}: this run draws its images (glyphs); omit --data")
    return replace(
        data,
        dir=folder,
        val_list=val_list,
        image_size=size,
        resize=resize,
        interpolation=options.interpolation or data.interpolation,
        workers=data.workers if options.workers is None else options.workers,
        class_order=options.class_order,
        max_pixels=options.max_pixels or data.max_pixels,
    )
