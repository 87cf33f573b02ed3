"""Every weight that Z-Image's transformer has by its configuration, and its shape."""

from collections.abc import Mapping
from typing import Any, Final

from trce_cli.families.base import Shape
from trce_cli.families.shapes import Found, layer
from trce_cli.families.z_image.config import Transformer, transformer
from trce_cli.families.z_image.names import DOOR, NORM

_TIME: Final = 256  # numbers that a time is said by, and at most those that blocks are told it by
_INNER: Final = 1024  # between its two layers


def denoiser_weights(config: Mapping[str, Any]) -> dict[str, Shape]:
    """Of the transformer."""
    return dict(_transformer(transformer(config)))


def _transformer(config: Transformer) -> Found:
    width, time = config.dim, min(config.dim, _TIME)
    yield from layer("t_embedder.mlp.0", _INNER, _TIME)
    yield from layer("t_embedder.mlp.2", time, _INNER)
    yield NORM, (config.cap_feat_dim,)
    yield from layer(DOOR.removesuffix(".weight"), width, config.cap_feat_dim)
    yield from (("x_pad_token", (1, width)), ("cap_pad_token", (1, width)))
    patch = 4 * config.in_channels
    yield from layer("all_x_embedder.2-1", width, patch)
    yield from layer("all_final_layer.2-1.linear", patch, width)
    yield from layer("all_final_layer.2-1.adaLN_modulation.1", width, time)
    for kind, count, told in (
        ("noise_refiner", config.n_refiner_layers, time),
        ("context_refiner", config.n_refiner_layers, None),
        ("layers", config.n_layers, time),
    ):
        for number in range(count):
            yield from _block(f"{kind}.{number}", width, width // config.n_heads, told)


def _block(name: str, width: int, head: int, time: int | None) -> Found:
    """time: numbers that it is told the time by."""
    inner = int(width / 3 * 8)
    for each in ("to_q", "to_k", "to_v", "to_out.0"):
        yield from layer(f"{name}.attention.{each}", width, width, bias=False)
    for each in "qk":
        yield from layer(f"{name}.attention.norm_{each}", head, bias=False)
    for each, shape in (("w1", (inner, width)), ("w2", (width, inner)), ("w3", (inner, width))):
        yield from layer(f"{name}.feed_forward.{each}", *shape, bias=False)
    for each in ("attention_norm1", "attention_norm2", "ffn_norm1", "ffn_norm2"):
        yield from layer(f"{name}.{each}", width, bias=False)
    if time is not None:
        yield from layer(f"{name}.adaLN_modulation.0", 4 * width, time)
