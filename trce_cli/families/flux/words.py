"""FLUX.1's text encoders as an attack sees them: words that both read as one token, and their embeddings."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from trce_cli.errors import BadInput
from trce_cli.families.clip.models import prefixed
from trce_cli.families.clip.words import whole_words as clip_words
from trce_cli.families.flux.spec import POOLED, t5
from trce_cli.families.t5.spec import CONTEXT
from trce_cli.families.t5.tokens import Tokenizer, whole_words


class FluxWords:
    """The text encoders of a pipeline, differentiable in a prompt's first words; see `families.base.Words`.

    table: embeddings of T5's and of CLIP's tokens, side by side.
    """

    def __init__(self, pipeline: Any) -> None:
        self.encoder = pipeline.text_encoder_2.requires_grad_(False)
        self.clip = pipeline.text_encoder.requires_grad_(False)
        self.tokenizer = Tokenizer(pipeline.tokenizer_2, t5(pipeline.transformer.config))
        self.clip_tokenizer = pipeline.tokenizer
        words, ids = whole_words(pipeline.tokenizer_2)
        known, (theirs,) = clip_words([pipeline.tokenizer])
        places = {word: place for place, word in enumerate(known)}
        both = [place for place, word in enumerate(words) if word in places]
        self.words = [words[place] for place in both]
        if not self.words:
            raise BadInput("The checkpoint's tokenizers have no token that is a whole word to both.")
        self._ids = ids[both], theirs[[places[word] for word in self.words]]

    @property
    def _tables(self) -> tuple[Tensor, Tensor]:
        return self.encoder.get_input_embeddings().weight, self.clip.get_input_embeddings().weight

    @cached_property
    def table(self) -> Tensor:
        """Float32 (words, width)."""
        pairs = zip(self._tables, self._ids, strict=True)
        return torch.cat([table[ids.to(table.device)].float() for table, ids in pairs], 1)

    def text(self, words: Tensor) -> str:
        """The words, (length,), as a text."""
        return " ".join(self.words[word] for word in words.tolist())

    def ids(self, prompts: Sequence[str]) -> list[Tensor]:
        """Token ids for T5 and for CLIP, (prompts, tokens), padded and cut as the pipeline does."""
        theirs = self.clip_tokenizer(
            list(prompts),
            padding="max_length",
            max_length=self.clip_tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        ).input_ids
        return [self.tokenizer.padded(prompts), theirs]

    def word_ids(self, words: Tensor) -> list[Tensor]:
        """Token ids of texts of words, (texts, length), that fit into a prompt."""
        found = []
        blanks = self.ids([self.text(words[0])])
        for blank, ids, begin in zip(blanks, self._ids, (0, 1), strict=True):  # CLIP's have a token before
            found.append(blank.repeat(len(words), 1))
            found[-1][:, begin : begin + words.shape[1]] = ids[words]
        return found

    @contextmanager
    def wearing(self, word: int, embedding: Tensor) -> Iterator[None]:
        """See `families.base.Words`."""
        tables, rows = self._tables, [int(ids[word]) for ids in self._ids]
        own = [table[row].clone() for table, row in zip(tables, rows, strict=True)]
        parts = embedding.split([table.shape[1] for table in tables])
        try:
            for table, row, part in zip(tables, rows, parts, strict=True):
                table[row] = part.to(table)
            yield
        finally:
            for table, row, part in zip(tables, rows, own, strict=True):
                table[row] = part

    def __call__(self, ids: Sequence[Tensor], prefix: Tensor | None = None) -> dict[str, Tensor]:
        """What enters by each stream, in the encoders' dtype."""
        tokens, theirs = (each.to(self.encoder.device) for each in ids)
        embedded = self._tables[0][tokens]
        own = None
        if prefix is not None:
            words, own = prefix.split([table.shape[1] for table in self._tables], -1)
            embedded = torch.cat([words.to(embedded), embedded[:, words.shape[1] :]], 1)
        states = self.encoder.encoder(inputs_embeds=embedded)[0]
        with prefixed(self.clip.get_input_embeddings(), own):
            pooled = self.clip(theirs).pooler_output
        return {CONTEXT: states, POOLED: pooled}
