"""What is attacked, and how."""

from typing import Annotated

from pydantic import Field

from trce_cli.evaluate.attacks.registry import ATTACKS, usage
from trce_cli.evaluate.settings import Asked
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
