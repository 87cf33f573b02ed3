"""`trce play`: a page of this machine to look with."""

import sys
from pathlib import Path
from typing import Annotated

import typer
from pydantic import Field

from trce_cli.cli.apply import Fitting
from trce_cli.cli.options import (
    AGAINST,
    Answer,
    CheckpointName,
    Drawing,
    Opening,
    preset_option,
    with_options,
)
from trce_cli.errors import Closed
from trce_cli.images.settings import DrawSettings
from trce_cli.prompts.files import Prompt
from trce_cli.prompts.presets import load_presets
from trce_cli.settings import Settings

Edits = Annotated[
    list[Path] | None,
    typer.Option(
        "--edit",
        metavar="FILE",
        help="A map to put on and take off while the page runs; repeat it for several, a slider each.",
        show_default=False,
    ),
]
Examples = Annotated[
    list[str] | None,
    preset_option("Whose examples to show; else of what the edits and the checkpoint say they erase."),
]


class Serving(Settings):
    """Where the page is."""

    host: str = Field(
        "127.0.0.1",
        description="The address to serve at; by default one that only this machine reaches. 0.0.0.0: "
        "whoever reaches this machine can draw, too.",
    )
    port: Annotated[int, Field(ge=0, le=65535)] = Field(7860, description="Its port; 0 for any free one.")


@with_options
def play(
    checkpoint: CheckpointName,
    settings: DrawSettings,
    fitting: Fitting,
    serving: Serving,
    drawing: Drawing,
    opening: Opening,
    answer: Answer,
    edits: Edits = None,
    against: Annotated[str | None, AGAINST] = None,
    presets: Examples = None,
) -> None:
    """Open a local page: original beside erased, live.

    Type a prompt or click one, and move a slider for each map. Ctrl-C ends it.
    """
    from trce_cli.play import serve

    serve.check_library()

    from trce_cli.checkpoint.home import home_of
    from trce_cli.checkpoint.provenance import history
    from trce_cli.edits.files import carried
    from trce_cli.erase.teacher import find_original
    from trce_cli.images.plan import plan_images
    from trce_cli.play.examples import examples_of, recorded_presets
    from trce_cli.play.page import LOOK, make_page
    from trce_cli.play.studio import Studio, open_maps

    console = answer.console()
    paths = list(edits or ())
    chosen = load_presets(presets or ())
    erased = opening.open(checkpoint)
    maps = open_maps(paths, erased, fitting.allow_other_text_encoder)
    original = find_original(erased, against, opening.config, "--against", warn=console.warn).checkpoint
    where = drawing.place()
    has_two = bool(maps) or original is not erased
    studio = Studio(original if has_two else None, erased, maps, where, drawing.precision(where))
    plan_images([Prompt("")], studio.checkpoints, settings)  # refuses what cannot be drawn
    for name in carried(erased, paths, list(maps.values())):
        console.warn(f"{erased.name} carries {name} already, which is put on it once more.")
    if not has_two:
        console.note(f"{erased.name} carries no edit; to see one beside it, give --edit FILE.")
    entries = [entry for each in maps.values() for entry in each.made.history] + history(erased)
    examples = examples_of(chosen or recorded_presets(entries), home_of(erased))
    with serve.bind(serving.host, serving.port) as bound:
        with console.progress() as progress:
            studio.load(progress.task)
        page = make_page(studio, examples, settings, fitting.strength)
        if not serve.is_loopback(serving.host):
            console.warn(f"Whoever reaches {serving.host} can draw with this page.")
        address = serve.address_of(bound, serving.host)
        console.answer(f"Open {address} in a browser; Ctrl-C ends it.")
        console.result({"url": address})
        sys.stdout.flush()
        try:
            serve.serve(page, bound, serving.host, **LOOK)
        except KeyboardInterrupt:
            raise Closed from None
