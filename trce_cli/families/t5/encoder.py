"""T5's encoder computed from the weights of a checkpoint, one block in memory at a time.

The blocks are transformers' own modules, built without weights (on the meta device) and called with those
that were just read.
"""

import hashlib
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.func import functional_call

from trce_cli.errors import refusing, refusing_library
from trce_cli.families.base import Weights
from trce_cli.families.load import checked
from trce_cli.families.t5.load import make_model
from trce_cli.families.t5.names import BIAS, EMBEDDING, NORM, block_weights, t5_weights
from trce_cli.families.t5.spec import T5Spec


class Text(NamedTuple):
    """Tokens to be encoded, with their positions, int64 (tokens,); the first `seen` of them are looked at."""

    ids: Tensor
    positions: Tensor
    seen: int


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
        told = sorted((key, repr(value)) for key, value in self.config.items() if not key.startswith("_"))
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
    def __call__(self, texts: Sequence[Text]) -> list[Tensor]:
        """The states of each text's tokens, (tokens, dim), in the encoder's dtype on its device.

        A block is read once for all of them, and goes through them one by one.
        """
        states = [
            self.weights.rows(self.spec.folder, EMBEDDING, text.ids)[None].to(self.device, self.dtype)
            for text in texts
        ]
        biases: dict[tuple[int, ...], Tensor] = {}
        for number in range(self.config["num_layers"]):
            names = block_weights(self.config)
            read = {name: self._weight(f"encoder.block.{number}.{name}") for name in names}
            for at, text in enumerate(texts):
                key = tuple(text.positions.tolist())
                bias = biases[key] = biases[key] if key in biases else self._bias(text.positions)
                bias = bias.clone() if text.seen < len(key) else bias
                bias[..., text.seen :] = torch.finfo(self.dtype).min
                block, told = self._stack.block[number], {"position_bias": bias}
                with refusing_library(f"{self.weights.folder(self.spec.folder)} cannot be computed"):
                    states[at] = functional_call(block, read, (states[at],), told)[0]
        weight = {"weight": self._weight(NORM)}
        return [functional_call(self._stack.final_layer_norm, weight, (each,))[0] for each in states]

    def _bias(self, positions: Tensor) -> Tensor:
        """What relative positions add to the attention between tokens, (1, heads, tokens, tokens)."""
        attention = self._stack.block[0].layer[0].SelfAttention
        buckets = attention._relative_position_bucket(
            positions[None] - positions[:, None],
            num_buckets=attention.relative_attention_num_buckets,
            max_distance=attention.relative_attention_max_distance,
        )
        return self._weight(BIAS)[buckets.to(self.device)].permute(2, 0, 1)[None]

    def _weight(self, name: str) -> Tensor:
        return self.weights.read(self.spec.folder, name).to(self.device, self.dtype)
