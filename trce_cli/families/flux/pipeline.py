"""FLUX.1's diffusers pipeline: loaded strictly, and called."""

from collections.abc import Sequence
from typing import Any

import torch

from trce_cli.families.base import Weights
from trce_cli.families.clip.load import load_text_encoders, load_tokenizers
from trce_cli.families.flow_pipeline import assemble, latents, noise
from trce_cli.families.flux.denoiser import load_flux
from trce_cli.families.flux.spec import CLIP, T5, t5
from trce_cli.families.patches import packed
from trce_cli.families.t5.load import t5_parts

__all__ = ["draw", "latents", "load", "tokens"]


def load(weights: Weights, device: torch.device, dtype: torch.dtype) -> Any:
    """See `Family.pipe`."""

    def texts() -> dict[str, Any]:
        (clip,) = load_text_encoders(weights, [CLIP], device, dtype)
        (tokenizer,) = load_tokenizers(weights, [CLIP])
        own = {CLIP.folder: clip, CLIP.tokenizer: tokenizer}
        return own | t5_parts(weights, T5, device, dtype)

    return assemble(weights, "FluxPipeline", "AutoencoderKL", load_flux, texts, device, dtype)


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
        latents=tokens(pipe, generators, width, height),
        output_type="np",
        **settings,
    ).images


def tokens(pipe: Any, generators: Sequence[torch.Generator], width: int, height: int) -> torch.Tensor:
    """What pictures of so many pixels begin with, as the transformer's tokens."""
    channels = pipe.transformer.config.in_channels // 4
    return packed(noise(pipe, channels, generators, width, height)).to(pipe.device, pipe.dtype)
