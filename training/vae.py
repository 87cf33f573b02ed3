"""The autoencoder: AutoencoderKL, f = 4, four latent channels."""

from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from training.data import images
from training.loop import Recipe
from trce_cli.emoji.world import random_scene


def build_vae() -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(24, 48, 96),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=64,
        scaling_factor=0.18215,
    )


@dataclass(frozen=True)
class VaeTask:
    work: Path
    recipe: Recipe
    name: str = "vae"

    def build(self) -> nn.Module:
        return build_vae()

    def loss(self, model: Any, count: int, seed: int) -> tuple[Tensor, dict[str, float]]:
        rng = Random(seed)
        generator = torch.Generator().manual_seed(seed)
        target = images([random_scene(rng, 0.5) for _ in range(count)], self.work, rng)
        with torch.autocast("cpu", torch.bfloat16):
            posterior = model.encode(target).latent_dist
            latents = posterior.mean + posterior.std * torch.randn(posterior.mean.shape, generator=generator)
            output = model.decode(latents).sample
        error = output.float() - target
        mse = error.square().mean()
        kl = posterior.kl().float().mean() / latents[0].numel()
        return mse + 0.1 * error.abs().mean() + 1e-4 * kl, {
            "mse": float(mse.detach()),
            "kl": float(kl.detach()),
        }


@torch.no_grad()
def whiten(vae: AutoencoderKL, pixels: Tensor) -> None:
    """Fold a whitening of the latents into the 1x1 convolutions on either side of them.

    After it ``latents * scaling_factor``, with Stable Diffusion's own 0.18215, has zero mean and identity
    covariance over the four channels. pixels: (count, 3, 64, 64) in [-1, 1].
    """
    mean = torch.cat([vae.encode(chunk).latent_dist.mean for chunk in pixels.split(32)])
    flat = mean.permute(0, 2, 3, 1).reshape(-1, mean.shape[1]).double()
    centre = flat.mean(0)
    values, vectors = torch.linalg.eigh((flat - centre).T @ (flat - centre) / len(flat))
    forward = (vectors * values.rsqrt()) @ vectors.T / vae.config.scaling_factor  # z' = forward (z - centre)
    backward = torch.linalg.inv(forward)
    channels = len(centre)
    q, p = vae.quant_conv, vae.post_quant_conv
    weight, bias = q.weight[:channels, :, 0, 0].double(), q.bias[:channels].double()
    q.weight[:channels, :, 0, 0] = (forward @ weight).float()
    q.bias[:channels] = (forward @ (bias - centre)).float()
    # The spread of the posterior has no rotation of its own to follow; it is shifted to the new scale.
    q.bias[channels:] += 2 * forward.diagonal().abs().log().float()
    p.bias += (p.weight[:, :, 0, 0].double() @ centre).float()
    p.weight[:, :, 0, 0] = (p.weight[:, :, 0, 0].double() @ backward).float()
