"""Edited copies of checkpoints in the layout of the original, out of core.

`write_patched` reads, edits and writes one tensor at a time and lets the operating system copy every other
byte, so that a denoiser is never in memory.
"""

import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from trce_cli.checkpoint.checkpoint import Checkpoint, Place
from trce_cli.checkpoint.scaled import scaled_edits
from trce_cli.errors import BadInput, TrceError
from trce_cli.families.base import Stored
from trce_cli.system.paths import existing, real_path
from trce_cli.system.progress import Report, no_report
from trce_cli.system.safetensors import Edit, copy_file, share_file
from trce_cli.system.whole import clear_stale, whole

if TYPE_CHECKING:
    import torch


def check_copy(checkpoint: Checkpoint, output: Path, force: bool = False, link: bool = False) -> Path:
    """See `check_output`, for a copy in the layout of the original."""
    folder, needed = checkpoint.path.is_dir(), partial(copied_bytes, checkpoint, output, link)
    return check_output(checkpoint, output, force, checkpoint.layout, folder, needed)


def check_output(
    checkpoint: Checkpoint, output: Path, force: bool, form: str, folder: bool, needed: Callable[[], int]
) -> Path:
    """Check before any work that `output` can be written, and return its real path.

    form: what it is to be, in a word; folder: whether that is a folder with a checkpoint, and not a file.
    needed: the bytes that it takes on its disk.

    Refused (`BadInput`): an existing output without `force`, with `force` one that is no checkpoint; an
    output inside of the input, around it or equal to it, symbolic links resolved; the hub's cache. Raises
    `TrceError` where the file system lacks space or permission.
    """
    output = real_path(output)
    try:
        clear_stale(output.parent)
        if not folder and output.suffix != ".safetensors":
            raise BadInput(f"The output {output} is to be one file ({form}), so it must end in .safetensors.")
        _check_place(checkpoint, output, force, folder)
        _check_space(output, needed)
    except OSError as error:
        raise TrceError(f"The output {output} cannot be used: {error.strerror}.") from error
    return output


def _check_place(checkpoint: Checkpoint, output: Path, force: bool, folder: bool) -> None:
    source = checkpoint.path.resolve()
    if output.is_symlink():  # links are resolved: it leads back to itself
        raise BadInput(f"The links of the output {output} have no end.", "Choose another --output.")
    if output == source or (output.exists() and output.samefile(source)):
        raise BadInput(f"The output {output} is the input itself.", "Choose another --output.")
    if output.is_relative_to(source) or source.is_relative_to(output):
        raise BadInput(
            f"The output {output} and the input {source} lie in each other.", "Choose another --output."
        )
    if any(part.startswith("models--") for part in output.parts):
        raise BadInput(f"The output {output} lies in the hub's cache.", "Choose another --output.")
    if output.exists():
        if not force:
            raise BadInput(f"The output {output} exists already.", "Choose another --output, or add --force.")
        if not (_replaceable_folder(output) if folder else output.is_file()):
            what = "checkpoint" if folder else "file"
            raise BadInput(
                f"{output} is no {what}, so --force does not replace it.", "Choose another --output."
            )


def copied_bytes(checkpoint: Checkpoint, output: Path, link: bool) -> int:
    """What a whole copy takes on the disk of `output`; with `link` unchanged files take nothing there."""
    if link and checkpoint.path.stat().st_dev == existing(output.parent).stat().st_dev:
        return sum(file.size for file in checkpoint.denoiser_files)
    return checkpoint.total_bytes()


def _check_space(output: Path, needed: Callable[[], int]) -> None:
    parent = existing(output.parent)
    if not parent.is_dir():
        raise BadInput(f"The output {output} cannot be made: {parent} is not a folder.")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise TrceError(
            f"The output {output} cannot be written: no permission in {parent}.", "Choose another --output."
        )
    need, free = needed(), shutil.disk_usage(parent).free
    if need > free:
        raise TrceError(
            f"The output {output} needs {need / 1e9:.2f} GB, and {free / 1e9:.2f} GB are free.",
            "Make space, or choose an --output on another disk.",
        )


def _tensor_edits(weights: Sequence[tuple[Place, Edit]]) -> Mapping[str, Edit]:
    """The edits of the tensor that holds these weights, and of its scale, from those of the weights."""
    place, edit = weights[0]
    if place.stored.plain:
        return scaled_edits(place, edit)
    pieces = [(place.stored, edit) for place, edit in weights]
    return scaled_edits(replace(place, stored=Stored(place.stored.name)), partial(_stacked_edit, pieces))


def _stacked_edit(pieces: Sequence[tuple[Stored, Edit]], tensor: "torch.Tensor") -> "torch.Tensor":
    for stored, edit in pieces:
        tensor = stored.replaced(tensor, edit(stored.view(tensor)))
    return tensor


def _replaceable_folder(output: Path) -> bool:
    return output.is_dir() and ((output / "model_index.json").is_file() or not any(output.iterdir()))


def write_patched(
    checkpoint: Checkpoint,
    output: Path,
    edits: Mapping[str, Edit],
    files: Mapping[str, bytes],
    force: bool = False,
    link: bool = False,
    report: Report = no_report,
    unchanged: Callable[[], None] | None = None,
) -> Path:
    """Write an edited copy of the checkpoint, whole or not at all, and return its real path.

    edits: diffusers key of the denoiser -> function from the weight (fp32, or fp64 where the file has it) to
    the new one of the same shape; done for every copy of the denoiser, rounded to the dtype of its file.
    files: what is written beside the weights (`trce.json`, `README.md`), in place of the input's; into a
    single file `trce.json` goes as metadata.
    link: share unchanged files with the input where both lie on one file system, by reflink or else hard
    link. report: called with the number of bytes just written, `checkpoint.total_bytes()` in all. unchanged:
    called last, in place of the checkpoint's own `check_unchanged`. Raises `BadInput` and `TrceError` as
    `check_copy` does, `BadInput` naming a tensor with NaN or infinite values, `TrceError` for a non-finite
    result, a failing disk, or an input that changed meanwhile. The input is never written to.
    """
    output = check_copy(checkpoint, output, force, link)
    opened = {file.path: file for file in checkpoint.denoiser_files}
    held: dict[tuple[Path, str], list[tuple[Place, Edit]]] = {}  # of each tensor the weights in it
    for key, edit in edits.items():
        for copy in checkpoint.denoiser:
            place = copy.tensors[key]
            held.setdefault((place.file.path, place.stored.name), []).append((place, edit))
    patches: dict[Path, dict[str, Edit]] = {}
    for (path, _), weights in held.items():
        patches.setdefault(path, {}).update(_tensor_edits(weights))
    metadata, files = checkpoint.carried(files)
    with whole(output, force, unchanged or checkpoint.check_unchanged) as fresh:
        for relative, source in checkpoint.files.items():
            if relative in files:
                continue
            target = fresh if checkpoint.path.is_file() else fresh / relative
            target.parent.mkdir(parents=True, exist_ok=True)
            if source in opened:
                opened[source].write_patched(target, patches.get(source, {}), metadata, report)
            elif link and share_file(source, target):
                report(target.stat().st_size)
            else:
                copy_file(source, target, report)
        for relative, content in files.items():
            (fresh / relative).write_bytes(content)
    return output
