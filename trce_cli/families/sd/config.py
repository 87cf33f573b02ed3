"""What configurations may say before a library sees them: numbers in them are memory and time.

Keys that are not named here are left to the libraries, whose refusals are told as they are.
"""

from collections.abc import Mapping
from typing import Annotated, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, model_validator

from trce_cli.families.base import Configs
from trce_cli.system.foreign import validated

Width = Annotated[int, Field(ge=1, le=1 << 16)]  # channels, or a layer's width
Few = Annotated[int, Field(ge=1, le=64)]  # layers, and other counts of what is built one by one
Pixels = Annotated[int, Field(ge=1, le=1 << 14)]
Share = Annotated[FiniteFloat, Field(ge=0, le=1)]
Each = Annotated[list[Few], Field(min_length=1, max_length=16)]
Depth = Annotated[int, Field(ge=0, le=64)]  # blocks of an attention; none where a level has no attention
# Of each level, or of each layer of a level.
Inner = Annotated[list[Depth], Field(min_length=1, max_length=64)]
Depths = Annotated[list[Depth | Inner], Field(min_length=1, max_length=16)]
Latents = Annotated[list[FiniteFloat], Field(min_length=1, max_length=1024)]
Sigma = Annotated[FiniteFloat, Field(ge=0, le=1e6)]
Widths = Annotated[list[Width], Field(min_length=1, max_length=16)]
Names = Annotated[list[str], Field(max_length=16)]


class _Config(BaseModel):
    model_config = ConfigDict(strict=True)


class Denoiser(_Config):
    """Of a U-Net with text conditioning."""

    sample_size: Pixels | list[Pixels] | None = None
    in_channels: Width = 4
    out_channels: Width = 4
    block_out_channels: Widths | None = None
    down_block_types: Names | None = None
    up_block_types: Names | None = None
    layers_per_block: Few | Each = 2
    transformer_layers_per_block: Few | Depths = 1
    reverse_transformer_layers_per_block: Depths | None = None
    cross_attention_dim: Width | Widths = 1280
    attention_head_dim: Width | Widths = 8
    num_attention_heads: Width | Widths | None = None
    norm_num_groups: Width | None = 32
    norm_eps: Share = 1e-5
    addition_embed_type: str | None = None
    addition_time_embed_dim: Width | None = None
    projection_class_embeddings_input_dim: Width | None = None

    @model_validator(mode="after")
    def _has_sizes(self) -> "Denoiser":
        has_sizes = self.addition_time_embed_dim and self.projection_class_embeddings_input_dim
        is_told = self.addition_embed_type == "text_time" or self.addition_time_embed_dim
        if is_told and not has_sizes:
            raise ValueError(
                "its sizes need addition_time_embed_dim and projection_class_embeddings_input_dim, both"
            )
        return self

    @model_validator(mode="after")
    def _fits_its_levels(self) -> "Denoiser":
        depth = len(self.block_out_channels or (0,) * 4)
        layers = self.layers_per_block if isinstance(self.layers_per_block, list) else [self.layers_per_block]
        layers = layers * depth if len(layers) == 1 else layers
        down, up = self.transformer_layers_per_block, self.reverse_transformer_layers_per_block
        for name, each, wanted in (
            ("layers_per_block", self.layers_per_block, None),
            ("transformer_layers_per_block", down, layers),
            ("reverse_transformer_layers_per_block", up, [count + 1 for count in layers[::-1]]),
        ):
            if isinstance(each, list) and len(each) != depth:
                raise ValueError(f"{name} must be of {depth} levels, as block_out_channels is")
            for inner, count in zip(each if isinstance(each, list) else (), wanted or (), strict=False):
                if isinstance(inner, list) and len(inner) < count:
                    raise ValueError(f"{name} must be of as many layers as a level has")
        return self


class Vae(_Config):
    """Of an autoencoder."""

    sample_size: Pixels | list[Pixels] | None = None
    block_out_channels: Widths | None = None
    down_block_types: Names | None = None
    up_block_types: Names | None = None
    latent_channels: Width = 4
    layers_per_block: Few = 1
    norm_num_groups: Width = 32
    scaling_factor: Annotated[FiniteFloat, Field(gt=0, le=1000)] = 0.18215
    latents_mean: Latents | None = None
    latents_std: Annotated[list[Annotated[FiniteFloat, Field(gt=0)]], Field(max_length=1024)] | None = None

    @model_validator(mode="after")
    def _fits_its_latents(self) -> "Vae":
        for name in ("latents_mean", "latents_std"):
            if (told := getattr(self, name)) and len(told) != self.latent_channels:
                raise ValueError(f"{name} must be of {self.latent_channels} latents")
        return self


class Scheduler(_Config):
    """Of a noise schedule."""

    num_train_timesteps: Annotated[int, Field(ge=2, le=100_000)] = 1000
    beta_start: Share = 0.0001
    beta_end: Share = 0.02
    beta_schedule: str = "linear"
    trained_betas: Annotated[list[Share], Field(max_length=100_000)] | None = None
    prediction_type: Literal["epsilon", "sample", "v_prediction"] = "epsilon"
    rescale_betas_zero_snr: bool | None = None
    steps_offset: Annotated[int, Field(ge=0, le=1000)] = 0
    timestep_spacing: Literal["linspace", "leading", "trailing"] = "leading"
    sigma_min: Sigma | None = None
    sigma_max: Sigma | None = None
    sigma_data: Sigma | None = None


# By part: the file in a diffusers folder, and what it may say.
PARTS: Final[Mapping[str, tuple[str, type[_Config]]]] = {
    "denoiser": ("unet/config.json", Denoiser),
    "vae": ("vae/config.json", Vae),
    "scheduler": ("scheduler/scheduler_config.json", Scheduler),
}


def check(config: Configs) -> None:
    """Raise BadInput for a configuration that is there and says what cannot be; text encoders aside."""
    for part, (place, model) in PARTS.items():
        if (where := config.path / place).exists():
            validated(model, dict(config[part]), str(where))
