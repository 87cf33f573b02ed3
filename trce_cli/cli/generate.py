"""`trce generate`: seeded images of one checkpoint, or of two side by side."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Any

import typer

from trce_cli.cli.console import Console
from trce_cli.cli.options import (
    Answer,
    CheckpointName,
    Drawing,
    DryRun,
    ForcePictures,
    Opening,
    Output,
    Sharing,
    check_outside,
    goes_on,
    told_shard,
    with_options,
)
from trce_cli.cli.plans import show_plan
from trce_cli.images.settings import DrawSettings, Rows
from trce_cli.system.shards import Share


@with_options
@goes_on
def generate(
    checkpoint: CheckpointName,
    output: Output,
    settings: DrawSettings,
    rows: Rows,
    drawing: Drawing,
    opening: Opening,
    sharing: Sharing,
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
    force: ForcePictures = False,
    dry_run: DryRun = False,
) -> None:
    """Draw seeded images, their settings inside, and a labelled grid.

    An image depends only on checkpoint, prompt, seed and settings.
    Started again with the same arguments, it draws only what is missing; `accelerate launch -m trce_cli
    generate ...` shares the work among processes, --shard among machines.
    """
    from trce_cli.images.estimate import missing, pace, plan_drawing
    from trce_cli.images.folder import check_unmeasured, look_into
    from trce_cli.images.plan import plan_images
    from trce_cli.images.run import draw_folder
    from trce_cli.prompts.files import Prompt

    share = sharing.share(drawing.device)
    console = answer.console(share.team.is_main_process)
    wanted = [*map(Prompt, prompts or ()), *rows.prompts(console.note)]
    if settings.seed is not None and (replaced := sum(prompt.seed is not None for prompt in wanted)):
        console.note(f"--seed {settings.seed} replaces the seeds of {replaced} rows.")
    checkpoints = {"original": opening.open_other(compare)} if compare else {}
    checkpoints["erased" if compare else "image"] = opening.open(checkpoint)
    check_outside(output, checkpoints.values())
    check_unmeasured(output)
    plan, where = plan_images(wanted, checkpoints, settings), drawing.place(share.team)
    dtype = drawing.precision(where)
    if dry_run:
        look_into(output, [replace(record, dtype=dtype) for record in plan], force)
        places, (name, drawn_by) = [(output, plan)], list(checkpoints.items())[-1]
        first = next(record for record in plan if record.role == name)
        show_plan(
            console, output, plan_drawing(checkpoints, places, dtype),
            lambda: pace(drawn_by, first, where, dtype).seconds(list(missing(places))),
        )  # fmt: skip
        return
    with console.progress() as progress:
        told = draw_folder(
            plan, checkpoints, output, where, dtype, force=force, share=share, task=progress.task,
            note=console.note,
        )  # fmt: skip
    _show(console, told, share)


def _show(console: Console, told: Mapping[str, Any], share: Share) -> None:
    output = told["output"]
    if flat := told["flat"]:
        hint = "" if told["dtype"] == "float32" else " Try --dtype fp32."
        console.warn(f"{len(flat)} images are of one flat colour, such as {flat[0]}.{hint}")
    speed = f" ({told['images_per_second']:.2f} a second)" if told["drawn"] else ""
    console.show(
        f"{told['images']} images in {output}: {told['drawn']} drawn{speed}, {told['kept']} there already."
    )
    if share.is_part:
        told_shard(console, output, share, told)
    else:
        console.show(f"Grid: {told['grid']}")
        console.result(told)
