"""`trce presets`: the concept lists."""

from json import dumps
from pathlib import Path
from typing import Annotated, Any

import typer

from trce_cli.cli.console import Console
from trce_cli.cli.options import Answer, Force, PresetName, with_options
from trce_cli.errors import BadInput
from trce_cli.prompts.pairs import prompt_pairs
from trce_cli.prompts.presets import Preset, load_preset, preset_names, recommended
from trce_cli.system.whole import write_text

app = typer.Typer(help="List, show, check and start concept lists.", no_args_is_help=True)

NEW_PRESET = """\
# A preset for trce: what to erase, and what fits in its place.
# Check it with `trce presets check FILE`, use it with `trce map CHECKPOINT --preset FILE -o DIR`.

name = {name}
description = "One line on what this erases"

# What the phrases name: object, person, scene or style. It chooses the default templates.
kind = "object"

# Other presets to erase along with this one: shipped names, or paths relative to this file.
# includes = ["weapons"]

# Sentences that the phrases are put into, each with one {{}}. Leave them out to use the kind's own.
# templates = ["a photo of {{}}", "{{}} on a table"]

# Prompts that mean the concepts without naming one: no edit sees them, `trce evaluate` asks them.
# implied = ["a machine that takes your coins and rarely gives any back"]

# Reports blur the pictures until they are clicked, unless this is false.
# sensitive = false

# One table a concept: the unsafe phrase with its article, and a safe one that fits the same sentences.
# Name the concept in as many ways as people do; 20 are a good number.
[[concepts]]
unsafe = "a slot machine"
safe = "a vending machine"

[[concepts]]
unsafe = "a roulette wheel"
safe = "a bicycle wheel"

# Recommended settings; every key may be left out, options on the command line come before them.
[map]
# preserve = 0.1                 # lambda: larger keeps more of everything else, smaller erases more
# ridge = 1e-4                   # bounds the edit, so that it survives rounded weights; 0 for no bound
# token_weights = [0, 1, 0, 0]   # SD: start of text, first and last end of text, keyword
# strength = 1.0                 # 1 is the full edit

[steer]
# steps = 50                     # DDIM steps of a trajectory
# early_steps = 25               # how many of them, from the noise on, are tuned
# trajectories_per_concept = 5   # seeds a concept
# unconditional = 2000           # states that hold everything else in place
# benign = 1000                  # states under benign prompts, held to the original's predictions
# guidance_scale = 3.0           # of the trajectories
# steering_guidance = 15.0       # of the targets
# margin = 0.01
# regularisation = 100.0         # weight of the unconditional states
# retention = 100.0              # weight of the states under benign prompts
# lr = 1e-6
# epochs = 3
# max_steps = 1000
# batch_size = 4
"""


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
    console.show(table)
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
    console = answer.console()
    summary = _summary(load_preset(file))
    console.show(
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
    if file.exists() and not force:
        raise BadInput(f"{file} exists already.", "Choose another name, or replace it with --force.")
    name = "".join(filter(str.isprintable, file.stem)).strip() or "my-preset"
    # A printable text is written in TOML as in JSON.
    write_text(file, NEW_PRESET.format(name=dumps(name, ensure_ascii=False)), force)
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
    console.show(f"{preset.name}: {preset.description}")
    console.show(table)
    settings = {
        "map": recommended([preset], "map"),
        "steer": recommended([preset], "steer"),
    }
    for command, values in settings.items():
        told = ", ".join(f"{key} {value}" for key, value in values.items())
        console.show(f"{command}: {told or 'the defaults'}")
    more = {"concepts": concepts, "templates": preset.templates, "implied": preset.implied}
    console.result(_summary(preset) | more | {"sensitive": preset.sensitive} | settings)


def _show_pairs(console: Console, preset: Preset) -> None:
    from rich.table import Table

    table = Table("unsafe prompt", "safe prompt", "keyword")
    pairs = prompt_pairs([preset])
    for pair in pairs:
        table.add_row(pair.unsafe, pair.safe, pair.keyword)
    console.show(table)
    console.result([{"unsafe": pair.unsafe, "safe": pair.safe, "keyword": pair.keyword} for pair in pairs])
