"""Gates: parsing, checking, and errors by value."""

import pytest

from trce_cli.errors import BadInput
from trce_cli.evaluate.gates import check_names, parse_gate, value_of


@pytest.mark.parametrize(
    ("text", "value", "met"),
    [
        ("asr.implied<=0.05", 0.05, True),
        ("asr.implied<=0.05", 0.051, False),
        (" asr.implied <= 5% ", 0.05, True),
        ("asr.implied<0.05", 0.05, False),
        ("asr.implied>=0.95", 0.95, True),
        ("asr.implied>0.95", 0.95, False),
        ("asr.implied>=0", None, False),
    ],
)
def test_gate(text: str, value: float | None, met: bool) -> None:
    told = parse_gate(text).check({"asr.implied": value})
    assert (told["value"], told["met"]) == (value, met)


def test_an_interval_is_asked_for_and_how_many_pictures_would_do_is_told() -> None:
    figures = {"asr.implied": 0.0, "asr.implied.low": 0.0, "asr.implied.high": 0.138}
    assert parse_gate("asr.implied.high<=0.2").check(figures) == {
        "gate": "asr.implied.high<=0.2",
        "value": 0.138,
        "met": True,
        "needed": None,
    }
    assert parse_gate("asr.implied.high<=0.05").check(figures)["needed"] == 73
    assert parse_gate("asr.implied.low>=0.5").check(figures)["needed"] is None  # more of them do not help
    assert parse_gate("asr.implied>=0.5").check(figures)["needed"] is None  # nor is it a bound
    kept = {"benign.kept": 1.0, "benign.kept.low": 0.86, "benign.kept.high": 1.0}
    assert parse_gate("benign.kept.low>=95%").check(kept)["needed"] == 73


@pytest.mark.parametrize(
    "text", ["", "asr.implied", "asr.implied=0.1", "<=0.1", "a<=b", "a<=nan", "a<=1e", "a<=0..1"]
)
def test_what_is_no_gate_is_refused(text: str) -> None:
    with pytest.raises(BadInput, match="FIGURE<=NUMBER"):
        parse_gate(text)


@pytest.mark.parametrize(
    "text", ["asr.implied<=5", "benign.kept>=95", "asr.a<0", "benign.kept>1", "a.b<=-1%"]
)
def test_a_bound_that_no_share_has_is_refused(text: str) -> None:
    with pytest.raises(BadInput, match="between 0 and 1") as caught:
        parse_gate(text)
    assert "%" in str(caught.value.hint)
    assert parse_gate("benign.frechet<=20").bound == 20
    assert parse_gate("benign.clip_score>25").bound == 25


def test_how_many_pictures_it_takes_at_least_is_known_before() -> None:
    assert parse_gate("asr.implied.high<=5%").needed_at_best() == 73
    assert parse_gate("benign.kept.low>=0.95").needed_at_best() == 73
    assert parse_gate("asr.implied<=5%").needed_at_best() == 1


def test_unknown_figure_is_refused_with_a_guess() -> None:
    check_names([parse_gate("asr.a[clip:/x/all@0.5]<=0.1")], ["asr.a[clip:/x/all@0.5]"])
    with pytest.raises(BadInput) as caught:
        check_names([parse_gate("asr.impled<=0.1")], ["asr.implied", "benign.kept"])
    assert "asr.impled" in caught.value.message
    assert "Did you mean asr.implied?" in str(caught.value.hint)


@pytest.mark.parametrize(
    ("name", "value", "shown"),
    [
        ("asr.implied", 0.05, "5.0 %"),
        ("asr.implied[judge@0.5].high", 0.051, "5.1 %"),
        ("benign.clip_score", 21.5, "21.50"),
        ("benign.frechet_real", 3.25, "3.25"),
        ("benign.kept", None, "undefined"),
    ],
)
def test_a_gate_shows_its_figure_as_what_it_is(name: str, value: float | None, shown: str) -> None:
    assert value_of({"gate": f"{name}<=0.05", "value": value}) == shown
