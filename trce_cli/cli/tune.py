"""`trce tune`: which settings of stage 1 erase most and keep the rest."""

from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from trce_cli.cli.console import Console
from trce_cli.cli.evaluate import rate
from trce_cli.cli.map import parse_token_weights
from trce_cli.cli.options import (
    CheckpointName,
    Config,
    Detectors,
    Device,
    DrawBatch,
    DrawDType,
    EvaluationGuidance,
    EvaluationScheduler,
    EvaluationSteps,
    Json,
    Output,
    Presets,
    PriorFile,
    Quiet,
    Revision,
    Seed,
    Suites,
    Thresholds,
    Variant,
    check_outside,
    resolve_device,
)
from trce_cli.evaluate.choice import grid, parse_range
from trce_cli.prompts.presets import load_presets

if TYPE_CHECKING:
    from rich.table import Table


def tune(
    checkpoint: CheckpointName,
    presets: Presets,
    output: Output,
    preserve: Annotated[
        str,
        typer.Option(metavar="LOW..HIGH", help="Range of lambda, spread in equal ratios; or one value."),
    ] = "1e-3..10",
    token_weights: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SOT,FIRST_EOT,LAST_EOT,KEYWORD",
            help="Weights of the tokens that are mapped; repeat it to try several; else the presets', "
            "else 0,1,0,0.",
            show_default=False,
        ),
    ] = None,
    trials: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Settings to try in all, spread evenly over the token weights; else 8 of each.",
            show_default=False,
        ),
    ] = None,
    prior: PriorFile = None,
    suite: Suites = None,
    count: Annotated[
        int, typer.Option(min=1, help="Prompts a built-in suite, and at most so many of a file.")
    ] = 48,
    detector: Detectors = None,
    threshold: Thresholds = None,
    clip: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="CLIP model that tells what is kept, where no judge does: a folder or hub id.",
            show_default=False,
        ),
    ] = None,
    seed: Seed = 0,
    steps: EvaluationSteps = None,
    guidance_scale: EvaluationGuidance = None,
    scheduler: EvaluationScheduler = None,
    batch_size: DrawBatch = 16,
    device: Device = "auto",
    dtype: DrawDType = None,
    revision: Revision = None,
    variant: Variant = None,
    config: Config = None,
    force: Annotated[
        bool, typer.Option("--force", help="Replace the pictures of other trials in the output folder.")
    ] = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Choose settings of `trce map` on prompts that no report asks.

    Of the trials that keep as much as the best but for one percentage point or one picture (context and
    benign prompts), the one with the least attack success (all but benign prompts) is chosen, of equals the
    one with the highest lambda. Writes tune.json, trials.csv, pareto.png and the pictures. Started again with
    the same arguments it goes on where it was.
    """
    chosen = load_presets(presets)
    low, high = parse_range(preserve)
    weights = [parse_token_weights(text) for text in token_weights or ()]

    from trce_cli.checkpoint.open import open_checkpoint
    from trce_cli.erase.map_settings import choose_settings
    from trce_cli.erase.prior import choose_prior
    from trce_cli.evaluate.detectors.registry import parse_threshold
    from trce_cli.evaluate.question import prepare
    from trce_cli.evaluate.tune import tune as run
    from trce_cli.images.draw import default_dtype

    thresholds = [parse_threshold(text) for text in threshold or ()]
    usual, _ = choose_settings({}, chosen)
    tried = grid(low, high, weights or [usual.token_weights], trials)
    settings = [replace(usual, preserve=value, token_weights=each) for value, each in tried]
    console = Console(json, quiet)
    original = open_checkpoint(checkpoint, revision, variant, config)
    check_outside(output, [original])
    torch_device = resolve_device(device)
    benign = choose_prior(original, prior, console.note)
    map_arguments = [checkpoint, *(part for name in presets for part in ("--preset", name))]
    for option, value in {
        "--prior": prior,
        "--revision": revision,
        "--variant": variant,
        "--config": config,
    }.items():
        map_arguments += [option, str(value)] if value else []
    with console.progress() as progress:
        progress.stage("Loading detectors")
        evaluation = prepare(
            original,
            original,
            chosen,
            torch_device,
            suites=suite or (),
            count=count,
            seed=seed,
            detectors=detector or (),
            thresholds=thresholds,
            clip=clip,
            steps=steps,
            guidance_scale=guidance_scale,
            scheduler=scheduler,
            split="tuning",
            note=console.note,
        )
        told = run(
            evaluation,
            benign,
            settings,
            map_arguments,
            output,
            torch_device,
            dtype or default_dtype(torch_device),
            batch_size=batch_size,
            force=force,
            stage=progress.stage,
            note=console.note,
        )
    console.show(trials_table(told))
    console.show(f"{told['chosen']['toml']}\n{told['chosen']['command']}")
    console.note(f"Everything is in {output}: tune.json, trials.csv, pareto.png.")
    console.result({"output": output, **told})


def trials_table(told: dict[str, Any]) -> "Table":
    """A line a trial, with intervals."""
    from rich.table import Table

    table = Table("lambda", "token weights", "attack success", "kept", "")
    for trial in told["trials"]:
        marks = ["best trade-off"] if trial["pareto"] else []
        marks += ["chosen"] if trial["key"] == told["chosen"]["key"] else []
        figures = [""] * 2 if trial["failed"] else [rate(trial[name]) for name in ("attack_success", "kept")]
        weights = ",".join(f"{weight:g}" for weight in trial["token_weights"])
        table.add_row(f"{trial['preserve']:g}", weights, *figures, trial["failed"] or ", ".join(marks))
    return table
