"""FLUX.2's transformer, and what it is told: the language model's states as klein's pipeline has them."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from trce_cli.families.base import Weights
from trce_cli.families.block_names import is_tuned
from trce_cli.families.causal_llm.denoiser import LlmTransformer
from trce_cli.families.causal_llm.spec import CONTEXT
from trce_cli.families.flow import Euler
from trce_cli.families.flow_config import canvas
from trce_cli.families.flux2.config import transformer
from trce_cli.families.load import load_denoiser, precision_of
from trce_cli.families.patches import packed, unpacked


class Empirical(Euler):
    """The schedule is shifted by the number of steps too, as was found to be best."""

    def mu(self, config: Mapping[str, Any], tokens: int, steps: int) -> float:
        """See `Euler`."""
        from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu

        return float(compute_empirical_mu(tokens, steps))


class Transformer(LlmTransformer):
    """See `LlmTransformer`. Of latents a batch norm's statistics are taken off, four at a time."""

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(channels, height, width)."""
        size = canvas(self.weights)
        factor = size.multiple // 2
        channels = transformer(self.weights.config["denoiser"]).in_channels // 4
        return channels, size.height // factor, size.width // factor

    def schedule(self, steps: int) -> Empirical:
        """See `Denoiser`."""
        _, height, width = self.latent_shape
        return Empirical(self.weights, steps, (height // 2) * (width // 2))

    def load(
        self, device: torch.device, dtype: torch.dtype = torch.float32, train: bool = False
    ) -> nn.Module:
        """See `Denoiser`."""
        return load_transformer(self.weights, device, dtype, train)

    def predict(
        self, module: nn.Module, latents: Tensor, timesteps: Tensor, told: Mapping[str, Tensor]
    ) -> Tensor:
        """The velocity, at (batch, channels, height, width); computed in the frozen weights' precision."""
        precision, device = precision_of(module), latents.device
        height, width = latents.shape[2] // 2, latents.shape[3] // 2

        def places(*counts: int) -> Tensor:  # in time, height, width and along a text
            return torch.cartesian_prod(*(torch.arange(count, device=device) for count in counts))

        with torch.autocast(device.type, precision, enabled=precision != torch.float32):
            found = module(
                hidden_states=packed(latents).to(precision),
                timestep=timesteps.to(device, torch.float32).to(precision) / 1000,
                encoder_hidden_states=told[CONTEXT].to(precision),
                txt_ids=places(1, 1, 1, told[CONTEXT].shape[1]),
                img_ids=places(1, height, width, 1),
                return_dict=False,
            )[0]
        return unpacked(found, height, width).float()


def load_transformer(
    weights: Weights, device: torch.device, dtype: torch.dtype, train: bool = False
) -> nn.Module:
    """The transformer; see `families.load.load_denoiser`."""
    from diffusers import Flux2Transformer2DModel

    return load_denoiser(Flux2Transformer2DModel.from_config, weights, device, dtype, is_tuned, train)
