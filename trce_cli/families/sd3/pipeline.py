"""The diffusers pipeline: loaded strictly, and called."""

from collections.abc import Sequence
from typing import Any

import torch

from trce_cli.families.base import Weights
from trce_cli.families.clip.load import load_text_encoders, load_tokenizers
from trce_cli.families.flow_pipeline import assemble, latents, noise
from trce_cli.families.sd3.denoiser import load_transformer
from trce_cli.families.sd3.spec import CLIPS, T5, reads_t5
from trce_cli.families.t5.load import t5_parts

__all__ = ["draw", "latents", "load"]


def load(weights: Weights, device: torch.device, dtype: torch.dtype) -> Any:
    """See `Family.pipe`."""

    def texts() -> dict[str, Any]:
        encoders, tokenizers = (
            load_text_encoders(weights, CLIPS, device, dtype),
            load_tokenizers(weights, CLIPS),
        )
        found: dict[str, Any] = {T5.folder: None, T5.tokenizer: None}
        for spec, encoder, tokenizer in zip(CLIPS, encoders, tokenizers, strict=True):
            found |= {spec.folder: encoder, spec.tokenizer: tokenizer}
        return found | (
            t5_parts(weights, T5, device, dtype) if reads_t5(weights.config["model_index"]) else {}
        )

    return assemble(
        weights, "StableDiffusion3Pipeline", "AutoencoderKL", load_transformer, texts, device, dtype
    )


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
    start = noise(pipe, pipe.transformer.config.in_channels, generators, width, height)
    return pipe(
        list(prompts),
        negative_prompt=None if negative is None else list(negative),
        max_sequence_length=T5.limit,
        width=width,
        height=height,
        generator=list(generators),
        latents=start.to(pipe.device, pipe.dtype),
        output_type="np",
        **settings,
    ).images
