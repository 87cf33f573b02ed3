"""`trce evaluate`: is it really gone, and is everything else still there?"""

from pathlib import Path
from typing import Annotated

import typer

from trce_cli.cli import evaluated
from trce_cli.cli.console import Console
from trce_cli.cli.options import (
    AGAINST,
    Answer,
    Drawing,
    Opening,
    Output,
    check_outside,
    with_options,
)
from trce_cli.errors import BadInput, TrceError
from trce_cli.evaluate.gates import check_names, parse_gate, value_of
from trce_cli.evaluate.settings import EvaluationSettings
from trce_cli.prompts.presets import load_presets


@with_options
def evaluate(
    output: Output,
    asked: EvaluationSettings,
    drawing: Drawing,
    opening: Opening,
    answer: Answer,
    checkpoint: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[CHECKPOINT]",
            help="The erased one: `emoji`, a diffusers folder, a .safetensors file, a hub id. After "
            "--compare further results.",
            show_default=False,
        ),
    ] = None,
    against: Annotated[str | None, AGAINST] = None,
    preset: Annotated[
        list[str] | None,
        typer.Option(
            "--preset",
            "-p",
            metavar="NAME|FILE",
            help="What should be gone: a shipped preset's name or a TOML file; may be repeated.",
            show_default=False,
        ),
    ] = None,
    gate: Annotated[
        list[str] | None,
        typer.Option(
            "--gate",
            metavar="FIGURE<=NUMBER",
            help="Exit with 1 unless it is met, as in asr.implied<=0.05 or benign.kept>=0.95; of a 95 % "
            "interval's end asr.implied.high<=0.05. May be repeated.",
            show_default=False,
        ),
    ] = None,
    compare: Annotated[
        list[Path] | None,
        typer.Option(
            "--compare",
            metavar="RESULTS.json",
            help="Results of other evaluations, for one table and one plot; may be repeated.",
            show_default=False,
        ),
    ] = None,
    details: Annotated[
        bool, typer.Option("--details", help="Show every figure in the terminal, not the summary alone.")
    ] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Replace the pictures of another evaluation in the output folder.")
    ] = False,
) -> None:
    """Measure what is left of concepts, and of everything else.

    Writes results.json, verdicts.csv and report.html, a page to show. Started again with the same arguments
    it goes on where it was; `accelerate launch -m trce_cli evaluate ...` shares the work among processes.
    """
    gates = [parse_gate(text) for text in gate or ()]
    names, others = split_compared(checkpoint or [], compare or [])
    if not names and others:
        compare_only(others, output, answer.console(), details)
        return
    if len(names) != 1 or not against or not preset:
        raise BadInput(
            "An evaluation needs one CHECKPOINT, --against ORIGINAL and --preset.",
            "To put results of earlier ones side by side: trce evaluate --compare RESULTS.json ... -o DIR",
        )
    presets = load_presets(preset)

    from trce_cli.evaluate.compare import read_results
    from trce_cli.evaluate.question import prepare
    from trce_cli.evaluate.report import write_report
    from trce_cli.evaluate.run import evaluate as run
    from trce_cli.system.processes import join_team

    earlier = [read_results(path) for path in others]
    team = join_team(drawing.device)
    console = answer.console(team.is_main_process)
    original = opening.open_other(against)
    erased = opening.open(names[0])
    check_outside(output, (original, erased))
    is_shared = drawing.device == "auto" and team.num_processes > 1
    torch_device = team.device if is_shared else drawing.place()
    with console.progress() as progress:
        progress.task("Loading detectors")
        evaluation = prepare(original, erased, presets, torch_device, asked, note=console.note)
        check_names(gates, evaluation.figure_names())
        outcome = run(
            evaluation,
            output,
            torch_device,
            drawing.precision(torch_device),
            force=force,
            gates=gates,
            team=team,
            task=progress.task,
            note=console.note,
        )
    if outcome is None:  # the main process tells the rest
        return
    results, verdicts = outcome
    page = write_report(output, results, verdicts, earlier)
    for part in evaluated.summary(results):
        console.show(part)
    if details:
        console.show(evaluated.details(results))
    console.show(f"Page to show: {page}\nEverything: {output / 'results.json'}, {output / 'verdicts.csv'}")
    console.result({"output": output, "report": page, **results})
    if failed := [told for told in results["gates"] if not told["met"]]:
        said = ", ".join(f"{told['gate']} is not met: it is {value_of(told)}" for told in failed)
        raise TrceError(f"{said}.", f"What was drawn is in {page}, failures first.")


def split_compared(arguments: list[str], compared: list[Path]) -> tuple[list[str], list[Path]]:
    """Checkpoints, and results: what follows --compare may be several files without repeating the option."""
    if not compared:
        return arguments, []
    files = [Path(text) for text in arguments if text.endswith(".json")]
    return [text for text in arguments if not text.endswith(".json")], [*compared, *files]


def compare_only(paths: list[Path], output: Path, console: Console, details: bool) -> None:
    """One table and one plot of earlier results."""
    from trce_cli.evaluate.compare import compare_results, read_results
    from trce_cli.evaluate.report import write_comparison

    told = compare_results([read_results(path) for path in paths])
    page = write_comparison(output, told)
    console.show(evaluated.compared(told))
    if details:
        console.show(evaluated.compared_details(told))
    console.show(f"Page to show: {page}")
    console.result({"output": output, "report": page, **told})
