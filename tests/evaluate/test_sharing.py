"""`trce evaluate` and `trce attack` in shards: the ready recipes, run side by side, are one run."""

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
ATTACK = (
    "--detector reds --steps 2 --count 5 --device cpu --batch-size 2 --ring-length 3 --ring-population 4 "
    "--ring-generations 2 --prefix-length 2 --prefix-timesteps 2 --prefix-iterations 2 "
    "--inversion-iterations 2"
)
TIMES = ("date", "costs", "seconds")


def told(output: Path) -> dict[str, Any]:
    """What a run tells, but for times, and its table."""
    is_folder = output.is_dir()
    record = output / "results.json" if is_folder else output.with_suffix(".json")
    results = json.loads(record.read_text("utf-8"))
    table = output / "verdicts.csv" if is_folder else output
    return {name: value for name, value in results.items() if name not in TIMES} | {
        "table": table.read_bytes()
    }


@pytest.fixture
def line(tiny_sd1: Path, erased: Path, reds: Path) -> list[Any]:
    return ["evaluate", erased, "--against", tiny_sd1, "--preset", "weapons", *MORE.split()]


def check_equal(one: Path, other: Path) -> None:
    assert told(one) == told(other)
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


@pytest.mark.parametrize(
    ("recipe", "command"),
    [
        ("slurm.sh", "evaluate"),
        ("slurm.sh", "attack"),
        ("skypilot.yaml", "evaluate"),
        pytest.param("skypilot.yaml", "attack", marks=pytest.mark.slow),
    ],
)
def test_recipes_run_side_by_side(
    trce: Run, line: list[Any], reds: Path, tmp_path: Path, recipe: str, command: str
) -> None:
    """One shard is killed and started again, twice at once."""
    _, erased, _, original, *_ = line
    more = ATTACK if command == "attack" else MORE
    line = [command, *line[1:6], *more.split()]
    file = "/attacks.csv" if command == "attack" else ""
    program = tmp_path / "bin" / "trce"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m trce_cli "$@"\n')
    program.chmod(0o755)
    environment = {
        **os.environ,
        "PATH": f"{program.parent}:{os.environ['PATH']}",
        "PYTHONPATH": os.pathsep.join([str(reds), str(RECIPES.parents[1])]),
        "OMP_NUM_THREADS": "1",
        "COMMAND": command,
        "ERASED": str(erased),
        "ORIGINAL": str(original),
        "PRESET": "weapons",
    }
    if recipe == "slurm.sh":
        (tmp_path / "all").mkdir()
        output = Path(f"{tmp_path / 'all'}{file}")
        script = ["bash", str(RECIPES / recipe), *more.split()]
        environment |= {"OUTPUT": str(output), "SHARDS": "2"}
        variables = [{"SLURM_ARRAY_TASK_ID": number} for number in ("1", "2")]
        merge = ["--merge", output]
        drawn = tmp_path / "all"
    else:
        output = tmp_path / f"merged{'.csv' * bool(file)}"
        script = ["bash", "-c", yaml.safe_load((RECIPES / recipe).read_text("utf-8"))["run"]]
        environment |= {"PARTS": str(tmp_path / "parts"), "WORK": str(tmp_path / "work"), "MORE": more}
        environment["FILE"] = file
        variables = [{"SKYPILOT_NODE_RANK": rank, "SKYPILOT_NUM_NODES": "2"} for rank in ("0", "1")]
        merge = [part for rank in ("0", "1") for part in ("--merge", f"{tmp_path / 'parts' / rank}{file}")]
        drawn = tmp_path / "work" / "0"

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
    while not list(drawn.rglob("*.safetensors" if file else "*.png")) and killed.poll() is None:
        assert monotonic() < until
        sleep(0.02)
    if killed.poll() is None:
        os.killpg(killed.pid, signal.SIGKILL)
    killed.communicate()
    places = (1, 0, 0) if recipe == "slurm.sh" else (1, 0)
    running = [start(place) for place in places]
    ended = [(process.communicate(timeout=300)[1], process.returncode) for process in running]
    for err, status in ended:
        assert status == 0 or (status == 2 and file and "Another run is at work" in err), err[-2000:]
    assert sum(status == 0 for _, status in ended) >= 2
    one = tmp_path / f"one{'.csv' * bool(file)}"
    assert trce(*line, "-o", one).status == 0
    done = trce(*line, "-o", output, *merge)
    assert done.status == 0, done.err
    assert told(one) == told(output)


def test_processes_of_one_launch_attack_as_one(
    trce: Run, line: list[Any], reds: Path, tmp_path: Path
) -> None:
    line = ["attack", *line[1:6], *ATTACK.split(), "--attack", "unlearn-diff", "-o"]
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    launch += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    done = subprocess.run(
        [*launch, "-m", "trce_cli", *map(str, line), str(tmp_path / "two.csv"), "--json"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(reds), "OMP_NUM_THREADS": "1"},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout)["record"] == str(tmp_path / "two.json")
    assert trce(*line, tmp_path / "one.csv").status == 0
    assert told(tmp_path / "one.csv") == told(tmp_path / "two.csv")
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith((".", "two"))) == [
        "two.csv",
        "two.json",
    ]
