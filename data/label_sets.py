"""Test sets in which several outputs of a network are right for an image: ReaL and ObjectNet.

ReaL's real.json is a list: the right outputs of ILSVRC2012_val_00000001, 2, …; 3,163 images have none.
ObjectNet's folder mappings/ tells which class folders show which of ImageNet's classes. Its images have a red
border, which is cut off as by its own loader. Images without right outputs are not scored.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from resnext.errors import UserError

from .decode import decode
from .image_folder import ImageFolderDataset
from .imagenet_archives import imagenet_classes, val_name
from .lists import read_text

BORDER = 2  # pixels on each side of ObjectNet's images
OPTION = "--real-labels"


@dataclass(frozen=True)
class LabelSets:
    """The right outputs of images, by the name of the image or of its class folder."""

    source: str
    outputs: dict[str, list[int]]
    by_folder: bool

    def of(self, name: str) -> list[int]:
        """Return the right outputs of an image, perhaps none; `name` is its path below val/."""
        if self.by_folder:
            return self.outputs.get(name.partition("/")[0], [])
        found = re.search("ILSVRC2012_val_[0-9]{8}", name)
        return self.outputs.get(found[0], []) if found else []


class ObjectNetFiles(ImageFolderDataset):
    """Images that are read without their border, as PPM files."""

    def read(self, i: int, largest: int | None = None) -> bytes:
        pixels = decode(super().read(i, largest), self.path(i))[BORDER:-BORDER, BORDER:-BORDER]
        height, width, _ = pixels.shape
        return b"P6 %d %d 255\n" % (width, height) + np.ascontiguousarray(pixels).tobytes()


def read_label_sets(source: str) -> LabelSets:
    """Read ReaL's real.json, or ObjectNet's folder mappings/."""
    try:
        by_folder = Path(source).is_dir()
        outputs = _objectnet(source) if by_folder else _real(source)
        valid = range(len(imagenet_classes()))
        if not all(type(output) is int and output in valid for group in outputs.values() for output in group):
            raise ValueError("an output is not a number from 0 to 999")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        text = f"is neither ReaL's real.json nor ObjectNet's mappings/ ({error!r:.100})"
        raise UserError(f"{OPTION} {source}: {text}; download it again") from None
    return LabelSets(source, outputs, by_folder)


def _real(file: str) -> dict[str, list[int]]:
    groups = json.loads(read_text(OPTION, file))
    if not isinstance(groups, list):
        raise ValueError("not a list")
    return {Path(val_name(number)).stem: group for number, group in enumerate(groups, 1)}


def _objectnet(folder: str) -> dict[str, list[int]]:
    """Return class folder → outputs: by the label of a folder, names of classes, and their devkit lines."""

    def read(name: str) -> dict:
        return json.loads(read_text(OPTION, f"{folder}/{name}.json"))

    labels, classes = read("folder_to_objectnet_label"), read("objectnet_to_imagenet_1k")
    output = {line: int(number) for number, line in read("pytorch_to_imagenet_2012_id").items()}
    names = read_text(OPTION, f"{folder}/imagenet_to_label_2012_v2").split("\n")
    lines = {name.strip(): line for line, name in enumerate(names)}
    return {
        name: [output[lines[word]] for word in classes[label].split("; ")]
        for name, label in labels.items()
        if label in classes
    }
