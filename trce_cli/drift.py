"""The guard of stage 2: what the tuned weights do on held-out states, as they will be saved."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import torch
from torch import Tensor, nn

from trce_cli.checkpoint import Checkpoint
from trce_cli.contrastive import Contrast
from trce_cli.denoiser import Conditioning, trainable
from trce_cli.errors import TrceError
from trce_cli.trajectories import Kind, Plan, TrajectorySet, predictions_at

CHECKED: Final[tuple[Kind, ...]] = ("unsafe-check", "unconditional-check", "benign-check")


def weight_change(
    erased: Checkpoint, before: Mapping[str, Tensor], after: Mapping[str, Tensor]
) -> dict[str, float | int]:
    """How the weights changed, as they are saved; TrceError where rounding to their dtype leaves nothing."""
    count = sum(tensor.numel() for tensor in before.values())
    changed = sum(int((before[key] != after[key]).sum()) for key in before)
    if not changed:
        raise TrceError(
            f"Training changed no weight by as much as {erased.dtype} can hold, so nothing was written.",
            "Raise --lr or --max-steps.",
        )
    size = math.sqrt(sum(float(tensor.double().square().sum()) for tensor in before.values()))
    moved = math.sqrt(
        sum(float((after[key].double() - before[key].double()).square().sum()) for key in before)
    )
    return {
        "tensors": len(before),
        "changed_share": changed / count,
        "relative_change": moved / size,
    }


def guard_evaluations(plan: Plan) -> int:
    """Evaluations of a U-Net on one sample that `guard` takes."""
    return 2 * sum((2 if kind == "unsafe-check" else 1) * plan.states(kind) for kind in CHECKED)


@torch.no_grad()
def guard(
    model: nn.Module,
    before: Mapping[str, Tensor],
    after: Mapping[str, Tensor],
    stored: TrajectorySet,
    conditioning: Conditioning,
    report: Callable[[int], None] = lambda states: None,
) -> dict[str, Any]:
    """What the edit does on held-out states, in figures; the model is left with the weights `after`.

    unsafe: where predictions under the unsafe and the empty prompt lie between reject (0) and prefer (1),
    before and after, on average. unconditional, benign: drift, rms of the change of the predictions over
    their rms.
    """
    found: list[dict[str, Any]] = []
    for weights in (before, after):
        for key, parameter in trainable(model).items():
            parameter.copy_(weights[key])
        shards = {kind: map(stored.read, stored.plan.of(kind)) for kind in CHECKED}
        found.append(
            {
                kind: [_predictions(model, states, conditioning, report) for states in read]
                for kind, read in shards.items()
            }
        )
    figures: dict[str, Any] = {"unsafe": {"states": stored.plan.states("unsafe-check")}}
    for name, one in zip(("before", "after"), found, strict=True):
        for place, prompt in enumerate(("prompt", "empty")):
            figures["unsafe"][f"{prompt}_{name}"] = _mean_position(
                stored, [predictions[place] for predictions in one["unsafe-check"]]
            )
    for name, kind in (("unconditional", "unconditional-check"), ("benign", "benign-check")):
        old, new = (torch.cat([predictions[0] for predictions in one[kind]]) for one in found)
        drift = float((new - old).square().mean().sqrt() / old.square().mean().sqrt())
        figures[name] = {"states": len(old), "drift": drift}
    return figures


def _predictions(
    model: nn.Module, states: Mapping[str, Tensor], conditioning: Conditioning, report: Callable[[int], None]
) -> list[Tensor]:
    """Predictions under the states' own prompt, and for unsafe ones under the empty one."""
    columns = [states["rows"]]
    columns += [torch.zeros_like(states["rows"])] if "direction" in states else []
    return predictions_at(model, states, columns, conditioning, report)


def _mean_position(stored: TrajectorySet, predictions: Sequence[Tensor]) -> float:
    places = []
    for shard, prediction in zip(stored.plan.of("unsafe-check"), predictions, strict=True):
        states = stored.read(shard)
        places.append(Contrast(states["direction"], states["offset"]).position(prediction))
    return float(torch.cat(places).mean())
