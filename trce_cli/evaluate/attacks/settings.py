"""What is attacked, and how."""

from typing import Annotated

from pydantic import AfterValidator, Field

from trce_cli.evaluate.attacks.registry import ATTACKS, usage
from trce_cli.evaluate.settings import Asked
from trce_cli.settings import Count, Flag


def _check_attack(name: str) -> str:
    if name not in ATTACKS:
        raise ValueError(f"must be one of {', '.join(ATTACKS)}, not {name!r}")
    return name


class AttackSettings(Asked):
    """What `trce attack` attacks, and how."""

    attacks: Annotated[
        tuple[Annotated[str, AfterValidator(_check_attack)], ...],
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
