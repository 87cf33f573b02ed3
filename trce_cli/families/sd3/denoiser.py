"""The transformer, and what it is told: the states that its pipeline has."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from trce_cli.families.base import Conditioning, Weights
from trce_cli.families.clip.spec import CONTEXT, POOLED
from trce_cli.families.flow import Euler
from trce_cli.families.load import load_denoiser, precision_of
from trce_cli.families.sd3.config import canvas, transformer
from trce_cli.families.sd3.names import is_tuned
from trce_cli.families.sd3.text import Sd3Text
from trce_cli.system.memory import free


class Sd3Transformer:
    """A checkpoint's transformer; see `families.base.Denoiser`."""

    def __init__(self, weights: Weights) -> None:
        self.weights = weights
        self.config = transformer(weights.config["denoiser"])

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(channels, height, width)."""
        size = canvas(self.weights)
        factor = size.multiple // self.config.patch_size
        return self.config.in_channels, size.height // factor, size.width // factor

    def condition(self, prompts: Sequence[str], device: torch.device) -> Conditioning:
        """See `Denoiser`."""
        conditioning = Sd3Text(self.weights, device, torch.float32).conditioning(prompts)
        free(device)  # the transformer is to come where the text encoders were
        return conditioning

    def outline(self, prompts: Sequence[str]) -> Conditioning:
        """See `Denoiser`."""
        return Sd3Text(self.weights, "cpu", torch.float32).outline(prompts)

    def load(
        self, device: torch.device, dtype: torch.dtype = torch.float32, train: bool = False
    ) -> nn.Module:
        """See `Denoiser`."""
        return load_transformer(self.weights, device, dtype, train)

    def schedule(self, steps: int) -> Euler:
        """See `Denoiser`."""
        _, height, width = self.latent_shape
        return Euler(self.weights, steps, height * width // self.config.patch_size**2, even=False)

    def predict(
        self, module: nn.Module, latents: Tensor, timesteps: Tensor, told: Mapping[str, Tensor]
    ) -> Tensor:
        """The velocity, at (batch, channels, height, width); computed in the frozen weights' precision."""
        precision, device = precision_of(module), latents.device
        with torch.autocast(device.type, precision, enabled=precision != torch.float32):
            found: Tensor = module(
                hidden_states=latents.to(precision),
                timestep=timesteps.to(device, torch.float32),
                encoder_hidden_states=told[CONTEXT].to(precision),
                pooled_projections=told[POOLED].to(precision),
                return_dict=False,
            )[0]
        return found.float()


def load_transformer(
    weights: Weights, device: torch.device, dtype: torch.dtype, train: bool = False
) -> nn.Module:
    """The transformer; see `families.load.load_denoiser`."""
    from diffusers import SD3Transformer2DModel

    return load_denoiser(SD3Transformer2DModel.from_config, weights, device, dtype, is_tuned, train)
