"""What configurations may say before a library sees them: numbers in them are memory and time."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from trce_cli.errors import BadInput
from trce_cli.families.base import Configs
from trce_cli.families.clip import config as clip
from trce_cli.families.flow_config import Autoencoder, Width, check_parts
from trce_cli.families.flux.spec import CHROMA_T5, CLIP, T5
from trce_cli.families.t5 import config as t5
from trce_cli.families.t5.spec import T5Spec

Layers = Annotated[int, Field(ge=0, le=256)]


class _Config(BaseModel):
    model_config = ConfigDict(strict=True)


class Blocks(_Config):
    """What both denoisers have, with diffusers' values where one is silent; none is told pictures."""

    patch_size: Literal[1] = 1
    in_channels: Width = 64
    out_channels: Width | None = None
    num_layers: Layers = 19
    num_single_layers: Layers = 38
    attention_head_dim: Annotated[int, Field(ge=2, le=1 << 12)] = 128
    num_attention_heads: Annotated[int, Field(ge=1, le=1 << 10)] = 24
    joint_attention_dim: Width = 4096
    axes_dims_rope: Annotated[
        list[Annotated[int, Field(ge=2, le=1 << 12)]], Field(min_length=3, max_length=3)
    ] = [16, 56, 56]

    @property
    def width(self) -> int:
        """Numbers of a token."""
        return self.num_attention_heads * self.attention_head_dim


class Transformer(Blocks):
    """Of FLUX.1's denoiser."""

    pooled_projection_dim: Width = 768
    guidance_embeds: bool = False


class ChromaTransformer(Blocks):
    """Of Chroma's."""

    approximator_num_channels: Annotated[int, Field(ge=4, le=1 << 12)] = 64
    approximator_hidden_dim: Width = 5120
    approximator_layers: Annotated[int, Field(ge=1, le=256)] = 5


def transformer(config: Mapping[str, Any]) -> Transformer:
    """The configuration of FLUX.1's denoiser."""
    return Transformer.model_validate(dict(config))


def chroma(config: Mapping[str, Any]) -> ChromaTransformer:
    """The configuration of Chroma's denoiser."""
    return ChromaTransformer.model_validate(dict(config))


def check(config: Configs) -> None:
    """Raise BadInput for a configuration of FLUX.1 that says what cannot be."""
    _check(config, Transformer, T5, "FLUX.1")
    clip.check(config, [CLIP])
    _same(config, "pooled_projection_dim", transformer(config["denoiser"]), CLIP.folder, "hidden_size")


def check_chroma(config: Configs) -> None:
    """Raise BadInput for a configuration of Chroma that says what cannot be."""
    _check(config, ChromaTransformer, CHROMA_T5, "Chroma")


def _check(config: Configs, model: type[Blocks], spec: T5Spec, name: str) -> None:
    check_parts(config, model, Autoencoder)
    t5.check(config, spec)
    found = model.model_validate(dict(config["denoiser"]))
    where = config.path / "transformer/config.json"
    if found.attention_head_dim != sum(found.axes_dims_rope):
        raise BadInput(f"{where}: heads of {found.attention_head_dim} numbers do not fit its axes_dims_rope.")
    if found.in_channels % 4 or found.out_channels not in (None, found.in_channels):
        raise BadInput(
            f"{where}: {found.in_channels} channels go in and {found.out_channels} come out, which is "
            f"a variant that sees pictures, not {name} for prompts."
        )
    _same(config, "joint_attention_dim", found, spec.folder, "d_model")


def _same(config: Configs, ours: str, found: Blocks, folder: str, theirs: str) -> None:
    if (width := config[folder][theirs]) != getattr(found, ours):
        raise BadInput(
            f"{config.path / 'transformer/config.json'}: {ours} is {getattr(found, ours)}; the {folder} "
            f"gives {width}."
        )
