"""Edits found from two checkpoints: what leads from the weights of one to those of the other."""

from collections.abc import Collection, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from trce_cli.checkpoint.checkpoint import Checkpoint
from trce_cli.edits.edit import Made, WeightEdit
from trce_cli.edits.map import Map
from trce_cli.maths.closed_form import CUT_OFF, pseudo_inverse
from trce_cli.maths.linear_map import LinearMap


def since(
    original: Checkpoint, edited: Checkpoint, edits: Mapping[str, WeightEdit], made: Made
) -> tuple[dict[str, WeightEdit], Map | None]:
    """What leads from the original to the edited checkpoint with `edits` on top, as `factor` takes it.

    The map among it, if any, is found from the doors that it changed; where nothing was changed before, an
    edit is what it is. Both have the same denoiser.
    """
    doors = original.door_weights()
    keys = [key for weights in doors.values() for key in weights]
    total: dict[str, WeightEdit] = {
        key: edits[key]
        if key in edits and _same(original, edited, key)
        else partial(_instead, edited, key, edits.get(key))
        for key in dict.fromkeys([*keys, *edits])
    }
    # One weight alone does not tell a map: it has an SVD of its own.
    streams = [
        stream
        for stream, weights in doors.items()
        if len(weights) > 1 and not all(_same(original, edited, key) for key in weights)
    ]
    return total, recovered_map(original, edited, made, streams) if streams else None


def _same(one: Checkpoint, other: Checkpoint, key: str) -> bool:
    return torch.equal(one.read("denoiser", key), other.read("denoiser", key))


def _instead(edited: Checkpoint, key: str, edit: WeightEdit | None, weight: Tensor) -> Tensor:
    found = edited.read("denoiser", key).float()
    return found if edit is None else edit(found)


def recovered_map(base: Checkpoint, edited: Checkpoint, made: Made, streams: Collection[str]) -> Map:
    """The map that took the doors of `base` to those of `edited`, in each stream by least squares over them.

    Exact up to the rounding of the weights where there is such a map: the minimiser of sum |W M - W'|^2 is
    M - I = (sum W^T W)^+ sum W^T (W' - W).
    """
    doors, widths = base.door_weights(), base.widths
    return Map(made, {stream: _recovered(base, edited, doors[stream], widths[stream]) for stream in streams})


def _recovered(base: Checkpoint, edited: Checkpoint, keys: Sequence[str], width: int) -> LinearMap:
    gram, moved = (torch.zeros(width, width, dtype=torch.float64) for _ in range(2))
    for key in keys:
        weight = base.read("denoiser", key).double()[:, :width]
        gram += weight.mT @ weight
        moved += weight.mT @ (edited.read("denoiser", key).double()[:, :width] - weight)
    inverse, _, _ = pseudo_inverse(gram, CUT_OFF)
    return LinearMap.of(inverse @ moved)
