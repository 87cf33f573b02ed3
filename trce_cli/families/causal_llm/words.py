"""A language model as an attack sees it: words that it may use, and their embeddings."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any, Final

import torch
from torch import Tensor
from torch.nn.functional import pad

from trce_cli.errors import BadInput
from trce_cli.families.causal_llm.spec import CONTEXT, LlmSpec
from trce_cli.families.causal_llm.tokens import Tokenizer
from trce_cli.families.load import spread

SPACE: Final = "\N{LATIN CAPITAL LETTER G WITH DOT ABOVE}"  # how byte-level tokenizers write a space


class LlmWords:
    """The text encoder of a pipeline, differentiable in a prompt's first words; see `families.base.Words`.

    words: those of ASCII letters that are one token behind a space, and another one without, and are not in
    the template, which is never an attack's. A prompt's first word has no space before it; its embedding is
    the one in `table` and what lies between the two tokens'.
    """

    def __init__(self, pipeline: Any, spec: LlmSpec) -> None:
        self.spec, self.encoder = spec, pipeline.text_encoder.requires_grad_(False)
        self.tokenizer = Tokenizer(pipeline.tokenizer, spec)
        (empty,) = self.tokenizer.tokens([""])
        self._begin = empty.begin + spec.dropped  # the place of a prompt's first token among `ids`
        words, first, later = whole_words(pipeline.tokenizer)
        free = [at for at in range(len(words)) if not {int(first[at]), int(later[at])} & set(empty.ids)]
        self.words, self._first, self._later = [words[at] for at in free], first[free], later[free]
        if not self.words:
            raise BadInput("The checkpoint's tokenizer has no token that is a whole word.")

    @property
    def device(self) -> torch.device:
        """Where the encoder is."""
        device: torch.device = self.encoder.device
        return device

    @property
    def _embeddings(self) -> Tensor:
        weight: Tensor = self.encoder.get_input_embeddings().weight
        return weight

    @cached_property
    def table(self) -> Tensor:
        """Float32 (words, width): of the words behind a space."""
        return self._embeddings[self._later.to(self.device)].float()

    def text(self, words: Tensor) -> str:
        """The words, (length,), as a text."""
        return " ".join(self.words[word] for word in words.tolist())

    def ids(self, prompts: Sequence[str]) -> list[Tensor]:
        """Token ids in the template, (prompts, tokens), padded to as many as are read at most."""
        blank = self.tokenizer.tokenizer.pad_token_id
        rows = [torch.tensor(tokens.ids) for tokens in self.tokenizer.tokens(prompts)]
        return [torch.stack([pad(row, (0, self.spec.limit - len(row)), value=blank) for row in rows])]

    def word_ids(self, words: Tensor) -> list[Tensor]:
        """Token ids of texts of words, (texts, length), that fit into a prompt."""
        (blank,) = self.ids([self.text(words[0])])
        found = blank.repeat(len(words), 1)
        found[:, self._begin] = self._first[words[:, 0]]
        found[:, self._begin + 1 : self._begin + words.shape[1]] = self._later[words[:, 1:]]
        return [found]

    @contextmanager
    def wearing(self, word: int, embedding: Tensor) -> Iterator[None]:
        """See `families.base.Words`; both of a word's tokens wear it."""
        table = self._embeddings
        rows = torch.stack([self._first[word], self._later[word]]).to(self.device)
        own = table[rows].clone()
        try:
            table[rows] = own + (embedding.to(own) - own[1])
            yield
        finally:
            table[rows] = own

    def __call__(self, ids: Sequence[Tensor], prefix: Tensor | None = None) -> dict[str, Tensor]:
        """What the denoiser is told, in the encoder's dtype, and unless it sees padding how many tokens each
        prompt has."""
        (tokens,) = ids
        blank = self.tokenizer.tokenizer.pad_token_id
        lengths = (tokens != blank).flip(1).cumsum(1).gt(0).sum(1)  # what is behind the last token is padding
        longest = self.spec.limit if self.spec.padded else int(lengths.max())
        tokens = tokens[:, :longest].to(self.device)
        embedded = self._embeddings[tokens]
        if prefix is not None:
            end = self._begin + prefix.shape[1]
            words = prefix.to(embedded.dtype)
            words = torch.cat(
                [words[:, :1] + self._between(tokens[:, self._begin])[:, None], words[:, 1:]], 1
            )
            embedded = torch.cat([embedded[:, : self._begin], words, embedded[:, end:]], 1)
        mask = torch.arange(tokens.shape[1])[None] < lengths[:, None]
        layers = self.encoder(
            inputs_embeds=embedded, attention_mask=mask.to(self.device), output_hidden_states=True
        ).hidden_states
        if isinstance(self.spec.hidden, tuple):
            states = torch.cat([layers[number] for number in self.spec.hidden], 2)
        else:
            states = layers[-1 if self.spec.hidden == "last" else -2]
        if self.spec.padded:
            return {CONTEXT: states}
        missing = self.spec.limit - states.shape[1]
        states = pad(states * mask[:, :, None].to(states), (0, 0, 0, missing))[:, self.spec.dropped :]
        return {CONTEXT: states, f"{CONTEXT}.length": lengths - self.spec.dropped}

    def _between(self, first: Tensor) -> Tensor:
        """From a word's embedding behind a space to that without, by the latter's token; (prompts, width)."""
        places = {int(token): place for place, token in enumerate(self._first.tolist())}
        words = torch.tensor([places[token] for token in first.tolist()])
        table = self._embeddings
        return table[first] - table[self._later[words].to(self.device)]


def whole_words(tokenizer: Any, count: int | None = None) -> tuple[list[str], Tensor, Tensor]:
    """Words that a tokenizer reads as one token, without a space before them and with one, and these tokens.

    In alphabetical order; with `count` up to so many, spread evenly over the vocabulary, in its order.
    """
    vocabulary = tokenizer.get_vocab()
    rank = {token.removeprefix(SPACE): row for token, row in vocabulary.items() if token.startswith(SPACE)}
    usable = (word for word in rank if word.isascii() and word.isalpha() and word in vocabulary)
    tried = spread(usable, rank, count)
    texts = [*tried, *(f" {word}" for word in tried)]
    read = tokenizer(texts, add_special_tokens=False).input_ids if texts else []
    words = [
        word
        for word, first, later in zip(tried, read, read[len(tried) :], strict=False)
        if first == [vocabulary[word]] and later == [vocabulary[f"{SPACE}{word}"]]
    ]
    first = torch.tensor([vocabulary[word] for word in words], dtype=torch.long)
    later = torch.tensor([vocabulary[f"{SPACE}{word}"] for word in words], dtype=torch.long)
    return words, first, later
