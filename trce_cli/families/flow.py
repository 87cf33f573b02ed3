"""Flow matching with Euler's method: noise and data on a line, and a velocity that leads along it."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat

from trce_cli.errors import BadInput, refusing
from trce_cli.families.base import Weights

if TYPE_CHECKING:
    from torch import Tensor

Size = Annotated[int, Field(ge=1, le=1 << 20)]
Shift = Annotated[FiniteFloat, Field(gt=0, le=1000)]


class Scheduler(BaseModel):
    """What the configuration of a flow-matching scheduler may say before a library sees it."""

    model_config = ConfigDict(strict=True)

    num_train_timesteps: Annotated[int, Field(ge=2, le=100_000)] = 1000
    shift: Shift = 1.0
    base_shift: FiniteFloat | None = 0.5
    max_shift: FiniteFloat | None = 1.15
    base_image_seq_len: Size = 256
    max_image_seq_len: Size = 4096
    time_shift_type: Literal["exponential", "linear"] = "exponential"
    shift_terminal: Annotated[FiniteFloat, Field(ge=0, lt=1)] | None = None


class Euler:
    """The checkpoint's flow-matching schedule in so many of Euler's steps; see `base.Schedule`.

    A timestep is the share of noise, sigma, times `levels`. tokens: of a picture, by which some schedules
    shift: linearly in them, unless a family has another `mu`. even: whether sigmas are shifted from evenly
    spaced ones, as most pipelines ask, or from those that the scheduler itself takes.
    """

    def __init__(self, weights: Weights, steps: int, tokens: int, even: bool = True) -> None:
        import torch
        from diffusers import FlowMatchEulerDiscreteScheduler

        config = dict(weights.config["scheduler"])
        if steps == 1:  # the noise's own: there is no last one to stretch the others to
            config["shift_terminal"] = None
        with refusing(f"{weights.name} cannot be sampled with {steps} steps"):
            scheduler = FlowMatchEulerDiscreteScheduler.from_config(config)
            sigmas = torch.linspace(1.0, 1 / steps, steps).tolist() if even else None
            mu = self.mu(scheduler.config, tokens, steps)
            scheduler.set_timesteps(steps, sigmas=sigmas, mu=mu)
        self.weights, self.scheduler, self.sigmas = weights, scheduler, scheduler.sigmas
        if len(self.timesteps) != steps or steps >= self.levels:
            raise BadInput(f"{weights.name} cannot be sampled with as many as {steps} steps.")

    def mu(self, config: Mapping[str, Any], tokens: int, steps: int) -> float:
        """By how much the family's pipeline shifts the schedule."""
        return shift(config, tokens)

    @property
    def timesteps(self) -> "Tensor":
        """See `Schedule`."""
        timesteps: Tensor = self.scheduler.timesteps
        return timesteps

    @property
    def levels(self) -> int:
        """See `Schedule`."""
        return int(self.scheduler.config.num_train_timesteps)

    @property
    def identity(self) -> Mapping[str, Any]:
        """See `Schedule`."""
        told = Scheduler.model_validate(dict(self.weights.config["scheduler"]))
        return {"prediction": "flow", **told.model_dump()}

    def step(self, prediction: "Tensor", t: "Tensor", latents: "Tensor") -> "Tensor":
        """See `Schedule`."""
        at = int((self.timesteps - t.cpu()).abs().argmin())
        return latents + float(self.sigmas[at + 1] - self.sigmas[at]) * prediction

    def noised(self, latents: "Tensor", noise: "Tensor", timesteps: "Tensor") -> "Tensor":
        """See `Schedule`: sigma noise + (1 - sigma) latents."""
        sigma = (timesteps.to(latents.device, latents.dtype) / self.levels).view(
            -1, *[1] * (latents.ndim - 1)
        )
        return sigma * noise + (1 - sigma) * latents

    def wanted(self, latents: "Tensor", noise: "Tensor", timesteps: "Tensor") -> "Tensor":
        """See `Schedule`: the velocity from data to noise."""
        return noise - latents


def shift(config: Mapping[str, Any], tokens: int) -> float:
    """By how much the pipelines shift a schedule for a picture of so many tokens, linear in them."""
    few, many = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    least, most = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
    return float(least + (most - least) * (tokens - few) / (many - few))
