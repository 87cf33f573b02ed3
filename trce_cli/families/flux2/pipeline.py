"""FLUX.2 klein's diffusers pipeline: loaded strictly, and called."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trce_cli.errors import BadInput
from trce_cli.families.base import Weights
from trce_cli.families.causal_llm import pipeline as llm
from trce_cli.families.causal_llm.spec import LlmSpec
from trce_cli.families.flow_pipeline import encoded, noise
from trce_cli.families.flux2.config import is_distilled
from trce_cli.families.flux2.denoiser import load_transformer
from trce_cli.families.patches import packed, unpacked


def load(weights: Weights, spec: LlmSpec, device: torch.device, dtype: torch.dtype) -> Any:
    """See `Family.pipe`."""
    pipe = llm.load(
        weights,
        spec,
        "Flux2KleinPipeline",
        "AutoencoderKLFlux2",
        load_transformer,
        device,
        dtype,
        is_distilled=is_distilled(weights.config),
    )
    if bool((pipe.vae.bn.running_var < 0).any()):
        raise BadInput(f"bn.running_var in the vae of {weights.path} holds negative values.")
    return pipe


@torch.no_grad()
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
    """See `Family.draw`; settings: of diffusers' pipeline, which takes no guidance where it is distilled, and
    of negative prompts their embeddings alone. It scales latents four at a time, and so the noise is drawn.
    """
    if negative is not None and pipe.config.is_distilled:
        raise BadInput(
            "This checkpoint is distilled: nothing is guided away from a negative prompt.",
            "Leave --negative-prompt out.",
        )
    return pipe(
        prompt=list(prompts),
        negative_prompt_embeds=None if negative is None else pipe.encode_prompt(list(negative))[0],
        width=width,
        height=height,
        generator=list(generators),
        latents=noise(pipe, pipe.transformer.config.in_channels, generators, width // 2, height // 2),
        output_type="np",
        **settings,
    ).images


@torch.no_grad()
def latents(pipe: Any, images: np.ndarray) -> Tensor:
    """See `Family.latents`: the mode of the autoencoder's distribution, less its batch norm's statistics."""
    found = encoded(pipe, images)
    mean, variance = pipe.vae.bn.running_mean.float(), pipe.vae.bn.running_var.float()
    tokens = (packed(found) - mean) / torch.sqrt(variance + pipe.vae.config.batch_norm_eps)
    return unpacked(tokens, found.shape[2] // 2, found.shape[3] // 2)
