"""`trce attack`: prompts that look for what is left of the erased concepts."""

import inspect
import os
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from trce_cli.cli.console import Console
from trce_cli.cli.evaluate import rate
from trce_cli.cli.options import (
    AGAINST,
    CheckpointName,
    Config,
    Detectors,
    Device,
    DrawDType,
    EvaluationGuidance,
    EvaluationScheduler,
    EvaluationSteps,
    Force,
    Json,
    NegativePrompt,
    Presets,
    Quiet,
    Revision,
    Seed,
    Thresholds,
    Variant,
    check_outside,
    each_of,
    resolve_device,
)
from trce_cli.errors import BadInput
from trce_cli.evaluate.attacks.registry import ATTACKS, choose_budgets, usage
from trce_cli.prompts.presets import load_presets
from trce_cli.prompts.suites import NONE

if TYPE_CHECKING:
    from rich.table import Table


def with_budgets(command: Callable[..., None]) -> Callable[..., None]:
    """The command with an option for each field of each attack's budget; `budgets` is what was given."""
    own = [each for each in inspect.signature(command).parameters.values() if each.name != "budgets"]
    fields = {
        f"{attack.prefix}_{name}": (attack, name, field)
        for attack in ATTACKS.values()
        for name, field in attack.Budget.model_fields.items()
    }
    options = [
        inspect.Parameter(
            option,
            inspect.Parameter.KEYWORD_ONLY,
            default=None,
            annotation=Annotated[
                field.annotation | None,  # type: ignore[operator]
                typer.Option(help=f"{attack.title}: {field.description}", show_default=False),
            ],
        )
        for option, (attack, _, field) in fields.items()
    ]

    @wraps(command)
    def run(**values: Any) -> None:
        budgets: dict[str, dict[str, Any]] = {name: {} for name in ATTACKS}
        for option, (attack, name, _) in fields.items():
            if (value := values.pop(option)) is not None:
                budgets[attack.name][name] = value
        command(**values, budgets=budgets)

    parameters = [each.replace(kind=inspect.Parameter.KEYWORD_ONLY) for each in own] + options
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {each.name: each.annotation for each in parameters}
    return run


@with_budgets
def attack(
    checkpoint: CheckpointName,
    against: Annotated[str, AGAINST],
    preset: Presets,
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
    attacks: Annotated[
        list[str] | None,
        typer.Option(
            "--attack",
            metavar="|".join(ATTACKS),
            callback=each_of([*ATTACKS]),
            help=f"Only this attack: {usage()}; may be repeated, all where not given.",
            show_default=False,
        ),
    ] = None,
    suite: Annotated[
        list[str] | None,
        typer.Option(
            "--suite",
            metavar="NAME[=FILE]",
            help="What is attacked: explicit (where not given), implied, context; NAME=FILE.csv: prompts of "
            "your own. May be repeated.",
            show_default=False,
        ),
    ] = None,
    count: Annotated[
        int, typer.Option("--count", min=1, help="Prompts a built-in suite, and at most so many of a file.")
    ] = 50,
    detector: Detectors = None,
    threshold: Thresholds = None,
    seed: Seed = 0,
    steps: EvaluationSteps = None,
    guidance_scale: EvaluationGuidance = None,
    negative_prompt: NegativePrompt = "",
    scheduler: EvaluationScheduler = None,
    batch_size: Annotated[
        int, typer.Option("--batch-size", min=1, help="Prompts drawn and attacked at once.")
    ] = 16,
    device: Device = "auto",
    dtype: DrawDType = None,
    revision: Revision = None,
    variant: Variant = None,
    config: Config = None,
    force: Force = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Search an erased checkpoint of your own for what is left.

    Tells how often the concept is found without an attack and with it. FILE.csv is a suite for
    `trce evaluate --suite NAME=FILE.csv`; FILE.json has figures, budgets, seeds and hashes. Budgets that are
    not given are the papers', for `emoji` small ones.
    """
    if output.suffix.lower() != ".csv":
        raise BadInput(f"{output} is no .csv file.", "Give --output a name that ends in .csv.")
    if not output.absolute().parent.is_dir():
        raise BadInput(f"There is no folder {output.absolute().parent}.", "Make it first.")
    if not os.access(output.absolute().parent, os.W_OK | os.X_OK):
        raise BadInput(f"{output} cannot be written: no permission there.", "Choose another --output.")
    for path in (output, output.with_suffix(".json")):
        if path.is_dir() or (path.exists() and not force):
            raise BadInput(
                f"{path} is there already.", "Choose another --output, or replace it with --force."
            )
    presets = load_presets(preset)

    from trce_cli.checkpoint.open import open_checkpoint
    from trce_cli.evaluate.attacks import run as red_team
    from trce_cli.evaluate.detectors.registry import parse_threshold
    from trce_cli.evaluate.question import prepare
    from trce_cli.images.draw import default_dtype

    thresholds = [parse_threshold(text) for text in threshold or ()]
    suites = suite or ["explicit"]
    console = Console(json, quiet)
    original = open_checkpoint(against, config=config)
    erased = open_checkpoint(checkpoint, revision, variant, config)
    check_outside(output, (original, erased))
    torch_device = resolve_device(device)
    with console.progress() as progress:
        progress.stage("Loading detectors")
        evaluation = prepare(
            original,
            erased,
            presets,
            torch_device,
            suites=suites if any("=" not in name for name in suites) else [*suites, NONE],
            count=count,
            seed=seed,
            detectors=detector or (),
            thresholds=thresholds,
            steps=steps,
            guidance_scale=guidance_scale,
            negative_prompt=negative_prompt,
            scheduler=scheduler,
            note=console.note,
        )
        findings, told = red_team.attack(
            evaluation,
            choose_budgets(attacks or (), evaluation.home, budgets),
            torch_device,
            dtype or default_dtype(torch_device),
            batch_size=batch_size,
            seed=seed,
            stage=progress.stage,
        )
    record = red_team.write(output, findings, told)
    console.show(attack_table(told))
    console.show(f"Suite: {output}\nFigures, budgets, seeds and hashes: {record}")
    console.result({"output": output, "record": record, **told})


def attack_table(told: dict[str, Any]) -> "Table":
    """How often the concept was found, without and with each attack."""
    from rich.table import Table

    table = Table("attack", "found without", "found with", "seconds")
    for name, found in told["attacks"].items():
        table.add_row(
            name, rate(found["found_without"]), rate(found["found_with"]), f"{told['seconds'][name]:.0f}"
        )
    return table
