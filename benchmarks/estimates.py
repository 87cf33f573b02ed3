"""How near the times are that `--dry-run` tells, command by command, on the embedded checkpoint.

``python benchmarks/estimates.py`` asks each command for its plan and then runs it, one after the other, and
prints a Markdown table. Both are in seconds of processor time on one thread, so that what else the machine
does does not count: in the plan's process the clock that trials are measured by is the one of the process.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Final

# Concepts of `emoji-weapons` with a training that takes a minute.
PRESET: Final = """
name = "weapons"
description = "Weapons"
kind = "object"
includes = ["emoji-weapons"]
[steer]
steps = 8
early_steps = 4
trajectories_per_concept = 2
unconditional = 16
benign = 16
max_steps = 20
"""
# Steps of one recipe: an edit, pictures and figures.
RECIPE: Final = """
base = "emoji"
presets = ["emoji-weapons"]
output = "recipe"
[map]
[generate]
prompt = ["a gun", "a cat"]
[evaluate]
count = 2
"""
_JUDGED: Final = ("--against", "emoji", "-p", "emoji-weapons")
RUNS: Final = {
    "map": ("map", "emoji", "-p", "emoji-weapons", "-o", "mapped", "--as", "diffusers", "--as", "map"),
    "apply": ("apply", "mapped.map.safetensors", "emoji", "-o", "applied"),
    "generate": ("generate", "mapped", "a gun", "a cat", "-n", "6", "--compare", "emoji", "-o", "images"),
    "evaluate": ("evaluate", "mapped", *_JUDGED, "--count", "6", "-o", "evaluation"),
    "tune": ("tune", "emoji", "-p", "emoji-weapons", "--trials", "2", "--count", "4", "-o", "tuning"),
    "attack": ("attack", "mapped", *_JUDGED, "--count", "1", "-o", "attacks.csv"),
    "steer": ("steer", "mapped", "-p", "weapons.toml", "--max-drift", "1", "-o", "erased"),
    "run": ("run", "recipe.toml"),
}
# The libraries that time by themselves are imported before the clock is put in their place.
_PLAN: Final = (
    "import asyncio, queue, threading, time; time.monotonic = time.process_time; "
    "import sys; from trce_cli.__main__ import main; sys.exit(main())"
)


def processor_seconds(words: Sequence[str], folder: Path, told: Path | None = None) -> float:
    """What a process takes of the processor; what it prints goes to `told`, and else nowhere."""
    with (told or Path(os.devnull)).open("w") as stdout:
        line = [sys.executable, *words]
        process = subprocess.Popen(line, cwd=folder, stdout=stdout, stderr=subprocess.DEVNULL)
        _, status, used = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(words)} failed.")
    return used.ru_utime + used.ru_stime


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--commands", nargs="+", choices=RUNS, default=list(RUNS), help="map is always run")
    asked = {"map", *parser.parse_args().commands}
    root = Path(__file__).parents[1]
    os.environ |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}
    print("| command | estimate, s | took, s | estimate / took |\n|---|---:|---:|---:|", flush=True)
    with tempfile.TemporaryDirectory() as place:
        folder, plan = Path(place), Path(place, "plan.json")
        os.environ["TRCE_CACHE"] = str(folder / "cache")
        (folder / "weapons.toml").write_text(PRESET)
        (folder / "recipe.toml").write_text(RECIPE)
        for name, words in RUNS.items():
            if name in asked:
                processor_seconds(["-c", _PLAN, *words, "--dry-run", "--json"], folder, plan)
                estimate = json.loads(plan.read_text())["estimated_seconds"]
                took = processor_seconds(["-m", "trce_cli", *words], folder)
                print(f"| `trce {name}` | {estimate:.1f} | {took:.1f} | {estimate / took:.2f} |", flush=True)


if __name__ == "__main__":
    main()
