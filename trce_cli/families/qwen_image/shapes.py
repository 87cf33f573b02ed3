"""Every weight that Qwen-Image's transformer and autoencoder have by their configurations, and its shape."""

from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import Any

from trce_cli.families.base import Shape
from trce_cli.families.qwen_image.config import Transformer, Vae, transformer
from trce_cli.families.qwen_image.names import DOOR, NORM
from trce_cli.families.shapes import Found, added, attention, embedder, layer, perceptron


def denoiser_weights(config: Mapping[str, Any]) -> dict[str, Shape]:
    """Of the transformer."""
    return dict(_transformer(transformer(config)))


def _transformer(config: Transformer) -> Found:
    head = config.attention_head_dim
    width = head * config.num_attention_heads
    yield from embedder("time_text_embed.timestep_embedder", width)
    yield NORM, (config.joint_attention_dim,)
    yield from layer(DOOR.removesuffix(".weight"), width, config.joint_attention_dim)
    yield from layer("img_in", width, config.in_channels)
    for number in range(config.num_layers):
        block = f"transformer_blocks.{number}"
        yield from attention(f"{block}.attn", width, head)
        yield from added(f"{block}.attn", width, head)
        for side in ("img", "txt"):
            yield from layer(f"{block}.{side}_mod.1", 6 * width, width)
            yield from perceptron(f"{block}.{side}_mlp", width)
    yield from layer("norm_out.linear", 2 * width, width)
    yield from layer("proj_out", config.patch_size**2 * (config.out_channels or config.in_channels), width)


def vae_weights(config: Mapping[str, Any]) -> dict[str, Shape] | None:
    """Of the autoencoder, which is one for films; None for one that has options which are not known here."""
    found = Vae.model_validate(dict(config))
    if config.get("attn_scales") or len(found.temperal_downsample) != len(found.dim_mult) - 1:
        return None
    return dict(_vae(found, config.get("input_channels", 3)))


def _vae(config: Vae, colours: int) -> Found:
    latent = config.z_dim
    widths = [config.base_dim * times for times in (1, *config.dim_mult)]
    for side, seen, count in (("encoder", colours, 2 * latent), ("decoder", latent, colours)):
        ends = (widths[0], widths[-1]) if side == "encoder" else (widths[-1], widths[1])
        yield from layer(f"{side}.conv_in", ends[0], seen, 3, 3, 3)
        yield from _middle(f"{side}.mid_block", widths[-1])
        yield f"{side}.norm_out.gamma", (ends[1], 1, 1, 1)
        yield from layer(f"{side}.conv_out", count, ends[1], 3, 3, 3)
    yield from layer("quant_conv", 2 * latent, 2 * latent, 1, 1, 1)
    yield from layer("post_quant_conv", latent, latent, 1, 1, 1)
    yield from _down(config, widths)
    yield from _up(config, widths[:0:-1])


def _down(config: Vae, widths: list[int]) -> Found:
    """The encoder's levels, the blocks of all in one list."""
    places: Iterator[str] = (f"encoder.down_blocks.{number}" for number in range(1 << 16))
    for level, (seen, width) in enumerate(pairwise(widths)):
        for number in range(config.num_res_blocks):
            yield from _resnet(next(places), width if number else seen, width)
        if level < len(config.temperal_downsample):
            place = next(places)
            yield from layer(f"{place}.resample.1", width, width, 3, 3)
            if config.temperal_downsample[level]:
                yield from layer(f"{place}.time_conv", width, width, 3, 1, 1)


def _up(config: Vae, widths: list[int]) -> Found:
    """The decoder's levels, each of which is half as wide when it has grown."""
    grows = config.temperal_downsample[::-1]
    for level, width in enumerate(widths):
        place, seen = f"decoder.up_blocks.{level}", widths[level - 1] // 2 if level else width
        for number in range(config.num_res_blocks + 1):
            yield from _resnet(f"{place}.resnets.{number}", width if number else seen, width)
        if level < len(grows):
            yield from layer(f"{place}.upsamplers.0.resample.1", width // 2, width, 3, 3)
            if grows[level]:
                yield from layer(f"{place}.upsamplers.0.time_conv", 2 * width, width, 3, 1, 1)


def _middle(place: str, width: int) -> Found:
    yield f"{place}.attentions.0.norm.gamma", (width, 1, 1)
    yield from layer(f"{place}.attentions.0.to_qkv", 3 * width, width, 1, 1)
    yield from layer(f"{place}.attentions.0.proj", width, width, 1, 1)
    for number in range(2):
        yield from _resnet(f"{place}.resnets.{number}", width, width)


def _resnet(place: str, seen: int, width: int) -> Found:
    for number, before in ((1, seen), (2, width)):
        yield f"{place}.norm{number}.gamma", (before, 1, 1, 1)
        yield from layer(f"{place}.conv{number}", width, before, 3, 3, 3)
    if seen != width:
        yield from layer(f"{place}.conv_shortcut", width, seen, 1, 1, 1)
