"""Samples for training: sprites from the art, scenes drawn on demand, captions from the grammar."""

import io
import subprocess
import tarfile
import tempfile
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
from torch import Tensor

from training.render import draw, render_sprites
from trce_cli.emoji.world import Scene

ART = "@iconify-json/fluent-emoji-flat@1.2.6"  # MIT; fetched, never committed


def make_sprites(work: Path) -> Path:
    """Fetch the art with npm and render the sprites once into ``work/sprites.npz``."""
    path = work / "sprites.npz"
    if not path.exists():
        with tempfile.TemporaryDirectory() as folder:
            packed = subprocess.run(
                ["npm", "pack", "--silent", ART], cwd=folder, check=True, capture_output=True, text=True
            )
            with tarfile.open(Path(folder) / packed.stdout.split()[-1]) as archive:
                member = archive.extractfile("package/icons.json")
                assert member is not None
                icons = Path(folder) / "icons.json"
                icons.write_bytes(member.read())
            buffer, arrays = io.BytesIO(), dict[str, Any](render_sprites(icons))
            np.savez_compressed(buffer, **arrays)
        path.write_bytes(buffer.getvalue())
    return path


@cache
def sprites(work: Path) -> dict[str, np.ndarray]:
    with np.load(make_sprites(work), allow_pickle=False) as archive:
        return dict(archive)


def images(scenes: list[Scene], work: Path, rng: Random) -> Tensor:
    """Draw scenes; float32 in [-1, 1], shape (count, 3, 64, 64)."""
    pixels = np.stack([draw(scene, sprites(work), rng) for scene in scenes])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1
