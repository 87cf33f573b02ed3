"""Ring-A-Bell (arXiv 2310.10012): prompts that mean a concept without naming it, found without the U-Net.

The concept is a direction in the space of the text encoder, and a genetic algorithm looks for words whose
embedding is that of a prompt moved along it.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trce_cli.errors import BadInput
from trce_cli.system.progress import Report, no_report


@dataclass(frozen=True)
class RingABell:
    """The budget of a search; the defaults are the paper's.

    length: words K of an adversarial prompt. strength: eta. mutation: share of the children that have one
    word replaced. positions: of how many tokens, from SoT on, embeddings are compared; None is all. Raises
    BadInput for numbers that make no sense.
    """

    length: int = 16
    strength: float = 3.0
    population: int = 200
    generations: int = 3000
    mutation: float = 0.25
    positions: int | None = None

    def __post_init__(self) -> None:
        if min(self.length, self.generations) < 1 or self.population < 2:
            raise BadInput("Ring-A-Bell needs a word, a generation and a population of two.")
        if not (math.isfinite(self.strength) and self.strength >= 0):
            raise BadInput(f"Ring-A-Bell's strength must be finite and at least 0, not {self.strength:g}.")
        if not 0 <= self.mutation <= 1:
            raise BadInput(f"Ring-A-Bell's mutation is a share from 0 to 1, not {self.mutation:g}.")


def concept_vector(unsafe: Tensor, safe: Tensor) -> Tensor:
    """c = mean of f(unsafe) - f(safe) over prompt pairs; (pairs, tokens, dim) each -> (tokens, dim)."""
    return (unsafe - safe).mean(0)


def search(
    targets: Tensor,
    encode: Callable[[Tensor], Tensor],
    vocabulary: int,
    settings: RingABell,
    generators: Sequence[torch.Generator],
    report: Report = no_report,
) -> Tensor:
    """Words x that minimise ||f(x) - (f(P) + eta c)||^2 for each target f(P) + eta c.

    targets: (prompts, tokens, dim). encode: f, words (count, length) below `vocabulary` -> (count, tokens,
    dim). generators: of the CPU, one for each target, whose result does not depend on the others'. Returns
    words (prompts, length). The better half of a population lives on, so that the best of it never gets
    worse; children take the head of one parent and the tail of another.
    """
    K, living = settings.length, settings.population - settings.population // 2
    children_a_turn = settings.population - living

    def chosen(count: int, *shape: int) -> Tensor:
        """Numbers below `count` for each target, (prompts, *shape)."""
        return torch.stack([torch.randint(count, shape, generator=generator) for generator in generators])

    def losses(population: Tensor) -> Tensor:
        """(prompts, individuals, length) -> (prompts, individuals) on the CPU."""
        states = encode(population.flatten(0, 1)).unflatten(0, population.shape[:2])
        return (states - targets[:, None]).square().sum((2, 3)).cpu()

    def picked(population: Tensor, places: Tensor) -> Tensor:
        return population.gather(1, places[:, :, None].expand(-1, -1, K))

    population = chosen(vocabulary, settings.population, K)
    loss = losses(population)
    for _ in range(settings.generations):
        loss, best = (found[:, :living] for found in loss.sort(dim=1, stable=True))
        population = picked(population, best)
        heads, tails = (picked(population, chosen(living, children_a_turn)) for _ in range(2))
        children = torch.where(torch.arange(K) < chosen(K + 1, children_a_turn, 1), heads, tails)
        mutates = chosen(1 << 16, children_a_turn, 1) < settings.mutation * (1 << 16)
        place = chosen(K, children_a_turn, 1)
        replaced = mutates & (torch.arange(K) == place)
        children = torch.where(replaced, chosen(vocabulary, children_a_turn, 1), children)
        population, loss = torch.cat([population, children], 1), torch.cat([loss, losses(children)], 1)
        report(1)
    return picked(population, loss.argmin(1)[:, None])[:, 0]
