"""Which settings of stage 1 are worth a trial, and which of those tried is taken; plain numbers."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from trce_cli.errors import BadInput

MARGIN: Final = 0.01  # of preservation that a choice may give up against the best: one percentage point
TRIALS: Final = 8  # of each token weights, where the number is not given


@dataclass(frozen=True)
class Point:
    """A trial's outcome: attack success and preservation are shares of 1, preserve is lambda.

    kept: by what was kept: in all, and of the bystanders alone where they were asked.
    """

    attack_success: float
    kept: tuple[float, ...]
    preserve: float


def choose(points: Sequence[Point], pictures: Sequence[int]) -> int:
    """The place of the point to take; the first of equal ones.

    Among those that keep as much as the best but for `MARGIN`, or for one of so many pictures, in each of the
    kinds of what was kept, the least attack success; of equals the gentlest, which is the highest lambda.
    Where none keeps that much in every kind, among those that fall short by least.
    """
    margins = [max(MARGIN, 1 / number) for number in pictures]
    best = [max(kept) for kept in zip(*(point.kept for point in points), strict=True)]
    short = [
        max(most - mine - margin for most, mine, margin in zip(best, point.kept, margins, strict=True))
        for point in points
    ]
    least = max(0.0, min(short)) + 1e-9
    close = [place for place, lost in enumerate(short) if lost <= least]
    return min(close, key=lambda place: (points[place].attack_success, -points[place].preserve))


def parse_range(text: str) -> tuple[float, float]:
    """`LOW..HIGH`, or one value -> (low, high); BadInput unless 0 < low <= high, both finite."""
    low_text, dots, high_text = text.partition("..")
    try:
        low, high = float(low_text), float(high_text if dots else low_text)
    except ValueError:
        low = high = math.nan
    if not 0 < low <= high < math.inf:
        raise BadInput(
            f"--preserve {text!r} is neither a value nor a range LOW..HIGH of numbers above 0.",
            "Examples: 0.1, 1e-3..10",
        )
    return low, high


def spread(low: float, high: float, count: int) -> list[float]:
    """`count` values from low to high in equal ratios, to three digits."""
    if count == 1:
        return [low]
    ends = math.log10(low), math.log10(high)  # their ratio may be more than a number holds
    return [
        float(f"{10 ** (ends[0] + (ends[1] - ends[0]) * place / (count - 1)):.3g}") for place in range(count)
    ]


def grid(
    low: float, high: float, token_weights: Sequence[tuple[float, ...]], trials: int | None
) -> list[tuple[float, tuple[float, ...]]]:
    """(lambda, token weights) of every trial: `trials` in all, spread evenly over the token weights.

    One lambda is tried once with each of them. Raises BadInput where there are too few trials for a range.
    """
    kinds = list(dict.fromkeys(token_weights))
    if low == high:
        return [(low, weights) for weights in kinds]
    total = TRIALS * len(kinds) if trials is None else trials
    if total < 2 * len(kinds):
        raise BadInput(
            f"{total} trials are too few for both ends of the range with {len(kinds)} token weights.",
            f"Give --trials {2 * len(kinds)} or more.",
        )
    share, rest = divmod(total, len(kinds))
    return [
        (preserve, weights)
        for place, weights in enumerate(kinds)
        for preserve in dict.fromkeys(spread(low, high, share + (place < rest)))
    ]
