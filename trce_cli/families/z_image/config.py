"""What configurations may say before a library sees them: numbers in them are memory and time."""

from collections.abc import Mapping
from typing import Annotated, Any, Final

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat

from trce_cli.errors import BadInput
from trce_cli.families.base import Canvas, Configs, Weights
from trce_cli.families.causal_llm import config as llm
from trce_cli.families.causal_llm.spec import LlmSpec
from trce_cli.families.flow import Scheduler

PIXELS: Final = 1024  # a side, where the autoencoder does not say for what size it was trained

Width = Annotated[int, Field(ge=1, le=1 << 16)]
Layers = Annotated[int, Field(ge=0, le=256)]
Few = Annotated[int, Field(ge=1, le=64)]
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


class Vae(_Config):
    """Of the autoencoder."""

    block_out_channels: Annotated[list[Width], Field(min_length=1, max_length=16)]
    sample_size: Annotated[int, Field(ge=1, le=1 << 14)] = PIXELS
    latent_channels: Width = 16
    layers_per_block: Few = 1
    norm_num_groups: Width = 32
    scaling_factor: Annotated[FiniteFloat, Field(gt=0, le=1000)] = 0.18215
    shift_factor: FiniteFloat


def transformer(config: Mapping[str, Any]) -> Transformer:
    """The denoiser's configuration."""
    return Transformer.model_validate(dict(config))


def check(config: Configs, spec: LlmSpec) -> None:
    """Raise BadInput for a configuration that says what cannot be."""
    llm.check_parts(config, Transformer, Vae)
    found = transformer(config["denoiser"])
    where = config.path / "transformer/config.json"
    if found.dim % found.n_heads or found.dim // found.n_heads != sum(found.axes_dims):
        raise BadInput(f"{where}: {found.n_heads} heads of {found.dim} numbers do not fit its axes_dims.")
    llm.check(config, spec)
    if (width := config[spec.folder]["hidden_size"]) != found.cap_feat_dim:
        raise BadInput(f"{where}: cap_feat_dim is {found.cap_feat_dim}; the text encoder's width is {width}.")
    if not (config.path / spec.tokenizer).is_dir():
        raise BadInput(f"{config.path} has no tokenizer.")


def canvas(weights: Weights) -> Canvas:
    """See `Family.canvas`: two latents a token, so many pixels a latent."""
    vae = Vae.model_validate(dict(weights.config["vae"]))
    multiple = 2 ** len(vae.block_out_channels)
    size = max(vae.sample_size // multiple, 1) * multiple
    steps = Scheduler.model_validate(dict(weights.config["scheduler"])).num_train_timesteps
    return Canvas(size, size, multiple, steps - 1)
