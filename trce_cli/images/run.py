"""A folder of pictures drawn from a plan, and told of: what `trce generate` does."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Any

from trce_cli.checkpoint.checkpoint import Checkpoint
from trce_cli.images.draw import draw_missing, is_flat
from trce_cli.images.folder import INDEX, ImageFolder
from trce_cli.images.grid import write_grid
from trce_cli.images.plan import identify
from trce_cli.images.record import ImageRecord
from trce_cli.system.progress import Task, no_task

if TYPE_CHECKING:
    import torch


def draw_folder(
    plan: Sequence[ImageRecord],
    checkpoints: Mapping[str, Checkpoint],
    output: Path,
    device: "torch.device",
    dtype: str,
    *,
    force: bool = False,
    task: Task = no_task,
    note: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Draw what is missing of the plan in the output folder, and its grid; plain values that tell of it.

    checkpoints: by role. flat: files of pictures of one colour. Raises BadInput where the folder holds
    pictures of other settings and `force` is not given, TrceError where one is not finite.
    """
    files = sum(len(checkpoint.drawn_from()) for checkpoint in checkpoints.values())
    records = identify(plan, checkpoints, dtype, task("Reading checkpoints", files, "files"))
    folder = ImageFolder(output, records, force)
    drawn = len(folder.missing)
    report = task("Drawing", drawn, "images")
    flat, start = [], monotonic()
    for record, image in draw_missing(checkpoints, folder, device, note):
        report(1)
        flat += [record.file] if is_flat(image) else []
    seconds = monotonic() - start
    return {
        "output": output,
        "grid": write_grid(output, records),
        "records": output / INDEX,
        "images": len(records),
        "drawn": drawn,
        "kept": len(records) - drawn,
        "flat": flat,
        "seconds": seconds,
        "images_per_second": drawn / seconds if drawn else None,
        "device": str(device),
        "dtype": dtype,
        "scheduler": records[0].scheduler,
        "checkpoints": {record.role: record.checkpoint_sha256 for record in records},
    }
