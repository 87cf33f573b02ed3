"""Z-Image's diffusers pipeline: loaded strictly, and called."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from trce_cli.families.base import Weights
from trce_cli.families.causal_llm import pipeline as llm
from trce_cli.families.causal_llm.spec import LlmSpec
from trce_cli.families.z_image.denoiser import load_transformer


def load(weights: Weights, spec: LlmSpec, device: torch.device, dtype: torch.dtype) -> Any:
    """See `Family.pipe`."""
    return llm.load(weights, spec, "ZImagePipeline", "AutoencoderKL", load_transformer, device, dtype)


def draw(
    pipe: Any,
    prompts: Sequence[str],
    negative: Sequence[str] | None,
    generators: Sequence[torch.Generator],
    *,
    width: int,
    height: int,
    **settings: Any,
) -> Any:
    """See `Family.draw`; settings: of diffusers' pipeline."""
    factor = pipe.vae_scale_factor
    shape = (1, pipe.transformer.in_channels, height // factor, width // factor)
    latents = torch.cat([torch.randn(shape, generator=generator) for generator in generators])
    return pipe(
        list(prompts),
        negative_prompt=None if negative is None else list(negative),
        width=width,
        height=height,
        generator=list(generators),
        latents=latents,
        output_type="np",
        **settings,
    ).images


@torch.no_grad()
def latents(pipe: Any, images: np.ndarray) -> torch.Tensor:
    """See `Family.latents`: the mode of the autoencoder's distribution, shifted and scaled."""
    pixels = torch.from_numpy(images.copy()).permute(0, 3, 1, 2) / 127.5 - 1
    encoded = pipe.vae.encode(pixels.to(pipe.vae.device, pipe.vae.dtype)).latent_dist.mode()
    found: torch.Tensor = encoded.float() - pipe.vae.config.shift_factor
    return found * pipe.vae.config.scaling_factor
