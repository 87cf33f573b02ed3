"""Concept lists: TOML files, a preset each, validated with errors that name file, key and what is allowed."""

import difflib
import hashlib
import json
import os
import re
from collections import ChainMap
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self

from pydantic import AfterValidator, Field, PrivateAttr, ValidationError, field_validator, model_validator

from trce_cli.emoji.home import EMOJI, EMOJI_DIT
from trce_cli.errors import BadInput, what_is_wrong
from trce_cli.prompts.settings import MapTable, SteerTable
from trce_cli.prompts.templates import TEMPLATES
from trce_cli.settings import Settings
from trce_cli.system.foreign import parse_toml, read_text
from trce_cli.system.paths import real_path

MAX_BYTES: Final = 1 << 20  # a file that is larger was not meant as a concept list
MAX_DEPTH: Final = 32  # of includes in each other
MAX_ENTRIES: Final = 5000  # of a list


def _check_phrase(text: str) -> str:
    if not text.strip():
        raise ValueError("must not be empty")
    if text != text.strip() or not text.isprintable():
        raise ValueError("must be one line, without spaces around it or control characters")
    return text


def _check_template(text: str) -> str:
    if (text.count("{}"), text.count("{"), text.count("}")) != (1, 1, 1):
        raise ValueError("must hold exactly one {}, where the phrase goes")
    return text


Phrase = Annotated[str, AfterValidator(_check_phrase)]
Template = Annotated[Phrase, AfterValidator(_check_template)]
Kind = Literal["object", "person", "scene", "style"]


class Concept(Settings):
    """An unsafe phrase and the phrase that fits in its place."""

    unsafe: Phrase
    safe: Phrase

    @model_validator(mode="after")
    def _check_they_differ(self) -> Self:
        if self.unsafe.casefold() == self.safe.casefold():
            raise ValueError(f"unsafe and safe must differ, but both are {self.unsafe!r}")
        return self


class Preset(Settings):
    """A concept family. `templates` are its kind's where the file gives none.

    `implied` are prompts that mean the concepts without naming one: no edit sees them, `trce evaluate` asks
    them. `sensitive` pictures are blurred in reports.
    """

    name: Phrase
    description: Phrase
    kind: Kind
    templates: Annotated[tuple[Template, ...], Field(strict=False)] = ()
    includes: Annotated[tuple[Phrase, ...], Field(strict=False)] = ()
    concepts: Annotated[tuple[Concept, ...], Field(strict=False)] = ()
    implied: Annotated[tuple[Phrase, ...], Field(strict=False)] = ()
    sensitive: bool = True
    map: MapTable = MapTable()
    steer: SteerTable = SteerTable()
    _included: tuple["Preset", ...] = PrivateAttr(default=())

    @field_validator("templates", "includes", "concepts", "implied")
    @classmethod
    def _check_not_empty(cls, items: tuple[object, ...]) -> tuple[object, ...]:
        if not items:
            raise ValueError("must not be empty; leave the key out instead")
        if len(items) > MAX_ENTRIES:
            raise ValueError(f"must have at most {MAX_ENTRIES:,} entries, not {len(items):,}")
        return items

    @model_validator(mode="after")
    def _check_something_is_erased(self) -> Self:
        if not self.concepts and not self.includes:
            raise ValueError("a preset needs [[concepts]], or includes = [...] that bring some")
        return self

    @model_validator(mode="after")
    def _check_something_is_applied(self) -> Self:
        if self.map.strength == 0:
            raise ValueError("map.strength: must be greater than 0")
        return self

    @model_validator(mode="after")
    def _check_implied_names_nothing(self) -> Self:
        every = "\n".join(self.implied).casefold()
        phrases = [re.sub(r"^(an?|the) ", "", c.unsafe, flags=re.IGNORECASE) for c in self.concepts]
        phrases = [phrase for phrase in phrases if phrase.casefold() in every]  # hardly any
        for prompt in self.implied:
            for phrase in phrases:
                if re.search(rf"(?<!\w){re.escape(phrase)}(?!\w)", prompt, re.IGNORECASE):
                    raise ValueError(f"implied must not name what it means, but {prompt!r} says {phrase!r}")
        return self

    def walk(self) -> Iterator["Preset"]:
        """This preset and then, depth first, those it includes, each once."""
        found: dict[int, Preset] = {}
        self._collect(found)
        yield from found.values()

    def _collect(self, found: dict[int, "Preset"]) -> None:
        if id(self) not in found:
            found[id(self)] = self
            for preset in self._included:
                preset._collect(found)

    def sha256(self) -> str:
        """The hash of all that it says, includes resolved; comments and layout of the file do not matter.

        A setting that it does not recommend counts as null, whatever its default is today.
        """
        parts = []
        for preset in self.walk():
            told = preset.model_dump(mode="json")
            for table in ("map", "steer"):
                said = getattr(preset, table).model_fields_set
                told[table] = {key: value if key in said else None for key, value in told[table].items()}
            parts.append(told)
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def presets_folder() -> Path:
    """Where the shipped presets lie: inside the package in a wheel, at the top level in a checkout."""
    package = Path(__file__).parents[1]
    return next(folder for folder in (package / "_presets", package.parent / "presets") if folder.is_dir())


def preset_names() -> list[str]:
    """The names of the shipped presets, sorted."""
    return sorted(path.stem for path in presets_folder().glob("*.toml"))


def load_preset(name_or_path: str | Path | Preset) -> Preset:
    """Read a shipped preset by name, or any TOML file by path, with its includes; one that is read already is
    taken as it is.

    A relative path in `includes` is relative to the file that it stands in.
    Raises BadInput, which names the file, the key and what is allowed.
    """
    if isinstance(name_or_path, Preset):
        return name_or_path
    return _load(_find(name_or_path, Path()), (), {})


def load_presets(names_or_paths: Iterable[str | Path | Preset]) -> list[Preset]:
    """Read several presets; one that is given twice counts once."""
    found: list[str | Path | Preset] = []
    for name in names_or_paths:  # what is read already cannot be hashed
        if name not in found:
            found.append(name)
    return [load_preset(name) for name in found]


def every_part(presets: Iterable[Preset]) -> list[Preset]:
    """The presets, each with those that it includes behind it."""
    return [part for preset in presets for part in preset.walk()]


def recommended(parts: Iterable[Preset], table: Literal["map", "steer"]) -> dict[str, Any]:
    """What these presets recommend for `trce map` or `trce steer`; of several, the first one's holds.

    Those that they include do not count by themselves: see `every_part`.
    """
    merged = ChainMap(*(getattr(part, table).given() for part in parts))
    return {name: merged[name] for name in TABLES[table].model_fields if name in merged}


def _find(name_or_path: str | Path, folder: Path) -> Path:
    """The file of a name or path: shipped names first, so that a stray folder of that name hides none."""
    name = os.fspath(name_or_path)
    shipped = preset_names()
    if name in shipped and not isinstance(name_or_path, Path):
        return presets_folder() / f"{name}.toml"
    path = folder / name
    if name and os.path.exists(path):  # False, too, for a name that no file can have
        return path
    if name.endswith(".toml") or os.sep in name or isinstance(name_or_path, Path):
        raise BadInput(f"There is no preset file {str(path)!r}.", "Start one with `trce presets new FILE`.")
    close = difflib.get_close_matches(name, shipped, n=1)
    guess = f"Did you mean {close[0]!r}? " if close else ""
    if name in (EMOJI.name, EMOJI_DIT.name):
        guess = f"{name} is a checkpoint, which stands first, without --preset. "
    raise BadInput(
        f"There is no preset {name!r}.",
        f"{guess}Shipped: {', '.join(shipped)}; or give a path to a TOML file.",
    )


def _load(path: Path, including: tuple[Path, ...], loaded: dict[Path, Preset]) -> Preset:
    """The preset in a file with its includes; a file that is included several times is read once."""
    real = real_path(path)
    if real in loaded:
        return loaded[real]
    if real in including:
        circle = " -> ".join(file.name for file in (*including[including.index(real) :], path))
        raise BadInput(f"{path}: includes go in a circle: {circle}.", "Take one of them out.")
    if len(including) == MAX_DEPTH:
        raise BadInput(f"{path}: includes are more than {MAX_DEPTH} deep.", "Include the presets directly.")
    preset = _parse(path)
    preset._included = tuple(
        _load(_find_include(name, path), (*including, real), loaded) for name in preset.includes
    )
    loaded[real] = preset
    return preset


def _find_include(name: str, path: Path) -> Path:
    try:
        return _find(name, path.parent)
    except BadInput as error:
        raise BadInput(f"{path}: includes: {error.message}", error.hint) from None


def _parse(path: Path) -> Preset:
    if path.exists() and not path.is_file():
        what = "a folder" if path.is_dir() else "no regular file"
        raise BadInput(f"{path} is {what}, where a preset is a TOML file.")
    return parse_preset(parse_toml(read_text(path, MAX_BYTES, "utf-8-sig"), str(path)), str(path))


def parse_preset(table: Any, where: str) -> Preset:
    """The preset of a TOML file's tables, without its includes; BadInput names the key that is wrong."""
    try:
        preset = Preset.model_validate(table)
    except ValidationError as error:
        raise BadInput(f"{where}: {_explain(error)}.", "`trce presets new FILE` shows every key.") from None
    return preset if preset.templates else with_default_templates(preset)


def with_default_templates(preset: Preset) -> Preset:
    """The preset with its kind's templates in place of its own."""
    return preset.model_copy(update={"templates": TEMPLATES[preset.kind]})


# The table that a key stands in, to say which keys are allowed there.
TABLES: Final[Mapping[str, type[Settings]]] = {
    "": Preset,
    "concepts": Concept,
    "map": MapTable,
    "steer": SteerTable,
}


def _explain(error: ValidationError) -> str:
    """The first error as `key: what is wrong, what is allowed`; misspelt keys come first."""
    errors = error.errors(include_url=False)
    first = min(errors, key=lambda one: one["type"] != "extra_forbidden")
    *outer, last = first["loc"] or ("",)
    key = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in first["loc"]).lstrip(".")
    match first["type"]:
        case "extra_forbidden":
            table = TABLES[str(outer[0]) if outer else ""]
            close = difflib.get_close_matches(str(last), table.model_fields, n=1)
            guess = f" (did you mean {close[0]!r}?)" if close else ""
            return f"unknown key {key!r}{guess}; allowed are {', '.join(table.model_fields)}"
        case "missing":
            return f"the key {key!r} is missing"
        case _:
            said = what_is_wrong(first)
            return f"{key}: {said}" if key else said
