"""`--dry-run` of every command: a plan with time, memory and disk, and nothing written."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

PRESET = """
name = "blades"
description = "Blades"
kind = "object"
concepts = [{ unsafe = "a knife", safe = "a tulip" }]
[steer]
steps = 4
trajectories_per_concept = 2
unconditional = 8
benign = 8
max_steps = 2
"""
FEW = ("-p", "emoji-weapons", "--count", "1", "--steps", "5", "--suite", "explicit")
COMMANDS = {
    "generate": ("generate", "TINY", "a knife", "--steps", "6"),
    "map": ("map", "TINY", "-p", "blades.toml"),
    "apply": ("apply", "blades.safetensors", "TINY"),
    "steer": ("steer", "TINY", "-p", "blades.toml"),
    "evaluate": ("evaluate", "emoji", "--against", "emoji", *FEW),
    "tune": ("tune", "emoji", "--trials", "3", *FEW),
    "attack": ("attack", "emoji", "--against", "emoji", *FEW),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_plan_tells_and_writes_nothing(
    trce: Callable[..., Any], tiny_sd1: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("blades.toml").write_text(PRESET)
    if name == "apply":
        made = ("-p", "blades.toml", "--word-prompts", 50, "--max-collateral", 9, "-o", "blades.safetensors")
        assert trce("map", tiny_sd1, *made, "--as", "map").status == 0
    words = [str(tiny_sd1) if word == "TINY" else word for word in COMMANDS[name]]
    output = "suite.csv" if name == "attack" else "out"
    before = sorted(tmp_path.rglob("*"))
    outcome = trce(*words, "-o", output, "--dry-run", "--json")
    assert outcome.status == 0, outcome.err
    assert "Nothing was written" in outcome.err
    told = json.loads(outcome.out)
    assert told["dry_run"] is True
    assert told["estimated_seconds"] > 0
    assert told["memory_bytes"] > 0
    assert 0 <= told["disk_bytes"] < told["free_disk_bytes"]
    assert sorted(tmp_path.rglob("*")) == before
