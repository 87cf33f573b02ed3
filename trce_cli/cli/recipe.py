"""A recipe: a TOML file that says what is erased from what, how it is measured, and where it all goes.

A step is a table with the name of a command, and its keys are that command's options, the same fields with
the same checks. Steps run in the order of the file; several of one command are told apart as `[map-2]`.
"""

import difflib
import re
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final

from pydantic import Field
from pydantic.fields import FieldInfo

from trce_cli.cli.apply import apply
from trce_cli.cli.evaluate import evaluate
from trce_cli.cli.generate import generate
from trce_cli.cli.map import map_
from trce_cli.cli.options import Answer, Computing, Opening, Publishing, flag_of, key_of
from trce_cli.cli.steer import steer
from trce_cli.errors import BadInput
from trce_cli.prompts.presets import Preset, load_preset, parse_preset
from trce_cli.settings import Flag, Settings
from trce_cli.system.foreign import parse_toml, read_text
from trce_cli.system.toml import toml

Command = Callable[..., None]

NAME: Final = "recipe.toml"  # of the resolved recipe, in the output folder
EDITS: Final = ("map", "apply", "steer")


class Prompts(Settings):
    """What `trce generate` is given without an option."""

    prompt: tuple[str, ...] = Field((), description="What to draw.")


class Edits(Settings):
    """What `trce apply` is given without an option."""

    edits: tuple[Path, ...] = Field(description="Maps and LoRAs, in the order in which they act.")
    sha256: tuple[str, ...] = Field(
        (), description="Their SHA-256 in hex, in the same order; other files are refused."
    )


class CaptionsHash(Settings):
    """What a recipe says beside `prior`."""

    prior_sha256: str | None = Field(
        None,
        description="SHA-256 in hex of the captions to preserve, as trce.json has it; others are refused.",
    )


class Own(Settings):
    """What a recipe says of an edit beside the command's options."""

    presets: tuple[str, ...] = Field(
        (), description="What this step erases, in place of the recipe's presets."
    )


class Place(Settings):
    """Where a step's result goes."""

    output: Path | None = Field(
        None, description="Where the result goes, in place of a name of its own in the recipe's output."
    )


@dataclass(frozen=True)
class Kind:
    """A command that may be a step: its options, what a recipe knows beside them, what its result is called.

    further: settings that are no option of the command. An edit's result is called `erased` where it is the
    last one's, else as its step. without: options that are for the command alone.
    """

    command: Command
    further: tuple[type[Settings], ...]
    result: str | None = None
    without: tuple[type[Settings], ...] = ()

    def fields(self) -> dict[str, tuple[str, type[Settings], FieldInfo]]:
        """The keys of a step, each with the field that it sets and the model which that is of."""
        left_out = (Answer, Opening, *self.without)
        models = [model for model in self.command.models if model not in left_out]  # type: ignore[attr-defined]
        return {
            key_of(name, field): (name, model, field)
            for model in (*models, *self.further, Place)
            for name, field in model.model_fields.items()
            if not flag_of(field).gone
        }


KINDS: Final[Mapping[str, Kind]] = {
    "map": Kind(map_, (Own, CaptionsHash)),
    "apply": Kind(apply, (Edits,)),
    "steer": Kind(steer, (Own,)),
    "generate": Kind(generate, (Prompts,), "images"),
    # What was pushed is never replaced, but a recipe may run again.
    "evaluate": Kind(evaluate, (), "evaluation", without=(Publishing,)),
}
_STEP: Final = re.compile(rf"({'|'.join(KINDS)})(-[\w-]+)?")


class Head(Opening, Computing):
    """What stands above the steps."""

    base: str = Field(
        description="The checkpoint: `emoji`, `emoji-dit`, a diffusers folder, a .safetensors file, a hub id."
    )
    presets: tuple[str, ...] = Field(
        (), description="What is erased: names of presets, paths, or names of [[preset]] tables below."
    )
    output: Annotated[Path, Flag(metavar="DIR")] = Field(
        description="The folder that all results go to, with this recipe as it was resolved."
    )
    base_sha256: tuple[str, ...] = Field(
        (), description="SHA-256 in hex of files of the base's weights, one of which it must have."
    )


@dataclass(frozen=True)
class Step:
    """One step. given: fields of the command; told: the same as the file has them; output: its place."""

    name: str
    command: str
    given: Mapping[str, Any]
    told: Mapping[str, Any]
    presets: tuple["str | Preset", ...]
    output: Path

    @property
    def is_edit(self) -> bool:
        """Whether it makes a checkpoint of another, or an edit's file."""
        return self.command in EDITS


@dataclass(frozen=True)
class Recipe:
    """A recipe that was read. told: the head and own presets as the file has them."""

    head: Head
    steps: tuple[Step, ...]
    told: Mapping[str, Any]


def read_recipe(path: Path, output: Path | None = None) -> Recipe:
    """The recipe of a file, all keys and values checked; BadInput names the first that is wrong.

    output: in place of the file's own.
    """
    if not path.exists():
        raise BadInput(f"There is no recipe {path}.", f"Write one to begin with: trce run --init {path}")
    table = parse_toml(read_text(path, encoding="utf-8-sig"), str(path))
    return parse_recipe(table if output is None else table | {"output": str(output)}, str(path))


def parse_recipe(table: Mapping[str, Any], where: str) -> Recipe:
    """The recipe of a TOML file's tables; where: what the file is called in errors."""
    steps = {name: each for name, each in table.items() if _STEP.fullmatch(name)}
    own = _own_presets(table.get("preset", []), where)
    told = {name: each for name, each in table.items() if name not in steps}
    head = _head({name: each for name, each in told.items() if name != "preset"}, where)
    if not steps:
        raise BadInput(f"{where} has no step.", f"Its steps are tables: {_listed(KINDS)}.")
    last = [name for name in steps if _kind(name) in EDITS][-1:]
    found = [_step(name, each, head, own, last, where) for name, each in steps.items()]
    return Recipe(head, tuple(found), told)


def _head(told: Mapping[str, Any], where: str) -> Head:
    fields = {key_of(name, field): (name, field) for name, field in Head.model_fields.items()}
    for key in told:
        if key not in fields:
            raise BadInput(
                f"{where}: unknown key {key!r}{_guess(key, [*fields, *KINDS])}.",
                f"Above the steps stand {_listed(fields)}; steps are {_listed(KINDS)}.",
            )
    values = {fields[key][0]: _value(fields[key][1], each, f"{where}: {key}") for key, each in told.items()}
    for name in ("base", "output"):
        if not told.get(name):
            raise BadInput(f"{where}: the key {name!r} is missing.", "`trce run --init` shows every key.")
    return Head.of(values, lambda name: f"{where}: {name}")


def _step(
    name: str,
    told: Any,
    head: Head,
    own: Mapping[str, Preset],
    last: Sequence[str],
    where: str,
) -> Step:
    command, at = _kind(name), f"{where}: [{name}]"
    if not isinstance(told, dict):
        raise BadInput(f"{at} must be a table, not {told!r:.60}.")
    fields = KINDS[command].fields()
    values: dict[str, Any] = {}
    for key, value in told.items():
        if key not in fields:
            raise BadInput(
                f"{at} has an unknown key {key!r}{_guess(key, fields)}.",
                f"Its keys are the options of trce {command}: {_listed(fields)}.",
            )
        values[fields[key][0]] = _value(fields[key][2], value, f"{at} {key}")
    if "device" in fields and head.device != "auto":
        values.setdefault("device", head.device)
    for model in {model: None for _, model, _ in fields.values()}:
        part = {each: values[each] for each in model.model_fields if each in values}
        required = [each for each, field in model.model_fields.items() if field.is_required()]
        if lacking := [each for each in required if each not in part]:
            raise BadInput(f"{at} lacks the key {lacking[0]!r}.")
        model.of(part, lambda each, model=model: f"{at} {key_of(each, model.model_fields[each])}")  # type: ignore[misc]
    names = values.pop("presets", None) or head.presets
    presets = () if command in ("apply", "generate") else _presets(names, own, at)
    result = KINDS[command].result or ("erased" if [name] == list(last) else command)
    place = values.pop("output", None) or head.output / (result + name.removeprefix(command))
    if [name] == list(last) and "output" not in told:
        place = head.output / "erased"
    return Step(name, command, values, told, presets, place)


def _presets(names: Sequence[str], own: Mapping[str, Preset], where: str) -> tuple["str | Preset", ...]:
    if not names:
        raise BadInput(f"{where} names no presets.", 'Above the steps: presets = ["weapons"]')
    for name in names:
        if name not in own:
            try:
                load_preset(name)
            except BadInput as error:
                raise BadInput(f"{where}: {error.message}", error.hint) from None
    return tuple(own.get(name, name) for name in names)


def _own_presets(tables: Any, where: str) -> dict[str, Preset]:
    if not isinstance(tables, list):
        raise BadInput(f"{where}: a preset of the recipe's own is a table [[preset]].")
    found: dict[str, Preset] = {}
    for table in tables:
        preset = parse_preset(table, f"{where}: [[preset]]")
        if preset.includes or preset.name in found:
            what = "includes others" if preset.includes else "is there twice"
            raise BadInput(f"{where}: the preset {preset.name!r} {what}.", "Name each in `presets`.")
        found[preset.name] = preset
    return found


def _value(field: FieldInfo, value: Any, where: str) -> Any:
    """What TOML has as the field has it: lists as tuples, paths, and texts as the option reads them."""
    parse, annotation = flag_of(field).parse, str(field.annotation)
    if "tuple" in annotation and isinstance(value, str) and not (parse and "None" in annotation):
        value = [value]
    if parse is not None:
        try:
            if isinstance(value, str):
                return parse(value)
            if isinstance(value, list) and all(isinstance(each, str) for each in value):
                return tuple(map(parse, value))
        except BadInput as error:
            raise BadInput(f"{where}: {error.message}", error.hint) from None
        if "Gate" in annotation or "None, float" in annotation:
            raise BadInput(f"{where} must be texts in quotes, not {value!r:.60}.")
    if "Path" in annotation and isinstance(value, str):
        return Path(value)
    if isinstance(value, list):
        is_path = "Path" in annotation
        return tuple(Path(each) if is_path and isinstance(each, str) else each for each in value)
    return value


def _kind(name: str) -> str:
    match = _STEP.fullmatch(name)
    assert match is not None, "checked"
    return match[1]


def _guess(key: str, known: Sequence[str] | Mapping[str, Any]) -> str:
    close = difflib.get_close_matches(key, list(known), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def _listed(names: Sequence[str] | Mapping[str, Any]) -> str:
    return ", ".join(names)


def recipe_text(head: Mapping[str, Any], steps: Mapping[str, Mapping[str, Any]], above: str = "") -> str:
    """The TOML text of a recipe: what stands above the steps, own presets, and the steps in their order."""
    lines = [f"# {line}".rstrip() for line in above.splitlines()]
    lines += [f"{key} = {toml(value)}" for key, value in head.items() if key != "preset"]
    for name, told in steps.items():
        lines += ["", f"[{name}]", *(f"{key} = {toml(value)}" for key, value in told.items())]
    for preset in head.get("preset", []):
        lines += ["", "[[preset]]", *(f"{key} = {toml(value)}" for key, value in preset.items())]
    text = "\n".join(lines) + "\n"
    tomllib.loads(text)
    return text


def described(field: FieldInfo) -> Iterator[str]:
    """The lines of a comment on a field."""
    import textwrap

    said = re.sub(r";? else the preset's.*|\.$", "", (field.description or "").format(default=field.default))
    yield from textwrap.wrap(said, 108, initial_indent="# ", subsequent_indent="# ")
