"""Chroma's diffusers pipeline: loaded strictly, and called."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from trce_cli.families.base import Weights
from trce_cli.families.flow_pipeline import assemble, latents
from trce_cli.families.flux.denoiser import load_chroma
from trce_cli.families.flux.pipeline import tokens
from trce_cli.families.flux.spec import CHROMA_T5
from trce_cli.families.t5.load import t5_parts

__all__ = ["draw", "latents", "load"]


def load(weights: Weights, device: torch.device, dtype: torch.dtype) -> Any:
    """See `Family.pipe`."""
    texts = partial(t5_parts, weights, CHROMA_T5, device, dtype)
    return assemble(weights, "ChromaPipeline", "AutoencoderKL", load_chroma, texts, device, dtype)


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
    """See `Family.draw`; settings: of diffusers' pipeline, in which no negative prompt is the empty one."""
    return pipe(
        list(prompts),
        negative_prompt=None if negative is None else list(negative),
        max_sequence_length=CHROMA_T5.limit,
        width=width,
        height=height,
        generator=list(generators),
        latents=tokens(pipe, generators, width, height),
        output_type="np",
        **settings,
    ).images
