"""Names of a weight of FLUX.2 in diffusers folders, single files of the transformer, and LoRAs."""

from typing import Final

from trce_cli.families.block_names import DOUBLE, DOUBLE_STACKED, OUTER, SINGLE, BlockNames, embedders
from trce_cli.families.causal_llm import names as llm
from trce_cli.families.layout import Blocks, Layout

DOOR: Final = "context_embedder.weight"
FILE_DOOR: Final = "txt_in.weight"
MODULATION: Final = "single_stream_modulation.lin.weight"  # which all blocks share, and FLUX.1's do not
GUIDANCE: Final = "guidance_in.in_layer.weight"  # what the larger model has, and klein has not

_EMBEDDERS: Final = {"timestep_embedder": "time_in", "guidance_embedder": "guidance_in"}
_MODULATIONS: Final = (
    "double_stream_modulation_img",
    "double_stream_modulation_txt",
    "single_stream_modulation",
)
_DOUBLE: Final = {
    **DOUBLE,
    "ff.linear_in": "img_mlp.0",
    "ff.linear_out": "img_mlp.2",
    "ff_context.linear_in": "txt_mlp.0",
    "ff_context.linear_out": "txt_mlp.2",
}
_SINGLE: Final = {**SINGLE, "attn.to_qkv_mlp_proj": "linear1", "attn.to_out": "linear2"}


class Names(BlockNames):
    """See `BlockNames`."""

    layout = Layout(
        {
            **OUTER,
            **embedders("time_guidance_embed", _EMBEDDERS),
            **{f"{each}.linear": f"{each}.lin" for each in _MODULATIONS},
        },
        {
            "transformer_blocks": Blocks("double_blocks", _DOUBLE, DOUBLE_STACKED),
            "single_transformer_blocks": Blocks("single_blocks", _SINGLE, {}),
        },
        norm_leaf="scale",
    )

    def published(self, part: str, key: str) -> str | None:
        """See `BlockNames`."""
        return llm.published(key) if part == "text_encoder" else key
