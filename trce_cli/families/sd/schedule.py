"""SD's noise schedule, sampled with DDIM."""

import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from trce_cli.errors import BadInput, refusing
from trce_cli.families.base import Weights
from trce_cli.families.sd.sampling import class_of, few_steps, knows_zero_snr

if TYPE_CHECKING:
    from torch import Tensor


def own_scheduler(config: Mapping[str, Mapping[str, Any]]) -> Any:
    """Diffusers' class of the scheduler that configurations say, for a single file not always the folder's.

    BadInput where there is none of that name.
    """
    import diffusers

    made: Any = getattr(diffusers, name := class_of(config), None)
    if needed := getattr(made, "_backends", None):  # a stand-in for a class of which a library is missing
        raise BadInput(f"The scheduler {name} needs {' and '.join(needed)}: not all of these are installed.")
    if diffusers.SchedulerMixin not in getattr(made, "__mro__", ()):
        raise BadInput(f"diffusers has no scheduler {name}.")
    return made


def has_betas(scheduler: type) -> bool:
    """Whether diffusers' class of a scheduler has the noise of betas, and not sigmas of its own."""
    return "beta_start" in inspect.signature(scheduler).parameters


def check_scheduler(own: type, scheduler: Mapping[str, Any], wanted: type) -> None:
    """Raise BadInput where diffusers' class `wanted` would sample with another noise schedule than trained.

    own: the class that the checkpoint comes with. scheduler: its configuration.
    """
    if has_betas(wanted) and not has_betas(own):
        raise BadInput(
            f"The checkpoint has no betas for {wanted.__name__}: its noise is that of {own.__name__}.",
            "Leave out --scheduler.",
        )
    if scheduler.get("rescale_betas_zero_snr") and not knows_zero_snr(wanted.__name__):
        raise BadInput(
            f"{wanted.__name__} has no zero terminal SNR, which the checkpoint was trained with.",
            "Choose --scheduler ddim, euler or dpmsolver++.",
        )


class Ddim:
    """DDIM with the checkpoint's noise schedule and prediction type, set to `steps` steps.

    As the pipelines do, never clips, and takes a steps_offset where the family's pipeline asks for one.
    """

    def __init__(self, weights: Weights, steps: int, offset: Mapping[str, int]) -> None:
        from diffusers import DDIMScheduler

        made = own_scheduler(weights.config)
        why = few_steps(weights.config) if has_betas(made) else f"its noise is that of {made.__name__}"
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
