"""A language model computed from the weights of a checkpoint, one decoder layer in memory at a time.

The layers are transformers' own modules, built without weights (on the meta device) and called with those
that were just read.
"""

import hashlib
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from trce_cli.errors import refusing, refusing_library
from trce_cli.families.base import Weights
from trce_cli.families.causal_llm.load import make_model, rotary
from trce_cli.families.causal_llm.names import (
    EMBEDDING,
    NORM,
    layer_weights,
    llm_weights,
    states_width,
    text_config,
    used_layers,
)
from trce_cli.families.causal_llm.spec import LlmSpec
from trce_cli.families.load import checked
from trce_cli.families.prefix_tree import Pack


class LlmEncoder:
    """Token ids -> hidden states, as transformers' model gives them at `spec.hidden`.

    Raises BadInput for a configuration that cannot be used, and with the first use of `hash` for weights that
    cannot.
    """

    def __init__(
        self, weights: Weights, spec: LlmSpec, device: torch.device | str, dtype: torch.dtype
    ) -> None:
        self.weights, self.spec = weights, spec
        self.device, self.dtype = torch.device(device), dtype
        self.config: Mapping[str, Any] = weights.config[spec.folder]
        self.dim = states_width(spec, self.config)

    @cached_property
    def hash(self) -> str:
        """SHA-256 in hex of all that states depend on: weights, dtype, configuration, which state it is.

        Every weight is checked on the way.
        """
        told = sorted(
            (key, repr(value)) for key, value in text_config(self.config).items() if not key.startswith("_")
        )
        digest = hashlib.sha256(repr((self.spec.hidden, self.dtype, told)).encode())
        shapes = llm_weights(self.spec, self.config)
        for name, weight in checked(self.weights, self.spec.folder, shapes):
            digest.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode())
            digest.update(weight.contiguous().view(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()

    @cached_property
    def _model(self) -> Any:
        """The model without weights."""
        where = self.weights.folder(self.spec.folder) / "config.json"
        with refusing(f"{where} cannot be used"), torch.device("meta"):
            return make_model(self.spec, dict(self.config)).eval()

    @cached_property
    def _rotary(self) -> nn.Module:
        return rotary(self._model, self.device)

    @torch.no_grad()
    def __call__(self, packs: Sequence[Pack]) -> list[Tensor]:
        """The states of each pack's tokens, (tokens, dim) in the encoder's dtype on its device.

        A layer is read once for all of them, and goes through them one by one.
        """
        ids = torch.tensor([token for pack in packs for (token,) in pack.tokens])
        rows = self.weights.rows(self.spec.folder, EMBEDDING, ids).to(self.device, self.dtype)
        states = list(rows.split([len(pack.tokens) for pack in packs]))
        kept: list[list[Tensor]] = [[] for _ in packs]  # of the layers that are read side by side
        for number in range(used_layers(self.spec, self.config)):
            read = self._layer(number)
            for at, pack in enumerate(packs):
                states[at] = self._passed(number, read, states[at], pack)
                if isinstance(self.spec.hidden, tuple) and number + 1 in self.spec.hidden:
                    kept[at].append(states[at])
        if isinstance(self.spec.hidden, tuple):
            return [torch.cat(layers, 1) for layers in kept]
        if self.spec.hidden == "last":
            weight = {"weight": self._weight(NORM)}
            states = [functional_call(self._model.norm, weight, (each,)) for each in states]
        return states

    def _weight(self, name: str) -> Tensor:
        return self.weights.read(self.spec.folder, name).to(self.device, self.dtype)

    def _layer(self, number: int) -> dict[str, Tensor]:
        """The weights of a decoder layer by their names in it."""
        names = layer_weights(self.spec, self.config)
        return {name: self._weight(f"layers.{number}.{name}") for name in names}

    def _passed(self, number: int, read: Mapping[str, Tensor], states: Tensor, pack: Pack) -> Tensor:
        """What a decoder layer makes of the states of a pack.

        A token's position is its depth in the tree, so that every prompt is a sequence of its own.
        """
        positions = pack.positions.to(self.device)[None]
        if self.spec.kind == "qwen2_5_vl":  # in time, height and width, which for text are one
            positions = positions.expand(3, 1, -1)
        told = {
            "attention_mask": pack.mask.to(self.device)[None, None],
            "position_embeddings": self._rotary(states[None], positions),
        }
        with refusing_library(f"{self.weights.folder(self.spec.folder)} cannot be computed"):
            found = functional_call(self._model.layers[number], dict(read), (states[None],), told)
        hidden: Tensor = found[0] if isinstance(found, tuple) else found
        return hidden.reshape(states.shape)
