"""The text encoders: both CLIP's states enter by one door, T5's behind them, and the pooled by another."""

import hashlib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from copy import copy

import torch
from torch import Tensor
from torch.nn.functional import pad

from trce_cli.families.base import Batch, Conditioning, Slot, States, Wanted, Weights, with_empty
from trce_cli.families.clip.spec import CONTEXT, POOLED
from trce_cli.families.clip.text import ClipText
from trce_cli.families.clip.words import whole_words as clip_words
from trce_cli.families.load import spread
from trce_cli.families.sd3.config import transformer
from trce_cli.families.sd3.spec import CLIPS, T5, reads_t5
from trce_cli.families.t5.text import GROUP, T5Text
from trce_cli.families.t5.tokens import whole_words as t5_words
from trce_cli.families.words import common
from trce_cli.system.progress import Report, no_report


class Sd3Text:
    """All encoders; see `families.base.Text`. Positions are CLIP's first, then T5's, which from `begin` on.

    CLIP's states are padded with zeros to the door's width. Without T5 there are zeros in its place.
    """

    def __init__(self, weights: Weights, device: torch.device | str, dtype: torch.dtype) -> None:
        self.clip = ClipText(weights, CLIPS, device, dtype)
        self.t5 = T5Text(weights, T5, device, dtype) if reads_t5(weights.config["model_index"]) else None
        self.begin: int = self.clip.tokenizers.each[0].model_max_length
        self.width = transformer(weights.config["denoiser"]).joint_attention_dim
        self.streams = {CONTEXT: self.width, POOLED: self.clip.streams[POOLED]}

    def check(self) -> None:
        """Raise BadInput for a weight that cannot be computed with; each is read, once."""
        self.clip.check()
        if self.t5:
            self.t5.check()

    def fingerprint(self, prompts: Collection[str]) -> str:
        """SHA-256 in hex of all that the prompts' embeddings depend on, rounding aside."""
        behind = self.t5.fingerprint(prompts) if self.t5 else ""
        told = f"{self.width} {self.clip.fingerprint(prompts)} {behind}"
        return hashlib.sha256(told.encode()).hexdigest()

    def content(self, prompts: Collection[str]) -> Wanted:
        """CLIP's tokens up to the first EoT, and of T5 the prompt, the token behind it and some padding."""
        found = self.clip.content(prompts)
        behind = self.t5.content(prompts)[CONTEXT] if self.t5 else {}
        context = {
            prompt: [*places, *(self.begin + place for place in behind.get(prompt, ()))]
            for prompt, places in found[CONTEXT].items()
        }
        return {CONTEXT: context, POOLED: found[POOLED]}

    def slots(
        self, unsafe: str, safe: str, keyword: str, weights: Mapping[str, float]
    ) -> dict[str, list[Slot]]:
        """The slots of a pair, CLIP's and T5's; of the pooled embedding its one, of weight 1."""
        found = self.clip.slots(unsafe, safe, keyword, weights)
        behind = self.t5.slots(unsafe, safe, keyword, weights)[CONTEXT] if self.t5 else []
        return {CONTEXT: [*found[CONTEXT], *self._behind(behind)], POOLED: found[POOLED]}

    def padding(self, unsafe: str, safe: str) -> list[Slot]:
        """See `families.base.Text`: CLIP's, and T5's."""
        behind = self.t5.padding(unsafe, safe) if self.t5 else []
        return [*self.clip.padding(unsafe, safe), *self._behind(behind)]

    def padded_with_eot(self) -> "Sd3Text | None":
        """See `families.base.Text`: CLIP's alone is padded otherwise."""
        if (clip := self.clip.padded_with_eot()) is None:
            return None
        other = copy(self)
        other.clip = clip
        return other

    def _behind(self, slots: Iterable[Slot]) -> list[Slot]:
        """T5's slots where its positions are."""
        return [each._replace(unsafe=self.begin + each.unsafe, safe=self.begin + each.safe) for each in slots]

    def words(self, count: int) -> list[str]:
        """Up to so many whole words, spread evenly over the first tokenizer's vocabulary, that all know."""
        first = self.clip.tokenizers.each[0]
        known = clip_words(self.clip.tokenizers.each)
        if self.t5:
            words, ids = t5_words(self.t5.tokenizer.tokenizer)
            known = common(known, (words, [ids]))
        rank = {
            token.removesuffix("</w>"): row for token, row in first.get_vocab().items() if "</w>" in token
        }
        return spread(known[0], rank, count)

    def states(self, wanted: Wanted, report: Report = no_report) -> Iterator[Batch]:
        """The embeddings at the wanted positions, a batch at a time. TrceError where one is not finite."""
        prompts = list(dict.fromkeys(prompt for of in wanted.values() for prompt in of))
        size = GROUP if self.t5 else 8 * GROUP  # without T5's, states are few
        for start in range(0, len(prompts), size):
            group = prompts[start : start + size]
            yield self._states(
                {
                    stream: {prompt: of[prompt] for prompt in group if prompt in of}
                    for stream, of in wanted.items()
                }
            )
            report(len(group))

    def _states(self, wanted: Wanted) -> Batch:
        context = wanted.get(CONTEXT, {})
        first = {prompt: [at for at in places if at < self.begin] for prompt, places in context.items()}
        later = {
            prompt: [at - self.begin for at in places if at >= self.begin]
            for prompt, places in context.items()
        }
        ours = list(self.clip.states({CONTEXT: first, POOLED: wanted.get(POOLED, {})}))
        theirs = list(self.t5.states({CONTEXT: later})) if self.t5 else []
        clip, behind = _joined(ours, CONTEXT), _joined(theirs, CONTEXT)
        parts = [pad(each.embeddings, (0, self.width - each.embeddings.shape[1])) for each in (clip, behind)]
        start = len(parts[0])
        nothing = start + len(parts[1])  # zeros, where T5 is not there
        rows: dict[str, list[int]] = {}
        for prompt, places in context.items():
            one = iter(clip.rows[prompt])
            other = (start + row for row in behind.rows.get(prompt, ()))
            rows[prompt] = [next(one) if at < self.begin else next(other, nothing) for at in places]
        embeddings = torch.cat([*parts, torch.zeros(1, self.width)])
        found = {CONTEXT: States(embeddings, rows), POOLED: _joined(ours, POOLED)}
        return {stream: found[stream] for stream in wanted}

    def conditioning(self, prompts: Sequence[str]) -> Conditioning:
        """What the pipeline tells the denoiser of these prompts, the empty one first."""
        every = with_empty(prompts)
        wanted = {
            CONTEXT: dict.fromkeys(every, range(self.begin + T5.limit)),
            POOLED: self.clip.content(every)[POOLED],
        }
        found: dict[str, dict[str, Tensor]] = {CONTEXT: {}, POOLED: {}}
        for batch in self.states(wanted):
            for stream, states in batch.items():
                for prompt, rows in states.rows.items():
                    found[stream][prompt] = states.embeddings[list(rows)]
        context = torch.stack([found[CONTEXT][prompt] for prompt in every])
        pooled = torch.cat([found[POOLED][prompt] for prompt in every])
        return Conditioning(every, {CONTEXT: context, POOLED: pooled})

    def outline(self, prompts: Sequence[str]) -> Conditioning:
        """The same without values."""
        shapes = {CONTEXT: (self.begin + T5.limit, self.width), POOLED: (self.streams[POOLED],)}
        return Conditioning.outlined(with_empty(prompts), shapes, {})


def _joined(batches: Sequence[Batch], stream: str) -> States:
    """The states of several batches as one."""
    parts, start = [torch.zeros(0, 0)], 0
    rows: dict[str, list[int]] = {}
    for batch in batches:
        if stream not in batch:
            continue
        states = batch[stream]
        rows |= {prompt: [start + row for row in own] for prompt, own in states.rows.items()}
        parts.append(states.embeddings)
        start += len(states.embeddings)
    return States(torch.cat(parts[1:] or parts), rows)
