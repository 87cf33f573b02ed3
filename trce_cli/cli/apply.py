"""`trce apply`: maps and LoRAs on any checkpoint of the same text encoder."""

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Annotated, Any

import typer
from pydantic import Field

from trce_cli.cli.console import Console
from trce_cli.cli.options import (
    Answer,
    CheckpointName,
    DryRun,
    Force,
    Opening,
    Output,
    Publishing,
    Writing,
    files_read,
    with_options,
)
from trce_cli.cli.plans import show_plan
from trce_cli.cli.written import (
    NO_LIMIT,
    add_changes,
    guard_table,
    hash_original,
    recorded_table,
    show_verdict,
    show_written,
    write,
)
from trce_cli.settings import NotNegative, Settings
from trce_cli.system.foreign import identities

if TYPE_CHECKING:
    from rich.table import Table


class Fitting(Settings):
    """How edits are put on a checkpoint."""

    strength: NotNegative = Field(
        1.0, description="How much of each edit to apply: 0 is nothing, 1 all of it, 1.5 beyond."
    )
    allow_other_text_encoder: bool = Field(
        False,
        description="Apply an edit of another text encoder, such as the original of a fine-tuned one, and "
        "show what it does there.",
    )
    denoiser_only: bool = Field(
        False,
        description="Of LoRAs that change the text encoder as well apply the rest alone, which is not what "
        "was trained; text encoders are never changed.",
    )

    @property
    def allowed(self) -> tuple[bool, bool]:
        """What `check_fits` is told."""
        return self.allow_other_text_encoder, self.denoiser_only


@with_options
def apply(
    edits: Annotated[
        list[str],
        typer.Argument(
            metavar="EDIT",
            help="Maps, LoRAs, and weights of a denoiser as other erasers write them, in .safetensors files, "
            "here or on the hub (owner/name/file.safetensors), in the order in which they act.",
            show_default=False,
        ),
    ],
    checkpoint: CheckpointName,
    output: Output,
    fitting: Fitting,
    writing: Writing,
    publishing: Publishing,
    opening: Opening,
    answer: Answer,
    force: Force = False,
    dry_run: DryRun = False,
) -> None:
    """Put maps, LoRAs and other erasers' weights on a checkpoint.

    Maps and LoRAs are of the same text encoder, unless --allow-other-text-encoder is given.

    Several are applied one after the other; of maps that is the product of their matrices.
    """
    from trce_cli.edits.edit import Made
    from trce_cli.edits.estimate import copy_seconds, plan_copy
    from trce_cli.edits.files import cautions, check_fits, combine, locate, open_edit, record_apply
    from trce_cli.edits.forms import Edited
    from trce_cli.edits.outputs import notes
    from trce_cli.erase.map_guard import concept_pairs, measure

    start, console = perf_counter(), answer.console()
    paths = [locate(str(each)) for each in edits]
    read, opened = identities(filter(Path.exists, paths)), [open_edit(path) for path in paths]
    source = opening.open(checkpoint)
    outputs = writing.outputs(source, output, force)
    outputs.check(source, files_read([], *paths, opening.config))
    publishing.check()
    text_encoder = source.text_encoder_hash()
    fits = [check_fits(edit, source, text_encoder, *fitting.allowed) for edit in opened]
    combined, text_map = combine(opened, source, fitting.strength)
    history = [entry for edit in opened if edit.made for entry in edit.made.history]
    for note in notes(source, outputs):
        console.note(note)
    for line in cautions(source, paths, opened):
        console.warn(line)
    if dry_run:
        seconds_of = partial(copy_seconds, source, outputs, combined)
        show_plan(console, output, plan_copy(source, outputs), seconds_of)
        return
    figures: dict[str, Any] = {}
    with console.progress() as progress:
        if not all(fits):
            figures = measure(source, combined, concept_pairs(history), progress.task)
        hashes = hash_original(source, progress, text_encoder)
    _show_guards(console, source.name, figures, zip(paths, opened, strict=True), fitting.strength)
    entry = record_apply(source, paths, opened, fitting.strength, figures, perf_counter() - start, hashes)
    made = Made(source.family, text_encoder, (*history, entry), hashes.sample)
    lora = write(console, Edited(source, combined, made, text_map, read=read), outputs)
    took = perf_counter() - start
    show_written(console, output, outputs, source.name, entry, lora, took, publishing, source)


def _show_guards(
    console: Console, name: str, figures: dict[str, Any], edits: Iterable[tuple[Path, Any]], strength: float
) -> None:
    """The guards as they were measured, and where nothing had to be as the files have them on record."""
    if figures:
        console.show(_guard_table(figures))
        show_verdict(console, figures)
        console.warn(f"{name} has another text encoder than the edit was made for.")
    elif strength == 1:
        for path, edit in edits:
            _show_recorded(console, path, edit.made.history if edit.made else ())


def _show_recorded(console: Console, path: Path, history: Sequence[Mapping[str, Any]]) -> None:
    """The guards of `trce map` as a file has them, which hold for every checkpoint of its text encoder."""
    from trce_cli.erase.map_verdict import recorded

    if verdicts := recorded(history):
        console.show(recorded_table(verdicts, f"What {path.name} does, by its own record"))
        show_verdict(console, {"verdicts": verdicts})


def _guard_table(figures: dict[str, Any]) -> "Table":
    table = guard_table("What the edit does with this text encoder")
    if "projected_cosine_to_safe" in figures:
        before, after = (figures["projected_cosine_to_safe"][when] for when in ("before", "after"))
        row = "Cosine of unsafe to safe where prompts enter"
        lowest = f"... lowest of {figures['pairs']} pairs"
        for name, which in ((f"{row}, mean", "mean"), (lowest, "min")):
            table.add_row(name, f"{before[which]:.3f}", f"{after[which]:.3f}", NO_LIMIT)
    captions = f"{figures['canaries']} canary captions"
    add_changes(table, figures["canary_change"], captions, figures, "canary_change")
    return table
