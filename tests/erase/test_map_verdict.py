"""Verdicts on the guards of a map, by limits that pictures gave."""

import pytest

from trce_cli.erase.map_verdict import judge, overall, recorded, refuse_collateral, value_of
from trce_cli.errors import TrceError
from trce_cli.maths.verdict import Limits


def figures(change: float, **others: float) -> dict[str, object]:
    doors = {"keys": {"mean": change / 2, "max": 9.0}, "values": {"mean": change, "max": 9.0}}
    return {"canary_change": doors, **others}


def test_a_change_by_door_counts_as_the_largest_mean() -> None:
    assert value_of(figures(0.25)["canary_change"]) == 0.25
    assert value_of(0.4) == 0.4


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("moved", {0.84: "good", 0.59: "weak", 0.4: "bad"}),
        ("norm", {16: "good", 100: "weak", 622: "bad"}),
        ("word_change", {0.25: "good", 0.39: "weak", 0.87: "bad"}),
    ],
)
def test_verdicts_are_those_of_the_limits_and_say_what_they_mean(name: str, values: dict[float, str]) -> None:
    told = [judge({name: value})[name] for value in values]
    assert [each["verdict"] for each in told] == [*values.values()]
    assert len({each["sentence"] for each in told}) == 3
    assert judge({}) == {}


def test_one_sentence_says_what_all_guards_mean() -> None:
    fine = {"moved": 0.9, "padding_moved": 0.8, "norm": 9, **figures(0.1)}
    assert overall(judge(fine)) == (
        "good",
        "Good: what is to be erased should be gone, and everything else is hardly touched.",
    )
    word, sentence = overall(judge(fine | {"padding_moved": 0.1, "norm": 600})) or ("", "")
    assert word == "bad"
    assert "will still be drawn, but everything else" in sentence
    assert "raise --ridge" in sentence
    pooled = {**fine, "pooled": {"cosine_to_safe": {}, "moved": 0.6, "canary_change": 0.1}}
    assert (overall(judge(pooled)) or ("", ""))[0] == "weak"
    assert (overall(judge(figures(0.6))) or ("", ""))[1] == "Bad: everything else is lost."
    assert overall({}) is None


def test_verdicts_on_record_are_read_and_others_left_alone() -> None:
    told = judge({"moved": 0.6})
    steer = {"edit": "steer", "figures": {}}
    assert recorded([{"edit": "map", "figures": {"verdicts": told}}, steer])["moved"]["verdict"] == "weak"
    foreign: list[object] = [{}, {"verdicts": 1}, {"verdicts": {"moved": {"verdict": "fine"}}}]
    assert all(recorded([{"edit": "map", "figures": figures}]) == {} for figures in foreign)
    assert recorded([steer]) == {}


def test_how_far_targets_have_to_be_moved_a_family_may_say() -> None:
    told = judge(
        {"moved": 0.6, "norm": 16.0, "pooled": {"cosine_to_safe": {}, "moved": 0.4}}, Limits(0.5, 0.3)
    )
    assert {name: each["verdict"] for name, each in told.items()} == {
        "moved": "good", "norm": "good", "pooled.moved": "weak",
    }  # fmt: skip


def test_ruin_is_refused_and_too_few_captions_are_named() -> None:
    refuse_collateral(figures(0.5), 0.5)
    with pytest.raises(TrceError, match=r"103%.*--max-collateral of 50%.*only 2 captions") as refusal:
        refuse_collateral(figures(1.03, captions=2), 0.5)
    assert "--prior" in str(refusal.value.hint)
    with pytest.raises(TrceError, match="words of the vocabulary") as refusal:
        refuse_collateral({**figures(0.1, captions=3000), "word_change": 0.6}, 0.5)
    assert "only" not in refusal.value.message
    with pytest.raises(TrceError):
        refuse_collateral(figures(float("nan")), 0.5)
