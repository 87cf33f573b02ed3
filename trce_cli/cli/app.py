"""The command line. A command's module imports nothing heavy; what it needs it imports when it is run."""

from collections.abc import Sequence
from typing import Annotated

import typer

from trce_cli.cli import (
    apply,
    attack,
    diff,
    evaluate,
    evidence,
    generate,
    inspect,
    map,
    play,
    presets,
    run,
    steer,
    tune,
)
from trce_cli.cli.console import run_app
from trce_cli.system.machine import __version__

app = typer.Typer(
    name="trce",
    help="Erase unsafe concepts from text-to-image diffusion checkpoints.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["--help", "-h"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"trce {__version__}")
        raise typer.Exit


@app.callback()
def trce(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Erase unsafe concepts from text-to-image diffusion checkpoints."""


# A line for each command, in the order of the help.
app.add_typer(presets.app, name="presets")
app.command()(run.run)
app.command("map")(map.map_)
app.command()(tune.tune)
app.command()(steer.steer)
app.command()(apply.apply)
app.command()(generate.generate)
app.command()(play.play)
app.command()(evaluate.evaluate)
app.command()(attack.attack)
app.command()(evidence.evidence)
app.command()(inspect.inspect)
app.command()(diff.diff)


def main(args: Sequence[str] | None = None) -> int:
    """The console script: runs one command and returns its exit status."""
    return run_app(app, args)
