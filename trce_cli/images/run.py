"""A folder of pictures drawn from a plan, and told of: what `trce generate` does."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Any

from trce_cli.checkpoint.checkpoint import Checkpoint
from trce_cli.images.draw import draw_records, is_flat
from trce_cli.images.folder import INDEX, ImageFolder
from trce_cli.images.grid import write_grid
from trce_cli.images.plan import identify, identity
from trce_cli.images.record import ImageRecord
from trce_cli.system.processes import on_main
from trce_cli.system.progress import Task, no_task
from trce_cli.system.shards import ALL, Share, begin, complete, finish

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
    share: Share = ALL,
    task: Task = no_task,
    note: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Draw what is missing of the plan in the output folder, and its grid; plain values that tell of it.

    checkpoints: by role. share: what of it is drawn here; of a part there is no grid. flat: files of pictures
    of one colour. Raises BadInput where the folder holds pictures of other settings and `force` is not given,
    and where shards that are to be merged are not whole, TrceError where a picture is not finite.
    """
    files = sum(len(checkpoint.drawn_from()) for checkpoint in checkpoints.values())
    records = identify(plan, checkpoints, dtype, task("Reading checkpoints", files, "files"))
    run = identity(records)

    folders: list[ImageFolder] = []

    def open_folder() -> list[str]:
        if share.merged:
            complete(share.merged, run)
        begin(output, share, run, force)
        folders.append(folder := ImageFolder(output, records, force))
        for other in share.merged:
            folder.take_over(other)
        if share.merged:
            folder.check_whole()
        return [record.file for record in folder.missing]

    missing = set(on_main(share.team, open_folder))
    pieces = share.of_shard(sorted(records, key=lambda record: record.role))
    wanted = [record for record in pieces if record.file in missing]
    mine = share.mine(wanted)
    report = task("Drawing", len(mine), "images")
    flat, start = [], monotonic()
    for record, image in draw_records(checkpoints, output, mine, device, note):
        report(1)
        flat += [record.file] if is_flat(image) else []
    seconds, drawn = monotonic() - start, len(wanted)
    share.team.wait_for_everyone()
    for folder in folders:  # of the main process
        folder.drawn |= {record.file for record in wanted}
        folder.write_index()
        finish(output, share, run)
    whole = share.team.is_main_process and not share.is_part
    return {
        "output": output,
        "grid": write_grid(output, records) if whole else None,
        "shard": str(share.shard) if share.is_part else None,
        "records": output / INDEX,
        "images": len(pieces),
        "drawn": drawn,
        "kept": len(pieces) - drawn,
        "flat": flat,
        "seconds": seconds,
        "images_per_second": drawn / seconds if drawn else None,
        "device": str(device),
        "dtype": dtype,
        "scheduler": records[0].scheduler,
        "checkpoints": {record.role: record.checkpoint_sha256 for record in records},
    }
