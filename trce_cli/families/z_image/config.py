"""What configurations may say before a library sees them: numbers in them are memory and time."""

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat

from trce_cli.errors import BadInput
from trce_cli.families.base import Configs
from trce_cli.families.causal_llm import config as llm
from trce_cli.families.causal_llm.spec import LlmSpec
from trce_cli.families.flow_config import Autoencoder, Width, check_parts

Layers = Annotated[int, Field(ge=0, le=256)]
Axes = Annotated[list[Annotated[int, Field(ge=1, le=1 << 16)]], Field(min_length=1, max_length=8)]


class _Config(BaseModel):
    model_config = ConfigDict(strict=True)


class Transformer(_Config):
    """Of the denoiser, with diffusers' values where it is silent."""

    in_channels: Width = 16
    dim: Width = 3840
    n_layers: Layers = 30
    n_refiner_layers: Layers = 2
    n_heads: Annotated[int, Field(ge=1, le=1 << 10)] = 30
    cap_feat_dim: Width = 2560
    norm_eps: Annotated[FiniteFloat, Field(ge=0, le=1)] = 1e-5
    axes_dims: Axes = [32, 48, 48]
    axes_lens: Axes = [1024, 512, 512]
    siglip_feat_dim: None = None


def transformer(config: Mapping[str, Any]) -> Transformer:
    """The denoiser's configuration."""
    return Transformer.model_validate(dict(config))


def check(config: Configs, spec: LlmSpec) -> None:
    """Raise BadInput for a configuration that says what cannot be."""
    check_parts(config, Transformer, Autoencoder)
    found = transformer(config["denoiser"])
    where = config.path / "transformer/config.json"
    if found.dim % found.n_heads or found.dim // found.n_heads != sum(found.axes_dims):
        raise BadInput(f"{where}: {found.n_heads} heads of {found.dim} numbers do not fit its axes_dims.")
    llm.check(config, spec)
    if (width := config[spec.folder]["hidden_size"]) != found.cap_feat_dim:
        raise BadInput(f"{where}: cap_feat_dim is {found.cap_feat_dim}; the text encoder's width is {width}.")
