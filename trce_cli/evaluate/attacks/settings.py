"""What is attacked, and how."""

from typing import Annotated

from pydantic import Field

from trce_cli.evaluate.attacks.registry import ATTACKS, usage
from trce_cli.evaluate.settings import Asked, EvaluationSettings
from trce_cli.prompts.suites import NONE
from trce_cli.settings import Count, Flag, one_of


class AttackSettings(Asked):
    """What `trce attack` attacks, and how."""

    attacks: Annotated[
        tuple[Annotated[str, one_of(ATTACKS)], ...],
        Flag(("--attack",), metavar="|".join(ATTACKS)),
    ] = Field((), description=f"Only this attack: {usage()}; may be repeated, all where not given.")
    suites: Annotated[tuple[str, ...], Flag(("--suite",), metavar="NAME[=FILE]")] = Field(
        ("explicit",),
        description="What is attacked: explicit, implied, context; NAME=FILE.csv: prompts "
        "of your own. May be repeated.",
    )
    count: Count = Field(50, description="Prompts a built-in suite, and at most so many of a file.")
    negative_prompt: str = Field(
        "", description="What CHECKPOINT alone is steered away from: the baseline that needs no editing."
    )

    def evaluation(self) -> EvaluationSettings:
        """See `Asked`; where files are attacked, none of the built-in suites is asked beside them."""
        question = super().evaluation()
        if all("=" in name for name in self.suites):
            return question.model_copy(update={"suites": (*self.suites, NONE)})
        return question
