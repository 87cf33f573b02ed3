"""What of an erasure survives release: `trce evaluate --after` of the embedded checkpoint, as tables.

``python benchmarks/survivals.py`` makes the checkpoints in ``--work`` with the shipped settings, asks the
suites again after each treatment, and prints a Markdown table a part. What is there already is not measured
again, so a stopped run goes on; another count or number of steps needs another ``--work``. ``--rows map
--parts pictures`` is a part of it. None of it is Stable Diffusion.
"""

import argparse
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from benchmarks.erasure import PRESET, run
from trce_cli.prompts.suites import BUILT_IN


@dataclass(frozen=True)
class Part:
    """Treatments, the suites that are asked after each, and what else `trce evaluate` is given."""

    suites: tuple[str, ...]
    treatments: tuple[str, ...] = ()
    options: tuple[str, ...] = ()


PARTS: Final = {
    "weights": Part(BUILT_IN, ("rounding", "merging")),
    "fine-tuning": Part(("explicit", "benign"), ("fine-tuning", "fine-tuning-lora")),
    "relearning": Part(("explicit", "benign"), ("relearning", "relearning-lora")),
    "pictures": Part(
        ("explicit",),
        ("completion", "image-to-image", "image-to-image-empty", "inpainting", "inpainting-empty"),
    ),
    "clip-skip": Part(BUILT_IN, options=("--clip-skip", "2")),
}
# Each with what it is made from, and by which command.
ROWS: Final = {
    "map": ("emoji", ("map",)),
    "both": ("map", ("steer",)),
    "map-clip-skip": ("emoji", ("map", "--clip-skip", "2")),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=["map", "both"])
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--work", type=Path, default=Path("build/survivals"), help="where all is kept")
    parser.add_argument("--count", type=int, default=40, help="pictures a cell")
    parser.add_argument("--steps", type=int, default=10, help="DDIM steps")
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    for part in arguments.parts:
        for row in arguments.rows:
            results = measured(row, part, arguments.work, arguments.count, arguments.steps)
            print("\n".join(["", *table(row, results)]), flush=True)


def checkpoint(row: str, work: Path) -> str:
    """The path of a row's checkpoint, made where it is not there yet."""
    if row not in ROWS:
        return row  # the original's name
    source, (command, *options) = ROWS[row]
    if not (work / row).exists():
        run(command, checkpoint(source, work), "-p", PRESET, "-o", str(work / row), *options)
    return str(work / row)


def measured(row: str, part: str, work: Path, count: int, steps: int) -> dict[str, Any]:
    """The results of a row after the treatments of a part, measured where they are not there yet."""
    output, asked = work / f"{part}-of-{row}", PARTS[part]
    if not (output / "results.json").exists():
        words = ["evaluate", checkpoint(row, work), "--against", "emoji", "-p", PRESET, "-o", str(output)]
        words += [word for suite in asked.suites for word in ("--suite", suite)]
        words += [word for treatment in asked.treatments for word in ("--after", treatment)]
        words += ["--count", str(count), "--after-count", str(count), "--steps", str(steps), *asked.options]
        # What another part drew of the same prompts with the same settings, the row's own before others'.
        drawn = [file.parent for file in sorted(work.glob("*/results.json"))]
        drawn.sort(key=lambda folder: not folder.name.endswith(f"-of-{row}"))
        words += ["--reuse", str(drawn[0])] if drawn else []
        run(*words)
    found: dict[str, Any] = json.loads((output / "results.json").read_text("utf-8"))
    return found


def table(row: str, results: Mapping[str, Any]) -> list[str]:
    """The states of a row: what is shown of suites that ask for it, what is kept of those that do not."""
    suites = [(suite["name"], suite["role"]) for suite in results["suites"]]
    heads = [f"{name} {'kept' if role == 'benign' else 'shown'}" for name, role in suites]
    lines = [f"| `{row}` | {' | '.join(heads)} |", "| --- |" + " ---: |" * len(heads)]
    before = [
        suite["kept"]["kept"] if suite["role"] == "benign" else suite["asr"][0]["erased"]
        for suite in results["suites"]
    ]
    lines.append(f"| untreated | {' | '.join(map(cell, before))} |")
    for state in results["survivals"]:
        cells = []
        for suite in state["suites"]:
            told = suite["kept"] if suite["role"] == "benign" else suite["asr"][0]
            is_sure = told["change"]["p_value"] < 0.05
            cells.append(cell(told["treated"]) + (f", p {told['change']['p_value']:.2g}" if is_sure else ""))
        lines.append(f"| {state['state']} | {' | '.join(cells)} |")
    return [*lines, "", *(told["sentence"] for told in results["returns"])]


def cell(rate: Mapping[str, Any]) -> str:
    """A share in per cent with its Wilson 95 % interval."""
    return f"{rate['share']:.1%} ({100 * rate['low']:.0f} to {100 * rate['high']:.0f})"


if __name__ == "__main__":
    main()
