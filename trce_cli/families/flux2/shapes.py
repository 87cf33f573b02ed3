"""Every weight that FLUX.2's transformer and autoencoder have by their configurations, and its shape."""

from collections.abc import Mapping
from typing import Any

from trce_cli.families.base import Shape
from trce_cli.families.flux2.config import Transformer, Vae, transformer
from trce_cli.families.shapes import Found, added, attention, embedder, layer
from trce_cli.families.shapes import vae_weights as plain_vae_weights


def denoiser_weights(config: Mapping[str, Any]) -> dict[str, Shape]:
    """Of the transformer; none of its layers has a bias, and all blocks share what tells them the time."""
    return dict(_transformer(transformer(config)))


def vae_weights(config: Mapping[str, Any]) -> dict[str, Shape] | None:
    """Of the autoencoder, which has means and deviations of its latents, four at a time."""
    found = Vae.model_validate(dict(config))
    latent = 4 * found.latent_channels
    told = {"latent_channels": found.latent_channels, "layers_per_block": found.layers_per_block}
    plain = plain_vae_weights({**config, **told})
    scales: dict[str, Shape] = {"bn.running_mean": (latent,), "bn.running_var": (latent,)}
    return None if plain is None else plain | scales


def _transformer(config: Transformer) -> Found:
    head = config.attention_head_dim
    width = head * config.num_attention_heads
    inner = int(width * config.mlp_ratio)
    seen = config.timestep_guidance_channels
    yield from embedder("time_guidance_embed.timestep_embedder", width, seen, bias=False)
    for name, count in (("double_stream", 6), ("single_stream", 3)):
        for side in ("_img", "_txt") if count == 6 else ("",):
            yield from layer(f"{name}_modulation{side}.linear", count * width, width, bias=False)
    yield from layer("context_embedder", width, config.joint_attention_dim, bias=False)
    yield from layer("x_embedder", width, config.in_channels, bias=False)
    for number in range(config.num_layers):
        block = f"transformer_blocks.{number}"
        yield from attention(f"{block}.attn", width, head, bias=False)
        yield from added(f"{block}.attn", width, head, bias=False)
        for side in ("", "_context"):
            yield from layer(f"{block}.ff{side}.linear_in", 2 * inner, width, bias=False)
            yield from layer(f"{block}.ff{side}.linear_out", width, inner, bias=False)
    for number in range(config.num_single_layers):
        block = f"single_transformer_blocks.{number}.attn"
        yield from layer(f"{block}.to_qkv_mlp_proj", 3 * width + 2 * inner, width, bias=False)
        yield from layer(f"{block}.to_out", width, width + inner, bias=False)
        for each in "qk":
            yield from layer(f"{block}.norm_{each}", head, bias=False)
    yield from layer("norm_out.linear", 2 * width, width, bias=False)
    yield from layer("proj_out", config.out_channels or config.in_channels, width, bias=False)
