"""After which treatments `trce evaluate` asks again, and how much."""

from typing import Annotated

from pydantic import AfterValidator, Field

from trce_cli.evaluate.survivals.registry import treatment_of, usage
from trce_cli.settings import Count, Flag, Settings


def _known(text: str) -> str:
    treatment_of(text)
    return text


class SurvivalSettings(Settings):
    """What happens to the checkpoint before it is asked again."""

    after: Annotated[
        tuple[Annotated[str, AfterValidator(_known)], ...], Flag(("--after",), metavar="TREATMENT[=DIR]")
    ] = Field(
        (),
        description=f"Ask the suites again after what happens to published models: {usage()}; may be "
        "repeated. DIR: pictures of your own to tune on, each with its caption in a .txt of its name.",
    )
    after_count: Count = Field(40, description="Prompts of each suite that --after asks, the first ones.")
