"""The transformers of FLUX.1 and Chroma, and what each is told: the states that its pipeline has."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from trce_cli.families.base import Conditioning, Weights
from trce_cli.families.block_names import is_tuned
from trce_cli.families.flow import Euler
from trce_cli.families.flow_config import canvas
from trce_cli.families.flux.config import chroma
from trce_cli.families.flux.spec import CHROMA_T5, POOLED, t5
from trce_cli.families.flux.text import FluxText
from trce_cli.families.load import load_denoiser, precision_of
from trce_cli.families.patches import packed, unpacked
from trce_cli.families.t5.spec import CONTEXT
from trce_cli.families.t5.text import T5Text
from trce_cli.system.memory import free


class Transformer(ABC):
    """A checkpoint's transformer; see `families.base.Denoiser`."""

    def __init__(self, weights: Weights) -> None:
        self.weights = weights

    @abstractmethod
    def text(self, device: torch.device) -> T5Text:
        """The text encoders, in float32."""

    @abstractmethod
    def load(
        self, device: torch.device, dtype: torch.dtype = torch.float32, train: bool = False
    ) -> nn.Module:
        """See `Denoiser`."""

    @abstractmethod
    def told(self, module: nn.Module, told: Mapping[str, Tensor], pixels: int) -> dict[str, Any]:
        """The arguments of the transformer that are the family's own; pixels: tokens of the picture."""

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(channels, height, width)."""
        size = canvas(self.weights)
        factor = size.multiple // 2
        channels: int = self.weights.config["denoiser"].get("in_channels", 64) // 4
        return channels, size.height // factor, size.width // factor

    def condition(self, prompts: Sequence[str], device: torch.device) -> Conditioning:
        """See `Denoiser`."""
        conditioning = self.text(device).conditioning(prompts)
        free(device)  # the transformer is to come where the text encoders were
        return conditioning

    def outline(self, prompts: Sequence[str]) -> Conditioning:
        """See `Denoiser`."""
        return self.text(torch.device("cpu")).outline(prompts)

    def schedule(self, steps: int) -> Euler:
        """See `Denoiser`; a token is of 2 x 2 latents."""
        _, height, width = self.latent_shape
        return Euler(self.weights, steps, (height // 2) * (width // 2))

    def predict(
        self, module: nn.Module, latents: Tensor, timesteps: Tensor, told: Mapping[str, Tensor]
    ) -> Tensor:
        """The velocity, at (batch, channels, height, width); computed in the frozen weights' precision."""
        precision, device = precision_of(module), latents.device
        height, width = latents.shape[2] // 2, latents.shape[3] // 2
        rows, columns = torch.arange(height, device=device), torch.arange(width, device=device)
        places = torch.cartesian_prod(rows, columns).to(precision)
        with torch.autocast(device.type, precision, enabled=precision != torch.float32):
            found = module(
                hidden_states=packed(latents).to(precision),
                timestep=timesteps.to(device, torch.float32).to(precision) / 1000,
                encoder_hidden_states=told[CONTEXT].to(precision),
                txt_ids=torch.zeros(told[CONTEXT].shape[1], 3, device=device, dtype=precision),
                img_ids=torch.cat([torch.zeros_like(places[:, :1]), places], 1),
                return_dict=False,
                **self.told(module, told, height * width),
            )[0]
        return unpacked(found, height, width).float()


class FluxTransformer(Transformer):
    """FLUX.1's. Where guidance is embedded it is told a scale of 1, which is none: predictions are guided by
    their own difference to the empty prompt's.
    """

    def text(self, device: torch.device) -> FluxText:
        """See `Transformer`."""
        return FluxText(self.weights, t5(self.weights.config["denoiser"]), device, torch.float32)

    def load(
        self, device: torch.device, dtype: torch.dtype = torch.float32, train: bool = False
    ) -> nn.Module:
        """See `Denoiser`."""
        return load_flux(self.weights, device, dtype, train)

    def told(self, module: nn.Module, told: Mapping[str, Tensor], pixels: int) -> dict[str, Any]:
        """See `Transformer`: the pooled embedding, and the guidance."""
        pooled = told[POOLED]
        has_guidance = self.weights.config["denoiser"].get("guidance_embeds")
        guidance = torch.ones(len(pooled), device=pooled.device) if has_guidance else None
        return {"pooled_projections": pooled.to(precision_of(module)), "guidance": guidance}


class ChromaTransformer(Transformer):
    """Chroma's."""

    def text(self, device: torch.device) -> T5Text:
        """See `Transformer`."""
        return T5Text(self.weights, CHROMA_T5, device, torch.float32)

    def load(
        self, device: torch.device, dtype: torch.dtype = torch.float32, train: bool = False
    ) -> nn.Module:
        """See `Denoiser`."""
        return load_chroma(self.weights, device, dtype, train)

    def told(self, module: nn.Module, told: Mapping[str, Tensor], pixels: int) -> dict[str, Any]:
        """See `Transformer`: which tokens are a prompt's, the first one of padding among them.

        As in diffusers' pipeline these are numbers, which attention adds to its scores, and no truth values:
        all padding is seen, if less than the prompt.
        """
        context, lengths = told[CONTEXT], told[f"{CONTEXT}.length"].to(told[CONTEXT].device)
        own = torch.arange(context.shape[1], device=context.device) < lengths[:, None]
        mask = torch.nn.functional.pad(own.float(), (0, pixels), value=1.0)
        return {"attention_mask": mask.to(precision_of(module))}


def load_flux(weights: Weights, device: torch.device, dtype: torch.dtype, train: bool = False) -> nn.Module:
    """FLUX.1's transformer; see `families.load.load_denoiser`."""
    from diffusers import FluxTransformer2DModel

    return load_denoiser(FluxTransformer2DModel.from_config, weights, device, dtype, is_tuned, train)


def load_chroma(weights: Weights, device: torch.device, dtype: torch.dtype, train: bool = False) -> nn.Module:
    """Chroma's transformer; see `families.load.load_denoiser`."""
    from diffusers import ChromaTransformer2DModel

    module = load_denoiser(ChromaTransformer2DModel.from_config, weights, device, dtype, is_tuned, train)
    # Its table of places is no weight: it was made on the meta device, where nothing has values.
    config = chroma(weights.config["denoiser"])
    module.time_text_embed = type(module.time_text_embed)(
        num_channels=config.approximator_num_channels // 4,
        out_dim=3 * config.num_single_layers + 12 * config.num_layers + 2,
    ).to(device)
    return module
