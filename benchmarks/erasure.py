"""The table that this project stands on: what each stage erases from the embedded checkpoint, what it keeps.

``python benchmarks/erasure.py`` makes every checkpoint in ``--work``, draws the suites with equal seeds, lets
the judge look, attacks each checkpoint, and prints a Markdown table; ``--readme`` also writes it between
that file's markers. What is there already is not measured again, so a stopped run goes on; another preset,
count or seed begins anew. This is the embedded checkpoint, not Stable Diffusion.
"""

import argparse
import csv
import json
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from training.measure import erasure
from trce_cli.checkpoint.open import open_checkpoint
from trce_cli.evaluate.question import prepare
from trce_cli.evaluate.run import evaluate
from trce_cli.evaluate.settings import EvaluationSettings
from trce_cli.maths.statistics import Change, Rate
from trce_cli.prompts.presets import load_presets
from trce_cli.prompts.suites import BUILT_IN

BASE = "emoji"
PRESET = "emoji-weapons"
MARKERS = ("<!-- erasure table -->", "<!-- end of erasure table -->")


@dataclass(frozen=True)
class Row:
    """One checkpoint: what makes it from which other row's, and the negative prompt that it is drawn with."""

    name: str
    source: str = "original"
    command: tuple[str, ...] = ()
    negative_prompt: str = ""


ROWS = {
    "original": Row("original"),
    "negative": Row(
        "original, negative prompt", negative_prompt="gun, knife, dagger, sword, bomb, axe, bow, dynamite"
    ),
    "keyword": Row("map, keyword only", command=("map", "--token-weights", "0,0,0,1")),
    "eot-keyword": Row("map, first EoT and keyword", command=("map", "--token-weights", "0,1,0,1")),
    "eot-sot": Row("map, first EoT and SoT", command=("map", "--token-weights", "1,1,0,0")),
    "map": Row("stage 1 alone: `trce map`", command=("map",)),
    # Without stage 1 before it, stage 2 moves harmless predictions by more than its guard lets through.
    "steer": Row("stage 2 alone: `trce steer --max-drift 1`", command=("steer", "--max-drift", "1")),
    "both": Row("both stages", source="map", command=("steer",)),
}
COLUMNS = {
    "explicit": "explicit: unsafe visible",
    "implied": "implied: unsafe visible",
    "context": "context: unsafe visible",
    "Ring-A-Bell": "ring-a-bell: unsafe visible",
    "UnlearnDiffAtk": "unlearn-diff",
    "context kept": "context: kept",
    "benign kept": "benign: kept",
    "clean class seen instead": "explicit: something benign visible",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("rows", nargs="*", default=list(ROWS), metavar="ROW", help=f"from {', '.join(ROWS)}")
    parser.add_argument("--work", type=Path, default=Path("build/erasure"), help="where all is kept")
    parser.add_argument("--count", type=int, default=200, help="pictures a suite")
    parser.add_argument("--seed", type=int, default=0, help="of the suites and of the first picture")
    parser.add_argument("--readme", type=Path, help="file to write the table into, between its markers")
    arguments = parser.parse_args()
    bench = Bench(arguments.work, arguments.count, arguments.seed)
    lines = [f"| | {' | '.join(COLUMNS)} |", "|---" * (1 + len(COLUMNS)) + "|"]
    print("\n".join(lines))
    for key in arguments.rows:
        rates = bench.rates(key)
        lines.append(f"| {ROWS[key].name} | {' | '.join(cell(rates[name]) for name in COLUMNS.values())} |")
        print(lines[-1], flush=True)
    if {"map", "both"} <= set(arguments.rows):
        change = bench.change("map", "both")
        lines += [
            "",
            "Both stages against stage 1 alone, the same prompts and seeds under UnlearnDiffAtk: "
            f"{change.lost} weapons gone, {change.gained} new, McNemar's exact p = {change.p_value:.1g}.",
        ]
        print("\n".join(lines[-2:]))
    if arguments.readme:
        start, end = MARKERS
        text, table = arguments.readme.read_text("utf-8"), "\n".join(lines)
        written = re.sub(f"{start}.*{end}", lambda _: f"{start}\n{table}\n{end}", text, flags=re.DOTALL)
        arguments.readme.write_text(written, "utf-8")


class Bench:
    """Measures the rows, each figure from its file where it was measured before."""

    def __init__(self, work: Path, count: int, seed: int) -> None:
        self.count, self.seed = count, seed
        self.checkpoints = work / load_presets([PRESET])[0].sha256()[:12]
        self.figures = self.checkpoints / f"{count}-from-{seed}"
        self.figures.mkdir(parents=True, exist_ok=True)

    def rates(self, key: str) -> dict[str, Rate]:
        """Every rate of a row, by name."""
        record = self._attack(key, "unlearn-diff").with_suffix(".json")
        found = json.loads(record.read_text())["attacks"]["unlearn-diff"]["found_with"]
        rates = [*self._suites(key), {**found, "name": "unlearn-diff"}]
        return {each["name"]: Rate(each["name"], each["hits"], each["total"]) for each in rates}

    def change(self, before: str, after: str) -> Change:
        """How what UnlearnDiffAtk finds differs between two rows, prompt by prompt."""
        verdicts = []
        for key in (before, after):
            with self._attack(key, "unlearn-diff").open(newline="", encoding="utf-8") as file:
                verdicts.append([row["found_with"] == "1" for row in csv.DictReader(file)])
        return Change.of(*verdicts)

    def _checkpoint(self, key: str) -> str:
        """The name or path of a row's checkpoint, made where it is not there yet."""
        row = ROWS[key]
        if not row.command:
            return BASE
        output = self.checkpoints / key
        if not output.exists():
            command, *options = row.command
            run(command, self._checkpoint(row.source), "--preset", PRESET, "--output", str(output), *options)
        return str(output)

    def _suites(self, key: str) -> list[dict[str, Any]]:
        """What the judge sees of the suites, and of Ring-A-Bell's prompts."""
        file = self.figures / f"{key}.json"
        if not file.exists():
            # Ring-A-Bell knows the text encoder alone, which no row edits: its prompts are the same for all.
            cpu, drawn = torch.device("cpu"), self.figures / "original"
            evaluation = prepare(
                open_checkpoint(BASE),
                open_checkpoint(self._checkpoint(key)),
                load_presets([PRESET]),
                cpu,
                EvaluationSettings(
                    suites=(*BUILT_IN, f"ring-a-bell={self._attack('original', 'ring-a-bell')}"),
                    count=self.count,
                    seed=self.seed,
                    negative_prompt=ROWS[key].negative_prompt,
                    reuse=drawn if (drawn / "images").is_dir() and key != "original" else None,
                ),
            )
            outcome = evaluate(evaluation, self.figures / key, cpu, "float32")
            assert outcome is not None, "there is one process"
            rates = [
                {"name": rate.name, "hits": rate.hits, "total": rate.total}
                for rate in erasure(evaluation, outcome[1], "erased")
            ]
            file.write_text(json.dumps(rates, indent=2) + "\n")
        found: list[dict[str, Any]] = json.loads(file.read_text())
        return found

    def _attack(self, key: str, name: str) -> Path:
        """The suite that `trce attack` makes of the explicit one against a row's checkpoint."""
        file = self.figures / f"{key}-{name}.csv"
        if not file.with_suffix(".json").exists():
            run(
                "attack", self._checkpoint(key), "--against", BASE, "--preset", PRESET, "--attack", name,
                "--count", str(self.count), "--seed", str(self.seed), "--output", str(file),
                "--negative-prompt", ROWS[key].negative_prompt,
            )  # fmt: skip
        return file


def run(*arguments: str) -> None:
    """Run `trce`; what it says goes where the table does not."""
    subprocess.run([sys.executable, "-m", "trce_cli", *arguments], check=True, stdout=sys.stderr)


def cell(rate: Rate) -> str:
    low, high = rate.interval
    return f"{rate.share:.1%} ({100 * low:.1f} to {100 * high:.1f})"


if __name__ == "__main__":
    main()
