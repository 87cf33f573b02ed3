"""FLUX.1's diffusers pipeline: loaded strictly, and called."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from trce_cli.errors import BadInput, refusing
from trce_cli.families.base import Weights
from trce_cli.families.clip.load import load_text_encoders, load_tokenizers
from trce_cli.families.flux.denoiser import load_transformer
from trce_cli.families.flux.spec import CLIP, T5, t5
from trce_cli.families.load import load_strictly, quiet_libraries
from trce_cli.families.patches import packed
from trce_cli.families.t5.load import load_text_encoder, load_tokenizer


def load(weights: Weights, device: torch.device, dtype: torch.dtype) -> Any:
    """See `Family.pipe`."""
    import diffusers

    quiet_libraries()
    if not weights.keys("vae"):
        raise BadInput(
            f"{weights.path} holds no VAE, which drawing needs.",
            "Get the form of this checkpoint that has its VAE, or name the whole folder with --config.",
        )
    with refusing(f"The scheduler of {weights.name} cannot be used"):
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler.from_config(dict(weights.config["scheduler"]))
    (clip,) = load_text_encoders(weights, [CLIP], device, dtype)
    (tokenizer,) = load_tokenizers(weights, [CLIP])
    pipe = diffusers.FluxPipeline(
        scheduler=scheduler,
        vae=load_strictly(diffusers.AutoencoderKL.from_config, weights, "vae", device, lambda key: dtype),
        text_encoder=clip,
        tokenizer=tokenizer,
        text_encoder_2=load_text_encoder(weights, T5, device, dtype),
        tokenizer_2=load_tokenizer(weights, T5),
        transformer=load_transformer(weights, device, dtype),
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
    factor = pipe.vae_scale_factor
    shape = (1, pipe.transformer.config.in_channels // 4, height // factor, width // factor)
    latents = torch.cat([torch.randn(shape, generator=generator) for generator in generators])
    return pipe(
        list(prompts),
        negative_prompt=None if negative is None else list(negative),
        guidance_scale=guidance_scale if negative is None else 1.0,
        true_cfg_scale=1.0 if negative is None else guidance_scale,
        max_sequence_length=t5(pipe.transformer.config).limit,
        width=width,
        height=height,
        generator=list(generators),
        latents=packed(latents).to(pipe.device, pipe.dtype),
        output_type="np",
        **settings,
    ).images


@torch.no_grad()
def latents(pipe: Any, images: np.ndarray) -> torch.Tensor:
    """See `Family.latents`: the mode of the autoencoder's distribution, shifted and scaled."""
    pixels = torch.from_numpy(images.copy()).permute(0, 3, 1, 2) / 127.5 - 1
    encoded = pipe.vae.encode(pixels.to(pipe.vae.device, pipe.vae.dtype)).latent_dist.mode().float()
    found: torch.Tensor = (encoded - pipe.vae.config.shift_factor) * pipe.vae.config.scaling_factor
    return found
