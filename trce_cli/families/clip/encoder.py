"""A CLIP text encoder, computed from the weights of a checkpoint, one layer in memory at a time.

No library of models is needed for it, which would cost more memory and time to import than the computation.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any, Final

import torch
from torch import Tensor
from torch.nn.functional import gelu, layer_norm, linear, scaled_dot_product_attention, silu

from trce_cli.errors import BadInput
from trce_cli.families.base import Weights
from trce_cli.families.clip.names import CONFIG, TEXT, clip_weights
from trce_cli.families.clip.spec import EncoderSpec
from trce_cli.families.load import checked


def quick_gelu(x: Tensor) -> Tensor:
    """x sigmoid(1.702 x), in place: the MLP's activations are the largest tensors there are here."""
    return silu(x.mul_(1.702), inplace=True).mul_(1 / 1.702)


ACTIVATIONS: Final[Mapping[str, Callable[[Tensor], Tensor]]] = {"quick_gelu": quick_gelu, "gelu": gelu}


class ClipEncoder:
    """One text encoder: token ids -> hidden states, as transformers' CLIPTextModel gives them.

    clip_skip: which layer from the end counts as the last one; see `EncoderSpec.hidden` for what it gives.

    On the CPU its weights are read a layer at a time, and of the token embedding the rows that are looked up;
    on other devices they are loaded once. Raises BadInput for a configuration that cannot be
    used, and with the first use of `hash` for weights that cannot.
    """

    def __init__(
        self,
        weights: Weights,
        spec: EncoderSpec,
        device: torch.device | str,
        dtype: torch.dtype,
        clip_skip: int = 1,
    ) -> None:
        self.weights, self.spec, self.clip_skip = weights, spec, clip_skip
        self.device, self.dtype = torch.device(device), dtype
        self.config: Mapping[str, Any] = {**CONFIG, **weights.config[spec.folder]}
        self.dim: int = self.config["hidden_size"]
        self._resident: dict[str, Tensor] = {}
        act, heads = self.config["hidden_act"], self.config["num_attention_heads"]
        where = weights.folder(spec.folder)
        if act not in ACTIVATIONS:
            raise BadInput(f"{where}: hidden_act is {act!r}, not {' or '.join(ACTIVATIONS)}.")
        if type(heads) is not int or heads < 1 or self.dim % heads:
            raise BadInput(f"{where}: num_attention_heads is {heads!r}, which does not divide {self.dim}.")

    @cached_property
    def hash(self) -> str:
        """SHA-256 in hex of all that embeddings depend on: weights, dtype, configuration, hidden state.

        Every weight is checked on the way.
        """
        read = (self.spec.hidden, self.dtype, {name: self.config[name] for name in CONFIG})
        skipped = (self.clip_skip,) if self.clip_skip > 1 else ()
        digest = hashlib.sha256(repr((*read, *skipped)).encode())
        shapes = clip_weights(self.config, self.spec.projects)
        for name, weight in checked(self.weights, self.spec.folder, shapes):
            digest.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode())
            digest.update(weight.contiguous().view(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()

    def _weight(self, name: str) -> Tensor:
        """A weight by its name, on the device."""
        if name in self._resident:
            return self._resident[name]
        weight = self.weights.read(self.spec.folder, name).to(self.device, self.dtype)
        if self.device.type != "cpu":
            self._resident[name] = weight
        return weight

    @torch.no_grad()
    def __call__(
        self, ids: Tensor, positions: Tensor, masks: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor | None]:
        """What the U-Net attends to, (tokens, dim), and for an encoder that projects the last layer's output.

        ids, positions: of the tokens of several sequences, one after the other, (tokens,). masks: for each
        sequence which token attends to which, (length, length).
        """
        masks = [mask.to(self.device) for mask in masks]
        x = self.weights.rows(self.spec.folder, f"{TEXT}embeddings.token_embedding.weight", ids.cpu())
        x = x.to(self.device, self.dtype)
        x = x + self._weight(f"{TEXT}embeddings.position_embedding.weight")[positions.to(self.device)]
        last = self.config["num_hidden_layers"] - self.clip_skip
        for number in range(last):
            x = self._layer(number, x, masks)
        if self.spec.hidden == "penultimate" and not self.spec.projects:
            return x, None
        final = self._norm(f"{TEXT}final_layer_norm", self._layer(last, x, masks))
        return (x if self.spec.hidden == "penultimate" else final), final if self.spec.projects else None

    @torch.no_grad()
    def project(self, states: Tensor) -> Tensor:
        """Pooled embeddings of EoT states, (prompts, projection_dim)."""
        return linear(states, self._weight("text_projection.weight"))

    def _layer(self, number: int, x: Tensor, masks: Sequence[Tensor]) -> Tensor:
        name, lengths = f"{TEXT}encoder.layers.{number}.", [len(mask) for mask in masks]
        y = self._norm(f"{name}layer_norm1", x)
        q, k, v = (
            self._linear(f"{name}self_attn.{part}_proj", y)
            .unflatten(-1, (self.config["num_attention_heads"], -1))
            .transpose(0, 1)  # (heads, tokens, dim / heads)
            .split(lengths, 1)
            for part in "qkv"
        )
        seen = torch.cat(
            [
                scaled_dot_product_attention(own_q[None], own_k[None], own_v[None], mask)[0]
                for own_q, own_k, own_v, mask in zip(q, k, v, masks, strict=True)
            ],
            1,
        )
        x = x + self._linear(f"{name}self_attn.out_proj", seen.transpose(0, 1).flatten(1))
        y = self._linear(f"{name}mlp.fc1", self._norm(f"{name}layer_norm2", x))
        return x + self._linear(f"{name}mlp.fc2", ACTIVATIONS[self.config["hidden_act"]](y))

    def _linear(self, name: str, x: Tensor) -> Tensor:
        return linear(x, self._weight(f"{name}.weight"), self._weight(f"{name}.bias"))

    def _norm(self, name: str, x: Tensor) -> Tensor:
        weight, bias = self._weight(f"{name}.weight"), self._weight(f"{name}.bias")
        return layer_norm(x, (self.dim,), weight, bias, self.config["layer_norm_eps"])
