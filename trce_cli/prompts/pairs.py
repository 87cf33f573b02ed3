"""Concepts x templates -> prompt pairs: what stage 1 maps onto what."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Final

from trce_cli.prompts.presets import Preset
from trce_cli.system.words import bare

MOST: Final = 3  # concepts that stand before a compound's own


@dataclass(frozen=True, slots=True)
class PromptPair:
    """An unsafe prompt, the safe prompt it is mapped to, and the unsafe phrase as it stands in the former."""

    unsafe: str
    safe: str
    keyword: str

    @property
    def replacement(self) -> str:
        """The safe phrase as it stands in the latter, in the keyword's place."""
        before, _, after = self.unsafe.partition(self.keyword)
        return self.safe.removeprefix(before).removesuffix(after)


def pair_prompts(presets: Iterable[Preset]) -> list[str]:
    """Every prompt of the presets' pairs, each once."""
    return list(dict.fromkeys(text for pair in prompt_pairs(presets) for text in (pair.unsafe, pair.safe)))


def prompt_pairs(presets: Iterable[Preset]) -> list[PromptPair]:
    """Every concept in every template of its preset, included presets too: deduplicated, in stable order.

    Order: presets as given; in each its own concepts, then its includes; a concept's templates together.
    """
    pairs = (
        PromptPair(
            template.replace("{}", concept.unsafe), template.replace("{}", concept.safe), concept.unsafe
        )
        for preset in presets
        for part in preset.walk()
        for concept in part.concepts
        for template in part.templates
    )
    return list(dict.fromkeys(pairs))


def with_compounds(pairs: Sequence[PromptPair], count: int, seed: int = 0) -> list[PromptPair]:
    """The pairs, and each of them `count` times more with further concepts before its own.

    A compound has one to three unsafe phrases without their articles before its keyword, and the same
    concepts' safe phrases before the safe one: what a search for words that bring a concept back finds. Those
    of a concept are the same in all templates, chosen at random by the seed; a lower count's are the first of
    a higher one's.
    """
    concepts = list(dict.fromkeys((pair.keyword, pair.replacement) for pair in pairs))
    random, found = Random(seed), list(pairs)
    for _ in range(count):
        others = {
            concept: random.sample(concepts, random.randint(1, min(MOST, len(concepts))))
            for concept in concepts
        }
        found += [_compound(pair, others[pair.keyword, pair.replacement]) for pair in pairs]
    return found


def _compound(pair: PromptPair, others: Sequence[tuple[str, str]]) -> PromptPair:
    before, _, after = pair.unsafe.partition(pair.keyword)
    unsafe, safe = (" ".join(map(bare, phrases)) for phrases in zip(*others, strict=True))
    keyword = f"{unsafe} {pair.keyword}"
    return PromptPair(f"{before}{keyword}{after}", f"{before}{safe} {pair.replacement}{after}", keyword)
