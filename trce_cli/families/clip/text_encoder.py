"""CLIP's text encoders, computed from the weights of a checkpoint, one layer in memory at a time.

No library of models is needed for it, which would cost more memory and time to import than the computation.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any, Final

import torch
from torch import Tensor
from torch.nn.functional import embedding, gelu, layer_norm, linear, scaled_dot_product_attention, silu

from trce_cli.errors import BadInput
from trce_cli.families.clip.load import EncoderFiles
from trce_cli.system.safetensors import FLOATS, all_finite

TEXT: Final = "text_model."  # what most names of weights begin with
# What the configuration says beyond the shapes of the weights, and transformers' values where it is silent.
CONFIG: Final[Mapping[str, Any]] = {
    "num_attention_heads": 8,
    "intermediate_size": 2048,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}


def quick_gelu(x: Tensor) -> Tensor:
    """x sigmoid(1.702 x), in place: the MLP's activations are the largest tensors there are here."""
    return silu(x.mul_(1.702), inplace=True).mul_(1 / 1.702)


ACTIVATIONS: Final[Mapping[str, Callable[[Tensor], Tensor]]] = {"quick_gelu": quick_gelu, "gelu": gelu}


class TextEncoder:
    """One text encoder: token ids -> hidden states, as transformers' CLIPTextModel gives them.

    On the CPU its weights stay pages of their file, and are converted to `dtype` a layer at a time where they
    have another; on other devices they are loaded once. Raises BadInput for weights that are missing, of
    another shape than the configuration asks for, or not finite.
    """

    def __init__(self, files: EncoderFiles, device: torch.device | str, dtype: torch.dtype) -> None:
        self.files, self.device, self.dtype = files, torch.device(device), dtype
        self.config: Mapping[str, Any] = {**CONFIG, **files.config}
        self.dim: int = self.config["hidden_size"]
        self.projects = files.spec.model_class == "CLIPTextModelWithProjection"
        self._resident: dict[str, Tensor] = {}
        act, heads = self.config["hidden_act"], self.config["num_attention_heads"]
        if act not in ACTIVATIONS:
            raise BadInput(f"{files.where}: hidden_act is {act!r}, not {' or '.join(ACTIVATIONS)}.")
        if type(heads) is not int or heads < 1 or self.dim % heads:
            raise BadInput(
                f"{files.where}: num_attention_heads is {heads!r}, which does not divide {self.dim}."
            )
        self._check()

    @cached_property
    def hash(self) -> str:
        """SHA-256 in hex of all that embeddings depend on: weights, dtype, configuration, hidden state."""
        digest = hashlib.sha256(
            repr((self.files.spec.hidden, self.dtype, {name: self.config[name] for name in CONFIG})).encode()
        )
        for name in self.files.weights():
            weight = self.files.map(name).contiguous()
            digest.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode())
            digest.update(weight.view(-1).view(torch.uint8).numpy().data)
            self.files.release()
        return digest.hexdigest()

    def _check(self) -> None:
        for name in self.files.weights():
            weight, wanted = self.files.map(name), self._shape(name)
            if tuple(weight.shape) != wanted:
                raise BadInput(
                    f"{name} in {self.files.where} has shape {list(weight.shape)}; its config.json asks for "
                    f"{list(wanted)}."
                )
            if str(weight.dtype).removeprefix("torch.") not in FLOATS.values():
                raise BadInput(
                    f"{name} in {self.files.where} has the dtype {weight.dtype}, which is no use here."
                )
            if not all_finite(weight):
                raise BadInput(f"{name} in {self.files.where} holds NaN or infinite values.")
            self.files.release()

    def _shape(self, name: str) -> tuple[int, ...]:
        *_, module, leaf = name.split(".")
        inner = self.config["intermediate_size"]
        rows, columns = {
            "token_embedding": (self.config["vocab_size"], self.dim),
            "position_embedding": (self.config["max_position_embeddings"], self.dim),
            "fc1": (inner, self.dim),
            "fc2": (self.dim, inner),
            "text_projection": (self.config.get("projection_dim", self.dim), self.dim),
        }.get(module, (self.dim, self.dim))
        return (rows,) if leaf == "bias" or "norm" in module else (rows, columns)

    def _weight(self, name: str, convert: bool = True) -> Tensor:
        """A weight by its name, on the device; in the dtype of the file without `convert`."""
        if name in self._resident:
            return self._resident[name]
        weight = self.files.map(name).to(self.device, self.dtype if convert else None)
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
        table = self._weight(f"{TEXT}embeddings.token_embedding.weight", convert=False)
        x = embedding(ids.to(self.device), table).to(self.dtype)
        x = x + self._weight(f"{TEXT}embeddings.position_embedding.weight")[positions.to(self.device)]
        last = self.config["num_hidden_layers"] - 1
        for number in range(last):
            x = self._layer(number, x, masks)
        if self.files.spec.hidden == "penultimate" and not self.projects:
            return x, None
        final = self._norm(f"{TEXT}final_layer_norm", self._layer(last, x, masks))
        return (x if self.files.spec.hidden == "penultimate" else final), final if self.projects else None

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
        x = x + self._linear(f"{name}mlp.fc2", ACTIVATIONS[self.config["hidden_act"]](y))
        self.files.release()
        return x

    def _linear(self, name: str, x: Tensor) -> Tensor:
        return linear(x, self._weight(f"{name}.weight"), self._weight(f"{name}.bias"))

    def _norm(self, name: str, x: Tensor) -> Tensor:
        weight, bias = self._weight(f"{name}.weight"), self._weight(f"{name}.bias")
        return layer_norm(x, (self.dim,), weight, bias, self.config["layer_norm_eps"])
