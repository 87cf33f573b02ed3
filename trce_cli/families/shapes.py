"""Every weight that modules which families share have by a configuration, and its shape (pure).

As diffusers names them: importing its modules takes longer than an edit.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from trce_cli.families.base import Shape

_VAE_BLOCKS: Final = {"DownEncoderBlock2D", "UpDecoderBlock2D"}
_WAVES: Final = 256  # numbers that a time or a guidance is first said by

Found = Iterator[tuple[str, Shape]]


def layer(name: str, *shape: int, bias: bool = True) -> Found:
    """A linear layer, convolution or norm."""
    yield f"{name}.weight", shape
    if bias:
        yield f"{name}.bias", shape[:1]


def resnet(name: str, seen: int, width: int, time: int | None) -> Found:
    """A residual block; time: numbers that it is told the time by."""
    yield from layer(f"{name}.norm1", seen)
    yield from layer(f"{name}.conv1", width, seen, 3, 3)
    if time is not None:
        yield from layer(f"{name}.time_emb_proj", width, time)
    yield from layer(f"{name}.norm2", width)
    yield from layer(f"{name}.conv2", width, width, 3, 3)
    if seen != width:
        yield from layer(f"{name}.conv_shortcut", width, seen, 1, 1)


def embedder(name: str, width: int, seen: int = _WAVES, bias: bool = True) -> Found:
    """Two linear layers, by which a transformer of this width is told a time, a guidance or a pooled text."""
    yield from layer(f"{name}.linear_1", width, seen, bias=bias)
    yield from layer(f"{name}.linear_2", width, width, bias=bias)


def attention(name: str, width: int, head: int | None, bias: bool = True, out: bool = True) -> Found:
    """Of a picture's tokens; head: numbers of a head, where its queries and keys are normed."""
    for each in ("to_q", "to_k", "to_v", *(["to_out.0"] if out else [])):
        yield from layer(f"{name}.{each}", width, width, bias=bias)
    for each in "qk" if head else "":
        yield from layer(f"{name}.norm_{each}", head or 0, bias=False)


def added(name: str, width: int, head: int | None, bias: bool = True, out: bool = True) -> Found:
    """What an attention has for a text's tokens, which are seen together with a picture's."""
    for each in ("add_q_proj", "add_k_proj", "add_v_proj", *(["to_add_out"] if out else [])):
        yield from layer(f"{name}.{each}", width, width, bias=bias)
    for each in "qk" if head else "":
        yield from layer(f"{name}.norm_added_{each}", head or 0, bias=False)


def perceptron(name: str, width: int) -> Found:
    """Two linear layers, four times as wide between them."""
    yield from layer(f"{name}.net.0.proj", 4 * width, width)
    yield from layer(f"{name}.net.2", width, 4 * width)


def vae_weights(config: Mapping[str, Any]) -> dict[str, Shape] | None:
    """Of an AutoencoderKL; None for one that has options which are not known here."""
    widths = list(config.get("block_out_channels") or (64,))
    back = list(config.get("decoder_block_out_channels") or widths)
    down, up = (config.get(f"{side}_block_types") or () for side in ("down", "up"))
    plain = {*down, *up} <= _VAE_BLOCKS and len(down) == len(widths) and len(up) == len(back)
    return dict(_vae(config, widths, back)) if plain else None


def _vae(config: Mapping[str, Any], widths: Sequence[int], back: Sequence[int]) -> Found:
    latent, layers = config.get("latent_channels", 4), config.get("layers_per_block", 1)
    for side, levels, count, ends in (
        ("encoder", widths, layers, (config.get("in_channels", 3), 2 * latent)),
        ("decoder", back[::-1], layers + 1, (latent, config.get("out_channels", 3))),
    ):
        block, scale = ("down_blocks", "downsamplers") if side == "encoder" else ("up_blocks", "upsamplers")
        middle = levels[-1] if side == "encoder" else levels[0]
        before = levels[0]
        yield from layer(f"{side}.conv_in", before, ends[0], 3, 3)
        for level, width in enumerate(levels):
            for number in range(count):
                place = f"{side}.{block}.{level}.resnets.{number}"
                yield from resnet(place, before if not number else width, width, None)
            if level < len(levels) - 1:
                yield from layer(f"{side}.{block}.{level}.{scale}.0.conv", width, width, 3, 3)
            before = width
        if config.get("mid_block_add_attention", True):
            place = f"{side}.mid_block.attentions.0"
            yield from layer(f"{place}.group_norm", middle)
            yield from attention(place, middle, None)
        for number in range(2):
            yield from resnet(f"{side}.mid_block.resnets.{number}", middle, middle, None)
        yield from layer(f"{side}.conv_norm_out", before)
        yield from layer(f"{side}.conv_out", ends[1], before, 3, 3)
    if config.get("use_quant_conv", True):
        yield from layer("quant_conv", 2 * latent, 2 * latent, 1, 1)
    if config.get("use_post_quant_conv", True):
        yield from layer("post_quant_conv", latent, latent, 1, 1)
