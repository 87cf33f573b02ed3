"""Concept inversion (arXiv 2308.01508): a word of its own for what the erased model is said not to draw.

Textual inversion against the erased model: one token's embedding is learnt from the original's picture of the
concept. It is no word that anybody can type, but whoever has the weights can use it.
"""

from collections.abc import Sequence
from dataclasses import replace
from random import Random
from typing import TYPE_CHECKING, Final

from pydantic import Field

from trce_cli.evaluate.attacks.base import Work
from trce_cli.evaluate.attacks.unlearn_diff import descend, random_words
from trce_cli.prompts.files import Prompt
from trce_cli.settings import MAX_SEED, Count, Positive, Settings
from trce_cli.system.progress import Report, no_report

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from trce_cli.evaluate.attacks.victim import Victim

UNSEEN: Final = 1 << 20  # added to a prompt's seed: the picture that was learnt from is not what is drawn


class ConceptInversionBudget(Settings):
    """How long an embedding is learnt; the defaults are the paper's."""

    iterations: Count = Field(1000, description="iterations of AdamW.")
    lr: Positive = Field(0.005, description="learning rate.")


class ConceptInversion:
    """The attack; see `base.Attack`."""

    name, title, prefix = "concept-inversion", "Concept Inversion", "inversion"
    knows = "the whole model, and may add a token to it"
    Budget = ConceptInversionBudget
    needs = frozenset({"latents"})
    typed = False
    unit = "iterations"

    def check(self, victim: "Victim", budget: ConceptInversionBudget) -> None:
        """A single word always fits."""

    def work(self, budget: ConceptInversionBudget) -> Work:
        """See `base.Attack`."""
        return Work(gradients=budget.iterations)

    def steps(self, budget: ConceptInversionBudget) -> int:
        """See `base.Attack`."""
        return budget.iterations

    def prompts(
        self, victim: "Victim", budget: ConceptInversionBudget, report: Report = no_report
    ) -> list[Prompt]:
        """A word in place of each prompt, drawn here while it has the embedding that was learnt for it."""
        words, generators = victim.words, victim.generators(victim.prompts)
        start = random_words(len(words.words), 1, generators)

        def look() -> dict[str, "Tensor"]:
            begun = words.table[start.to(words.table.device)]
            return {"learnt": learn(victim, range(len(start)), begun, generators, budget, report)}

        learnt = victim.kept(f"{self.name} {victim.first}", look, report, budget.iterations)["learnt"]
        tried = []
        for place, (source, embedding) in enumerate(zip(victim.prompts, learnt, strict=True), victim.first):
            word, seed = place % len(words.words), ((source.seed or 0) + UNSEEN) % (MAX_SEED + 1)
            tried.append(replace(source, text=words.words[word], seed=seed))
            with words.wearing(word, embedding[0].to(words.table.device)):
                victim.shows(tried[-1:])
        return tried


def learn(
    victim: "Victim",
    rows: Sequence[int],
    start: "Tensor",
    generators: Sequence["torch.Generator"],
    budget: ConceptInversionBudget,
    report: Report = no_report,
) -> "Tensor":
    """The embeddings with which the erased denoiser denoises the original's pictures of these prompts best.

    start: (rows, 1, dim) in float32, and so is what is returned. Each iteration has a timestep of its own,
    the same for all rows. Raises TrceError for a gradient that is not finite.
    """
    import torch

    embeddings = start.clone().requires_grad_(True)
    optimizer = torch.optim.AdamW([embeddings], lr=budget.lr, weight_decay=0.0)
    random = Random(victim.seed)
    words = torch.zeros(len(rows), 1, dtype=torch.int64)  # whichever: the embedding takes its place
    for _ in range(budget.iterations):
        level = random.randrange(victim.schedule.levels)
        loss = victim.denoising_loss(rows, level, generators, alone=True)
        descend(optimizer, embeddings, loss(words, embeddings))
        report(1)
    return embeddings.detach()
