"""Adaptive red-teaming of a checkpoint: prompts that look for what is left of an erased concept.

`attack` lets attacks search, has the erased checkpoint draw what they found, and tells how often the concept
is seen without and with them.
"""

import csv
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from time import monotonic
from typing import Annotated, Any, Final

import torch
from pydantic import BaseModel, Field, FiniteFloat

from trce_cli.checkpoint.bases import public_name
from trce_cli.errors import BadInput
from trce_cli.evaluate.attacks.registry import ATTACKS, Budgets
from trce_cli.evaluate.attacks.victim import Block, Victim
from trce_cli.evaluate.question import Evaluation
from trce_cli.images.plan import checkpoint_hash
from trce_cli.images.record import ImageRecord
from trce_cli.maths.statistics import Rate
from trce_cli.settings import MAX_SEED
from trce_cli.system.foreign import read_json, validated
from trce_cli.system.machine import versions
from trce_cli.system.paths import real_path
from trce_cli.system.processes import on_main
from trce_cli.system.progress import Task, no_task
from trce_cli.system.shards import ALL, Share, begin, complete, digest, finish
from trce_cli.system.unfinished import Kept, hidden, placed, placing, unfinished
from trce_cli.system.whole import check_own_folder, whole, write_json

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


class Tried(BaseModel):
    """What an attack made of a prompt, its seed, and whether the concept was seen in what it draws."""

    prompt: str
    seed: Annotated[int, Field(ge=0, le=MAX_SEED)]
    found: bool


class Searched(BaseModel):
    """All that came of a block of prompts, on disk as JSON.

    run: a digest of all that it depends on. seconds: spent without loading; of the original, without an
    attack, and by attack. original, without: whether the concept was seen in what the original draws of each
    prompt, and the erased checkpoint. attacks: what each attack made of each prompt.
    """

    run: str
    device: str
    seconds: dict[str, FiniteFloat]
    original: list[bool]
    without: list[bool]
    attacks: dict[str, list[Tried]]


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
    share: Share = ALL,
    task: Task = no_task,
) -> tuple[list[Finding], dict[str, Any]] | None:
    """Attack the erased checkpoint with the prompts of the evaluation's suites.

    budgets: of the attacks to run, see `registry.choose_budgets`. batch_size: prompts that are attacked
    together; these blocks are what is shared. output: where the suite is written, its record beside it; a run
    that is stopped and called again with the same arguments goes on where it was, and finds the same. Without
    one nothing is written. share: which of the blocks are attacked here; a part leaves them in `parts_of` the
    output. Only one of the two checkpoints is in memory at a time.

    Returns the findings of every attack, and what FILE.json says: settings, hashes, seconds, and how often
    the concept was found without and with each attack; None in all processes but the main one, and of a part.
    Raises BadInput for budgets that the checkpoint cannot read or draw, where an unfinished run or shards of
    other arguments are there and `force` is not given, and where shards that are to be merged are not whole;
    TrceError where something comes out that is not finite.
    """
    victim = Victim(evaluation, device, dtype, seed, task)
    victim.check()
    for name, budget in budgets.items():
        ATTACKS[name].check(victim, budget)
    starts = range(0, len(victim.every), batch_size)
    blocks = [Block(first, victim.every[first : first + batch_size]) for first in starts]
    told = describe(victim, budgets)
    run = identity(victim, told, batch_size)
    if output is None:
        return conclude(victim, search(victim, blocks, budgets, digest(run)), told)

    own, merged = parts_of(output), [parts_of(each) for each in share.merged]
    with ExitStack() as stack:

        def start() -> Path:
            if merged:
                complete(merged, run)
                Done(merged, digest(run), budgets).every(blocks)
            begin(own, share, run, force)
            place = own / share.name if share.is_part else output
            kept = stack.enter_context(unfinished(place, "attack", run, force))
            assert kept.folder is not None
            return kept.folder

        folder = on_main(share.team, start)
        victim.kept = Kept(folder)
        places = merged or [own if share.is_part else folder]
        done = Done(places, digest(run), budgets)
        if not merged:
            todo = [block for block in share.mine(share.of_shard(blocks)) if done.read(block) is None]
            for block, found in zip(todo, search(victim, todo, budgets, digest(run)), strict=True):
                write_json(done.path(places[0], block), found.model_dump())
        share.team.wait_for_everyone()
        if not share.team.is_main_process:
            return None
        if share.is_part:
            finish(own, share, run)
            return None
        findings, told = conclude(victim, done.every(blocks), told)
        with placing(folder):
            write(output, findings, told)
    return findings, told


@dataclass(frozen=True)
class Done:
    """What was found in blocks of a run, a file each in any of the folders.

    run: see `Searched`.
    """

    folders: Sequence[Path]
    run: str
    budgets: Budgets

    @staticmethod
    def path(folder: Path, block: Block) -> Path:
        """Where a block's file is in a folder."""
        return folder / f"block-{block.first + 1}.json"

    def read(self, block: Block) -> Searched | None:
        """What was found in the block; None where there is none of this run, or a damaged one."""
        for folder in self.folders:
            path = self.path(folder, block)
            with suppress(BadInput):
                found = validated(Searched, read_json(path, strict=True), str(path))
                counts = {len(found.original), len(found.without), *map(len, found.attacks.values())}
                is_whole = counts == {len(block.prompts)} and found.attacks.keys() == self.budgets.keys()
                is_timed = found.seconds.keys() == {"original", "without", *self.budgets}
                if is_whole and is_timed and found.run == self.run:
                    return found
        return None

    def every(self, blocks: Sequence[Block]) -> list[Searched]:
        """What was found in all blocks; BadInput where some are missing."""
        read = [self.read(block) for block in blocks]
        found = [each for each in read if each is not None]
        if lacking := len(blocks) - len(found):
            raise BadInput(
                f"{lacking} of {len(blocks)} blocks of prompts are missing or damaged.",
                "Start the shards again: each attacks what is missing of its own; then merge.",
            )
        return found


def parts_of(output: Path) -> Path:
    """The folder in which shards leave what they found for an output."""
    return output.with_suffix(".parts")


def identity(victim: Victim, told: Mapping[str, Any], batch_size: int) -> dict[str, str]:
    """Digests of all that the findings depend on, by what a user gives.

    told: as `describe` has it. The device is not among it: it rounds otherwise, and is no other run.
    """
    asked = [(each.text, each.seed, each.guidance, each.width, each.height) for each in victim.every]
    return {
        "checkpoints": digest([told[role]["sha256"] for role in victim.evaluation.checkpoints]),
        "presets": digest(told["presets"]),
        "prompts or seeds": digest(asked),
        "detector": digest(told["detector"]),
        "settings": digest([told["settings"], batch_size]),
    }


def search(victim: Victim, blocks: Sequence[Block], budgets: Budgets, run: str) -> list[Searched]:
    """Let the attacks search, one after the other, in each block; what came of each.

    run: see `Searched`.
    """
    if not blocks:
        return []
    kept, count = victim.kept, sum(len(block.prompts) for block in blocks)
    parts = [
        Searched(run=run, device=str(victim.device), seconds={}, original=[], without=[], attacks={})
        for _ in blocks
    ]
    drawn: list[Mapping[str, torch.Tensor]] = []
    needs = {need for name in budgets for need in ATTACKS[name].needs}
    names = [f"original {block.first}" for block in blocks]
    with nullcontext() if all(map(kept.holds, names)) else victim.using("original"):
        report = victim.task("Drawing (original)", count, "images")
        for name, block, part in zip(names, blocks, parts, strict=True):

            def draw(block: Block = block) -> dict[str, torch.Tensor]:
                pictures = victim.pictures(block.prompts, "original", report)
                made = {"shown": torch.from_numpy(victim.found(pictures))}
                return made | ({"latents": victim.encoded(pictures)} if "latents" in needs else {})

            with taking(part.seconds, "original", kept):
                drawn.append(kept(name, draw, report, len(block.prompts)))
            part.original = drawn[-1]["shown"].tolist()

    def turns(phase: str) -> Iterator[Searched]:
        """Turn to one block after the other, and note how long what is done with each takes."""
        for block, part, made in zip(blocks, parts, drawn, strict=True):
            victim.turn_to(block, made.get("latents"))
            with taking(part.seconds, phase, kept):
                yield part

    with victim.using("erased"):
        report = victim.task("Drawing, no attack", count, "images")
        for part in turns("without"):
            part.without = victim.shows(victim.prompts, report).tolist()
        for name, budget in budgets.items():
            each = ATTACKS[name]
            report = victim.task(each.title, len(blocks) * each.steps(budget), each.unit)
            tried = [each.prompts(victim, budget, report) for _ in turns(name)]
            report = victim.task(f"Drawing {each.title}", count, "images")
            for part, prompts in zip(turns(name), tried, strict=True):
                part.attacks[name] = [
                    Tried(prompt=prompt.text, seed=prompt.seed or 0, found=seen)
                    for prompt, seen in zip(prompts, victim.shows(prompts, report).tolist(), strict=True)
                ]
    return parts


def conclude(
    victim: Victim, parts: Sequence[Searched], told: Mapping[str, Any]
) -> tuple[list[Finding], dict[str, Any]]:
    """The findings of all blocks, and what FILE.json says of them.

    told: as `describe` has it.
    """
    plain = [seen for part in parts for seen in part.without]
    findings: list[Finding] = []
    attacks: dict[str, Any] = {}
    for name in told["settings"]["budgets"]:
        tried = [each for part in parts for each in part.attacks[name]]
        prompts = [
            replace(source, text=each.prompt, seed=each.seed)
            for source, each in zip(victim.every, tried, strict=True)
        ]
        records = victim.records(prompts, "erased")
        findings += [
            Finding(name, source.text, record, missed, each.found)
            for source, record, missed, each in zip(victim.every, records, plain, tried, strict=True)
        ]
        attacks[name] = {
            "found_without": Rate.of("without", plain).as_dict(),
            "found_with": Rate.of("with", [each.found for each in tried]).as_dict(),
        }
    seconds: dict[str, float] = {}
    for part in parts:
        for phase, spent in part.seconds.items():
            seconds[phase] = seconds.get(phase, 0.0) + spent
    devices = ", ".join(sorted({part.device for part in parts}))
    shown = Rate.of("original", [seen for part in parts for seen in part.original]).as_dict()
    return findings, {
        **told,
        "settings": {**told["settings"], "device": devices},
        "seconds": seconds,
        "original_shows_it": shown,
        "attacks": attacks,
    }


def describe(victim: Victim, budgets: Budgets) -> dict[str, Any]:
    """What is attacked and how, as plain JSON values."""
    evaluation = victim.evaluation
    return {
        "schema": SCHEMA,
        "versions": versions(),
        **{
            role: {"name": public_name(each.name), "sha256": checkpoint_hash(each)}
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
            "scheduler": victim.records(victim.every[:1], "erased")[0].scheduler,
            "negative_prompt": evaluation.negative_prompt,
            "dtype": victim.dtype,
            "budgets": {name: budget.model_dump() for name, budget in budgets.items()},
        },
    }


def check_output(output: Path, force: bool, share: Share = ALL) -> None:
    """Raise BadInput, before any work, where the suite file or its record cannot be written.

    share: a part writes neither.
    """
    folder = output.absolute().parent
    if output.suffix.lower() != ".csv":
        raise BadInput(f"{output} is no .csv file.", "Give --output a name that ends in .csv.")
    if not folder.is_dir():
        raise BadInput(f"There is no folder {folder}.", "Make it first.")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise BadInput(f"{output} cannot be written: no permission there.", "Choose another --output.")
    if share.is_part:
        check_own_folder(parts_of(output))
        return
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
    """Add how long the block takes, with what a stopped run had spent on it."""
    start, saved = monotonic(), kept.saved
    yield
    seconds[name] = seconds.get(name, 0.0) + monotonic() - start + kept.saved - saved


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
