"""`trce apply`: maps and LoRAs on any checkpoint of the same text encoder."""

from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Annotated, Any

import typer

from trce_cli.cli.console import Console
from trce_cli.cli.options import (
    CheckpointName,
    Config,
    EditDType,
    Energy,
    Force,
    Forms,
    Json,
    Link,
    Output,
    Quiet,
    Rank,
    Revision,
    Variant,
    files_read,
)
from trce_cli.system.foreign import identities

if TYPE_CHECKING:
    from rich.table import Table


def apply(
    edits: Annotated[
        list[Path],
        typer.Argument(
            metavar="EDIT",
            help="Maps and LoRAs in .safetensors files, in the order in which they act.",
            show_default=False,
        ),
    ],
    checkpoint: CheckpointName,
    output: Output,
    strength: Annotated[
        float, typer.Option(help="How much of each edit to apply: 0 is nothing, 1 all of it, 1.5 beyond.")
    ] = 1.0,
    forms: Forms = None,
    allow_other_text_encoder: Annotated[
        bool,
        typer.Option(
            "--allow-other-text-encoder",
            help="Apply an edit of another text encoder, such as the original of a fine-tuned one, and show "
            "what it does there.",
        ),
    ] = False,
    rank: Rank = None,
    energy: Energy = None,
    edit_dtype: EditDType = None,
    revision: Revision = None,
    variant: Variant = None,
    config: Config = None,
    link: Link = False,
    force: Force = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Put maps and LoRAs on a checkpoint with the same text encoder.

    Several are applied one after the other; of maps that is the product of their matrices.
    """
    from trce_cli.checkpoint.open import open_checkpoint
    from trce_cli.edits.edit import check_strength
    from trce_cli.edits.files import open_edit
    from trce_cli.edits.outputs import choose_outputs

    start = perf_counter()
    console = Console(json, quiet)
    check_strength(strength)
    opened = [open_edit(path) for path in edits]
    read = identities(edits)
    source = open_checkpoint(checkpoint, revision, variant, config)
    outputs = choose_outputs(source, output, forms, rank, energy, edit_dtype, force, link)
    outputs.check(source, files_read([], *edits, config))

    from trce_cli.edits.edit import Made
    from trce_cli.edits.files import check_fits, combine, record_apply
    from trce_cli.edits.outputs import lora_lines, notes, total_bytes, write_outputs
    from trce_cli.erase.map_guard import concept_pairs, measure

    fits = [check_fits(edit, source, allow_other_text_encoder) for edit in opened]
    combined, text_map = combine(opened, source, strength)
    history = [entry for edit in opened if edit.made for entry in edit.made.history]
    for note in notes(source, outputs):
        console.note(note)
    figures: dict[str, Any] = {}
    with console.progress() as progress:
        if not all(fits):
            figures = measure(source, combined, concept_pairs(history), progress.stage)
        hashing = progress.stage("Hashing the original", round(source.total_bytes() / 1e6), "MB")
        source.hashes(lambda count: hashing(count / 1e6))
    if not all(fits):
        console.show(_guard_table(figures))
        console.warn(f"{source.name} has another text encoder than the edit was made for.")
    entry = record_apply(source, edits, opened, strength, figures, perf_counter() - start)
    made = Made(source.family, source.text_encoder_hash(), (*history, entry))
    with console.progress() as progress:
        writing = progress.stage("Writing", round(total_bytes(source, outputs) / 1e6), "MB")
        lora = write_outputs(
            source, combined, made, outputs, text_map, lambda count: writing(count / 1e6), read=read
        )
    for line in lora_lines(lora) if lora else []:
        console.note(line)
    where = ", ".join(map(str, outputs.paths.values()))
    console.note(f"Wrote {where} in {perf_counter() - start:.1f} s.")
    result = {"output": output, "outputs": dict(outputs.paths), **entry}
    console.result(result | ({"lora": lora} if lora else {}))


def _guard_table(figures: dict[str, Any]) -> "Table":
    from rich.table import Table

    table = Table("Guard", "Before", "After", title="What the edit does with this text encoder")
    if "projected_cosine_to_safe" in figures:
        before, after = (figures["projected_cosine_to_safe"][when] for when in ("before", "after"))
        row = "Cosine of unsafe to safe EoT in keys and values"
        table.add_row(f"{row}, mean", f"{before['mean']:.3f}", f"{after['mean']:.3f}")
        table.add_row(
            f"... lowest of {figures['pairs']} pairs", f"{before['min']:.3f}", f"{after['min']:.3f}"
        )
    for kind, change in figures["canary_change"].items():
        row = f"Change of {kind} on {figures['canaries']} canary captions, mean (largest) of the layers"
        table.add_row(row, "", f"{change['mean']:.2%} ({change['max']:.2%})")
    return table
