"""Trajectories sampled with a model, and its predictions at states that were kept.

arXiv 2503.07389, denoising trajectory steering. Nothing beyond the last state that is kept is ever computed.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor, nn

from trce_cli.erase.settings import Recipe
from trce_cli.erase.trajectories import PREDICTED, STORED, Shard, Trajectory
from trce_cli.errors import TrceError, refusing_library
from trce_cli.families.base import EMPTY, Conditioning, Denoiser, Schedule, Shape
from trce_cli.maths.contrastive import Contrast, targets
from trce_cli.system.progress import Report, no_report

# Trajectories sampled, or stored states predicted, in one batch. An unsafe trajectory is three evaluations a
# step, so a pass has up to 12 samples, and without gradients it takes less memory than a training step.
AT_ONCE: Final = 4


@dataclass(frozen=True)
class Predictor:
    """A denoiser in memory, and what it is told of the prompts of a run."""

    denoiser: Denoiser
    module: nn.Module
    conditioning: Conditioning

    def __call__(self, latents: Tensor, timesteps: Tensor, rows: Tensor) -> Tensor:
        """What it predicts at (batch, *latent shape) under the prompts of these rows; float32."""
        with refusing_library("The denoiser cannot predict"):
            return self.denoiser.predict(self.module, latents, timesteps, self.conditioning.told(rows))

    @property
    def device(self) -> torch.device:
        """Where it predicts."""
        return self.conditioning.device


def sample(
    predict: Predictor,
    schedule: Schedule,
    shard: Shard,
    recipe: Recipe,
    shape: Shape,
) -> dict[str, Tensor]:
    """Run a shard's trajectories with the original model and return its tensors, on the CPU.

    latents, direction: (states, *latent shape) fp16, and so is prediction, what the original predicts at a
    benign state under its prompt. timesteps: (states,) int64. offset: (states,) fp32. rows: (states,) int64,
    the prompts' rows of the conditioning. Raises TrceError for a result that is not finite.
    """
    states = _unsafe_states if shard.kind in ("unsafe", "unsafe-check") else _single_states
    made = []
    with torch.no_grad():
        for start in range(0, len(shard.trajectories), AT_ONCE):
            batch = shard.trajectories[start : start + AT_ONCE]
            made.append(states(predict, schedule, batch, recipe, shape))
    tensors = {name: torch.cat([one[name] for one in made]).cpu() for name in made[0]}
    if shard.kind in PREDICTED:
        (prediction,) = predictions_at(predict, tensors, [tensors["rows"]])
        tensors["prediction"] = prediction.to(STORED)
    return finite(shard, tensors)


def _unsafe_states(
    predict: Predictor,
    schedule: Schedule,
    trajectories: Sequence[Trajectory],
    recipe: Recipe,
    shape: Shape,
) -> dict[str, Tensor]:
    """Sampling with guidance on the unsafe prompts; e_safe is evaluated along with what guidance needs."""
    latents = _noise(trajectories, shape, predict.device)
    prompts = [trajectory.prompt for trajectory in trajectories]
    safe = [str(trajectory.safe) for trajectory in trajectories]
    columns = [predict.conditioning.rows(rows) for rows in ([EMPTY] * len(prompts), prompts, safe)]
    kept: list[dict[str, Tensor]] = []
    for step, t in enumerate(schedule.timesteps[: recipe.early_steps]):
        e_uncond, e_unsafe, e_safe = _evaluate(predict, latents, t, columns)
        prefer, reject = targets(e_unsafe, e_safe, e_uncond, recipe.steering_guidance)
        contrast = Contrast.between(prefer, reject, STORED)
        kept.append(
            {
                "latents": latents.to(STORED),
                "timesteps": t.expand(len(prompts)),
                "rows": columns[1],
                "direction": contrast.direction,
                "offset": contrast.offset,
            }
        )
        if step + 1 < recipe.early_steps:
            guided = e_uncond + recipe.guidance_scale * (e_unsafe - e_uncond)
            latents = schedule.step(guided, t, latents)
    # (steps, trajectories, ...) -> (trajectories x steps, ...): a trajectory's states lie together.
    return {name: torch.stack([one[name] for one in kept], dim=1).flatten(0, 1) for name in kept[0]}


def _single_states(
    predict: Predictor,
    schedule: Schedule,
    trajectories: Sequence[Trajectory],
    recipe: Recipe,
    shape: Shape,
) -> dict[str, Tensor]:
    """One state of each trajectory; it leaves the batch there. The empty prompt needs no guidance."""
    every = _noise(trajectories, shape, predict.device)
    rows = predict.conditioning.rows([trajectory.prompt for trajectory in trajectories])
    for step, t in enumerate(schedule.timesteps):
        going = [n for n, trajectory in enumerate(trajectories) if trajectory.first > step]
        if not going:
            break
        columns = [rows[going]]
        if bool(rows.any()):
            columns.insert(0, torch.zeros_like(rows[going]))  # row 0 is the empty prompt
        latents = every[going]
        e_uncond, *rest = _evaluate(predict, latents, t, columns)
        guided = e_uncond + recipe.guidance_scale * (rest[0] - e_uncond) if rest else e_uncond
        every[going] = schedule.step(guided, t, latents)
    timesteps = schedule.timesteps[[trajectory.first for trajectory in trajectories]]
    return {"latents": every.to(STORED), "timesteps": timesteps, "rows": rows}


def _noise(trajectories: Sequence[Trajectory], shape: Shape, device: torch.device) -> Tensor:
    """Gaussian noise, each trajectory's from its own seed on the CPU; (trajectories, *shape) float32."""
    generators = [torch.Generator().manual_seed(trajectory.seed) for trajectory in trajectories]
    return torch.stack([torch.randn(shape, generator=generator) for generator in generators]).to(device)


def _evaluate(
    predict: Predictor, latents: Tensor, t: Tensor, columns: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """Predictions at the same states under each column of prompts, in one pass; float32 each."""
    batch = torch.cat([latents] * len(columns))
    timesteps = t.expand(len(batch)).to(latents.device)
    prediction = predict(batch, timesteps, torch.cat(list(columns)))
    return prediction.chunk(len(columns))


@torch.no_grad()
def predictions_at(
    predict: Predictor,
    states: Mapping[str, Tensor],
    columns: Sequence[Tensor],
    report: Report = no_report,
) -> list[Tensor]:
    """What a model predicts at stored states under each column of prompts' rows; float32, on the CPU.

    report: called with the number of states as they are done.
    """
    device = predict.device
    made: list[list[Tensor]] = [[] for _ in columns]
    for start in range(0, len(states["latents"]), AT_ONCE):
        part = slice(start, start + AT_ONCE)
        latents = states["latents"][part].to(device, torch.float32)
        timesteps = states["timesteps"][part].to(device)
        for found, rows in zip(made, columns, strict=True):
            found.append(predict(latents, timesteps, rows[part]).cpu())
        report(len(latents))
    return [torch.cat(found) for found in made]


def finite(shard: Shard, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a shard; TrceError for one that is not finite."""
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise TrceError(
                f"The model's predictions become NaN or infinite ({shard.kind} trajectories, {name}).",
                "Its weights are damaged, or the precision is too narrow: try --mixed-precision no.",
            )
    return tensors
