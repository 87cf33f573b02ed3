"""Checkpoints in the other layout: a single file as a diffusers folder, a folder as a single file.

Tensors are read, edited, renamed and written one by one. Values and dtypes stay; how the layouts differ the
family's `Names` say.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final

from trce_cli.checkpoint.checkpoint import Checkpoint, Place
from trce_cli.checkpoint.checks import check_weights
from trce_cli.checkpoint.copy import check_output, copied_bytes
from trce_cli.checkpoint.provenance import single_file_metadata
from trce_cli.errors import BadInput
from trce_cli.families.base import Stored
from trce_cli.system.foreign import read_bytes
from trce_cli.system.paths import inside
from trce_cli.system.progress import Report, no_report
from trce_cli.system.safetensors import (
    Edit,
    NewTensor,
    copy_file,
    rounded_edit,
    write_tensors,
)
from trce_cli.system.whole import whole

if TYPE_CHECKING:
    import torch

_TEXT_SUFFIXES: Final = {".json", ".txt", ".jinja", ".md", ".model"}  # what a folder holds besides weights
_TEXT: Final = 64 << 20  # bytes of one of them, at most
_STEMS: Final = {"transformers": "model"}  # of weight files by library; else diffusers' name

Tensors = dict[str, NewTensor]


def write_folder(
    checkpoint: Checkpoint,
    output: Path,
    edits: Mapping[str, Edit],
    files: Mapping[str, bytes],
    force: bool = False,
    report: Report = no_report,
    unchanged: Callable[[], None] | None = None,
) -> Path:
    """Write an edited copy of a single file as a diffusers folder, whole or not at all; returns its path.

    Configurations and tokenizers are those of its `config_folder`, and so are parts that the file does not
    hold, which are copied byte for byte. Arguments and errors are those of
    `write_patched`; of several copies of the denoiser the first is written.
    """
    check_weights(checkpoint, converting=True)
    needed = partial(copied_bytes, checkpoint, output, False)
    output = check_output(checkpoint, output, force, "diffusers", True, needed)
    with whole(output, force, unchanged or checkpoint.check_unchanged) as fresh:
        family, weights = checkpoint.family, _weights(checkpoint)
        index = dict(checkpoint.config["model_index"])
        parts = {family.denoiser if part == "denoiser" else part: places for part, places in weights.items()}
        for part in parts:
            if not isinstance(index.get(part), list):
                raise BadInput(
                    f"{checkpoint.config_folder / 'model_index.json'} does not name {part}'s class."
                )
        for name, entry in index.items():
            if isinstance(entry, list) and name not in (*parts, *family.other_parts):
                index[name] = [None, None]  # a single file has no such part
        if "requires_safety_checker" in index:
            index["requires_safety_checker"] = False
        borrowed = {
            part: {place.file.path for place in places.values()}
            for part, places in parts.items()
            if all(place.file.path.parent == checkpoint.config_folder / part for place in places.values())
        }
        for folder in sorted((*parts, *family.other_parts)):
            (fresh / folder).mkdir(parents=True)
            for path in sorted((checkpoint.config_folder / folder).iterdir()):
                if path.suffix in _TEXT_SUFFIXES and (".index." not in path.name or folder in borrowed):
                    source = inside(checkpoint.config_folder, f"{folder}/{path.name}")
                    (fresh / folder / path.name).write_bytes(read_bytes(source, _TEXT))
            for path in sorted(borrowed.get(folder, [])):
                copy_file(path, fresh / folder / path.name, report)
        for name, said in checkpoint.rewritten.items():
            (fresh / name).write_text(json.dumps(dict(said), indent=2) + "\n", encoding="utf-8")
        (fresh / "model_index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        for folder, places in parts.items():
            if folder in borrowed:
                continue
            tensors = {
                key: NewTensor(
                    _dtype(place),
                    place.shape,
                    partial(_read, place, edits.get(key) if folder == family.denoiser else None),
                )
                for key, place in places.items()
            }
            stem = _STEMS.get(index[folder][0], "diffusion_pytorch_model")
            write_tensors(fresh / folder / f"{stem}.safetensors", tensors, {"format": "pt"}, report)
        for name, content in files.items():
            (fresh / name).write_bytes(content)
    return output


def write_single_file(
    checkpoint: Checkpoint,
    output: Path,
    edits: Mapping[str, Edit],
    files: Mapping[str, bytes],
    force: bool = False,
    report: Report = no_report,
    unchanged: Callable[[], None] | None = None,
) -> Path:
    """Write an edited copy of a folder as a single file; else as `write_folder`."""
    check_weights(checkpoint, converting=True)
    needed = partial(copied_bytes, checkpoint, output, False)
    output = check_output(checkpoint, output, force, "single-file", False, needed)
    with whole(output, force, unchanged or checkpoint.check_unchanged) as fresh:
        marks, kept = checkpoint.family.marks(checkpoint.config)
        tensors = _single_file_tensors(checkpoint, edits) | {
            name: NewTensor("F32", (len(values),), partial(_made, values)) for name, values in marks.items()
        }
        metadata = {**single_file_metadata(checkpoint, files), **kept}
        write_tensors(fresh, tensors, metadata, report)
    return output


def left_behind(checkpoint: Checkpoint) -> list[str]:
    """Sentences on what the other layout does not hold."""
    network = checkpoint.family.network
    notes = [f"Left out: the {copy.label} copy of the {network}." for copy in checkpoint.denoiser[1:]]
    if checkpoint.path.is_dir():
        shapes = {
            part: {key: place.shape for key, place in of.items()} for part, of in _weights(checkpoint).items()
        }
        held = checkpoint.names.to_file(shapes)
        missing = ", ".join(part for part in shapes if part not in held)
        if missing:
            notes.append(f"Left out: {missing}. Single files of {checkpoint.family.name} hold the {network}.")
        notes += checkpoint.family.lost_in_file(checkpoint.config)
    return notes


def _single_file_tensors(checkpoint: Checkpoint, edits: Mapping[str, Edit]) -> Tensors:
    """A folder's weights by their names in a single file."""
    weights = _weights(checkpoint)
    shapes = {part: {key: place.shape for key, place in of.items()} for part, of in weights.items()}
    stacks: dict[str, list[tuple[Stored, Place, Edit | None]]] = {}
    for part, of in checkpoint.names.to_file(shapes).items():
        for key, stored in of.items():
            edit = edits.get(key) if part == "denoiser" else None
            stacks.setdefault(stored.name, []).append((stored, weights[part][key], edit))
    tensors = {}
    for name, stack in stacks.items():
        stack.sort(key=lambda each: each[0].piece)
        stored, first, _ = stack[0]
        tensors[name] = NewTensor(
            first.info.dtype, stored.packed_shape(first.shape), partial(_packed, stored, stack)
        )
    return tensors


def _weights(checkpoint: Checkpoint) -> dict[str, Mapping[str, Place]]:
    """Every weight that a whole checkpoint has: of the text encoders those that they use."""
    family = checkpoint.family
    used = family.text_weights(checkpoint.config)
    found: dict[str, Mapping[str, Place]] = {"denoiser": checkpoint.denoiser[0].tensors}
    for part in sorted(family.weight_parts, key=lambda part: part in used):
        if part not in checkpoint.parts:
            raise BadInput(
                f"{checkpoint.path} holds no weights of its {part}, which drawing and the other layout need.",
                "Get the form of this checkpoint that has them."
                if checkpoint.path.is_dir()
                else "Give a diffusers folder that has them with --config, or keep the layout.",
            )
        tensors = checkpoint.parts[part].tensors
        found[part] = {key: tensors[key] for key in used.get(part, tensors)}
    return found


def _dtype(place: Place) -> str:
    """What a weight is stored in where scales have no place: with its scale multiplied in, bf16."""
    return place.info.dtype if place.scale is None else "BF16"


def _read(place: Place, edit: Edit | None) -> "torch.Tensor":
    weight = place.read()
    if place.scale is not None:
        weight = weight.bfloat16()
    if edit is None:
        return weight
    return rounded_edit(edit, weight, f"{place.stored.name} in {place.file.path}")


def _made(values: Sequence[float]) -> "torch.Tensor":
    import torch

    return torch.tensor(values, dtype=torch.float32)


def _packed(stored: Stored, stack: list[tuple[Stored, Place, Edit | None]]) -> "torch.Tensor":
    return stored.packed([_read(place, edit) for _, place, edit in stack])
