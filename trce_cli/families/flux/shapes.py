"""Every weight that the transformers of FLUX.1 and Chroma have by their configurations, and its shape."""

from collections.abc import Mapping
from itertools import chain
from typing import Any

from trce_cli.families.base import Shape
from trce_cli.families.flux.config import Blocks, chroma, transformer
from trce_cli.families.flux.names import APPROXIMATOR
from trce_cli.families.shapes import Found, added, attention, embedder, layer, perceptron


def flux_weights(config: Mapping[str, Any]) -> dict[str, Shape]:
    """Of FLUX.1's."""
    found = transformer(config)
    told_by = _flux(found.width, found.pooled_projection_dim, found.guidance_embeds)
    return dict(chain(told_by, _blocks(found, modulated=True)))


def chroma_weights(config: Mapping[str, Any]) -> dict[str, Shape]:
    """Of Chroma's, whose blocks are told the time by numbers that one network makes for all of them."""
    found = chroma(config)
    seen, inner, count = (
        found.approximator_num_channels,
        found.approximator_hidden_dim,
        found.approximator_layers,
    )
    told_by = _approximator(found.width, seen, inner, count)
    return dict(chain(told_by, _blocks(found, modulated=False)))


def _flux(width: int, pooled: int, guided: bool) -> Found:
    for name, seen in (("timestep", 256), ("text", pooled), *([("guidance", 256)] if guided else [])):
        yield from embedder(f"time_text_embed.{name}_embedder", width, seen)
    yield from layer("norm_out.linear", 2 * width, width)


def _approximator(width: int, seen: int, inner: int, count: int) -> Found:
    yield from layer(f"{APPROXIMATOR}.in_proj", inner, seen)
    for number in range(count):
        yield from embedder(f"{APPROXIMATOR}.layers.{number}", inner, inner)
        yield from layer(f"{APPROXIMATOR}.norms.{number}", inner, bias=False)
    yield from layer(f"{APPROXIMATOR}.out_proj", width, inner)


def _blocks(config: Blocks, modulated: bool) -> Found:
    """What both have; modulated: whether each block has layers of its own that tell it the time."""
    width, head = config.width, config.attention_head_dim
    yield from layer("context_embedder", width, config.joint_attention_dim)
    yield from layer("x_embedder", width, config.in_channels)
    for number in range(config.num_layers):
        block = f"transformer_blocks.{number}"
        yield from attention(f"{block}.attn", width, head)
        yield from added(f"{block}.attn", width, head)
        for side in ("", "_context"):
            yield from perceptron(f"{block}.ff{side}", width)
            if modulated:
                yield from layer(f"{block}.norm1{side}.linear", 6 * width, width)
    for number in range(config.num_single_layers):
        block = f"single_transformer_blocks.{number}"
        yield from attention(f"{block}.attn", width, head, out=False)
        yield from layer(f"{block}.proj_mlp", 4 * width, width)
        yield from layer(f"{block}.proj_out", width, 5 * width)
        if modulated:
            yield from layer(f"{block}.norm.linear", 3 * width, width)
    yield from layer("proj_out", config.out_channels or config.in_channels, width)
