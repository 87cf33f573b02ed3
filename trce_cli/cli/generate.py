"""`trce generate`: seeded images of one checkpoint, or of two side by side."""

from pathlib import Path
from time import monotonic
from typing import Annotated

import typer

from trce_cli.cli.options import (
    Answer,
    CheckpointName,
    Drawing,
    Opening,
    Output,
    check_outside,
    with_options,
)
from trce_cli.errors import BadInput
from trce_cli.images.settings import DrawSettings


@with_options
def generate(
    checkpoint: CheckpointName,
    output: Output,
    settings: DrawSettings,
    drawing: Drawing,
    opening: Opening,
    answer: Answer,
    prompts: Annotated[
        list[str] | None, typer.Argument(metavar="[PROMPT]...", help="What to draw.", show_default=False)
    ] = None,
    compare: Annotated[
        str | None,
        typer.Option(
            "--compare",
            metavar="ORIGINAL",
            help="Draw the same prompts and seeds with this checkpoint too.",
            show_default=False,
        ),
    ] = None,
    prompt_file: Annotated[
        Path | None,
        typer.Option(
            "--prompts",
            metavar="FILE",
            help="More prompts: .txt, one a line, or .csv with a prompt column and, if any, seed, guidance, "
            "width and height, as I2P, MMA-Diffusion, P4D, Ring-A-Bell, UnlearnDiffAtk and COCO spell them.",
            show_default=False,
        ),
    ] = None,
    where: Annotated[
        list[str] | None,
        typer.Option(
            "--where",
            metavar="NAME=VALUE",
            help="Only rows of the file whose cell is, or lists, this value; may be repeated, all must hold.",
            show_default=False,
        ),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option("--limit", min=1, help="Take only the first so many of the file.", show_default=False),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Replace the images of another run in the output folder.")
    ] = False,
) -> None:
    """Draw seeded images, their settings inside, and a labelled grid.

    An image depends only on checkpoint, prompt, seed and settings.
    Started again with the same arguments, it draws only what is missing.
    """
    from trce_cli.images.draw import draw_missing, is_flat
    from trce_cli.images.folder import INDEX, ImageFolder
    from trce_cli.images.grid import write_grid
    from trce_cli.images.plan import identify, plan_images
    from trce_cli.prompts.files import Prompt, read_prompts

    console = answer.console()
    wanted = [Prompt(text) for text in prompts or ()]
    if prompt_file:
        wanted += read_prompts(prompt_file, where=where or (), limit=limit, note=console.note)
    elif where or limit:
        raise BadInput("--where and --limit choose rows of a file.", "Name it with --prompts.")
    if settings.seed is not None and (replaced := sum(prompt.seed is not None for prompt in wanted)):
        console.note(f"--seed {settings.seed} replaces the seeds of {replaced} rows.")
    checkpoints = {"original": opening.open_other(compare)} if compare else {}
    checkpoints["erased" if compare else "image"] = opening.open(checkpoint)
    check_outside(output, checkpoints.values())
    plan = plan_images(wanted, checkpoints, settings)
    torch_device = drawing.place()
    with console.progress() as progress:
        hashing = progress.task("Reading checkpoints", sum(len(c.drawn_from()) for c in checkpoints.values()))
        records = identify(plan, checkpoints, drawing.precision(torch_device), hashing)
        folder = ImageFolder(output, records, force)
        drawn = len(folder.missing)
        report = progress.task("Drawing", drawn, "images")
        flat, start = [], monotonic()
        for record, image in draw_missing(checkpoints, folder, torch_device, console.note):
            report()
            flat += [record.file] if is_flat(image) else []
        seconds = monotonic() - start
    grid = write_grid(output, records)
    if flat:
        hint = "" if records[0].dtype == "float32" else " Try --dtype fp32."
        console.warn(f"{len(flat)} images are of one flat colour, such as {flat[0]}.{hint}")
    rate = drawn / seconds if drawn else None
    console.show(
        f"{len(records)} images in {output}: {drawn} drawn"
        + (f" ({rate:.2f} a second)" if rate else "")
        + f", {len(records) - drawn} there already.\nGrid: {grid}"
    )
    console.result(
        {
            "output": output,
            "grid": grid,
            "records": output / INDEX,
            "images": len(records),
            "drawn": drawn,
            "kept": len(records) - drawn,
            "flat": flat,
            "seconds": seconds,
            "images_per_second": rate,
            "device": str(torch_device),
            "dtype": records[0].dtype,
            "scheduler": records[0].scheduler,
            "checkpoints": {record.role: record.checkpoint_sha256 for record in records},
        }
    )
