"""Adaptive red-teaming of a checkpoint: prompts that look for what is left of an erased concept.

`attack` lets attacks search, has the erased checkpoint draw what they found, and tells how often the concept
is seen without and with them.
"""

import csv
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import Any, Final

import numpy as np
import torch

from trce_cli.errors import BadInput
from trce_cli.evaluate.attacks.registry import ATTACKS, Budgets
from trce_cli.evaluate.attacks.victim import Victim
from trce_cli.evaluate.question import Evaluation
from trce_cli.images.plan import checkpoint_hash
from trce_cli.images.record import ImageRecord
from trce_cli.maths.statistics import Rate
from trce_cli.prompts.files import Prompt
from trce_cli.system.machine import versions
from trce_cli.system.paths import real_path
from trce_cli.system.progress import Task, no_task
from trce_cli.system.unfinished import Kept, hidden, placed, placing, unfinished
from trce_cli.system.whole import whole, write_json

COLUMNS: Final = (
    "prompt", "seed", "guidance", "width", "height", "attack", "source", "found_without", "found_with",
)  # fmt: skip
SCHEMA: Final = 1


@dataclass(frozen=True)
class Finding:
    """One attacked prompt: how the erased checkpoint drew what the attack made of a suite's prompt `source`.

    found_without, found_with: whether the concept was seen in what it drew of the source, and of the attack.
    """

    attack: str
    source: str
    drawn: ImageRecord
    found_without: bool
    found_with: bool


def attack(
    evaluation: Evaluation,
    budgets: Budgets,
    device: torch.device,
    dtype: str,
    *,
    batch_size: int = 16,
    seed: int = 0,
    output: Path | None = None,
    force: bool = False,
    task: Task = no_task,
) -> tuple[list[Finding], dict[str, Any]]:
    """Attack the erased checkpoint with the prompts of the evaluation's suites.

    budgets: of the attacks to run, see `registry.choose_budgets`. output: where the suite is written, its
    record beside it; a run that is stopped and called again with the same arguments goes on where it was, and
    finds the same. Without one nothing is written. Only one of the two checkpoints is in memory at a time.

    Returns the findings of every attack, and what FILE.json says: settings, hashes, seconds, and how often
    the concept was found without and with each attack. Raises BadInput for budgets that the checkpoint cannot
    read or draw, and where an unfinished run of other arguments is there and `force` is not given; TrceError
    where something comes out that is not finite.
    """
    victim = Victim(evaluation, device, dtype, batch_size, seed, task)
    victim.check()
    for name, budget in budgets.items():
        ATTACKS[name].check(victim, budget)
    told = describe(victim, budgets)
    if output is None:
        findings, found = search(victim, budgets)
        return findings, told | found
    asked = [(each.text, each.seed, each.guidance, each.width, each.height) for each in victim.prompts]
    arguments = {name: told[name] for name in ("original", "erased", "presets", "detector", "settings")}
    arguments |= {"prompts": asked, "batch size": batch_size}
    with unfinished(output, "attack", json.loads(json.dumps(arguments)), force) as victim.kept:
        findings, found = search(victim, budgets)
        assert victim.kept.folder is not None
        with placing(victim.kept.folder):
            write(output, findings, told | found)
    return findings, told | found


def search(victim: Victim, budgets: Budgets) -> tuple[list[Finding], dict[str, Any]]:
    """Let the attacks search; what was found, and how often and in how many seconds."""
    prompts, seconds = victim.prompts, dict[str, float]()
    found: dict[str, tuple[list[Prompt], np.ndarray]] = {}

    def draw() -> dict[str, torch.Tensor]:
        with victim.using("original"):
            report = victim.task("Drawing what the original makes of the prompts", len(prompts), "images")
            pictures = victim.pictures(prompts, "original", report)
            made = {"shown": torch.from_numpy(victim.found(pictures))}
            if any("latents" in ATTACKS[name].needs for name in budgets):
                made["latents"] = victim.encoded(pictures)
        return made

    with taking(seconds, "original", victim.kept):
        original = victim.kept("original", draw)
        if "latents" in original:
            victim.latents = original["latents"].to(victim.device)
    with victim.using("erased"):
        with taking(seconds, "without", victim.kept):
            plain = victim.shows(prompts, "Drawing without an attack")
        for name, budget in budgets.items():
            with taking(seconds, name, victim.kept):
                tried = ATTACKS[name].prompts(victim, budget)
                found[name] = tried, victim.shows(tried, f"Drawing {ATTACKS[name].title}'s prompts")
    findings = [
        Finding(name, source.text, record, bool(missed), bool(hit))
        for name, (tried, hits) in found.items()
        for source, record, missed, hit in zip(
            prompts, victim.records(tried, "erased"), plain, hits, strict=True
        )
    ]
    attacks = {
        name: {
            "found_without": Rate.of("without", plain).as_dict(),
            "found_with": Rate.of("with", hits).as_dict(),
        }
        for name, (_, hits) in found.items()
    }
    shown = Rate.of("original", original["shown"].numpy()).as_dict()
    return findings, {"seconds": seconds, "original_shows_it": shown, "attacks": attacks}


def describe(victim: Victim, budgets: Budgets) -> dict[str, Any]:
    """What is attacked and how, as plain JSON values."""
    evaluation = victim.evaluation
    return {
        "schema": SCHEMA,
        "versions": versions(),
        **{
            role: {"name": each.name, "sha256": checkpoint_hash(each)}
            for role, each in evaluation.checkpoints.items()
        },
        "presets": [{"name": each.name, "sha256": each.sha256()} for each in evaluation.presets],
        "suites": [
            {"name": suite.name, "source": suite.source, "prompts": len(suite.prompts)}
            for suite in evaluation.suites
        ],
        "detector": victim.detector.as_dict(),
        "settings": {
            "seed": victim.seed,
            "steps": evaluation.settings.steps,
            "scheduler": victim.records(victim.prompts[:1], "erased")[0].scheduler,
            "negative_prompt": evaluation.negative_prompt,
            "device": str(victim.device),
            "dtype": victim.dtype,
            "budgets": {name: budget.model_dump() for name, budget in budgets.items()},
        },
    }


def check_output(output: Path, force: bool) -> None:
    """Raise BadInput, before any work, where the suite file or its record cannot be written."""
    folder = output.absolute().parent
    if output.suffix.lower() != ".csv":
        raise BadInput(f"{output} is no .csv file.", "Give --output a name that ends in .csv.")
    if not folder.is_dir():
        raise BadInput(f"There is no folder {folder}.", "Make it first.")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise BadInput(f"{output} cannot be written: no permission there.", "Choose another --output.")
    stopped = hidden(real_path(output), "attack")
    with suppress(OSError):
        stopped.rmdir()  # the last step of a run that is done, where it is empty
    paths = (output, output.with_suffix(".json"))
    ours = placed(stopped, paths)
    for path in paths:
        if path.is_dir() or (path.exists() and not force and path not in ours):
            raise BadInput(
                f"{path} is there already.", "Choose another --output, or replace it with --force."
            )


@contextmanager
def taking(seconds: dict[str, float], name: str, kept: Kept) -> Iterator[None]:
    """Note how long the block takes, with what a stopped run had spent on it."""
    start, saved = monotonic(), kept.saved
    yield
    seconds[name] = monotonic() - start + kept.saved - saved


def write(output: Path, findings: Sequence[Finding], told: Mapping[str, Any]) -> Path:
    """Write the suite file, and beside it FILE.json with what was told; returns the latter's path.

    What no prompt can say is not in the suite.
    """
    record = output.with_suffix(".json")
    with whole(output) as table, table.open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(COLUMNS)
        for each in (one for one in findings if ATTACKS[one.attack].typed):
            drawn = each.drawn
            asked = (drawn.prompt, drawn.seed, drawn.guidance_scale, drawn.width, drawn.height)
            found = (int(each.found_without), int(each.found_with))
            rows.writerow((*asked, each.attack, each.source, *found))
    write_json(record, told)
    return record
