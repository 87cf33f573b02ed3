"""Prompts as trees of prefixes: for causal encoders, in which a token sees what comes before it alone."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

import torch
from torch import Tensor

# Tokens that form one sequence: few, because attention computes and masks those of other prompts as well, and
# enough to have prefixes in common.
PACK: Final = 128

Token = tuple[int, ...]  # its ids, for every text encoder


@dataclass(frozen=True)
class Pack:
    """Prompts as one sequence of tokens in which what several begin with stands once: a prefix tree.

    tokens: each one's ids, for every text encoder. places: prompt -> the places of its tokens, in order.
    pads: prompt -> position -> place of padding behind it, which sees all of the prompt and is seen by none,
    not by itself either: so a causal encoder's mask has it.
    """

    tokens: list[Token]
    places: dict[str, list[int]]
    pads: dict[str, dict[int, int]] = field(default_factory=dict)

    def place(self, prompt: str, position: int) -> int:
        """The place of a prompt's token or padding."""
        own = self.places[prompt]
        return own[position] if position < len(own) else self.pads[prompt][position]

    @property
    def positions(self) -> Tensor:
        """Each token's position in its prompts, (tokens,)."""
        positions = torch.zeros(len(self.tokens), dtype=torch.long)
        for places in self.places.values():
            positions[places] = torch.arange(len(places))
        for pads in self.pads.values():
            positions[list(pads.values())] = torch.tensor(list(pads))
        return positions

    @property
    def mask(self) -> Tensor:
        """Whom a token looks at, (tokens, tokens): itself and what comes before it in its prompts."""
        mask = torch.zeros(len(self.tokens), len(self.tokens), dtype=torch.bool)
        for places in self.places.values():
            rows = torch.tensor(places)
            mask[rows[:, None], rows] |= torch.ones(len(rows), len(rows), dtype=torch.bool).tril()
        for prompt, pads in self.pads.items():
            mask[torch.tensor(list(pads.values()))[:, None], torch.tensor(self.places[prompt])] = True
        return mask


@dataclass(frozen=True)
class Padding:
    """What stands behind prompts up to a constant length, and at which positions of each it is wanted."""

    token: Token
    positions: Mapping[str, Sequence[int]]


def packs(
    sequences: Mapping[str, tuple[Token, ...]], size: int = PACK, padding: Padding | None = None
) -> Iterator[Pack]:
    """Prompts by their tokens in packs of about `size` tokens; neighbours in order share the most."""
    tokens: list[Token] = []
    places: dict[str, list[int]] = {}
    pads: dict[str, dict[int, int]] = {}
    before: tuple[Token, ...] = ()
    path: list[int] = []  # the places of `before`
    for prompt, sequence in sorted(sequences.items(), key=lambda item: item[1]):
        shared = next(
            (at for at, (one, other) in enumerate(zip(before, sequence, strict=False)) if one != other),
            min(len(before), len(sequence)),
        )
        behind = padding.positions[prompt] if padding else ()
        if len(tokens) + len(sequence) - shared + len(behind) > size and tokens:
            yield Pack(tokens, places, pads)
            tokens, places, pads, shared = [], {}, {}, 0
        path = [*path[:shared], *range(len(tokens), len(tokens) + len(sequence) - shared)]
        tokens.extend(sequence[shared:])
        places[prompt], before = path, sequence
        if padding and behind:
            pads[prompt] = {position: place for place, position in enumerate(behind, start=len(tokens))}
            tokens.extend([padding.token] * len(behind))
    if tokens:
        yield Pack(tokens, places, pads)
