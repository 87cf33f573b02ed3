"""`trce steer`: stage 2, early denoising steered away from a concept."""

import importlib.util
import os
import sys
from contextlib import redirect_stdout
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
    Writing,
    files_read,
    with_options,
)
from trce_cli.cli.written import show_written
from trce_cli.erase.settings import Running, SteerSettings, choose_steer_settings
from trce_cli.errors import BadInput
from trce_cli.prompts.presets import load_presets, recommended

if TYPE_CHECKING:
    from rich.table import Table

    from trce_cli.checkpoint.checkpoint import Checkpoint
    from trce_cli.edits.outputs import Outputs


@with_options
def steer(
    erased: Annotated[
        str,
        typer.Argument(
            metavar="ERASED",
            help="What `trce map` wrote; or any checkpoint, for stage 2 alone.",
            show_default=False,
        ),
    ],
    presets: Presets,
    output: Output,
    given: Annotated[dict[str, Any], SteerSettings],
    running: Running,
    computing: Computing,
    writing: Writing,
    opening: Opening,
    answer: Answer,
    teacher: Annotated[
        str | None,
        typer.Option(
            metavar="ORIGINAL",
            help="The original model; else the base that is recorded in ERASED's trce.json.",
            show_default=False,
        ),
    ] = None,
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
    console = answer.console(main)
    chosen = load_presets(presets)
    recipe, training = choose_steer_settings(given, recommended(chosen, "steer"))
    if (tracker := running.log_with) and not importlib.util.find_spec(tracker):
        raise BadInput(f"{tracker} is not installed.", f"pip install {tracker}")

    from trce_cli.checkpoint.same_model import check_same_model
    from trce_cli.edits.outputs import notes
    from trce_cli.erase import steer as stage2
    from trce_cli.erase.prior import choose_prior
    from trce_cli.erase.trajectories import plan_trajectories
    from trce_cli.erase.working_folder import tidy

    source = opening.open(erased)
    original, original_hashes = _teacher(console, source, teacher, opening.config)
    check_same_model(original, source)
    outputs = writing.outputs(source, output, force)
    outputs.refuse(is_map=False)
    if main:
        tidy(output)
        outputs.check(source, files_read(presets, original.path, opening.config))
    plan = plan_trajectories(source, chosen, choose_prior(source), recipe)
    planned = stage2.estimate(source, plan, training, outputs)
    if dry_run:
        result = {"teacher": original.name, "output": str(output), **planned}
        console.show(_plan_table(result))
        console.result({"dry_run": True, **result})
        return
    console.note(_in_short(planned, running.trajectories))
    for note in notes(source, outputs):
        console.note(note)
    logs = output.parent / f"{output.name}-logs" if tracker else None
    accelerator = stage2.make_accelerator(computing.place(), training.mixed_precision, tracker, logs)
    if tracker:
        with redirect_stdout(sys.stderr):  # trackers talk, and stdout is for the result
            accelerator.init_trackers("trce-steer", {name: str(value) for name, value in given.items()})
    with console.progress() as progress:
        entry = stage2.steer(
            source,
            original,
            chosen,
            plan,
            training,
            output,
            accelerator,
            trajectories=running.trajectories,
            gradient_checkpointing=running.gradient_checkpointing,
            max_drift=running.max_drift,
            force=force,
            outputs=outputs,
            teacher_hashes=original_hashes,
            task=progress.task,
        )
    with redirect_stdout(sys.stderr):
        accelerator.end_training()
    if main:
        _show(console, output, outputs, original.name, entry)


def _show(console: Console, output: Path, outputs: "Outputs", original: str, entry: dict[str, Any]) -> None:
    console.show(_guard_table(entry["figures"]))
    moved = entry["figures"]["unsafe"]
    if moved["prompt_after"] <= moved["prompt_before"]:
        console.warn("On held-out states the predictions did not move toward the safe concepts.")
    show_written(console, output, outputs, original, entry, entry.get("lora", {}), entry["seconds"])


def _in_short(planned: dict[str, Any], trajectories: Path | None) -> str:
    return (
        f"{planned['unsafe_states']:,} unsafe, {planned['unconditional_states']:,} unconditional and "
        f"{planned['benign_states']:,} benign states: "
        f"{_size(planned['trajectory_bytes'])} in {trajectories or 'a working folder beside the output'}; "
        f"{planned['steps']:,} steps."
    )


def _teacher(
    console: Console, source: "Checkpoint", name: str | None, config: Path | None
) -> tuple["Checkpoint", list[str] | None]:
    """The checkpoint of `--teacher`, or the first base of the history; ERASED itself where it has none.

    With it the hashes of its denoiser, where the history has some to compare them with.
    """
    from trce_cli.checkpoint.open import open_checkpoint
    from trce_cli.checkpoint.provenance import history
    from trce_cli.erase.trajectory_set import denoiser_hashes

    entries = history(source)
    if not any(entry["edit"] in ("map", "apply") for entry in entries):
        console.note(f"{source.name} has not been mapped: stage 2 alone is the weaker half of the method.")
    if name is None and not entries:
        return source, None
    base = entries[0]["base"] if entries else {}
    if name is None:
        try:
            opened = open_checkpoint(base["name"], base.get("revision"), base.get("variant"), config)
        except BadInput as error:
            raise BadInput(
                f"The original that {source.name} was made from cannot be opened: {error.message}",
                "Name it with --teacher.",
            ) from None
    else:
        opened = open_checkpoint(name, config=config)
    hashes = denoiser_hashes(opened) if base else None
    if hashes is not None and not set(base["files"].values()) & set(hashes):
        differing = f"its {opened.family.network}'s weights differ"
        message = f"{opened.name} is not the original that {source.name} was made from: {differing}."
        if name is None:
            raise BadInput(message, "Name the original with --teacher.")
        console.warn(message)
    return opened, hashes


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def _plan_table(planned: dict[str, Any]) -> "Table":
    from rich.table import Table

    table = Table("Plan", "", title="Nothing was written")
    for name, value in planned.items():
        if name == "evaluations":
            for model, count in value.items():
                table.add_row(f"U-Net evaluations, {model}", f"{count:,}")
        elif name.endswith("_bytes"):
            table.add_row(f"{name.removesuffix('_bytes').replace('_', ' ')}, bytes", _size(value))
        else:
            table.add_row(name.replace("_", " "), f"{value:,}" if isinstance(value, int) else value)
    return table


def _guard_table(figures: dict[str, Any]) -> "Table":
    from rich.table import Table

    table = Table("Guard", "Before", "After", title="What the edit does")
    unsafe, training, weights = figures["unsafe"], figures["training"], figures["weights"]
    for name, where in (("prompt", "Unsafe prompts"), ("empty", "... the same states, empty prompt")):
        row = f"{where}, from reject (0) to prefer (1), {unsafe['states']} held-out states"
        table.add_row(row, f"{unsafe[f'{name}_before']:.3f}", f"{unsafe[f'{name}_after']:.3f}")
    for name in ("unconditional", "benign"):
        row = f"Change of {name} predictions, {figures[name]['states']} held-out states"
        table.add_row(row, "", f"{figures[name]['drift']:.2%}")
    before, after = (f"{figures['benign'][f'from_original_{when}']:.2%}" for when in ("before", "after"))
    table.add_row("Distance of benign predictions from the original's", before, after)
    table.add_row("Tuned weights that changed, as they are saved", "", f"{weights['changed_share']:.1%}")
    first, last = (training[when]["loss"] for when in ("first", "last"))
    table.add_row(f"Loss over the first and last of {training['steps']} steps", f"{first:.4g}", f"{last:.4g}")
    return table
