"""Edits that are files of their own: a `map` of text embeddings, and LoRAs in kohya's form.

Both say which text encoders they were made for, and carry the history of how they were made. Both give what
`write_patched` wants: for each U-Net weight that they change a function from the old to the new one.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial, reduce
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from trce_cli.checkpoint.checkpoint import PICKLE_SUFFIXES, Checkpoint
from trce_cli.checkpoint.provenance import history_text, parse_history, record
from trce_cli.edits import live
from trce_cli.edits.live import check_strength, check_width
from trce_cli.errors import BadInput, TrceError
from trce_cli.families.registry import FAMILIES, not_a_checkpoint
from trce_cli.families.sd.family import POOLED_KEY, StableDiffusion
from trce_cli.families.sd.names import kohya_names
from trce_cli.maths.closed_form import mapped
from trce_cli.system.paths import expanded, real_path
from trce_cli.system.safetensors import (
    FLOATS,
    NewTensor,
    SafetensorsFile,
    all_finite,
    hash_file,
    write_tensors,
)
from trce_cli.system.whole import whole

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

WeightEdit = Callable[[Tensor], Tensor]

MAP: Final = "trce_map."  # what the names of a map's tensors begin with
CHANGE, POOLED = f"{MAP}change", f"{MAP}pooled_change"
FORM, FAMILY, ENCODER, HISTORY = "trce_form", "trce_family", "trce_text_encoder", "trce"  # metadata
LORA: Final = re.compile(r"(lora_unet_\w+)\.(lora_down\.weight|lora_up\.weight|alpha)")
# The dtypes of edit files by torch's names, as the format names them.
EditDType = Literal["float32", "float16"]
EDIT_DTYPES: Final[Mapping[EditDType, str]] = {"float32": "F32", "float16": "F16"}


@dataclass(frozen=True)
class Made:
    """What an edit was made for and how.

    text_encoder: `Checkpoint.text_encoder_hash()` of what it was made for. history: one provenance entry for
    each step, oldest first.
    """

    family: StableDiffusion
    text_encoder: str
    history: tuple[Mapping[str, Any], ...] = ()

    def metadata(self, form: Literal["map", "lora"]) -> dict[str, str]:
        """As it is kept in the file's metadata."""
        metadata = {"format": "pt", FORM: form, FAMILY: self.family.key, ENCODER: self.text_encoder}
        return metadata | {HISTORY: history_text(self.history)}


@dataclass(frozen=True, eq=False)
class Map:
    """M = I + change, the map of text embeddings that an edit is; every projection W becomes W M.

    change: (dim, dim) float64, over the width of the cross-attention's context. pooled_change: the same for
    the pooled embedding of SDXL, None where that is not mapped. A map fits every checkpoint of the text
    encoders that it was solved for. `a @ b` is first a, then b: W M_a M_b.
    """

    made: Made
    change: Tensor
    pooled_change: Tensor | None = None
    _hooks: live.Hooks = field(init=False, repr=False, default_factory=WeakKeyDictionary)

    @property
    def matrix(self) -> Tensor:
        """M, (dim, dim) float64."""
        return torch.eye(len(self.change), dtype=torch.float64) + self.change

    @cached_property
    def single(self) -> live.Changes:
        """Both changes in float32, as live pipelines use them; made once."""
        return self.change.float(), None if self.pooled_change is None else self.pooled_change.float()

    def scaled(self, strength: float) -> "Map":
        """M_s = I + s (M - I): 0 changes nothing, 1 is the full edit; more than 1 goes beyond."""
        check_strength(strength)
        pooled = None if self.pooled_change is None else strength * self.pooled_change
        return Map(self.made, strength * self.change, pooled)

    def __matmul__(self, then: "Map") -> "Map":
        """Both edits in one: M_a M_b = I + a + b + a b. BadInput where they are for different encoders."""
        if (self.made.family, self.made.text_encoder) != (then.made.family, then.made.text_encoder):
            raise BadInput("Maps for different text encoders cannot be joined into one.")
        made = Made(self.made.family, self.made.text_encoder, self.made.history + then.made.history)
        a, b = self.pooled_change, then.pooled_change
        pooled = _joined(a, b) if a is not None and b is not None else b if a is None else a
        return Map(made, _joined(self.change, then.change), pooled)

    def weight_edits(self, checkpoint: Checkpoint, strength: float = 1.0) -> dict[str, WeightEdit]:
        """W -> W M_s for each weight that the map changes; BadInput where the widths do not fit."""
        scaled = self.scaled(strength)
        check_width(len(self.change), checkpoint.context_width, checkpoint.name)
        edits: dict[str, WeightEdit] = {
            key: partial(mapped, change=scaled.change) for key in checkpoint.projection_keys()
        }
        if scaled.pooled_change is not None:
            check_width(len(scaled.pooled_change), checkpoint.pooled_width, checkpoint.name, "pooled ")
            edits[POOLED_KEY] = partial(mapped, change=scaled.pooled_change)
        return edits

    def tensors(self, dtype: EditDType = "float32") -> dict[str, NewTensor]:
        """The tensors of the map's file. TrceError where a value is too large for the dtype."""
        found = {}
        for name, change in ((CHANGE, self.change), (POOLED, self.pooled_change)):
            if change is not None:
                rounded = change.to(getattr(torch, dtype))
                if not all_finite(rounded):
                    raise TrceError(f"The map has values that {dtype} cannot hold.", "Use fp32 for it.")
                found[name] = NewTensor(EDIT_DTYPES[dtype], tuple(change.shape), partial(_same, rounded))
        return found

    def save(self, path: str | Path, dtype: EditDType = "float32", force: bool = False) -> Path:
        """Write the map to a `.safetensors` file, whole or not at all: M - I, with history in its metadata.

        Raises BadInput for an existing file without `force`, TrceError where it cannot be written.
        """
        return write_edit_file(Path(path), self.tensors(dtype), self.made.metadata("map"), force)

    def apply_to(self, pipe: "DiffusionPipeline", strength: float = 1.0) -> None:
        """Put the map on a live diffusers pipeline, or change its strength there; no weight is touched.

        Takes effect with the next image, in milliseconds. The U-Net gets M e in place of each text embedding
        e, which is what W M does. Maps on one pipeline act as if put on its weights in the order of the
        calls. Families and widths are checked (BadInput); that the pipeline has the very text encoder the
        map was solved for is the caller's matter.
        """
        live.apply(self._hooks, self.single, pipe, strength)

    def remove_from(self, pipe: "DiffusionPipeline") -> None:
        """Take the map off a pipeline, which then draws bit for bit as before; nothing where it is not on."""
        live.remove(self._hooks, pipe)


@dataclass(frozen=True, eq=False)
class Lora:
    """A LoRA in kohya's form: W' = W + alpha / rank up down for each layer that it names; read as needed.

    made: None where another tool made it, which did not say for which text encoder.
    """

    made: Made | None
    file: SafetensorsFile

    @cached_property
    def layers(self) -> list[str]:
        """The kohya names of its layers."""
        return sorted({name.partition(".")[0] for name in self.file.tensors})

    def weight_edits(self, checkpoint: Checkpoint, strength: float = 1.0) -> dict[str, WeightEdit]:
        """W -> W + s alpha / rank up down for each layer; BadInput where the checkpoint has no such layer."""
        check_strength(strength)
        names = {
            name: key
            for key in checkpoint.unet[0].tensors
            for name in kohya_names(key, checkpoint.unet_config["layers_per_block"])
        }
        edits: dict[str, WeightEdit] = {}
        for layer in self.layers:
            if layer not in names:
                raise BadInput(f"{self.file.path} changes {layer}, which {checkpoint.name} does not have.")
            key = names[layer]
            down, up = (self.file.tensors[f"{layer}.lora_{part}.weight"].shape for part in ("down", "up"))
            if (up[0], down[1]) != checkpoint.shape(key):
                raise BadInput(
                    f"{layer} in {self.file.path} is for weights of {up[0]} x {down[1]}; {checkpoint.name} "
                    f"has {' x '.join(map(str, checkpoint.shape(key)))}."
                )
            edits[key] = partial(self._added, layer, strength)
        return edits

    def _added(self, layer: str, strength: float, weight: Tensor) -> Tensor:
        down, up = (self._read(f"{layer}.lora_{part}.weight") for part in ("down", "up"))
        alpha = float(self._read(f"{layer}.alpha")) if f"{layer}.alpha" in self.file.tensors else len(down)
        return weight.double() + (strength * alpha / len(down) * up) @ down

    def _read(self, name: str) -> Tensor:
        tensor = self.file.read(name)
        if not all_finite(tensor):
            raise BadInput(f"{name} in {self.file.path} holds NaN or infinite values.")
        return tensor.double()


Edit = Map | Lora


def load_map(path: str | Path) -> Map:
    """Read a map from its file; BadInput says in one sentence what is wrong with it."""
    edit = open_edit(path)
    if not isinstance(edit, Map):
        raise BadInput(f"{path} is a LoRA, not a map.", "Load it with the pipeline's load_lora_weights.")
    return edit


def open_edit(path: str | Path) -> Edit:
    """Open a map or a LoRA and check it; BadInput says in one sentence what is wrong with the file."""
    path = expanded(path)
    if not path.exists():
        raise BadInput(f"There is no file {path}.", "The edits come first, the checkpoint last.")
    if path.is_dir() or path.suffix in PICKLE_SUFFIXES:
        what = "a folder" if path.is_dir() else "a PyTorch pickle, which can run code when it is loaded"
        raise BadInput(f"{path} is {what}, not a map or LoRA in a .safetensors file.")
    file = SafetensorsFile.open(path)
    if any(name.startswith(MAP) for name in file.tensors):
        return _open_map(file)
    if file.tensors and all(LORA.fullmatch(name) for name in file.tensors):
        return _open_lora(file)
    if any(name.startswith("lora_te") for name in file.tensors):
        raise BadInput(
            f"{path} is a LoRA that changes the text encoder; only those of the U-Net can be applied here."
        )
    what = not_a_checkpoint(file.tensors) or "a file of another kind"
    raise BadInput(
        f"{path} is neither a map nor a LoRA with kohya's names, but {what}.",
        "The edits come first, the checkpoint last.",
    )


def _open_map(file: SafetensorsFile) -> Map:
    made = _made(file, "map")
    allowed = [CHANGE, POOLED] if made.family.pooled else [CHANGE]
    if CHANGE not in file.tensors or any(name not in allowed for name in file.tensors):
        found = ", ".join(sorted(file.tensors))[:200]
        raise BadInput(f"{file.path} does not hold what a map of {made.family.name} holds, but {found}.")
    return Map(made, *(_read_change(file, name) for name in allowed if name in file.tensors))


def _read_change(file: SafetensorsFile, name: str) -> Tensor:
    info = file.tensors[name]
    if (
        info.dtype not in FLOATS
        or len(info.shape) != 2
        or info.shape[0] != info.shape[1]
        or not info.shape[0]
    ):
        raise BadInput(f"{name} in {file.path} is no square matrix: {info.dtype} {list(info.shape)}.")
    change = file.read(name)
    if not all_finite(change):
        raise BadInput(f"{name} in {file.path} holds NaN or infinite values.")
    return change.double()


def _open_lora(file: SafetensorsFile) -> Lora:
    for name, info in file.tensors.items():
        layer, _, part = name.partition(".")
        if part == "alpha":
            fits = info.shape in ((), (1,))
        else:
            other = f"{layer}.{'lora_up' if part == 'lora_down.weight' else 'lora_down'}.weight"
            if other not in file.tensors:
                raise BadInput(f"{file.path} has {name} without {other}.")
            pair = info.shape, file.tensors[other].shape
            down, up = pair if part == "lora_down.weight" else pair[::-1]
            fits = len(down) == len(up) == 2 and down[0] == up[1] > 0
        if not fits or info.dtype not in FLOATS:
            raise BadInput(
                f"{name} in {file.path} is no factor of a linear layer: {info.dtype} {list(info.shape)}.",
                "LoRAs of convolutions cannot be applied here.",
            )
        if part == "alpha" and f"{layer}.lora_down.weight" not in file.tensors:
            raise BadInput(f"{file.path} has {name} without factors.")
    return Lora(_made(file, "lora") if FORM in file.metadata else None, file)


def _made(file: SafetensorsFile, form: str) -> Made:
    """What the metadata of an edit file says; it may come from anywhere, so everything is checked."""
    metadata = file.metadata
    family = next((family for family in FAMILIES if family.key == metadata.get(FAMILY)), None)
    text_encoder = metadata.get(ENCODER, "")
    if metadata.get(FORM) != form or family is None or not re.fullmatch(r"[0-9a-f]{64}", text_encoder):
        raise BadInput(
            f"{file.path} does not say in its metadata which text encoder it was made for.",
            "A tool may have dropped the metadata; make the edit again.",
        )
    text = metadata.get(HISTORY, '{"schema": 1, "history": []}')
    return Made(family, text_encoder, tuple(parse_history(text, str(file.path))))


def check_fits(edit: Edit, checkpoint: Checkpoint, allow_other_text_encoder: bool = False) -> bool:
    """Whether the checkpoint has the very text encoders that the edit was made for.

    Raises BadInput for another family, and for other or unknown text encoders unless they are allowed.
    """
    made, name = edit.made, checkpoint.name
    if made and checkpoint.family is not made.family:
        raise BadInput(
            f"The edit was made for {made.family.name}, and {name} is of the family {checkpoint.family.name}."
        )
    if made and checkpoint.text_encoder_hash() == made.text_encoder:
        return True
    if not allow_other_text_encoder:
        maker = (
            f"for the text encoder {made.text_encoder[:12]}"
            if made
            else "for a text encoder it does not name"
        )
        raise BadInput(
            f"The edit was made {maker}, and {name} has {checkpoint.text_encoder_hash()[:12]}.",
            "If that is a fine-tuned one of the same base, add --allow-other-text-encoder.",
        )
    return False


def combine(
    edits: Sequence[Edit], checkpoint: Checkpoint, strength: float = 1.0
) -> tuple[dict[str, WeightEdit], Map | None]:
    """Edits one after the other, each at the strength: by diffusers key, and as one map if they are maps.

    Maps of the same text encoders are joined by matrix product. Raises BadInput where one does not fit.
    """
    maps = [edit.scaled(strength) for edit in edits if isinstance(edit, Map)]
    encoders = {text_map.made.text_encoder for text_map in maps}
    if len(maps) == len(edits) and len(encoders) == 1:
        text_map = reduce(Map.__matmul__, maps)
        return text_map.weight_edits(checkpoint), text_map
    each = [edit.weight_edits(checkpoint, strength) for edit in edits]
    keys = dict.fromkeys(key for edit in each for key in edit)
    return {key: partial(_in_turn, [edit[key] for edit in each if key in edit]) for key in keys}, None


def _in_turn(edits: Sequence[WeightEdit], weight: Tensor) -> Tensor:
    return reduce(lambda found, edit: edit(found), edits, weight.double())


def write_edit_file(
    path: Path, tensors: Mapping[str, NewTensor], metadata: Mapping[str, str], force: bool = False
) -> Path:
    """Write a map or LoRA, whole or not at all; BadInput for an existing file without `force`."""
    path = real_path(path)
    if path.suffix != ".safetensors":
        raise BadInput(f"The output {path} must end in .safetensors.")
    if path.exists() and not (force and path.is_file()):
        raise BadInput(
            f"The output {path} exists already.", "Choose another one, or replace it with --force."
        )
    with whole(path, force) as stage:
        write_tensors(stage, tensors, metadata)
    return path


def record_apply(
    checkpoint: Checkpoint,
    paths: Sequence[Path],
    edits: Sequence[Edit],
    strength: float,
    figures: Mapping[str, Any],
    seconds: float,
) -> dict[str, Any]:
    """The entry for edits that were made before: like `record`'s, with the concepts that they erase.

    edits: for each, in the order in which they act, file name, SHA-256, form, and its own history.
    """
    histories = [list(edit.made.history) if edit.made else [] for edit in edits]
    files = [
        {
            "file": path.name,
            "sha256": hash_file(path),
            "form": type(edit).__name__.lower(),
            "history": entries,
        }
        for path, edit, entries in zip(paths, edits, histories, strict=True)
    ]
    settings = {"edits": [file["file"] for file in files], "strength": strength}
    entry = record("apply", checkpoint, [], settings, figures, seconds)
    entry["presets"] = [preset for entries in histories for made in entries for preset in made["presets"]]
    return entry | {"edits": files}


def _joined(a: Tensor, b: Tensor) -> Tensor:
    return a + b + a @ b


def _same(tensor: Tensor) -> Tensor:
    return tensor
