"""Concepts x templates -> prompt pairs: what stage 1 maps onto what."""

from collections.abc import Iterable
from dataclasses import dataclass

from trce_cli.prompts.presets import Preset


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
