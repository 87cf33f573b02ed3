"""Qwen-Image's diffusers pipeline: loaded strictly, and called."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from trce_cli.errors import BadInput
from trce_cli.families.base import EMPTY, Weights
from trce_cli.families.causal_llm import pipeline as llm
from trce_cli.families.causal_llm.spec import LlmSpec
from trce_cli.families.flow_pipeline import noise
from trce_cli.families.patches import packed
from trce_cli.families.qwen_image.denoiser import load_transformer


def load(weights: Weights, spec: LlmSpec, device: torch.device, dtype: torch.dtype) -> Any:
    """See `Family.pipe`."""
    return llm.load(
        weights, spec, "QwenImagePipeline", "AutoencoderKLQwenImage", load_transformer, device, dtype
    )


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
    """See `Family.draw`; settings: of diffusers' pipeline, which calls guidance `true_cfg_scale` and only
    guides where it is told of what to guide away from."""
    if settings["num_inference_steps"] == 1 and pipe.scheduler.config.shift_terminal:
        raise BadInput("The schedule of this checkpoint has no single step.", "Draw with --steps 2 or more.")
    latents = noise(pipe, pipe.transformer.config.in_channels // 4, generators, width, height)
    away = list(negative) if negative is not None else [EMPTY] * len(prompts)
    return pipe(
        list(prompts),
        negative_prompt=away if guidance_scale > 1 else None,
        true_cfg_scale=guidance_scale,
        width=width,
        height=height,
        generator=list(generators),
        latents=packed(latents),
        output_type="np",
        **settings,
    ).images


@torch.no_grad()
def latents(pipe: Any, images: np.ndarray) -> torch.Tensor:
    """See `Family.latents`: the mode of the autoencoder's distribution, shifted and scaled by channel."""
    pixels = torch.from_numpy(images.copy()).permute(0, 3, 1, 2)[:, :, None] / 127.5 - 1
    encoded = pipe.vae.encode(pixels.to(pipe.vae.device, pipe.vae.dtype)).latent_dist.mode()[:, :, 0].float()
    mean, std = (
        torch.tensor(each, device=encoded.device)[:, None, None]
        for each in (pipe.vae.config.latents_mean, pipe.vae.config.latents_std)
    )
    found: torch.Tensor = (encoded - mean) / std
    return found
