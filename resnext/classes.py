"""The order of the classes: which output of a network answers to which class folder.

torchvision, mmpretrain and the original number folders in plain string order ("10" before "2", "Mango"
before "apple"), timm in natural order ("2" before "10", "apple" before "Mango"). Few files of weights name
their classes, so where the two orders differ one must know which program trained them.
"""

import re
from collections.abc import Collection, Iterable
from dataclasses import replace
from typing import Any

from .errors import UserError

# What weights of an origin were trained with; "torchvision or timm", which share their names, is open.
ORDERS = dict.fromkeys(("torchvision", "mmpretrain", "pycls", "bearpaw", "prlz77", "Torch7"), "string")
ORDERS["timm"] = "natural"
IMAGENET_OUTPUTS = 1000
USUAL_CLASSES = {"folder": 1000, "cifar10": 10, "cifar100": 100, "glyphs": 10}  # by data.dataset


def natural_key(name: str) -> list[tuple[int, int, str]]:
    """Sort key: numbers as numbers and ahead of text, text without regard to case (timm's natural_key)."""
    parts = re.findall(r"(\d+)|(\D+)", name.lower())
    return [(0, int(number), "") if number else (1, 0, text) for number, text in parts]


def sort_classes(names: Iterable[str], order: str | None = None) -> tuple[str, ...]:
    """Names as their folders number them: in string or natural order; None: string, but 0…N-1 as numbers."""
    names = sorted(names)
    if order == "natural":
        names.sort(key=natural_key)
    elif order is None and set(output_numbers(names, len(names)) or ()) == set(range(len(names))):
        names.sort(key=int)
    return tuple(names)


def output_numbers(names: Collection[str], outputs: int) -> dict[int, str] | None:
    """Output → name where all names are different numbers below `outputs`, else None."""
    if not all(re.fullmatch(r"[0-9]{1,9}", name) for name in names):
        return None
    numbers = {int(name): name for name in names}
    return numbers if len(numbers) == len(names) and max(numbers, default=0) < outputs else None


def name_outputs(
    names: Collection[str], outputs: int, origin: str, order: str | None, option: str
) -> tuple[tuple[str, ...], list[str]]:
    """(class names in the order of the outputs, warnings) for weights that do not name their classes.

    `names` are the class folders; numbers of 0…outputs-1 are the outputs that they say. `order` is the
    user's word on the order, given with `option`. Raises UserError where the orders differ and neither
    the user nor the origin says which it is.
    """
    string, natural = sort_classes(names, "string"), sort_classes(names, "natural")
    known = ORDERS.get(origin)
    numbers = output_numbers(names, outputs) if order is None else None
    if numbers is not None:
        numbered = tuple(numbers.get(output, str(output)) for output in range(outputs))
        sure = outputs == IMAGENET_OUTPUTS or string == numbered
        if known == "string" and len(names) == outputs and not sure:
            raise UserError(
                f"the class folders 0…{outputs - 1} may be the outputs' numbers, or classes in the order "
                f"of {origin}, {abbreviate(string)}; give {option}natural (numbers) or {option}string"
            )
        if known == "natural" or sure:
            return numbered, []
        return numbered, [
            f"warning: the class folders ({abbreviate(natural)}) are taken for the numbers of the network's "
            f"outputs; if it was trained on folders in the order {abbreviate(string)}, as by torchvision, give "
            f"{option}string"
        ]
    if len(names) != outputs:
        raise UserError(
            f"there are {len(names)} class folders, and the network has {outputs} classes, which its file "
            "does not name"
        )
    order = order or known
    if order is None and string != natural:
        raise UserError(
            f"the class folders are {abbreviate(natural)} in timm's order, {abbreviate(string)} in torchvision's, and "
            f"the weights do not say who trained them; give {option}natural (timm) or {option}string "
            "(torchvision, mmpretrain, this program)"
        )
    return (natural if order == "natural" else string), []


def abbreviate(names: tuple[str, ...]) -> str:
    """The first names, for a message."""
    return ", ".join(name[:40] for name in names[:4]) + (", …" if len(names) > 4 else "")


def name_classes(info: Any, names: tuple[str, ...], file: str) -> Any:
    """What is known of weights (weights.Info), with the user's names for their outputs."""
    if info.classes is not None:
        raise UserError(f"--class-names: {info.file} names its classes; leave the option out")
    if len(names) != info.outputs:
        raise UserError(
            f"--class-names {file}: names {len(names)} classes, and the network of {info.file} has "
            f"{info.outputs}; write one name a line, in the order of the outputs"
        )
    return replace(info, classes=names)
