"""T5 as an attack sees it: words that it reads as one token, and their embeddings."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from trce_cli.errors import BadInput
from trce_cli.families.t5.spec import CONTEXT, T5Spec
from trce_cli.families.t5.tokens import Tokenizer, whole_words


class T5Words:
    """A pipeline's T5, differentiable in a prompt's first words; see `families.base.Words`.

    Further encoders of a family read the same words: `tables` and `rows` have an entry for each.
    """

    def __init__(self, pipeline: Any, spec: T5Spec) -> None:
        self.spec = spec
        self.encoder = getattr(pipeline, spec.folder).requires_grad_(False)
        self.tokenizer = Tokenizer(getattr(pipeline, spec.tokenizer), spec)
        self.words, ids = whole_words(self.tokenizer.tokenizer)
        self.tables = [self.encoder.get_input_embeddings().weight]
        self.rows = [ids]
        self.check()

    def check(self) -> None:
        """Raise BadInput where there is no word."""
        if not self.words:
            raise BadInput("The checkpoint's tokenizers have no token that is a whole word.")

    @cached_property
    def table(self) -> Tensor:
        """Float32 (words, width), the encoders' side by side."""
        pairs = zip(self.tables, self.rows, strict=True)
        return torch.cat([table[rows.to(table.device)].float() for table, rows in pairs], 1)

    def text(self, words: Tensor) -> str:
        """The words, (length,), as a text."""
        return " ".join(self.words[word] for word in words.tolist())

    def ids(self, prompts: Sequence[str]) -> list[Tensor]:
        """Token ids, (prompts, tokens), padded and cut as the pipeline does."""
        return [self.tokenizer.padded(prompts)]

    def word_ids(self, words: Tensor) -> list[Tensor]:
        """Token ids of texts of words, (texts, length), that fit into a prompt."""
        (found,) = self.ids([self.text(words[0])])
        found = found.repeat(len(words), 1)
        found[:, : words.shape[1]] = self.rows[0][words]
        return [found]

    @contextmanager
    def wearing(self, word: int, embedding: Tensor) -> Iterator[None]:
        """See `families.base.Words`."""
        places = [int(rows[word]) for rows in self.rows]
        own = [table[place].clone() for table, place in zip(self.tables, places, strict=True)]
        parts = embedding.split([table.shape[1] for table in self.tables])
        try:
            for table, place, part in zip(self.tables, places, parts, strict=True):
                table[place] = part.to(table)
            yield
        finally:
            for table, place, part in zip(self.tables, places, own, strict=True):
                table[place] = part

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
