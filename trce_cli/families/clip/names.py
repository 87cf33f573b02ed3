"""Names and shapes of the weights of CLIP's text encoders, in transformers' form and in OpenCLIP's (pure)."""

from collections.abc import Callable, Mapping
from math import prod
from typing import TYPE_CHECKING, Any, Final

from trce_cli.families.base import Shape, Stored

if TYPE_CHECKING:
    from torch import Tensor

POSITIONS: Final = "max_position_embeddings"
MOST_POSITIONS: Final = 1 << 12

TEXT: Final = "text_model."  # what most names begin with in published files
# What the configuration says beyond the sizes that it must give, and transformers' values where it is silent.
CONFIG: Final[Mapping[str, Any]] = {
    "num_attention_heads": 8,
    "intermediate_size": 2048,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}
_UNUSED: Final = frozenset({"logit_scale", "position_ids", "attn_mask"})

_OPENCLIP = {
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    "final_layer_norm.weight": "ln_final.weight",
    "final_layer_norm.bias": "ln_final.bias",
    "text_projection.weight": "text_projection",
}
_OPENCLIP_BLOCK = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}


def clip_weights(config: Mapping[str, Any], projection: bool) -> dict[str, tuple[int, ...]]:
    """The weights of transformers' CLIP text model, by the names of published files, and their shapes."""
    config = {**CONFIG, **config}
    dim, inner = config["hidden_size"], config["intermediate_size"]
    shapes: dict[str, tuple[int, ...]] = {
        f"{TEXT}embeddings.token_embedding.weight": (config["vocab_size"], dim),
        f"{TEXT}embeddings.position_embedding.weight": (config["max_position_embeddings"], dim),
    }
    modules = [*_OPENCLIP_BLOCK, "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]
    wide = {"mlp.fc1": (inner, dim), "mlp.fc2": (dim, inner)}
    for layer in range(config["num_hidden_layers"]):
        for module in modules:
            rows, columns = wide.get(module, (dim, dim))
            place = f"{TEXT}encoder.layers.{layer}.{module}"
            shapes[f"{place}.weight"] = (rows,) if "norm" in module else (rows, columns)
            shapes[f"{place}.bias"] = (rows,)
    shapes |= {f"{TEXT}final_layer_norm.{leaf}": (dim,) for leaf in ("weight", "bias")}
    if projection:
        shapes["text_projection.weight"] = (config.get("projection_dim", dim), dim)
    return shapes


def text_in_file(
    places: Mapping[str, Mapping[str, Stored]],
    shapes: Mapping[str, Shape],
    read: "Callable[[str], Tensor]",
    config: Mapping[str, Mapping[str, Any]],
) -> tuple[dict[str, Mapping[str, Any]], list[str]]:
    """What a single file says of its text encoders where configurations say something else, and remarks.

    places: by part where the file keeps its weights. read: a tensor by its name. The number of positions is
    that of the weights; ids of positions that a merge has rounded are told.
    """
    said: dict[str, Mapping[str, Any]] = {}
    remarks = []
    for part, of in places.items():
        if (at := of.get(f"{TEXT}embeddings.position_embedding.weight")) is None or at.name not in shapes:
            continue
        count, wanted = shapes[at.name][0] if shapes[at.name] else 0, config[part][POSITIONS]
        if count != wanted and wanted < count <= MOST_POSITIONS:
            said[part] = {**config[part], POSITIONS: count}
            remarks.append(
                f"The {part} has {count} positions by its weights, not {wanted}: other tools refuse such a "
                "single file. Prompts are cut where the tokenizer says; give a folder whose tokenizer and "
                f"configuration say {count} with --config to have all read."
            )
        ids = at.name.rpartition("position_embedding")[0] + "position_ids"
        length = prod(shapes.get(ids, (0,)))
        if 0 < length <= MOST_POSITIONS and read(ids).flatten().double().tolist() != list(range(length)):
            remarks.append(
                f"{ids} does not count 0, 1, 2 and so on, as a merge may leave it: it is not used here, "
                "and tools that use it read prompts wrongly."
            )
    return said, remarks


def is_unused(name: str) -> bool:
    """Whether a tensor of a single file, wherever it lies, is what CLIP models hold and no text passes
    through: a number of its training, positions counted, a causal mask.
    """
    return name.rpartition(".")[2] in _UNUSED


def published(key: str) -> str | None:
    """The name in published files of a weight of a folder; None for what is no weight.

    transformers 5.6 and later write names without `text_model.`.
    """
    if key.endswith("position_ids"):
        return None
    return key if key.startswith("text_") else f"{TEXT}{key}"


def openclip_from_clip(key: str) -> Stored:
    """Where OpenCLIP keeps a weight of transformers' CLIP text model.

    Queries, keys and values are stacked in one `in_proj` tensor; the text projection is stored transposed.
    """
    key = key.removeprefix(TEXT)
    if key in _OPENCLIP:
        return Stored(_OPENCLIP[key], transposed=key == "text_projection.weight")
    _, _, layer, rest = key.split(".", 3)
    block = f"transformer.resblocks.{layer}."
    module, _, leaf = rest.rpartition(".")
    if module in _OPENCLIP_BLOCK:
        return Stored(f"{block}{_OPENCLIP_BLOCK[module]}.{leaf}")
    third = ("q_proj", "k_proj", "v_proj").index(module.split(".")[1])
    return Stored(f"{block}attn.in_proj_{leaf}", piece=(third, 3))
