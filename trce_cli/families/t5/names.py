"""Names and shapes of the weights of T5's encoder, as published files have them (pure)."""

import re
from collections.abc import Mapping
from typing import Any, Final

from trce_cli.families.base import Shape

EMBEDDING: Final = "shared.weight"
NORM: Final = "encoder.final_layer_norm.weight"
BIAS: Final = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"


def published(key: str) -> str | None:
    """The name of a weight of a folder's file; None for a decoder's, and for the copy of the embedding."""
    return None if re.match(r"decoder\.|lm_head\.|encoder\.embed_tokens\.", key) else key


def module_name(key: str) -> str:
    """The published name of a weight of transformers' encoder stack."""
    return EMBEDDING if key == "embed_tokens.weight" else f"encoder.{key}"


def t5_weights(config: Mapping[str, Any]) -> dict[str, Shape]:
    """The weights that states depend on, and their shapes."""
    buckets = config.get("relative_attention_num_buckets", 32)
    shapes: dict[str, Shape] = {
        EMBEDDING: (config["vocab_size"], config["d_model"]),
        BIAS: (buckets, config["num_heads"]),
    }
    for number in range(config["num_layers"]):
        layer = block_weights(config).items()
        shapes |= {f"encoder.block.{number}.{name}": shape for name, shape in layer}
    return shapes | {NORM: (config["d_model"],)}


def block_weights(config: Mapping[str, Any]) -> dict[str, Shape]:
    """The weights of one block, less the relative positions, which the first one has for all."""
    dim, inner, wide = config["d_model"], config["num_heads"] * config["d_kv"], config["d_ff"]
    shapes: dict[str, Shape] = {f"layer.0.SelfAttention.{name}.weight": (inner, dim) for name in "qkv"}
    shapes["layer.0.SelfAttention.o.weight"] = (dim, inner)
    ins = ("wi_0", "wi_1") if is_gated(config) else ("wi",)
    shapes |= {f"layer.1.DenseReluDense.{name}.weight": (wide, dim) for name in ins}
    shapes["layer.1.DenseReluDense.wo.weight"] = (dim, wide)
    return shapes | {f"layer.{part}.layer_norm.weight": (dim,) for part in (0, 1)}


def is_gated(config: Mapping[str, Any]) -> bool:
    """Whether its feed-forward layers are gated, as those of T5 1.1."""
    return str(config.get("feed_forward_proj", "relu")).startswith("gated-")
