"""`trce map`: stage 1, a concept erased from a checkpoint in closed form."""

from collections.abc import Sequence
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
from trce_cli.cli.written import (
    NO_LIMIT,
    add_changes,
    guard_table,
    hash_original,
    judged,
    show_verdict,
    show_written,
    write,
)
from trce_cli.erase.settings import Guarding, choose_map_settings
from trce_cli.families.registry import FURTHER_STREAMS
from trce_cli.prompts.home import EMBEDDED
from trce_cli.prompts.pairs import pair_prompts, prompt_pairs
from trce_cli.prompts.presets import Preset, load_presets, preset_names
from trce_cli.prompts.settings import MapTable
from trce_cli.settings import Flag, Settings

if TYPE_CHECKING:
    from rich.table import Table

    from trce_cli.checkpoint.checkpoint import Checkpoint


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
    for remark in remarks + _hint(source, chosen) + notes(source, outputs) + source.cut(pair_prompts(chosen)):
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
    show_verdict(console, solution.figures)
    refuse_collateral(solution.figures, guarding.max_collateral)
    edit = erasure.map(solution, perf_counter() - start, hashes)
    lora = write(console, Edited(source, edit.weight_edits(source), edit.made, edit), outputs)
    entry, seconds = edit.made.history[-1], perf_counter() - start
    show_written(console, output, outputs, source.name, entry, lora, seconds, publishing, source)


def _hint(source: "Checkpoint", chosen: Sequence[Preset]) -> list[str]:
    """On presets made for an embedded checkpoint, where only others were chosen, shipped too."""
    from trce_cli.checkpoint.home import home_of

    if home_of(source).folder is None:
        return []
    shipped = preset_names()
    own = [name for name in shipped if name.startswith(tuple(f"{home.name}-" for home in EMBEDDED))]
    if any(preset.name not in shipped or preset.name in own for preset in chosen):
        return []
    return [f"{source.name} draws little that other presets name; made for it: {', '.join(own)}."]


def _seconds(source: Any, planned: dict[str, Any], benign: Any, outputs: Any, encoding: Encoding) -> float:
    from trce_cli.erase.estimate import map_seconds

    return map_seconds(source, planned, benign, outputs, encoding.place())


def _guard_table(figures: dict[str, Any]) -> "Table":
    table = guard_table("What the edit does")
    _add_way(table, figures, figures, "", "Cosine of unsafe to safe prompts", "Way to the safe prompts")
    captions = f"{figures['canaries']} canary captions"
    add_changes(table, figures["canary_change"], captions, figures, "canary_change")
    if "bystander_change" in figures:
        bystanders = f"{figures['bystanders']} captions of bystanders"
        add_changes(table, figures["bystander_change"], bystanders, figures, "bystander_change")
    if "word_change" in figures:
        words = f"{figures['held_out_words']} words of no prior"
        add_changes(table, figures["word_change"], words, figures, "word_change")
    _add_size(table, figures, figures, "")
    for name in (name for name in figures if name.startswith("clip_skip_")):
        title = name.replace("_", " ").capitalize()
        _add_way(table, figures, figures[name], f"{name}.", f"{title}: cosine of unsafe to safe", "... way")
        changes = figures[name]["canary_change"]
        add_changes(table, changes, f"{captions} so read", figures, f"{name}.canary_change")
    for stream in figures.keys() & set(FURTHER_STREAMS):
        further, of = figures[stream], f"{stream}."
        _add_way(table, figures, further, of, f"{stream.capitalize()}: cosine of unsafe to safe", "... way")
        verdict = judged(figures, f"{of}canary_change")
        table.add_row(f"... change, {captions}", "", f"{further['canary_change']:.1%}", verdict)
        _add_size(table, figures, further, of)
    return table


def _add_way(table: "Table", figures: dict[str, Any], part: dict[str, Any], of: str, *names: str) -> None:
    """Rows on how far what is to be erased is moved. part: of figures what `of` stands before."""
    before, after = (part["cosine_to_safe"][when] for when in ("before", "after"))
    lowest = "... lowest" if of else f"... lowest of {figures['pairs']} pairs"
    for row, which in ((f"{names[0]}, mean", "mean"), (lowest, "min")):
        table.add_row(row, f"{before[which]:.3f}", f"{after[which]:.3f}", NO_LIMIT)
    table.add_row(f"{names[1]}, done", "", f"{part['moved']:.1%}", judged(figures, f"{of}moved"))
    for name, what in (("padding_moved", "padding"), ("eot_padding_moved", "padding with EoT")):
        if name in part:
            table.add_row(f"... by {what}", "", f"{part[name]:.1%}", judged(figures, f"{of}{name}"))


def _add_size(table: "Table", figures: dict[str, Any], part: dict[str, Any], of: str) -> None:
    """Rows on the edit's own size."""
    begin = "... s" if of else "S"
    verdict = judged(figures, f"{of}norm", "g")
    table.add_row(f"{begin}pectral norm of the change", "", f"{part['norm']:.3g}", verdict)
    row = f"{'... c' if of else 'C'}ondition number, within rank {part['rank']} of {part['dim']}"
    table.add_row(row, "", f"{part['condition']:.2g}", NO_LIMIT)
    if "deflated" in part:
        row = f"{'... d' if of else 'D'}imensions taken away, of {part['dim']}"
        table.add_row(row, "", str(part["deflated"]), NO_LIMIT)
