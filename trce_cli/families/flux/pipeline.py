"""FLUX.1's diffusers pipeline: loaded strictly, and called."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from trce_cli.errors import BadInput, refusing
from trce_cli.families.base import Weights
from trce_cli.families.clip.load import load_text_encoders, load_tokenizers
from trce_cli.families.flux.denoiser import load_flux
from trce_cli.families.flux.spec import CLIP, T5, t5
from trce_cli.families.load import load_strictly, quiet_libraries
from trce_cli.families.patches import packed
from trce_cli.families.t5.load import load_text_encoder, load_tokenizer
from trce_cli.families.t5.spec import T5Spec


def load(weights: Weights, device: torch.device, dtype: torch.dtype) -> Any:
    """See `Family.pipe`."""
    (clip,) = load_text_encoders(weights, [CLIP], device, dtype)
    (tokenizer,) = load_tokenizers(weights, [CLIP])
    parts = {CLIP.folder: clip, CLIP.tokenizer: tokenizer}
    return load_around(weights, T5, "FluxPipeline", load_flux, device, dtype, parts)


def load_around(
    weights: Weights,
    spec: T5Spec,
    pipeline: str,
    transformer: Callable[[Weights, torch.device, torch.dtype], nn.Module],
    device: torch.device,
    dtype: torch.dtype,
    parts: dict[str, Any],
) -> Any:
    """A pipeline of diffusers' class of this name: what those with a T5 have in common, and further parts."""
    import diffusers

    quiet_libraries()
    if not weights.keys("vae"):
        raise BadInput(
            f"{weights.path} holds no VAE, which drawing needs.",
            "Get the form of this checkpoint that has its VAE, or name the whole folder with --config.",
        )
    with refusing(f"The scheduler of {weights.name} cannot be used"):
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler.from_config(dict(weights.config["scheduler"]))
    parts[spec.folder] = load_text_encoder(weights, spec, device, dtype)
    parts[spec.tokenizer] = load_tokenizer(weights, spec)
    pipe = getattr(diffusers, pipeline)(
        scheduler=scheduler,
        vae=load_strictly(diffusers.AutoencoderKL.from_config, weights, "vae", device, lambda key: dtype),
        transformer=transformer(weights, device, dtype),
        **parts,
    )
    pipe.vae.enable_slicing()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(
    pipe: Any,
    prompts: Sequence[str],
    negative: Sequence[str] | None,
    generators: Sequence[torch.Generator],
    *,
    guidance_scale: float,
    width: int,
    height: int,
    **settings: Any,
) -> Any:
    """See `Family.draw`; settings: of diffusers' pipeline.

    Guidance is embedded, where the checkpoint has that. With negative prompts it is their difference, at the
    same scale, and what is embedded is 1, which is none.
    """
    return pipe(
        list(prompts),
        negative_prompt=None if negative is None else list(negative),
        guidance_scale=guidance_scale if negative is None else 1.0,
        true_cfg_scale=1.0 if negative is None else guidance_scale,
        max_sequence_length=t5(pipe.transformer.config).limit,
        width=width,
        height=height,
        generator=list(generators),
        latents=noise(pipe, generators, width, height),
        output_type="np",
        **settings,
    ).images


def noise(pipe: Any, generators: Sequence[torch.Generator], width: int, height: int) -> torch.Tensor:
    """The latents that pictures of so many pixels begin with, each from its own generator, as tokens."""
    factor = pipe.vae_scale_factor
    shape = (1, pipe.transformer.config.in_channels // 4, height // factor, width // factor)
    latents = torch.cat([torch.randn(shape, generator=generator) for generator in generators])
    return packed(latents).to(pipe.device, pipe.dtype)


@torch.no_grad()
def latents(pipe: Any, images: np.ndarray) -> torch.Tensor:
    """See `Family.latents`: the mode of the autoencoder's distribution, shifted and scaled."""
    pixels = torch.from_numpy(images.copy()).permute(0, 3, 1, 2) / 127.5 - 1
    encoded = pipe.vae.encode(pixels.to(pipe.vae.device, pipe.vae.dtype)).latent_dist.mode().float()
    found: torch.Tensor = (encoded - pipe.vae.config.shift_factor) * pipe.vae.config.scaling_factor
    return found
