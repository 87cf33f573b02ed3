"""Slots: their weights, from the ways in which users give them, where keywords stand, and what is padding."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Final

from trce_cli.errors import BadInput
from trce_cli.families.base import Family, Slot

SAMPLE: Final = 8  # positions of padding, spread evenly over all that are read

Given = Sequence[float] | Mapping[str, float] | None


def slot_weights(family: Family, given: Given) -> dict[str, float]:
    """The weight of each slot of the family, in its order; None: its defaults.

    given: weights in the order of `family.slots`, or by their names, where those that are not named get 0.
    BadInput where they are not for the family, and unless they are finite, at least 0 and not all 0.
    """
    if given is None:
        given = family.defaults.slots
    if not isinstance(given, Mapping) and len(given) == len(family.slots):
        given = dict(zip(family.slots, given, strict=True))
    if isinstance(given, Mapping):  # their names in any case
        names = {name.casefold(): name for name in family.slots}
        given = {names.get(name.casefold(), name): weight for name, weight in given.items()}
    if not isinstance(given, Mapping) or not given.keys() <= set(family.slots):
        raise BadInput(
            f"The token weights {given} are not for {family.name}: its slots are {', '.join(family.slots)}.",
            f"Give a weight for each, or name some, for example {next(iter(family.defaults.slots))}=1.",
        )
    found = {name: float(given.get(name, 0)) for name in family.slots}
    if not all(math.isfinite(weight) and weight >= 0 for weight in found.values()) or not any(found.values()):
        raise BadInput(f"The token weights {dict(given)} must be finite, at least 0, and not all 0.")
    return found


def occurrences(prompt: str, keyword: str) -> list[tuple[int, int]]:
    """Where the keyword stands in the prompt, as spans of letters.

    Letter case and the length of white space do not matter. Whole words come first ("gun" is not in
    "burgundy"); where there are none, words that contain the keyword ("guns").
    """
    phrase = r"\s+".join(map(re.escape, keyword.split()))
    for pattern in (rf"(?<!\w){phrase}(?!\w)", rf"\w*{phrase}\w*"):
        if spans := [found.span() for found in re.finditer(pattern, prompt, re.IGNORECASE)]:
            return spans
    return []


def sampled(limit: int, count: int) -> list[int]:
    """The positions that stand for all padding of a prompt that has `count` of `limit` positions."""
    places = (limit * part // SAMPLE - 1 for part in range(1, SAMPLE + 1))
    return [place for place in places if place >= count]


def pad_slots(unsafe: Sequence[int], safe: Sequence[int], weight: float) -> list[Slot]:
    """The slots PADS of a pair with padding at these positions: it counts once together."""
    pairs = list(zip(reversed(unsafe), reversed(safe), strict=False))
    return [Slot("PADS", ours, theirs, weight / len(pairs)) for ours, theirs in pairs]
