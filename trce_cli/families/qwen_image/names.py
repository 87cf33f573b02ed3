"""Names of a weight of Qwen-Image in diffusers folders, in single files of the transformer, and in LoRAs."""

import re
from collections.abc import Collection, Mapping
from typing import Final

from trce_cli.families.base import Shape, Stored
from trce_cli.families.causal_llm import names as llm

PREFIX: Final = "model.diffusion_model."  # what some tools put before the names in a single file
DOOR: Final = "txt_in.weight"
NORM: Final = "txt_norm.weight"  # of the RMSNorm before it

_TUNED = re.compile(r"transformer_blocks\.\d+\.attn\.to_(q|k|v|out\.0)\.weight")


class Names:
    """The names of a Qwen-Image checkpoint's weights, the same in every layout; see `families.base.Names`.

    Single files hold the transformer alone.
    """

    def published(self, part: str, key: str) -> str | None:
        """The name of a weight that a folder's file names `key`; None for what is not used."""
        return llm.published(key) if part == "text_encoder" else key

    def from_file(self, shapes: Mapping[str, Shape]) -> dict[str, dict[str, Stored]]:
        """Where a single file keeps each weight."""
        prefix = PREFIX if any(name.startswith(PREFIX) for name in shapes) else ""
        own = [name for name in shapes if name.startswith(prefix)]
        return {"denoiser": {name.removeprefix(prefix): Stored(name) for name in own}}

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
        return {key: Stored(key) for key in keys}

    def lora(self, key: str) -> str | None:
        """The name of a linear layer in a LoRA: diffusers' path, which its loader and ComfyUI take. diffusers
        before 0.40 takes kohya's name of the door for another layer's.
        """
        module, _, leaf = key.rpartition(".")
        if leaf != "weight" or module.rpartition(".")[2].startswith(("norm_", "txt_norm")):
            return None
        return f"transformer.{module}"


def is_tuned(key: str) -> bool:
    """Whether stage 2 tunes this weight: the attention of the image's stream; the text's is frozen."""
    return _TUNED.fullmatch(key) is not None
