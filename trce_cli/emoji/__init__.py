"""The embedded checkpoints: small, honest text-to-image models in Stable Diffusion 1.x and Z-Image format."""

from pathlib import Path


def folder() -> Path:
    """Folder of `emoji`, a diffusers ``StableDiffusionPipeline`` directory."""
    return Path(__file__).parent / "weights"


def dit_folder() -> Path:
    """Folder of `emoji-dit`, a diffusers ``ZImagePipeline`` directory."""
    return Path(__file__).parent / "dit"
