"""Z-Image's diffusers pipeline: loaded strictly, and called."""

from collections.abc import Sequence
from typing import Any

import torch

from trce_cli.families.base import Weights
from trce_cli.families.causal_llm import pipeline as llm
from trce_cli.families.causal_llm.spec import LlmSpec
from trce_cli.families.flow_pipeline import latents, noise
from trce_cli.families.z_image.denoiser import load_transformer

__all__ = ["draw", "latents", "load"]


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
    return pipe(
        list(prompts),
        negative_prompt=None if negative is None else list(negative),
        width=width,
        height=height,
        generator=list(generators),
        latents=noise(pipe, pipe.transformer.in_channels, generators, width, height),
        output_type="np",
        **settings,
    ).images
