"""`trce presets`: the concept lists."""

from pathlib import Path
from typing import Annotated, Any

import typer

from trce_cli.cli.console import Console
from trce_cli.cli.options import Answer, Force, PresetName, with_options
from trce_cli.errors import BadInput
from trce_cli.prompts.pairs import pair_prompts, prompt_pairs
from trce_cli.prompts.presets import Preset, load_preset, preset_names, recommended
from trce_cli.prompts.starter import starter
from trce_cli.system.whole import clear_stale, write_text

app = typer.Typer(help="List, show, check and start concept lists.", no_args_is_help=True)


@app.command("list")
@with_options
def list_presets(answer: Answer) -> None:
    """The shipped presets."""
    from rich.table import Table

    console = answer.console()
    table = Table("name", "kind", "concepts", "description")
    rows = [_summary(load_preset(name)) for name in preset_names()]
    for row in rows:
        table.add_row(row["name"], row["kind"], str(row["concepts"]), row["description"])
    console.answer(table)
    console.result({"presets": rows})


@app.command("show")
@with_options
def show_preset(
    preset: PresetName,
    answer: Answer,
    pairs: Annotated[
        bool, typer.Option("--pairs", help="Every prompt pair that `trce map` would use.")
    ] = False,
) -> None:
    """What a preset erases, and what it puts in its place."""
    console = answer.console()
    loaded = load_preset(preset)
    if pairs:
        _show_pairs(console, loaded)
    else:
        _show_concepts(console, loaded)


@app.command("check")
@with_options
def check_preset(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A preset's TOML file.", show_default=False)],
    answer: Answer,
) -> None:
    """Say whether a file is a valid preset, or what is wrong with it."""
    from trce_cli.checkpoint.folder import cut_by_base

    console = answer.console()
    preset = load_preset(file)
    summary = _summary(preset)
    for cut in cut_by_base(pair_prompts([preset])):
        console.note(cut)
    console.answer(
        f"{file} is a valid preset: {summary['concepts']} concepts, {summary['pairs']} prompt pairs."
    )
    console.result({"file": file, "valid": True, **summary})


@app.command("new")
@with_options
def new_preset(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The file to write.", show_default=False)],
    answer: Answer,
    force: Force = False,
) -> None:
    """Write a commented starting point for a preset of your own."""
    console = answer.console()
    if file.is_dir():
        raise BadInput(f"{file} is a folder.", f"Name the file: {file / 'my-preset.toml'}")
    if not file.parent.is_dir():
        raise BadInput(f"There is no folder {str(file.parent)!r} to write {file.name} in.", "Make it first.")
    clear_stale(file.parent)
    if file.exists() and not force:
        raise BadInput(f"{file} exists already.", "Choose another name, or replace it with --force.")
    write_text(file, starter(file.stem), force)
    console.show(f"Wrote {file}; fill it in, then run `trce presets check {file}`.")
    console.result({"file": file})


def _summary(preset: Preset) -> dict[str, Any]:
    return {
        "name": preset.name,
        "description": preset.description,
        "kind": preset.kind,
        "includes": preset.includes,
        "concepts": sum(len(part.concepts) for part in preset.walk()),
        "pairs": len(prompt_pairs([preset])),
        "sha256": preset.sha256(),
    }


def _show_concepts(console: Console, preset: Preset) -> None:
    from rich.table import Table

    table = Table("unsafe", "safe", "kind", "from")
    concepts = [
        {"unsafe": concept.unsafe, "safe": concept.safe, "kind": part.kind, "preset": part.name}
        for part in preset.walk()
        for concept in part.concepts
    ]
    for concept in concepts:
        table.add_row(*concept.values())
    console.answer(f"{preset.name}: {preset.description}")
    console.answer(table)
    settings = {
        "map": recommended(preset.walk(), "map"),
        "steer": recommended(preset.walk(), "steer"),
    }
    for command, values in settings.items():
        told = ", ".join(f"{key} {value}" for key, value in values.items())
        console.answer(f"{command}: {told or 'the defaults'}")
    more = {"concepts": concepts, "templates": preset.templates, "implied": preset.implied}
    console.result(_summary(preset) | more | {"sensitive": preset.sensitive} | settings)


def _show_pairs(console: Console, preset: Preset) -> None:
    from rich.table import Table

    table = Table("unsafe prompt", "safe prompt", "keyword")
    pairs = prompt_pairs([preset])
    for pair in pairs:
        table.add_row(pair.unsafe, pair.safe, pair.keyword)
    console.answer(table)
    console.result([{"unsafe": pair.unsafe, "safe": pair.safe, "keyword": pair.keyword} for pair in pairs])
