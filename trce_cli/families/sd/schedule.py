"""SD's noise schedule, sampled with DDIM."""

import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from trce_cli.errors import BadInput, refusing
from trce_cli.families.base import Weights
from trce_cli.families.sd.sampling import class_of, few_steps

if TYPE_CHECKING:
    from torch import Tensor


def own_scheduler(config: Mapping[str, Mapping[str, Any]]) -> Any:
    """Diffusers' class of the scheduler that configurations say, for a single file not always the folder's.

    BadInput where there is none of that name.
    """
    import diffusers

    made: Any = getattr(diffusers, class_of(config), None)
    if diffusers.SchedulerMixin not in getattr(made, "__mro__", ()):
        raise BadInput(f"diffusers has no scheduler {class_of(config)}.")
    return made


class Ddim:
    """DDIM with the checkpoint's noise schedule and prediction type, set to `steps` steps.

    As the pipelines do, never clips, and takes a steps_offset where the family's pipeline asks for one.
    """

    def __init__(self, weights: Weights, steps: int, offset: Mapping[str, int]) -> None:
        from diffusers import DDIMScheduler

        made = own_scheduler(weights.config)
        has_betas = "beta_start" in inspect.signature(made).parameters
        why = few_steps(weights.config) if has_betas else f"its noise is that of {made.__name__}"
        if weights.config["denoiser"].get("in_channels", 4) != 4:
            why = "it fills in pictures"
        if why:
            raise BadInput(
                f"{weights.name} is not sampled by DDIM in many steps, which `trce steer` and attacks by "
                f"gradients need: {why}.",
                "`trce map` alone works on it: it needs no schedule.",
            )
        with refusing(f"{weights.name} cannot be sampled with {steps} DDIM steps"):
            self.scheduler: DDIMScheduler = DDIMScheduler.from_config(
                dict(weights.config["scheduler"]), clip_sample=False, **offset
            )
            self.scheduler.set_timesteps(steps)
        if int(self.timesteps.max()) >= self.levels:
            raise BadInput(f"{weights.name} cannot be sampled with as many as {steps} DDIM steps.")

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
        config = self.scheduler.config
        return {
            "betas": self.scheduler.betas.tolist(),
            "prediction": config.prediction_type,
            "spacing": config.timestep_spacing,
        }

    def step(self, prediction: "Tensor", t: "Tensor", latents: "Tensor") -> "Tensor":
        """See `Schedule`."""
        found: Tensor = self.scheduler.step(prediction, t, latents).prev_sample
        return found

    def noised(self, latents: "Tensor", noise: "Tensor", timesteps: "Tensor") -> "Tensor":
        """See `Schedule`."""
        found: Tensor = self.scheduler.add_noise(latents, noise, timesteps)
        return found

    def wanted(self, latents: "Tensor", noise: "Tensor", timesteps: "Tensor") -> "Tensor":
        """See `Schedule`: the noise, or v or the latents where the checkpoint predicts these."""
        if self.scheduler.config.prediction_type == "epsilon":
            return noise
        if self.scheduler.config.prediction_type == "sample":
            return latents
        found: Tensor = self.scheduler.get_velocity(latents, noise, timesteps)
        return found
