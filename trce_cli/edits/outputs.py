"""What an edit is written as: a checkpoint in either layout, a LoRA, or a map; one or several of them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from trce_cli.checkpoint.checkpoint import Checkpoint
from trce_cli.checkpoint.convert import left_behind, write_converted
from trce_cli.checkpoint.copy import Form, check_output, needed_bytes, write_patched
from trce_cli.checkpoint.provenance import provenance_files
from trce_cli.edits.edit import EDIT_DTYPES, EditDType, Made, WeightEdit, write_edit_file
from trce_cli.edits.factor import factor
from trce_cli.edits.map import Map
from trce_cli.edits.recover import since
from trce_cli.errors import BadInput
from trce_cli.maths.low_rank import Size
from trce_cli.system.foreign import Identity, check_unchanged
from trce_cli.system.paths import real_path
from trce_cli.system.progress import Report, no_report

# What a form's name is, where several are written, after --output without its own ending.
_ENDINGS: Final[Mapping[Form, str]] = {
    "diffusers": "",
    "single-file": ".safetensors",
    "lora": ".lora.safetensors",
    "map": ".map.safetensors",
}


@dataclass(frozen=True)
class Outputs:
    """Where an edit is written and how.

    paths: form -> file or folder. size, dtype: of a LoRA's factors, and of the numbers in edit files.
    """

    paths: Mapping[Form, Path]
    size: Size = field(default_factory=Size)
    dtype: EditDType = "float32"
    force: bool = False
    link: bool = False

    def check(self, checkpoint: Checkpoint, inputs: Sequence[Path] = ()) -> None:
        """Check before any work that all of them can be written; errors are those of `check_output`.

        inputs: further files and folders that are read, and must neither be replaced nor lie in what is.
        """
        for form, path in self.paths.items():
            real = check_output(checkpoint, path, self.force, self.link, form)
            for read in map(real_path, inputs):
                if read.is_relative_to(real):
                    what = "is the input itself" if read == real else f"holds {read}, which is read"
                    raise BadInput(f"The output {path} {what}.", "Choose another --output.")

    def needed_bytes(self, checkpoint: Checkpoint) -> dict[Path, int]:
        """What each of them takes on its disk, as far as it is known before it is made."""
        return {path: needed_bytes(checkpoint, path, self.link, form) for form, path in self.paths.items()}


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

    forms: names of `Form`. One, by default the checkpoint's own layout, goes to `output` itself, several to
    `output` with an ending for each.
    """
    chosen = [form for form in _ENDINGS if form in (forms or [checkpoint.layout])]
    if "lora" not in chosen and (rank is not None or energy is not None):
        raise BadInput("--rank and --energy are for --as lora, which is not asked for.")
    if rank is not None and energy is not None:
        raise BadInput("Both --rank and --energy are given.", "Choose one of them.")
    if dtype is not None and not {"lora", "map"} & set(chosen):
        raise BadInput("--edit-dtype is for --as lora and map; a checkpoint keeps its own dtype.")
    if dtype not in (None, *EDIT_DTYPES):
        raise BadInput(f"Edits are stored in fp32 or fp16, not in {dtype}.")
    paths: dict[Form, Path] = {chosen[0]: output}
    if len(chosen) > 1:
        if not output.name:
            raise BadInput(f"The output {output} has no name to add endings to.", "Choose another --output.")
        stem = output.with_suffix("") if output.suffix == ".safetensors" else output
        paths = {form: stem.with_name(stem.name + _ENDINGS[form]) for form in chosen}
    return Outputs(
        paths,
        Size(rank) if energy is None else Size(energy=energy),
        "float16" if dtype == "float16" else "float32",
        force,
        link,
    )


def notes(checkpoint: Checkpoint, outputs: Outputs) -> list[str]:
    """Sentences on what the outputs will not contain, and why."""
    found = checkpoint.notes() if checkpoint.layout in outputs.paths else []
    other = {"diffusers", "single-file"} - {checkpoint.layout}
    return found + (left_behind(checkpoint) if other & outputs.paths.keys() else [])


def write_outputs(
    checkpoint: Checkpoint,
    edits: Mapping[str, WeightEdit],
    made: Made,
    outputs: Outputs,
    text_map: Map | None = None,
    report: Report = no_report,
    original: Checkpoint | None = None,
    files: Mapping[str, bytes] | None = None,
    read: Mapping[Path, Identity] | None = None,
) -> dict[str, Any]:
    """Write the edited checkpoint, or the edit, in every form, each whole or not at all.

    edits: diffusers key -> function from the old weight to the new one. made: how the edit was made; the last
    entry of its history goes into checkpoints, all of it into edit files. text_map: where given, what the
    edits are on all weights that a map changes. report: called with bytes written, `total_bytes` in all.
    original: what a LoRA is for, where the checkpoint is edited already; it then holds what was done before
    as well. files: more files for the folder. read: further files that the edits come from. Returns the
    figures of the LoRA where one was written. Errors are those of `write_patched`, and BadInput for a map
    where the edit is more than one.
    """

    def unchanged() -> None:
        for one in (checkpoint, original):
            if one is not None:
                one.check_unchanged()
        check_unchanged(read or {})

    if "map" in outputs.paths and (
        text_map is None or edits.keys() - text_map.weight_edits(checkpoint).keys()
    ):
        raise BadInput("This edit is more than a map of text embeddings.", "Write it --as lora.")
    beside = provenance_files(checkpoint, made.history[-1]) | dict(files or {})
    figures: dict[str, Any] = {}
    for form, path in outputs.paths.items():
        if form == "map" and text_map is not None:
            write_edit_file(
                path, text_map.tensors(outputs.dtype), made.metadata("map"), outputs.force, unchanged
            )
        elif form == "lora":
            parts = edits, text_map
            if original is not None:
                parts = since(original, checkpoint, edits, made)
            lora = factor(original or checkpoint, parts[0], made, parts[1], outputs.size, outputs.dtype)
            write_edit_file(path, lora.tensors, lora.metadata, outputs.force, unchanged)
            figures = dict(lora.figures)
        elif form == checkpoint.layout:
            write_patched(checkpoint, path, edits, beside, outputs.force, outputs.link, report, unchanged)
        else:
            write_converted(checkpoint, path, edits, beside, outputs.force, report, unchanged)
    return figures


def total_bytes(checkpoint: Checkpoint, outputs: Outputs) -> int:
    """About how many bytes `write_outputs` reports."""
    return checkpoint.total_bytes() * len(outputs.paths.keys() & {"diffusers", "single-file"})


def lora_lines(figures: Mapping[str, Any]) -> list[str]:
    """What a LoRA keeps of the edit, in sentences."""
    error = figures["truncation_error"]
    rank = figures.get("shared_rank", figures["max_rank"])
    lines = [
        f"LoRA of rank {rank}, {figures['layers']} layers. Truncation error, mean (largest) of the layers: "
        + "; ".join(f"{part['mean']:.3%} ({part['max']:.3%}) of the {what}" for what, part in error.items())
        + "."
    ]
    if left_out := figures["left_out"]:
        lines.append(
            f"A LoRA has no place for {len(left_out)} changed weights, such as {left_out[0]}: left out."
        )
    return lines
