"""Words that attacks may use, of several text encoders side by side."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property

import torch
from torch import Tensor

from trce_cli.errors import BadInput

Known = tuple[Sequence[str], Sequence[Tensor]]  # words, and for each encoder the token of each


class EncodersWords(ABC):
    """What `families.base.Words` asks for but the call, for encoders that all read a word as one token.

    words: in the order of their numbers. For each encoder `tables` has its token embedding, `rows` the tokens
    of the words, and `begins` how many tokens it has before the first word of a prompt.
    """

    words: Sequence[str]
    tables: list[Tensor]
    rows: list[Tensor]
    begins: list[int]

    @abstractmethod
    def ids(self, prompts: Sequence[str]) -> list[Tensor]:
        """Token ids for each encoder, (prompts, tokens), padded and cut as the pipeline does."""

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

    def word_ids(self, words: Tensor) -> list[Tensor]:
        """Token ids for each encoder of texts of words, (texts, length), that fit into a prompt."""
        found = [each.repeat(len(words), 1) for each in self.ids([self.text(words[0])])]
        for each, rows, begin in zip(found, self.rows, self.begins, strict=True):
            each[:, begin : begin + words.shape[1]] = rows[words]
        return found

    @contextmanager
    def wearing(self, word: int, embedding: Tensor) -> Iterator[None]:
        """See `families.base.Words`."""
        places = [int(rows[word]) for rows in self.rows]
        own = [table[place].clone() for table, place in zip(self.tables, places, strict=True)]
        try:
            for table, place, part in zip(self.tables, places, self.parts(embedding), strict=True):
                table[place] = part.to(table)
            yield
        finally:
            for table, place, part in zip(self.tables, places, own, strict=True):
                table[place] = part

    def parts(self, embedding: Tensor) -> Sequence[Tensor]:
        """What of an embedding, (..., width of `table`), is each encoder's."""
        return embedding.split([table.shape[1] for table in self.tables], -1)


def common(*known: Known) -> tuple[list[str], list[Tensor]]:
    """The words that all know, in the order of the first, and the tokens of each encoder."""
    places = [{word: place for place, word in enumerate(words)} for words, _ in known]
    words = [word for word in known[0][0] if all(word in each for each in places)]
    rows = [
        tokens[[each[word] for word in words]]
        for each, (_, encoders) in zip(places, known, strict=True)
        for tokens in encoders
    ]
    return words, rows
