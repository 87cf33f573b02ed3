"""Gates: conditions on the figures of an evaluation, for pipelines that publish only what meets them."""

import difflib
import operator
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trce_cli.errors import BadInput, TrceError

COMPARISONS: Mapping[str, Callable[[float, float], bool]] = {
    "<=": operator.le,
    ">=": operator.ge,
    "<": operator.lt,
    ">": operator.gt,
}

BOUNDS = (".low", ".high")  # behind a share's name: the ends of its 95 % interval


@dataclass(frozen=True)
class Gate:
    """`figure comparison bound`: `asr.implied<=0.05`, or of an interval's end `asr.implied.high<=0.05`."""

    figure: str
    comparison: str
    bound: float

    def __str__(self) -> str:
        return f"{self.figure}{self.comparison}{self.bound:g}"

    def check(self, figures: Mapping[str, float | None]) -> dict[str, Any]:
        """The gate with the figure's value and whether it is met; a figure without a value meets nothing.

        `needed`: for an unmet bound of an interval, how many pictures would narrow the interval enough if
        their share stayed what it is; None where more pictures do not help.
        """
        value = figures[self.figure]
        met = value is not None and COMPARISONS[self.comparison](value, self.bound)
        return {
            "gate": str(self),
            "value": value,
            "met": met,
            "needed": None if met else self._needed(figures),
        }

    def needed_at_best(self) -> int:
        """How many pictures it takes were all as wished: of an interval's end, else 1."""
        return self._needed_at(0.0 if self.figure.endswith(".high") else 1.0) or 1

    def _needed(self, figures: Mapping[str, float | None]) -> int | None:
        share = figures.get(self.figure.rpartition(".")[0])
        return None if share is None else self._needed_at(share)

    def _needed_at(self, share: float) -> int | None:
        end = self.figure.rpartition(".")[2]
        if (end, self.comparison[0]) not in (("high", "<"), ("low", ">")):
            return None
        from trce_cli.maths.statistics import pictures_needed  # numpy, which --help does without

        is_beyond = share >= self.bound if end == "high" else share <= self.bound
        return None if is_beyond else pictures_needed(share, self.bound)


def parse_gate(text: str) -> Gate:
    """A gate from its text; a bound may be a percentage. BadInput where it is none, or bounds no share."""
    match = re.fullmatch(r"\s*([^<>=]+?)\s*(<=|>=|<|>)\s*([0-9.eE+-]+)\s*(%?)\s*", text)
    try:
        if match is None:
            raise ValueError
        bound = float(match[3]) / (100 if match[4] else 1)
    except ValueError:
        raise BadInput(
            f"The gate {text!r} is not of the form FIGURE<=NUMBER.",
            "Examples: asr.implied<=0.05, asr.implied.high<=0.05, benign.kept>=0.95",
        ) from None
    gate = Gate(match[1], match[2], bound)
    if _is_share(gate.figure) and not (0 <= bound <= 1 and str(gate)[-2:] not in ("<0", ">1")):
        raise BadInput(
            f"The gate {text!r} tells nothing: its figure is a share, which lies between 0 and 1.",
            "Per cent are written with their sign: asr.implied<=5%",
        )
    return gate


def _is_share(figure: str) -> bool:
    return re.search(r"\.(clip_score|frechet\w*)$", figure) is None


def value_of(told: Mapping[str, Any]) -> str:
    """The value of a checked gate's figure: distances and CLIP scores as they are, shares in per cent."""
    value, figure = told["value"], re.split("[<>]", told["gate"])[0]
    if value is None:
        return "undefined"
    return f"{100 * value:.1f} %" if _is_share(figure) else f"{value:.2f}"


def check_names(gates: Iterable[Gate], figures: Iterable[str]) -> None:
    """BadInput for a gate on a figure that the evaluation will not have."""
    known = list(figures)
    for gate in gates:
        if gate.figure not in known:
            close = difflib.get_close_matches(gate.figure, known, n=1)
            guess = f"Did you mean {close[0]}? " if close else ""
            ends = tuple(f"{name}{end}" for name in known for end in BOUNDS)
            told = ", ".join(name for name in known if name not in ends)
            raise BadInput(
                f"There is no figure {gate.figure!r} in this evaluation for the gate {gate}.",
                f"{guess}Its figures: {told}; of a share also the interval's ends, {' and '.join(BOUNDS)}.",
            )


def check_met(told: Iterable[Mapping[str, Any]], page: Path) -> None:
    """Raise TrceError where one of the checked gates is not met; page: what shows why."""
    if failed := [gate for gate in told if not gate["met"]]:
        said = ", ".join(f"{gate['gate']} is not met: it is {value_of(gate)}" for gate in failed)
        raise TrceError(f"{said}.", f"What was drawn is in {page}, failures first.")
