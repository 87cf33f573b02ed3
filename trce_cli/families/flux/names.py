"""Names of a weight of FLUX.1 or Chroma in diffusers folders, single files of the transformer, and LoRAs."""

from typing import Final

from trce_cli.families.base import Stored
from trce_cli.families.block_names import DOUBLE, DOUBLE_STACKED, OUTER, SINGLE, BlockNames, embedders
from trce_cli.families.clip import names as clip
from trce_cli.families.layout import Blocks, Layout
from trce_cli.families.t5 import names as t5

DOOR: Final = "context_embedder.weight"
POOLED_DOOR: Final = "time_text_embed.text_embedder.linear_1.weight"
FILE_DOORS: Final = ("txt_in.weight", "vector_in.in_layer.weight")
GUIDANCE: Final = "guidance_in."  # what dev has, and schnell has not
APPROXIMATOR: Final = "distilled_guidance_layer"  # what Chroma has in place of most modulation

_EMBEDDERS: Final = {
    "timestep_embedder": "time_in",
    "text_embedder": "vector_in",
    "guidance_embedder": "guidance_in",
}
_DOUBLE: Final = {
    **DOUBLE,
    "norm1.linear": "img_mod.lin",
    "norm1_context.linear": "txt_mod.lin",
    "ff.net.0.proj": "img_mlp.0",
    "ff.net.2": "img_mlp.2",
    "ff_context.net.0.proj": "txt_mlp.0",
    "ff_context.net.2": "txt_mlp.2",
}
_SINGLE: Final = {**SINGLE, "norm.linear": "modulation.lin", "proj_out": "linear2"}
# Beside queries, keys and values what enters the MLP, four times as wide.
_SINGLE_STACKED: Final = {
    **{f"attn.to_{each}": ("linear1", (at, 7), 1) for at, each in enumerate("qkv")},
    "proj_mlp": ("linear1", (3, 7), 4),
}
_LAYER: Final = {"linear_1": "in_layer", "linear_2": "out_layer"}  # of Chroma's approximator


class Names(BlockNames):
    """See `BlockNames`. In LoRAs diffusers leaves both doors by kohya's names out, without a word.

    clip, t5: the parts that these text encoders are.
    """

    layout = Layout(
        {**OUTER, **embedders("time_text_embed", _EMBEDDERS)},
        {
            "transformer_blocks": Blocks("double_blocks", _DOUBLE, DOUBLE_STACKED),
            "single_transformer_blocks": Blocks("single_blocks", _SINGLE, _SINGLE_STACKED),
        },
        norm_leaf="scale",
    )

    def __init__(self, t5: str, clip: str | None = None) -> None:
        self.t5, self.clip = t5, clip

    def published(self, part: str, key: str) -> str | None:
        """See `BlockNames`."""
        if part == self.clip:
            return clip.published(key)
        return t5.published(key) if part == self.t5 else key

    def stored(self, key: str) -> Stored:
        """See `BlockNames`."""
        if not key.startswith(f"{APPROXIMATOR}."):
            return super().stored(key)
        stem, last, leaf = key.rsplit(".", 2)
        return Stored(f"{stem}.{_LAYER.get(last, last)}.{'scale' if '.norms.' in key else leaf}")

    def keys_in(self, name: str) -> list[str]:
        """See `BlockNames`."""
        if not name.startswith(f"{APPROXIMATOR}."):
            return super().keys_in(name)
        stem, last, leaf = name.rsplit(".", 2)
        last = next((ours for ours, theirs in _LAYER.items() if theirs == last), last)
        return [f"{stem}.{last}.{'weight' if leaf == 'scale' else leaf}"]
