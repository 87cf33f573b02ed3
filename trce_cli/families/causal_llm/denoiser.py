"""What transformers have in common that a causal language model tells what to draw, by flow matching."""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch

from trce_cli.families.base import Conditioning, Weights
from trce_cli.families.causal_llm.spec import LlmSpec
from trce_cli.families.causal_llm.text import LlmText
from trce_cli.families.flow import Euler
from trce_cli.system.memory import free


class LlmTransformer(ABC):
    """A checkpoint's transformer; see `families.base.Denoiser`. eps: of the norm before the door."""

    def __init__(self, weights: Weights, spec: LlmSpec, eps: float) -> None:
        self.weights, self.spec, self.eps = weights, spec, eps

    @property
    @abstractmethod
    def latent_shape(self) -> tuple[int, int, int]:
        """(channels, height, width)."""

    def condition(self, prompts: Sequence[str], device: torch.device) -> Conditioning:
        """The states of the prompts, as the family's own pipeline passes them on: not normed yet."""
        conditioning = self._text(device).conditioning(prompts)
        free(device)  # the transformer is to come where the text encoder was
        return conditioning

    def outline(self, prompts: Sequence[str]) -> Conditioning:
        """See `Denoiser`."""
        return self._text(torch.device("cpu")).outline(prompts)

    def _text(self, device: torch.device) -> LlmText:
        return LlmText(self.weights, self.spec, self.eps, device, torch.float32)

    def schedule(self, steps: int) -> Euler:
        """See `Denoiser`; a token is of 2 x 2 latents."""
        _, height, width = self.latent_shape
        return Euler(self.weights, steps, (height // 2) * (width // 2))
