"""Names of weights of transformers with blocks of two streams and of one, as FLUX's are."""

import re
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import ClassVar, Final

from trce_cli.families.base import Shape, Stored
from trce_cli.families.layout import PREFIX, Layout, lora_name

QKV: Final = "double_blocks.0.img_attn.qkv.weight"

# Modules by their names in diffusers and in single files: outside of blocks, in those of two streams (and of
# these the ones that are stacked) and of one.
OUTER: Final = {
    "x_embedder": "img_in",
    "context_embedder": "txt_in",
    "proj_out": "final_layer.linear",
    "norm_out.linear": "final_layer.adaLN_modulation.1",
}
DOUBLE: Final = {
    "attn.norm_q": "img_attn.norm.query_norm",
    "attn.norm_k": "img_attn.norm.key_norm",
    "attn.norm_added_q": "txt_attn.norm.query_norm",
    "attn.norm_added_k": "txt_attn.norm.key_norm",
    "attn.to_out.0": "img_attn.proj",
    "attn.to_add_out": "txt_attn.proj",
}
DOUBLE_STACKED: Final = {
    **{f"attn.to_{each}": ("img_attn.qkv", (at, 3), 1) for at, each in enumerate("qkv")},
    **{f"attn.add_{each}_proj": ("txt_attn.qkv", (at, 3), 1) for at, each in enumerate("qkv")},
}
SINGLE: Final = {"attn.norm_q": "norm.query_norm", "attn.norm_k": "norm.key_norm"}

# What configurations call the numbers of blocks, and what the names of their weights begin with.
COUNTS: Final = {"num_layers": "transformer_blocks.", "num_single_layers": "single_transformer_blocks."}

_TUNED = re.compile(r"transformer_blocks\.\d+\.attn\.to_(q|k|v|out\.0)\.weight")


def embedders(place: str, names: Mapping[str, str]) -> dict[str, str]:
    """The layers of embedders at this place of a diffusers model, and in single files, by their names."""
    return {
        f"{place}.{ours}.linear_{number}": f"{theirs}.{layer}"
        for ours, theirs in names.items()
        for number, layer in ((1, "in_layer"), (2, "out_layer"))
    }


class BlockNames(ABC):
    """The names of a checkpoint's weights; see `families.base.Names`. Single files hold the transformer."""

    layout: ClassVar[Layout]

    @abstractmethod
    def published(self, part: str, key: str) -> str | None:
        """The name of a weight that a folder's file names `key`; None for what is not used."""

    def stored(self, key: str) -> Stored:
        """Where a single file keeps a weight, by its diffusers name."""
        return self.layout.stored(key, key.startswith("norm_out.linear."))

    def keys_in(self, name: str) -> list[str]:
        """The weights in a tensor of a single file; the inverse of `stored`."""
        return self.layout.keys_in(name)

    def from_file(self, shapes: Mapping[str, Shape]) -> dict[str, dict[str, Stored]]:
        """Where a single file keeps each weight: several are stacked in it."""
        prefix = PREFIX if any(name.startswith(PREFIX) for name in shapes) else ""
        own = [
            name for name in shapes if name.startswith(prefix)
        ]  # others are parts that tools put beside it
        found = {
            key: replace(self.stored(key), name=name)
            for name in own
            for key in self.keys_in(name.removeprefix(prefix))
        }
        return {"denoiser": found}

    def copies(self, names: Collection[str]) -> dict[str, dict[str, str]]:
        """None: such files hold one copy."""
        return {}

    def to_file(self, shapes: Mapping[str, Mapping[str, Shape]]) -> dict[str, dict[str, Stored]]:
        """Where a single file is to keep each weight of a folder's transformer."""
        return {"denoiser": self.in_file(shapes["denoiser"])}

    def is_leftover(self, name: str) -> bool:
        """None is known."""
        return False

    def in_file(self, keys: Collection[str]) -> dict[str, Stored]:
        """See `families.base.Names`."""
        return {key: self.stored(key) for key in keys}

    def lora(self, key: str) -> str | None:
        """See `lora_name`."""
        return lora_name(key)


def is_tuned(key: str) -> bool:
    """Whether stage 2 tunes this weight: the attention of the image's stream where it has one of its own."""
    return _TUNED.fullmatch(key) is not None
