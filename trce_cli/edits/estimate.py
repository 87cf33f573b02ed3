"""What writing an edited checkpoint will take, told before: memory, disk, and by a short trial the time."""

import hashlib
import shutil
from collections.abc import Mapping
from time import monotonic
from typing import Any, Final

from trce_cli.checkpoint.checkpoint import Checkpoint
from trce_cli.edits.edit import WeightEdit
from trce_cli.edits.outputs import Outputs, total_bytes
from trce_cli.system.foreign import open_file
from trce_cli.system.paths import existing

OVERHEAD: Final = 400 << 20  # bytes that Python and torch take
PIECE: Final = 64 << 20  # bytes that are read and hashed to see how long that takes


def plan_copy(checkpoint: Checkpoint, outputs: Outputs) -> dict[str, Any]:
    """What is written where, memory and disk in bytes: a weight is in memory at a time."""
    largest = max(copy.size for copy in checkpoint.denoiser_files[:1])
    place = next(iter(outputs.paths.values()))
    return {
        "outputs": {name: str(path) for name, path in outputs.paths.items()},
        "memory_bytes": OVERHEAD + min(largest, 1 << 30),
        "disk_bytes": sum(outputs.needed_bytes(checkpoint).values()),
        "free_disk_bytes": shutil.disk_usage(existing(place)).free,
    }


def copy_seconds(checkpoint: Checkpoint, outputs: Outputs, edits: Mapping[str, WeightEdit]) -> float:
    """About how long it takes to hash the checkpoint, to edit its weights and to copy it.

    Reads and hashes one piece of it and edits one weight; copying a byte is taken to cost as much.
    """
    begun = monotonic()
    with open_file(checkpoint.denoiser_files[0].path) as file:
        count = len(piece := file.read(PIECE))
        hashlib.sha256(piece)
    rate = (monotonic() - begun) / count
    key = max(edits, key=lambda name: _size(checkpoint, name))
    begun = monotonic()
    edits[key](checkpoint.read("denoiser", key).float())
    edit = (monotonic() - begun) / _size(checkpoint, key) * sum(_size(checkpoint, name) for name in edits)
    return rate * (checkpoint.total_bytes() + total_bytes(checkpoint, outputs)) + edit


def _size(checkpoint: Checkpoint, key: str) -> int:
    size = 1
    for length in checkpoint.shape("denoiser", key):
        size *= length
    return size
