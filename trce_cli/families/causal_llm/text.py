"""A causal language model as a text encoder: prompts -> the embeddings that meet the denoiser's door."""

import hashlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import accumulate, islice
from typing import Final

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from trce_cli.families.base import Batch, Conditioning, Slot, States, Wanted, Weights, with_empty
from trce_cli.families.causal_llm.encoder import LlmEncoder
from trce_cli.families.causal_llm.load import load_tokenizer
from trce_cli.families.causal_llm.spec import CONTEXT, LlmSpec
from trce_cli.families.causal_llm.tokens import Tokenizer
from trce_cli.families.causal_llm.words import whole_words
from trce_cli.families.load import check_embeddings, checked
from trce_cli.families.prefix_tree import Pack, Padding, Token, packs
from trce_cli.system.progress import Report, no_report

# Tokens of a pack: attention computes and masks those of other prompts as well, which is little beside the
# MLP of a layer this wide, and every pack encodes the template's beginning anew.
PACK: Final = 512
# Packs that go through a layer before the next one is read: their states are in memory, 10 KB a token.
BATCH: Final = 16


class LlmText:
    """A family's language model; see `families.base.Text`. Computed no further than is wanted.

    eps: of the denoiser's RMSNorm before its door, whose output the embeddings are where there is one.
    """

    def __init__(
        self, weights: Weights, spec: LlmSpec, eps: float, device: torch.device | str, dtype: torch.dtype
    ) -> None:
        self.weights, self.spec, self.eps = weights, spec, eps
        self.tokenizer = Tokenizer(load_tokenizer(weights, spec), spec)
        self.encoder = LlmEncoder(weights, spec, device, dtype)
        self.streams = {CONTEXT: self.encoder.dim}

    @cached_property
    def norm(self) -> Tensor | None:
        """The weight of the norm before the door, float32, if there is one."""
        if self.spec.norm is None:
            return None
        ((_, weight),) = checked(self.weights, "denoiser", {self.spec.norm: (self.encoder.dim,)})
        return weight.float()

    def check(self) -> None:
        """Raise BadInput for a weight that cannot be computed with; each is read, once."""
        _ = self.encoder.hash, self.norm

    def fingerprint(self, prompts: Collection[str]) -> str:
        """SHA-256 in hex of all that the prompts' embeddings depend on, rounding aside.

        That is every weight that is used, the configuration, and the token ids, the template's among them.
        """
        found = [(tokens.ids, tokens.begin) for tokens in self.tokenizer.tokens(prompts)]
        told = repr((found, self.spec, self.eps, self.tokenizer.tokenizer.pad_token_id))
        digest = hashlib.sha256((self.encoder.hash + told).encode())
        if self.norm is not None:
            digest.update(self.norm.numpy().data)
        return digest.hexdigest()

    def content(self, prompts: Collection[str]) -> Wanted:
        """The prompt and what stands behind it, of padding that is seen what stands for it; the template's
        beginning, the same for all, with one."""
        found: dict[str, list[int]] = {}
        for prompt, tokens in zip(prompts, self.tokenizer.tokens(prompts), strict=True):
            own = range(tokens.begin if found else 0, tokens.count)
            found[prompt] = [*own, *self.tokenizer.pads(prompt)]
        return {CONTEXT: found}

    def slots(
        self, unsafe: str, safe: str, keyword: str, weights: Mapping[str, float]
    ) -> dict[str, list[Slot]]:
        """The slots of a pair whose kind has weight; see `spec.SLOTS`."""
        return {CONTEXT: self.tokenizer.slots(unsafe, safe, keyword, weights)}

    def padding(self, unsafe: str, safe: str) -> list[Slot]:
        """See `families.base.Text`; most families see none."""
        return self.tokenizer.slots(unsafe, safe, unsafe, {"PADS": 1.0})

    def padded_with_eot(self) -> None:
        """See `families.base.Text`: all pad alike."""

    def words(self, count: int) -> list[str]:
        """Up to so many whole words, spread evenly over the tokenizer's vocabulary."""
        return whole_words(self.tokenizer.tokenizer, count)[0]

    def states(self, wanted: Wanted, report: Report = no_report) -> Iterator[Batch]:
        """The embeddings behind a norm at the wanted positions, a batch at a time, in an order of its own.

        What prompts begin with, the template first of all, is encoded once a pack. Raises TrceError when an
        embedding is not finite.
        """
        for some, states in self._hidden(wanted[CONTEXT]):
            embeddings = self.normed(torch.cat([each.to("cpu", torch.float32) for each in states]))
            check_embeddings(embeddings)
            starts = accumulate((len(pack.tokens) for pack in some), initial=0)
            rows = {
                prompt: [start + pack.place(prompt, self.spec.dropped + at) for at in wanted[CONTEXT][prompt]]
                for start, pack in zip(starts, some, strict=False)
                for prompt in pack.places
            }
            yield {CONTEXT: States(embeddings, rows)}
            report(len(rows))

    def normed(self, states: Tensor) -> Tensor:
        """RMSNorm as the denoiser has it before its door, if it has; float32."""
        if self.norm is None:
            return states
        return states * torch.rsqrt(states.square().mean(-1, keepdim=True) + self.eps) * self.norm

    def hidden(self, prompts: Collection[str]) -> dict[str, Tensor]:
        """What the pipeline tells the denoiser of each prompt, (tokens, width) in the encoder's dtype."""
        wanted = {
            prompt: range(self.spec.limit if self.spec.padded else tokens.count)
            for prompt, tokens in zip(prompts, self.tokenizer.tokens(prompts), strict=True)
        }
        return {
            prompt: states[[pack.place(prompt, self.spec.dropped + at) for at in wanted[prompt]]]
            for some, every in self._hidden(wanted)
            for pack, states in zip(some, every, strict=True)
            for prompt in pack.places
        }

    def conditioning(self, prompts: Sequence[str]) -> Conditioning:
        """What the pipeline tells the denoiser of these prompts, the empty one first; not normed yet.

        Where it sees padding all are of one length.
        """
        every = with_empty(prompts)
        hidden = self.hidden(every)
        states = [hidden[prompt].float() for prompt in every]
        lengths = {} if self.spec.padded else {CONTEXT: torch.tensor([len(each) for each in states])}
        return Conditioning(every, {CONTEXT: pad_sequence(states, batch_first=True)}, lengths)

    def outline(self, prompts: Sequence[str]) -> Conditioning:
        """The same without values, from the tokens alone."""
        every = with_empty(prompts)
        counts = [tokens.count for tokens in self.tokenizer.tokens(every)]
        longest = self.spec.limit if self.spec.padded else max(counts)
        lengths = {} if self.spec.padded else {CONTEXT: counts}
        return Conditioning.outlined(every, {CONTEXT: (longest, self.encoder.dim)}, lengths)

    def _hidden(self, wanted: Mapping[str, Sequence[int]]) -> Iterator[tuple[list[Pack], list[Tensor]]]:
        """The states of the prompts up to their last wanted positions, and of the padding that is wanted."""
        self.check()
        sequences: dict[str, tuple[Token, ...]] = {}
        behind: dict[str, list[int]] = {}
        for (prompt, positions), tokens in zip(wanted.items(), self.tokenizer.tokens(wanted), strict=True):
            end = self.spec.dropped + max(positions, default=0) + 1
            sequences[prompt] = tuple((token,) for token in tokens.ids[:end])
            behind[prompt] = [at for at in positions if at >= tokens.count]
        padding = Padding((self.tokenizer.tokenizer.pad_token_id,), behind)
        every = packs(sequences, PACK, padding)
        while some := list(islice(every, BATCH)):
            yield some, self.encoder(some)
