"""T5 as a text encoder: prompts -> the embeddings that meet the denoiser's door."""

import hashlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Final

import torch
from torch import Tensor

from trce_cli.families.base import Batch, Conditioning, Slot, States, Wanted, Weights, with_empty
from trce_cli.families.load import check_embeddings
from trce_cli.families.t5.encoder import T5Encoder, Text
from trce_cli.families.t5.load import load_tokenizer
from trce_cli.families.t5.spec import CONTEXT, T5Spec
from trce_cli.families.t5.tokens import Tokenizer, whole_words
from trce_cli.system.progress import Report, no_report

# Prompts that go through a block before the next one is read: T5-XXL's states take 8 MB each.
GROUP: Final = 32


class T5Text:
    """A family's T5; see `families.base.Text`."""

    def __init__(
        self, weights: Weights, spec: T5Spec, device: torch.device | str, dtype: torch.dtype
    ) -> None:
        self.spec = spec
        self.tokenizer = Tokenizer(load_tokenizer(weights, spec), spec)
        self.encoder = T5Encoder(weights, spec, device, dtype)
        self.streams = {CONTEXT: self.encoder.dim}

    def check(self) -> None:
        """Raise BadInput for a weight that cannot be computed with; each is read, once."""
        _ = self.encoder.hash

    def fingerprint(self, prompts: Collection[str]) -> str:
        """SHA-256 in hex of all that the prompts' embeddings depend on, rounding aside.

        That is every weight that is used, the configuration, how much is read, and the token ids.
        """
        ids = repr(([tokens.ids for tokens in self.tokenizer.tokens(prompts)], self.spec))
        return hashlib.sha256((self.encoder.hash + ids).encode()).hexdigest()

    def content(self, prompts: Collection[str]) -> Wanted:
        """The prompt, the token behind it, and of the padding that is seen what stands for it."""
        return {
            CONTEXT: {
                prompt: [*range(tokens.eos + 1), *self.tokenizer.pads(prompt)]
                for prompt, tokens in zip(prompts, self.tokenizer.tokens(prompts), strict=True)
            }
        }

    def slots(
        self, unsafe: str, safe: str, keyword: str, weights: Mapping[str, float]
    ) -> dict[str, list[Slot]]:
        """The slots of a pair whose kind has weight; see `spec.SLOTS`."""
        return {CONTEXT: self.tokenizer.slots(unsafe, safe, keyword, weights)}

    def padding(self, unsafe: str, safe: str) -> list[Slot]:
        """See `families.base.Text`."""
        return self.tokenizer.slots(unsafe, safe, unsafe, {"PADS": 1.0})

    def padded_with_eot(self) -> None:
        """See `families.base.Text`: all pad alike."""

    def words(self, count: int) -> list[str]:
        """Up to so many whole words, spread evenly over the tokenizer's vocabulary."""
        return whole_words(self.tokenizer.tokenizer, count)[0]

    def states(self, wanted: Wanted, report: Report = no_report) -> Iterator[Batch]:
        """The embeddings at the wanted positions, a batch at a time. TrceError where one is not finite."""
        for prompts, states in self._encoded(wanted[CONTEXT]):
            rows, start = {}, 0
            for prompt in prompts:
                rows[prompt] = range(start, start := start + len(wanted[CONTEXT][prompt]))
            embeddings = torch.cat([each.to("cpu", torch.float32) for each in states])
            check_embeddings(embeddings)
            yield {CONTEXT: States(embeddings, rows)}
            report(len(rows))

    def conditioning(self, prompts: Sequence[str]) -> Conditioning:
        """What the pipeline tells the denoiser of these prompts, the empty one first; where the encoder masks
        padding, also how many tokens come before all but the first of it.
        """
        every = with_empty(prompts)
        wanted = {prompt: range(self.spec.limit) for prompt in every}
        states = [each.float() for _, group in self._encoded(wanted) for each in group]
        lengths = {name: torch.tensor(each) for name, each in self._lengths(every).items()}
        return Conditioning(every, {CONTEXT: torch.stack(states)}, lengths)

    def outline(self, prompts: Sequence[str]) -> Conditioning:
        """The same without values, from the tokens alone."""
        every = with_empty(prompts)
        shapes = {CONTEXT: (self.spec.limit, self.encoder.dim)}
        return Conditioning.outlined(every, shapes, self._lengths(every))

    def _lengths(self, prompts: Sequence[str]) -> dict[str, list[int]]:
        if not self.spec.masked:
            return {}
        return {CONTEXT: [min(tokens.eos + 2, self.spec.limit) for tokens in self.tokenizer.tokens(prompts)]}

    def _encoded(self, wanted: Mapping[str, Sequence[int]]) -> Iterator[tuple[list[str], list[Tensor]]]:
        """Prompts, and the states of each at its wanted positions, in the encoder's dtype on its device."""
        self.check()
        prompts = list(wanted)
        for start in range(0, len(prompts), GROUP):
            group = prompts[start : start + GROUP]
            texts, places = [], []
            for prompt, ids, tokens in zip(
                group, self.tokenizer.padded(group), self.tokenizer.tokens(group), strict=True
            ):
                positions, seen = torch.arange(self.spec.limit), self.spec.limit
                if self.spec.masked:  # whoever is looked at, and whoever is asked for
                    seen = tokens.eos + 1
                    positions = torch.tensor(sorted({*range(seen), *wanted[prompt]}))
                texts.append(Text(ids[positions], positions, seen))
                places.append(torch.searchsorted(positions, torch.tensor(wanted[prompt])))
            found = zip(self.encoder(texts), places, strict=True)
            yield group, [states[rows.to(states.device)] for states, rows in found]
