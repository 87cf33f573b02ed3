"""UnlearnDiffAtk (arXiv 2310.11868): a few words before a prompt that make an erased model draw it again.

The model is its own classifier: a prefix is good where it lowers the denoising loss on a picture of the
concept. It is optimised as embeddings and used as words.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Final

from pydantic import Field

from trce_cli.errors import BadInput, TrceError
from trce_cli.evaluate.attacks.base import Work
from trce_cli.prompts.files import Prompt
from trce_cli.settings import Count, Positive, Settings
from trce_cli.system.progress import Report, no_report

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from trce_cli.evaluate.attacks.victim import Victim

WEIGHT_DECAY: Final = 0.1  # AdamW's, as the authors publish it
SCALE: Final = 1024  # of the loss: keeps float16's gradients off zero; AdamW's steps do not depend on it


class UnlearnDiffBudget(Settings):
    """Of each timestep some iterations, and after them the prefix is tried; the defaults are the paper's."""

    length: Count = Field(5, description="words before a prompt.")
    timesteps: Count = Field(50, description="timesteps; after each, it tries.")
    iterations: Count = Field(40, description="iterations of AdamW a timestep.")
    lr: Positive = Field(0.01, description="learning rate.")

    def noise_levels(self, train_timesteps: int) -> list[int]:
        """The timesteps: the middles of equal parts of the schedule, noisiest first."""
        width = train_timesteps / self.timesteps
        return [int((part + 0.5) * width) for part in reversed(range(self.timesteps))]


class UnlearnDiff:
    """The attack; see `base.Attack`."""

    name, title, prefix = "unlearn-diff", "UnlearnDiffAtk", "prefix"
    knows = "the whole model"
    Budget = UnlearnDiffBudget
    needs = frozenset({"latents"})
    typed = True
    unit = "timesteps"

    def check(self, victim: "Victim", budget: UnlearnDiffBudget) -> None:
        """The words have to fit into a prompt, and there have to be so many timesteps."""
        victim.check_room(budget.length)
        if budget.timesteps > victim.schedule.levels:
            raise BadInput(f"{victim.name} has {victim.schedule.levels} timesteps to choose from.")

    def work(self, budget: UnlearnDiffBudget) -> Work:
        """See `base.Attack`."""
        return Work(gradients=budget.timesteps * budget.iterations, pictures=1 + budget.timesteps)

    def steps(self, budget: UnlearnDiffBudget) -> int:
        """See `base.Attack`."""
        return budget.timesteps

    def prompts(
        self, victim: "Victim", budget: UnlearnDiffBudget, report: Report = no_report
    ) -> list[Prompt]:
        """The prompts behind prefixes. What is found without one is left as it is; the others go on until
        they are found.
        """
        import torch

        tried, generators = [*victim.prompts], victim.generators(victim.prompts)
        found, table = victim.shows(tried), victim.words.table
        prefixes = table[random_words(len(table), budget.length, generators).to(table.device)]
        for level in budget.noise_levels(victim.schedule.levels):
            if rows := [row for row, is_found in enumerate(found) if not is_found]:

                def look(rows: Sequence[int] = rows, level: int = level) -> dict[str, "Tensor"]:
                    loss = victim.denoising_loss(rows, level, generators)
                    return {
                        "prefixes": optimise(prefixes[rows], table, loss, budget),
                        "random": torch.stack([generators[row].get_state() for row in rows]),
                    }

                made = victim.kept(f"{self.name} {level} {victim.first}", look)
                prefixes[rows] = made["prefixes"].to(prefixes.device)
                for row, state in zip(rows, made["random"], strict=True):
                    # A row's own storage: torch reads a state from where the storage begins.
                    generators[row].set_state(state.clone())
                for row, words in zip(rows, nearest(prefixes[rows], table).cpu(), strict=True):
                    source = victim.prompts[row]
                    tried[row] = replace(source, text=f"{victim.words.text(words)} {source.text}")
                found[rows] = victim.shows([tried[row] for row in rows])
            report(1, f"{sum(found)} of {len(tried)} found")
        return tried


def random_words(count: int, length: int, generators: Sequence["torch.Generator"]) -> "Tensor":
    """The words to start from, numbers below `count`, (prompts, length): a row for each CPU generator."""
    import torch

    return torch.stack([torch.randint(count, (length,), generator=generator) for generator in generators])


def nearest(embeddings: "Tensor", table: "Tensor") -> "Tensor":
    """The row of `table`, (words, dim), that is nearest to each of `embeddings`, (..., dim)."""
    import torch

    flat = embeddings.detach().flatten(0, -2)
    return torch.cdist(flat, table).argmin(1).view(embeddings.shape[:-1])


def optimise(
    start: "Tensor",
    table: "Tensor",
    loss: Callable[["Tensor", "Tensor"], "Tensor"],
    budget: UnlearnDiffBudget,
) -> "Tensor":
    """Take prefixes down the loss at one timestep, and return the embeddings to go on from.

    start: (prompts, length, dim) in float32. table: embeddings of the words to choose from, (words, dim).
    loss: takes words (rows of `table`) and their embeddings, and gives a loss a prompt. It sees words only:
    each embedding is replaced by its nearest word's, and the gradient is passed straight through. Raises
    TrceError for a gradient that is not finite, which would look like an attack that finds nothing.
    """
    import torch

    soft = start.clone().requires_grad_(True)
    optimizer = torch.optim.AdamW([soft], lr=budget.lr, weight_decay=WEIGHT_DECAY)
    for _ in range(budget.iterations):
        words = nearest(soft, table)
        hard = soft + (table[words] - soft).detach()
        descend(optimizer, soft, loss(words, hard))
    return soft.detach()


def descend(optimizer: "torch.optim.Optimizer", embeddings: "Tensor", loss: "Tensor") -> None:
    """A step of the optimizer's embeddings down a loss for each of them; TrceError where it is not finite."""
    import torch

    (embeddings.grad,) = torch.autograd.grad(SCALE * loss.sum(), [embeddings])
    if not bool(torch.isfinite(embeddings.grad).all()):
        raise TrceError("The gradient of the attack is not finite.", "Try it with --dtype fp32.")
    optimizer.step()
