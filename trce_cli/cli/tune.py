"""`trce tune`: which settings of stage 1 erase most and keep the rest."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from trce_cli.cli.console import Console
from trce_cli.cli.evaluated import rate
from trce_cli.cli.options import (
    Answer,
    Captions,
    CheckpointName,
    Drawing,
    DryRun,
    ForcePictures,
    Opening,
    Output,
    Presets,
    Sharing,
    check_outside,
    goes_on,
    spelt,
    told_shard,
    with_options,
)
from trce_cli.cli.plans import show_plan
from trce_cli.cli.tracking import track
from trce_cli.evaluate.settings import Tried, TuningSettings
from trce_cli.prompts.pairs import pair_prompts, prompt_pairs
from trce_cli.prompts.presets import load_presets
from trce_cli.settings import Tracking

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch
    from rich.table import Table

    from trce_cli.erase.prior import Prior
    from trce_cli.erase.settings import MapSettings
    from trce_cli.evaluate.question import Evaluation


@with_options
@goes_on
def tune(
    checkpoint: CheckpointName,
    presets: Presets,
    output: Output,
    tried: Tried,
    asked: TuningSettings,
    captions: Captions,
    drawing: Drawing,
    opening: Opening,
    sharing: Sharing,
    tracking: Tracking,
    answer: Answer,
    force: ForcePictures = False,
    dry_run: DryRun = False,
) -> None:
    """Choose settings of `trce map` on prompts that no report asks.

    Of the trials that keep as much as the best but for one percentage point or one picture, in all and of
    bystanders alone, the one with the least attack success (prompts that ask for the concept) is chosen, of
    equals the one with the highest lambda. Writes tune.json, trials.csv, pareto.png and the pictures. Started
    again with the same arguments it goes on where it was; `accelerate launch` and --shard share the trials.
    """
    chosen = load_presets(presets)

    from trce_cli.erase.prior import choose_prior
    from trce_cli.evaluate.question import prepare
    from trce_cli.evaluate.tune import Maps, figures_of
    from trce_cli.evaluate.tune import tune as run

    share = sharing.share(drawing.device)
    console = answer.console(share.team.is_main_process)
    original = opening.open(checkpoint)
    settings = tried.settings(chosen, original.family)
    check_outside(output, [original])
    for cut in original.cut(pair_prompts(chosen)):
        console.note(cut)
    where, benign = drawing.place(share.team), choose_prior(original, captions.prior, console.note)
    arguments = [checkpoint, *spelt({"preset": presets, "prior": captions.prior, **dict(opening)})]
    with console.progress() as progress:
        progress.task("Loading detectors")
        evaluation = prepare(
            original, original, chosen, where, asked.evaluation(), split="tuning", note=console.note
        )
        if dry_run:
            _plan(console, evaluation, settings, benign, output, where, drawing.precision(where))
            return
        told = run(
            evaluation, Maps(settings, benign, arguments), output, where, drawing.precision(where),
            force=force, work=share, task=progress.task, note=console.note,
        )  # fmt: skip
    if told is None:
        told_shard(console, output, share)
        return
    rows = [{"preserve": trial["preserve"], **figures_of(trial)} for trial in told["trials"]]
    track(tracking, "tune", output, told["settings"], rows, where)
    _show(console, output, told)


def _plan(
    console: Console,
    evaluation: "Evaluation",
    settings: "Sequence[MapSettings]",
    benign: "Prior",
    output: Path,
    device: "torch.device",
    dtype: str,
) -> None:
    from trce_cli.erase.estimate import solving_seconds
    from trce_cli.erase.map_plan import distinct_prompts
    from trce_cli.evaluate import estimate

    places = estimate.trials(evaluation, len(settings), output)
    planned = {"trials": len(settings), **estimate.plan_evaluation(evaluation, places, dtype)}
    prompts = len(distinct_prompts(prompt_pairs(evaluation.presets)))
    words = max(each.words_asked for each in settings)

    def seconds() -> float:
        drawing = estimate.evaluation_seconds(evaluation, places, device, dtype)
        return drawing + solving_seconds(evaluation.original, benign, words, prompts, device)

    show_plan(console, output, planned, seconds)


def _show(console: Console, output: Path, told: dict[str, Any]) -> None:
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
