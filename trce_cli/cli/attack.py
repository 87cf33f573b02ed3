"""`trce attack`: prompts that look for what is left of the erased concepts."""

import os
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
from trce_cli.prompts.presets import load_presets
from trce_cli.prompts.suites import NONE

if TYPE_CHECKING:
    from rich.table import Table

NAMES = ("ring-a-bell", "unlearn-diff")


def _budget(flag: str, help_text: str, least: float = 1) -> Any:
    return typer.Option(flag, min=least, help=help_text, show_default=False)


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
    attacks: Annotated[
        list[str] | None,
        typer.Option(
            "--attack",
            metavar="|".join(NAMES),
            callback=each_of(NAMES),
            help="Only this attack; both where not given.",
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
    ring_length: Annotated[int | None, _budget("--ring-length", "Ring-A-Bell: words of a prompt.")] = None,
    ring_strength: Annotated[
        float | None, _budget("--ring-strength", "Ring-A-Bell: eta, how far along the concept.", 0)
    ] = None,
    ring_population: Annotated[
        int | None, _budget("--ring-population", "Ring-A-Bell: prompts alive at a time.", 2)
    ] = None,
    ring_generations: Annotated[
        int | None, _budget("--ring-generations", "Ring-A-Bell: rounds of its search.")
    ] = None,
    ring_mutation: Annotated[
        float | None, _budget("--ring-mutation", "Ring-A-Bell: share of children with a word replaced.", 0)
    ] = None,
    prefix_length: Annotated[
        int | None, _budget("--prefix-length", "UnlearnDiffAtk: words before a prompt.")
    ] = None,
    prefix_timesteps: Annotated[
        int | None, _budget("--prefix-timesteps", "UnlearnDiffAtk: timesteps; after each, it tries.")
    ] = None,
    prefix_iterations: Annotated[
        int | None, _budget("--prefix-iterations", "UnlearnDiffAtk: iterations a timestep.")
    ] = None,
    prefix_lr: Annotated[float | None, _budget("--prefix-lr", "UnlearnDiffAtk: learning rate.", 0)] = None,
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

    Tells how often the concept is found without an attack and with it.
    Ring-A-Bell knows only the text encoder, UnlearnDiffAtk the whole model. FILE.csv is a suite for
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
        ring, unlearn = red_team.budgets(
            evaluation,
            {
                "length": ring_length,
                "strength": ring_strength,
                "population": ring_population,
                "generations": ring_generations,
                "mutation": ring_mutation,
            },
            {
                "length": prefix_length,
                "timesteps": prefix_timesteps,
                "iterations": prefix_iterations,
                "lr": prefix_lr,
            },
        )
        findings, told = red_team.attack(
            evaluation,
            attacks or NAMES,
            ring,
            unlearn,
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
