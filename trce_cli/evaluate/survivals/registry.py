"""Which treatments there are."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Final

from trce_cli.evaluate.survivals.base import Treatment
from trce_cli.evaluate.survivals.completion import Completion
from trce_cli.evaluate.survivals.fine_tuning import FineTuning
from trce_cli.evaluate.survivals.merging import Merging
from trce_cli.evaluate.survivals.pictures import FromPictures
from trce_cli.evaluate.survivals.rounding import Rounding

_ALL: Final[tuple[Treatment, ...]] = (
    Rounding(),
    Merging(),
    *(FineTuning(concept, lora) for concept in (False, True) for lora in (False, True)),
    Completion(),
    *(FromPictures(painted, prompted) for painted in (False, True) for prompted in (True, False)),
)
TREATMENTS: Final[Mapping[str, Treatment]] = {treatment.name: treatment for treatment in _ALL}


def treatment_of(text: str) -> Treatment:
    """The treatment that `--after` names, as NAME or NAME=DIR; ValueError where there is none such."""
    name, is_of, folder = text.partition("=")
    if name not in TREATMENTS:
        raise ValueError(f"must be one of {', '.join(TREATMENTS)}, not {name!r}")
    treatment = TREATMENTS[name]
    if not is_of:
        return treatment
    if not isinstance(treatment, FineTuning):
        raise ValueError(f"{name} takes no folder: it is not tuned on pictures")
    return replace(treatment, folder=Path(folder))


def usage() -> str:
    """The treatments as `--after` takes them."""
    return ", ".join(f"{name} ({treatment.does})" for name, treatment in TREATMENTS.items())
