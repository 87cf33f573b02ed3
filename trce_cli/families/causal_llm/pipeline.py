"""diffusers' pipelines of transformers that a causal language model tells what to draw, loaded strictly."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from trce_cli.families.base import Weights
from trce_cli.families.causal_llm.load import load_text_encoder, load_tokenizer
from trce_cli.families.causal_llm.spec import LlmSpec
from trce_cli.families.flow_pipeline import assemble


def load(
    weights: Weights,
    spec: LlmSpec,
    pipeline: str,
    autoencoder: str,
    transformer: Callable[[Weights, torch.device, torch.dtype], nn.Module],
    device: torch.device,
    dtype: torch.dtype,
    **settings: Any,
) -> Any:
    """See `assemble`. Of the text encoder what sees pictures is left out: prompts are texts."""

    def texts() -> dict[str, Any]:
        return {
            spec.folder: load_text_encoder(weights, spec, device, dtype),
            spec.tokenizer: load_tokenizer(weights, spec),
        }

    return assemble(weights, pipeline, autoencoder, transformer, texts, device, dtype, **settings)
