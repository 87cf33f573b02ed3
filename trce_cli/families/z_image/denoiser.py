"""Z-Image's transformer, and what it is told: the language model's states as the pipeline passes them on."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from trce_cli.families.base import Conditioning, Weights
from trce_cli.families.causal_llm.spec import CONTEXT, LlmSpec
from trce_cli.families.causal_llm.text import LlmText
from trce_cli.families.flow import Euler
from trce_cli.families.load import load_strictly
from trce_cli.families.z_image.config import canvas, transformer
from trce_cli.families.z_image.names import is_tuned
from trce_cli.system.memory import free


class Transformer:
    """A checkpoint's transformer; see `families.base.Denoiser`."""

    def __init__(self, weights: Weights, spec: LlmSpec) -> None:
        self.weights, self.spec = weights, spec

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(channels, height, width)."""
        size = canvas(self.weights)
        factor = size.multiple // 2
        channels = transformer(self.weights.config["denoiser"]).in_channels
        return channels, size.height // factor, size.width // factor

    def condition(self, prompts: Sequence[str], device: torch.device) -> Conditioning:
        """The states of the prompts, as the family's own pipeline passes them on: not normed yet."""
        eps = transformer(self.weights.config["denoiser"]).norm_eps
        conditioning = LlmText(self.weights, self.spec, eps, device, torch.float32).conditioning(prompts)
        free(device)  # the transformer is to come where the text encoder was
        return conditioning

    def load(
        self, device: torch.device, dtype: torch.dtype = torch.float32, train: bool = False
    ) -> nn.Module:
        """See `Denoiser`."""
        module = load_transformer(self.weights, device, dtype, train)
        if train:
            for key, parameter in module.named_parameters():
                parameter.requires_grad_(is_tuned(key))
        return module

    def predict(
        self, module: nn.Module, latents: Tensor, timesteps: Tensor, told: Mapping[str, Tensor]
    ) -> Tensor:
        """The velocity, at (batch, channels, height, width); computed in the frozen weights' precision.

        The transformer counts time from the noise on, and gives the velocity from noise to data.
        """
        precision = next(
            (weight.dtype for weight in module.parameters() if not weight.requires_grad), torch.float32
        )
        lengths = told[f"{CONTEXT}.length"].tolist()
        states = [row[:length].to(precision) for row, length in zip(told[CONTEXT], lengths, strict=True)]
        time = (1000 - timesteps.to(latents.device, torch.float32)) / 1000  # whatever the schedule's levels
        images = list(latents.to(precision)[:, :, None].unbind())
        with torch.autocast(latents.device.type, precision, enabled=precision != torch.float32):
            found = module(images, time, states, return_dict=False)[0]
        return -torch.stack([each[:, 0].float() for each in found])

    def schedule(self, steps: int) -> Euler:
        """See `Denoiser`."""
        _, height, width = self.latent_shape
        return Euler(self.weights, steps, (height // 2) * (width // 2))


def load_transformer(
    weights: Weights, device: torch.device, dtype: torch.dtype, train: bool = False
) -> nn.Module:
    """The transformer, frozen, in `dtype`; for training what stage 2 tunes is float32."""
    from diffusers import ZImageTransformer2DModel

    return load_strictly(
        ZImageTransformer2DModel.from_config,
        weights,
        "denoiser",
        device,
        lambda key: torch.float32 if train and is_tuned(key) else dtype,
    )
