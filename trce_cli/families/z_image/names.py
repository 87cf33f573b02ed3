"""Names of a weight of Z-Image in diffusers folders, in single files of the transformer, and in LoRAs."""

import re
from collections.abc import Collection, Mapping
from typing import Final

from trce_cli.families.base import Shape, Stored
from trce_cli.families.causal_llm import names as llm

PREFIX: Final = "model.diffusion_model."  # what some tools put before the names in a single file
DOOR: Final = "cap_embedder.1.weight"  # the same in all layouts
NORM: Final = "cap_embedder.0.weight"  # of the RMSNorm before it

_FROM = {"final_layer.": "all_final_layer.2-1.", "x_embedder.": "all_x_embedder.2-1."}
_ATTENTION = {"out": "to_out.0", "q_norm": "norm_q", "k_norm": "norm_k"}
_LAYER = re.compile(r"(.+\.attention)\.(.+)\.(weight|bias)")
_TUNED = re.compile(r"layers\.\d+\.attention\.to_(q|k|v|out\.0)\.weight")


class Names:
    """The names of a Z-Image checkpoint's weights; see `families.base.Names`.

    Single files hold the transformer alone.
    """

    def published(self, part: str, key: str) -> str | None:
        """The name of a weight that a folder's file names `key`; None for what is not used."""
        return llm.published(key) if part == "text_encoder" else key

    def from_file(self, shapes: Mapping[str, Shape]) -> dict[str, dict[str, Stored]]:
        """Where a single file keeps each weight: queries, keys and values are stacked in it."""
        found: dict[str, Stored] = {}
        prefix = PREFIX if any(name.startswith(PREFIX) for name in shapes) else ""
        for name in shapes:
            if not name.startswith(prefix):  # another part, as some tools put beside it
                continue
            key = name.removeprefix(prefix)
            if key == "norm_final.weight":  # a leftover that no model has
                continue
            if key.endswith(".attention.qkv.weight"):
                block = key.removesuffix("qkv.weight")
                found |= {f"{block}to_{each}.weight": Stored(name, (at, 3)) for at, each in enumerate("qkv")}
            else:
                found[diffusers_name(key)] = Stored(name)
        return {"denoiser": found}

    def copies(self, names: Collection[str]) -> dict[str, dict[str, str]]:
        """None: such files hold one copy."""
        return {}

    def to_file(self, shapes: Mapping[str, Mapping[str, Shape]]) -> dict[str, dict[str, Stored]]:
        """Where a single file is to keep each weight of a folder's transformer."""
        return {"denoiser": self.in_file(shapes["denoiser"])}

    def is_leftover(self, name: str) -> bool:
        """A norm that no model has."""
        return name.removeprefix(PREFIX) == "norm_final.weight"

    def in_file(self, keys: Collection[str]) -> dict[str, Stored]:
        """See `families.base.Names`."""
        return {key: stored(key) for key in keys}

    def lora(self, key: str) -> str | None:
        """The name of a linear layer in a LoRA: diffusers' path, which its loader and ComfyUI take. Of
        kohya's names ComfyUI knows none for queries, keys and values by themselves.
        """
        module, _, leaf = key.rpartition(".")
        if leaf != "weight" or "norm" in key or key == NORM:
            return None
        return f"transformer.{module}"


def diffusers_name(key: str) -> str:
    """The diffusers name of a weight of a single file, without its prefix."""
    for theirs, ours in _FROM.items():
        if key.startswith(theirs):
            return ours + key.removeprefix(theirs)
    if layer := _LAYER.fullmatch(key):
        block, module, leaf = layer.groups()
        return f"{block}.{_ATTENTION.get(module, module)}.{leaf}"
    return key


def stored(key: str) -> Stored:
    """Where a single file keeps a weight, by its diffusers name; the inverse of `diffusers_name`."""
    for theirs, ours in _FROM.items():
        if key.startswith(ours):
            return Stored(theirs + key.removeprefix(ours))
    if layer := _LAYER.fullmatch(key):
        block, module, leaf = layer.groups()
        if module in ("to_q", "to_k", "to_v") and leaf == "weight":
            return Stored(f"{block}.qkv.weight", ("qkv".index(module[-1]), 3))
        back = {ours: theirs for theirs, ours in _ATTENTION.items()}
        return Stored(f"{block}.{back.get(module, module)}.{leaf}")
    return Stored(key)


def is_tuned(key: str) -> bool:
    """Whether stage 2 tunes this weight: the attention of the main layers; the text path is frozen."""
    return _TUNED.fullmatch(key) is not None
