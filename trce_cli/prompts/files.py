"""Users' prompt files: one prompt a line (.txt), or a table (.csv, .tsv) in the field's column spellings."""

import csv
import io
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path

from trce_cli.errors import BadInput
from trce_cli.settings import MAX_SEED
from trce_cli.system.foreign import read_bytes

# Spellings of the published sets (I2P, MMA-Diffusion, P4D, Ring-A-Bell, UnlearnDiffAtk, COCO), best first.
# `kept` is ours: a phrase for what an erased checkpoint still has to show.
COLUMNS: Mapping[str, tuple[str, ...]] = {
    "prompt": ("prompt", "adv_prompt", "sensitive prompt", "caption"),
    "seed": ("evaluation_seed", "sd_seed", "seed"),
    "guidance": ("evaluation_guidance", "sd_guidance_scale", "guidance", "guidance_scale"),
    "width": ("sd_image_width", "image_width", "width"),
    "height": ("sd_image_height", "image_height", "height"),
    "kept": ("kept",),
}
SUFFIXES = (".txt", ".csv", ".tsv")
MAX_PROMPT = 10_000  # characters; the text encoders read about 300 of them
MAX_CELL = 1 << 24  # characters; other columns may hold an embedded picture
MAX_BYTES = 1 << 28  # of a file
MAX_SIDE = 1 << 14  # pixels
BOMS = (
    (b"\xef\xbb\xbf", "utf-8-sig"),
    (b"\xff\xfe\x00\x00", "utf-32"),  # before UTF-16, whose mark it begins with
    (b"\x00\x00\xfe\xff", "utf-32"),
    (b"\xff\xfe", "utf-16"),
    (b"\xfe\xff", "utf-16"),
)


@dataclass(frozen=True)
class Prompt:
    """One prompt, how its row wants it drawn and what has to survive (None: not said), and all cells of that
    row by column name."""

    text: str
    seed: int | None = None
    guidance: float | None = None
    width: int | None = None
    height: int | None = None
    kept: str | None = None
    row: Mapping[str, str] = field(default_factory=dict)


def read_prompts(
    path: Path,
    *,
    where: Sequence[str] = (),
    limit: int | None = None,
    note: Callable[[str], None] = lambda text: None,
) -> list[Prompt]:
    """Read the prompts of a .txt, .csv or .tsv file in their order.

    `where`: `NAME=VALUE` filters on columns, which must all hold; the cell "sexual, violence" matches each of
    its members, letter case aside. `limit`: keep the first so many prompts. `note` receives remarks.
    Raises BadInput, with row and column, for whatever cannot be read as meant, and when no prompt is left.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise BadInput(f"{path} is no prompt file: the name must end in {', '.join(SUFFIXES)}.")
    if limit is not None and limit < 1:
        raise BadInput(f"A limit of {limit} prompts leaves none.", "Give at least 1.")
    text = decode(path, note)
    if path.suffix.lower() == ".txt":
        if where:
            raise BadInput(
                f"{path} has no columns to filter by {where[0]!r}.", "Filters need a .csv or .tsv file."
            )
        prompts = [
            Prompt(checked(line.strip(), f"{path}, line {number}"))
            for number, line in enumerate(text.split("\n"), start=1)
            if line.strip()
        ]
        if not prompts:
            raise BadInput(f"{path} holds no prompt.", "Write one prompt a line.")
        return prompts[:limit]
    return read_table(path, text, where, limit, note)


def decode(path: Path, note: Callable[[str], None]) -> str:
    """The text with plain newlines: by its byte order mark, else UTF-8, else Windows-1252 with a note."""
    if not os.path.lexists(path):
        raise BadInput(f"There is no prompt file {path}.")
    data = read_bytes(path, MAX_BYTES)
    encoding = next((name for mark, name in BOMS if data.startswith(mark)), None)
    try:
        text = data.decode(encoding or "utf-8")
    except UnicodeDecodeError as error:
        if encoding:
            raise BadInput(f"{path} is damaged: no {encoding.upper()} text at byte {error.start}.") from None
        text = data.decode("cp1252", errors="replace")
        note(f"{path} is not UTF-8; read as Windows-1252.")
    if "\0" in text:
        raise BadInput(f"{path} is no text file: it holds NUL characters.", "Save it as UTF-8 text.")
    return text.replace("\r\n", "\n").replace("\r", "\n")


@dataclass(frozen=True)
class Row:
    """One record of a table: where it stands, and its cells by column name."""

    place: str  # "FILE, row 3 (line 4)"
    cells: Mapping[str, str]

    def text(self, column: str | None) -> str | None:
        """The cell as a phrase; blank is None."""
        return checked(self.cells[column].strip(), self.at(column)) or None if column is not None else None

    def whole(self, column: str | None, low: int, high: int) -> int | None:
        """The cell as a whole number in [low, high], None if blank; "42.0", a data frame's way, is 42."""
        if column is None or not (cell := self.cells[column].strip()):
            return None
        try:
            number = int(cell)
        except ValueError:
            number = int(real) if (real := to_float(cell)).is_integer() else low - 1
        if not low <= number <= high:
            raise BadInput(f"{self.at(column)}: {cell[:40]!r} is no whole number from {low} to {high}.")
        return number

    def positive(self, column: str | None) -> float | None:
        """The cell as a finite number >= 0; blank is None."""
        if column is None or not (cell := self.cells[column].strip()):
            return None
        number = to_float(cell)
        if not math.isfinite(number) or number < 0:
            raise BadInput(f"{self.at(column)}: {cell[:40]!r} is no number from 0 up.")
        return number

    def at(self, column: str) -> str:
        """The cell's place, for errors."""
        return f"{self.place}, column {column!r}"


def read_table(
    path: Path, text: str, where: Sequence[str], limit: int | None, note: Callable[[str], None]
) -> list[Prompt]:
    """The prompts of a table; see `read_prompts`."""
    delimiter, header = read_header(path, text)
    use = {name: find_column(path, header, spellings) for name, spellings in COLUMNS.items()}
    if (prompt_column := use["prompt"]) is None:
        raise BadInput(
            f"{path} has no prompt column; found {', '.join(repr(name) for name in header)}.",
            f"Name one column {', '.join(COLUMNS['prompt'][:-1])} or {COLUMNS['prompt'][-1]}.",
        )
    filters = [parse_filter(path, header, filter) for filter in where]
    prompts: list[Prompt] = []
    blank: dict[str, list[str]] = {}
    rejected: dict[str, None] = {}  # values in the filtered columns, for the error when nothing matches
    for row in read_rows(path, text, delimiter, header):
        if not all(matches(row.cells[column], value) for column, value in filters):
            rejected |= dict.fromkeys(row.cells[column] for column, _ in filters)
            continue
        for column in filter(None, use.values()):
            if not row.cells[column].strip():
                blank.setdefault(column, []).append(row.place)
        if not (prompt := row.cells[prompt_column].strip()):
            continue
        prompts.append(
            Prompt(
                checked(prompt, row.at(prompt_column)),
                seed=row.whole(use["seed"], 0, MAX_SEED),
                guidance=row.positive(use["guidance"]),
                width=row.whole(use["width"], 1, MAX_SIDE),
                height=row.whole(use["height"], 1, MAX_SIDE),
                kept=row.text(use["kept"]),
                row=row.cells,
            )
        )
        if len(prompts) == limit:
            break
    for column, places in blank.items():
        then = {prompt_column: "skipped", use["kept"]: "what has to survive is not known"}.get(
            column, "drawn with the command's own setting"
        )
        more = f" (and {len(places) - 1} more)" if len(places) > 1 else ""
        note(f"{places[0]}{more}: {column!r} is blank; {then}.")
    if not prompts and rejected:
        values = ", ".join(repr(value[:40]) for value in list(rejected)[:8])
        raise BadInput(f"No row of {path} matches {' and '.join(where)}.", f"There are values {values}.")
    if not prompts:
        raise BadInput(f"{path} holds no prompt.", "Write one row a prompt below the header.")
    return prompts


def read_header(path: Path, text: str) -> tuple[str, list[str]]:
    """Delimiter and column names: a comma, unless only tab or semicolon gives the header a prompt column."""
    spellings = {normal(name) for name in COLUMNS["prompt"]}
    try:
        headers = {
            mark: next(filter(any, csv.reader(io.StringIO(text), delimiter=mark)), []) for mark in ",\t;"
        }
    except csv.Error as error:
        raise BadInput(f"{path} has no table header: {error}.") from None
    for mark, header in headers.items():
        if spellings & {normal(name) for name in header}:
            return mark, header
    if not headers[","]:
        raise BadInput(f"{path} is empty.", "Write a header with a prompt column, then one row a prompt.")
    return ",", headers[","]


def read_rows(path: Path, text: str, delimiter: str, header: Sequence[str]) -> Iterator[Row]:
    """The records below the header that are not blank."""
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    bound = csv.field_size_limit(MAX_CELL)  # process-wide, hence put back
    try:
        _, *records = [(reader.line_num, cells) for cells in reader if any(cell.strip() for cell in cells)]
    except csv.Error as error:
        raise BadInput(
            f"{path} is no well-formed table at line {reader.line_num}: {error}.",
            "A cell with quotes, delimiters or newlines needs double quotes around it, and its own doubled.",
        ) from None
    finally:
        csv.field_size_limit(bound)
    for number, (line, cells) in enumerate(records, start=1):
        place = f"{path}, row {number} (line {line})"
        if any(cells[len(header) :]):
            raise BadInput(
                f"{place} has {len(cells)} cells under {len(header)} columns.",
                "Put a cell with the delimiter in it in double quotes.",
            )
        yield Row(place, dict(zip_longest(header, cells[: len(header)], fillvalue="")))


def normal(name: str) -> str:
    """A column name without letter case, spaces, underscores and hyphens."""
    return "".join(letter for letter in name.casefold() if letter not in " _-\t\ufeff")


def find_column(path: Path, header: Sequence[str], spellings: Sequence[str]) -> str | None:
    """The column with the first spelling that the header has, or None; BadInput when two columns have it."""
    for spelling in spellings:
        found = [name for name in header if normal(name) == normal(spelling)]
        if len(found) > 1:
            raise BadInput(
                f"{path} has {len(found)} columns named {spelling!r}.", "Rename all but one of them."
            )
        if found:
            return found[0]
    return None


def parse_filter(path: Path, header: Sequence[str], text: str) -> tuple[str, str]:
    """`NAME=VALUE` -> (column, value)."""
    name, equals, value = text.partition("=")
    if not equals or not name.strip():
        raise BadInput(f"The filter {text!r} is not of the form NAME=VALUE.", "Example: categories=sexual")
    if (column := find_column(path, header, [name])) is None:
        raise BadInput(
            f"{path} has no column {name.strip()!r} to filter by.", f"Its columns: {', '.join(header)}."
        )
    return column, value.strip().casefold()


def matches(cell: str, value: str) -> bool:
    """Whether the cell, or one member of its comma-separated list, is the value (case-folded)."""
    return value in {cell.strip().casefold(), *(member.strip().casefold() for member in cell.split(","))}


def checked(prompt: str, place: str) -> str:
    """The prompt, unless it is absurdly long."""
    if len(prompt) > MAX_PROMPT:
        raise BadInput(
            f"{place}: {len(prompt):,} characters; a prompt has at most {MAX_PROMPT:,}.",
            "Shorten it, or look for a missing closing quote.",
        )
    return prompt


def to_float(cell: str) -> float:
    """The cell as a number, NaN where it is none."""
    try:
        return float(cell)
    except ValueError:
        return math.nan
