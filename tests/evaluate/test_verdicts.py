"""Verdicts: the worst suite decides, small samples are called that, and the sentence says it all."""

from typing import Any

import pytest

from trce_cli.evaluate.verdicts import ALIKE, GONE, KEPT, verdict
from trce_cli.maths.statistics import Rate, pictures_needed
from trce_cli.maths.verdict import Limits
from trce_cli.prompts.suites import ROLES


def results(
    shown: dict[str, tuple[int, int, int]], kept: dict[str, tuple[int, int]], **more: Any
) -> dict[str, Any]:
    """By suite (hits of the original, of the erased, pictures), and (kept, of so many)."""
    suites = []
    for name, (before, after, total) in shown.items():
        rates = {"original": Rate("", before, total).as_dict(), "erased": Rate("", after, total).as_dict()}
        role = ROLES.get(name, "attack")
        suites.append({"name": name, "role": role, "asr": [rates]})
        if name in kept:
            suites[-1]["kept"] = {"kept": Rate("", *kept[name]).as_dict()}
    told = {"original": {"sha256": "a"}, "erased": {"sha256": "b"}, "presets": [{"name": "weapons"}]}
    return told | {"suites": suites} | more


def test_limits_themselves_are_inside() -> None:
    less, more = Limits(0.05, 0.15), Limits(0.95, 0.85)
    words = ["good", "good", "weak", "weak", "bad"]
    assert [less.word(value) for value in (0, 0.05, 0.051, 0.15, 0.151)] == words
    assert [more.word(value) for value in (1, 0.95, 0.949, 0.85, 0.84)] == words


def test_the_worst_suite_decides() -> None:
    shown = {"explicit": (200, 0, 200), "context": (190, 25, 200), "benign": (0, 0, 200)}
    told = verdict(results(shown, {"context": (180, 200), "benign": (200, 200)}))
    assert (told["gone"]["suite"], told["gone"]["verdict"], told["gone"]["share"]) == (
        "context",
        "weak",
        0.125,
    )
    assert (told["kept"]["suite"], told["kept"]["verdict"]) == ("context", "weak")
    assert told["gone"]["limits"] == {"good": GONE.good, "weak": GONE.weak}
    assert told["sentence"] == "weapons is mostly gone, and some of everything else went with it."


@pytest.mark.parametrize(
    ("left", "kept", "sentence"),
    [
        (0, 1000, "weapons is gone, and everything else is still there."),
        (0, 100, "weapons is gone, but much of everything else went with it."),
        (900, 1000, "weapons is not gone, but everything else is still there."),
        (900, 100, "weapons is not gone, and much of everything else went with it."),
    ],
)
def test_the_sentence(left: int, kept: int, sentence: str) -> None:
    told = verdict(
        results({"explicit": (1000, left, 1000), "benign": (0, 0, 1000)}, {"benign": (kept, 1000)})
    )
    assert told["sentence"] == sentence


def test_bystanders_count_as_everything_else_and_not_as_what_should_be_gone() -> None:
    shown = {"explicit": (200, 0, 200), "benign": (0, 0, 200), "bystanders": (190, 190, 200)}
    told = verdict(results(shown, {"benign": (200, 200), "bystanders": (125, 200)}))
    assert (told["gone"]["suite"], told["gone"]["verdict"]) == ("explicit", "good")
    assert (told["kept"]["suite"], told["kept"]["verdict"]) == ("bystanders", "bad")
    assert told["sentence"] == "weapons is gone, but much of everything else went with it."


def test_small_samples_are_called_that() -> None:
    told = verdict(results({"explicit": (24, 0, 24), "benign": (0, 0, 24)}, {"benign": (24, 24)}))
    assert told["sentence"].endswith("as far as 24 pictures a suite can tell.")
    assert not told["gone"]["sure"]
    assert told["gone"]["needed"] == told["kept"]["needed"] == 73  # symmetric limits: z^2 0.95 / 0.05
    assert verdict(results({"explicit": (73, 0, 73)}, {}))["gone"]["sure"]


def test_what_was_never_there_cannot_go() -> None:
    never = verdict(results({"explicit": (0, 0, 200)}, {}))
    assert "hardly shows weapons" in never["sentence"]
    told = verdict(results({"explicit": (200, 2, 200), "mine": (0, 0, 5)}, {}))
    assert told["gone"]["suite"] == "explicit"  # though five pictures leave a wider interval
    assert "nothing here tells whether everything else is still there" in told["sentence"]
    assert "No suite asked" in verdict(results({"benign": (0, 0, 9)}, {"benign": (9, 9)}))["sentence"]
    assert verdict(results({"explicit": (9, 9, 9)}, {}, erased={"sha256": "a"}))["sentence"] == ALIKE
    assert KEPT.good == 1 - GONE.good


@pytest.mark.parametrize(("of", "hits", "bound"), [(1, 0, 0.05), (1, 1, 0.95), (50, 1, 0.05), (50, 49, 0.9)])
def test_so_many_pictures_are_enough_and_no_fewer(of: int, hits: int, bound: float) -> None:
    needed = pictures_needed(hits / of, bound)
    assert needed is not None
    enough = -(-needed // of)  # the next whole number of so many pictures
    for times, met in ((enough, True), (enough - 1, False)):
        low, high = Rate("", times * hits, times * of).interval
        assert (high <= bound if hits / of < bound else low >= bound) == met
    assert pictures_needed(bound, bound) is None
