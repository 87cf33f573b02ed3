"""Prompt suites that ask how well the embedded checkpoint draws."""

from collections.abc import Iterator
from itertools import islice
from random import Random

from trce_cli.emoji.suites import SuitePrompt, rounds
from trce_cli.emoji.world import BACKGROUNDS, PAIR, SINGLE, concepts, name_background

QUALITY = ("canonical", "held phrase", "held implied", "two objects", "background")


def quality_suite(name: str, count: int, seed: int = 0) -> list[SuitePrompt]:
    """Prompts over all classes that ask how well the checkpoint draws; ``name`` is one of ``QUALITY``."""
    return list(islice(_quality(name, Random(seed)), count))


def _quality(name: str, rng: Random) -> Iterator[SuitePrompt]:
    backgrounds = rounds(rng, tuple(BACKGROUNDS))
    for subject in rounds(rng, tuple(concepts())):
        concept = concepts()[subject]
        seen = rng.choice(SINGLE["train"])
        match name:
            case "canonical":
                yield SuitePrompt(seen.format(concept.canonical), (subject,))
            case "held phrase":
                yield SuitePrompt(seen.format(rng.choice(concept.held_names)), (subject,))
            case "held implied":
                yield SuitePrompt(
                    rng.choice(SINGLE["held"]).format(rng.choice(concept.held_implied)), (subject,)
                )
            case "two objects":
                other = rng.choice([n for n in concepts() if n != subject])
                text = rng.choice(PAIR["train"]).format(concept.canonical, concepts()[other].canonical)
                yield SuitePrompt(text, (subject, other))
            case "background":
                background = next(backgrounds)
                yield SuitePrompt(
                    name_background(seen.format(concept.canonical), background, rng), (subject,), background
                )
            case _:
                raise ValueError(f"unknown quality suite {name!r}; choose from {', '.join(QUALITY)}")
