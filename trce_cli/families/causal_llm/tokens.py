"""Prompts as a language model reads them, in the middle of a template, and the slots of prompt pairs."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import takewhile
from typing import Any

from trce_cli.errors import BadInput
from trce_cli.families.base import Slot
from trce_cli.families.causal_llm.spec import PADDED_SLOTS, LlmSpec
from trce_cli.families.slots import occurrences, pad_slots, sampled
from trce_cli.system.words import bare


@dataclass(frozen=True)
class Tokens:
    """A prompt in its template. Positions count from the first token that reaches the denoiser.

    ids: of all tokens up to the limit, the template's first included. spans: of each, the letters of the
    rendered text that it stands for. before: of `ids`, those that never reach the denoiser. begin, end:
    positions of the prompt's own first token, and behind its last one. is_whole: whether nothing was cut off.
    """

    ids: tuple[int, ...]
    spans: tuple[tuple[int, int], ...]
    before: int
    begin: int
    end: int
    is_whole: bool

    @property
    def count(self) -> int:
        """How many tokens reach the denoiser, padding aside."""
        return max(len(self.ids) - self.before, 0)


class Template:
    """What stands around every prompt: found by putting two prompts in and looking what stays.

    Raises BadInput for a template that does not hold the prompt as it is.
    """

    def __init__(self, tokenizer: Any, spec: LlmSpec) -> None:
        self.tokenizer, self.spec = tokenizer, spec
        one, other = self._rendered("xyz"), self._rendered("abc")
        self.prefix = common_start(one, other)
        self.suffix = common_start(one[::-1], other[::-1])[::-1]
        if one != f"{self.prefix}xyz{self.suffix}":
            raise BadInput("The chat template of the checkpoint's tokenizer does not hold a prompt as it is.")

    def rendered(self, prompt: str) -> str:
        """The prompt in the template."""
        text = self._rendered(prompt)
        if len(text) < len(self.prefix) + len(self.suffix) or not (
            text.startswith(self.prefix) and text.endswith(self.suffix)
        ):
            raise BadInput(
                f"The chat template of the checkpoint's tokenizer has no place for {prompt[:60]!r}."
            )
        return text

    def _rendered(self, prompt: str) -> str:
        if self.spec.template is not None:
            return self.spec.template.format(prompt)
        messages = [{"role": "user", "content": prompt}]
        text: str = self.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True, enable_thinking=self.spec.thinks
        )
        return text


class Tokenizer:
    """A tokenizer with the family's template; what it found is kept."""

    def __init__(self, tokenizer: Any, spec: LlmSpec) -> None:
        self.tokenizer, self.spec = tokenizer, spec
        self._tokens: dict[str, Tokens] = {}

    @cached_property
    def template(self) -> Template:
        """What stands around every prompt."""
        return Template(self.tokenizer, self.spec)

    def tokens(self, prompts: Collection[str]) -> list[Tokens]:
        """The tokens of each prompt, in order."""
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._tokens]
        if new:
            texts = [self.template.rendered(prompt) for prompt in new]
            found = self.tokenizer(
                texts, truncation=True, max_length=self.spec.limit, return_offsets_mapping=True
            )
            for prompt, text, ids, spans in zip(
                new, texts, found["input_ids"], found["offset_mapping"], strict=True
            ):
                self._tokens[prompt] = self._located(text, tuple(ids), tuple(map(tuple, spans)))
        return [self._tokens[prompt] for prompt in prompts]

    def _located(self, text: str, ids: tuple[int, ...], spans: tuple[tuple[int, int], ...]) -> Tokens:
        first, last = len(self.template.prefix), len(text) - len(self.template.suffix)
        begin = sum(end <= first for _, end in spans)
        end = begin + sum(stop > first and start < last for start, stop in spans)
        before = self.spec.dropped
        is_whole = len(ids) < self.spec.limit or spans[-1][1] >= len(text)
        return Tokens(ids, spans, before, max(begin - before, 0), max(end - before, 0), is_whole)

    def slots(self, unsafe: str, safe: str, keyword: str, weights: Mapping[str, float]) -> list[Slot]:
        """The slots of a prompt pair whose kind has weight; see `spec.SLOTS`. None that was cut off."""
        w = {**dict.fromkeys(PADDED_SLOTS, 0.0), **weights}
        if (w["END"] or w["SUFFIX"]) and not self.template.suffix:
            raise BadInput(
                "The chat template of the checkpoint's tokenizer puts nothing behind a prompt, so that there "
                "is no slot END or SUFFIX.",
                "Map the prompt's own last token: --token-weights LAST=1.",
            )
        o, n = self.tokens([unsafe, safe])
        found = []
        behind = min(o.count - o.end, n.count - n.end) if o.is_whole and n.is_whole else 0
        for at in range(1, behind + 1):
            found += [Slot("END", o.count - at, n.count - at, w["END"])] if at == 1 else []
            found += [Slot("SUFFIX", o.count - at, n.count - at, w["SUFFIX"])]
        if o.end > o.begin and n.end > n.begin:
            found += [Slot("LAST", o.end - 1, n.end - 1, w["LAST"])]
        found += pad_slots(self.pads(unsafe), self.pads(safe), w["PADS"])
        places = self.keyword_positions(unsafe, keyword) if w["TAIL"] or w["KEYWORD"] else []
        if places:
            tail = o.end - 1 - places[-1]
            found += [
                Slot("TAIL", o.end - at, n.end - at, w["TAIL"])
                for at in range(1, min(tail, n.end - n.begin) + 1)
            ]
            goal = max(n.end - 1 - tail, n.begin)
            found += [Slot("KEYWORD", place, goal, w["KEYWORD"]) for place in places if n.end > n.begin]
        return [slot for slot in found if slot.weight]

    def pads(self, prompt: str) -> list[int]:
        """The positions that stand for all padding, if the denoiser sees any."""
        (tokens,) = self.tokens([prompt])
        return sampled(self.spec.limit - tokens.before, tokens.count) if self.spec.padded else []

    def keyword_positions(self, prompt: str, keyword: str) -> list[int]:
        """The positions of all tokens of every occurrence of the keyword, as far as the prompt is read.

        Its article is none of them: read before the rest, it says the same of whatever follows.
        """
        (tokens,) = self.tokens([prompt])
        start = len(self.template.prefix)
        inside = [
            (at, *span)
            for at, span in enumerate(tokens.spans, start=-tokens.before)
            if tokens.begin <= at < tokens.end
        ]
        return [
            at
            for at, begin, end in inside
            if any(
                begin < start + stop and start + first < end
                for first, stop in occurrences(prompt, bare(keyword))
            )
        ]


def common_start(one: str, other: str) -> str:
    """What both texts begin with."""
    both = takewhile(lambda letters: letters[0] == letters[1], zip(one, other, strict=False))
    return "".join(letter for letter, _ in both)
