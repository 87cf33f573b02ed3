"""What the guards' figures of a map mean: good, weak or bad, in a sentence for who knows none of them.

The limits come from `benchmarks/guards.py`, which holds the figures against pictures (docs/figures.md).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise, product
from typing import Any, Final

from pydantic import BaseModel, FiniteFloat, TypeAdapter, ValidationError

from trce_cli.errors import TrceError
from trce_cli.maths.verdict import Limits, Word

MAX_COLLATERAL: Final = 0.5  # from here on most of what was not named is lost
_ORDER: Final[tuple[Word, ...]] = ("good", "weak", "bad")
FEW: Final = 100  # captions: 375 keep as much as 3,000, 30 without words do not


@dataclass(frozen=True)
class Guard:
    """A figure with its limits and what each verdict means."""

    name: str
    limits: Limits
    said: Mapping[Word, str]


COLLATERAL: Final[Mapping[Word, str]] = {
    "good": "Things that are not to be erased are hardly touched.",
    "weak": "Things that are not to be erased change: look at pictures before you use this.",
    "bad": "Things that are not to be erased are lost: this edit ruins the checkpoint.",
}
PADDING: Final[Mapping[Word, str]] = {
    "good": "Padding behind what is to be erased says little of it.",
    "weak": "Padding still says some of what is to be erased: some of it may be drawn.",
    "bad": "Padding says what is to be erased as before: much of it may be drawn.",
}
GUARDS: Final = (
    Guard(
        "moved",
        Limits(0.7, 0.5),
        {
            "good": "What is to be erased is moved far enough to be gone.",
            "weak": "What is to be erased is moved part of its way: some of it will still be drawn.",
            "bad": "Little is erased: much of it will still be drawn.",
        },
    ),
    Guard("padding_moved", Limits(0.7, 0.5), PADDING),
    Guard("eot_padding_moved", Limits(0.7, 0.5), PADDING),
    Guard("canary_change", Limits(0.33, MAX_COLLATERAL), COLLATERAL),
    Guard("word_change", Limits(0.33, MAX_COLLATERAL), COLLATERAL),
    Guard(
        "norm",
        Limits(50.0, 500.0),
        {
            "good": "The edit is bounded, and survives weights rounded to 8 and 4 bits.",
            "weak": "The edit is large in some directions: rounding the weights may undo part of it.",
            "bad": "The edit is unbounded: rounding the weights breaks it. Raise --ridge.",
        },
    ),
)


# What the guards say of what is to be erased, of everything else, and of what becomes of the edit itself.
_ERASED: Final[Mapping[Word, str]] = {
    "good": "what is to be erased should be gone",
    "weak": "some of what is to be erased will still be drawn",
    "bad": "much of what is to be erased will still be drawn",
}
_SPARED_SO: Final[Mapping[Word, str]] = {
    "good": "everything else is hardly touched",
    "weak": "everything else changes, so look at pictures before you use this",
    "bad": "everything else is lost",
}
_LASTS: Final[Mapping[Word, str]] = {
    "weak": "rounding the weights may undo part of it",
    "bad": "rounding the weights breaks it, so raise --ridge",
}
_GROUPS: Final = (
    (("moved", "padding_moved", "eot_padding_moved"), _ERASED),
    (("canary_change", "word_change"), _SPARED_SO),
    (("norm",), _LASTS),
)


def overall(verdicts: Mapping[str, Mapping[str, Any]]) -> tuple[Word, str] | None:
    """The verdict on an edit as a whole, that of its worst guard, and one sentence that says what it means.

    verdicts: as `judge` has them. None where nothing was judged.
    """
    said: list[tuple[Word, str]] = []
    for names, meant in _GROUPS:
        words = [told["verdict"] for name, told in verdicts.items() if name.rpartition(".")[2] in names]
        if words and (word := max(words, key=_ORDER.index)) in meant:
            said.append((word, meant[word]))
    if not said:
        return None
    sentence = said[0][1]
    for (before, _), (word, then) in pairwise(said):
        sentence += f", {'and' if (before == 'good') == (word == 'good') else 'but'} {then}"
    worst = max((word for word, _ in said), key=_ORDER.index)
    return worst, f"{worst.capitalize()}: {sentence}."


class _Told(BaseModel):
    value: FiniteFloat
    good: FiniteFloat
    weak: FiniteFloat
    verdict: Word


def recorded(history: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """The verdicts that the last map of a history has on record; none where there is none, or no such."""
    maps = [entry for entry in history if entry["edit"] == "map"]
    try:
        told = TypeAdapter(dict[str, _Told]).validate_python(maps[-1]["figures"]["verdicts"])
    except (LookupError, ValidationError):
        return {}
    return {name: each.model_dump() for name, each in told.items()}


def value_of(figure: Any) -> float:
    """A guard's figure as one number: of changes by door the largest of the doors' means."""
    if isinstance(figure, Mapping):
        return max(value_of(each["mean"]) for each in figure.values())
    return float(figure)


def parts_of(figures: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """The figures of the main stream, and those of other streams and readings: what their names begin with ->
    their figures.
    """
    further = {
        f"{name}.": part
        for name, part in figures.items()
        if isinstance(part, Mapping) and "cosine_to_safe" in part
    }
    return {"": figures, **further}


def judge(figures: Mapping[str, Any], moved: Limits | None = None) -> dict[str, dict[str, Any]]:
    """A verdict on each guard that the figures hold, by its name, as `moved` or `pooled.moved`; plain JSON.

    moved: the family's limits of the guard of that name; None: those in `GUARDS`. In what is returned good,
    weak: the limits. sentence: what the verdict means.
    """
    told = {}
    for begin, part in parts_of(figures).items():
        for guard in GUARDS:
            if guard.name in part:
                value = value_of(part[guard.name])
                limits = (moved if guard.name == "moved" else None) or guard.limits
                word = limits.word(value)
                told[f"{begin}{guard.name}"] = {
                    "value": value,
                    "good": limits.good,
                    "weak": limits.weak,
                    "verdict": word,
                    "sentence": guard.said[word],
                }
    return told


# What must not change: the figures, and what they are about.
_SPARED: Final = {"canary_change": "captions", "word_change": "words of the vocabulary"}


def collateral(figures: Mapping[str, Any]) -> float:
    """The largest change of what harmless captions and words give, which --max-collateral bounds."""
    parts = parts_of(figures).values()
    return max((value_of(part[name]) for part in parts for name in _SPARED if name in part), default=0.0)


def refuse_collateral(figures: Mapping[str, Any], limit: float) -> None:
    """Raise TrceError where captions or words that are not to be erased change by more than the limit."""
    for part, (name, what) in product(parts_of(figures).values(), _SPARED.items()):
        if name in part and not (value := value_of(part[name])) <= limit:
            captions = figures.get("captions", FEW)
            few = f" Its prior has only {captions} captions." if captions < FEW else ""
            raise TrceError(
                f"The edit changes what harmless {what} give by {value:.0%}, more than the --max-collateral "
                f"of {limit:.0%}, so nothing was written.{few}",
                "Give more captions with --prior, leave words in (--word-share), or raise --preserve.",
            )
