"""The embedded checkpoint: a small, honest text-to-image model in Stable Diffusion 1.x format."""

from pathlib import Path


def folder() -> Path:
    """Folder of the embedded checkpoint, a diffusers ``StableDiffusionPipeline`` directory."""
    return Path(__file__).parent / "weights"
