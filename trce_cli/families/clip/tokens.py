"""Prompts as CLIP's tokenizers see them, and the slots of prompt pairs."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Final

from trce_cli.errors import TrceError
from trce_cli.families.base import Slot
from trce_cli.families.slots import occurrences
from trce_cli.system.words import bare

SOT: Final = 0  # the position of the start token in every prompt
SLOTS: Final = ("SOT", "FIRST_EOT", "LAST_EOT", "KEYWORD")
DISTANCES: Final = (1, 2, 4, 8, 16, 32)  # behind a prompt, of the padding that stands for all of it
TOKENIZED: Final = 1024  # prompts that are tokenized together: a tokenizer's result takes 20 KB a prompt


@dataclass(frozen=True)
class Tokens:
    """A prompt as the pipeline's tokenizers see it, and where its slots lie; positions count from 0.

    ids: for each text encoder the token ids, truncated and padded to the tokenizer's maximal length.
    eot: position of the prompt's own (first) EoT. padding: how many positions at the end are padding.
    """

    ids: tuple[tuple[int, ...], ...]
    eot: int
    padding: int

    @property
    def last(self) -> int:
        """The last position: the last EoT where the tokenizer pads with EoT, else the last padding token."""
        return len(self.ids[0]) - 1


class Tokenizers:
    """A family's tokenizers, which agree on where a prompt ends; what they found is kept.

    with_eot: whether all prompts are padded with EoT, as some clients do, whatever the tokenizers say.
    """

    def __init__(self, tokenizers: Sequence[Any], with_eot: bool = False) -> None:
        self.each, self.with_eot = tuple(tokenizers), with_eot
        self._tokens: dict[str, Tokens] = {}

    @property
    def pad_otherwise(self) -> bool:
        """Whether one of them pads with another token than EoT, which then says the prompt in its own way."""
        return any(each.pad_token_id != each.eos_token_id for each in self.each) and not self.with_eot

    def tokens(self, prompts: Collection[str]) -> list[Tokens]:
        """The tokens of each prompt, in order."""
        new = iter([prompt for prompt in dict.fromkeys(prompts) if prompt not in self._tokens])
        while some := list(islice(new, TOKENIZED)):
            self._tokens.update(zip(some, self._tokenize(some), strict=True))
        return [self._tokens[prompt] for prompt in prompts]

    def _tokenize(self, prompts: list[str]) -> Iterator[Tokens]:
        encoded = [
            tokenizer(prompts, padding="max_length", max_length=tokenizer.model_max_length, truncation=True)
            for tokenizer in self.each
        ]
        for row in range(len(prompts)):
            ids = tuple(tuple(batch["input_ids"][row]) for batch in encoded)
            # From the ids, after SoT: the pad token may be EoT itself, and the config's eos_token_id may be a
            # legacy 2 that is no EoT at all.
            eots = {
                row_ids.index(tokenizer.eos_token_id, SOT + 1)
                for row_ids, tokenizer in zip(ids, self.each, strict=True)
            }
            if len(eots) > 1:
                raise TrceError(f"The checkpoint's tokenizers disagree on where {prompts[row]!r} ends.")
            eot = eots.pop()
            if self.with_eot:
                ids = tuple(
                    each[: eot + 1] + (tokenizer.eos_token_id,) * (len(each) - eot - 1)
                    for each, tokenizer in zip(ids, self.each, strict=True)
                )
            yield Tokens(ids, eot, padding=encoded[0]["attention_mask"][row].count(0))

    def slots(self, unsafe: str, safe: str, keyword: str, weights: Mapping[str, float]) -> list[Slot]:
        """The slots of a prompt pair whose kind has weight, each prompt's own EoT found from its token ids.

        The last EoT counts as often as there is padding. Each token of the keyword goes to what stands as
        far before the safe prompt's first EoT as the keyword's end before the unsafe one's: the safe phrase's
        last token. Where padding is not EoT, a sample of it goes along with the first EoT, for as much in
        all.
        """
        o, n = self.tokens([unsafe, safe])
        w = {**dict.fromkeys(SLOTS, 0.0), **weights}
        found = [
            Slot("SOT", SOT, SOT, w["SOT"]),
            Slot("FIRST_EOT", o.eot, n.eot, w["FIRST_EOT"]),
            Slot("LAST_EOT", o.last, n.last, w["LAST_EOT"] * o.padding),
        ]
        if self.pad_otherwise and (pads := self.padding(unsafe, safe)):
            found += [Slot("PADDING", pad, pad, w["FIRST_EOT"] / len(pads)) for pad in pads]
        if w["KEYWORD"] and (places := self.keyword_positions(unsafe, keyword)):
            goal = max(n.eot - (o.eot - places[-1]), SOT + 1)
            found += [Slot("KEYWORD", place, goal, w["KEYWORD"]) for place in places]
        return [slot for slot in found if slot.weight]

    def padding(self, unsafe: str, safe: str) -> list[int]:
        """Positions that are padding in both prompts, at distances from the longer one that double."""
        end, last = max(tokens.eot for tokens in self.tokens([unsafe, safe])), self.tokens([safe])[0].last
        return [end + distance for distance in DISTANCES if end + distance <= last]

    def keyword_positions(self, prompt: str, keyword: str) -> list[int]:
        """The positions of all tokens of every occurrence of the keyword, up to where the prompt is cut off.

        Its article is none of them: read before the rest, it says the same of whatever follows. Letter case
        and the length of white space do not matter, as to CLIP's tokenizer; see `occurrences`.
        """
        spans = occurrences(prompt, bare(keyword))
        tokenizer = self.each[0]
        offsets = tokenizer(
            prompt,
            max_length=tokenizer.model_max_length,
            truncation=True,
            return_offsets_mapping=True,
        )["offset_mapping"]
        return [
            position
            for position, (begin, end) in enumerate(offsets)
            if begin < end and any(begin < stop and start < end for start, stop in spans)
        ]
