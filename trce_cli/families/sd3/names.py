"""Names of a weight in diffusers folders, in single files as published, and in LoRAs (pure)."""

import re
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Final

from trce_cli.families.base import Shape, Stored
from trce_cli.families.clip import names as clip
from trce_cli.families.layout import PREFIX, Blocks, Layout, lora_name
from trce_cli.families.t5 import names as t5
from trce_cli.families.vae_names import vae_from_older, vae_in_file, vae_to_file

DOOR: Final = "context_embedder.weight"
POOLED_DOOR: Final = "time_text_embed.text_embedder.linear_1.weight"
FILE_DOORS: Final = (DOOR, "y_embedder.mlp.0.weight")
QKV: Final = "joint_blocks.0.x_block.attn.qkv.weight"
PROJECTION: Final = "text_projection.weight"
POSITIONS: Final = "pos_embed.pos_embed"

_LAYOUT: Final = Layout(
    {
        "pos_embed.proj": "x_embedder.proj",
        "norm_out.linear": "final_layer.adaLN_modulation.1",
        "proj_out": "final_layer.linear",
        **{
            f"time_text_embed.{ours}.linear_{number}": f"{theirs}.mlp.{layer}"
            for ours, theirs in (("timestep_embedder", "t_embedder"), ("text_embedder", "y_embedder"))
            for number, layer in ((1, 0), (2, 2))
        },
    },
    {
        "transformer_blocks": Blocks(
            "joint_blocks",
            {
                "norm1.linear": "x_block.adaLN_modulation.1",
                "norm1_context.linear": "context_block.adaLN_modulation.1",
                "attn.to_out.0": "x_block.attn.proj",
                "attn2.to_out.0": "x_block.attn2.proj",
                "attn.to_add_out": "context_block.attn.proj",
                **{f"attn.norm_{each}": f"x_block.attn.ln_{each}" for each in "qk"},
                **{f"attn2.norm_{each}": f"x_block.attn2.ln_{each}" for each in "qk"},
                **{f"attn.norm_added_{each}": f"context_block.attn.ln_{each}" for each in "qk"},
                "ff.net.0.proj": "x_block.mlp.fc1",
                "ff.net.2": "x_block.mlp.fc2",
                "ff_context.net.0.proj": "context_block.mlp.fc1",
                "ff_context.net.2": "context_block.mlp.fc2",
            },
            {
                **{f"attn.to_{each}": ("x_block.attn.qkv", (at, 3), 1) for at, each in enumerate("qkv")},
                **{f"attn2.to_{each}": ("x_block.attn2.qkv", (at, 3), 1) for at, each in enumerate("qkv")},
                **{
                    f"attn.add_{each}_proj": ("context_block.attn.qkv", (at, 3), 1)
                    for at, each in enumerate("qkv")
                },
            },
        ),
    },
)
# What tools put beside the weights of text encoders: a number that is not used, positions, a copy.
_LEFTOVER: Final = re.compile(r"text_encoders\.\w+\.(.+\.)?encoder\.embed_tokens\.weight")
_TUNED: Final = re.compile(r"transformer_blocks\.\d+\.attn2?\.to_(q|k|v|out\.0)\.weight")


class Names:
    """The names of a checkpoint's weights; see `families.base.Names`.

    Single files hold the transformer, mostly the autoencoder, and some the text encoders. layers: blocks of
    the transformer. text: by text encoder what its names begin with there, and the names of its weights.
    """

    def __init__(self, layers: int, text: Mapping[str, tuple[str, Collection[str]]]) -> None:
        self.text = text
        # Where diffusers splits a layer's output into scale and shift, and the file into shift and scale.
        self._swapped = ("norm_out.linear.", f"transformer_blocks.{layers - 1}.norm1_context.linear.")

    def published(self, part: str, key: str) -> str | None:
        """The name of a weight that a folder's file names `key`; None for what is not used."""
        if part == "vae":
            return vae_from_older(key)
        if part not in self.text:
            return key
        return t5.published(key) if t5.EMBEDDING in self.text[part][1] else clip.published(key)

    def from_file(self, shapes: Mapping[str, Shape]) -> dict[str, dict[str, Stored]]:
        """Where a single file keeps each weight: several are stacked in it. The projection of CLIP's ViT-L,
        which changes nothing, is not in all of them."""
        prefix = PREFIX if any(name.startswith(PREFIX) for name in shapes) else ""
        found: dict[str, dict[str, Stored]] = {"denoiser": {}}
        for name in shapes:
            if name.startswith(prefix or _OWN):
                for key in _keys_in(name.removeprefix(prefix)):
                    at = self.stored(key)
                    found["denoiser"][key] = replace(at, name=prefix + at.name)
        if vae := vae_in_file(shapes):
            found["vae"] = vae
        for part, (start, names) in self.text.items():
            if any(name.startswith(start) for name in shapes):
                found[part] = {
                    name: Stored(start + name)
                    for name in names
                    if name != PROJECTION or start + name in shapes
                }
        return found

    def copies(self, names: Collection[str]) -> dict[str, dict[str, str]]:
        """None: such files hold one copy."""
        return {}

    def to_file(self, shapes: Mapping[str, Mapping[str, Shape]]) -> dict[str, dict[str, Stored]]:
        """Where a single file is to keep each weight of a folder's transformer and autoencoder."""
        places = self.in_file(shapes["denoiser"])
        denoiser = {key: replace(at, name=PREFIX + at.name) for key, at in places.items()}
        return {"denoiser": denoiser, "vae": vae_to_file(shapes["vae"])}

    def is_leftover(self, name: str) -> bool:
        """Whether a tensor of a single file is no weight of anything."""
        return clip.is_unused(name) or _LEFTOVER.fullmatch(name) is not None

    def in_file(self, keys: Collection[str]) -> dict[str, Stored]:
        """See `families.base.Names`."""
        return {key: self.stored(key) for key in keys}

    def lora(self, key: str) -> str | None:
        """See `lora_name`."""
        return lora_name(key)

    def stored(self, key: str) -> Stored:
        """Where a single file keeps a weight of the transformer, by its diffusers name."""
        return Stored("pos_embed") if key == POSITIONS else _LAYOUT.stored(key, key.startswith(self._swapped))


_OWN: Final = (  # what the transformer's names begin with where no prefix stands before them
    *("joint_blocks.", "context_embedder.", "final_layer.", "pos_embed"),
    *("t_embedder.", "x_embedder.", "y_embedder."),
)


def _keys_in(name: str) -> list[str]:
    return [POSITIONS] if name == "pos_embed" else _LAYOUT.keys_in(name)


def is_tuned(key: str) -> bool:
    """Whether stage 2 tunes this weight: the attention of the image's stream, to the prompt and to itself."""
    return _TUNED.fullmatch(key) is not None
