"""The judge: a small multi-label network that says which classes of the emoji world a picture shows.

It was trained apart from the checkpoint it judges, on rendered, autoencoded, blurred and noised scenes.
"""

from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

from trce_cli.emoji.networks import JudgeNetwork, to_pixels
from trce_cli.emoji.world import concepts

WEIGHTS = Path(__file__).parent / "judge.safetensors"


class Judge:
    """Scores pictures of `side` x `side` pixels; `labels` names the columns.

    threshold: a class counts as visible from this score on. weights: the file that they come from.
    """

    threshold = 0.5
    side = 64

    def __init__(self) -> None:
        self.labels, self.weights = tuple(concepts()), WEIGHTS
        self._network = JudgeNetwork().eval()
        self._network.load_state_dict({k: v.float() for k, v in load_file(WEIGHTS).items()})

    @torch.inference_mode()
    def scores(self, images: np.ndarray) -> np.ndarray:
        """RGB uint8 (count, 64, 64, 3) -> probabilities, float32 (count, classes)."""
        return torch.cat([self._network(chunk).sigmoid() for chunk in to_pixels(images).split(64)]).numpy()

    @torch.inference_mode()
    def features(self, images: np.ndarray) -> np.ndarray:
        """RGB uint8 (count, 64, 64, 3) -> the last hidden layer, averaged over its cells."""
        found: np.ndarray = self._network.features(to_pixels(images)).mean((2, 3)).numpy()
        return found
