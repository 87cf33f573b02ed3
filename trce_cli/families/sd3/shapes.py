"""Every weight that Stable Diffusion 3's transformer has by its configuration, and its shape."""

from collections.abc import Mapping
from typing import Any

from trce_cli.families.base import Shape
from trce_cli.families.sd3.config import Transformer, transformer
from trce_cli.families.sd3.names import POSITIONS
from trce_cli.families.shapes import Found, added, attention, embedder, layer, perceptron


def denoiser_weights(config: Mapping[str, Any]) -> dict[str, Shape]:
    """Of the transformer; the last block gives no text."""
    return dict(_transformer(transformer(config)))


def _transformer(config: Transformer) -> Found:
    width, patch = config.caption_projection_dim, config.patch_size
    head = config.attention_head_dim if config.qk_norm else None
    yield POSITIONS, (1, config.pos_embed_max_size**2, width)
    yield from layer("pos_embed.proj", width, config.in_channels, patch, patch)
    yield from embedder("time_text_embed.timestep_embedder", width)
    yield from embedder("time_text_embed.text_embedder", width, config.pooled_projection_dim)
    yield from layer("context_embedder", width, config.joint_attention_dim)
    for number in range(config.num_layers):
        block, last = f"transformer_blocks.{number}", number == config.num_layers - 1
        two = number in config.dual_attention_layers
        yield from layer(f"{block}.norm1.linear", (9 if two else 6) * width, width)
        yield from layer(f"{block}.norm1_context.linear", (2 if last else 6) * width, width)
        yield from attention(f"{block}.attn", width, head)
        yield from added(f"{block}.attn", width, head, out=not last)
        if two:
            yield from attention(f"{block}.attn2", width, head)
        yield from perceptron(f"{block}.ff", width)
        if not last:
            yield from perceptron(f"{block}.ff_context", width)
    yield from layer("norm_out.linear", 2 * width, width)
    yield from layer("proj_out", patch**2 * (config.out_channels or config.in_channels), width)
