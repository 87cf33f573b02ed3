"""diffusers' pipelines of transformers that a causal language model tells what to draw, loaded strictly."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from trce_cli.errors import BadInput, refusing
from trce_cli.families.base import Weights
from trce_cli.families.causal_llm.load import load_text_encoder, load_tokenizer
from trce_cli.families.causal_llm.spec import LlmSpec
from trce_cli.families.load import load_strictly, quiet_libraries


def load(
    weights: Weights,
    spec: LlmSpec,
    pipeline: str,
    autoencoder: str,
    transformer: Callable[[Weights, torch.device, torch.dtype], nn.Module],
    device: torch.device,
    dtype: torch.dtype,
) -> Any:
    """The pipeline, of diffusers' classes of these names; `transformer` loads the checkpoint's.

    Of the text encoder what sees pictures is left out: prompts are texts. The autoencoder decodes one image
    at a time, which bounds the memory.
    """
    import diffusers

    quiet_libraries()
    if not weights.keys("vae"):
        raise BadInput(
            f"{weights.path} holds no VAE, which drawing needs.",
            "Get the form of this checkpoint that has its VAE, or name the whole folder with --config.",
        )
    with refusing(f"The scheduler of {weights.name} cannot be used"):
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler.from_config(dict(weights.config["scheduler"]))
    make = getattr(diffusers, autoencoder).from_config
    pipe = getattr(diffusers, pipeline)(
        scheduler=scheduler,
        vae=load_strictly(make, weights, "vae", device, lambda key: dtype),
        text_encoder=load_text_encoder(weights, spec, device, dtype),
        tokenizer=load_tokenizer(weights, spec),
        transformer=transformer(weights, device, dtype),
    )
    pipe.vae.enable_slicing()
    pipe.set_progress_bar_config(disable=True)
    return pipe
