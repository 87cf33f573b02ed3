"""Qwen-Image's transformer, and what it is told: the language model's states as its pipeline has them."""

from collections.abc import Mapping
from typing import Final

import torch
from torch import Tensor, nn

from trce_cli.families.base import Weights
from trce_cli.families.causal_llm.denoiser import LlmTransformer
from trce_cli.families.causal_llm.spec import CONTEXT
from trce_cli.families.load import load_denoiser, precision_of
from trce_cli.families.patches import packed, unpacked
from trce_cli.families.qwen_image.config import LATENTS, transformer
from trce_cli.families.qwen_image.names import is_tuned

EPS: Final = 1e-6  # of the norm before the door: written in the class


class Transformer(LlmTransformer):
    """See `LlmTransformer`."""

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(channels, height, width)."""
        return transformer(self.weights.config["denoiser"]).in_channels // 4, LATENTS, LATENTS

    def load(
        self, device: torch.device, dtype: torch.dtype = torch.float32, train: bool = False
    ) -> nn.Module:
        """See `Denoiser`."""
        return load_transformer(self.weights, device, dtype, train)

    def predict(
        self, module: nn.Module, latents: Tensor, timesteps: Tensor, told: Mapping[str, Tensor]
    ) -> Tensor:
        """The velocity, at (batch, channels, height, width); computed in the frozen weights' precision."""
        precision = precision_of(module)
        lengths = told[f"{CONTEXT}.length"]
        longest = int(lengths.max())
        mask = torch.arange(longest, device=lengths.device) < lengths[:, None]
        height, width = latents.shape[2] // 2, latents.shape[3] // 2
        with torch.autocast(latents.device.type, precision, enabled=precision != torch.float32):
            found = module(
                hidden_states=packed(latents).to(precision),
                timestep=timesteps.to(latents.device, torch.float32).to(precision) / 1000,
                encoder_hidden_states=told[CONTEXT][:, :longest].to(precision),
                encoder_hidden_states_mask=None if bool(mask.all()) else mask.to(latents.device),
                img_shapes=[[(1, height, width)]] * len(latents),
                return_dict=False,
            )[0]
        return unpacked(found, height, width).float()


def load_transformer(
    weights: Weights, device: torch.device, dtype: torch.dtype, train: bool = False
) -> nn.Module:
    """The transformer; see `families.load.load_denoiser`."""
    from diffusers import QwenImageTransformer2DModel

    module = load_denoiser(QwenImageTransformer2DModel.from_config, weights, device, dtype, is_tuned, train)
    # Its angles are no weights: they were made on the meta device, where nothing has values.
    axes = transformer(weights.config["denoiser"]).axes_dims_rope
    module.pos_embed = type(module.pos_embed)(theta=10000, axes_dim=axes, scale_rope=True)
    return module
