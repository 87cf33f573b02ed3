"""Text encoders as transformers' modules: whole prompts -> what the denoiser is told, with gradients."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from trce_cli.families.base import Weights
from trce_cli.families.clip.load import load_text_encoders, load_tokenizers
from trce_cli.families.clip.spec import CONTEXT, POOLED, EncoderSpec


class ClipModels:
    """A family's text encoders, called as its pipeline calls them; the very same numbers come out.

    tokenizers, encoders: one for each of `specs`.
    """

    def __init__(
        self, specs: Sequence[EncoderSpec], tokenizers: Sequence[Any], encoders: Sequence[Any]
    ) -> None:
        self.specs, self.tokenizers, self.encoders = specs, tokenizers, encoders
        self.device: torch.device = encoders[0].device

    @classmethod
    def load(
        cls,
        weights: Weights,
        specs: Sequence[EncoderSpec],
        device: torch.device | str,
        dtype: torch.dtype,
    ) -> "ClipModels":
        """Those of a checkpoint; BadInput where they are damaged."""
        return cls(specs, load_tokenizers(weights, specs), load_text_encoders(weights, specs, device, dtype))

    def ids(self, prompts: Sequence[str]) -> list[Tensor]:
        """Token ids for each encoder, (prompts, tokens), padded and cut as the pipeline does."""
        return [
            tokenizer(
                list(prompts),
                padding="max_length",
                max_length=tokenizer.model_max_length,
                truncation=True,
                return_tensors="pt",
            ).input_ids
            for tokenizer in self.tokenizers
        ]

    def __call__(self, ids: Sequence[Tensor], prefix: Tensor | None = None) -> dict[str, Tensor]:
        """What enters by each stream, in the encoders' dtype: a state for each token, pooled a prompt.

        prefix: embeddings in place of those of the first words, (prompts, words, dim of `table`).
        """
        context, pooled, begin = [], [], 0
        for spec, encoder, tokens in zip(self.specs, self.encoders, ids, strict=True):
            embedding = encoder.get_input_embeddings()
            end = begin + embedding.embedding_dim
            with prefixed(embedding, None if prefix is None else prefix[..., begin:end]):
                outputs = encoder(tokens.to(self.device), output_hidden_states=True)
            last = spec.hidden == "last"
            context.append(outputs.last_hidden_state if last else outputs.hidden_states[-2])
            if spec.projects:
                pooled.append(outputs.text_embeds)
            begin = end
        return {CONTEXT: torch.cat(context, -1)} | ({POOLED: torch.cat(pooled, -1)} if pooled else {})


@contextmanager
def prefixed(embedding: nn.Module, prefix: Tensor | None) -> Iterator[None]:
    """Token embeddings with `prefix` after SoT."""
    if prefix is None:
        yield
        return

    def replaced(module: nn.Module, ids: Any, found: Tensor) -> Tensor:
        return torch.cat([found[:, :1], prefix.to(found.dtype), found[:, 1 + prefix.shape[1] :]], 1)

    handle = embedding.register_forward_hook(replaced)
    try:
        yield
    finally:
        handle.remove()
