"""Names and shapes of the weights of causal language models, as transformers' base models have them."""

import re
from collections.abc import Mapping
from typing import Any, Final

from trce_cli.families.base import Shape
from trce_cli.families.causal_llm.spec import LlmSpec

EMBEDDING: Final = "embed_tokens.weight"
NORM: Final = "norm.weight"
# What files put before the names: causal models and those that see pictures are made around the base model.
_AROUND = re.compile(r"^(model\.language_model\.|language_model\.model\.|language_model\.|model\.)")


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The configuration of the language model in that of one that sees pictures as well."""
    inner = config.get("text_config")
    return inner if isinstance(inner, Mapping) and "hidden_size" in inner else config


def published(key: str) -> str | None:
    """The name of a weight of a folder's file; None for heads and for what sees pictures."""
    if re.match(r"(model\.)?visual\.|lm_head\.", key) or key.endswith("inv_freq"):
        return None
    return _AROUND.sub("", key)


def used_layers(spec: LlmSpec, config: Mapping[str, Any]) -> int:
    """How many decoder layers the states depend on."""
    if isinstance(spec.hidden, tuple):
        return max(spec.hidden)
    layers: int = text_config(config)["num_hidden_layers"]
    return layers if spec.hidden == "last" else layers - 1


def states_width(spec: LlmSpec, config: Mapping[str, Any]) -> int:
    """How wide the states are that reach the denoiser."""
    width: int = text_config(config)["hidden_size"]
    return width * len(spec.hidden) if isinstance(spec.hidden, tuple) else width


def llm_weights(spec: LlmSpec, config: Mapping[str, Any]) -> dict[str, Shape]:
    """The weights that the states depend on, by the base model's names, and their shapes."""
    config = text_config(config)
    dim = config["hidden_size"]
    shapes: dict[str, Shape] = {EMBEDDING: (config["vocab_size"], dim)}
    for number in range(used_layers(spec, config)):
        shapes |= {f"layers.{number}.{name}": shape for name, shape in layer_weights(spec, config).items()}
    return shapes | ({NORM: (dim,)} if spec.hidden == "last" else {})


def layer_weights(spec: LlmSpec, config: Mapping[str, Any]) -> dict[str, Shape]:
    """The weights of one decoder layer."""
    config = text_config(config)
    dim, inner, heads = config["hidden_size"], config["intermediate_size"], config["num_attention_heads"]
    keys = config.get("num_key_value_heads") or heads
    each = config.get("head_dim") or dim // heads
    attends = {"q_proj": (heads * each, dim), "k_proj": (keys * each, dim), "v_proj": (keys * each, dim)}
    attends["o_proj"] = (dim, heads * each)
    shapes: dict[str, Shape] = {f"self_attn.{name}.weight": shape for name, shape in attends.items()}
    if spec.kind == "qwen3":
        shapes |= {f"self_attn.{name}_norm.weight": (each,) for name in "qk"}
        biased = attends if config.get("attention_bias") else {}
    else:
        biased = {name: attends[name] for name in ("q_proj", "k_proj", "v_proj")}
    shapes |= {f"self_attn.{name}.bias": (shape[0],) for name, shape in biased.items()}
    wide = {"gate_proj": (inner, dim), "up_proj": (inner, dim), "down_proj": (dim, inner)}
    shapes |= {f"mlp.{name}.weight": shape for name, shape in wide.items()}
    return shapes | {f"{name}.weight": (dim,) for name in ("input_layernorm", "post_attention_layernorm")}
