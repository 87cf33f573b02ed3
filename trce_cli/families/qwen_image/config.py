"""What configurations may say before a library sees them: numbers in them are memory and time."""

from collections.abc import Mapping
from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat

from trce_cli.errors import BadInput
from trce_cli.families.base import Canvas, Configs, Weights, check_vae
from trce_cli.families.causal_llm import config as llm
from trce_cli.families.causal_llm.names import text_config
from trce_cli.families.causal_llm.spec import LlmSpec
from trce_cli.families.flow import Scheduler
from trce_cli.families.flow_config import Width, check_parts

LATENTS: Final = 128  # a side of what is drawn, as diffusers' pipeline has it

Few = Annotated[int, Field(ge=1, le=64)]
Levels = Annotated[list[Few], Field(min_length=1, max_length=8)]
Numbers = Annotated[list[FiniteFloat], Field(min_length=1, max_length=1 << 10)]


class _Config(BaseModel):
    model_config = ConfigDict(strict=True)


class Transformer(_Config):
    """Of the denoiser, with diffusers' values where it is silent; no variant that is told pictures."""

    patch_size: Literal[2] = 2
    in_channels: Width = 64
    out_channels: Width | None = 16
    num_layers: Annotated[int, Field(ge=1, le=256)] = 60
    attention_head_dim: Annotated[int, Field(ge=2, le=1 << 12)] = 128
    num_attention_heads: Annotated[int, Field(ge=1, le=1 << 10)] = 24
    joint_attention_dim: Width = 3584
    guidance_embeds: Literal[False] = False
    axes_dims_rope: Annotated[
        list[Annotated[int, Field(ge=2, le=1 << 12)]], Field(min_length=3, max_length=3)
    ] = [
        16,
        56,
        56,
    ]
    zero_cond_t: Literal[False] = False
    use_additional_t_cond: Literal[False] = False
    use_layer3d_rope: Literal[False] = False


class Vae(_Config):
    """Of the autoencoder, with diffusers' values where it is silent."""

    base_dim: Width = 96
    z_dim: Width = 16
    dim_mult: Levels = [1, 2, 4, 4]
    num_res_blocks: Few = 2
    temperal_downsample: Annotated[list[bool], Field(min_length=1, max_length=8)] = [False, True, True]
    latents_mean: Numbers | None = None
    latents_std: Numbers | None = None

    @property
    def factor(self) -> int:
        """Pixels a latent."""
        return int(2 ** len(self.temperal_downsample))


def transformer(config: Mapping[str, Any]) -> Transformer:
    """The denoiser's configuration."""
    return Transformer.model_validate(dict(config))


def check(config: Configs, spec: LlmSpec) -> None:
    """Raise BadInput for a configuration that says what cannot be."""
    check_parts(config, Transformer, Vae)
    found = transformer(config["denoiser"])
    where = config.path / "transformer/config.json"
    if found.attention_head_dim != sum(found.axes_dims_rope):
        raise BadInput(f"{where}: heads of {found.attention_head_dim} numbers do not fit its axes_dims_rope.")
    if found.in_channels != 4 * (found.out_channels or found.in_channels):
        raise BadInput(f"{where}: {found.in_channels} channels go in and {found.out_channels} come out.")
    llm.check(config, spec)
    width = text_config(config[spec.folder])["hidden_size"]
    if width != found.joint_attention_dim:
        raise BadInput(
            f"{where}: joint_attention_dim is {found.joint_attention_dim}; the text encoder gives {width}."
        )


def canvas(weights: Weights) -> Canvas:
    """See `Family.canvas`: two latents a token, so many pixels a latent."""
    check_vae(weights)
    factor = Vae.model_validate(dict(weights.config["vae"])).factor
    steps = Scheduler.model_validate(dict(weights.config["scheduler"])).num_train_timesteps
    return Canvas(LATENTS * factor, LATENTS * factor, 2 * factor, steps - 1)
