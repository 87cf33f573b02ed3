"""`trce steer`: stage 2, early denoising steered away from a concept."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from trce_cli.cli.console import Console
from trce_cli.cli.options import (
    Answer,
    Computing,
    DryRun,
    Opening,
    Output,
    Presets,
    Publishing,
    Writing,
    files_read,
    goes_on,
    with_options,
)
from trce_cli.cli.plans import show_plan, size
from trce_cli.cli.tracking import logs_of
from trce_cli.cli.written import NO_LIMIT, guard_table, show_written
from trce_cli.erase.settings import Running, SteerSettings, Training, choose_steer_settings
from trce_cli.prompts.pairs import pair_prompts
from trce_cli.prompts.presets import every_part, load_presets, recommended

if TYPE_CHECKING:
    from accelerate import Accelerator
    from rich.table import Table

    from trce_cli.checkpoint.checkpoint import Checkpoint
    from trce_cli.edits.outputs import Outputs


Erased = Annotated[
    str,
    typer.Argument(
        metavar="ERASED",
        help="What `trce map` wrote; or any checkpoint, for stage 2 alone.",
        show_default=False,
    ),
]
Original = Annotated[
    str | None,
    typer.Option(
        metavar="ORIGINAL",
        help="The original model; else the base that is recorded in ERASED's trce.json.",
        show_default=False,
    ),
]


@with_options
@goes_on
def steer(
    erased: Erased,
    presets: Presets,
    output: Output,
    given: Annotated[dict[str, Any], SteerSettings],
    running: Running,
    computing: Computing,
    writing: Writing,
    publishing: Publishing,
    opening: Opening,
    answer: Answer,
    teacher: Original = None,
    force: Annotated[
        bool,
        typer.Option("--force", help="Replace an existing output, or an unfinished run of other arguments."),
    ] = False,
    dry_run: DryRun = False,
) -> None:
    """Fine-tune early denoising away from concepts (stage 2).

    Killed and started again with the same arguments it goes on where it was. `accelerate launch -m trce_cli
    steer` spreads it over several processes.
    """
    main = os.environ.get("RANK", "0") == "0"
    console, chosen = answer.console(main), load_presets(presets)
    recipe, training = choose_steer_settings(given, recommended(every_part(chosen), "steer"))

    from trce_cli.edits.outputs import notes
    from trce_cli.erase import steer as stage2
    from trce_cli.erase.estimate import steer_seconds
    from trce_cli.erase.prior import choose_prior
    from trce_cli.erase.step_memory import steer_memory
    from trce_cli.erase.teacher import find_teacher, other_presets
    from trce_cli.erase.trajectories import known_words, plan_trajectories
    from trce_cli.erase.working_folder import tidy

    source = opening.open(erased)
    original = find_teacher(source, teacher, opening.config, note=console.note, warn=console.warn)
    outputs = writing.outputs(source, output, force)
    outputs.refuse(is_map=False)
    if main:
        outputs = outputs if dry_run else tidy(output, outputs)
        publishing.check()
        outputs.check(source, files_read(presets, original.checkpoint.path, opening.config))
    for name in other_presets(source, chosen):
        console.warn(f"Stage 1 of {source.name} did not erase {name}, which stage 2 steers away from alone.")
    words = known_words(source, chosen, recipe)
    plan = plan_trajectories(source, chosen, choose_prior(source), recipe, words)
    planned = {"teacher": original.checkpoint.name, **stage2.estimate(source, plan, training, outputs)}
    for line in (*source.cut(pair_prompts(chosen)), *notes(source, outputs)):
        console.note(line)
    if dry_run:
        memory = partial(steer_memory, source, plan, training, running.gradient_checkpointing)
        show_plan(console, output, planned, lambda: steer_seconds(source, planned, computing.place()), memory)
        return
    console.note(_in_short(planned, running.trajectories))
    with _tracked(running, computing, training, output, given) as accelerator, console.progress() as progress:
        entry = stage2.steer(
            source, original.checkpoint, chosen, plan, training, output, accelerator, force=force,
            outputs=outputs, teacher_hashes=original.hashes, task=progress.task, **running.arguments(),
        )  # fmt: skip
    if main:
        _show(console, output, outputs, original.checkpoint.name, entry, publishing, source)


@contextmanager
def _tracked(
    running: Running, computing: Computing, training: Training, output: Path, given: dict[str, Any]
) -> Iterator["Accelerator"]:
    """Accelerate, with the tracker that was asked for; trackers talk, and stdout is for the result."""
    from trce_cli.erase.steer import make_accelerator

    logs = logs_of(output) if running.log_with else None
    accelerator = make_accelerator(computing.place(), training.mixed_precision, running.log_with, logs)
    if running.log_with:
        with redirect_stdout(sys.stderr):
            accelerator.init_trackers("trce-steer", {name: str(value) for name, value in given.items()})
    yield accelerator
    with redirect_stdout(sys.stderr):
        accelerator.end_training()


def _show(
    console: Console,
    output: Path,
    outputs: "Outputs",
    original: str,
    entry: dict[str, Any],
    publishing: Publishing,
    source: "Checkpoint",
) -> None:
    console.show(_guard_table(entry["figures"], entry["settings"]["max_drift"]))
    moved = entry["figures"]["unsafe"]
    if moved["prompt_after"] <= moved["prompt_before"]:
        console.warn("On held-out states the predictions did not move toward the safe concepts.")
    show_written(
        console, output, outputs, original, entry, entry.get("lora", {}), entry["seconds"], publishing, source
    )


def _in_short(planned: dict[str, Any], trajectories: Path | None) -> str:
    return (
        f"{planned['unsafe_states']:,} unsafe, {planned['unconditional_states']:,} unconditional and "
        f"{planned['benign_states']:,} benign states: "
        f"{size(planned['trajectory_bytes'])} in {trajectories or 'a working folder beside the output'}; "
        f"{planned['steps']:,} steps."
    )


def _guard_table(figures: dict[str, Any], max_drift: float) -> "Table":
    table = guard_table("What the edit does")
    unsafe, training, weights = figures["unsafe"], figures["training"], figures["weights"]
    for name, where in (("prompt", "Unsafe prompts"), ("empty", "... the same states, empty prompt")):
        row = f"{where}, from reject (0) to prefer (1), {unsafe['states']} held-out states"
        before, after = (unsafe[f"{name}_{when}"] for when in ("before", "after"))
        verdict = NO_LIMIT if name == "empty" else f"{'good' if after > before else 'bad'} (above before)"
        table.add_row(row, f"{before:.3f}", f"{after:.3f}", verdict)
    for name in ("unconditional", "benign"):
        row = f"Change of {name} predictions, {figures[name]['states']} held-out states"
        # beyond it nothing is written
        table.add_row(row, "", f"{figures[name]['drift']:.2%}", f"good (up to {max_drift:.0%})")
    before, after = (f"{figures['benign'][f'from_original_{when}']:.2%}" for when in ("before", "after"))
    table.add_row("Distance of benign predictions from the original's", before, after, NO_LIMIT)
    changed = f"{weights['changed_share']:.1%}"
    table.add_row("Tuned weights that changed, as they are saved", "", changed, NO_LIMIT)
    first, last = (training[when]["loss"] for when in ("first", "last"))
    row = f"Loss over the first and last of {training['steps']} steps"
    table.add_row(row, f"{first:.4g}", f"{last:.4g}", NO_LIMIT)
    return table
