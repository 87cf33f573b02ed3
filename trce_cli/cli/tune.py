"""`trce tune`: which settings of stage 1 erase most and keep the rest."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from trce_cli.cli.evaluated import rate
from trce_cli.cli.options import (
    Answer,
    CheckpointName,
    Drawing,
    Opening,
    Output,
    Presets,
    PriorFile,
    check_outside,
    with_options,
)
from trce_cli.evaluate.choice import grid, parse_range
from trce_cli.evaluate.settings import TuningSettings
from trce_cli.prompts.presets import load_presets
from trce_cli.prompts.settings import parse_token_weights

if TYPE_CHECKING:
    from rich.table import Table


@with_options
def tune(
    checkpoint: CheckpointName,
    presets: Presets,
    output: Output,
    asked: TuningSettings,
    drawing: Drawing,
    opening: Opening,
    answer: Answer,
    preserve: Annotated[
        str,
        typer.Option(metavar="LOW..HIGH", help="Range of lambda, spread in equal ratios; or one value."),
    ] = "1e-3..10",
    token_weights: Annotated[
        list[str] | None,
        typer.Option(
            metavar="W,W,...|SLOT=W,...",
            help="Weights of the tokens that are mapped; repeat it to try several; else the presets', "
            "else the family's.",
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
    force: Annotated[
        bool, typer.Option("--force", help="Replace the pictures of other trials in the output folder.")
    ] = False,
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

    from trce_cli.erase.prior import choose_prior
    from trce_cli.erase.settings import choose_map_settings
    from trce_cli.evaluate.question import prepare
    from trce_cli.evaluate.tune import tune as run
    from trce_cli.families.slots import Given, slot_weights

    console = answer.console()
    original = opening.open(checkpoint)
    usual, _ = choose_map_settings({}, chosen, original.family)
    given: list[Given] = [*weights] or [usual.token_weights]
    slots = [tuple(slot_weights(original.family, each).values()) for each in given]
    tried = grid(low, high, slots, trials)
    settings = [usual.model_copy(update={"preserve": value, "token_weights": each}) for value, each in tried]
    check_outside(output, [original])
    torch_device = drawing.place()
    benign = choose_prior(original, prior, console.note)
    map_arguments = [checkpoint, *(part for name in presets for part in ("--preset", name))]
    for option, value in {
        "--prior": prior,
        "--revision": opening.revision,
        "--variant": opening.variant,
        "--config": opening.config,
    }.items():
        map_arguments += [option, str(value)] if value else []
    with console.progress() as progress:
        progress.task("Loading detectors")
        evaluation = prepare(
            original, original, chosen, torch_device, asked.evaluation(), split="tuning", note=console.note
        )
        told = run(
            evaluation,
            benign,
            settings,
            map_arguments,
            output,
            torch_device,
            drawing.precision(torch_device),
            force=force,
            task=progress.task,
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
