"""The forms that an edit is written as: one class each, and nothing else lists them.

A form with weights of the whole model is a checkpoint; the others are files that hold the edit alone.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, Protocol

from trce_cli.checkpoint.checkpoint import Checkpoint
from trce_cli.checkpoint.convert import left_behind, write_folder, write_single_file
from trce_cli.checkpoint.copy import copied_bytes, write_patched
from trce_cli.checkpoint.provenance import provenance_files
from trce_cli.system.foreign import Identity, check_unchanged
from trce_cli.system.progress import Report

if TYPE_CHECKING:  # what an edit is need not be known to name its forms
    from trce_cli.edits.edit import Made, WeightEdit
    from trce_cli.edits.map import Map
    from trce_cli.maths.low_rank import Size

Figures = Mapping[str, Any]


@dataclass(frozen=True)
class Edited:
    """A checkpoint with an edit.

    edits: diffusers key -> function from the old weight to the new one. made: how the edit was made; the last
    entry of its history goes into checkpoints, all of it into files of the edit. text_map: where given, what
    the edits are on all weights that a map changes. original: what a LoRA is for, where the checkpoint is
    edited already; it then holds what was done before as well. files: more files for a folder. read: further
    files that the edits come from.
    """

    checkpoint: Checkpoint
    edits: "Mapping[str, WeightEdit]"
    made: "Made"
    text_map: "Map | None" = None
    original: Checkpoint | None = None
    files: Mapping[str, bytes] = field(default_factory=dict)
    read: Mapping[Path, Identity] = field(default_factory=dict)

    @property
    def is_map(self) -> bool:
        """Whether it is a map of text embeddings and nothing else."""
        return self.text_map is not None and not (
            self.edits.keys() - self.text_map.weight_edits(self.checkpoint).keys()
        )

    @property
    def beside(self) -> dict[str, bytes]:
        """What is written beside weights."""
        return provenance_files(self.checkpoint, self.made.history[-1]) | dict(self.files)

    def check_unchanged(self) -> None:
        """Raise TrceError where a file that it comes from is no longer what it was."""
        for one in (self.checkpoint, self.original):
            if one is not None:
                one.check_unchanged()
        check_unchanged(self.read)


@dataclass(frozen=True)
class How:
    """How forms are written. size, dtype: of a LoRA's factors, and of the numbers in files of an edit."""

    size: "Size"
    dtype: Literal["float32", "float16"] = "float32"
    force: bool = False
    link: bool = False


class Form(Protocol):
    """A form that an edit is written as.

    name: after `--as`. ending: of its name where several forms are written. folder: whether it is one, and
    not a file. is_checkpoint: whether it holds a whole model. has_size: whether it takes a rank or energy.
    """

    @property
    def name(self) -> str: ...

    @property
    def ending(self) -> str: ...

    @property
    def folder(self) -> bool: ...

    @property
    def is_checkpoint(self) -> bool: ...

    @property
    def has_size(self) -> bool: ...

    def needed_bytes(self, checkpoint: Checkpoint, path: Path, link: bool) -> int:
        """What it takes on its disk, as far as that is known before it is made."""
        ...

    def refuses(self, is_map: bool) -> str | None:
        """Why it cannot hold an edit that is a map of text embeddings or more than that."""
        ...

    def notes(self, checkpoint: Checkpoint) -> list[str]:
        """Sentences on what of the checkpoint it will not hold, and why."""
        ...

    def write(self, edited: Edited, path: Path, how: How, report: Report) -> Figures:
        """Write it, whole or not at all; figures on what it keeps of the edit, where that is not all.

        report: called with bytes written, for a checkpoint about `Checkpoint.total_bytes()` in all.
        """
        ...


class CheckpointForm(ABC):
    """A whole checkpoint: a copy where the input has that layout, else converted."""

    name: str
    ending: str
    folder: bool
    is_checkpoint = True
    has_size = False

    def needed_bytes(self, checkpoint: Checkpoint, path: Path, link: bool) -> int:
        """See `Form`."""
        return copied_bytes(checkpoint, path, link and self._is_own(checkpoint))

    def refuses(self, is_map: bool) -> str | None:
        """See `Form`: it holds every edit."""
        return None

    def notes(self, checkpoint: Checkpoint) -> list[str]:
        """See `Form`."""
        return checkpoint.notes() if self._is_own(checkpoint) else left_behind(checkpoint)

    def write(self, edited: Edited, path: Path, how: How, report: Report) -> Figures:
        """See `Form`."""
        checkpoint, unchanged = edited.checkpoint, edited.check_unchanged
        if self._is_own(checkpoint):
            write_patched(
                checkpoint, path, edited.edits, edited.beside, how.force, how.link, report, unchanged
            )
        else:
            self._convert()(checkpoint, path, edited.edits, edited.beside, how.force, report, unchanged)
        return {}

    def _is_own(self, checkpoint: Checkpoint) -> bool:
        return checkpoint.layout == self.name

    @abstractmethod
    def _convert(self) -> Callable[..., Path]: ...


class DiffusersForm(CheckpointForm):
    """A diffusers folder."""

    name = "diffusers"
    ending = ""
    folder = True

    def _convert(self) -> Callable[..., Path]:
        return write_folder


class SingleFileForm(CheckpointForm):
    """A single file, with configurations and tokenizers elsewhere."""

    name = "single-file"
    ending = ".safetensors"
    folder = False

    def _convert(self) -> Callable[..., Path]:
        return write_single_file


class EditForm(ABC):
    """A file that holds the edit alone: small, and for every checkpoint of the same text encoders."""

    name: str
    folder = False
    is_checkpoint = False
    has_size = False

    @property
    def ending(self) -> str:
        """See `Form`."""
        return f".{self.name}.safetensors"

    def needed_bytes(self, checkpoint: Checkpoint, path: Path, link: bool) -> int:
        """See `Form`: little, and known only when it is made."""
        return 0

    def refuses(self, is_map: bool) -> str | None:
        """See `Form`."""
        return None

    def notes(self, checkpoint: Checkpoint) -> list[str]:
        """See `Form`: it is no copy."""
        return []


class LoraForm(EditForm):
    """A LoRA: the best approximation of its rank."""

    name = "lora"
    has_size = True

    def write(self, edited: Edited, path: Path, how: How, report: Report) -> Figures:
        """See `Form`; figures are those of `factor`."""
        from trce_cli.edits.edit import write_edit_file
        from trce_cli.edits.factor import factor
        from trce_cli.edits.recover import since

        edits, text_map = edited.edits, edited.text_map
        if edited.original is not None:
            edits, text_map = since(edited.original, edited.checkpoint, edits, edited.made)
        base = edited.original or edited.checkpoint
        lora = factor(base, edits, edited.made, text_map, how.size, how.dtype)
        write_edit_file(path, lora.tensors, lora.metadata, how.force, edited.check_unchanged)
        return lora.figures


class MapForm(EditForm):
    """A map of text embeddings, exact."""

    name = "map"

    def refuses(self, is_map: bool) -> str | None:
        """See `Form`."""
        return None if is_map else "This edit is more than a map of text embeddings."

    def write(self, edited: Edited, path: Path, how: How, report: Report) -> Figures:
        """See `Form`."""
        from trce_cli.edits.edit import write_edit_file

        assert edited.text_map is not None, "refused"
        tensors, metadata = edited.text_map.tensors(how.dtype), edited.made.metadata("map")
        write_edit_file(path, tensors, metadata, how.force, edited.check_unchanged)
        return {}


FORMS: Final[tuple[Form, ...]] = (DiffusersForm(), SingleFileForm(), LoraForm(), MapForm())
