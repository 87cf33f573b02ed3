"""Prompts -> hidden states at the positions that matter, as the family's pipeline gives them to the U-Net."""

import hashlib
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from trce_cli.errors import TrceError
from trce_cli.families import Family

SOT: Final = 0  # the position of the start token in every prompt

# Tokens in one forward pass: enough to keep the cores busy, and few enough that tokens of other prompts,
# which attention computes and masks, cost little. The widest text encoder (OpenCLIP bigG, MLP width 5,120)
# needs some 30 MB for them.
PACK: Final = 512

Token = tuple[int, ...]  # its ids, for every text encoder

# What the configuration of a text encoder says beyond the shapes of its weights.
_CONFIG: Final = ("num_attention_heads", "hidden_act", "layer_norm_eps")


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


class Embeddings(NamedTuple):
    """What the U-Net is told of a prompt, as far as it was asked for; float32 on the CPU.

    context: hidden states at the wanted positions, (positions, dim). pooled: the projected EoT state that
    enters through `add_embedding`, (pooled_dim,); None for families without one.
    """

    context: Tensor
    pooled: Tensor | None


class Embedder:
    """Encodes prompts with a family's text encoders, none beyond the last position that is wanted of it.

    tokenizers and text_encoders: one for each of `family.encoders`, in that order.
    """

    def __init__(self, family: Family, tokenizers: Sequence[Any], text_encoders: Sequence[Any]) -> None:
        self.family = family
        self.tokenizers = tuple(tokenizers)
        self.text_encoders = tuple(text_encoders)
        self.dim: int = sum(encoder.config.hidden_size for encoder in text_encoders)
        self.pooled_dim: int = text_encoders[-1].config.projection_dim if family.pooled else 0
        self._tokens: dict[str, Tokens] = {}

    def tokens(self, prompts: Collection[str]) -> list[Tokens]:
        """The tokens of each prompt, in order."""
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._tokens]
        if new:
            self._tokens.update(zip(new, self._tokenize(new), strict=True))
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
        return hashlib.sha256((self._encoders_hash + ids).encode()).hexdigest()

    @cached_property
    def _encoders_hash(self) -> str:
        digest = hashlib.sha256()
        for encoder, model in zip(self.family.encoders, self.text_encoders, strict=True):
            config = {name: getattr(model.config, name) for name in _CONFIG}
            digest.update(repr((encoder.hidden, config)).encode())
            for name, weight in model.state_dict().items():
                digest.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode())
                digest.update(weight.cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()

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
    ) -> Iterator[dict[str, Embeddings]]:
        """Encode the prompts, a pack at a time: prompt -> its embeddings at the wanted positions, in order.

        The encoders are causal, so a prompt is encoded up to its last wanted position (with a pooled
        embedding at least up to its EoT), a prefix that several prompts share once, and padding only where it
        is wanted. Raises TrceError when an embedding is not finite.
        """
        sequences = {}
        for (prompt, positions), tokens in zip(wanted.items(), self.tokens(wanted), strict=True):
            end = max(*positions, tokens.eot) if self.family.pooled else max(positions)
            sequences[prompt] = tuple(zip(*tokens.ids, strict=True))[: end + 1]
        for pack in packs(sequences):
            context, pooled = self._encode(pack)
            found = {}
            for row, (prompt, places) in enumerate(pack.places.items()):
                rows = [places[position] for position in wanted[prompt]]
                found[prompt] = Embeddings(context[rows], None if pooled is None else pooled[row])
            yield found
            report(len(found))

    @torch.no_grad()
    def _encode(self, pack: "Pack") -> tuple[Tensor, Tensor | None]:
        """Hidden states of a pack's tokens, (tokens, dim), and pooled embeddings of its prompts, one a row.

        Both float32 on the CPU. Modules are called by the names of their weights in published files, which
        no version of transformers can change.
        """
        positions, mask = pack.positions, pack.mask
        eots = [
            places[tokens.eot]
            for places, tokens in zip(pack.places.values(), self.tokens(pack.places), strict=True)
            if self.family.pooled
        ]
        parts, pooled = [], None
        for index, (encoder, model) in enumerate(zip(self.family.encoders, self.text_encoders, strict=True)):
            clip, heads = getattr(model, "text_model", model), model.config.num_attention_heads
            ids = torch.tensor([token[index] for token in pack.tokens], device=model.device)
            own_mask = mask.to(model.device)
            x = clip.embeddings.token_embedding(ids)
            x = x + clip.embeddings.position_embedding(positions.to(model.device))
            *layers, last = clip.encoder.layers
            for layer in layers:
                x = _layer(layer, x, own_mask, heads)
            pools = self.family.pooled and model is self.text_encoders[-1]
            if encoder.hidden == "last" or pools:
                final = clip.final_layer_norm(_layer(last, x, own_mask, heads))
            parts.append((final if encoder.hidden == "last" else x).to("cpu", torch.float32))
            if pools:
                pooled = model.text_projection(final[eots]).to("cpu", torch.float32)
        context = torch.cat(parts, dim=-1)
        if not all(bool(torch.isfinite(found).all()) for found in (context, pooled) if found is not None):
            raise TrceError(
                "The text encoder gives NaN or infinite embeddings.",
                "Its weights are damaged, or --dtype is too narrow for it: try --dtype fp32.",
            )
        return context, pooled


def _layer(layer: Any, x: Tensor, mask: Tensor, heads: int) -> Tensor:
    """One layer of a CLIP text encoder; x (tokens, dim), mask (tokens, tokens): who looks at whom."""
    attention, y = layer.self_attn, layer.layer_norm1(x)
    q, k, v = (
        project(y).unflatten(-1, (heads, -1)).transpose(0, 1)  # (heads, tokens, dim / heads)
        for project in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    seen = scaled_dot_product_attention(q[None], k[None], v[None], mask)[0]
    x = x + attention.out_proj(seen.transpose(0, 1).flatten(1))
    return x + layer.mlp(layer.layer_norm2(x))


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
