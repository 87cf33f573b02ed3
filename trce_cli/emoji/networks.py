"""The two small networks that look at pictures of the emoji world."""

import math

import numpy as np
import torch
from torch import Tensor, nn

from trce_cli.emoji.world import concepts

WIDTH = 192  # of text embeddings, and of the space that the two towers share


def to_pixels(images: np.ndarray) -> Tensor:
    """RGB uint8 (count, height, width, 3) -> (count, 3, height, width) in [-1, 1], what both see."""
    return torch.from_numpy(np.array(images)).permute(0, 3, 1, 2).float() / 127.5 - 1


def convolutions(channels: tuple[int, ...]) -> nn.Sequential:
    """(batch, 3, 64, 64) -> (batch, channels[-1], side, side), each stage half the side of the one before."""
    layers: list[nn.Module] = []
    width = 3
    for c in channels:
        layers += [nn.Conv2d(width, c, 3, 2, 1), nn.GroupNorm(8, c), nn.SiLU()]
        layers += [nn.Conv2d(c, c, 3, 1, 1), nn.GroupNorm(8, c), nn.SiLU()]
        width = c
    return nn.Sequential(*layers)


class JudgeNetwork(nn.Module):
    """(batch, 3, 64, 64) in [-1, 1] -> logits (batch, classes), in the order of ``world.concepts()``."""

    def __init__(self) -> None:
        super().__init__()
        self.features = convolutions((24, 48, 96, 128))
        self.classify = nn.Conv2d(128, len(concepts()), 1)

    def forward(self, pixels: Tensor) -> Tensor:
        # Log-mean-exp over the cells: a class is visible where any cell sees it.
        cells = self.classify(self.features(pixels)).flatten(2)
        return cells.logsumexp(-1) - math.log(cells.shape[-1])


class ImageTower(nn.Module):
    """A small convolutional image encoder; with the text tower it also gives a CLIP score."""

    def __init__(self) -> None:
        super().__init__()
        self.features = convolutions((24, 48, 96, 160))
        self.project = nn.Linear(160 * 16, WIDTH)  # 4 x 4 cells kept apart: left and right matter

    def forward(self, pixels: Tensor) -> Tensor:
        """(batch, 3, 64, 64) in [-1, 1] -> (batch, WIDTH), not normalised."""
        return self.project(self.features(pixels).flatten(1))
