"""What configurations may say before a library sees them: numbers in them are memory and time."""

from collections.abc import Mapping
from math import isqrt
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from trce_cli.errors import BadInput
from trce_cli.families.base import Canvas, Configs, Shape, Weights, check_vae
from trce_cli.families.clip import config as clip
from trce_cli.families.flow import Scheduler
from trce_cli.families.flow_config import Autoencoder, Width, check_parts
from trce_cli.families.sd3.spec import CLIPS, T5, reads_t5
from trce_cli.families.t5 import config as t5

Block = Annotated[int, Field(ge=0, le=255)]


class Transformer(BaseModel):
    """Of the denoiser, with diffusers' values where it is silent."""

    model_config = ConfigDict(strict=True)

    sample_size: Annotated[int, Field(ge=1, le=1 << 12)] = 128
    patch_size: Annotated[int, Field(ge=1, le=16)] = 2
    in_channels: Width = 16
    out_channels: Width | None = 16
    num_layers: Annotated[int, Field(ge=1, le=256)] = 18
    attention_head_dim: Annotated[int, Field(ge=1, le=1 << 12)] = 64
    num_attention_heads: Annotated[int, Field(ge=1, le=1 << 10)] = 18
    joint_attention_dim: Width = 4096
    caption_projection_dim: Width = 1152
    pooled_projection_dim: Width = 2048
    pos_embed_max_size: Annotated[int, Field(ge=1, le=1 << 10)] = 96
    dual_attention_layers: Annotated[list[Block], Field(max_length=256)] = []
    qk_norm: Literal["rms_norm"] | None = None


def transformer(config: Mapping[str, Any]) -> Transformer:
    """The configuration of the denoiser."""
    return Transformer.model_validate(dict(config))


def check(config: Configs) -> None:
    """Raise BadInput for a configuration that says what cannot be."""
    check_parts(config, Transformer, Autoencoder)
    clip.check(config, CLIPS)
    found = transformer(config["denoiser"])
    where = config.path / "transformer/config.json"
    if found.out_channels not in (None, found.in_channels):
        raise BadInput(
            f"{where}: {found.in_channels} channels go in and {found.out_channels} come out, which is "
            "a variant that sees pictures, not one for prompts."
        )
    if (width := found.num_attention_heads * found.attention_head_dim) != found.caption_projection_dim:
        raise BadInput(
            f"{where}: caption_projection_dim is {found.caption_projection_dim}; the heads have {width}."
        )
    pooled = sum(config[spec.folder]["projection_dim"] for spec in CLIPS)
    if pooled != found.pooled_projection_dim:
        raise BadInput(
            f"{where}: pooled_projection_dim is {found.pooled_projection_dim}; the text encoders give "
            f"{pooled}."
        )
    if reads_t5(config["model_index"]):
        t5.check(config, T5)
        if (width := config[T5.folder]["d_model"]) != found.joint_attention_dim:
            raise BadInput(
                f"{where}: joint_attention_dim is {found.joint_attention_dim}; the {T5.folder} gives {width}."
            )


def canvas(weights: Weights) -> Canvas:
    """See `Family.canvas`: the transformer says for how many latents it was trained."""
    check_vae(weights)
    found = transformer(weights.config["denoiser"])
    vae = Autoencoder.model_validate(dict(weights.config["vae"]))
    multiple = found.patch_size * 2 ** (len(vae.block_out_channels) - 1)
    size = max(found.sample_size // found.patch_size, 1) * multiple
    steps = Scheduler.model_validate(dict(weights.config["scheduler"])).num_train_timesteps
    return Canvas(size, size, multiple, steps - 1)


def built_by(config: Mapping[str, Any], shapes: Mapping[str, Shape]) -> dict[str, Any]:
    """What of the denoiser's configuration a single file says otherwise: 3 and 3.5 differ in their blocks.

    shapes: of its tensors, named without a prefix.
    """
    numbers = {key.split(".")[1] for key in shapes if key.startswith("joint_blocks.")}
    count, places, entry = len(numbers), shapes.get("pos_embed", ()), shapes.get("context_embedder.weight")
    if numbers != {str(number) for number in range(count)} or len(places) != 3 or entry is None:
        return {}  # which loading tells better
    known = transformer(config)
    block = "joint_blocks.{}.x_block.{}"
    found = {
        "num_layers": count,
        "num_attention_heads": max(entry[0] // known.attention_head_dim, 1),
        "caption_projection_dim": entry[0],
        "pos_embed_max_size": isqrt(places[1]),
        "dual_attention_layers": [
            number for number in range(count) if block.format(number, "attn2.qkv.weight") in shapes
        ],
        "qk_norm": "rms_norm" if block.format(0, "attn.ln_q.weight") in shapes else None,
    }
    return {key: value for key, value in found.items() if value != getattr(known, key)}
