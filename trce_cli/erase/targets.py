"""What a map has to take where: prompt pairs, embedded at their slots."""

from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Final

import torch
from torch import Tensor

from trce_cli.errors import TrceError
from trce_cli.families.base import Slot, Text
from trce_cli.maths.closed_form import MapFitter
from trce_cli.maths.linear_map import LinearMap
from trce_cli.prompts.pairs import PromptPair
from trce_cli.system.progress import Report, no_report

BLOCK: Final = 1024  # slots whose embeddings are in memory in float64 at a time

PairSlots = Mapping[str, list[Slot]]  # by stream


@dataclass(frozen=True)
class Targets:
    """What the map of a stream has to take where, slot by slot: the rows of unsafe embeddings o and safe n.

    embeddings: (rows, width), each distinct one once. weights: w of the slots. pairs: that the slots are of.
    """

    embeddings: Tensor
    unsafe: Tensor  # (slots,)
    safe: Tensor  # (slots,)
    weights: Tensor  # (slots,)
    pairs: int

    @classmethod
    def joined(cls, parts: Sequence["Targets"]) -> "Targets":
        """All slots of several targets, whose pairs count one by one."""
        if len(parts) == 1:
            return parts[0]
        starts = [0, *accumulate(len(each.embeddings) for each in parts)]
        return cls(
            embeddings=torch.cat([each.embeddings for each in parts]),
            unsafe=torch.cat([each.unsafe + start for each, start in zip(parts, starts, strict=False)]),
            safe=torch.cat([each.safe + start for each, start in zip(parts, starts, strict=False)]),
            weights=torch.cat([each.weights for each in parts]),
            pairs=sum(each.pairs for each in parts),
        )

    def blocks(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """o and n, float64 (slots, width), and w (slots,), of so many slots at a time."""
        rows = (self.unsafe, self.safe, self.weights)
        for unsafe, safe, w in zip(*(each.split(BLOCK) for each in rows), strict=True):
            yield self.embeddings[unsafe].double(), self.embeddings[safe].double(), w

    def fitter(self) -> MapFitter:
        """What the closed form needs of them."""
        fitter = MapFitter(self.embeddings.shape[1], self.pairs)
        for block in self.blocks():
            fitter.update(*block)
        return fitter

    def moved(self, linear: LinearMap) -> float:
        """How far a map takes them to the safe embeddings, as `MapFitter.moved` has it."""
        inner = way = 0.0
        for o, n, w in self.blocks():
            inner += float(w @ ((n - o) * (linear(o) - o)).sum(1))
            way += float(w @ (n - o).square().sum(1))
        return inner / way if way else 0.0

    def cosines(self, linear: LinearMap) -> dict[str, dict[str, float]]:
        """Cosine of unsafe to safe embeddings, before and after the map: mean and minimum."""
        cosines: dict[str, list[Tensor]] = {"before": [], "after": []}
        for o, n, _ in self.blocks():
            for when, embeddings in (("before", o), ("after", linear(o))):
                cosines[when].append(torch.nn.functional.cosine_similarity(embeddings, n))
        found = {when: torch.cat(parts) for when, parts in cosines.items()}
        return {when: {"mean": float(c.mean()), "min": float(c.min())} for when, c in found.items()}


@dataclass(frozen=True)
class EmbeddedPairs:
    """Prompt pairs with the embeddings of their slots, from which targets of several weights are made.

    embeddings: by stream, float32 (rows, width). places: by stream, prompt and position -> row.
    """

    text: Text
    pairs: Sequence[PromptPair]
    embeddings: Mapping[str, Tensor]
    places: Mapping[str, Mapping[tuple[str, int], int]]

    def targets(
        self, weights: Mapping[str, float], pairs: Sequence[PromptPair] | None = None
    ) -> dict[str, Targets]:
        """By stream, the targets of these pairs, or of all, at the slots that carry weight.

        Raises TrceError where a weight is given to a kind of slot that no pair has, and so would do nothing.
        """
        chosen = self.pairs if pairs is None else pairs
        weighted = [(pair, pair_slots(self.text, pair, weights)) for pair in chosen]
        main = next(iter(self.text.streams))
        kinds = {slot.kind for _, slots in weighted for slot in slots[main]}
        for kind, weight in weights.items():
            if weight and kind not in kinds:
                raise TrceError(
                    f"The token weight {weight:g} of {kind} would do nothing: no unsafe prompt has one.",
                    "It is cut off where prompts are too long; shorten the templates, or set it to 0.",
                )
        return {stream: self._of(stream, weighted) for stream in self.embeddings}

    def _of(self, stream: str, weighted: Sequence[tuple[PromptPair, PairSlots]]) -> Targets:
        places = self.places[stream]
        each = [(pair, slot) for pair, slots in weighted for slot in slots[stream]]
        return Targets(
            embeddings=self.embeddings[stream],
            unsafe=torch.tensor([places[pair.unsafe, slot.unsafe] for pair, slot in each]),
            safe=torch.tensor([places[pair.safe, slot.safe] for pair, slot in each]),
            weights=torch.tensor([slot.weight for _, slot in each], dtype=torch.float64),
            pairs=len(weighted),
        )


def pair_slots(text: Text, pair: PromptPair, weights: Mapping[str, float]) -> PairSlots:
    """The slots of a pair by stream; in the main one those whose kind has weight."""
    return text.slots(pair.unsafe, pair.safe, pair.keyword, weights)


def embed_pairs(
    text: Text,
    pairs: Sequence[PromptPair],
    weights: Collection[Mapping[str, float]],
    report: Report = no_report,
) -> EmbeddedPairs:
    """Encode each distinct prompt once, up to the last slot that any of these weights gives weight."""
    wanted: dict[str, dict[str, set[int]]] = {stream: defaultdict(set) for stream in text.streams}
    for each in weights:
        for pair in pairs:
            for stream, slots in pair_slots(text, pair, each).items():
                for slot in slots:
                    wanted[stream][pair.unsafe].add(slot.unsafe)
                    wanted[stream][pair.safe].add(slot.safe)
    positions = {
        stream: {prompt: sorted(places) for prompt, places in prompts.items()}
        for stream, prompts in wanted.items()
    }
    embeddings = {
        stream: torch.empty(sum(map(len, positions[stream].values())), width)
        for stream, width in text.streams.items()
    }
    places: dict[str, dict[tuple[str, int], int]] = {stream: {} for stream in text.streams}
    for batch in text.states(positions, report):
        for stream, states in batch.items():
            found = places[stream]
            for prompt, rows in states.rows.items():
                embeddings[stream][len(found) :][: len(rows)] = states.embeddings[list(rows)]
                found |= {(prompt, at): len(found) + row for row, at in enumerate(positions[stream][prompt])}
    return EmbeddedPairs(text, pairs, embeddings, places)
