"""`trce map`: stage 1, a concept erased from a checkpoint in closed form."""

from functools import partial
from time import perf_counter
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field, create_model

from trce_cli.cli.options import (
    Answer,
    Captions,
    CheckpointName,
    Computing,
    DryRun,
    DTypeName,
    Force,
    Opening,
    Output,
    Presets,
    Publishing,
    Writing,
    files_read,
    with_options,
)
from trce_cli.cli.plans import show_plan
from trce_cli.cli.written import add_changes, hash_original, show_verdicts, show_written, write
from trce_cli.erase.settings import Guarding, choose_map_settings
from trce_cli.families.registry import FURTHER_STREAMS
from trce_cli.prompts.pairs import pair_prompts, prompt_pairs
from trce_cli.prompts.presets import load_presets
from trce_cli.prompts.settings import MapTable
from trce_cli.settings import Flag, Settings

if TYPE_CHECKING:
    from rich.table import Table


class Encoding(Computing):
    """Where and how prompts are encoded."""

    dtype: DTypeName | None = Field(
        None,
        description="Precision that prompts are encoded in: fp32, fp16 or bf16; else fp32. Weights keep "
        "theirs.",
    )


_STREAMS: dict[str, Any] = {
    stream: (
        Annotated[bool, Flag((f"--{stream}/--no-{stream}",))],
        Field(True, description=f"Map the {stream} embeddings as well, where the family has them."),
    )
    for stream in FURTHER_STREAMS
}
# Which streams of embeddings are mapped beside the main one.
Streams = create_model("Streams", __base__=Settings, **_STREAMS)


@with_options
def map_(
    checkpoint: CheckpointName,
    presets: Presets,
    output: Output,
    given: Annotated[dict[str, Any], MapTable],
    streams: Annotated[dict[str, bool], Streams],
    encoding: Encoding,
    captions: Captions,
    guarding: Guarding,
    writing: Writing,
    publishing: Publishing,
    opening: Opening,
    answer: Answer,
    force: Force = False,
    dry_run: DryRun = False,
) -> None:
    """Erase concepts in closed form, in seconds (stage 1).

    The text embeddings of unsafe prompts are mapped to those of safe ones where prompts enter the denoiser,
    by every stream. The result is a complete checkpoint of the same form, with trce.json and a model card
    beside the weights, or what --as names.
    """
    from trce_cli.checkpoint.provenance import erased_before
    from trce_cli.edits.forms import Edited
    from trce_cli.edits.outputs import notes, total_bytes
    from trce_cli.erase.map_plan import plan
    from trce_cli.erase.prior import choose_prior

    start, console = perf_counter(), answer.console()
    chosen, source = load_presets(presets), opening.open(checkpoint)
    without = tuple(name for name, mapped in streams.items() if not mapped)
    settings, remarks = choose_map_settings(given | {"without": without}, chosen, source.family)
    outputs = writing.outputs(source, output, force)
    outputs.check(source, files_read(presets, captions.prior, opening.config))
    publishing.check()
    benign = choose_prior(source, captions.prior, console.note)
    for name in erased_before(source, chosen):
        console.warn(f"{source.name} has been without {name} already, which is erased from it once more.")
    for remark in remarks + notes(source, outputs) + source.cut(pair_prompts(chosen)):
        console.note(remark)
    if dry_run:
        planned = plan(source, output, prompt_pairs(chosen), benign, settings)
        planned["disk_bytes"] = total_bytes(source, outputs)
        told = {"outputs": dict(outputs.paths), **planned}
        show_plan(console, output, told, partial(_seconds, source, planned, benign, outputs, encoding))
        return

    import torch

    from trce_cli.erase.erasure import Erasure
    from trce_cli.erase.map_verdict import refuse_collateral

    precision = getattr(torch, encoding.dtype or "float32")
    erasure = Erasure(source, chosen, settings, benign, encoding.place(), precision)
    with console.progress() as progress:
        solution = erasure.solve(progress.task)
        hashes = hash_original(source, progress)
    console.show(_guard_table(solution.figures))
    show_verdicts(console, solution.figures)
    refuse_collateral(solution.figures, guarding.max_collateral)
    edit = erasure.map(solution, perf_counter() - start, hashes)
    lora = write(console, Edited(source, edit.weight_edits(source), edit.made, edit), outputs)
    entry, seconds = edit.made.history[-1], perf_counter() - start
    show_written(console, output, outputs, source.name, entry, lora, seconds, publishing, source)


def _seconds(source: Any, planned: dict[str, Any], benign: Any, outputs: Any, encoding: Encoding) -> float:
    from trce_cli.erase.estimate import map_seconds

    return map_seconds(source, planned, benign, outputs, encoding.place())


def _guard_table(figures: dict[str, Any]) -> "Table":
    from rich.table import Table

    table = Table("Guard", "Before", "After", title="What the edit does")
    before, after = (figures["cosine_to_safe"][when] for when in ("before", "after"))
    change, rank, dim = figures["canary_change"], figures["rank"], figures["dim"]
    table.add_row(
        "Cosine of unsafe to safe embeddings, mean", f"{before['mean']:.3f}", f"{after['mean']:.3f}"
    )
    table.add_row(f"... lowest of {figures['pairs']} pairs", f"{before['min']:.3f}", f"{after['min']:.3f}")
    table.add_row("Targets moved, of their way to the safe embeddings", "", f"{figures['moved']:.1%}")
    _add_paddings(table, figures)
    add_changes(table, change, f"{figures['canaries']} canary captions")
    if "bystander_change" in figures:
        add_changes(table, figures["bystander_change"], f"{figures['bystanders']} captions of bystanders")
    if "word_change" in figures:
        add_changes(table, figures["word_change"], f"{figures['held_out_words']} words of no prior")
    table.add_row("Spectral norm of the change", "", f"{figures['norm']:.3g}")
    table.add_row(f"Condition number, within rank {rank} of {dim}", "", f"{figures['condition']:.2g}")
    for name in (name for name in figures if name.startswith("clip_skip_")):
        skipped = figures[name]
        before, after = (f"{skipped['cosine_to_safe'][when]['mean']:.3f}" for when in ("before", "after"))
        title = name.replace("_", " ").capitalize()
        table.add_row(f"{title}: cosine of unsafe to safe embeddings, mean", before, after)
        table.add_row("... targets moved", "", f"{skipped['moved']:.1%}")
        _add_paddings(table, skipped)
        add_changes(table, skipped["canary_change"], f"{figures['canaries']} canary captions so read")
    for stream in figures.keys() & set(FURTHER_STREAMS):
        further = figures[stream]
        before, after = (further["cosine_to_safe"][when] for when in ("before", "after"))
        name = stream.capitalize()
        table.add_row(
            f"{name}: cosine of unsafe to safe, mean", f"{before['mean']:.3f}", f"{after['mean']:.3f}"
        )
        table.add_row("... lowest", f"{before['min']:.3f}", f"{after['min']:.3f}")
        table.add_row("... targets moved", "", f"{further['moved']:.1%}")
        table.add_row("... change of canary captions where it enters", "", f"{further['canary_change']:.2%}")
        table.add_row("... spectral norm of the change", "", f"{further['norm']:.3g}")
        row = f"... condition number, within rank {further['rank']} of {further['dim']}"
        table.add_row(row, "", f"{further['condition']:.2g}")
    return table


def _add_paddings(table: "Table", figures: dict[str, Any]) -> None:
    for name, what in (("padding_moved", "Padding"), ("eot_padding_moved", "Padding with EoT")):
        if name in figures:
            table.add_row(f"{what} behind held-out prompts moved, of its way", "", f"{figures[name]:.1%}")
