"""Text encoders as an attack sees them: words that it may use, and their embeddings."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from trce_cli.errors import BadInput
from trce_cli.families.clip.models import ClipModels
from trce_cli.families.clip.spec import EncoderSpec
from trce_cli.families.load import spread


class ClipWords(ClipModels):
    """The text encoders of a pipeline, differentiable in a prompt's first words; see `families.base.Words`.

    words: the tokens that are whole words of ASCII letters. All tokenizers of the family read a text of them
    as exactly these tokens, so that what was optimised is what a user types. table: their embeddings, of all
    encoders side by side.
    """

    def __init__(self, pipeline: Any, specs: Sequence[EncoderSpec]) -> None:
        tokenizers, encoders = (
            [getattr(pipeline, name) for name in names]
            for names in zip(*((spec.tokenizer, spec.folder) for spec in specs), strict=True)
        )
        super().__init__(specs, tokenizers, [encoder.requires_grad_(False) for encoder in encoders])
        self.words, self._ids = whole_words(tokenizers)
        if not self.words:
            raise BadInput("The checkpoint's tokenizer has no token that is a whole word.")

    @cached_property
    def table(self) -> Tensor:
        """Float32 (words, width)."""
        return torch.cat(
            [
                encoder.get_input_embeddings().weight[ids.to(self.device)].float()
                for encoder, ids in zip(self.encoders, self._ids, strict=True)
            ],
            1,
        )

    def text(self, words: Tensor) -> str:
        """The words, (length,), as a text."""
        return " ".join(self.words[word] for word in words.tolist())

    def word_ids(self, words: Tensor) -> list[Tensor]:
        """Token ids for each encoder of texts of words, (texts, length), that fit into a prompt."""
        count, length = words.shape
        found = []
        for blank, ids in zip(self.ids([self.text(words[0])]), self._ids, strict=True):
            found.append(blank.repeat(count, 1))
            found[-1][:, 1 : 1 + length] = ids[words]
        return found

    @contextmanager
    def wearing(self, word: int, embedding: Tensor) -> Iterator[None]:
        """See `families.base.Words`."""
        tables = [encoder.get_input_embeddings().weight for encoder in self.encoders]
        rows = [int(ids[word]) for ids in self._ids]
        own = [table[row].clone() for table, row in zip(tables, rows, strict=True)]
        parts = embedding.split([table.shape[1] for table in tables])
        try:
            for table, row, part in zip(tables, rows, parts, strict=True):
                table[row] = part.to(table)
            yield
        finally:
            for table, row, part in zip(tables, rows, own, strict=True):
                table[row] = part


def whole_words(tokenizers: Sequence[Any], count: int | None = None) -> tuple[list[str], list[Tensor]]:
    """Words that each tokenizer reads as the one token of that name, and the tokens' ids by tokenizer.

    In alphabetical order; with `count` up to so many, spread evenly over the first vocabulary, in its order.
    """
    vocabularies = [tokenizer.get_vocab() for tokenizer in tokenizers]
    ends = ((token, row) for token, row in vocabularies[0].items() if token.endswith("</w>"))
    rank = {token.removesuffix("</w>"): row for token, row in ends}
    tried = spread((word for word in rank if word.isascii() and word.isalpha()), rank, count)
    read = [tokenizer(tried, add_special_tokens=False).input_ids if tried else [] for tokenizer in tokenizers]
    words = [
        word
        for place, word in enumerate(tried)
        if all(
            ids[place] == [known.get(f"{word}</w>")] for ids, known in zip(read, vocabularies, strict=True)
        )
    ]
    return words, [torch.tensor([known[f"{word}</w>"] for word in words]) for known in vocabularies]
