"""What the page draws: the original and the erased checkpoint, maps at any strength, each picture once."""

from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

from trce_cli.checkpoint.checkpoint import Checkpoint
from trce_cli.edits.edit import check_strength
from trce_cli.edits.files import check_fits, open_edit
from trce_cli.edits.map import Map, check_widths
from trce_cli.errors import BadInput
from trce_cli.images.draw import draw
from trce_cli.images.plan import checkpoint_hash, plan_images
from trce_cli.images.record import PIXEL_FIELDS, ImageRecord, encoded
from trce_cli.images.settings import DrawSettings
from trce_cli.prompts.files import Prompt
from trce_cli.system.progress import Task, no_task

if TYPE_CHECKING:
    import torch
    from diffusers import DiffusionPipeline

KEPT = 512  # pictures that are not drawn again when they are asked for again


def open_maps(
    paths: Sequence[Path], checkpoint: Checkpoint, allow_other_text_encoder: bool = False
) -> dict[str, Map]:
    """The maps in these files by the names they are shown under, in the order in which they act.

    Raises BadInput for other edits, which no slider can move, and for maps that do not fit the checkpoint.
    """
    found: dict[str, Map] = {}
    for path in paths:
        edit = open_edit(path)
        if not isinstance(edit, Map):
            raise BadInput(
                f"{path} is no map, and only maps can be put on and taken off while the page runs.",
                f"Write a checkpoint with it and play that: trce apply {path} {checkpoint.name} -o erased",
            )
        name = path.stem if path.stem not in found else str(path)
        if name in found:
            raise BadInput(f"{path} is given twice.", "Its slider goes beyond 1; once is enough.")
        found[name] = edit
    text_encoder = checkpoint.text_encoder_hash() if found else ""
    for text_map in found.values():
        check_fits(text_map, checkpoint, text_encoder, allow_other_text_encoder)
        check_widths(text_map.streams, checkpoint.widths, checkpoint.name)
    return found


@dataclass
class Studio:
    """Draws both sides, one picture after the other, whoever asks.

    original: None where there is nothing to compare with. erased: what the maps are put on, in their order.
    Where both are one checkpoint, it is in memory once.
    """

    original: Checkpoint | None
    erased: Checkpoint
    maps: Mapping[str, Map]
    device: "torch.device"
    dtype: str
    _pipes: dict[str, "DiffusionPipeline"] = field(default_factory=dict, repr=False)
    _hashes: dict[str, str] = field(default_factory=dict, repr=False)
    _drawn: OrderedDict[tuple[Any, ...], bytes] = field(default_factory=OrderedDict, repr=False)
    _lock: Lock = field(default_factory=Lock, repr=False)

    @property
    def checkpoints(self) -> dict[str, Checkpoint]:
        """By role: original and erased, or the only one as `image`."""
        if self.original is None:
            return {"image": self.erased}
        return {"original": self.original, "erased": self.erased}

    def load(self, task: Task = no_task) -> None:
        """Read the checkpoints into memory, and hash what pictures of them depend on."""
        import torch

        different = {checkpoint.path: checkpoint for checkpoint in self.checkpoints.values()}
        files = sum(len(checkpoint.drawn_from()) for checkpoint in different.values())
        report = task("Reading checkpoints", files, "files")
        for path, checkpoint in different.items():
            digest = checkpoint_hash(checkpoint, report)
            pipe = checkpoint.pipe(self.device, getattr(torch, self.dtype))
            for role, one in self.checkpoints.items():
                if one.path == path:
                    self._hashes[role], self._pipes[role] = digest, pipe

    def plan(self, prompt: str, settings: DrawSettings, strengths: Mapping[str, float]) -> list[ImageRecord]:
        """What `trce generate` would plan for the prompt and these settings, with the maps' strengths.

        A seed's pictures stand together, the original first. Raises BadInput as `plan_images` does.
        """
        for strength in strengths.values():
            check_strength(strength)
        treatment = ", ".join(f"{name} at {strengths[name]:g}" for name in self.maps if strengths[name])
        return [
            replace(
                record,
                dtype=self.dtype,
                checkpoint_sha256=self._hashes[record.role],
                treatment=treatment if record.role == "erased" else "",
            )
            for record in plan_images([Prompt(prompt)], self.checkpoints, settings)
        ]

    def draw(
        self, plan: Sequence[ImageRecord], strengths: Mapping[str, float]
    ) -> Iterator[tuple[ImageRecord, bytes]]:
        """Each planned picture as a PNG with its settings inside, drawn unless it was before."""
        for record in plan:
            key = tuple(getattr(record, name) for name in ("role", *PIXEL_FIELDS))
            with self._lock:
                if (picture := self._drawn.get(key)) is None:
                    picture = self._drawn[key] = self._one(record, strengths)
                self._drawn.move_to_end(key)
                while len(self._drawn) > KEPT:
                    self._drawn.popitem(last=False)
            yield record, picture

    def _one(self, record: ImageRecord, strengths: Mapping[str, float]) -> bytes:
        pipe = self._pipes[record.role]
        self._put_on(pipe, strengths if record.role == "erased" else {})
        ((_, image),) = draw(self.checkpoints[record.role].family, pipe, [record])
        return encoded(image, record)

    def _put_on(self, pipe: "DiffusionPipeline", strengths: Mapping[str, float]) -> None:
        """The maps in their order, which is that of the calls; none at 0, which leaves every bit as it is."""
        for text_map in self.maps.values():
            text_map.remove_from(pipe)
        for name, text_map in self.maps.items():
            if strength := strengths.get(name, 0.0):
                text_map.apply_to(pipe, strength)
