"""`trce attack`: prompts that look for what is left of the erased concepts."""

import inspect
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from pydantic import Field

from trce_cli.cli.console import Console
from trce_cli.cli.evaluated import rate
from trce_cli.cli.options import (
    AGAINST,
    Answer,
    CheckpointName,
    Drawing,
    DryRun,
    Force,
    Opening,
    Presets,
    Sharing,
    check_outside,
    goes_on,
    option_of,
    told_shard,
    with_options,
    with_signature,
)
from trce_cli.cli.plans import show_plan
from trce_cli.cli.tracking import track
from trce_cli.evaluate.attacks.registry import ATTACKS, choose_budgets
from trce_cli.evaluate.attacks.settings import AttackSettings
from trce_cli.prompts.presets import load_presets
from trce_cli.settings import Count, Tracking
from trce_cli.system.processes import on_main

if TYPE_CHECKING:
    import torch
    from rich.table import Table

    from trce_cli.evaluate.question import Evaluation


def with_budgets(command: Callable[..., None]) -> Callable[..., None]:
    """The command with an option for each field of each attack's budget; `budgets` is what was given."""
    fields = {
        f"{attack.prefix}_{name}": (attack, name, field)
        for attack in ATTACKS.values()
        for name, field in attack.Budget.model_fields.items()
    }
    own = [each for each in inspect.signature(command).parameters.values() if each.name != "budgets"]
    options = own + [option_of(option, field, attack.title) for option, (attack, _, field) in fields.items()]

    @wraps(command)
    def run(**values: Any) -> None:
        budgets: dict[str, dict[str, Any]] = {name: {} for name in ATTACKS}
        for option, (attack, name, _) in fields.items():
            if (value := values.pop(option)) is not None:
                budgets[attack.name][name] = value
        command(**values, budgets=budgets)

    return with_signature(run, options)


class Attacking(Drawing):
    """How pictures are drawn and attacked."""

    batch_size: Count = Field(16, description="Prompts attacked at once; shards share these blocks.")


@with_budgets
@with_options
@goes_on
def attack(
    checkpoint: CheckpointName,
    against: Annotated[str, AGAINST],
    preset: Presets,
    asked: AttackSettings,
    drawing: Attacking,
    opening: Opening,
    sharing: Sharing,
    tracking: Tracking,
    answer: Answer,
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            metavar="FILE.csv",
            help="Where the suite goes; its record goes to FILE.json beside it.",
            show_default=False,
        ),
    ],
    budgets: dict[str, dict[str, Any]],
    force: Force = False,
    dry_run: DryRun = False,
) -> None:
    """Search your own erased checkpoint for what is left.

    Tells how often the concept is found without an attack and with it. FILE.csv is a suite for
    `trce evaluate --suite NAME=FILE.csv`; FILE.json has figures, budgets, seeds and hashes. Budgets that are
    not given are the papers', for embedded checkpoints small ones. Started again it goes on where it was;
    `accelerate launch -m trce_cli attack ...` and --shard share the work.
    """
    presets, share = load_presets(preset), sharing.share(drawing.device)

    from trce_cli.evaluate.attacks import run as red_team
    from trce_cli.evaluate.question import prepare

    console = answer.console(share.team.is_main_process)
    on_main(share.team, lambda: red_team.check_output(output, force, share))
    original, erased = opening.open_other(against), opening.open(checkpoint)
    check_outside(output, (original, erased))
    where = drawing.place(share.team)
    with console.progress() as progress:
        progress.task("Loading detectors")
        evaluation = prepare(original, erased, presets, where, asked.evaluation(), note=console.note)
        spent = choose_budgets(asked.attacks, evaluation.home, budgets)
        if dry_run:
            _plan(console, evaluation, spent, output, where, drawing.precision(where))
            return
        outcome = red_team.attack(
            evaluation, spent, where, drawing.precision(where), batch_size=drawing.batch_size,
            seed=asked.seed, output=output, force=force, share=share, task=progress.task,
        )  # fmt: skip
    if outcome is None:
        told_shard(console, output, share)
        return
    _, told = outcome
    track(tracking, "attack", output, told["settings"], [{"attacks": told["attacks"]}], where)
    record = output.with_suffix(".json")
    console.show(attack_table(told))
    console.show(f"Suite: {output}\nFigures, budgets, seeds and hashes: {record}")
    console.result({"output": output, "record": record, **told})


def _plan(
    console: Console, evaluation: "Evaluation", spent: Any, output: Path, device: "torch.device", dtype: str
) -> None:
    from trce_cli.evaluate import estimate

    planned = estimate.plan_attack(evaluation, spent, dtype)
    show_plan(console, output, planned, lambda: estimate.attack_seconds(evaluation, planned, device, dtype))


def attack_table(told: dict[str, Any]) -> "Table":
    """How often the concept was found, without and with each attack."""
    from rich.table import Table

    table = Table("attack", "found without", "found with", "seconds")
    for name, found in told["attacks"].items():
        table.add_row(
            name, rate(found["found_without"]), rate(found["found_with"]), f"{told['seconds'][name]:.0f}"
        )
    return table
