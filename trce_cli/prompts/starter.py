"""A commented start for a preset of one's own; what it says of settings comes from their models."""

import re
import textwrap
from collections.abc import Iterator
from json import dumps
from typing import Any, Final

from pydantic.fields import FieldInfo

from trce_cli.prompts.presets import TABLES
from trce_cli.settings import Settings

_START: Final = """\
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
"""


def starter(name: str) -> str:
    """The TOML text of a new preset of this name, a valid one as it stands.

    Every setting that a preset may recommend is in it, as a comment, with its description and default.
    """
    printable = "".join(filter(str.isprintable, name)).strip() or "my-preset"
    # A printable text is written in TOML as in JSON.
    text = _START.format(name=dumps(printable, ensure_ascii=False))
    for table in ("map", "steer"):
        text += "\n".join((f"[{table}]", *_settings(TABLES[table]), "", ""))
    return text.rstrip() + "\n"


def _settings(table: type[Settings]) -> Iterator[str]:
    for name, field in table.model_fields.items():
        said = re.sub(r";? else the preset's.*|\.$", "", field.description or "")
        yield from textwrap.wrap(said, 108, initial_indent="# ", subsequent_indent="# ")
        yield f"# {name} = {_toml(_value(field))}"


def _value(field: FieldInfo) -> Any:
    """The default; an example of what may be given where that is none, or hangs on other settings."""
    return field.examples[0] if field.examples else field.default


def _toml(value: Any) -> str:
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{key} = {_toml(each)}" for key, each in value.items()) + " }"
    return f"{value:g}".replace("e-0", "e-") if isinstance(value, float) else dumps(value)
