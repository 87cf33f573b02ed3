"""Whiten the autoencoder's latents, and encode once what the UNet and the judge are trained on."""

import json
from pathlib import Path
from random import Random

import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file
from torch import Tensor

from training.data import images
from training.vae import build_vae, whiten
from trce_cli.emoji.world import Scene, random_scene

SCENES = 24_000
RECONSTRUCTIONS = 10_000


def load_vae(work: Path) -> AutoencoderKL:
    """The trained autoencoder with its latents whitened, in evaluation mode."""
    vae = build_vae()
    vae.load_state_dict(load_file(work / "vae.safetensors"))
    rng = Random(1)
    whiten(vae.eval(), images([random_scene(rng) for _ in range(1024)], work, rng))
    return vae.requires_grad_(False)


@torch.inference_mode()
def make_latents(work: Path) -> None:
    """Write ``latents.safetensors``: scaled latents of the scenes, and pictures decoded from some of them.

    Half of the decoded latents are noised a little first, as those that sampling ends at are.
    """
    path = work / "latents.safetensors"
    if path.exists():
        return
    rng = Random(2)
    scenes = [random_scene(rng, 0.5) for _ in range(SCENES)]
    vae = load_vae(work)
    scale = vae.config.scaling_factor
    latents, decoded = [], []
    for start in range(0, SCENES, 64):
        with torch.autocast("cpu", torch.bfloat16):
            z = vae.encode(images(scenes[start : start + 64], work, rng)).latent_dist.mean.float() * scale
            latents.append(z.half())
            if start < RECONSTRUCTIONS:
                noise = torch.rand(len(z), 1, 1, 1).sub(0.5).clamp(min=0) * torch.randn_like(z)
                decoded.append(
                    ((vae.decode((z + noise) / scale).sample.float().clamp(-1, 1) + 1) * 127.5).round().byte()
                )
    described = json.dumps([[*s.objects, s.background] for s in scenes])
    save_file(
        {"latents": torch.cat(latents).contiguous(), "decoded": torch.cat(decoded).contiguous()},
        path,
        {"scenes": described},
    )


def load_latents(work: Path) -> tuple[dict[str, Tensor], list[Scene]]:
    """Tensors ``latents`` (scenes, 4, 16, 16) and ``decoded`` (some, 3, 64, 64), and the scenes they show."""
    from safetensors import safe_open

    path = work / "latents.safetensors"
    with safe_open(path, "pt") as file:
        scenes = [
            Scene(tuple(names), background) for *names, background in json.loads(file.metadata()["scenes"])
        ]
    return load_file(path), scenes
