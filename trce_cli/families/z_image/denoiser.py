"""Z-Image's transformer, and what it is told: the language model's states as the pipeline passes them on."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from trce_cli.families.base import Weights
from trce_cli.families.causal_llm.denoiser import LlmTransformer
from trce_cli.families.causal_llm.spec import CONTEXT
from trce_cli.families.flow_config import canvas
from trce_cli.families.load import load_denoiser, precision_of
from trce_cli.families.z_image.config import transformer
from trce_cli.families.z_image.names import is_tuned


class Transformer(LlmTransformer):
    """See `LlmTransformer`."""

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(channels, height, width)."""
        size = canvas(self.weights)
        factor = size.multiple // 2
        channels = transformer(self.weights.config["denoiser"]).in_channels
        return channels, size.height // factor, size.width // factor

    def load(
        self, device: torch.device, dtype: torch.dtype = torch.float32, train: bool = False
    ) -> nn.Module:
        """See `Denoiser`."""
        return load_transformer(self.weights, device, dtype, train)

    def predict(
        self, module: nn.Module, latents: Tensor, timesteps: Tensor, told: Mapping[str, Tensor]
    ) -> Tensor:
        """The velocity, at (batch, channels, height, width); computed in the frozen weights' precision.

        The transformer counts time from the noise on, and gives the velocity from noise to data.
        """
        precision = precision_of(module)
        lengths = told[f"{CONTEXT}.length"].tolist()
        states = [row[:length].to(precision) for row, length in zip(told[CONTEXT], lengths, strict=True)]
        time = (1000 - timesteps.to(latents.device, torch.float32)) / 1000  # whatever the schedule's levels
        images = list(latents.to(precision)[:, :, None].unbind())
        with torch.autocast(latents.device.type, precision, enabled=precision != torch.float32):
            found = module(images, time, states, return_dict=False)[0]
        return -torch.stack([each[:, 0].float() for each in found])


def load_transformer(
    weights: Weights, device: torch.device, dtype: torch.dtype, train: bool = False
) -> nn.Module:
    """The transformer; see `families.load.load_denoiser`."""
    from diffusers import ZImageTransformer2DModel

    return load_denoiser(ZImageTransformer2DModel.from_config, weights, device, dtype, is_tuned, train)
