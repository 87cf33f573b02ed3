"""Prompts -> hidden states at the positions that matter, as the family's pipeline gives them to the U-Net."""

import hashlib
import re
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final

import torch
from torch import Tensor

from trce_cli.errors import TrceError
from trce_cli.families import Family

SOT: Final = 0  # the position of the start token in every prompt

# Tokens in one forward pass: large enough to keep the cores busy, small enough that the widest text encoder
# (OpenCLIP bigG, MLP width 5,120) needs some 50 MB for activations.
BATCH_TOKENS: Final = 2048

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


class Embedder:
    """Encodes prompts with a family's text encoders, none beyond the last position that is wanted of it.

    tokenizers and text_encoders: one for each of `family.encoders`, in that order.
    """

    def __init__(self, family: Family, tokenizers: Sequence[Any], text_encoders: Sequence[Any]) -> None:
        self.family = family
        self.tokenizers = tuple(tokenizers)
        self.text_encoders = tuple(text_encoders)
        self.dim: int = sum(encoder.config.hidden_size for encoder in text_encoders)
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
    ) -> Iterator[dict[str, Tensor]]:
        """Encode the prompts, a batch at a time: prompt -> hidden states at its wanted positions, in order.

        Each value is (positions, dim) float32 on the CPU. The encoders are causal, so a prompt is encoded up
        to its last wanted position, and prompts of one such length form batches: padding is computed only
        where it is wanted. Raises TrceError when a state is not finite.
        """
        lengths: dict[int, list[str]] = defaultdict(list)
        for prompt, positions in wanted.items():
            lengths[max(positions) + 1].append(prompt)
        for length, prompts in sorted(lengths.items()):
            size = max(1, BATCH_TOKENS // length)
            for start in range(0, len(prompts), size):
                batch = prompts[start : start + size]
                hidden = self._encode([tokens.ids for tokens in self.tokens(batch)], length)
                yield {p: h[list(wanted[p])] for p, h in zip(batch, hidden, strict=True)}
                report(len(batch))

    @torch.no_grad()
    def _encode(self, ids: Sequence[Sequence[Sequence[int]]], length: int) -> Tensor:
        """The first `length` hidden states of each prompt, (prompts, length, dim) float32 on the CPU."""
        parts = []
        for index, (encoder, model) in enumerate(zip(self.family.encoders, self.text_encoders, strict=True)):
            input_ids = torch.tensor([row[index][:length] for row in ids], device=model.device)
            penultimate = encoder.hidden == "penultimate"
            output = model(input_ids, output_hidden_states=penultimate)
            states = output.hidden_states[-2] if penultimate else output.last_hidden_state
            parts.append(states.to("cpu", torch.float32))
        hidden = torch.cat(parts, dim=-1)
        if not bool(torch.isfinite(hidden).all()):
            raise TrceError(
                "The text encoder gives NaN or infinite embeddings.",
                "Its weights are damaged, or --dtype is too narrow for it: try --dtype fp32.",
            )
        return hidden
