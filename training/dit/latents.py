"""Encode once, with the autoencoder of `emoji`, what the transformer is trained on."""

import json
from pathlib import Path
from random import Random

import torch
from diffusers import AutoencoderKL
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from training.data import images
from trce_cli.emoji import folder
from trce_cli.emoji.world import Scene, random_scene

SCENES = 24_000
PAIRS = 0.7  # share of the scenes that have two objects, which are what is hard


def load_vae() -> AutoencoderKL:
    """The autoencoder of `emoji`, frozen. Z-Image's format has a shift; here it is zero."""
    vae = AutoencoderKL.from_pretrained(folder() / "vae", local_files_only=True, torch_dtype=torch.float32)
    vae.register_to_config(shift_factor=0.0)
    return vae.eval().requires_grad_(False)


@torch.inference_mode()
def make_latents(work: Path) -> None:
    """Write ``latents.safetensors``: ``latents``, float16 (scenes, 4, 16, 16), and the scenes they show."""
    path = work / "latents.safetensors"
    if path.exists():
        return
    rng = Random(2)
    scenes = [random_scene(rng, PAIRS) for _ in range(SCENES)]
    vae, latents = load_vae(), []
    for start in range(0, SCENES, 64):
        with torch.autocast("cpu", torch.bfloat16):
            found = vae.encode(images(scenes[start : start + 64], work, rng)).latent_dist.mean
        latents.append((found.float() * vae.config.scaling_factor).half().contiguous())
    described = json.dumps([[*scene.objects, scene.background] for scene in scenes])
    save_file({"latents": torch.cat(latents)}, path, {"scenes": described})


def load_latents(work: Path) -> tuple[Tensor, list[Scene]]:
    """The latents and the scenes."""
    with safe_open(work / "latents.safetensors", "pt") as file:
        described = json.loads(file.metadata()["scenes"])
        return file.get_tensor("latents"), [Scene(tuple(names), where) for *names, where in described]
