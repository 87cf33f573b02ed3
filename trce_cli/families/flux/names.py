"""Names of a weight of FLUX.1 or Chroma in diffusers folders, single files of the transformer, and LoRAs."""

import re
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Final

from trce_cli.families.base import Shape, Stored
from trce_cli.families.clip import names as clip
from trce_cli.families.layout import Blocks, Layout
from trce_cli.families.t5 import names as t5

PREFIX: Final = "model.diffusion_model."  # what some tools put before the names in a single file
DOOR: Final = "context_embedder.weight"
POOLED_DOOR: Final = "time_text_embed.text_embedder.linear_1.weight"
FILE_DOORS: Final = ("txt_in.weight", "vector_in.in_layer.weight")
QKV: Final = "double_blocks.0.img_attn.qkv.weight"
APPROXIMATOR: Final = "distilled_guidance_layer"  # what Chroma has in place of most modulation

# Modules by their names in diffusers and in single files.
_OUTER: Final = {
    "x_embedder": "img_in",
    "context_embedder": "txt_in",
    "proj_out": "final_layer.linear",
    "norm_out.linear": "final_layer.adaLN_modulation.1",
    **{
        f"time_text_embed.{ours}.linear_{number}": f"{theirs}.{layer}"
        for ours, theirs in (
            ("timestep_embedder", "time_in"),
            ("text_embedder", "vector_in"),
            ("guidance_embedder", "guidance_in"),
        )
        for number, layer in ((1, "in_layer"), (2, "out_layer"))
    },
}
_DOUBLE: Final = {
    "norm1.linear": "img_mod.lin",
    "norm1_context.linear": "txt_mod.lin",
    "attn.norm_q": "img_attn.norm.query_norm",
    "attn.norm_k": "img_attn.norm.key_norm",
    "attn.norm_added_q": "txt_attn.norm.query_norm",
    "attn.norm_added_k": "txt_attn.norm.key_norm",
    "attn.to_out.0": "img_attn.proj",
    "attn.to_add_out": "txt_attn.proj",
    "ff.net.0.proj": "img_mlp.0",
    "ff.net.2": "img_mlp.2",
    "ff_context.net.0.proj": "txt_mlp.0",
    "ff_context.net.2": "txt_mlp.2",
}
_SINGLE: Final = {
    "norm.linear": "modulation.lin",
    "attn.norm_q": "norm.query_norm",
    "attn.norm_k": "norm.key_norm",
    "proj_out": "linear2",
}
_LAYER: Final = {"linear_1": "in_layer", "linear_2": "out_layer"}  # of Chroma's approximator
_LAYOUT: Final = Layout(
    _OUTER,
    {
        "transformer_blocks": Blocks(
            "double_blocks",
            _DOUBLE,
            {
                **{f"attn.to_{each}": ("img_attn.qkv", (at, 3), 1) for at, each in enumerate("qkv")},
                **{f"attn.add_{each}_proj": ("txt_attn.qkv", (at, 3), 1) for at, each in enumerate("qkv")},
            },
        ),
        # Beside queries, keys and values what enters the MLP, four times as wide.
        "single_transformer_blocks": Blocks(
            "single_blocks",
            _SINGLE,
            {
                **{f"attn.to_{each}": ("linear1", (at, 7), 1) for at, each in enumerate("qkv")},
                "proj_mlp": ("linear1", (3, 7), 4),
            },
        ),
    },
    norm_leaf="scale",
)
_TUNED = re.compile(r"transformer_blocks\.\d+\.attn\.to_(q|k|v|out\.0)\.weight")


class Names:
    """The names of a checkpoint's weights; see `families.base.Names`. Single files hold the transformer.

    clip, t5: the parts that these text encoders are.
    """

    def __init__(self, t5: str, clip: str | None = None) -> None:
        self.t5, self.clip = t5, clip

    def published(self, part: str, key: str) -> str | None:
        """The name of a weight that a folder's file names `key`; None for what is not used."""
        if part == self.clip:
            return clip.published(key)
        return t5.published(key) if part == self.t5 else key

    def from_file(self, shapes: Mapping[str, Shape]) -> dict[str, dict[str, Stored]]:
        """Where a single file keeps each weight: several are stacked in it."""
        prefix = PREFIX if any(name.startswith(PREFIX) for name in shapes) else ""
        found: dict[str, Stored] = {}
        for name in shapes:
            if name.startswith(prefix):  # else another part, as some tools put beside it
                found |= weights_in(name.removeprefix(prefix), prefix)
        return {"denoiser": found}

    def copies(self, names: Collection[str]) -> dict[str, dict[str, str]]:
        """None: such files hold one copy."""
        return {}

    def to_file(self, shapes: Mapping[str, Mapping[str, Shape]]) -> dict[str, dict[str, Stored]]:
        """Where a single file is to keep each weight of a folder's transformer."""
        return {"denoiser": {key: stored(key) for key in shapes["denoiser"]}}

    def is_leftover(self, name: str) -> bool:
        """None is known."""
        return False

    def kohya(self, key: str) -> tuple[str, ...]:
        """The names of a linear layer in a LoRA: diffusers' path, which is what its loader and ComfyUI take,
        and kohya's from a single file's, less those that are stacked there.

        Of kohya's names diffusers leaves those of both doors out, without a word.
        """
        module, _, leaf = key.rpartition(".")
        if leaf != "weight" or re.search(r"\.norm_(added_)?[qk]$", module):
            return ()
        place = stored(key)
        theirs = "lora_unet_" + place.name.removesuffix(".weight").replace(".", "_")
        return (f"transformer.{module}",) if place.piece[1] > 1 else (f"transformer.{module}", theirs)


def stored(key: str) -> Stored:
    """Where a single file keeps a weight, by its diffusers name."""
    if not key.startswith(f"{APPROXIMATOR}."):
        return _LAYOUT.stored(key, key.startswith("norm_out.linear."))
    stem, last, leaf = key.rsplit(".", 2)
    return Stored(f"{stem}.{_LAYER.get(last, last)}.{'scale' if '.norms.' in key else leaf}")


def weights_in(name: str, prefix: str) -> dict[str, Stored]:
    """The weights in a tensor of a single file, named without its prefix; the inverse of `stored`."""
    if not name.startswith(f"{APPROXIMATOR}."):
        keys = _LAYOUT.keys_in(name)
        return {key: replace(at, name=prefix + at.name) for key in keys for at in [stored(key)]}
    stem, last, leaf = name.rsplit(".", 2)
    last = next((ours for ours, theirs in _LAYER.items() if theirs == last), last)
    return {f"{stem}.{last}.{'weight' if leaf == 'scale' else leaf}": Stored(prefix + name)}


def is_tuned(key: str) -> bool:
    """Whether stage 2 tunes this weight: the attention of the image's stream where it has one of its own."""
    return _TUNED.fullmatch(key) is not None
