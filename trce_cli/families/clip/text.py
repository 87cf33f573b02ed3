"""CLIP's text encoders, one or several side by side: prompts -> the embeddings that enter the denoiser."""

import hashlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from copy import copy
from itertools import accumulate, islice
from typing import Final

import torch

from trce_cli.families.base import Batch, Slot, States, Wanted, Weights
from trce_cli.families.clip.encoder import ClipEncoder
from trce_cli.families.clip.load import load_tokenizers
from trce_cli.families.clip.spec import CONTEXT, POOLED, EncoderSpec
from trce_cli.families.clip.tokens import Tokenizers
from trce_cli.families.clip.words import whole_words
from trce_cli.families.load import check_embeddings
from trce_cli.families.prefix_tree import Pack, packs
from trce_cli.system.progress import Report, no_report

# Sequences that are computed together: few, because the MLP of OpenCLIP bigG needs 40 KB a token, and enough
# to make little of converting its weights.
BATCH: Final = 8
EOT: Final = 49407  # transformers' where a configuration is silent


class ClipText:
    """The text encoders of a family, see `families.base.Text`; computed no further than is wanted.

    Several encoders side by side give the context; those that project give, side by side, the pooled
    embedding as well, of which the only position is the EoT. clip_skip: at which layer from the end an
    encoder is read that is read at its last one.
    """

    def __init__(
        self,
        weights: Weights,
        specs: Sequence[EncoderSpec],
        device: torch.device | str,
        dtype: torch.dtype,
        clip_skip: int = 1,
    ) -> None:
        self.tokenizers = Tokenizers(load_tokenizers(weights, specs))
        self.encoders = [ClipEncoder(weights, spec, device, dtype, clip_skip) for spec in specs]
        self.streams = {CONTEXT: sum(encoder.dim for encoder in self.encoders)}
        if any(spec.projects for spec in specs):
            projecting = [encoder for encoder in self.encoders if encoder.spec.projects]
            self.streams[POOLED] = sum(encoder.config["projection_dim"] for encoder in projecting)

    def check(self) -> None:
        """Raise BadInput for a weight that cannot be computed with; each is read, once."""
        for encoder in self.encoders:
            _ = encoder.hash

    def fingerprint(self, prompts: Collection[str]) -> str:
        """SHA-256 in hex of all that the prompts' embeddings depend on, rounding aside.

        That is every weight as it is used here (so the dtype too), the encoders' configurations, and the
        token ids, which are all that tokenizers and prompts have to say.
        """
        ids = repr([tokens.ids for tokens in self.tokenizers.tokens(prompts)])
        hashes = "".join(encoder.hash for encoder in self.encoders)
        return hashlib.sha256((hashes + ids).encode()).hexdigest()

    def content(self, prompts: Collection[str]) -> Wanted:
        """The positions from SoT to the first EoT, and the EoT of the pooled embedding."""
        eots = {
            prompt: tokens.eot
            for prompt, tokens in zip(prompts, self.tokenizers.tokens(prompts), strict=True)
        }
        every: dict[str, dict[str, Sequence[int]]] = {
            CONTEXT: {prompt: range(eot + 1) for prompt, eot in eots.items()},
            POOLED: {prompt: [self.pooled_at(prompt)] for prompt in eots},
        }
        return {stream: every[stream] for stream in self.streams}

    def slots(
        self, unsafe: str, safe: str, keyword: str, weights: Mapping[str, float]
    ) -> dict[str, list[Slot]]:
        """The slots of a pair; of the pooled embedding its one, of weight 1 whatever the others' weights."""
        found = {CONTEXT: self.tokenizers.slots(unsafe, safe, keyword, weights)}
        if POOLED in self.streams:
            found[POOLED] = [Slot("FIRST_EOT", self.pooled_at(unsafe), self.pooled_at(safe), 1.0)]
        return found

    def padding(self, unsafe: str, safe: str) -> list[Slot]:
        """A sample of it, see `Tokenizers.padding`."""
        return [Slot("PADDING", place, place, 1.0) for place in self.tokenizers.padding(unsafe, safe)]

    def padded_with_eot(self) -> "ClipText | None":
        """See `families.base.Text`."""
        if not self.tokenizers.pad_otherwise:
            return None
        other = copy(self)
        other.tokenizers = Tokenizers(self.tokenizers.each, with_eot=True)
        return other

    def words(self, count: int) -> list[str]:
        """Up to so many whole words, spread evenly over the first tokenizer's vocabulary."""
        return whole_words(self.tokenizers.each, count)[0]

    def pooled_at(self, prompt: str) -> int:
        """The last position at which an encoder is pooled: the EoT, for all but texts of added tokens."""
        (tokens,) = self.tokenizers.tokens([prompt])
        return max(map(_pooled_at, self.encoders, tokens.ids))

    def states(self, wanted: Wanted, report: Report = no_report) -> Iterator[Batch]:
        """Encode the prompts at their wanted positions, a batch at a time, in an order of its own.

        The encoders are causal, so a prompt is encoded up to its last wanted position, a prefix that several
        prompts share once, and padding only where it is wanted. Raises TrceError when an embedding is not
        finite.
        """
        self.check()
        ends: dict[str, int] = {}
        for positions in wanted.values():
            for prompt, places in positions.items():
                ends[prompt] = max([*places, ends.get(prompt, 0)])
        sequences = {
            prompt: tuple(zip(*(ids[: end + 1] for ids in tokens.ids), strict=True))
            for (prompt, end), tokens in zip(ends.items(), self.tokenizers.tokens(ends), strict=True)
        }
        every = packs(sequences)
        while some := list(islice(every, BATCH)):
            yield self._encode(some, wanted)
            report(sum(len(pack.places) for pack in some))

    def _encode(self, some: Sequence[Pack], wanted: Wanted) -> Batch:
        """What is wanted of some packs."""
        tokens = [token for pack in some for token in pack.tokens]
        positions, masks = torch.cat([pack.positions for pack in some]), [pack.mask for pack in some]
        asked = [prompt for pack in some for prompt in pack.places if prompt in wanted.get(POOLED, {})]
        parts, pooled, found = [], [], {}
        for number, (ids, encoder) in enumerate(zip(torch.tensor(tokens).T, self.encoders, strict=True)):
            states, final = encoder(ids, positions, masks)
            parts.append(states.to("cpu", torch.float32))
            if final is not None and asked:
                read = zip(asked, self.tokenizers.tokens(asked), strict=True)
                ends = {prompt: [_pooled_at(encoder, of.ids[number])] for prompt, of in read}
                projected = encoder.project(final[[end for (end,) in _rows(some, ends).values()]])
                pooled.append(projected.to("cpu", torch.float32))
        if pooled:
            places = {prompt: [place] for place, prompt in enumerate(asked)}
            found[POOLED] = States(torch.cat(pooled, dim=-1), places)
        found[CONTEXT] = States(torch.cat(parts, dim=-1), _rows(some, wanted.get(CONTEXT, {})))
        check_embeddings(*(each.embeddings for each in found.values()))
        return found


def _rows(some: Sequence[Pack], wanted: Mapping[str, Sequence[int]]) -> dict[str, list[int]]:
    """By prompt, which of all tokens of the packs are at its wanted positions."""
    starts = accumulate((len(pack.tokens) for pack in some), initial=0)
    return {
        prompt: [start + places[position] for position in wanted[prompt]]
        for start, pack in zip(starts, some, strict=False)
        for prompt, places in pack.places.items()
        if prompt in wanted
    }


def _pooled_at(encoder: ClipEncoder, ids: Sequence[int]) -> int:
    """The position at which transformers pools an encoder: its first EoT; or, for the configurations of old
    that call 2 the EoT, the highest id, which an added token may have."""
    eot = encoder.config.get("eos_token_id", EOT)
    if eot == 2:
        return ids.index(max(ids))
    return ids.index(eot) if eot in ids else 0
