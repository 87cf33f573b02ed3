"""Names of the weights of diffusers' AutoencoderKL, in folders and in LDM's single files (pure)."""

import re
from collections.abc import Mapping
from typing import Final

from trce_cli.families.base import Shape, Stored

VAE: Final = "first_stage_model."  # the autoencoder's prefix in a single file

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


def vae_from_older(key: str) -> str:
    """The diffusers name of a VAE key of a folder, which may be as old as SD 1.4's."""
    module, _, leaf = key.rpartition(".")
    block, _, layer = module.rpartition(".")
    if ".attentions." not in key or layer not in _VAE_OLD:
        return key
    return f"{block}.{_VAE_OLD[layer]}.{leaf}"


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
        return f"{side}_blocks.{index}.{what}.{renamed(rest, _VAE_LEAF)}"
    for ldm, ours in _VAE_TOP.items():
        for side in ("encoder", "decoder"):
            if key.startswith(f"{side}.{ldm}."):
                return f"{side}.{ours}.{renamed(key.removeprefix(f'{side}.{ldm}.'), _VAE_LEAF)}"
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
        return f"{side}.{index}.{what}.{renamed(rest, back)}"
    for ldm, ours in _VAE_TOP.items():
        for side in ("encoder", "decoder"):
            if key.startswith(f"{side}.{ours}."):
                return f"{side}.{ldm}.{renamed(key.removeprefix(f'{side}.{ours}.'), back)}"
    return key


def vae_in_file(shapes: Mapping[str, Shape]) -> dict[str, Stored]:
    """Where a single file with tensors of these shapes keeps each weight; none where it has none."""
    keys = [key.removeprefix(VAE) for key in shapes if key.startswith(VAE)]
    depth = 1 + max((int(key.split(".")[2]) for key in keys if key.startswith("decoder.up.")), default=0)
    found = {}
    for key in keys:
        name = vae_from_ldm(key, depth)
        linear = ".attentions." in name and len(shapes[VAE + key]) == 4
        found[name] = Stored(VAE + key, convolution=linear)
    return found


def vae_to_file(shapes: Mapping[str, Shape]) -> dict[str, Stored]:
    """Where a single file is to keep each of a folder's weights, the inverse of `vae_in_file`."""
    depth = 1 + max(
        (int(key.split(".")[2]) for key in shapes if key.startswith("decoder.up_blocks.")), default=0
    )
    return {
        key: Stored(VAE + ldm_from_vae(key, depth), convolution=".attentions." in key and len(shape) == 2)
        for key, shape in shapes.items()
    }


def renamed(name: str, table: Mapping[str, str]) -> str:
    """The name `module.leaf` with its module replaced where the table has it."""
    module, dot, leaf = name.rpartition(".")
    return f"{table.get(module, module)}{dot}{leaf}"
