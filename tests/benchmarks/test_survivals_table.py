"""The tables of `benchmarks/survivals.py`, of results as `trce evaluate` writes them."""

import json
from pathlib import Path
from typing import Any

import pytest

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


def test_no_two_folders_of_the_table_are_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []

    def run(command: str, *words: str) -> None:
        output = Path(words[words.index("-o") + 1])
        output.mkdir()  # fails where another command's lies
        if command == "evaluate":
            (output / "results.json").write_text(json.dumps(results()))
        made.append(output.name)

    monkeypatch.setattr(survivals, "run", run)
    for part in survivals.PARTS:
        for row in survivals.ROWS:
            survivals.measured(row, part, tmp_path, 40, 10)
    assert len(made) == len(set(made)) == len(survivals.ROWS) * (len(survivals.PARTS) + 1)
