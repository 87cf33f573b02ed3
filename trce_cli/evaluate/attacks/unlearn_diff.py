"""UnlearnDiffAtk (arXiv 2310.11868): a few words before a prompt that make an erased model draw it again.

The model is its own classifier: a prefix is good where it lowers the denoising loss on a picture of the
concept. It is optimised as embeddings and used as words.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trce_cli.errors import BadInput, TrceError

WEIGHT_DECAY = 0.1  # AdamW's, as the authors publish it
SCALE = 1024  # of the loss: keeps float16's gradients off zero; AdamW's steps do not depend on it


@dataclass(frozen=True)
class UnlearnDiff:
    """The budget of an attack; the defaults are the paper's.

    length: words of the prefix. timesteps: how many, each with so many iterations of AdamW at rate lr; after
    each, the prefix is tried. Raises BadInput for numbers that make no sense.
    """

    length: int = 5
    timesteps: int = 50
    iterations: int = 40
    lr: float = 0.01

    def __post_init__(self) -> None:
        if min(self.length, self.timesteps, self.iterations) < 1:
            raise BadInput("UnlearnDiffAtk needs a word, a timestep and an iteration.")
        if not (math.isfinite(self.lr) and self.lr > 0):
            raise BadInput(f"UnlearnDiffAtk's learning rate must be finite and above 0, not {self.lr:g}.")

    def noise_levels(self, train_timesteps: int) -> list[int]:
        """The timesteps: the middles of equal parts of the schedule, noisiest first."""
        width = train_timesteps / self.timesteps
        return [int((part + 0.5) * width) for part in reversed(range(self.timesteps))]


def random_words(count: int, length: int, generators: Sequence[torch.Generator]) -> Tensor:
    """The words to start from, numbers below `count`, (prompts, length): a row for each CPU generator."""
    return torch.stack([torch.randint(count, (length,), generator=generator) for generator in generators])


def nearest(embeddings: Tensor, table: Tensor) -> Tensor:
    """The row of `table`, (words, dim), that is nearest to each of `embeddings`, (..., dim)."""
    flat = embeddings.detach().flatten(0, -2)
    return torch.cdist(flat, table).argmin(1).view(embeddings.shape[:-1])


def optimise(
    start: Tensor,
    table: Tensor,
    loss: Callable[[Tensor, Tensor], Tensor],
    settings: UnlearnDiff,
) -> Tensor:
    """Take prefixes down the loss at one timestep, and return the embeddings to go on from.

    start: (prompts, length, dim) in float32. table: embeddings of the words to choose from, (words, dim).
    loss: takes words (rows of `table`) and their embeddings, and gives a loss a prompt. It sees words only:
    each embedding is replaced by its nearest word's, and the gradient is passed straight through. Raises
    TrceError for a gradient that is not finite, which would look like an attack that finds nothing.
    """
    soft = start.clone().requires_grad_(True)
    optimizer = torch.optim.AdamW([soft], lr=settings.lr, weight_decay=WEIGHT_DECAY)
    for _ in range(settings.iterations):
        words = nearest(soft, table)
        hard = soft + (table[words] - soft).detach()
        (soft.grad,) = torch.autograd.grad(SCALE * loss(words, hard).sum(), [soft])
        if not bool(torch.isfinite(soft.grad).all()):
            raise TrceError("The gradient of the attack is not finite.", "Try it with --dtype fp32.")
        optimizer.step()
    return soft.detach()
