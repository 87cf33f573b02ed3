"""`trce run`: a recipe, from the base to the gates."""

from pathlib import Path
from typing import Annotated, Any

import typer

from trce_cli.cli.options import Answer, goes_on, with_options
from trce_cli.errors import BadInput, TrceError
from trce_cli.system.processes import launched


@with_options
@goes_on
def run(
    answer: Answer,
    recipe: Annotated[
        Path, typer.Argument(metavar="RECIPE.toml", help="The recipe, or with --init where it goes.")
    ] = Path("recipe.toml"),
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", metavar="DIR", help="In place of the recipe's output.", show_default=False
        ),
    ] = None,
    init: Annotated[bool, typer.Option("--init", help="Write a commented recipe to begin with.")] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Replace results of other settings, or with --init the recipe.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything, print the plan and write nothing.")
    ] = False,
) -> None:
    """Run a recipe: base, presets, steps and gates in one file.

    Everything is checked before the first step begins. Started again it skips what is done and whole, and
    goes on where it was. Exits with 1 where a gate of `evaluate` is not met. Paths in a recipe are as on the
    command line.
    """
    console = answer.console()
    if init:
        from trce_cli.cli.recipe_start import write_start

        write_start(recipe, force)
        console.note(f"Wrote {recipe}. Next: trce run {recipe} --dry-run")
        console.result({"recipe": recipe})
        return
    if launched() > 1:
        raise BadInput("trce run is one process.", "Start its steps with accelerate launch one by one.")

    from trce_cli.cli.recipe import read_recipe
    from trce_cli.cli.steps import Work

    work = Work(read_recipe(recipe, output), recipe, force, dict(answer))
    console.note(f"Checking {recipe}: {', '.join(link.step.name for link in work.links)}.")
    work.check()
    told: dict[str, Any] = {"recipe": recipe, "output": work.recipe.head.output}
    if dry_run:
        console.result(told | work.show_plans(console))
        return
    work.begin()
    steps: dict[str, Any] = {}
    try:
        for number, link in enumerate(work.links, start=1):
            console.note(f"Step {number} of {len(work.links)}: {link.step.name}, to {link.step.output}.")
            steps[link.step.name] = {}
            work.run(link, steps[link.step.name])
            if steps[link.step.name].get("kept") is True:
                console.note("It is done and whole.")
    except TrceError:
        if any(steps.values()):
            console.result(told | {"steps": steps})
        raise
    console.note(f"Done: {work.recipe.head.output}")
    console.result(told | {"steps": steps})
