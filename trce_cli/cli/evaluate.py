"""`trce evaluate`: is it really gone, and is everything else still there?"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from trce_cli.cli import evaluated
from trce_cli.cli.console import Console
from trce_cli.cli.options import (
    AGAINST,
    Answer,
    Drawing,
    DryRun,
    ForcePictures,
    Opening,
    Output,
    Publishing,
    Sharing,
    check_outside,
    goes_on,
    preset_option,
    told_shard,
    with_options,
)
from trce_cli.cli.plans import show_plan
from trce_cli.cli.tracking import track
from trce_cli.errors import BadInput
from trce_cli.evaluate.gates import Gate, check_met, check_names
from trce_cli.evaluate.settings import Checks, EvaluationSettings
from trce_cli.evaluate.survivals.settings import SurvivalSettings
from trce_cli.prompts.presets import load_presets
from trce_cli.settings import Tracking
from trce_cli.system.paths import expanded

if TYPE_CHECKING:
    import torch

    from trce_cli.checkpoint.checkpoint import Checkpoint
    from trce_cli.evaluate.question import Evaluation

Erased = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[CHECKPOINT]",
        help="The erased one: `emoji`, a diffusers folder, a .safetensors file, a hub id; or an edit's file, "
        "which is put on ORIGINAL. After --compare further results.",
        show_default=False,
    ),
]
Gone = Annotated[
    list[str] | None,
    preset_option("What should be gone: a shipped preset's name or a TOML file; may be repeated."),
]


_NEEDS = "An evaluation needs one CHECKPOINT, --against ORIGINAL and --preset."
_COMPARING = "To put results of earlier ones side by side: trce evaluate --compare RESULTS.json ... -o DIR"


@with_options
@goes_on
def evaluate(
    output: Output,
    asked: EvaluationSettings,
    checks: Checks,
    drawing: Drawing,
    after: SurvivalSettings,
    opening: Opening,
    sharing: Sharing,
    publishing: Publishing,
    tracking: Tracking,
    answer: Answer,
    checkpoint: Erased = None,
    against: Annotated[str | None, AGAINST] = None,
    presets: Gone = None,
    details: Annotated[
        bool, typer.Option("--details", help="Show every figure in the terminal, not the summary alone.")
    ] = False,
    force: ForcePictures = False,
    dry_run: DryRun = False,
) -> None:
    """Measure what is left of concepts, and of everything else.

    Writes results.json, verdicts.csv and report.html, a page to show. Started again with the same arguments
    it goes on where it was; `accelerate launch -m trce_cli evaluate ...` and --shard share the work.
    """
    names, others = split_compared(checkpoint or [], checks.compared)
    if not names and others and not checks.card:
        return compare_only(others, output, answer.console(), details)
    if len(names) != 1 or not against or not presets:
        raise BadInput(_NEEDS, _COMPARING)
    chosen = load_presets(presets)

    from trce_cli.evaluate.compare import read_results
    from trce_cli.evaluate.question import prepare
    from trce_cli.evaluate.report import write_report
    from trce_cli.evaluate.run import evaluate as run

    earlier = [read_results(path) for path in others]
    share = sharing.share(drawing.device)
    console = answer.console(share.team.is_main_process)
    original = opening.open_other(against)
    _check_card(checks, names[0], original, opening, asked.negative_prompt, publishing)
    erased = open_erased(names[0], original, output, opening, share.team, dry_run)
    where = drawing.place(share.team)
    with console.progress() as progress:
        progress.task("Loading detectors")
        evaluation = prepare(original, erased, chosen, where, asked, note=console.note)
        _check_gates(console, checks.gates, evaluation, after)
        if dry_run:
            return _plan(console, evaluation, after, output, where, drawing.precision(where), force)
        outcome = run(
            evaluation, output, where, drawing.precision(where), force=force, gates=checks.gates, after=after,
            share=share, task=progress.task, note=console.note,
        )  # fmt: skip
    if outcome is None:  # the main process tells the rest
        return told_shard(console, output, share)
    results, verdicts = outcome
    track(tracking, "evaluate", output, results["settings"], [results["figures"]], where)
    page = write_report(output, results, verdicts, earlier)
    evaluated.show(console, results, details)
    return _end(console, output, page, results, verdicts, publishing, erased if checks.card else None)


def _check_gates(
    console: Console, gates: Sequence[Gate], evaluation: "Evaluation", after: SurvivalSettings
) -> None:
    """Refuse a gate on a figure that there will not be, and tell of one that so few pictures cannot meet."""
    from trce_cli.evaluate.survivals.run import figure_names

    check_names(gates, [*evaluation.figure_names(), *figure_names(evaluation, after)])
    for gate in gates:
        if (needed := gate.needed_at_best()) > (count := evaluation.asked_by(gate.figure)):
            few = f"No {count} pictures can meet {gate}, whatever they show: it takes {needed} at least."
            console.warn(few)


def _end(
    console: Console,
    output: Path,
    page: Path,
    results: dict[str, Any],
    verdicts: dict[str, list[dict[str, Any]]],
    publishing: Publishing,
    carded: "Checkpoint | None",
) -> None:
    """Say where everything is, also in the card of `carded`, which is pushed where the gates are met."""
    console.show(f"Page to show: {page}\nEverything: {output / 'results.json'}, {output / 'verdicts.csv'}")
    told = {"output": output, "report": page, **results}
    if carded:
        from trce_cli.evaluate.card import write_card

        told["card"] = write_card(carded, results, verdicts, output)
        console.show(f"Model card: {told['card']}")
        if all(gate["met"] for gate in results["gates"]) and (url := publishing.push_carded(console, carded)):
            told["pushed_to"] = url
    console.result(told)
    check_met(results["gates"], page)


def _check_card(
    checks: Checks,
    name: str,
    original: "Checkpoint",
    opening: Opening,
    negative_prompt: str,
    publishing: Publishing,
) -> None:
    """Raise, before anything is drawn, where --card cannot be; see also `evaluate.card.check_card`."""
    if not checks.card:
        if publishing.push_to_hub is not None:
            raise BadInput("--push-to-hub takes a checkpoint with its figures to the hub.", "Add --card.")
        return publishing.check()
    from trce_cli.evaluate import card

    if negative_prompt:
        raise BadInput(
            "With --negative-prompt the figures are not of the checkpoint alone, which its card is about.",
            "Leave --card or --negative-prompt out.",
        )
    if not expanded(name).is_dir():  # nor is a hub id fetched first
        raise BadInput(
            f"{name} is no diffusers folder on this machine, and --card writes into the README.md of one.",
            card.HINT,
        )
    card.check_card(opening.open(name), original)
    return publishing.check()


def _plan(
    console: Console,
    evaluation: "Evaluation",
    after: SurvivalSettings,
    output: Path,
    device: "torch.device",
    dtype: str,
    force: bool,
) -> None:
    from trce_cli.evaluate import estimate
    from trce_cli.evaluate.run import check_unmixed, note_same

    check_unmixed(evaluation, output, dtype, force)
    # Not where the original stands for what is yet to be made, of an edit's file or in a recipe.
    if evaluation.erased is not evaluation.original and not console.is_held:
        note_same(evaluation, console.note)
    told = estimate.places(evaluation, after, output)
    planned = estimate.plan_evaluation(evaluation, told, dtype)
    show_plan(console, output, planned, lambda: estimate.evaluation_seconds(evaluation, told, device, dtype))


def open_erased(
    name: str, original: "Checkpoint", output: Path, opening: Opening, team: Any, dry_run: bool
) -> "Checkpoint":
    """The checkpoint of that name; of a file with an edit the original with it, a copy in the output.

    dry_run: the original alone stands for it, and nothing is written.
    """
    from trce_cli.edits.files import is_edit, open_edit
    from trce_cli.edits.trial import open_copy, put_on
    from trce_cli.system.processes import on_main

    if not is_edit(name):
        erased = opening.open(name)
        check_outside(output, (original, erased))
        return erased
    check_outside(output, (original,))
    if dry_run:
        open_edit(name)
        return original
    copy = output / ("edited.safetensors" if original.path.is_file() else "edited")
    on_main(team, lambda: put_on(original, name, copy))
    return open_copy(name, copy)


def split_compared(arguments: Sequence[str], compared: Sequence[Path]) -> tuple[list[str], list[Path]]:
    """Checkpoints, and results: what follows --compare may be several files without repeating the option."""
    if not compared:
        return list(arguments), []
    files = [Path(text) for text in arguments if text.endswith(".json")]
    return [text for text in arguments if not text.endswith(".json")], [*compared, *files]


def compare_only(paths: Sequence[Path], output: Path, console: Console, details: bool) -> None:
    """One table and one plot of earlier results."""
    from trce_cli.evaluate.compare import compare_results, read_results
    from trce_cli.evaluate.report import write_comparison

    told = compare_results([read_results(path) for path in paths])
    page = write_comparison(output, told)
    console.answer(evaluated.compared(told))
    if details:
        console.answer(evaluated.compared_details(told))
    console.show(f"Page to show: {page}")
    console.result({"output": output, "report": page, **told})
