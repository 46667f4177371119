"""Conversion of weights between the block forms A, B and C (paper, Fig. 3)."""

from collections.abc import Mapping

import torch
from torch import Tensor

from ..errors import UserError


def convert_form(
    state: Mapping[str, Tensor], cardinality: int, source: str, target: str
) -> dict[str, Tensor]:
    """Return the weights of a network in form `source`, rearranged for form `target`.

    Both networks compute the same function. `state` is a state_dict; the result shares no memory
    with it. Path i has rows i·D...(i+1)·D of form C's 1x1 and 3x3 with their BN, and in form A
    also columns i·D...(i+1)·D of the last 1x1. Raises UserError if the weights do not fit.
    """
    if not {source, target} <= set("ABC"):
        raise UserError(f"forms are A, B and C, not {source!r} and {target!r}")
    paths = {key.partition(".paths.")[2].split(".")[0] for key in state if ".paths." in key}
    found = "C" if not paths else "A" if any(".paths.0.conv3." in key for key in state) else "B"
    if found != source or (paths and len(paths) != cardinality):
        count = f" with {len(paths)} paths" if paths else ""
        raise UserError(
            f"the weights are of form {found}{count}, not {source} with cardinality {cardinality}"
        )
    joined: dict[str, Tensor] = {}
    for key, value in state.items():  # to form C
        block, is_path, rest = key.partition(".paths.")
        if not is_path:
            joined[key] = value.clone()
        elif rest.startswith("0."):
            leaf = rest[2:]
            parts = [state[f"{block}.paths.{i}.{leaf}"] for i in range(cardinality)]
            if value.dim() == 0:  # num_batches_tracked is the same in every path
                joined[f"{block}.{leaf}"] = value.clone()
            else:
                joined[f"{block}.{leaf}"] = torch.cat(parts, 1 if leaf == "conv3.weight" else 0)
    if target == "C":
        return joined
    split_leaves = {"conv1", "bn1", "conv2", "bn2"} | ({"conv3"} if target == "A" else set())
    split: dict[str, Tensor] = {}
    for key, value in joined.items():
        *parents, leaf, kind = key.split(".")
        if len(parents) < 2 or leaf not in split_leaves:
            split[key] = value
            continue
        axis = 1 if leaf == "conv3" else 0
        if value.dim() and value.shape[axis] % cardinality:
            raise UserError(f"{key}: {value.shape[axis]} channels do not make {cardinality} paths")
        slices = value.chunk(cardinality, axis) if value.dim() else (value,) * cardinality
        for i, part in enumerate(slices):
            split[".".join([*parents, "paths", str(i), leaf, kind])] = part.clone()
    return split
