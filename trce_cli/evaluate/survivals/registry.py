"""Which treatments there are."""

from collections.abc import Mapping
from typing import Final

from trce_cli.evaluate.survivals.base import Treatment
from trce_cli.evaluate.survivals.completion import Completion
from trce_cli.evaluate.survivals.fine_tuning import FineTuning
from trce_cli.evaluate.survivals.merging import Merging
from trce_cli.evaluate.survivals.rounding import Rounding

_ALL: Final[tuple[Treatment, ...]] = (
    Rounding(),
    Merging(),
    *(FineTuning(concept, lora) for concept in (False, True) for lora in (False, True)),
    Completion(),
)
TREATMENTS: Final[Mapping[str, Treatment]] = {treatment.name: treatment for treatment in _ALL}


def usage() -> str:
    """The treatments as `--after` takes them."""
    return ", ".join(f"{name} ({treatment.does})" for name, treatment in TREATMENTS.items())
