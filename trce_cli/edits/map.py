"""A map of text embeddings, the edit that stage 1 makes: one matrix M a stream, and every W becomes W M."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, cast
from uuid import uuid4

import torch
from torch import Tensor

from trce_cli.checkpoint.checkpoint import Checkpoint
from trce_cli.edits import live
from trce_cli.edits.edit import EDIT_DTYPES, EditDType, Made, WeightEdit, check_strength, write_edit_file
from trce_cli.errors import BadInput, TrceError
from trce_cli.maths.linear_map import LinearMap
from trce_cli.system.safetensors import FLOATS, NewTensor, SafetensorsFile, all_finite

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

MAP: Final = "trce_map."  # what the names of a map's tensors begin with


@dataclass(frozen=True, eq=False)
class Map:
    """What is done to the text embeddings, by stream; every door W of a stream becomes W M.

    A stream that is not mapped is absent. A map fits every checkpoint of the text encoders that it was solved
    for. `a @ b` is first a, then b: W M_a M_b.
    """

    made: Made
    streams: Mapping[str, LinearMap]
    _id: str = field(init=False, repr=False, default_factory=lambda: uuid4().hex)

    @cached_property
    def single(self) -> Mapping[str, LinearMap]:
        """In float32, as live pipelines use it; made once."""
        return {stream: linear.to(torch.float32) for stream, linear in self.streams.items()}

    def scaled(self, strength: float) -> "Map":
        """M_s = I + s (M - I): 0 changes nothing, 1 is the full edit; more than 1 goes beyond."""
        check_strength(strength)
        return Map(self.made, {stream: linear.scaled(strength) for stream, linear in self.streams.items()})

    def __matmul__(self, then: "Map") -> "Map":
        """Both edits in one, M_a M_b by stream. BadInput where they are for different encoders."""
        if (self.made.family, self.made.text_encoder) != (then.made.family, then.made.text_encoder):
            raise BadInput("Maps for different text encoders cannot be joined into one.")
        made = replace(self.made, history=self.made.history + then.made.history)
        both = {
            stream: linear @ then.streams[stream]
            for stream, linear in self.streams.items()
            if stream in then.streams
        }
        return Map(made, {**self.streams, **then.streams, **both})

    def weight_edits(self, checkpoint: Checkpoint, strength: float = 1.0) -> dict[str, WeightEdit]:
        """W -> W M_s for each door, in the checkpoint's order; BadInput where the widths do not fit."""
        check_widths(self.streams, checkpoint.widths, checkpoint.name)
        weights = checkpoint.door_weights()
        scaled = self.scaled(strength)
        return {key: linear.edit for stream, linear in scaled.streams.items() for key in weights[stream]}

    def tensors(self, dtype: EditDType = "float32") -> dict[str, NewTensor]:
        """The tensors of the map's file. TrceError where a value is too large for the dtype."""
        found = {}
        for stream, linear in self.streams.items():
            names = _names(stream, self.made.family.streams)[len(linear.factors) - 1]
            rounded = linear.to(getattr(torch, dtype))
            if not rounded.is_finite:
                raise TrceError(f"The map has values that {dtype} cannot hold.", "Use fp32 for it.")
            for name, factor in zip(names, rounded.factors, strict=True):
                found[name] = NewTensor(EDIT_DTYPES[dtype], tuple(factor.shape), partial(_same, factor))
        return found

    def save(self, path: str | Path, dtype: EditDType = "float32", force: bool = False) -> Path:
        """Write the map to a `.safetensors` file, whole or not at all: M - I, with history in its metadata.

        Raises BadInput for an existing file without `force`, TrceError where it cannot be written.
        """
        return write_edit_file(Path(path), self.tensors(dtype), self.made.metadata("map"), force)

    def apply_to(self, pipe: "DiffusionPipeline", strength: float = 1.0) -> None:
        """Put the map on a live diffusers pipeline, or change its strength there; no weight is touched.

        Takes effect with the next image, in milliseconds. The denoiser gets M e in place of each text
        embedding e, which is what W M does. Maps on one pipeline act as if put on its weights in the order of
        the calls. Families and widths are checked (BadInput); that the pipeline has the very text encoder the
        map was solved for is the caller's matter.
        """
        check_strength(strength)
        denoiser = live.denoiser_of(self.made.family, pipe)
        if not live.hooks_of(self.made.family, denoiser, self._id):
            widths = self.made.family.widths(cast(Any, denoiser).config)
            check_widths(self.streams, widths, f"the {type(pipe).__name__}")
        live.apply(self._id, self.made.family, self.single, denoiser, strength)

    def remove_from(self, pipe: "DiffusionPipeline") -> None:
        """Take the map off a pipeline, which then draws bit for bit as before; nothing where it is not on."""
        live.remove(self._id, self.made.family, live.denoiser_of(self.made.family, pipe))

    def bake_into(self, pipe: "DiffusionPipeline", strength: float = 1.0) -> None:
        """Fold the map into a live pipeline's weights, for good, and take it off as a hook.

        What is made of the pipeline then has the edit: `save_pretrained`, and pipelines that build a denoiser
        of their own from its weights. Raises BadInput as `apply_to` does and for weights that are
        fused, adapted, offloaded or quantized, TrceError for one that its dtype could not hold; then nothing
        is changed.
        """
        scaled, family = self.scaled(strength), self.made.family
        denoiser = live.denoiser_of(family, pipe)
        widths = family.widths(cast(Any, denoiser).config)
        check_widths(self.streams, widths, f"the {type(pipe).__name__}")
        live.bake(family, scaled.streams, pipe)
        live.remove(self._id, family, denoiser)


def check_widths(streams: Mapping[str, LinearMap], widths: Mapping[str, int], name: str) -> None:
    """BadInput where a map meets embeddings of another width than its own, or none of its stream."""
    for stream, linear in streams.items():
        if (found := widths.get(stream, 0)) != linear.width:
            raise BadInput(
                f"The map is for {stream} embeddings of width {linear.width}; those of {name} have {found}."
            )


def open_map(file: SafetensorsFile) -> Map:
    """The map in a file; BadInput says in one sentence what is wrong with it."""
    made = Made.read(file, "map")
    streams, left = {}, set(file.tensors)
    for stream in made.family.streams:
        for names in _names(stream, made.family.streams):
            if left >= set(names):
                streams[stream] = _read_linear(file, names)
                left -= set(names)
    if left or made.family.streams[0] not in streams:
        found = ", ".join(sorted(file.tensors))[:200]
        raise BadInput(f"{file.path} does not hold what a map of {made.family.name} holds, but {found}.")
    return Map(made, streams)


def _names(stream: str, streams: tuple[str, ...]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The names of a stream's tensors: of one that holds the whole change, and of two factors.

    Those of a family's main stream have no prefix.
    """
    start = MAP if stream == streams[0] else f"{MAP}{stream}_"
    return (f"{start}change",), (f"{start}up", f"{start}down")


def _read_linear(file: SafetensorsFile, names: tuple[str, ...]) -> LinearMap:
    infos = [file.tensors[name] for name in names]
    shapes = [info.shape for info in infos]
    fits = all(info.dtype in FLOATS and len(info.shape) == 2 and all(info.shape) for info in infos)
    if not fits or [rows for rows, _ in shapes[1:]] + [shapes[0][0]] != [columns for _, columns in shapes]:
        found = " x ".join(f"{info.dtype} {list(info.shape)}" for info in infos)
        raise BadInput(f"{' x '.join(names)} in {file.path} is no square matrix: {found}.")
    factors = [file.read(name) for name in names]
    for name, factor in zip(names, factors, strict=True):
        if not all_finite(factor):
            raise BadInput(f"{name} in {file.path} holds NaN or infinite values.")
    return LinearMap(tuple(factor.double() for factor in factors))


def _same(tensor: Tensor) -> Tensor:
    return tensor
