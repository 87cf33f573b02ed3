"""Where a prompt enters SD's U-Net: keys and values of the cross-attention, and for SDXL the embedding of
time and size.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any, Final

from trce_cli.families.base import Door

CONTEXT: Final = "context"
POOLED: Final = "pooled"
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
        Door(name, CONTEXT, tuple(key for key in keys if key.endswith(f".attn2.{layer}.weight")), width)
        for name, layer in (("keys", "to_k"), ("values", "to_v"))
    ]
    if pooled:
        found.append(
            Door("add_embedding", POOLED, (POOLED_KEY,), config[encoders[-1]]["projection_dim"], True)
        )
    return tuple(found)
