"""FLUX.1's transformer, and what it is told: both text encoders' states as its pipeline has them."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from trce_cli.families.base import Conditioning, Weights
from trce_cli.families.flow import Euler
from trce_cli.families.flux.config import canvas, transformer
from trce_cli.families.flux.names import is_tuned
from trce_cli.families.flux.spec import POOLED, t5
from trce_cli.families.flux.text import FluxText
from trce_cli.families.load import load_denoiser, precision_of
from trce_cli.families.patches import packed, unpacked
from trce_cli.families.t5.spec import CONTEXT
from trce_cli.system.memory import free


class Transformer:
    """A checkpoint's transformer; see `families.base.Denoiser`.

    Where guidance is embedded it is told a scale of 1, which is none: predictions are guided by their own
    difference to the empty prompt's.
    """

    def __init__(self, weights: Weights) -> None:
        self.weights = weights

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(channels, height, width)."""
        size = canvas(self.weights)
        factor = size.multiple // 2
        channels = transformer(self.weights.config["denoiser"]).in_channels // 4
        return channels, size.height // factor, size.width // factor

    def condition(self, prompts: Sequence[str], device: torch.device) -> Conditioning:
        """See `Denoiser`."""
        spec = t5(self.weights.config["denoiser"])
        conditioning = FluxText(self.weights, spec, device, torch.float32).conditioning(prompts)
        free(device)  # the transformer is to come where the text encoders were
        return conditioning

    def schedule(self, steps: int) -> Euler:
        """See `Denoiser`; a token is of 2 x 2 latents."""
        _, height, width = self.latent_shape
        return Euler(self.weights, steps, (height // 2) * (width // 2))

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
        tokens = told[CONTEXT].shape[1]
        rows, columns = torch.arange(height, device=device), torch.arange(width, device=device)
        places = torch.cartesian_prod(rows, columns).to(precision)
        with torch.autocast(device.type, precision, enabled=precision != torch.float32):
            found = module(
                hidden_states=packed(latents).to(precision),
                timestep=timesteps.to(device, torch.float32).to(precision) / 1000,
                guidance=torch.ones(len(latents), device=device) if has_guidance(module) else None,
                pooled_projections=told[POOLED].to(precision),
                encoder_hidden_states=told[CONTEXT].to(precision),
                txt_ids=torch.zeros(tokens, 3, device=device, dtype=precision),
                img_ids=torch.cat([torch.zeros_like(places[:, :1]), places], 1),
                return_dict=False,
            )[0]
        return unpacked(found, height, width).float()


def has_guidance(module: nn.Module) -> bool:
    """Whether a transformer is told a guidance scale."""
    return hasattr(module.get_submodule("time_text_embed"), "guidance_embedder")


def load_transformer(
    weights: Weights, device: torch.device, dtype: torch.dtype, train: bool = False
) -> nn.Module:
    """The transformer; see `families.load.load_denoiser`."""
    from diffusers import FluxTransformer2DModel

    return load_denoiser(FluxTransformer2DModel.from_config, weights, device, dtype, is_tuned, train)
