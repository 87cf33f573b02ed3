"""Prompt suites for measuring the embedded checkpoint and what has been erased from it.

Every suite is seeded and balanced over its classes. Standard library only.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from random import Random

from trce_cli.emoji.world import (
    BENIGN,
    HELD_OUT,
    PAIR,
    SINGLE,
    SUBSTANCES,
    WEAPONS,
    Concept,
    Split,
    concepts,
)

ERASURE = ("explicit", "implied", "context", "benign", "bystanders")


@dataclass(frozen=True)
class SuitePrompt:
    """A prompt with what a faithful picture of it shows."""

    text: str
    objects: tuple[str, ...]
    background: str | None = None


def erasure_suite(
    name: str, unsafe: tuple[str, ...], count: int, seed: int = 0, split: Split = "held"
) -> list[SuitePrompt]:
    """Prompts that ask what is left of the ``unsafe`` classes and of all else; ``name`` is in ``ERASURE``.

    ``explicit`` names an unsafe class in an unseen template, ``implied`` paraphrases it in unseen words,
    ``context`` puts it beside a benign class, which must survive, and ``benign`` has nothing unsafe in it.
    ``bystanders`` asks for what neither they nor the prior name: classes held out of it, and unsafe ones that
    are not among them. All that is the split ``"held"``, for reports. ``"train"`` asks the same in the
    grammar of training, to choose settings by; its templates are others, so no prompt is in both.
    """
    return list(islice(_erasure(name, unsafe, Random(seed), split), count))


def _erasure(name: str, unsafe: tuple[str, ...], rng: Random, split: Split) -> Iterator[SuitePrompt]:
    benign = rounds(rng, BENIGN)
    others = tuple(each for each in WEAPONS + SUBSTANCES + HELD_OUT if each not in unsafe)
    if name == "bystanders" and not others:
        return
    bystanders = rounds(rng, others)
    for subject in rounds(rng, unsafe):
        concept = concepts()[subject]
        template = rng.choice(SINGLE[split])
        match name:
            case "explicit":
                yield SuitePrompt(template.format(rng.choice(_names(concept, split))), (subject,))
            case "implied":
                phrases = concept.held_implied if split == "held" else concept.implied
                yield SuitePrompt(template.format(rng.choice(phrases)), (subject,))
            case "context":
                other = next(benign)
                pair = [(subject, rng.choice(concept.names)), (other, concepts()[other].canonical)]
                rng.shuffle(pair)
                text = rng.choice(PAIR[split]).format(pair[0][1], pair[1][1])
                yield SuitePrompt(text, (pair[0][0], pair[1][0]))
            case "benign" | "bystanders":
                other = next(benign if name == "benign" else bystanders)
                phrase = rng.choice(_names(concepts()[other], split) + concepts()[other].implied)
                yield SuitePrompt(template.format(phrase), (other,))
            case _:
                raise ValueError(f"unknown erasure suite {name!r}; choose from {', '.join(ERASURE)}")


def _names(concept: Concept, split: Split) -> tuple[str, ...]:
    return concept.names + (concept.held_names if split == "held" else ())


def rounds(rng: Random, names: tuple[str, ...]) -> Iterator[str]:
    """The names over and over, in a new order each round, so that any number of prompts is balanced."""
    while True:
        yield from rng.sample(names, len(names))
