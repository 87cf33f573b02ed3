"""An edit as a LoRA: W' = W + up down, the best approximation of each rank by an SVD.

A map changes every projection W by W (M - I), so one SVD M - I = U S V^T serves all layers: down = V^T is
the same for all of them, and up = W U S. Weights that a map does not change have an SVD each.
"""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from statistics import fmean, mode
from typing import Any, NamedTuple

import torch
from torch import Tensor

from trce_cli.checkpoint.checkpoint import Checkpoint
from trce_cli.edits.edit import EDIT_DTYPES, EditDType, LowRank, Made, WeightEdit
from trce_cli.edits.lora import PEFT_CONFIG
from trce_cli.edits.map import Map
from trce_cli.errors import TrceError
from trce_cli.maths.linear_map import LinearMap
from trce_cli.maths.low_rank import Size, cut, own_factors
from trce_cli.system.progress import Report, no_report
from trce_cli.system.safetensors import NewTensor, all_finite


class Basis(NamedTuple):
    """The SVD of a map's change, cut off, for all weights that it changes."""

    left: Tensor  # U S, (width, rank) float64
    down: Tensor  # V^T, (rank, columns of the weights), as it is stored
    energy: float  # share that is kept

    def up(self, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """W U S, (out, rank)."""
        return (weight.double()[:, : len(self.left)] @ self.left).to(dtype)


class Layer(NamedTuple):
    """A layer of a LoRA: the weight that it changes, its factors, and the largest value of up."""

    key: str
    largest: float
    rows: int
    down: Tensor  # (rank, in), as it is stored
    make_up: Callable[[], Tensor]  # (out, rank), the same


@dataclass(frozen=True)
class LoraFile:
    """A LoRA that can be written: its tensors, its metadata, and what it keeps and what it cannot."""

    tensors: Mapping[str, NewTensor]
    metadata: Mapping[str, str]
    figures: Mapping[str, Any]


def factor(
    checkpoint: Checkpoint,
    edits: Mapping[str, WeightEdit],
    made: Made,
    text_map: Map | None,
    size: Size,
    dtype: EditDType = "float32",
    report: Report = no_report,
) -> LoraFile:
    """The LoRA that does to the checkpoint what the edits do, as nearly as its size allows.

    edits: diffusers key -> function from the old weight to the new one. text_map: where given, what these
    edits are on all weights that a map changes, factored once for all of them. `report` is called with 1
    after each weight. Raises TrceError for factors that are not finite, or too large for the dtype.

    figures: layers, rank and kept energy of the shared factors, the highest rank of all, and the truncation
    error, rounding to `dtype` included: |up down - (W' - W)| as a share of |W' - W| (of the `change`) and of
    |W'| (of the `weights`), mean and maximum by layer. left_out: changed weights that have no place in it.
    """
    kind: torch.dtype = getattr(torch, dtype)
    names = checkpoint.names
    bases = shared_bases(checkpoint, text_map, size, kind) if text_map else {}
    layers: dict[str, Layer] = {}
    errors: dict[str, list[float]] = {"change": [], "weights": []}
    ranks: dict[str, int] = {}
    left_out = []
    for key, edit in edits.items():
        weight = checkpoint.read("denoiser", key).double()
        change = edit(weight).double() - weight
        report(1)
        if key not in bases and not bool(change.any()):
            continue
        place = names.lora(key) if weight.ndim == 2 else None
        if place is None:
            left_out.append(key)
            continue
        if basis := bases.get(key):
            up, down = basis.up(weight, kind), basis.down
            make_up = partial(_make_up, checkpoint, key, basis, kind)
        else:
            up, down = (part.to(kind) for part in _factors(edit, change, size))
            make_up = partial(_same, up)
        if not (all_finite(up) and all_finite(down)):
            raise _too_large(key, dtype)
        missing = up.double() @ down.double() - change
        for name, against in (("change", change), ("weights", weight + change)):
            errors[name].append(_norm(missing) / (_norm(against) or 1.0))
        ranks[key] = len(down)
        layers[place] = Layer(key, float(up.abs().max()), len(up), down, make_up)
    if not ranks:
        raise TrceError("The edit changes no weight that a LoRA can hold.")
    highest, alpha = max(ranks.values()), min(ranks.values())
    tensors: dict[str, NewTensor] = {}
    for place, layer in layers.items():
        tensors |= _tensors(place, layer, alpha, dtype)
    sizes = {place: len(layer.down) for place, layer in layers.items()}
    figures: dict[str, Any] = {"layers": len(ranks), "max_rank": highest}
    if text_map:
        basis = next(iter(bases.values()))  # of the main stream
        figures |= {"shared_rank": len(basis.down), "shared_energy": basis.energy}
    doors = checkpoint.door_weights()
    figures["further_streams"] = [
        stream for stream in checkpoint.family.streams[1:] if not ranks.keys().isdisjoint(doors[stream])
    ]
    figures["truncation_error"] = {
        of: {"mean": fmean(found), "max": max(found)} for of, found in errors.items()
    }
    network = {
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(highest),
        "ss_network_alpha": str(alpha),
        "ss_base_model_version": checkpoint.family.defaults.kohya,
    }
    return LoraFile(tensors, made.metadata("lora") | network | _peft(sizes), figures | {"left_out": left_out})


def _factors(edit: WeightEdit, change: Tensor, size: Size) -> tuple[Tensor, Tensor]:
    """The factors of one weight's change; those that an edit has itself, unless another size is asked for."""
    if not isinstance(edit, LowRank):
        return own_factors(change, size)
    return (edit.up, edit.down) if size == Size() else cut(edit.up.double(), edit.down.double(), size)


def _tensors(place: str, layer: Layer, alpha: int, dtype: EditDType) -> dict[str, NewTensor]:
    """The tensors of a layer. By the path of a module as PEFT has it there is no scale; by kohya's name there
    is an alpha, and up is times rank / alpha. It is the same for all layers of a file: of a U-Net's attention
    diffusers takes no other than that of most.
    """
    form, rank = EDIT_DTYPES[dtype], len(layer.down)
    downs = NewTensor(form, tuple(layer.down.shape), partial(_same, layer.down))
    if not place.startswith("lora_"):
        ups = NewTensor(form, (layer.rows, rank), layer.make_up)
        return {f"{place}.lora_A.weight": downs, f"{place}.lora_B.weight": ups}
    factor = rank / alpha
    if layer.largest * factor > torch.finfo(layer.down.dtype).max:
        raise _too_large(layer.key, dtype)
    ups = NewTensor(form, (layer.rows, rank), partial(_scaled, layer.make_up, factor))
    alphas = NewTensor(form, (), partial(_same, torch.tensor(alpha, dtype=layer.down.dtype)))
    return {f"{place}.alpha": alphas, f"{place}.lora_down.weight": downs, f"{place}.lora_up.weight": ups}


def _peft(ranks: Mapping[str, int]) -> dict[str, str]:
    """PEFT's configuration of a LoRA with PEFT's names, of these ranks by layer, as diffusers keeps it in a
    file's metadata; none where nothing is to be said. Before 0.40 diffusers divides by each layer's rank, and
    multiplies by one for all, where the configuration does not say that a layer's alpha is its rank.
    """
    if len(set(ranks.values())) == 1 or any(place.startswith("lora_") for place in ranks):
        return {}
    network = next(iter(ranks)).partition(".")[0]
    paths = {place.removeprefix(f"{network}."): rank for place, rank in ranks.items()}
    most = mode(paths.values())
    others = {f"^{re.escape(path)}": rank for path, rank in paths.items() if rank != most}
    config = {"r": most, "lora_alpha": most, "rank_pattern": others, "alpha_pattern": others}
    config["target_modules"] = list(paths)
    return {PEFT_CONFIG: json.dumps({f"{network}.{key}": value for key, value in config.items()})}


def _too_large(key: str, dtype: EditDType) -> TrceError:
    return TrceError(f"The factors of {key} have values that {dtype} cannot hold.", "Use fp32 for them.")


def _scaled(make: Callable[[], Tensor], factor: float) -> Tensor:
    made = make()
    return (made.double() * factor).to(made.dtype)


def shared_bases(checkpoint: Checkpoint, text_map: Map, size: Size, dtype: torch.dtype) -> dict[str, Basis]:
    """The cut-off SVD of what the map does to each stream, for each weight that it changes."""
    bases: dict[str, Basis] = {}
    for stream, keys in checkpoint.door_weights().items():
        if stream in text_map.streams:
            basis = _basis(text_map.streams[stream], checkpoint.shape("denoiser", keys[0])[1], size, dtype)
            bases |= dict.fromkeys(keys, basis)
    return bases


def _basis(linear: LinearMap, columns: int, size: Size, dtype: torch.dtype) -> Basis:
    U, S, Vt = linear.svd()
    rank = size.of(S)
    down = torch.zeros(rank, columns, dtype=dtype)
    down[:, : linear.width] = Vt[:rank]  # the columns beyond meet something else than embeddings
    squares = S.square()
    energy = float(squares[:rank].sum() / squares.sum()) if bool(squares.any()) else 1.0
    return Basis(U[:, :rank] * S[:rank], down, energy)


def _make_up(checkpoint: Checkpoint, key: str, basis: Basis, dtype: torch.dtype) -> Tensor:
    return basis.up(checkpoint.read("denoiser", key), dtype)


def _same(tensor: Tensor) -> Tensor:
    return tensor


def _norm(matrix: Tensor) -> float:
    return float(torch.linalg.norm(matrix))
