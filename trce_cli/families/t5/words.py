"""T5 as an attack sees it: words that it reads as one token, and their embeddings."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from trce_cli.families.t5.spec import CONTEXT, T5Spec
from trce_cli.families.t5.tokens import Tokenizer, whole_words
from trce_cli.families.words import EncodersWords


class T5Words(EncodersWords):
    """A pipeline's T5, differentiable in a prompt's first words; see `families.base.Words`.

    Further encoders of a family may read the same words.
    """

    def __init__(self, pipeline: Any, spec: T5Spec) -> None:
        self.spec = spec
        self.encoder = getattr(pipeline, spec.folder).requires_grad_(False)
        self.tokenizer = Tokenizer(getattr(pipeline, spec.tokenizer), spec)
        self.words, ids = whole_words(self.tokenizer.tokenizer)
        self.tables = [self.encoder.get_input_embeddings().weight]
        self.rows, self.begins = [ids], [0]
        self.check()

    def ids(self, prompts: Sequence[str]) -> list[Tensor]:
        """Token ids, (prompts, tokens), padded and cut as the pipeline does."""
        return [self.tokenizer.padded(prompts)]

    def __call__(self, ids: Sequence[Tensor], prefix: Tensor | None = None) -> dict[str, Tensor]:
        """What enters, in the encoder's dtype, and where padding is masked how many tokens come before it."""
        tokens = ids[0].to(self.encoder.device)
        embedded = self.tables[0][tokens]
        if prefix is not None:
            embedded = torch.cat([prefix.to(embedded), embedded[:, prefix.shape[1] :]], 1)
        if not self.spec.masked:
            return {CONTEXT: self.encoder.encoder(inputs_embeds=embedded)[0]}
        own = tokens != self.tokenizer.tokenizer.pad_token_id
        states = self.encoder.encoder(inputs_embeds=embedded, attention_mask=own.long())[0]
        return {CONTEXT: states, f"{CONTEXT}.length": (own.sum(1) + 1).clamp(max=self.spec.limit)}
