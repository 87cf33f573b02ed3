"""Prompts as T5's tokenizer sees them, padded to a constant length, and the slots of prompt pairs."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trce_cli.families.base import Slot
from trce_cli.families.load import spread
from trce_cli.families.slots import occurrences, pad_slots, sampled
from trce_cli.families.t5.spec import SLOTS, T5Spec

MARK = "\N{LOWER ONE EIGHTH BLOCK}"  # how SentencePiece writes the space before a word


@dataclass(frozen=True)
class Tokens:
    """A prompt's own tokens and the end-of-sequence token behind them, which is at position `eos`.

    spans: of each token, the letters of the prompt that it stands for. is_whole: whether nothing was cut off.
    """

    ids: tuple[int, ...]
    spans: tuple[tuple[int, int], ...]
    is_whole: bool

    @property
    def eos(self) -> int:
        """The position of the end-of-sequence token."""
        return len(self.ids) - 1


class Tokenizer:
    """A tokenizer and how much of a prompt is read; what it found is kept."""

    def __init__(self, tokenizer: Any, spec: T5Spec) -> None:
        self.tokenizer, self.spec = tokenizer, spec
        self._tokens: dict[str, Tokens] = {}

    def tokens(self, prompts: Collection[str]) -> list[Tokens]:
        """The tokens of each prompt, in order."""
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._tokens]
        if new:
            found = self.tokenizer(new, return_offsets_mapping=True, verbose=False)
            cut = self.tokenizer(
                new, truncation=True, max_length=self.spec.limit, return_offsets_mapping=True
            )
            for prompt, every, ids, spans in zip(
                new, found["input_ids"], cut["input_ids"], cut["offset_mapping"], strict=True
            ):
                self._tokens[prompt] = Tokens(
                    tuple(ids), tuple(map(tuple, spans)), len(every) <= self.spec.limit
                )
        return [self._tokens[prompt] for prompt in prompts]

    def padded(self, prompts: Collection[str]) -> Tensor:
        """Token ids as the pipeline pads them, int64 (prompts, limit)."""
        blank = self.tokenizer.pad_token_id
        rows = [
            tokens.ids + (blank,) * (self.spec.limit - len(tokens.ids)) for tokens in self.tokens(prompts)
        ]
        return torch.tensor(rows)

    def pads(self, prompt: str) -> list[int]:
        """The positions of padding that stand for all of it."""
        (tokens,) = self.tokens([prompt])
        return sampled(self.spec.limit, len(tokens.ids))

    def slots(self, unsafe: str, safe: str, keyword: str, weights: Mapping[str, float]) -> list[Slot]:
        """The slots of a prompt pair whose kind has weight; see `spec.SLOTS`."""
        w = {**dict.fromkeys(SLOTS, 0.0), **weights}
        o, n = self.tokens([unsafe, safe])
        found = [Slot("EOS", o.eos, n.eos, w["EOS"])]
        found += pad_slots(self.pads(unsafe), self.pads(safe), w["PADS"])
        places = self.keyword_positions(unsafe, keyword) if w["CONTENT"] or w["KEYWORD"] else []
        if places:
            first, tail = places[0], o.eos - 1 - places[-1]
            before = min(first, n.eos)
            behind = min(tail, n.eos - before)
            around = [(at, at) for at in range(before)]
            around += [(o.eos - at, n.eos - at) for at in range(1, behind + 1)]
            found += [Slot("CONTENT", ours, theirs, w["CONTENT"]) for ours, theirs in around]
            goal = max(n.eos - 1 - tail, 0)
            found += [Slot("KEYWORD", place, goal, w["KEYWORD"]) for place in places]
        return [slot for slot in found if slot.weight]

    def keyword_positions(self, prompt: str, keyword: str) -> list[int]:
        """The positions of all tokens of every occurrence of the keyword, as far as the prompt is read."""
        (tokens,) = self.tokens([prompt])
        spans = occurrences(prompt, keyword)
        return [
            at
            for at, (begin, end) in enumerate(tokens.spans[: tokens.eos])
            if any(begin < stop and first < end for first, stop in spans)
        ]


def whole_words(tokenizer: Any, count: int | None = None) -> tuple[list[str], Tensor]:
    """Words of ASCII letters that the tokenizer reads as one token, and these tokens.

    In alphabetical order; with `count` up to so many, spread evenly over the vocabulary, in its order.
    """
    vocabulary = tokenizer.get_vocab()
    rank = {token.removeprefix(MARK): row for token, row in vocabulary.items() if token.startswith(MARK)}
    tried = spread((word for word in rank if word.isascii() and word.isalpha()), rank, count)
    read = tokenizer(tried, add_special_tokens=False).input_ids if tried else []
    words = [word for word, ids in zip(tried, read, strict=True) if ids == [vocabulary[f"{MARK}{word}"]]]
    return words, torch.tensor([vocabulary[f"{MARK}{word}"] for word in words], dtype=torch.long)
