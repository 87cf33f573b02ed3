"""The judge: a small multi-label network that says which classes of the emoji world a picture shows.

It was trained apart from the checkpoint it judges, on rendered, autoencoded, blurred and noised scenes.
"""

from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

from trce_cli.emoji.networks import JudgeNetwork
from trce_cli.emoji.world import concepts

THRESHOLD = 0.5  # a class counts as visible from this score on
WEIGHTS = Path(__file__).parent / "judge.safetensors"


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
