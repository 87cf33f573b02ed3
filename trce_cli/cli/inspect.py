"""`trce inspect`: what a checkpoint or file is, and what was done to it."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from trce_cli.cli.options import Answer, Opening, with_options

if TYPE_CHECKING:
    from rich.table import Table


@with_options
def inspect(
    path: Annotated[
        str,
        typer.Argument(
            metavar="PATH",
            help="`emoji`, `emoji-dit`, a diffusers folder, a .safetensors file of any kind, or a hub id.",
            show_default=False,
        ),
    ],
    opening: Opening,
    answer: Answer,
    edit: Annotated[
        str | None,
        typer.Option(
            "--edit",
            metavar="FILE",
            help="Also tell whether this map or LoRA fits the checkpoint.",
            show_default=False,
        ),
    ] = None,
    recipe: Annotated[
        bool, typer.Option("--recipe", help="Print the recipe that makes its edit again, for `trce run`.")
    ] = False,
) -> None:
    """Tell what a checkpoint or file is, and what was done to it.

    Family, layout, dtype, sizes, and the edits that it carries.
    """
    from trce_cli.edits.inspection import describe

    console = answer.console()
    found = describe(path, opening.revision, opening.variant, opening.config, edit)
    if recipe:
        from trce_cli.cli.recipe_of import recipe_of

        text = recipe_of(found, path)
        console.answer(text.rstrip())
        console.result({"recipe": text})
        return
    console.answer(_table(found))
    if history := found.get("history"):
        console.answer(_history_table(history))
    console.result(found)


def _table(found: dict[str, Any]) -> "Table":
    from rich.table import Table

    table = Table(show_header=False)
    for key, value in found.items():
        if key == "history":
            continue
        name = key.replace("_", " ")
        if key == "bytes":
            name, value = "size", f"{value:,} bytes"
        elif isinstance(value, bool):
            value = "yes" if value else "no"
        elif isinstance(value, int):
            value = f"{value:,}"
        elif isinstance(value, dict):
            value = "\n".join(f"{k}: {', '.join(v) if isinstance(v, list) else v}" for k, v in value.items())
        elif isinstance(value, list):
            value = ", ".join(value)
        table.add_row(name, str(value) or "none")
    return table


def _history_table(history: list[dict[str, Any]]) -> "Table":
    from rich.table import Table

    table = Table("edit", "date", "presets", "trce", "base", title="edits, oldest first")
    for entry in history:
        presets = ", ".join(preset["name"] for preset in entry["presets"])
        base = entry["base"]["name"]
        table.add_row(entry["edit"], entry["date"][:10], presets, entry["versions"]["trce"], base)
    return table
