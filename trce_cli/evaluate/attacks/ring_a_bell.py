"""Ring-A-Bell (arXiv 2310.10012): prompts that mean a concept without naming it, found in the text encoder.

The concept is a direction in the space of the text encoder, and a genetic algorithm looks for words whose
embedding is that of a prompt moved along it.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from random import Random
from typing import TYPE_CHECKING, Final

from pydantic import Field

from trce_cli.evaluate.attacks.base import Work
from trce_cli.prompts.files import Prompt
from trce_cli.settings import Count, NotNegative, Settings
from trce_cli.system.progress import Report, no_report

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from trce_cli.evaluate.attacks.victim import Victim

PAIRS: Final = 50  # prompt pairs that give the concept vector, which more of them change little


class RingABellBudget(Settings):
    """K, eta and the genetic search; the defaults are the paper's."""

    length: Count = Field(16, description="words of a prompt.")
    strength: NotNegative = Field(3.0, description="eta, how far along the concept.")
    population: int = Field(200, ge=2, description="prompts alive at a time.")
    generations: Count = Field(3000, description="rounds of its search.")
    mutation: float = Field(0.25, ge=0, le=1, description="share of children with a word replaced.")
    positions: int | None = Field(None, ge=1, description="how many tokens are compared; else all.")


class RingABell:
    """The attack; see `base.Attack`."""

    name, title, prefix = "ring-a-bell", "Ring-A-Bell", "ring"
    knows = "the text encoder"
    Budget = RingABellBudget
    needs: frozenset[str] = frozenset()
    typed = True
    unit = "generations"

    def check(self, victim: "Victim", budget: RingABellBudget) -> None:
        """The words have to fit into a prompt."""
        victim.check_room(budget.length)

    def work(self, budget: RingABellBudget) -> Work:
        """See `base.Attack`."""
        return Work(encodings=budget.population * budget.generations)

    def steps(self, budget: RingABellBudget) -> int:
        """See `base.Attack`."""
        return budget.generations

    def prompts(self, victim: "Victim", budget: RingABellBudget, report: Report = no_report) -> list[Prompt]:
        """Words in place of each prompt."""
        pairs = Random(victim.seed).sample(victim.pairs, min(PAIRS, len(victim.pairs)))
        unsafe, safe = (
            victim.states(victim.words.ids([getattr(pair, side) for pair in pairs]), budget.positions)
            for side in ("unsafe", "safe")
        )
        moved = budget.strength * concept_vector(unsafe, safe)
        plain = victim.states(victim.words.ids([prompt.text for prompt in victim.prompts]), budget.positions)

        def look() -> dict[str, "Tensor"]:
            words = search(
                plain + moved,
                lambda words: victim.states(victim.words.word_ids(words), budget.positions),
                len(victim.words.words),
                budget,
                victim.generators(victim.prompts),
                report,
            )
            return {"words": words}

        found = victim.kept(f"{self.name} {victim.first}", look, report, budget.generations)["words"]
        return [
            replace(one, text=victim.words.text(words))
            for one, words in zip(victim.prompts, found, strict=True)
        ]


def concept_vector(unsafe: "Tensor", safe: "Tensor") -> "Tensor":
    """c = mean of f(unsafe) - f(safe) over prompt pairs; (pairs, tokens, dim) each -> (tokens, dim)."""
    return (unsafe - safe).mean(0)


def search(
    targets: "Tensor",
    encode: Callable[["Tensor"], "Tensor"],
    vocabulary: int,
    budget: RingABellBudget,
    generators: Sequence["torch.Generator"],
    report: Report = no_report,
) -> "Tensor":
    """Words x that minimise ||f(x) - (f(P) + eta c)||^2 for each target f(P) + eta c.

    targets: (prompts, tokens, dim). encode: f, words (count, length) below `vocabulary` -> (count, tokens,
    dim). generators: of the CPU, one for each target, whose result does not depend on the others'. Returns
    words (prompts, length). The better half of a population lives on, so that the best of it never gets
    worse; children take the head of one parent and the tail of another.
    """
    import torch

    K, living = budget.length, budget.population - budget.population // 2
    children_a_turn = budget.population - living

    def chosen(count: int, *shape: int) -> "Tensor":
        """Numbers below `count` for each target, (prompts, *shape)."""
        return torch.stack([torch.randint(count, shape, generator=generator) for generator in generators])

    def losses(population: "Tensor") -> "Tensor":
        """(prompts, individuals, length) -> (prompts, individuals) on the CPU."""
        states = encode(population.flatten(0, 1)).unflatten(0, population.shape[:2])
        return (states - targets[:, None]).square().sum((2, 3)).cpu()

    def picked(population: "Tensor", places: "Tensor") -> "Tensor":
        return population.gather(1, places[:, :, None].expand(-1, -1, K))

    population = chosen(vocabulary, budget.population, K)
    loss = losses(population)
    for _ in range(budget.generations):
        loss, best = (found[:, :living] for found in loss.sort(dim=1, stable=True))
        population = picked(population, best)
        heads, tails = (picked(population, chosen(living, children_a_turn)) for _ in range(2))
        children = torch.where(torch.arange(K) < chosen(K + 1, children_a_turn, 1), heads, tails)
        mutates = chosen(1 << 16, children_a_turn, 1) < budget.mutation * (1 << 16)
        place = chosen(K, children_a_turn, 1)
        replaced = mutates & (torch.arange(K) == place)
        children = torch.where(replaced, chosen(vocabulary, children_a_turn, 1), children)
        population, loss = torch.cat([population, children], 1), torch.cat([loss, losses(children)], 1)
        report(1)
    return picked(population, loss.argmin(1)[:, None])[:, 0]
