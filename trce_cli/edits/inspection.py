"""What a file or folder is, and in which tensors two of them differ, read one by one."""

import math
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trce_cli.checkpoint.checkpoint import Checkpoint
from trce_cli.checkpoint.open import open_checkpoint
from trce_cli.checkpoint.provenance import HISTORY, history, parse_history
from trce_cli.errors import BadInput
from trce_cli.families.registry import CONTROLNET, not_a_checkpoint
from trce_cli.system.foreign import check_unchanged
from trce_cli.system.paths import expanded
from trce_cli.system.progress import Report, no_report
from trce_cli.system.safetensors import SafetensorsFile

if TYPE_CHECKING:
    import torch


class Readers(dict[str, Callable[[], "torch.Tensor"]]):
    """How to read each tensor of a checkpoint or file. check_unchanged: raises TrceError where it changed."""

    def __init__(
        self, read: Mapping[str, Callable[[], "torch.Tensor"]], check_unchanged: Callable[[], None]
    ) -> None:
        super().__init__(read)
        self.check_unchanged = check_unchanged


def describe(
    name: str,
    revision: str | None = None,
    variant: str | None = None,
    config: Path | None = None,
    edit: str | Path | None = None,
) -> dict[str, Any]:
    """What `name` is: a checkpoint, or another safetensors file such as a LoRA; plain JSON values.

    Of a checkpoint: layout, family, a folder's pipeline by its class, dtype, what it predicts, sizes, the
    hash of its text encoders, its edit history, what an edited copy would leave out, and whether `edit`, a
    map or LoRA file, fits it. Of another file: what its keys say it is, tensors, dtypes and metadata, and of
    an edit what it was made for. Raises `BadInput` where it is neither.
    """
    # Who gives a folder of configurations has a checkpoint, whatever its names look like.
    if config is None and (file := _other_file(name)):
        if edit:
            raise BadInput(f"{name} is no checkpoint, so no edit can fit it.")
        return _describe_file(file)
    try:
        checkpoint = open_checkpoint(name, revision, variant, config)
    except BadInput as error:
        path = expanded(name)
        if edit or path.suffix != ".safetensors" or not path.is_file():
            raise
        return {
            **_describe_file(SafetensorsFile.open(path)),
            "kind": "no checkpoint that can be opened",
            "why": " ".join(filter(None, (error.message, error.hint))),
        }
    family, text_encoder = checkpoint.family, checkpoint.text_encoder_hash()
    is_folder = checkpoint.layout == "diffusers"
    found = {
        "path": str(checkpoint.path),
        "kind": "checkpoint",
        "layout": checkpoint.layout,
        "family": family.name,
        **({"pipeline": checkpoint.config["model_index"].get("_class_name")} if is_folder else {}),
        "dtype": checkpoint.dtype,
        "sampling": dict(family.sampling(checkpoint.config)),
        "bytes": checkpoint.total_bytes(),
        f"{family.denoiser}_parameters": sum(
            math.prod(checkpoint.shape("denoiser", key)) for key in checkpoint.keys("denoiser")
        ),
        f"{family.denoiser}_copies": {
            copy.label: [file.path.name for file in copy.files] for copy in checkpoint.denoiser
        },
        "doors": {door.name: len(door.weights) for door in checkpoint.doors()},
        "widths": checkpoint.widths,
        "text_encoder": text_encoder,
        "left_out": dict(checkpoint.left_out),
        "remarks": list(checkpoint.remarks),
        "history": history(checkpoint),
    }
    if edit:
        found |= {"edit": str(edit), **_fit(checkpoint, text_encoder, edit)}
    checkpoint.check_unchanged()
    return found


def _fit(checkpoint: Checkpoint, text_encoder: str, path: str | Path) -> dict[str, Any]:
    from trce_cli.edits.files import check_fits, locate, open_edit

    edit = open_edit(locate(path))
    try:
        edit.weight_edits(checkpoint)
        check_fits(edit, checkpoint, text_encoder)
    except BadInput as error:
        return {"fits": False, "why_not": error.message}
    return {"fits": True}


def _describe_file(file: SafetensorsFile) -> dict[str, Any]:
    from trce_cli.edits.files import open_edit

    entries: list[dict[str, Any]] = []
    with suppress(BadInput):
        entries = parse_history(file.metadata.get(HISTORY, ""), str(file.path))

    try:
        made = open_edit(file.path).made
    except BadInput:  # no edit, or not one that can be applied
        made = None
    found: dict[str, Any] = {
        "path": str(file.path),
        "kind": not_a_checkpoint(file.shapes),
        "bytes": file.size,
        "tensors": len(file.tensors),
        "dtypes": sorted({info.dtype for info in file.tensors.values()}),
        "metadata": {key: value for key, value in file.metadata.items() if key != HISTORY or not entries},
    }
    if found["kind"] == "a ControlNet":
        found["remarks"] = [CONTROLNET]
    if made:
        found |= {"family": made.family.name, "text_encoder": made.text_encoder}
    return found | ({"history": entries} if entries or made else {})


def _other_file(name: str) -> SafetensorsFile | None:
    """A safetensors file whose keys say that it is no checkpoint."""
    path = expanded(name)
    if path.suffix != ".safetensors" or not path.is_file():
        return None
    file = SafetensorsFile.open(path)
    return file if not_a_checkpoint(file.shapes) else None


@dataclass(frozen=True)
class Difference:
    """How much one tensor differs: its largest absolute change, and the change's Frobenius norm over A's."""

    name: str
    shape: tuple[int, ...]
    largest: float
    relative: float


@dataclass(frozen=True)
class Comparison:
    """The differing tensors by falling relative change, the names that only one side has, and the equal ones.

    `reshaped` are tensors of different shapes. Values are compared, so that fp16 may equal fp32.
    """

    differing: list[Difference]
    reshaped: list[str]
    only_a: list[str]
    only_b: list[str]
    equal: int


def both(a: str, b: str, config: Path | None = None) -> tuple[Readers, Readers]:
    """The `readers` of two names; BadInput where they have nothing in common that could be compared."""
    left, right = readers(a, config), readers(b, config)
    if not left.keys() & right.keys():
        kinds = (f"{name} is {_kind(name)}" for name in (a, b))
        raise BadInput(
            f"Nothing can be compared, no tensor is in both: {', '.join(kinds)}.",
            "Whether a map or LoRA fits a checkpoint, and which it carries: trce inspect.",
        )
    return left, right


def _kind(name: str) -> str:
    file = _other_file(name)
    return (not_a_checkpoint(file.shapes) if file else None) or "a checkpoint"


def readers(name: str, config: Path | None = None) -> Readers:
    """How to read each tensor of a checkpoint or other safetensors file.

    The names of a checkpoint do not depend on its layout: the part's folder, and diffusers' or transformers'
    name; what else it holds keeps its own name.
    """
    if file := _other_file(name):
        read = {key: partial(file.read, key) for key in file.tensors}
        return Readers(read, partial(check_unchanged, {file.path: file.identity}))
    return _checkpoint_readers(open_checkpoint(name, config=config))


def _checkpoint_readers(checkpoint: Checkpoint) -> Readers:
    found: dict[str, Callable[[], torch.Tensor]] = {}
    denoiser = checkpoint.family.denoiser
    for number, copy in enumerate(checkpoint.denoiser):
        part = denoiser if number == 0 else f"{denoiser} ({copy.label})"
        found |= {f"{part}/{key}": place.read for key, place in copy.tensors.items()}
    texts = dict(checkpoint.family.text_weights(checkpoint.config))
    texts.pop("denoiser", None)  # a norm before a door, which is among the denoiser's
    for part, weights in texts.items():
        found |= {f"{part}/{key}": partial(checkpoint.read, part, key) for key in weights}
    for name, file, key in checkpoint.further_tensors({denoiser, *texts}):
        found[name] = partial(file.read, key)
    return Readers(found, checkpoint.check_unchanged)


def compare(a: Readers, b: Readers, report: Report = no_report) -> Comparison:
    """Compare all tensors that both sides have; `report` is called with 1 after each of them.

    Raises TrceError where one of the two was changed under way.
    """
    import torch

    differing: list[Difference] = []
    reshaped: list[str] = []
    equal = 0
    for name in a.keys() & b.keys():
        left, right = a[name](), b[name]()
        report(1)
        if left.shape != right.shape:
            reshaped.append(name)
            continue
        change = right.double() - left.double()
        if not bool(change.ne(0).any()):  # NaN differs from everything
            equal += 1
            continue
        norm = float(torch.linalg.vector_norm(left.double()))
        size = float(torch.linalg.vector_norm(change))
        relative = size / norm if norm else math.inf
        differing.append(Difference(name, tuple(left.shape), float(change.abs().max()), relative))
    for side in (a, b):
        side.check_unchanged()
    differing.sort(key=lambda difference: (-difference.relative, difference.name))
    return Comparison(
        differing, sorted(reshaped), sorted(a.keys() - b.keys()), sorted(b.keys() - a.keys()), equal
    )
