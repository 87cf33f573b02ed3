"""Names of a weight in the three layouts: diffusers folders, CompVis/LDM single files, kohya LoRA (pure)."""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Final

from trce_cli.families.base import Shape, Stored
from trce_cli.families.clip import names as clip
from trce_cli.families.sd.marks import MARKS
from trce_cli.families.vae_names import renamed, vae_from_older, vae_in_file, vae_to_file

UNET: Final = "model.diffusion_model."  # the U-Net's prefix in a single file
EMA: Final = "model_ema."  # that of its EMA copy
FLAT: Final = "unet."  # the U-Net's where a file holds a folder's parts by the folder's names
FLAT_VAE: Final = "vae."


@dataclass(frozen=True)
class Names:
    """The names of an SD checkpoint's weights; see `families.base.Names`.

    layers: the U-Net's `layers_per_block`. text: by text encoder (its folder) the prefix in a single file,
    whether its weights are in OpenCLIP's form there, and the names of its weights. ldm_lora: whether a LoRA
    is written with LDM's paths, as is usual for SDXL, and not with those of diffusers.
    """

    layers: int
    text: Mapping[str, tuple[str, bool, tuple[str, ...]]]
    ldm_lora: bool

    def published(self, part: str, key: str) -> str | None:
        """The name of a weight that a folder's file names `key`; None for what is no weight."""
        if part == "vae":
            return vae_from_older(key)
        return clip.published(key) if part in self.text else key

    def from_file(self, shapes: Mapping[str, Shape]) -> dict[str, dict[str, Stored]]:
        """Where a single file with tensors of these shapes keeps each weight."""
        found = {"denoiser": {ours: Stored(name) for ours, name in unet_in_file(shapes).items()}}
        if flat := {key.removeprefix(FLAT_VAE): Stored(key) for key in shapes if key.startswith(FLAT_VAE)}:
            found["vae"] = {vae_from_older(key): at for key, at in flat.items()}
        if ldm := vae_in_file({key: shape for key, shape in shapes.items() if not self.is_leftover(key)}):
            found["vae"] = found.get("vae", {}) | ldm
        return found | self._text_of_file(shapes)

    def copies(self, names: Collection[str]) -> dict[str, dict[str, str]]:
        """The further copies of the U-Net in a single file: label -> name -> the name in that copy."""
        if not any(name.startswith(EMA) and name.endswith("weight") for name in names):
            return {}
        if not any(name.startswith(UNET) for name in names):
            return {}  # the EMA copy is the only one
        ema = {name: ema_from_ldm(name) for name in names if name.startswith(UNET)}
        return {"EMA": {name: copy for name, copy in ema.items() if copy in names}}

    def to_file(self, shapes: Mapping[str, Mapping[str, Shape]]) -> dict[str, dict[str, Stored]]:
        """Where a single file is to keep each of a folder's weights, the inverse of `from_file`."""
        places = self.in_file(shapes["denoiser"])
        return {
            "denoiser": {key: replace(at, name=UNET + at.name) for key, at in places.items()},
            "vae": vae_to_file(shapes["vae"]),
        } | self._text_in_file()

    def _text_in_file(self) -> dict[str, dict[str, Stored]]:
        found = {}
        for part, (prefix, openclip, names) in self.text.items():
            places = {name: clip.openclip_from_clip(name) if openclip else Stored(name) for name in names}
            found[part] = {name: replace(at, name=prefix + at.name) for name, at in places.items()}
        return found

    def _text_of_file(self, shapes: Mapping[str, Shape]) -> dict[str, dict[str, Stored]]:
        """Where a file keeps text encoders, those of which it has any: as published files do, without
        `text_model.`, or by the names of folders.
        """
        published, found = self._text_in_file(), {}
        for part, (prefix, openclip, names) in self.text.items():
            forms = [] if openclip else [prefix]
            tried = [published[part]]
            for start in (*forms, f"{part}."):
                tried.append({name: Stored(start + name) for name in names})
                tried.append({name: Stored(start + name.removeprefix(clip.TEXT)) for name in names})
            held = [sum(at.name in shapes for at in places.values()) for places in tried]
            if max(held) or any(key.startswith(prefix) for key in shapes):
                found[part] = tried[held.index(max(held))]
        return found

    def is_leftover(self, name: str) -> bool:
        """Whether a tensor of a single file is no weight of anything: statistics and buffers of training,
        what a text encoder has and does not use, and what says how the file is sampled."""
        return name in MARKS or clip.is_unused(name) or _LEFTOVER.match(name) is not None

    def in_file(self, keys: Collection[str]) -> dict[str, Stored]:
        """See `families.base.Names`."""
        attention = {
            ".".join(key.split(".")[:2]) for key in keys if key.startswith("up_") and ".attentions." in key
        }
        return {key: Stored(ldm_from_unet(key, self.layers, attention)) for key in keys}

    def lora(self, key: str) -> str | None:
        """The name of a linear layer in a LoRA, kohya's: from diffusers' path, or from LDM's as for SDXL."""
        module, _, leaf = key.rpartition(".")
        if leaf != "weight" or "norm" in module or "samplers" in module:
            return None
        return kohya_name(self.in_file([key])[key].name if self.ldm_lora else key)


_LEFTOVER = re.compile(
    r"(model_ema\.(decay|num_updates)$|alphas_cumprod|betas$|sqrt_|log_one_minus|posterior_|logvar|lvlb_weights"
    r"|global_step$|epoch$|scale_factor$|denoiser\.sigmas$|loss\.|first_stage_model\.loss\."
    r"|first_stage_model\.model_ema\."
    r"|(cond_stage_model|conditioner\.embedders\.\d)\..*text_projection(\.(weight|bias))?$"
    r"|(cond_stage_model|conditioner\.embedders\.\d)\.model\.transformer\.resblocks\."
    r"|conditioner\.embedders\.\d\.(outputdim|.*sigmas)$)"
)
_TOP = {  # diffusers -> LDM
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "time_embedding.cond_proj": "time_embed.cond_proj",  # an LCM's; no other tool has a name for it
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
    return f"{place}.{renamed(rest, _RESNET) if kind == 'resnets' else rest}"


def ldm_layers_per_block(keys: list[str]) -> int:
    """`layers_per_block` of a single file's U-Net from its keys (without `UNET`)."""
    downsamplers = [int(key.split(".")[1]) for key in keys if key.endswith(".0.op.weight")]
    if downsamplers:
        return min(downsamplers) - 1
    return max((int(key.split(".")[1]) for key in keys if key.startswith("input_blocks.")), default=0)


def ema_from_ldm(key: str) -> str:
    """The name of the EMA copy of a single file's U-Net key: LDM drops all dots of it."""
    return EMA + key.removeprefix("model.").replace(".", "")


_DOTLESS: Final = [  # what LDM's names are made of, where the EMA copy has dropped the dots
    re.compile(start + rest + r"(weight|bias)")
    for start in (r"(input_blocks|output_blocks)(\d+)(\d)", r"(middle_block)(\d)")
    for rest in (
        *(r"(transformer_blocks)(\d+)(attn\d)(to_[qkv])", r"(transformer_blocks)(\d+)(attn\d)(to_out)(\d)"),
        *(r"(transformer_blocks)(\d+)(ff)(net)(\d)(proj)", r"(transformer_blocks)(\d+)(ff)(net)(\d)"),
        *(r"(transformer_blocks)(\d+)(norm\d)", r"(norm|proj_in|proj_out|skip_connection|op|conv)"),
        *(r"(in_layers|emb_layers|out_layers)(\d)", ""),
    )
] + [re.compile(r"(time_embed|out)(\d)(weight|bias)"), re.compile(r"(label_emb)(\d)(\d)(weight|bias)")]


def ldm_from_ema(name: str) -> str | None:
    """The U-Net key of a single file (without `UNET`) from the name of its EMA copy, whose dots are gone."""
    dotless = name.removeprefix(EMA).removeprefix("diffusion_model")
    if dotless == "time_embedcond_projweight":
        return "time_embed.cond_proj.weight"
    return next((".".join(found.groups()) for form in _DOTLESS if (found := form.fullmatch(dotless))), None)


def unet_in_file(shapes: Mapping[str, Shape]) -> dict[str, str]:
    """The U-Net of a single file, diffusers name -> the name in the file; empty where it has none.

    As published files have it; else by LDM's names alone, by diffusers' names, alone or behind `FLAT`, or
    the EMA copy where that is all there is.
    """
    for start in (UNET, ""):
        if f"{start}input_blocks.0.0.weight" in shapes:
            keys = [key.removeprefix(start) for key in shapes if key.startswith(start)]
            layers = ldm_layers_per_block(keys)
            return {ours: start + key for key in keys if (ours := unet_from_ldm(key, layers))}
    for start in (FLAT, ""):
        if f"{start}conv_in.weight" in shapes and any(key.startswith(f"{start}down_b") for key in shapes):
            return {key.removeprefix(start): key for key in shapes if key.startswith(start)}
    ema = {ldm: key for key in shapes if key.startswith(EMA) and (ldm := ldm_from_ema(key))}
    layers = ldm_layers_per_block(list(ema))
    return {ours: key for ldm, key in ema.items() if (ours := unet_from_ldm(ldm, layers))}


def kohya_name(name: str) -> str:
    """The name of a layer in a LoRA of kohya's: `lora_unet_` and the path of its weight with underscores."""
    return "lora_unet_" + name.removesuffix(".weight").replace(".", "_")


# The visual side of the attention: all of self-attention, and the queries of cross-attention.
_TUNED = re.compile(r"(.+\.)?(attn1\..+|attn2\.to_q\..+)")


def is_tuned(key: str) -> bool:
    """Whether stage 2 tunes this weight; cross-attention's keys and values stay as stage 1 left them."""
    return _TUNED.fullmatch(key) is not None
