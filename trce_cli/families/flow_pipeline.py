"""What diffusers' pipelines of flow-matching transformers have in common: their parts and their noise."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from trce_cli.errors import refusing
from trce_cli.families.base import Weights, check_vae
from trce_cli.families.load import load_strictly, quiet_libraries


def assemble(
    weights: Weights,
    pipeline: str,
    autoencoder: str,
    transformer: Callable[[Weights, torch.device, torch.dtype], nn.Module],
    texts: Callable[[], dict[str, Any]],
    device: torch.device,
    dtype: torch.dtype,
    **settings: Any,
) -> Any:
    """The pipeline, of diffusers' classes of these names.

    transformer, texts: load the checkpoint's own, of texts tokenizers and text encoders by their folders.
    settings: of the pipeline itself. The autoencoder decodes one image at a time, which bounds the memory.
    """
    import diffusers

    quiet_libraries()
    check_vae(weights)
    with refusing(f"The scheduler of {weights.name} cannot be used"):
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler.from_config(dict(weights.config["scheduler"]))
    make = getattr(diffusers, autoencoder).from_config
    pipe = getattr(diffusers, pipeline)(
        scheduler=scheduler,
        vae=load_strictly(make, weights, "vae", device, lambda key: dtype),
        **texts(),
        transformer=transformer(weights, device, dtype),
        **settings,
    )
    pipe.vae.enable_slicing()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def noise(pipe: Any, channels: int, generators: Sequence[torch.Generator], width: int, height: int) -> Tensor:
    """The latents that pictures of so many pixels begin with, each from its own generator, float32."""
    factor = pipe.vae_scale_factor
    shape = (1, channels, height // factor, width // factor)
    return torch.cat([torch.randn(shape, generator=generator) for generator in generators])


@torch.no_grad()
def latents(pipe: Any, images: np.ndarray) -> Tensor:
    """See `Family.latents`: the mode of the autoencoder's distribution, shifted and scaled."""
    found: Tensor = encoded(pipe, images) - pipe.vae.config.shift_factor
    return found * pipe.vae.config.scaling_factor


def encoded(pipe: Any, images: np.ndarray) -> Tensor:
    """The mode of the autoencoder's distribution for each picture, float32."""
    pixels = torch.from_numpy(images.copy()).permute(0, 3, 1, 2) / 127.5 - 1
    found: Tensor = pipe.vae.encode(pixels.to(pipe.vae.device, pipe.vae.dtype)).latent_dist.mode()
    return found.float()
