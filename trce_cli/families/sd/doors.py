"""Where a prompt enters SD's U-Net: keys and values of the cross-attention, and for SDXL the embedding of
time and size.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from trce_cli.families.base import Door
from trce_cli.families.clip.spec import CONTEXT, POOLED

if TYPE_CHECKING:
    from torch import Tensor

THIRD: Final = 2  # the place of encoder_hidden_states among a U-Net's positional arguments
POOLED_KEY: Final = "add_embedding.linear_1.weight"


def doors(
    config: Mapping[str, Mapping[str, Any]], keys: Collection[str], encoders: Sequence[str], pooled: bool
) -> tuple[Door, ...]:
    """The doors of a U-Net with weights of these names.

    encoders: parts whose hidden states are the context, side by side; the last one's projected EoT state is
    the pooled embedding, which the first columns of `add_embedding.linear_1` see.
    """
    width = sum(config[part]["hidden_size"] for part in encoders)
    found = [
        Door(name, CONTEXT, _attending(keys, layer), width)
        for name, layer in (("keys", "to_k"), ("values", "to_v"))
    ]
    if pooled:
        found.append(
            Door("add_embedding", POOLED, (POOLED_KEY,), config[encoders[-1]]["projection_dim"], True)
        )
    return tuple(found)


def _attending(keys: Collection[str], layer: str) -> tuple[str, ...]:
    """The cross-attention's keys or values; motion modules' second attention is to frames, not to texts."""
    end = f".attn2.{layer}.weight"
    return tuple(key for key in keys if key.endswith(end) and "motion_modules." not in key)


def widths(config: Mapping[str, Any], pooled: bool) -> dict[str, int]:
    """The width of each stream that a U-Net of this configuration takes.

    SDXL's first layer of `add_embedding` also sees six sizes of the picture, each as so many numbers.
    """
    found = {CONTEXT: config["cross_attention_dim"]}
    if pooled and config.get("addition_time_embed_dim"):
        sizes = 6 * config["addition_time_embed_dim"]
        found[POOLED] = config["projection_class_embeddings_input_dim"] - sizes
    return found


def mapped(
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    change: Callable[[str, "Tensor"], "Tensor"],
    pooled: bool,
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """See `Family.mapped`."""
    kwargs = dict(kwargs)
    if len(args) > THIRD:
        args = (*args[:THIRD], change(CONTEXT, args[THIRD]), *args[THIRD + 1 :])
    else:
        kwargs["encoder_hidden_states"] = change(CONTEXT, kwargs["encoder_hidden_states"])
    if pooled:
        conditions = kwargs["added_cond_kwargs"]
        text_embeds = change(POOLED, conditions["text_embeds"])
        kwargs["added_cond_kwargs"] = {**conditions, "text_embeds": text_embeds}
    return args, kwargs
