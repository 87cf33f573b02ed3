"""Prompts -> hidden states at the positions that matter, as the family's pipeline gives them to the U-Net."""

import hashlib
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, islice
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import torch
from torch import Tensor

from trce_cli.errors import TrceError
from trce_cli.families.clip.text_encoder import TextEncoder
from trce_cli.families.sd.family import StableDiffusion

if TYPE_CHECKING:
    from trce_cli.checkpoint.checkpoint import Checkpoint

SOT: Final = 0  # the position of the start token in every prompt

# Tokens that form one sequence: few, because attention computes and masks those of other prompts as well, and
# enough to have prefixes in common. Sequences that are computed together: few, because the MLP of OpenCLIP
# bigG needs 40 KB a token, and enough to make little of converting its weights.
PACK: Final = 128
BATCH: Final = 8
TOKENIZED: Final = 1024  # prompts that are tokenized together: a tokenizer's result takes 20 KB a prompt

Token = tuple[int, ...]  # its ids, for every text encoder


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


class Batch(NamedTuple):
    """What the U-Net is told of some prompts; float32 on the CPU.

    context: hidden states of their tokens, each distinct prefix once, (tokens, dim). pooled: projected EoT
    states, which enter through `add_embedding`, (prompts, pooled_dim); None for families without any. rows:
    prompt -> the rows of `context` that are its wanted positions, in their order; in the order of `pooled`.
    """

    context: Tensor
    pooled: Tensor | None
    rows: dict[str, list[int]]


class Embedder:
    """Encodes prompts with a family's text encoders, none beyond the last position that is wanted of it.

    tokenizers and encoders: one for each of `family.encoders`, in that order.
    """

    def __init__(
        self, family: StableDiffusion, tokenizers: Sequence[Any], encoders: Sequence[TextEncoder]
    ) -> None:
        self.family = family
        self.tokenizers = tuple(tokenizers)
        self.encoders = tuple(encoders)
        self.dim = sum(encoder.dim for encoder in encoders)
        self.pooled_dim: int = encoders[-1].config["projection_dim"] if family.pooled else 0
        self._tokens: dict[str, Tokens] = {}

    @classmethod
    def of(cls, checkpoint: "Checkpoint", device: torch.device | str, dtype: torch.dtype) -> "Embedder":
        """The embedder of a checkpoint; BadInput for damaged text encoders."""
        encoders = [TextEncoder(files, device, dtype) for files in checkpoint.encoders]
        return cls(checkpoint.family, checkpoint.load_tokenizers(), encoders)

    def tokens(self, prompts: Collection[str]) -> list[Tokens]:
        """The tokens of each prompt, in order."""
        new = iter([prompt for prompt in dict.fromkeys(prompts) if prompt not in self._tokens])
        while some := list(islice(new, TOKENIZED)):
            self._tokens.update(zip(some, self._tokenize(some), strict=True))
        return [self._tokens[prompt] for prompt in prompts]

    def _tokenize(self, prompts: list[str]) -> Iterator[Tokens]:
        encoded = [
            tokenizer(prompts, padding="max_length", max_length=tokenizer.model_max_length, truncation=True)
            for tokenizer in self.tokenizers
        ]
        for row in range(len(prompts)):
            ids = tuple(tuple(batch["input_ids"][row]) for batch in encoded)
            # From the ids, after SoT: the pad token may be EoT itself, and the config's eos_token_id may be a
            # legacy 2 that is no EoT at all.
            eots = {
                row_ids.index(tokenizer.eos_token_id, SOT + 1)
                for row_ids, tokenizer in zip(ids, self.tokenizers, strict=True)
            }
            if len(eots) > 1:
                raise TrceError(f"The checkpoint's tokenizers disagree on where {prompts[row]!r} ends.")
            yield Tokens(ids, eots.pop(), padding=encoded[0]["attention_mask"][row].count(0))

    def fingerprint(self, prompts: Collection[str]) -> str:
        """SHA-256 in hex of all that the prompts' embeddings depend on, rounding aside.

        That is every weight as it is used here (so the dtype too), the encoders' configurations, and the
        token ids, which are all that tokenizers and prompts have to say.
        """
        ids = repr([tokens.ids for tokens in self.tokens(prompts)])
        hashes = "".join(encoder.hash for encoder in self.encoders)
        return hashlib.sha256((hashes + ids).encode()).hexdigest()

    def keyword_positions(self, prompt: str, keyword: str) -> list[int]:
        """The positions of all tokens of every occurrence of the keyword, up to where the prompt is cut off.

        Letter case and the length of white space do not matter, as to CLIP's tokenizer. Whole words come
        first ("gun" is not in "burgundy"); where there are none, words that contain the keyword ("guns").
        """
        phrase = r"\s+".join(map(re.escape, keyword.split()))
        for pattern in (rf"(?<!\w){phrase}(?!\w)", rf"\w*{phrase}\w*"):
            if spans := [found.span() for found in re.finditer(pattern, prompt, re.IGNORECASE)]:
                break
        tokenizer = self.tokenizers[0]
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

    def states(
        self, wanted: Mapping[str, Collection[int]], report: Callable[[int], None] = lambda prompts: None
    ) -> Iterator[Batch]:
        """Encode the prompts at their wanted positions, a batch at a time, in an order of its own.

        The encoders are causal, so a prompt is encoded up to its last wanted position (with a pooled
        embedding at least up to its EoT), a prefix that several prompts share once, and padding only where it
        is wanted. Raises TrceError when an embedding is not finite.
        """
        sequences = {}
        for (prompt, positions), tokens in zip(wanted.items(), self.tokens(wanted), strict=True):
            end = max(*positions, tokens.eot) if self.family.pooled else max(positions)
            sequences[prompt] = tuple(zip(*(ids[: end + 1] for ids in tokens.ids), strict=True))
        every = packs(sequences)
        while some := list(islice(every, BATCH)):
            starts = accumulate((len(pack.tokens) for pack in some), initial=0)
            rows = {
                prompt: [start + places[position] for position in wanted[prompt]]
                for start, pack in zip(starts, some, strict=False)
                for prompt, places in pack.places.items()
            }
            yield Batch(*self._encode(some), rows)
            report(len(rows))

    def _encode(self, some: Sequence["Pack"]) -> tuple[Tensor, Tensor | None]:
        """`context` and `pooled` of a batch."""
        tokens = [token for pack in some for token in pack.tokens]
        positions, masks = torch.cat([pack.positions for pack in some]), [pack.mask for pack in some]
        parts, pooled = [], None
        for ids, encoder in zip(torch.tensor(tokens).T, self.encoders, strict=True):
            states, final = encoder(ids, positions, masks)
            parts.append(states.to("cpu", torch.float32))
            if final is not None:
                pooled = encoder.project(final[self._eots(some)]).to("cpu", torch.float32)
        context = torch.cat(parts, dim=-1)
        if not all(bool(torch.isfinite(found).all()) for found in (context, pooled) if found is not None):
            raise TrceError(
                "The text encoder gives NaN or infinite embeddings.",
                "Its weights are damaged, or --dtype is too narrow for it: try --dtype fp32.",
            )
        return context, pooled

    def _eots(self, some: Sequence["Pack"]) -> list[int]:
        """The rows of the prompts' EoTs among all tokens of the packs."""
        starts = accumulate((len(pack.tokens) for pack in some), initial=0)
        return [
            start + places[tokens.eot]
            for start, pack in zip(starts, some, strict=False)
            for places, tokens in zip(pack.places.values(), self.tokens(pack.places), strict=True)
        ]


@dataclass(frozen=True)
class Pack:
    """Prompts as one sequence of tokens in which what several begin with stands once: a prefix tree.

    tokens: each one's ids, for every text encoder. places: prompt -> the places of its tokens, in order.
    """

    tokens: list[Token]
    places: dict[str, list[int]]

    @property
    def positions(self) -> Tensor:
        """Each token's position in its prompts, (tokens,)."""
        positions = torch.zeros(len(self.tokens), dtype=torch.long)
        for places in self.places.values():
            positions[places] = torch.arange(len(places))
        return positions

    @property
    def mask(self) -> Tensor:
        """Whom a token looks at, (tokens, tokens): itself and what comes before it in its prompts."""
        mask = torch.zeros(len(self.tokens), len(self.tokens), dtype=torch.bool)
        for places in self.places.values():
            rows = torch.tensor(places)
            mask[rows[:, None], rows] |= torch.ones(len(rows), len(rows), dtype=torch.bool).tril()
        return mask


def packs(sequences: Mapping[str, tuple[Token, ...]], size: int = PACK) -> Iterator[Pack]:
    """Prompts by their tokens in packs of about `size` tokens; neighbours in order share the most."""
    tokens: list[Token] = []
    places: dict[str, list[int]] = {}
    before: tuple[Token, ...] = ()
    path: list[int] = []  # the places of `before`
    for prompt, sequence in sorted(sequences.items(), key=lambda item: item[1]):
        shared = next(
            (at for at, (one, other) in enumerate(zip(before, sequence, strict=False)) if one != other),
            min(len(before), len(sequence)),
        )
        if len(tokens) + len(sequence) - shared > size and tokens:
            yield Pack(tokens, places)
            tokens, places, shared = [], {}, 0
        path = [*path[:shared], *range(len(tokens), len(tokens) + len(sequence) - shared)]
        tokens.extend(sequence[shared:])
        places[prompt], before = path, sequence
    if tokens:
        yield Pack(tokens, places)
