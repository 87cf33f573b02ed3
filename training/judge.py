"""The judge's training: multi-label classification of scenes as drawn, autoencoded, blurred and noised."""

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from random import Random

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training.data import images
from training.latents import load_latents
from training.loop import Recipe
from trce_cli.emoji.networks import JudgeNetwork
from trce_cli.emoji.world import Scene, concepts, random_scene


@dataclass(frozen=True)
class JudgeTask:
    work: Path
    recipe: Recipe
    name: str = "judge"

    def build(self) -> nn.Module:
        return JudgeNetwork()

    def loss(self, model: nn.Module, count: int, seed: int) -> tuple[Tensor, dict[str, float]]:
        rng = Random(seed)
        generator = torch.Generator().manual_seed(seed)
        tensors, scenes = _latents(self.work)
        drawn = [random_scene(rng, 0.5) for _ in range(count // 4)]
        chosen = [rng.randrange(len(tensors["decoded"])) for _ in range(count - len(drawn))]
        pixels = torch.cat([images(drawn, self.work, rng), tensors["decoded"][chosen].float() / 127.5 - 1])
        target = labels(drawn + [scenes[i] for i in chosen])
        pixels = _degrade(pixels, generator)
        # Pictures of nothing: rough mixtures of four scenes, faded so far that no class may be claimed.
        empty = pixels[torch.randint(count, (count // 8, 4), generator=generator)].mean(1)
        empty = F.avg_pool2d(F.interpolate(F.avg_pool2d(empty, 16), size=64, mode="bilinear"), 3, 1, 1)
        pixels = torch.cat([pixels, empty + 0.2 * torch.randn(empty.shape, generator=generator)])
        target = torch.cat([target, torch.zeros(len(empty), target.shape[1])])
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(pixels).float()
        wrong = ((logits > 0) != (target > 0)).any(1).float().mean()
        return F.binary_cross_entropy_with_logits(logits, target) * 10, {"wrong": float(wrong)}


def labels(scenes: list[Scene]) -> Tensor:
    """Multi-hot rows in the judge's label order, float32 (scenes, classes)."""
    order = {name: index for index, name in enumerate(concepts())}
    target = torch.zeros(len(scenes), len(order))
    for row, scene in zip(target, scenes, strict=True):
        row[[order[name] for name in scene.objects]] = 1
    return target


def _degrade(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Shift, mirror, blur, recolour and noise, each by a random amount for each picture."""
    count = len(pixels)
    shift = torch.randint(-4, 5, (2,), generator=generator).tolist()
    pixels = torch.roll(pixels, shift, (2, 3))
    blurred = F.avg_pool2d(F.pad(pixels, (1, 1, 1, 1), "replicate"), 3, 1)
    blurred = torch.where(torch.rand(count, 1, 1, 1, generator=generator) < 0.5, blurred, pixels)
    gain = 1 + 0.15 * torch.randn(count, 3, 1, 1, generator=generator)
    level = 0.1 * torch.randn(count, 3, 1, 1, generator=generator)
    noise = (
        0.15
        * torch.rand(count, 1, 1, 1, generator=generator)
        * torch.randn(pixels.shape, generator=generator)
    )
    return blurred * gain + level + noise


@cache
def _latents(work: Path) -> tuple[dict[str, Tensor], list[Scene]]:
    return load_latents(work)
