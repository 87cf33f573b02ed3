"""T5's encoder computed from the weights of a checkpoint, one block in memory at a time.

The blocks are transformers' own modules, built without weights (on the meta device) and called with those
that were just read.
"""

import hashlib
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call

from trce_cli.errors import refusing
from trce_cli.families.base import Weights
from trce_cli.families.load import checked
from trce_cli.families.t5.load import make_model
from trce_cli.families.t5.names import BIAS, EMBEDDING, NORM, block_weights, t5_weights
from trce_cli.families.t5.spec import T5Spec


class T5Encoder:
    """Token ids -> the last layer's output behind its norm, as transformers' model gives it.

    Raises BadInput for a configuration that cannot be used, and with the first use of `hash` for weights that
    cannot.
    """

    def __init__(
        self, weights: Weights, spec: T5Spec, device: torch.device | str, dtype: torch.dtype
    ) -> None:
        self.weights, self.spec = weights, spec
        self.device, self.dtype = torch.device(device), dtype
        self.config: Mapping[str, Any] = weights.config[spec.folder]
        self.dim: int = self.config["d_model"]

    @cached_property
    def hash(self) -> str:
        """SHA-256 in hex of all that states depend on: weights, dtype, configuration.

        Every weight is checked on the way.
        """
        told = sorted((key, repr(value)) for key, value in self.config.items() if key[0] != "_")
        digest = hashlib.sha256(repr((self.dtype, told)).encode())
        for name, weight in checked(self.weights, self.spec.folder, t5_weights(self.config)):
            digest.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode())
            digest.update(weight.contiguous().view(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()

    @cached_property
    def _stack(self) -> Any:
        """The encoder without weights."""
        where = self.weights.folder(self.spec.folder) / "config.json"
        with refusing(f"{where} cannot be used"), torch.device("meta"):
            return make_model(dict(self.config)).encoder.eval()

    @torch.no_grad()
    def __call__(self, batches: Sequence[tuple[Tensor, Tensor | None]]) -> list[Tensor]:
        """The states of batches of token ids, (prompts, tokens, dim), in the encoder's dtype on its device.

        With the ids, (prompts, tokens), goes which of them are seen, a mask of that shape; None for all. A
        block is read once for all of the batches, and goes through them one by one.
        """
        states = [
            self.weights.rows(self.spec.folder, EMBEDDING, ids.flatten())
            .view(*ids.shape, self.dim)
            .to(self.device, self.dtype)
            for ids, _ in batches
        ]
        biases: dict[int, Tensor] = {}
        for number in range(self.config["num_layers"]):
            names = block_weights(self.config)
            read = {name: self._weight(f"encoder.block.{number}.{name}") for name in names}
            for at, (ids, seen) in enumerate(batches):
                if (length := ids.shape[1]) not in biases:
                    biases[length] = self._bias(length)
                bias = biases[length]
                if seen is not None:
                    hidden = ~seen.to(self.device)[:, None, None]
                    bias = bias.masked_fill(hidden, torch.finfo(self.dtype).min)
                states[at] = functional_call(
                    self._stack.block[number], read, (states[at],), {"position_bias": bias}
                )[0]
        weight = {"weight": self._weight(NORM)}
        return [functional_call(self._stack.final_layer_norm, weight, (each,)) for each in states]

    def _bias(self, length: int) -> Tensor:
        """What relative positions add to the attention between so many tokens, (1, heads, length, length)."""
        attention = self._stack.block[0].layer[0].SelfAttention
        places = torch.arange(length, device=self.device)
        buckets = attention._relative_position_bucket(
            places[None] - places[:, None],
            num_buckets=attention.relative_attention_num_buckets,
            max_distance=attention.relative_attention_max_distance,
        )
        return self._weight(BIAS)[buckets].permute(2, 0, 1)[None]

    def _weight(self, name: str) -> Tensor:
        return self.weights.read(self.spec.folder, name).to(self.device, self.dtype)
