"""What the guards of `trce map` say, beside what pictures show and keep: where their limits come from.

``python benchmarks/guards.py`` solves maps of an embedded checkpoint from ruinous to weak, puts each on the
live pipeline, draws the suites of the tuning split, and prints a Markdown table with a row a setting: guards,
then counts of pictures. `bystanders` are the other unsafe family, which nobody asked to erase. ``--base
emoji-dit --rows slots`` is of the other checkpoint; ``--rows captions`` of how many captions the prior has.
"""

import argparse
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
import torch

from trce_cli.checkpoint.checkpoint import Checkpoint
from trce_cli.checkpoint.open import open_checkpoint
from trce_cli.edits.edit import Made
from trce_cli.edits.map import Map
from trce_cli.emoji.home import EMOJI, EMOJI_DIT, EmojiHome
from trce_cli.emoji.suites import erasure_suite
from trce_cli.emoji.world import SUBSTANCES, WEAPONS
from trce_cli.erase.map import Statistics
from trce_cli.erase.map_verdict import value_of
from trce_cli.erase.moments import second_moments
from trce_cli.erase.prior import choose_prior
from trce_cli.erase.settings import MapSettings
from trce_cli.images.draw import draw
from trce_cli.images.plan import plan_images
from trce_cli.images.settings import DrawSettings
from trce_cli.prompts.files import Prompt
from trce_cli.prompts.pairs import prompt_pairs
from trce_cli.prompts.presets import load_presets

WORDLESS: Final = {"word_share": 0.0}


@dataclass(frozen=True)
class Row:
    """A setting; captions: how many of the prior's, None for all."""

    name: str
    settings: Mapping[str, Any]
    captions: int | None = None


SETTINGS: Final = (
    Row("2 captions, no words", {"preserve": 0.1, **WORDLESS}, 2),
    Row("nothing preserved (lambda 0)", {"preserve": 0.0}),
    Row("30 captions, no words", {"preserve": 0.1, **WORDLESS}, 30),
    Row("2 captions, words", {"preserve": 0.3}, 2),
    Row("captions, lambda 0.01", {"preserve": 0.01, **WORDLESS}),
    Row("captions and words, lambda 0.03", {"preserve": 0.03}),
    Row("captions, lambda 0.1, no ridge", {"preserve": 0.1, "ridge": 0.0, **WORDLESS}),
    Row("captions and words, lambda 0.3", {"preserve": 0.3}),
    Row("captions and words, lambda 0.6", {"preserve": 0.6}),
    Row("captions and words, lambda 2", {"preserve": 2.0}),
    Row("captions and words, lambda 6", {"preserve": 6.0}),
)
# A language model's: further slots, which the guard has to tell from the family's own.
SLOTS: Final = (
    Row("2 captions, no words", {"preserve": 0.1, **WORDLESS}, 2),
    *(
        Row(f"captions and words, lambda {lam:g}", {"preserve": lam})
        for lam in (0.03, 0.1, 0.3, 1.0, 3.0, 6.0)
    ),
    *(
        Row(f"{slot} alone, lambda 0.3", {"preserve": 0.3, "token_weights": {slot: 1.0}})
        for slot in ("KEYWORD", "LAST", "END")
    ),
)
# How many captions the prior needs, at this lambda.
CAPTIONS: Final = tuple(
    Row(f"{count} captions{', no words' if words else ''}", {"preserve": 0.3, **words}, count)
    for count in (3000, 1500, 750, 375, 100)
    for words in ({}, WORDLESS)
)
ROWS: Final = {"settings": SETTINGS, "slots": SLOTS, "captions": CAPTIONS}
HOMES: Final = {home.name: home for home in (EMOJI, EMOJI_DIT)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", default=EMOJI.name, choices=list(HOMES), help="the embedded checkpoint")
    parser.add_argument("--rows", default="settings", choices=list(ROWS), help="what differs between rows")
    parser.add_argument("--count", type=int, default=16, help="pictures a suite, 0: guards alone")
    parser.add_argument("--steps", type=int, default=8, help="denoising steps")
    arguments = parser.parse_args()
    if arguments.rows == "slots" and arguments.base != EMOJI_DIT.name:
        parser.error(f"--rows slots is of a language model's slots: --base {EMOJI_DIT.name}")
    original = open_checkpoint(arguments.base)
    pairs, prior = prompt_pairs(load_presets(["emoji-weapons"])), choose_prior(original)
    bench = Bench(original, HOMES[arguments.base], arguments.count, arguments.steps)
    print("| | moved | captions | words | norm | verdicts | " + " | ".join(bench.suites) + " |")
    print("|---|" + "---:|" * 4 + "---|" + "---:|" * len(bench.suites))
    every = [MapSettings(**row.settings) for row in ROWS[arguments.rows]]
    statistics = Statistics.of(original, pairs, prior, every)
    text, (reading,) = original.family.text(original, "cpu", torch.float32), statistics.readings
    preserved = {
        count: second_moments(text, prior.captions[:count])
        for count in {row.captions for row in ROWS[arguments.rows]}
    }
    for row, settings in zip(ROWS[arguments.rows], every, strict=True):
        given = replace(reading, P=preserved[row.captions])
        solution = replace(statistics, readings=[given]).solve(settings)
        figures = solution.figures
        changes = [value_of(figures[name]) for name in ("canary_change", "word_change")]
        told = [*(f"{value:.2f}" for value in (figures["moved"], *changes)), f"{figures['norm']:.0f}"]
        told.append(", ".join(verdict["verdict"] for verdict in figures["verdicts"].values()))
        seen = bench.counts(Map(Made(original.family, original.text_encoder_hash()), solution.streams))
        print("| " + " | ".join([row.name, *told, *seen]) + " |", flush=True)


class Bench:
    """The suites on the live pipeline of an embedded checkpoint."""

    def __init__(self, original: Checkpoint, home: EmojiHome, count: int, steps: int) -> None:
        self.original, self.home, self.steps = original, home, steps
        self.pipeline = original.pipe(torch.device("cpu"), torch.float32)
        self.judge = home.judge()
        self.suites = {
            f"{name} {what}": erasure_suite(suite, unsafe, count, 0, "train") if count else []
            for name, what, suite, unsafe in (
                ("explicit", "shown", "explicit", WEAPONS),
                ("implied", "shown", "implied", WEAPONS),
                ("benign", "kept", "benign", WEAPONS),
                ("bystanders", "kept", "explicit", SUBSTANCES),
            )
        }

    def counts(self, edit: Map) -> list[str]:
        """Pictures that show what they are counted for, of all, by suite."""
        edit.apply_to(self.pipeline)
        found = []
        for name, asked in self.suites.items():
            if not asked:
                found.append("—")
                continue
            prompts = [Prompt(each.text, seed=place) for place, each in enumerate(asked)]
            settings = DrawSettings(steps=self.steps, guidance_scale=self.home.guidance)
            records = plan_images(prompts, {"": self.original}, settings)
            pictures = [np.asarray(image) for _, image in draw(self.original.family, self.pipeline, records)]
            scores = self.judge.scores(np.stack(pictures)) >= self.judge.threshold
            seen = [{self.judge.labels[i] for i in np.flatnonzero(row)} for row in scores]
            hits = sum(
                bool(each & {*WEAPONS}) if name.endswith("shown") else {*asked[place].objects} <= each
                for place, each in enumerate(seen)
            )
            found.append(f"{hits}/{len(seen)}")
        edit.remove_from(self.pipeline)
        return found


if __name__ == "__main__":
    main()
