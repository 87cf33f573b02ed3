"""The judge: a small multi-label network that says which classes of the emoji world a picture shows.

It was trained apart from the checkpoint it judges, on rendered, autoencoded, blurred and noised scenes.
"""

from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from trce_cli.emoji.world import concepts

THRESHOLD = 0.5  # a class counts as visible from this score on
WEIGHTS = Path(__file__).parent / "judge.safetensors"


class JudgeNetwork(nn.Module):
    """(batch, 3, 64, 64) in [-1, 1] -> logits (batch, classes), in the order of ``world.concepts()``."""

    def __init__(self, channels: tuple[int, ...] = (24, 48, 96, 128)) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        width = 3
        for c in channels:
            layers += [
                nn.Conv2d(width, c, 3, 2, 1),
                nn.GroupNorm(8, c),
                nn.SiLU(),
                nn.Conv2d(c, c, 3, 1, 1),
                nn.GroupNorm(8, c),
                nn.SiLU(),
            ]
            width = c
        self.features = nn.Sequential(*layers)
        self.classify = nn.Conv2d(width, len(concepts()), 1)

    def forward(self, pixels: Tensor) -> Tensor:
        # Log-mean-exp over the cells: a class is visible where any cell sees it.
        cells = self.classify(self.features(pixels)).flatten(2)
        return cells.logsumexp(-1) - float(np.log(cells.shape[-1]))


class Judge:
    """Scores pictures; ``labels`` names the columns."""

    def __init__(self, weights: Path = WEIGHTS) -> None:
        self.labels = tuple(concepts())
        self.network = JudgeNetwork().eval()
        self.network.load_state_dict({k: v.float() for k, v in load_file(weights).items()})

    @torch.inference_mode()
    def scores(self, images: np.ndarray) -> np.ndarray:
        """RGB uint8 (count, 64, 64, 3) -> probabilities, float32 (count, classes)."""
        pixels = torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).float() / 127.5 - 1
        return torch.cat([self.network(chunk).sigmoid() for chunk in pixels.split(64)]).numpy()
