"""What configurations of flow-matching checkpoints may say before a library sees them."""

from typing import Annotated, Final

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat

from trce_cli.families.base import Canvas, Configs, Weights, check_vae
from trce_cli.families.flow import Scheduler
from trce_cli.system.foreign import validated

PIXELS: Final = 1024  # a side, where the autoencoder does not say for what size it was trained

Width = Annotated[int, Field(ge=1, le=1 << 16)]


class Convolutional(BaseModel):
    """The sizes of diffusers' AutoencoderKL and its kin, with its values where a configuration is silent."""

    model_config = ConfigDict(strict=True)

    block_out_channels: Annotated[list[Width], Field(min_length=1, max_length=16)]
    sample_size: Annotated[int, Field(ge=1, le=1 << 14)] = PIXELS
    latent_channels: Width = 16
    layers_per_block: Annotated[int, Field(ge=1, le=64)] = 1
    norm_num_groups: Width = 32


class Autoencoder(Convolutional):
    """Of an AutoencoderKL with a shift."""

    scaling_factor: Annotated[FiniteFloat, Field(gt=0, le=1000)] = 0.18215
    shift_factor: FiniteFloat


def check_parts(config: Configs, transformer: type[BaseModel], autoencoder: type[BaseModel]) -> None:
    """Raise BadInput where the configuration of a part says what its model does not allow."""
    models: dict[str, tuple[type[BaseModel], str]] = {
        "transformer/config.json": (transformer, "denoiser"),
        "vae/config.json": (autoencoder, "vae"),
        "scheduler/scheduler_config.json": (Scheduler, "scheduler"),
    }
    for place, (model, part) in models.items():
        validated(model, dict(config[part]), str(config.path / place))


def canvas(weights: Weights) -> Canvas:
    """See `Family.canvas`: two latents a token, so many pixels a latent."""
    check_vae(weights)
    vae = Convolutional.model_validate(dict(weights.config["vae"]))
    multiple = 2 ** len(vae.block_out_channels)
    size = max(vae.sample_size // multiple, 1) * multiple
    steps = Scheduler.model_validate(dict(weights.config["scheduler"])).num_train_timesteps
    return Canvas(size, size, multiple, steps - 1)
