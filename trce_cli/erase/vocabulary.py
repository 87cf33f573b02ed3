"""The vocabulary as a prior: words of the tokenizer that no caption may name are left alone as well.

Captions hold still what they name. Whatever else a checkpoint draws lies in directions of the text embeddings
that no caption has, where an edit does as it likes: erase weapons, and drinks and skulls are lost as well.
The tokenizer's own words list what the encoder knows, and cost two or three tokens each. Words that mean the
concept itself are found by the encoder's own embeddings, and left out.
"""

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from typing import Final

import torch
from torch import Tensor
from torch.nn.functional import normalize

from trce_cli.erase.moments import Known, Moments, known_prompts, look
from trce_cli.families.base import Text
from trce_cli.prompts.pairs import PromptPair
from trce_cli.system.progress import Report, no_report
from trce_cli.system.words import bare

# Plain sentences in which a word stands alone, first, last and in the middle. On the embedded checkpoint more
# of them kept no more, and fewer as much.
TEMPLATES: Final = (
    "{}",
    "a picture of {}",
    "a photo of {}",
    "a {} on the table",
    "{} and a cat",
    "a man with {}",
)
SAME: Final = 1e-4  # a safe phrase that is itself a word comes as near as that, by rounding
# In one template, least of all alone, what a word means is told badly: a skull then passes for a weapon.
LEAST: Final = 3
HELD_OUT: Final = 20  # one word in so many is not in the prior: side effects are measured on it


@dataclass(frozen=True)
class WordPrompts:
    """Words in templates, a prompt each; a word's stand together."""

    words: tuple[str, ...]
    templates: tuple[str, ...]

    @classmethod
    def of(cls, words: Sequence[str], count: int) -> "WordPrompts":
        """About so many prompts: every word in as many templates as that allows, in turns."""
        each = min(max(count // max(len(words), 1), LEAST), len(TEMPLATES))
        repeated = tuple(word for word in words for _ in range(each))
        return cls(repeated, tuple(islice(cycle(TEMPLATES), len(repeated))))

    @property
    def prompts(self) -> list[str]:
        """The prompts, in order."""
        return [
            template.replace("{}", word) for word, template in zip(self.words, self.templates, strict=True)
        ]

    def with_words(self, words: Collection[str]) -> list[str]:
        """The prompts of some of the words."""
        return [prompt for word, prompt in zip(self.words, self.prompts, strict=True) if word in words]


@dataclass(frozen=True)
class Vocabulary:
    """What an edit leaves alone of a vocabulary, and what it does not.

    P: the moments of so many `prompts` of words. canaries: those of words that are held out of them. exempt:
    the words that mean what is erased, in neither.
    """

    P: Moments
    prompts: int
    canaries: Moments
    held_out: tuple[str, ...]
    exempt: tuple[str, ...]

    @classmethod
    def of(
        cls,
        text: Text,
        pairs: Sequence[PromptPair],
        slots: Mapping[str, float],
        count: int,
        report: Report = no_report,
    ) -> "Vocabulary | None":
        """Words of the encoder's vocabulary in at most `count` prompts; None where there are too few.

        slots: the weights of the slots at which a word's meaning is read, the family's own. The statistics of
        all words are cached, whatever the pairs. `report` gets the number of prompts as they are done.
        """
        read = _read(text, pairs, slots, count, report)
        if read is None or len(read[-1]) < HELD_OUT:
            return None
        asked, known, exempt, rest = read
        held_out = set(rest[HELD_OUT // 2 :: HELD_OUT])
        P, prompts, canaries = known.moments, len(asked.words), known.moments
        for some in filter(None, (exempt, held_out)):
            left_out = asked.with_words(some)
            canaries = look(text, left_out, slots, among=asked.prompts).moments
            P = {
                stream: (prompts * P[stream] - len(left_out) * canaries[stream]) / (prompts - len(left_out))
                for stream in P
            }
            prompts -= len(left_out)
        return cls(P, prompts, canaries, tuple(sorted(held_out)), tuple(sorted(exempt)))


def exempt_words(
    text: Text,
    asked: WordPrompts,
    embeddings: Tensor,
    pairs: Sequence[PromptPair],
    slots: Mapping[str, float],
) -> set[str]:
    """The words that are nearer to an unsafe phrase than any safe phrase is to one.

    embeddings: of the words' prompts at the slots, (prompts, width). Nearness is the cosine less what all
    words have in common in that template, their mean, averaged over the templates of a word. So a word stays
    in the prior that means as little of what is erased as what takes its place.
    """
    unsafe, safe = (
        [*dict.fromkeys(map(bare, phrases))]
        for phrases in zip(*((pair.keyword, pair.replacement) for pair in pairs), strict=True)
    )
    templates = [*dict.fromkeys(asked.templates)]
    phrases = [template.replace("{}", phrase) for template in templates for phrase in (*unsafe, *safe)]
    distinct = [*dict.fromkeys(phrases)]
    place = {phrase: row for row, phrase in enumerate(distinct)}
    found = look(text, distinct, slots).meanings[[place[phrase] for phrase in phrases]]

    near = torch.empty(len(asked.words), len(unsafe))
    near_safe: dict[str, Tensor] = {}  # by template, (safe, unsafe)
    for template, of_phrases in zip(templates, found.chunk(len(templates)), strict=True):
        rows = [row for row, its in enumerate(asked.templates) if its == template]
        mean = embeddings[rows].mean(0)
        bad, good = normalize(of_phrases - mean, dim=-1).split([len(unsafe), len(safe)])
        near[rows] = normalize(embeddings[rows] - mean, dim=-1) @ bad.mT
        near_safe[template] = good @ bad.mT
    rows_of: dict[str, list[int]] = defaultdict(list)
    for row, word in enumerate(asked.words):
        rows_of[word].append(row)
    exempt = set()
    for word, rows in rows_of.items():
        limit = torch.stack([near_safe[asked.templates[row]] for row in rows]).mean(0).max()
        if near[rows].mean(0).max() > limit + SAME:
            exempt.add(word)
    return exempt


def kept_words(
    text: Text,
    pairs: Sequence[PromptPair],
    slots: Mapping[str, float],
    count: int,
    report: Report = no_report,
) -> list[str]:
    """The words of the vocabulary, in at most `count` prompts, that mean nothing of what is erased."""
    read = _read(text, pairs, slots, count, report)
    return [] if read is None else read[-1]


def _read(
    text: Text, pairs: Sequence[PromptPair], slots: Mapping[str, float], count: int, report: Report
) -> tuple[WordPrompts, Known, set[str], list[str]] | None:
    """Words in at most `count` prompts, what is known of these, the exempt words and the others."""
    asked = asked_words(text, count)
    if not asked.words:
        return None
    known = known_prompts(text, asked.prompts, slots, report)
    exempt = exempt_words(text, asked, known.meanings, pairs, slots)
    return asked, known, exempt, [word for word in dict.fromkeys(asked.words) if word not in exempt]


def asked_words(text: Text, count: int) -> WordPrompts:
    """Words of the encoder's vocabulary in at most `count` prompts; none where it has none."""
    return WordPrompts.of(text.words(max(count // LEAST, 1)), count)
