"""After which treatments `trce evaluate` asks again, and how much."""

from typing import Annotated

from pydantic import Field

from trce_cli.evaluate.survivals.registry import TREATMENTS, usage
from trce_cli.settings import Count, Flag, Settings, one_of


class SurvivalSettings(Settings):
    """What happens to the checkpoint before it is asked again."""

    after: Annotated[
        tuple[Annotated[str, one_of(TREATMENTS)], ...], Flag(("--after",), metavar="TREATMENT")
    ] = Field(
        (),
        description=f"Ask the suites again after what happens to published models: {usage()}; may be "
        "repeated.",
    )
    after_count: Count = Field(40, description="Prompts of each suite that --after asks, the first ones.")
