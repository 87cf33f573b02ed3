"""Concept lists: TOML files, a preset each, validated with errors that name file, key and what is allowed."""

import difflib
import hashlib
import json
import os
import re
import reprlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    PrivateAttr,
    ValidationError,
    field_validator,
    model_validator,
)

from trce_cli.errors import BadInput
from trce_cli.prompts.templates import TEMPLATES
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


def _check_tokens_matter(weights: tuple[float, ...]) -> tuple[float, ...]:
    if not any(weights):
        raise ValueError("must not all be zero")
    return weights


Phrase = Annotated[str, AfterValidator(_check_phrase)]
Template = Annotated[Phrase, AfterValidator(_check_template)]
Kind = Literal["object", "person", "scene", "style"]

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False, strict=True)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False, strict=True)]
Count = Annotated[int, Field(ge=1)]
# Lists of TOML become tuples; what is in them stays strict.
TokenWeights = Annotated[
    tuple[NotNegative, NotNegative, NotNegative, NotNegative],
    Field(strict=False),
    AfterValidator(_check_tokens_matter),
]


class _Table(BaseModel):
    """A table of the schema: types as written, no key that is not named here."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


class Concept(_Table):
    """An unsafe phrase and the phrase that fits in its place."""

    unsafe: Phrase
    safe: Phrase

    @model_validator(mode="after")
    def _check_they_differ(self) -> Self:
        if self.unsafe.casefold() == self.safe.casefold():
            raise ValueError(f"unsafe and safe must differ, but both are {self.unsafe!r}")
        return self


class MapSettings(_Table):
    """The recommended settings of `trce map`; None leaves the command's default."""

    preserve: NotNegative | None = None
    token_weights: TokenWeights | None = None
    strength: Positive | None = None


class SteerSettings(_Table):
    """The recommended settings of `trce steer`; None leaves the command's default."""

    steps: Count | None = None
    early_steps: Count | None = None
    trajectories_per_concept: Count | None = None
    unconditional: Annotated[int, Field(ge=0)] | None = None
    guidance_scale: NotNegative | None = None
    steering_guidance: NotNegative | None = None
    margin: NotNegative | None = None
    regularisation: NotNegative | None = None
    lr: Positive | None = None
    epochs: Count | None = None
    max_steps: Count | None = None
    batch_size: Count | None = None

    @model_validator(mode="after")
    def _check_early_steps_are_steps(self) -> Self:
        if self.steps is not None and self.early_steps is not None and self.early_steps > self.steps:
            raise ValueError(f"early_steps is {self.early_steps}, more than the {self.steps} steps there are")
        return self


class Preset(_Table):
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
    map: MapSettings = MapSettings()
    steer: SteerSettings = SteerSettings()
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
        """The hash of all that it says, includes resolved; comments and layout of the file do not matter."""
        parts = [preset.model_dump(mode="json") for preset in self.walk()]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def presets_folder() -> Path:
    """Where the shipped presets lie: inside the package in a wheel, at the top level in a checkout."""
    package = Path(__file__).parents[1]
    return next(folder for folder in (package / "_presets", package.parent / "presets") if folder.is_dir())


def preset_names() -> list[str]:
    """The names of the shipped presets, sorted."""
    return sorted(path.stem for path in presets_folder().glob("*.toml"))


def load_preset(name_or_path: str | Path) -> Preset:
    """Read a shipped preset by name, or any TOML file by path, with its includes.

    A relative path in `includes` is relative to the file that it stands in.
    Raises BadInput, which names the file, the key and what is allowed.
    """
    return _load(_find(name_or_path, Path()), (), {})


def load_presets(names_or_paths: Iterable[str | Path]) -> list[Preset]:
    """Read several presets; one that is given twice counts once."""
    return [load_preset(name) for name in dict.fromkeys(names_or_paths)]


def joint_map_settings(presets: Iterable[Preset]) -> MapSettings:
    """What the presets recommend for `trce map`; where several name a setting, the first one's holds."""
    return MapSettings(**_first_of_each(preset.map for top in presets for preset in top.walk()))


def joint_steer_settings(presets: Iterable[Preset]) -> SteerSettings:
    """What the presets recommend for `trce steer`; where several name a setting, the first one's holds."""
    return SteerSettings(**_first_of_each(preset.steer for top in presets for preset in top.walk()))


def _first_of_each(tables: Iterable[BaseModel]) -> dict[str, Any]:
    settings: dict[str, Any] = {}
    for table in tables:
        settings = table.model_dump(exclude_none=True) | settings
    return settings


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
    table = parse_toml(read_text(path, MAX_BYTES, "utf-8-sig"), str(path))
    try:
        preset = Preset.model_validate(table)
    except ValidationError as error:
        raise BadInput(f"{path}: {_explain(error)}.", "`trce presets new FILE` shows every key.") from None
    return preset if preset.templates else _with_default_templates(preset)


def _with_default_templates(preset: Preset) -> Preset:
    return preset.model_copy(update={"templates": TEMPLATES[preset.kind]})


# The table that a key stands in, to say which keys are allowed there.
_TABLES: Final[Mapping[str, type[_Table]]] = {
    "": Preset,
    "concepts": Concept,
    "map": MapSettings,
    "steer": SteerSettings,
}

# pydantic's error types -> what is wanted; its own texts change from release to release.
_WANTED: Final[Mapping[str, str]] = {
    "string_type": "must be a text in quotes",
    "bool_type": "must be true or false",
    "int_type": "must be a whole number",
    "float_type": "must be a number",
    "finite_number": "must be a finite number",
    "tuple_type": "must be a list in [ ]",
    "model_type": "must be a table",
    "greater_than": "must be greater than {gt:g}",
    "greater_than_equal": "must be at least {ge:g}",
    "too_long": "must have {max_length} entries",
}


def _explain(error: ValidationError) -> str:
    """The first error as `key: what is wrong, what is allowed`; misspelt keys come first."""
    errors = error.errors(include_url=False)
    first = min(errors, key=lambda one: one["type"] != "extra_forbidden")
    *outer, last = first["loc"] or ("",)
    key = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in first["loc"]).lstrip(".")
    match first["type"]:
        case "extra_forbidden":
            table = _TABLES[str(outer[0]) if outer else ""]
            close = difflib.get_close_matches(str(last), table.model_fields, n=1)
            guess = f" (did you mean {close[0]!r}?)" if close else ""
            return f"unknown key {key!r}{guess}; allowed are {', '.join(table.model_fields)}"
        case "missing" if isinstance(last, int):
            return f"{key.removesuffix(f'[{last}]')}: must have 4 entries: SOT, FIRST_EOT, LAST_EOT, KEYWORD"
        case "missing":
            return f"the key {key!r} is missing"
        case "value_error":
            said = str(first["ctx"]["error"])
            return f"{key}: {said}" if key else said
        case "literal_error":
            return f"{key}: must be one of {', '.join(get_args(Kind))}, not {reprlib.repr(first['input'])}"
        case kind:
            wanted = _WANTED.get(kind, first["msg"]).format(**first.get("ctx", {}))
            return f"{key}: {wanted}, not {reprlib.repr(first['input'])}"
