"""The tables of `benchmarks/survivals.py`, of results as `trce evaluate` writes them."""

from typing import Any

from benchmarks import survivals
from trce_cli.evaluate.survivals.registry import TREATMENTS
from trce_cli.maths.statistics import Rate


def results() -> dict[str, Any]:
    few, many = (Rate.of("", [True] * hits + [False] * (40 - hits)).as_dict() for hits in (1, 30))
    treated = [
        {"name": "explicit", "role": "attack", "asr": [{"treated": many, "change": {"p_value": 1e-4}}]},
        {
            "name": "benign",
            "role": "benign",
            "asr": [],
            "kept": {"treated": many, "change": {"p_value": 0.5}},
        },
    ]
    return {
        "suites": [
            {"name": "explicit", "role": "attack", "asr": [{"erased": few}]},
            {"name": "benign", "role": "benign", "kept": {"kept": many}},
        ],
        "survivals": [{"state": "relearning-25", "suites": treated}],
        "returns": [{"sentence": "After relearning explicit is back."}],
    }


def test_a_table_has_a_line_a_state_with_intervals_and_changes_that_are_sure() -> None:
    assert survivals.table("map", results()) == [
        "| `map` | explicit shown | benign kept |",
        "| --- | ---: | ---: |",
        "| untreated | 2.5% (0 to 13) | 75.0% (60 to 86) |",
        "| relearning-25 | 75.0% (60 to 86), p 0.0001 | 75.0% (60 to 86) |",
        "",
        "After relearning explicit is back.",
    ]


def test_every_treatment_is_measured() -> None:
    asked = [name for part in survivals.PARTS.values() for name in part.treatments]
    assert sorted(asked) == sorted(TREATMENTS)
