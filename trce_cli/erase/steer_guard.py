"""The guard of stage 2: what the tuned weights do on held-out states, as they will be saved."""

import math
from collections.abc import Mapping
from typing import Any, Final

import torch
from torch import Tensor

from trce_cli.checkpoint.checkpoint import Checkpoint
from trce_cli.edits.edit import WeightEdit
from trce_cli.erase.sampling import Predictor, predictions_at
from trce_cli.erase.trajectories import Kind, Plan
from trce_cli.erase.trajectory_set import TrajectorySet
from trce_cli.errors import TrceError
from trce_cli.maths.contrastive import Contrast
from trce_cli.system.progress import Report, no_report

CHECKED: Final[tuple[Kind, ...]] = ("unsafe-check", "unconditional-check", "benign-check")


def as_saved(edit: WeightEdit, weight: Tensor) -> Tensor:
    """The weight with an edit, rounded to its dtype as checkpoints keep it."""
    return edit(weight.float()).to(weight.dtype)


def weight_change(erased: Checkpoint, edits: Mapping[str, WeightEdit]) -> dict[str, float | int]:
    """How the weights change, as they are saved; TrceError where rounding to their dtype leaves nothing."""
    count = changed = 0
    size = moved = 0.0
    for key, edit in edits.items():
        before = erased.read("denoiser", key)
        old, new = before.double(), as_saved(edit, before).double()
        count += before.numel()
        changed += int((old != new).sum())
        size += float(old.square().sum())
        moved += float((new - old).square().sum())
    if not changed:
        raise TrceError(
            f"Training changed no weight by as much as {erased.dtype} can hold, so nothing was written.",
            "Raise --lr or --max-steps.",
        )
    return {
        "tensors": len(edits),
        "changed_share": changed / count,
        "relative_change": math.sqrt(moved / size),
    }


def guard_evaluations(plan: Plan) -> int:
    """Evaluations of a denoiser on one sample that `guard` takes."""
    return 2 * sum((2 if kind == "unsafe-check" else 1) * plan.states(kind) for kind in CHECKED)


@torch.no_grad()
def guard(
    predict: Predictor,
    erased: Checkpoint,
    edits: Mapping[str, WeightEdit],
    stored: TrajectorySet,
    report: Report = no_report,
) -> dict[str, Any]:
    """What the edits do on held-out states, in figures; the model is left with the weights as they are saved.

    unsafe: where predictions under the unsafe and the empty prompt lie between reject (0) and prefer (1),
    before and after, on average. unconditional, benign: drift, rms of the change of the predictions over
    their rms; of benign ones also how far from the original's they are, before and after, likewise.
    """
    found: list[dict[Kind, list[Tensor]]] = []
    parameters = dict(predict.module.named_parameters())
    for is_edited in (False, True):
        for key, edit in edits.items():
            weight = erased.read("denoiser", key)
            parameters[key].copy_(as_saved(edit, weight) if is_edited else weight)
        found.append({kind: _measured(predict, stored, kind, report) for kind in CHECKED})
    figures: dict[str, Any] = {"unsafe": {"states": stored.plan.states("unsafe-check")}}
    for name, one in zip(("before", "after"), found, strict=True):
        for place, prompt in enumerate(("prompt", "empty")):
            figures["unsafe"][f"{prompt}_{name}"] = float(one["unsafe-check"][place].mean())
    drifting: dict[str, Kind] = {"unconditional": "unconditional-check", "benign": "benign-check"}
    for name, kind in drifting.items():
        (old,), (new,) = (one[kind] for one in found)
        figures[name] = {"states": len(old), "drift": _distance(new, old)}
    originals = torch.cat([stored.read(shard)["prediction"] for shard in stored.plan.of("benign-check")])
    for name, one in zip(("before", "after"), found, strict=True):
        figures["benign"][f"from_original_{name}"] = _distance(one["benign-check"][0], originals.float())
    return figures


def _distance(predictions: Tensor, others: Tensor) -> float:
    """How far predictions are from others: rms of the difference over the others' rms."""
    return float((predictions - others).square().mean().sqrt() / others.square().mean().sqrt())


def _measured(
    predict: Predictor,
    stored: TrajectorySet,
    kind: Kind,
    report: Report,
) -> list[Tensor]:
    """Of unsafe states the positions under their own prompt and the empty one; of others predictions."""
    shards = []
    for states in map(stored.read, stored.plan.of(kind)):
        columns = [states["rows"]]
        if "direction" in states:
            columns.append(torch.zeros_like(states["rows"]))
        found = predictions_at(predict, states, columns, report)
        if "direction" in states:
            contrast = Contrast(states["direction"], states["offset"])
            found = [contrast.position(prediction) for prediction in found]
        shards.append(found)
    return [torch.cat(column) for column in zip(*shards, strict=True)]
