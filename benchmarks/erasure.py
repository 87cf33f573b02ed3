"""The table that this project stands on: what each stage erases from the embedded checkpoint, what it keeps.

``python benchmarks/erasure.py`` makes every checkpoint in ``--work``, draws the suites with equal seeds,
lets the judge look, and prints a Markdown table; ``--readme`` also writes it between that file's markers.
A row that is there already is not measured again. This is the embedded checkpoint, not Stable Diffusion.
"""

import argparse
import json
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from trce_cli.checkpoint import open_checkpoint
from trce_cli.emoji.measure import Eye, as_json, erasure
from trce_cli.emoji.world import WEAPONS
from trce_cli.metrics import Rate

PRESET = "emoji-weapons"
NEGATIVE = "gun, knife, dagger, sword, bomb, axe, bow, dynamite"
MARKERS = ("<!-- erasure table -->", "<!-- end of erasure table -->")


@dataclass(frozen=True)
class Row:
    """One checkpoint: what makes it from which other, and the negative prompt that it is drawn with."""

    name: str
    source: str = "emoji"
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
    "eot": Row("map, first EoT only", command=("map", "--token-weights", "0,1,0,0")),
    "map": Row("stage 1: map, as shipped", command=("map",)),
    "steer": Row("stage 2 alone: steer", command=("steer",)),
    "both": Row("both stages", source="map", command=("steer",)),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("rows", nargs="*", default=list(ROWS), metavar="ROW", help=f"from {', '.join(ROWS)}")
    parser.add_argument(
        "--work", type=Path, default=Path("build/erasure"), help="folder for checkpoints and figures"
    )
    parser.add_argument("--count", type=int, default=200, help="pictures a suite")
    parser.add_argument("--seed", type=int, default=0, help="of the suites and of the first picture")
    parser.add_argument("--readme", type=Path, help="file to write the table into, between its markers")
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    lines = [
        "| | explicit | implied | context | context kept | benign kept | clean class seen instead |",
        "|---|---|---|---|---|---|---|",
    ]
    for key in arguments.rows:
        lines.append(line(ROWS[key].name, measured(key, arguments.work, arguments.count, arguments.seed)))
        print(lines[-1], flush=True)
    table = "\n".join(lines)
    print(table)
    if arguments.readme:
        start, end = MARKERS
        text = arguments.readme.read_text("utf-8")
        written = re.sub(f"{start}.*{end}", lambda _: f"{start}\n{table}\n{end}", text, flags=re.DOTALL)
        arguments.readme.write_text(written, "utf-8")


def make(key: str, work: Path) -> str:
    """The checkpoint of a row, made where it is not there yet; returns its name or path."""
    row = ROWS[key]
    if not row.command:
        return row.source
    output = work / key
    if not output.exists():
        source = row.source if row.source == "emoji" else make(row.source, work)
        command, *options = row.command
        extra = ["--teacher", "emoji"] if command == "steer" else []
        arguments = [command, source, "--preset", PRESET, "--output", str(output), *extra, *options]
        subprocess.run([sys.executable, "-m", "trce_cli", *arguments], check=True)
    return str(output)


def measured(key: str, work: Path, count: int, seed: int) -> list[Rate]:
    """The rates of a row, from its file where they were measured before."""
    file = work / f"{key}-{count}-{seed}.json"
    if not file.exists():
        row = ROWS[key]
        eye = Eye(open_checkpoint(make(key, work)), torch.device("cpu"), seed, row.negative_prompt)
        file.write_text(json.dumps(as_json(list(erasure(eye, WEAPONS, count, seed)))))
    return [Rate(entry["name"], entry["hits"], entry["total"]) for entry in json.loads(file.read_text())]


def line(name: str, rates: Sequence[Rate]) -> str:
    """A row of the table: attack success, preservation, and whether something clean came instead."""
    by_name = {rate.name: rate for rate in rates}
    cells = [by_name[f"{suite}: unsafe visible"] for suite in ("explicit", "implied", "context")]
    cells += [
        by_name["context: kept"],
        by_name["benign: kept"],
        by_name["explicit: something benign visible"],
    ]
    return f"| {name} | " + " | ".join(cell(rate) for rate in cells) + " |"


def cell(rate: Rate) -> str:
    low, high = rate.interval
    return f"{rate.share:.1%} ({100 * low:.1f} to {100 * high:.1f})"


if __name__ == "__main__":
    main()
