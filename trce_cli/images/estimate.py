"""What drawing will take, told before: how many pictures, memory and disk, and by a short trial the time."""

import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Any, Final

from trce_cli.checkpoint.checkpoint import Checkpoint
from trce_cli.images.draw import draw
from trce_cli.images.record import ImageRecord
from trce_cli.system.memory import free
from trce_cli.system.paths import existing

if TYPE_CHECKING:
    import torch
    from PIL import Image

# What Python, torch and diffusers take, measured in bytes; activations come on top.
OVERHEAD: Final = 600 << 20
SIZES: Final = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1}
SHORT: Final = (
    2,
    2,
    5,
)  # denoising steps of what is drawn to see how long a picture takes; the first warms up

Places = Sequence[tuple[Path, Sequence[ImageRecord]]]  # folders, and what is drawn in each


def plan_drawing(checkpoints: Mapping[str, Checkpoint], places: Places, dtype: str) -> dict[str, Any]:
    """How many pictures there are and how many are missing, memory and disk in bytes; writes nothing.

    Disk is what pictures take at most, three bytes a pixel; only one checkpoint is in memory at a time.
    """
    lacking = list(missing(places))
    return {
        "images": sum(len(records) for _, records in places),
        "images_to_draw": len(lacking),
        "denoising_steps": sum(record.steps for record in lacking),
        "memory_bytes": OVERHEAD + max(loaded_bytes(one, dtype) for one in checkpoints.values()),
        "disk_bytes": sum(3 * record.width * record.height for record in lacking),
        "free_disk_bytes": shutil.disk_usage(existing(places[0][0])).free,
    }


def missing(places: Places) -> Iterator[ImageRecord]:
    """What is not there yet, by the names of files."""
    for folder, records in places:
        for record in records:
            with suppress(OSError):
                if (folder / record.file).exists():
                    continue
            yield record


def loaded_bytes(checkpoint: Checkpoint, dtype: str) -> int:
    """What a checkpoint's weights take in memory in torch's dtype of that name."""
    stored = SIZES.get(checkpoint.dtype, 4)
    return checkpoint.total_bytes() * (4 if dtype == "float32" else 2) // stored


@dataclass(frozen=True)
class Pace:
    """How fast a checkpoint draws: seconds to load it, a step, and a picture beside its steps, at a size."""

    load: float
    step: float
    picture: float
    pixels: int
    sample: "Image.Image"

    def seconds(self, records: Sequence[ImageRecord]) -> float:
        """The time that these pictures take, by as many checkpoints as have a role in them.

        A picture of another size is taken to need as much more as it has more pixels.
        """
        each = (
            (self.picture + record.steps * self.step) * record.width * record.height / self.pixels
            for record in records
        )
        return self.load * len({record.role for record in records}) + sum(each)


def pace(checkpoint: Checkpoint, record: ImageRecord, device: "torch.device", dtype: str) -> Pace:
    """Load the checkpoint and draw the picture in a few steps, to see how long both take."""
    import torch

    start = monotonic()
    pipeline = checkpoint.pipe(device, getattr(torch, dtype))
    load, took = monotonic() - start, []
    for steps in SHORT:
        begun = monotonic()
        ((_, sample),) = draw(checkpoint.family, pipeline, [replace(record, steps=steps, dtype=dtype)])
        took.append(monotonic() - begun)
    del pipeline
    free(device)
    (few, many), (less, more) = SHORT[1:], took[1:]
    step = max(0.0, (more - less) / (many - few)) or more / many
    return Pace(load, step, max(0.0, more - many * step), record.width * record.height, sample)
