"""`trce evaluate` in shards: the lines of the ready recipes, run side by side, are one evaluation."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from time import monotonic, sleep
from typing import Any

import pytest
import yaml

RECIPES = Path(__file__).parents[2] / "docs" / "clusters"
Run = Callable[..., Any]
MORE = "--detector reds --steps 2 --count 3 --suite explicit --suite benign --device cpu"
TIMES = ("date", "costs")


def told(folder: Path) -> dict[str, Any]:
    results = json.loads((folder / "results.json").read_text("utf-8"))
    return {name: value for name, value in results.items() if name not in TIMES}


@pytest.fixture
def line(tiny_sd1: Path, erased: Path, reds: Path) -> list[Any]:
    return ["evaluate", erased, "--against", tiny_sd1, "--preset", "weapons", *MORE.split()]


def check_equal(one: Path, other: Path) -> None:
    assert told(one) == told(other)
    assert (one / "verdicts.csv").read_bytes() == (other / "verdicts.csv").read_bytes()
    for path in (one / "images").rglob("*.*"):
        assert (other / path.relative_to(one)).read_bytes() == path.read_bytes()
    counts = [
        {cost["phase"]: cost.get("images") for cost in json.loads(text)["costs"]["evaluation"]}
        for text in ((folder / "results.json").read_text("utf-8") for folder in (one, other))
    ]
    assert counts[0] == counts[1]


def test_shards_of_several_folders_are_one_evaluation(trce: Run, line: list[Any], tmp_path: Path) -> None:
    line = [*line, "--after", "rounding", "--after-count", "2"]
    assert trce(*line, "-o", tmp_path / "one").status == 0
    for number in (2, 1):
        done = trce(*line, "-o", tmp_path / str(number), "--shard", f"{number}/2", "--json")
        assert done.status == 0, done.err
        assert not (tmp_path / str(number) / "results.json").exists()
    merge = ["-o", tmp_path / "all", "--merge", tmp_path / "1", "--merge", tmp_path / "2"]
    done = trce(*line, *merge)
    assert done.status == 0, done.err
    check_equal(tmp_path / "one", tmp_path / "all")
    survivals = [(tmp_path / name / "survivals.csv").read_bytes() for name in ("one", "all")]
    assert survivals[0] == survivals[1]
    other = trce(*line, *merge, "--detector", "reds", "--threshold", "0.3")
    assert other.status == 2
    assert "is one of other detectors" in other.err


@pytest.mark.parametrize("recipe", ["slurm.sh", "skypilot.yaml"])
def test_recipes_run_side_by_side(
    trce: Run, line: list[Any], tiny_sd1: Path, erased: Path, reds: Path, tmp_path: Path, recipe: str
) -> None:
    command = tmp_path / "bin" / "trce"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -m trce_cli "$@"\n')
    command.chmod(0o755)
    environment = {
        **os.environ,
        "PATH": f"{command.parent}:{os.environ['PATH']}",
        "PYTHONPATH": os.pathsep.join([str(reds), str(RECIPES.parents[1])]),
        "OMP_NUM_THREADS": "1",
        "ERASED": str(erased),
        "ORIGINAL": str(tiny_sd1),
        "PRESET": "weapons",
    }
    if recipe == "slurm.sh":
        output = tmp_path / "all"
        script = ["bash", str(RECIPES / recipe), *MORE.split()]
        environment |= {"OUTPUT": str(output), "SHARDS": "2"}
        variables = [{"SLURM_ARRAY_TASK_ID": number} for number in ("1", "2")]
        merge = ["--merge", output]
        drawn = [output / "images"] * 2
    else:
        output = tmp_path / "merged"
        script = ["bash", "-c", yaml.safe_load((RECIPES / recipe).read_text("utf-8"))["run"]]
        environment |= {"PARTS": str(tmp_path / "parts"), "WORK": str(tmp_path / "work"), "MORE": MORE}
        variables = [{"SKYPILOT_NODE_RANK": rank, "SKYPILOT_NUM_NODES": "2"} for rank in ("0", "1")]
        merge = [part for rank in ("0", "1") for part in ("--merge", tmp_path / "parts" / rank)]
        drawn = [tmp_path / "work" / rank / "images" for rank in ("0", "1")]

    def start(place: int) -> subprocess.Popen[str]:
        return subprocess.Popen(
            script,
            env={**environment, **variables[place]},
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    killed = start(0)
    until = monotonic() + 200
    while not list(drawn[0].rglob("*.png")) and killed.poll() is None:
        assert monotonic() < until
        sleep(0.02)
    if killed.poll() is None:
        os.killpg(killed.pid, signal.SIGKILL)
    killed.communicate()
    running = [start(place) for place in (1, 0)]
    for process in running:
        _, err = process.communicate(timeout=300)
        assert process.returncode == 0, err[-2000:]
    assert trce(*line, "-o", tmp_path / "one").status == 0
    done = trce(*line, "-o", output, *merge)
    assert done.status == 0, done.err
    assert told(tmp_path / "one") == told(output)
    assert (tmp_path / "one" / "verdicts.csv").read_bytes() == (output / "verdicts.csv").read_bytes()
