"""Names of a weight in the three layouts: diffusers folders, CompVis/LDM single files, kohya LoRA (pure)."""

import re
from collections.abc import Collection, Mapping

UNET = "model.diffusion_model."  # the U-Net's prefix in a single file
EMA = "model_ema."  # and that of its EMA copy

_TOP = {  # diffusers -> LDM
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_TOP_BACK = {ldm: ours for ours, ldm in _TOP.items()}
_RESNET_BACK = {ldm: ours for ours, ldm in _RESNET.items()}


def unet_from_ldm(key: str, layers: int) -> str | None:
    """The diffusers name of a U-Net key of a single file (without `UNET`), or None if it has none.

    `layers` is `layers_per_block`. Input block n holds layer (n - 1) mod (layers + 1) of down block
    (n - 1) div (layers + 1), output block n the like without the 1; sub-block 0 is a resnet, 1 an attention.
    """
    module, _, leaf = key.rpartition(".")
    if module in _TOP_BACK:
        return f"{_TOP_BACK[module]}.{leaf}"
    parts = key.split(".")
    if len(parts) < 4 or not parts[1].isdigit():
        return None
    side, block = parts[0], int(parts[1])
    if side == "middle_block":
        kind, index = ("attentions", 0) if block == 1 else ("resnets", block // 2)
        return _join("mid_block", kind, index, ".".join(parts[2:]))
    if not parts[2].isdigit():
        return None
    rest = ".".join(parts[3:])
    if side == "input_blocks" and block > 0:
        outer, inner = divmod(block - 1, layers + 1)
        if parts[3] == "op":
            return f"down_blocks.{outer}.downsamplers.0.conv.{parts[4]}"
        return _join(f"down_blocks.{outer}", _KINDS.get(parts[2]), inner, rest)
    if side == "output_blocks":
        outer, inner = divmod(block, layers + 1)
        if parts[3] == "conv":
            return f"up_blocks.{outer}.upsamplers.0.conv.{parts[4]}"
        return _join(f"up_blocks.{outer}", _KINDS.get(parts[2]), inner, rest)
    return None


_KINDS = {"0": "resnets", "1": "attentions"}


def _join(block: str, kind: str | None, index: int, rest: str) -> str | None:
    if kind == "resnets":
        module, _, leaf = rest.rpartition(".")
        if module not in _RESNET_BACK:
            return None
        rest = f"{_RESNET_BACK[module]}.{leaf}"
    return f"{block}.{kind}.{index}.{rest}" if kind else None


def ldm_from_unet(key: str, layers: int, attention: Collection[str]) -> str:
    """The name in a single file (without `UNET`) of a diffusers U-Net key, the inverse of `unet_from_ldm`.

    attention: the up blocks that attend, such as `up_blocks.1`; an upsampler comes after the attention.
    """
    module, _, leaf = key.rpartition(".")
    if module in _TOP:
        return f"{_TOP[module]}.{leaf}"
    parts = key.split(".")
    if parts[0] == "mid_block":
        kind, index, rest = parts[1], int(parts[2]), ".".join(parts[3:])
        place = "middle_block.1" if kind == "attentions" else f"middle_block.{2 * index}"
    else:
        kind, index, rest = parts[2], int(parts[3]), ".".join(parts[4:])
        side = "input_blocks" if parts[0] == "down_blocks" else "output_blocks"
        first = int(parts[1]) * (layers + 1) + (side == "input_blocks")
        if kind == "downsamplers":
            return f"{side}.{first + layers}.0.op.{leaf}"
        if kind == "upsamplers":
            return f"{side}.{first + layers}.{1 + (f'up_blocks.{parts[1]}' in attention)}.conv.{leaf}"
        place = f"{side}.{first + index}.{1 if kind == 'attentions' else 0}"
    return f"{place}.{_swap(rest, _RESNET) if kind == 'resnets' else rest}"


_VAE_TOP = {  # LDM -> diffusers
    "norm_out": "conv_norm_out",
    "mid.block_1": "mid_block.resnets.0",
    "mid.block_2": "mid_block.resnets.1",
    "mid.attn_1": "mid_block.attentions.0",
}
_VAE_LEAF = {
    "nin_shortcut": "conv_shortcut",
    "norm": "group_norm",
    "q": "to_q",
    "k": "to_k",
    "v": "to_v",
    "proj_out": "to_out.0",
}
_VAE_OLD = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}  # in older folders


def vae_from_ldm(key: str, depth: int) -> str:
    """The diffusers name of a VAE key of a single file (without `first_stage_model.`).

    depth: how many levels of resolution it has; LDM counts the decoder's from the other end.
    """
    if level := re.fullmatch(
        r"(encoder\.down|decoder\.up)\.(\d+)\.(block\.\d+|downsample|upsample)\.(.+)", key
    ):
        side, number, what, rest = level.groups()
        index = int(number) if side == "encoder.down" else depth - 1 - int(number)
        what = f"resnets.{what.removeprefix('block.')}" if what.startswith("block.") else f"{what}rs.0"
        return f"{side}_blocks.{index}.{what}.{_swap(rest, _VAE_LEAF)}"
    for ldm, ours in _VAE_TOP.items():
        for side in ("encoder", "decoder"):
            if key.startswith(f"{side}.{ldm}."):
                return f"{side}.{ours}.{_swap(key.removeprefix(f'{side}.{ldm}.'), _VAE_LEAF)}"
    return key


def ldm_from_vae(key: str, depth: int) -> str:
    """The name in a single file of a diffusers VAE key, the inverse of `vae_from_ldm`."""
    back = {ours: ldm for ldm, ours in _VAE_LEAF.items()}
    if level := re.fullmatch(
        r"(encoder\.down|decoder\.up)_blocks\.(\d+)\.(resnets\.\d+|(?:down|up)samplers\.0)\.(.+)", key
    ):
        side, number, what, rest = level.groups()
        index = int(number) if side == "encoder.down" else depth - 1 - int(number)
        what = what.replace("resnets.", "block.").replace("rs.0", "")
        return f"{side}.{index}.{what}.{_swap(rest, back)}"
    for ldm, ours in _VAE_TOP.items():
        for side in ("encoder", "decoder"):
            if key.startswith(f"{side}.{ours}."):
                rest = _swap(key.removeprefix(f"{side}.{ours}."), _VAE_OLD)
                return f"{side}.{ldm}.{_swap(rest, back)}"
    return key


def _swap(name: str, table: Mapping[str, str]) -> str:
    """The name `module.leaf` with its module replaced where the table has it."""
    module, dot, leaf = name.rpartition(".")
    return f"{table.get(module, module)}{dot}{leaf}"


def ldm_layers_per_block(keys: list[str]) -> int:
    """`layers_per_block` of a single file's U-Net from its keys (without `UNET`)."""
    downsamplers = [int(key.split(".")[1]) for key in keys if key.endswith(".0.op.weight")]
    if downsamplers:
        return min(downsamplers) - 1
    return max((int(key.split(".")[1]) for key in keys if key.startswith("input_blocks.")), default=0)


def ema_from_ldm(key: str) -> str:
    """The name of the EMA copy of a single file's U-Net key: LDM drops all dots of it."""
    return EMA + key.removeprefix("model.").replace(".", "")


def openclip_from_clip(key: str) -> tuple[str, int | None, bool]:
    """Where OpenCLIP keeps a weight of transformers' CLIP text model: (name, third or None, transposed).

    Queries, keys and values are stacked in one `in_proj` tensor, of which `third` 0, 1 or 2 is meant; the
    text projection is stored transposed.
    """
    key = key.removeprefix("text_model.")
    if key in _OPENCLIP:
        return _OPENCLIP[key], None, key == "text_projection.weight"
    _, _, layer, rest = key.split(".", 3)
    block = f"transformer.resblocks.{layer}."
    module, _, leaf = rest.rpartition(".")
    if module in _OPENCLIP_BLOCK:
        return f"{block}{_OPENCLIP_BLOCK[module]}.{leaf}", None, False
    return f"{block}attn.in_proj_{leaf}", ("q_proj", "k_proj", "v_proj").index(module.split(".")[1]), False


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


def kohya_from_diffusers(key: str) -> str:
    """The kohya LoRA module name of a U-Net weight: `lora_unet_` and the path with underscores."""
    return "lora_unet_" + key.removesuffix(".weight").replace(".", "_")


def kohya_names(key: str, layers: int) -> list[str]:
    """The two kohya names of a linear layer of the U-Net: from diffusers' path, and from LDM's as for SDXL.

    None for weights that are neither in an attention block nor in the embeddings of time and size.
    """
    if key in {f"{module}.weight" for module in _TOP} or (".attentions." in key and key.endswith(".weight")):
        return [kohya_from_diffusers(name) for name in (key, ldm_from_unet(key, layers, ()))]
    return []


def clip_weights(layers: int, projection: bool) -> list[str]:
    """The names of all weights of transformers' CLIP text model as published files have them."""
    leaves = ("weight", "bias")
    modules = [*_OPENCLIP_BLOCK, "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]
    names = [f"embeddings.{kind}_embedding.weight" for kind in ("token", "position")]
    names += [
        f"encoder.layers.{i}.{module}.{leaf}" for i in range(layers) for module in modules for leaf in leaves
    ]
    names += [f"final_layer_norm.{leaf}" for leaf in leaves]
    return [f"text_model.{name}" for name in names] + ["text_projection.weight"] * projection
