"""The table that this project stands on: what each stage erases from an embedded checkpoint, what it keeps.

``python benchmarks/erasure.py`` makes every checkpoint in ``--work``, draws the suites with equal seeds, lets
the judge look, attacks each checkpoint, and prints a Markdown table, and then paired tests of every row
against one of them; ``--readme`` also writes both between that file's markers. What is there already is not
measured again, so a stopped run goes on; another preset, count or seed begins anew. ``--rows map both uce
--count 40 --without-attacks`` is a quick look. ``--base emoji-dit`` measures the other embedded checkpoint;
its rows are the slots of a language model, alone and together. None of it is Stable Diffusion or Z-Image.
"""

import argparse
import csv
import json
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.peers import write_peer
from training.measure import judged
from trce_cli.checkpoint.open import open_checkpoint
from trce_cli.evaluate.question import prepare
from trce_cli.evaluate.run import evaluate
from trce_cli.evaluate.settings import EvaluationSettings
from trce_cli.maths.statistics import Change, Rate
from trce_cli.prompts.presets import load_presets
from trce_cli.prompts.suites import BUILT_IN
from trce_cli.system.whole import write_json

MARKERS = ("<!-- erasure table -->", "<!-- end of erasure table -->")


@dataclass(frozen=True)
class Row:
    """One checkpoint: what makes it from which other row's, and the negative prompt that it is drawn with.

    command: of `trce`, with what it is given beside the preset; or `peer` and the eraser's name.
    """

    name: str
    source: str = "original"
    command: tuple[str, ...] = ()
    negative_prompt: str = ""


ORIGINAL = Row("original")
MAP = Row("stage 1 alone: `trce map`", command=("map",))
BOTH = Row("both stages", source="map", command=("steer",))
# The preset goes further, for its own slots.
PLAIN = ("map", "--preserve", "0.3", "--strength", "1", "--deflate", "0")
PAPER = (*PLAIN, "--token-weights", "0,1,0,0", "--ridge", "0", "--word-share", "0")
EMOJI = {
    "original": ORIGINAL,
    "negative": Row(
        "original, negative prompt", negative_prompt="gun, knife, dagger, sword, bomb, axe, bow, dynamite"
    ),
    "keyword": Row("map, keyword only", command=(*PLAIN, "--token-weights", "0,0,0,1")),
    "eot": Row("map, first EoT alone", command=(*PLAIN, "--token-weights", "0,1,0,0")),
    "eot-sot": Row("map, first EoT and SoT", command=(*PLAIN, "--token-weights", "1,1,0,0")),
    "map": MAP,
    # Without stage 1 before it, stage 2 moves harmless predictions by more than its guard lets through.
    "steer": Row("stage 2 alone: `trce steer --max-drift 1`", command=("steer", "--max-drift", "1")),
    "both": BOTH,
    # First EoT alone, captions alone as the prior, no ridge; in stage 2 unconditional states alone.
    "paper-map": Row("stage 1, the paper's settings", command=PAPER),
    "paper-both": Row(
        "both stages, the paper's settings", source="paper-map", command=("steer", "--benign", "0")
    ),
    "uce": Row("UCE", command=("peer", "uce")),
    "rece": Row("RECE", command=("peer", "rece")),
    "speed": Row("SPEED, null space", command=("peer", "speed")),
}
SLOTS = ("END", "SUFFIX", "LAST", "TAIL", "KEYWORD", "END=1,TAIL", "SUFFIX=1,TAIL=1,KEYWORD")
GENTLE = ("steer", "--lr", "3e-5", "--retention", "1000", "--max-steps", "200")
# A slot that carries too little moves targets too little, and one that carries other things ruins them: these
# rows are to show it.
EMOJI_DIT = {
    "original": ORIGINAL,
    "map": MAP,
    # At the preset's learning rate, a U-Net's, harmless predictions move by more than the guard allows.
    "both": Row(f"both stages: `trce {' '.join(GENTLE)}`", source="map", command=GENTLE),
    "both-1e-4": Row("both stages: `trce steer --lr 1e-4`", source="map", command=("steer", "--lr", "1e-4")),
} | {
    slots.replace("=1", "").replace(",", "-").lower(): Row(
        f"map, {slots.replace('=1', '').replace(',', ' and ')}",
        command=("map", "--token-weights", f"{slots}=1", "--max-collateral", "9"),
    )
    for slots in SLOTS
}
ROWS = {"emoji": EMOJI, "emoji-dit": EMOJI_DIT}
PRESET = "emoji-weapons"
COLUMNS = {
    "explicit": "explicit: unsafe visible",
    "implied": "implied: unsafe visible",
    "context": "context: unsafe visible",
    "Ring-A-Bell": "ring-a-bell: unsafe visible",
    "UnlearnDiffAtk": "unlearn-diff",
    "context kept": "context: kept",
    "benign kept": "benign: kept",
    "bystanders kept": "bystanders: kept",
    "clean class seen instead": "explicit: something benign visible",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", default="emoji", choices=list(ROWS), help="the embedded checkpoint")
    rows = {key: None for each in ROWS.values() for key in each}
    parser.add_argument(
        "--rows", nargs="+", choices=list(rows), metavar="ROW",
        help="; ".join(f"{base}: {', '.join(each)}" for base, each in ROWS.items()),
    )  # fmt: skip
    parser.add_argument("--work", type=Path, default=Path("build/erasure"), help="where all is kept")
    parser.add_argument("--count", type=int, default=200, help="pictures a suite")
    parser.add_argument("--seed", type=int, default=0, help="of the suites and of the first picture")
    parser.add_argument("--reference", choices=list(rows), help="that rows are tested against; else the last")
    parser.add_argument(
        "--without-attacks", action="store_true", help="the suites alone, which is most quick"
    )
    parser.add_argument("--readme", type=Path, help="file to write the table into, between its markers")
    arguments = parser.parse_args()
    base = arguments.base
    bench = Bench(base, arguments.work, arguments.count, arguments.seed, not arguments.without_attacks)
    named = arguments.rows or list(ROWS[base])
    if foreign := set(named) - ROWS[base].keys():
        parser.error(f"{', '.join(sorted(foreign))}: not rows of {base}; its are {', '.join(ROWS[base])}")
    lines = head("")
    print("\n".join(lines))
    seen = {}
    for key in named:
        seen[key] = bench.seen(key)
        lines.append(row(bench.rows[key], [cell(seen[key].get(name)) for name in COLUMNS.values()]))
        print(lines[-1], flush=True)
    reference = arguments.reference or ("both" if "both" in seen else named[-1])
    others = [key for key in seen if key != reference]
    if reference in seen and others:
        tests = [
            "",
            f"The same prompts and seeds, against {bench.rows[reference].name}: in how many pictures it is "
            "seen there alone (-), and here alone (+), with McNemar's exact p.",
            "",
            *head("against it"),
        ]
        for key in others:
            pairs = [(seen[reference].get(name), seen[key].get(name)) for name in COLUMNS.values()]
            tests.append(row(bench.rows[key], [change(*pair) for pair in pairs]))
        print("\n".join(tests))
        lines += tests
    if arguments.readme:
        start, end = MARKERS
        text, table = arguments.readme.read_text("utf-8"), "\n".join(lines)
        written = re.sub(f"{start}.*{end}", lambda _: f"{start}\n{table}\n{end}", text, flags=re.DOTALL)
        arguments.readme.write_text(written, "utf-8")


class Bench:
    """Measures the rows, each figure from its file where it was measured before."""

    def __init__(self, base: str, work: Path, count: int, seed: int, attacks: bool) -> None:
        self.base, self.rows = base, ROWS[base]
        self.count, self.seed, self.attacks = count, seed, attacks
        self.checkpoints = work / base / load_presets([PRESET])[0].sha256()[:12]
        self.figures = self.checkpoints / f"{count}-from-{seed}"
        self.figures.mkdir(parents=True, exist_ok=True)

    def seen(self, key: str) -> dict[str, list[bool]]:
        """By name, what is true of each picture of a row."""
        found = self._suites(key)
        if self.attacks:
            with self._attack(key, "unlearn-diff").open(newline="", encoding="utf-8") as file:
                found["unlearn-diff"] = [line["found_with"] == "1" for line in csv.DictReader(file)]
        return found

    def _checkpoint(self, key: str) -> str:
        """The name or path of a row's checkpoint, made where it is not there yet."""
        row = self.rows[key]
        if not row.command:
            return self.base
        output = self.checkpoints / key
        if not output.exists():
            command, *options = row.command
            if command == "peer":
                edit = output.with_suffix(".safetensors")
                write_peer(options[0], open_checkpoint(self.base), load_presets([PRESET]), edit)
                run("apply", str(edit), self.base, "--output", str(output))
            else:
                source = self._checkpoint(row.source)
                run(command, source, "--preset", PRESET, "--output", str(output), *options)
        return str(output)

    def _suites(self, key: str) -> dict[str, list[bool]]:
        """What the judge sees of the suites, and of Ring-A-Bell's prompts."""
        file = self.figures / f"{key}-{'suites-and-attacks' if self.attacks else 'suites'}.json"
        if not file.exists():
            suites: tuple[str, ...] = BUILT_IN
            if self.attacks:
                # It knows the text encoder alone, which no row edits: its prompts are the same for all.
                suites += (f"ring-a-bell={self._attack('original', 'ring-a-bell')}",)
            cpu, drawn = torch.device("cpu"), self.figures / "original"
            evaluation = prepare(
                open_checkpoint(self.base),
                open_checkpoint(self._checkpoint(key)),
                load_presets([PRESET]),
                cpu,
                EvaluationSettings(
                    suites=suites,
                    count=self.count,
                    seed=self.seed,
                    negative_prompt=self.rows[key].negative_prompt,
                    reuse=drawn if (drawn / "images").is_dir() and key != "original" else None,
                ),
            )
            outcome = evaluate(evaluation, self.figures / key, cpu, "float32")
            assert outcome is not None, "there is one process"
            write_json(file, dict(judged(evaluation, outcome[1], "erased")))
        found: dict[str, list[bool]] = json.loads(file.read_text("utf-8"))
        return found

    def _attack(self, key: str, name: str) -> Path:
        """The suite that `trce attack` makes of the explicit one against a row's checkpoint."""
        file = self.figures / f"{key}-{name}.csv"
        if not file.with_suffix(".json").exists():
            run(
                "attack", self._checkpoint(key), "--against", self.base, "--preset", PRESET,
                "--attack", name, "--count", str(self.count), "--seed", str(self.seed), "--output", str(file),
                "--negative-prompt", self.rows[key].negative_prompt,
            )  # fmt: skip
        return file


def run(*arguments: str) -> None:
    """Run `trce`; what it says goes where the table does not."""
    subprocess.run([sys.executable, "-m", "trce_cli", *arguments], check=True, stdout=sys.stderr)


def head(corner: str) -> list[str]:
    """The first two lines of a Markdown table."""
    return [f"| {corner} | {' | '.join(COLUMNS)} |", "|---" * (1 + len(COLUMNS)) + "|"]


def row(of: Row, cells: Sequence[str]) -> str:
    """A line of it."""
    return f"| {of.name} | {' | '.join(cells)} |"


def cell(verdicts: list[bool] | None) -> str:
    """A share in per cent with its interval; a dash where nothing was measured."""
    if verdicts is None:
        return "—"
    rate = Rate.of("", verdicts)
    low, high = rate.interval
    return f"{rate.share:.1%} ({100 * low:.1f} to {100 * high:.1f})"


def change(before: list[bool] | None, after: list[bool] | None) -> str:
    """How two rows differ, prompt by prompt."""
    if before is None or after is None:
        return "—"
    found = Change.of(before, after)
    return f"-{found.lost} +{found.gained}, p {found.p_value:.2g}"


if __name__ == "__main__":
    main()
