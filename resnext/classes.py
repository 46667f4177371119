"""The order of the classes: which output of a network belongs to which class folder.

torchvision, mmpretrain and the original number folders in string order ("10" before "2", "Mango" before
"apple"), timm in natural order ("2" before "10", "apple" before "Mango"). Few weights files name their
classes, so if the two orders differ one must know which program trained them.
"""

import re
from collections.abc import Collection, Iterable, Sequence

from .errors import UserError

# The order per origin of weights. "torchvision or timm", which share parameter names, is undecided.
ORDERS = dict.fromkeys(("torchvision", "mmpretrain", "pycls", "bearpaw", "prlz77", "Torch7"), "string")
ORDERS["timm"] = "natural"
IMAGENET_OUTPUTS = 1000
# By data.dataset.
USUAL_CLASSES = {"folder": 1000, "shards": 1000, "cifar10": 10, "cifar100": 100, "glyphs": 10}


def natural_key(name: str) -> list[tuple[int, int, str]]:
    """Return timm's sort key: numbers as numbers and before text, text without regard to case."""
    parts = re.findall(r"(\d+)|(\D+)", name.lower())
    return [(0, int(number), "") if number else (1, 0, text) for number, text in parts]


def sort_classes(names: Iterable[str], order: str | None = None) -> tuple[str, ...]:
    """Sort names in string or natural order; None: string, except that 0…N-1 are sorted as numbers."""
    names = sorted(names)
    if order == "natural":
        names.sort(key=natural_key)
    elif order is None and set(output_numbers(names, len(names)) or ()) == set(range(len(names))):
        names.sort(key=int)
    return tuple(names)


def output_numbers(names: Collection[str], outputs: int) -> dict[int, str] | None:
    """Return output → name if all names are different numbers below `outputs`, else None."""
    if not all(re.fullmatch(r"[0-9]{1,9}", name) for name in names):
        return None
    numbers = {int(name): name for name in names}
    return numbers if len(numbers) == len(names) and max(numbers, default=0) < outputs else None


def name_outputs(
    names: Collection[str], outputs: int, origin: str, order: str | None, option: str
) -> tuple[tuple[str, ...], list[str]]:
    """Return (class names in the order of the outputs, warnings) for weights without class names.

    `names` are the class folders; numbers in 0…outputs-1 name their outputs. `order` is the user's choice,
    given with `option`. Raise UserError if the orders differ and neither the user nor the origin decides.
    """
    string, natural = sort_classes(names, "string"), sort_classes(names, "natural")
    known = ORDERS.get(origin)
    numbers = output_numbers(names, outputs) if order is None else None
    if numbers is not None:
        numbered = tuple(numbers.get(output, str(output)) for output in range(outputs))
        sure = outputs == IMAGENET_OUTPUTS or string == numbered
        if known == "string" and len(names) == outputs and not sure:
            raise UserError(
                f"the class folders 0…{outputs - 1} may be numbers of outputs, or classes in the order of "
                f"{origin}, {abbreviate(string)}; give {option}natural (numbers) or {option}string"
            )
        if known == "natural" or sure:
            return numbered, []
        return numbered, [
            f"warning: the class folders ({abbreviate(natural)}) are interpreted as numbers of the network's "
            f"outputs; if it was trained on folders in the order {abbreviate(string)}, as by torchvision, "
            f"give {option}string"
        ]
    if len(names) != outputs:
        raise UserError(
            f"there are {len(names)} class folders, and the network has {outputs} classes, which its file "
            "does not name; give the folders of all its classes"
        )
    order = order or known
    if order is None and string != natural:
        raise UserError(
            f"the class folders are {abbreviate(natural)} in timm's order, {abbreviate(string)} in "
            f"torchvision's, and the weights do not say who trained them; give {option}natural (timm) or "
            f"{option}string (torchvision, mmpretrain, this program)"
        )
    return (natural if order == "natural" else string), []


def abbreviate(names: Sequence[str]) -> str:
    """Return the first names, for a message."""
    return ", ".join(name[:40] for name in names[:4]) + (", …" if len(names) > 4 else "")
