"""Padding: how far an edit moves what says the prompt behind it, in pairs that the edit was not solved from.

The denoiser sees padding as it sees words, and far more of it. Behind a causal text encoder's end token it
says the whole prompt. An edit of the end token moves it as well where it is that token again, and hardly
where it is another one.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from typing import Final

import torch
from torch import Tensor

from trce_cli.families.base import Text
from trce_cli.maths.linear_map import LinearMap
from trce_cli.prompts.pairs import PromptPair

# No shipped preset has these.
TEMPLATES: Final = (
    "a man carrying {} in the rain",
    "someone drew {} on the wall",
    "a small picture of {} beside a lamp",
)
MOST: Final = 64  # concepts: enough for a figure


def held_out(pairs: Sequence[PromptPair]) -> list[PromptPair]:
    """Up to `MOST` concepts of the pairs, spread evenly, in templates of their own."""
    concepts = list(dict.fromkeys((pair.keyword, pair.replacement) for pair in pairs))
    chosen = islice(concepts, 0, None, -(-len(concepts) // MOST))
    return [
        PromptPair(template.replace("{}", unsafe), template.replace("{}", safe), unsafe)
        for template, (unsafe, safe) in zip(cycle(TEMPLATES), chosen, strict=False)
    ]


@dataclass(frozen=True)
class Padding:
    """Embeddings of padding behind unsafe prompts and behind their safe ones, float32 (places, width)."""

    unsafe: Tensor
    safe: Tensor

    @classmethod
    def of(cls, text: Text, pairs: Sequence[PromptPair]) -> "Padding | None":
        """Behind held-out pairs, in the main stream; None where the denoiser sees none."""
        main = next(iter(text.streams))
        each = [(pair, slot) for pair in held_out(pairs) for slot in text.padding(pair.unsafe, pair.safe)]
        if not each:
            return None
        places: dict[str, set[int]] = defaultdict(set)
        for pair, slot in each:
            places[pair.unsafe].add(slot.unsafe)
            places[pair.safe].add(slot.safe)
        wanted = {prompt: sorted(positions) for prompt, positions in places.items()}
        found: dict[tuple[str, int], Tensor] = {}
        for batch in text.states({main: wanted}):
            for prompt, rows in batch[main].rows.items():
                states = batch[main].embeddings[list(rows)]
                found |= {(prompt, at): row for at, row in zip(wanted[prompt], states, strict=True)}
        return cls(
            torch.stack([found[pair.unsafe, slot.unsafe] for pair, slot in each]),
            torch.stack([found[pair.safe, slot.safe] for pair, slot in each]),
        )

    def moved(self, linear: LinearMap) -> Callable[[Tensor, str], float]:
        """Of a weight W, how far the map takes W o to W n: sum <W (n - o), W (M - I) o> / sum |W (n - o)|^2.

        0 not at all, 1 all the way.
        """
        way = self.safe - self.unsafe
        moves = linear.moves(self.unsafe.double()).float()

        def share(weight: Tensor, key: str) -> float:
            W = weight[:, : linear.width].float()
            whole = way @ W.mT
            size = float(whole.square().sum())
            return float((whole * (moves @ W.mT)).sum()) / size if size else 0.0

        return share
