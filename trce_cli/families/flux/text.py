"""FLUX.1's text encoders: T5's states enter by one door, CLIP's pooled embedding by another."""

import hashlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace

import torch

from trce_cli.families.base import Batch, Conditioning, Slot, Wanted, Weights
from trce_cli.families.clip.spec import CONTEXT as CLIP_STATES
from trce_cli.families.clip.text import ClipText
from trce_cli.families.flux.spec import CLIP, POOLED
from trce_cli.families.t5.spec import CONTEXT, T5Spec
from trce_cli.families.t5.text import T5Text
from trce_cli.system.progress import Report, no_report


class FluxText(T5Text):
    """Both encoders; see `families.base.Text`. Of the pooled embedding the only position is CLIP's EoT."""

    def __init__(
        self, weights: Weights, spec: T5Spec, device: torch.device | str, dtype: torch.dtype
    ) -> None:
        super().__init__(weights, spec, device, dtype)
        self.clip = ClipText(weights, [CLIP], device, dtype)
        self.streams = {**self.streams, POOLED: self.clip.streams[CLIP_STATES]}

    def check(self) -> None:
        """Raise BadInput for a weight that cannot be computed with; each is read, once."""
        super().check()
        self.clip.check()

    def fingerprint(self, prompts: Collection[str]) -> str:
        """SHA-256 in hex of all that the prompts' embeddings depend on, rounding aside."""
        both = super().fingerprint(prompts) + self.clip.fingerprint(prompts)
        return hashlib.sha256(both.encode()).hexdigest()

    def content(self, prompts: Collection[str]) -> Wanted:
        """See `T5Text`, and CLIP's EoT."""
        pooled = {prompt: [self.clip.pooled_at(prompt)] for prompt in prompts}
        return {**super().content(prompts), POOLED: pooled}

    def slots(
        self, unsafe: str, safe: str, keyword: str, weights: Mapping[str, float]
    ) -> dict[str, list[Slot]]:
        """The slots of a pair; of the pooled embedding its one, of weight 1 whatever the others' weights."""
        pooled = Slot("EOS", self.clip.pooled_at(unsafe), self.clip.pooled_at(safe), 1.0)
        return {**super().slots(unsafe, safe, keyword, weights), POOLED: [pooled]}

    def states(self, wanted: Wanted, report: Report = no_report) -> Iterator[Batch]:
        """The embeddings at the wanted positions: all of T5's, which are what takes long, then CLIP's."""
        if CONTEXT in wanted:
            yield from super().states({CONTEXT: wanted[CONTEXT]}, report)
        if POOLED in wanted:
            for batch in self.clip.states({CLIP_STATES: wanted[POOLED]}):
                yield {POOLED: batch[CLIP_STATES]}

    def conditioning(self, prompts: Sequence[str]) -> Conditioning:
        """What the pipeline tells the denoiser of these prompts, the empty one first."""
        told = super().conditioning(prompts)
        wanted = {POOLED: self.content(told.prompts)[POOLED]}
        pooled = {
            prompt: states[POOLED].embeddings[list(rows)]
            for states in self.states(wanted)
            for prompt, rows in states[POOLED].rows.items()
        }
        streams = {**told.streams, POOLED: torch.cat([pooled[prompt] for prompt in told.prompts])}
        return replace(told, streams=streams)

    def outline(self, prompts: Sequence[str]) -> Conditioning:
        """The same without values, from the tokens alone."""
        told = super().outline(prompts)
        pooled = Conditioning.outlined(told.prompts, {POOLED: (self.streams[POOLED],)}, {})
        return replace(told, streams={**told.streams, **pooled.streams})
