"""Where an edit is written, in one form or several, and how."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from trce_cli.checkpoint.checkpoint import Checkpoint
from trce_cli.checkpoint.checks import check_weights
from trce_cli.checkpoint.copy import check_output
from trce_cli.checkpoint.measured import CARD
from trce_cli.checkpoint.provenance import provenance_files
from trce_cli.checkpoint.push import handed_out
from trce_cli.edits.edit import EDIT_DTYPES
from trce_cli.edits.forms import FORMS, Edited, Form, How
from trce_cli.errors import BadInput
from trce_cli.maths.low_rank import Size
from trce_cli.system.paths import real_path
from trce_cli.system.progress import Report, no_report
from trce_cli.system.whole import together


@dataclass(frozen=True)
class Outputs:
    """Where an edit is written and how. paths: a form's name -> file or folder."""

    paths: Mapping[str, Path]
    how: How

    @property
    def forms(self) -> list[tuple[Form, Path]]:
        """The forms that are written, and where."""
        return [(form, self.paths[form.name]) for form in FORMS if form.name in self.paths]

    @property
    def has_folder(self) -> bool:
        """Whether one of them has room for further files."""
        return any(form.folder for form, _ in self.forms)

    def check(self, checkpoint: Checkpoint, inputs: Sequence[Path] = ()) -> None:
        """Check before any work that all of them can be written; errors are those of `check_output`.

        inputs: further files and folders that are read, and must neither be replaced nor lie in what is.
        """
        for form, path in self.forms:
            if form.is_checkpoint:
                check_weights(checkpoint, converting=form.name != checkpoint.layout)
            needed = partial(form.needed_bytes, checkpoint, path, self.how.link)
            real = check_output(checkpoint, path, self.how.force, form.name, form.folder, needed)
            for read in map(real_path, inputs):
                if read.is_relative_to(real):
                    what = "is the input itself" if read == real else f"holds {read}, which is read"
                    raise BadInput(f"The output {path} {what}.", "Choose another --output.")

    def refuse(self, is_map: bool) -> None:
        """Raise BadInput where one of them cannot hold an edit that is a map, or more than that."""
        for form, _ in self.forms:
            if why := form.refuses(is_map):
                raise BadInput(why, "Write it --as lora.")

    def needed_bytes(self, checkpoint: Checkpoint) -> dict[Path, int]:
        """What each of them takes on its disk, as far as it is known before it is made."""
        return {path: form.needed_bytes(checkpoint, path, self.how.link) for form, path in self.forms}


def choose_outputs(
    checkpoint: Checkpoint,
    output: Path,
    forms: Sequence[str] | None,
    rank: int | None = None,
    energy: float | None = None,
    dtype: str | None = None,
    force: bool = False,
    link: bool = False,
) -> Outputs:
    """Where and how to write what the user asked for (None: not given); BadInput where it makes no sense.

    forms: their names. One goes to `output` itself, several to `output` with an ending for each. By
    default it is a single file where `output` is called `.safetensors`, else the checkpoint's own layout.
    """
    usual = "single-file" if output.suffix.lower() == ".safetensors" else checkpoint.layout
    chosen = [form for form in FORMS if form.name in (forms or [usual])]
    if not any(form.has_size for form in chosen) and (rank is not None or energy is not None):
        sized = " and ".join(form.name for form in FORMS if form.has_size)
        raise BadInput(f"--rank and --energy are for --as {sized}, which is not asked for.")
    if rank is not None and energy is not None:
        raise BadInput("Both --rank and --energy are given.", "Choose one of them.")
    if dtype is not None and all(form.is_checkpoint for form in chosen):
        edits = " and ".join(form.name for form in FORMS if not form.is_checkpoint)
        raise BadInput(f"--edit-dtype is for --as {edits}; a checkpoint keeps its own dtype.")
    if dtype not in (None, *EDIT_DTYPES):
        raise BadInput(f"Edits are stored in fp32 or fp16, not in {dtype}.")
    paths = {chosen[0].name: output}
    if len(chosen) > 1:
        if not output.name:
            raise BadInput(f"The output {output} has no name to add endings to.", "Choose another --output.")
        stem = output.with_suffix("") if output.suffix == ".safetensors" else output
        paths = {form.name: stem.with_name(stem.name + form.ending) for form in chosen}
    size = Size(rank) if energy is None else Size(energy=energy)
    return Outputs(paths, How(size, "float16" if dtype == "float16" else "float32", force, link))


def notes(checkpoint: Checkpoint, outputs: Outputs) -> list[str]:
    """Sentences on what was assumed of the checkpoint, and on what the outputs will not contain, and why."""
    return [*checkpoint.remarks, *(note for form, _ in outputs.forms for note in form.notes(checkpoint))]


def write_outputs(edited: Edited, outputs: Outputs, report: Report = no_report) -> dict[str, Any]:
    """Write the edited checkpoint, or the edit, in every form, all of them whole or none at all.

    report: called with bytes written, `total_bytes` in all. Returns the figures of the forms that keep only a
    part of the edit. Errors are those of `write_patched`, and BadInput for a form that cannot hold the edit.
    """
    outputs.refuse(edited.is_map)
    figures: dict[str, Any] = {}
    with together({real_path(path) for path in outputs.paths.values()}):
        for form, path in outputs.forms:
            figures |= form.write(edited, path, outputs.how, report)
    return figures


def published(
    checkpoint: Checkpoint, outputs: Outputs, entry: Mapping[str, Any], place: str
) -> dict[str, Path | bytes]:
    """What of the outputs is handed out, a name there -> a file or its content, with a card for that place.

    entry: what the edit's history says of it.
    """
    files: dict[str, Path | bytes] = {}
    for form, path in outputs.forms:
        files |= handed_out(path) if form.folder else {path.name: path}
    names = {form.name: path.name for form, path in outputs.forms}
    if list(names) == ["diffusers"]:
        names = {}
    made: dict[str, Path | bytes] = {**provenance_files(checkpoint, entry, place, names)}
    return made | files | {CARD: made[CARD]}


def total_bytes(checkpoint: Checkpoint, outputs: Outputs) -> int:
    """About how many bytes `write_outputs` reports."""
    return checkpoint.total_bytes() * sum(form.is_checkpoint for form, _ in outputs.forms)


def lora_lines(figures: Mapping[str, Any]) -> list[str]:
    """What a LoRA keeps of the edit, in sentences."""
    error = figures["truncation_error"]
    rank = figures.get("shared_rank", figures["max_rank"])
    lines = [
        f"LoRA of rank {rank}, {figures['layers']} layers. Truncation error, mean (largest) of the layers: "
        + "; ".join(f"{part['mean']:.3%} ({part['max']:.3%}) of the {what}" for what, part in error.items())
        + "."
    ]
    lines += [
        f"It holds the layer of the {stream} embeddings, which some tools leave out without a word and "
        f"others refuse: --no-{stream} makes one without it."
        for stream in figures["further_streams"]
    ]
    if left_out := figures["left_out"]:
        lines.append(
            f"A LoRA has no place for {len(left_out)} changed weights, such as {left_out[0]}: left out."
        )
    return lines
