"""Every weight that an SD U-Net of a configuration has, and its shape, as diffusers names it (pure)."""

from collections.abc import Mapping, Sequence
from typing import Any, Final

from trce_cli.families.base import Shape
from trce_cli.families.shapes import Found, layer, resnet

# Options of a U-Net that change which weights there are, and the values that are known here.
_KNOWN: Final[Mapping[str, Sequence[Any]]] = {
    "addition_embed_type": (None, "text_time"),
    "mid_block_type": ("UNetMidBlock2DCrossAttn", "UNetMidBlock2D", None),
    "resnet_time_scale_shift": ("default",),
    "time_embedding_type": ("positional",),
    **dict.fromkeys(("only_cross_attention", "dual_cross_attention", "class_embeddings_concat"), (False,)),
    **dict.fromkeys(
        ("encoder_hid_dim", "encoder_hid_dim_type", "class_embed_type", "num_class_embeds"), (None,)
    ),
    **dict.fromkeys(("time_embedding_dim", "cross_attention_norm", "timestep_post_act"), (None,)),
    "conv_in_kernel": (3,),
    "conv_out_kernel": (3,),
    "attention_type": ("default",),
}
_MOST: Final = 64  # levels, layers and blocks in a row
_BLOCKS: Final = {"DownBlock2D", "CrossAttnDownBlock2D", "UpBlock2D", "CrossAttnUpBlock2D"}


def unet_weights(config: Mapping[str, Any]) -> dict[str, Shape] | None:
    """Of a U-Net; None for one that has options which are not known here."""
    depth = len(widths := list(config.get("block_out_channels") or (320, 640, 1280, 1280)))
    down, up = (
        list(config.get(f"{side}_block_types") or default)
        for side, default in (
            ("down", ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"]),
            ("up", ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3),
        )
    )
    if any(config.get(key, known[0]) not in known for key, known in _KNOWN.items()):
        return None
    if len(down) != depth or len(up) != depth or not {*down, *up} <= _BLOCKS:
        return None
    layers = _each(config.get("layers_per_block", 2), depth)
    inner = _each(config.get("transformer_layers_per_block", 1), depth)
    back = config.get("reverse_transformer_layers_per_block") or inner[::-1]
    context = _each(config.get("cross_attention_dim", 1280), depth)
    if not all(len(each) == depth for each in (layers, inner, back, context)):
        return None
    return dict(_unet(config, widths, down, up, layers, inner, list(back), context))


def built_by(
    config: Mapping[str, Any], shapes: Mapping[str, Shape], diffusers: Mapping[str, str]
) -> dict[str, Any]:
    """What of a U-Net's configuration its weights say otherwise: levels, layers, depths, and an embedded
    guidance.

    shapes: of a single file's tensors. diffusers: the names of its U-Net's weights -> those in the file. A
    configuration of another build than the file's is made to fit as far as such things go.
    """
    names = set(diffusers)
    if not names:
        return {}
    numbers: dict[str, set[str]] = {}
    for name in names:
        parts = name.split(".")
        for at, part in enumerate(parts):
            if part.isdecimal():
                numbers.setdefault(".".join(parts[:at]) + ".", set()).add(part)

    def count(start: str) -> int:
        """How many of these there are; beyond any real number one more, which the bounds refuse."""
        found = numbers.get(start, set())
        return next(number for number in range(_MOST + 2) if str(number) not in found or number > _MOST)

    def depths(side: str) -> list[list[int]]:
        return [
            [
                count(f"{side}.{level}.attentions.{number}.transformer_blocks.")
                for number in range(count(f"{side}.{level}.resnets."))
            ]
            for level in range(depth)
        ]

    said: dict[str, Any] = {}
    depth = count("down_blocks.")
    if depth != len(config.get("block_out_channels") or (320, 640, 1280, 1280)):
        said |= _levels(depth, shapes, diffusers)
    entry = shapes.get(diffusers.get("conv_in.weight", ""), ())
    if len(entry) == 4 and entry[1] != config.get("in_channels", 4):
        said["in_channels"] = entry[1]
    layers = [count(f"down_blocks.{level}.resnets.") for level in range(depth)]
    if layers != _each(config.get("layers_per_block", 2), depth):
        said["layers_per_block"] = layers[0] if len(set(layers)) == 1 else layers
    middle = {0: None, 1: "UNetMidBlock2D"}.get(count("mid_block.resnets."), "UNetMidBlock2DCrossAttn")
    if middle != config.get("mid_block_type", "UNetMidBlock2DCrossAttn"):
        said["mid_block_type"] = middle
    wanted = unet_weights({**config, **said})
    if wanted is not None and {name for name in wanted if "attn2" in name} != {
        n for n in names if "attn2" in n
    }:
        down = depths("down_blocks")
        if not any(down[-1]):  # the middle is as deep as the last block is, which may attend to nothing
            down[-1] = [count("mid_block.attentions.0.transformer_blocks.")] * len(down[-1])
        said["transformer_layers_per_block"] = down
        said["reverse_transformer_layers_per_block"] = depths("up_blocks")
    guided = diffusers.get("time_embedding.cond_proj.weight")
    if guided and len(shapes[guided]) == 2 and shapes[guided][1] != config.get("time_cond_proj_dim"):
        said["time_cond_proj_dim"] = shapes[guided][1]
    return said


def _levels(depth: int, shapes: Mapping[str, Shape], diffusers: Mapping[str, str]) -> dict[str, Any]:
    """What a configuration says of a U-Net's levels, where they are others than it says."""
    entries = [diffusers.get(f"down_blocks.{level}.resnets.0.conv1.weight", "") for level in range(depth)]
    widths = [shape[0] for shape in map(shapes.get, entries) if shape]
    if not widths or len(widths) < depth:
        return {}
    said: dict[str, Any] = {"block_out_channels": widths}
    for side in ("Down", "Up"):
        attends = [f"{side.lower()}_blocks.{n}.attentions.0.norm.weight" in diffusers for n in range(depth)]
        said[f"{side.lower()}_block_types"] = [f"{'CrossAttn' * it}{side}Block2D" for it in attends]
    return said


def _unet(
    config: Mapping[str, Any],
    widths: Sequence[int],
    down: Sequence[str],
    up: Sequence[str],
    layers: Sequence[int],
    inner: Sequence[Any],
    back: Sequence[Any],
    context: Sequence[int],
) -> Found:
    time, linear = widths[0] * 4, bool(config.get("use_linear_projection"))
    yield from layer("conv_in", widths[0], config.get("in_channels", 4), 3, 3)
    yield from layer("time_embedding.linear_1", time, widths[0])
    yield from layer("time_embedding.linear_2", time, time)
    if guided := config.get("time_cond_proj_dim"):
        yield "time_embedding.cond_proj.weight", (widths[0], guided)
    if config.get("addition_embed_type") == "text_time":
        yield from layer("add_embedding.linear_1", time, config["projection_class_embeddings_input_dim"])
        yield from layer("add_embedding.linear_2", time, time)
    before = widths[0]
    for level, width in enumerate(widths):
        place, attends = f"down_blocks.{level}", "CrossAttn" in down[level]
        deep = _each(inner[level], layers[level])
        for number in range(layers[level]):
            yield from resnet(f"{place}.resnets.{number}", before if not number else width, width, time)
            if attends:
                where = f"{place}.attentions.{number}"
                yield from _attention(where, width, context[level], deep[number], linear)
        if level < len(widths) - 1:
            yield from layer(f"{place}.downsamplers.0.conv", width, width, 3, 3)
        before = width
    middle = config.get("mid_block_type", "UNetMidBlock2DCrossAttn")
    for number in range({None: 0, "UNetMidBlock2D": 1}.get(middle, 2)):
        yield from resnet(f"mid_block.resnets.{number}", before, before, time)
    if middle == "UNetMidBlock2DCrossAttn":
        yield from _attention("mid_block.attentions.0", before, context[-1], _each(inner[-1], 1)[0], linear)
    for level, width in enumerate(reversed(widths)):
        place, attends = f"up_blocks.{level}", "CrossAttn" in up[level]
        count = layers[-1 - level] + 1
        deep = _each(back[level], count)
        skip = widths[max(len(widths) - 2 - level, 0)]
        for number in range(count):
            seen = (before if not number else width) + (skip if number == count - 1 else width)
            yield from resnet(f"{place}.resnets.{number}", seen, width, time)
            if attends:
                where = f"{place}.attentions.{number}"
                yield from _attention(where, width, context[-1 - level], deep[number], linear)
        if level < len(widths) - 1:
            yield from layer(f"{place}.upsamplers.0.conv", width, width, 3, 3)
        before = width
    yield from layer("conv_norm_out", widths[0])
    yield from layer("conv_out", config.get("out_channels", 4), widths[0], 3, 3)


def _each(value: Any, count: int) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value] * count


def _attention(name: str, width: int, context: int, deep: int, linear: bool) -> Found:
    square = (width, width) if linear else (width, width, 1, 1)
    yield from layer(f"{name}.norm", width)
    yield from layer(f"{name}.proj_in", *square)
    for number in range(deep):
        block = f"{name}.transformer_blocks.{number}"
        for norm in ("norm1", "norm2", "norm3"):
            yield from layer(f"{block}.{norm}", width)
        for attention, seen in (("attn1", width), ("attn2", context)):
            yield f"{block}.{attention}.to_q.weight", (width, width)
            yield f"{block}.{attention}.to_k.weight", (width, seen)
            yield f"{block}.{attention}.to_v.weight", (width, seen)
            yield from layer(f"{block}.{attention}.to_out.0", width, width)
        yield from layer(f"{block}.ff.net.0.proj", 8 * width, width)
        yield from layer(f"{block}.ff.net.2", width, 4 * width)
    yield from layer(f"{name}.proj_out", *square)
