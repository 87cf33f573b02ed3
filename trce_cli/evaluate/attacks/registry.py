"""Which attacks there are, and what each may spend."""

from collections.abc import Collection, Mapping
from typing import Any, Final

from trce_cli.errors import BadInput
from trce_cli.evaluate.attacks.base import Attack
from trce_cli.evaluate.attacks.concept_inversion import ConceptInversion
from trce_cli.evaluate.attacks.ring_a_bell import RingABell
from trce_cli.evaluate.attacks.unlearn_diff import UnlearnDiff
from trce_cli.prompts.home import Home
from trce_cli.settings import Settings, option_name

_ALL: Final[tuple[Attack, ...]] = (RingABell(), UnlearnDiff(), ConceptInversion())
ATTACKS: Final[Mapping[str, Attack]] = {attack.name: attack for attack in _ALL}

Budgets = Mapping[str, Settings]  # by the names of attacks


def choose_budgets(
    names: Collection[str], home: Home, given: Mapping[str, Mapping[str, Any]] | None = None
) -> Budgets:
    """The budgets of these attacks, all where none is named: what the user gave, else the home's, else the
    papers'.

    given: by attack and field. Raises BadInput for an unknown attack and for numbers that make no sense.
    """
    if unknown := set(names) - set(ATTACKS):
        raise BadInput(f"There is no attack {min(unknown)!r}.", f"There are {', '.join(ATTACKS)}.")
    return {
        name: attack.Budget.of(
            {**home.budgets.get(name, {}), **(given or {}).get(name, {})},
            lambda field, attack=attack: option_name(f"{attack.prefix}_{field}"),  # type: ignore[misc]
        )
        for name, attack in ATTACKS.items()
        if not names or name in names
    }


def usage() -> str:
    """The attacks as `--attack` takes them."""
    return ", ".join(f"{name} (knows {attack.knows})" for name, attack in ATTACKS.items())
