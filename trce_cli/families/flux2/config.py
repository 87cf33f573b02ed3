"""What configurations may say before a library sees them: numbers in them are memory and time."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat

from trce_cli.errors import BadInput
from trce_cli.families.base import Configs
from trce_cli.families.causal_llm import config as llm
from trce_cli.families.causal_llm.names import states_width
from trce_cli.families.causal_llm.spec import LlmSpec
from trce_cli.families.flow_config import Convolutional, Width, check_parts
from trce_cli.system.foreign import validated

Layers = Annotated[int, Field(ge=0, le=256)]
Axis = Annotated[int, Field(ge=2, le=1 << 12)]
Eps = Annotated[FiniteFloat, Field(ge=0, le=1)]


class Transformer(BaseModel):
    """Of the denoiser, with diffusers' values where it is silent. Where guidance is embedded it is none of
    klein's."""

    model_config = ConfigDict(strict=True)

    patch_size: Literal[1] = 1
    in_channels: Width = 128
    out_channels: Width | None = None
    num_layers: Layers = 8
    num_single_layers: Layers = 48
    attention_head_dim: Axis = 128
    num_attention_heads: Annotated[int, Field(ge=1, le=1 << 10)] = 48
    joint_attention_dim: Width = 15360
    timestep_guidance_channels: Annotated[int, Field(ge=2, le=1 << 12)] = 256
    mlp_ratio: Annotated[FiniteFloat, Field(gt=0, le=64)] = 3.0
    axes_dims_rope: Annotated[list[Axis], Field(min_length=4, max_length=4)] = [32, 32, 32, 32]
    rope_theta: Annotated[int, Field(ge=1, le=1 << 30)] = 2000
    eps: Eps = 1e-6
    guidance_embeds: Literal[False]


class Vae(Convolutional):
    """Of the autoencoder, with diffusers' values where it is silent; it scales its latents four at a time."""

    latent_channels: Width = 32
    layers_per_block: Annotated[int, Field(ge=1, le=64)] = 2
    decoder_block_out_channels: Annotated[list[Width], Field(min_length=1, max_length=16)] | None = None
    batch_norm_eps: Eps = 1e-4
    patch_size: Annotated[list[Literal[2]], Field(min_length=2, max_length=2)] | None = None


class _Index(BaseModel):
    """Of the pipeline."""

    model_config = ConfigDict(strict=True)

    is_distilled: bool = False


def is_distilled(config: Mapping[str, Mapping[str, Any]]) -> bool:
    """Whether the pipeline is one that is drawn with in a few steps, without guidance."""
    return _Index.model_validate(dict(config["model_index"])).is_distilled


def transformer(config: Mapping[str, Any]) -> Transformer:
    """The denoiser's configuration."""
    return Transformer.model_validate(dict(config))


def check(config: Configs, spec: LlmSpec) -> None:
    """Raise BadInput for a configuration that says what cannot be."""
    check_parts(config, Transformer, Vae)
    validated(_Index, dict(config["model_index"]), str(config.path / "model_index.json"))
    found = transformer(config["denoiser"])
    where = config.path / "transformer/config.json"
    if found.attention_head_dim != sum(found.axes_dims_rope):
        raise BadInput(f"{where}: heads of {found.attention_head_dim} numbers do not fit its axes_dims_rope.")
    latents = 4 * Vae.model_validate(dict(config["vae"])).latent_channels
    if found.in_channels != latents or found.out_channels not in (None, found.in_channels):
        raise BadInput(
            f"{where}: {found.in_channels} channels go in and {found.out_channels or found.in_channels} come "
            f"out; the vae has {latents}."
        )
    llm.check(config, spec)
    if (width := states_width(spec, config[spec.folder])) != found.joint_attention_dim:
        raise BadInput(
            f"{where}: joint_attention_dim is {found.joint_attention_dim}; the text encoder gives {width}."
        )
