"""The one way to read what strangers wrote: each file opened once, asked what it is, and bounded.

A file has to be a regular one, so that no pipe is waited for and no device is read without end; a small file
is read up to a limit; JSON, YAML and TOML are bounded in depth, numbers and aliases, and hold no text that
cannot be written again. What is wrong is told as BadInput in one sentence.
"""

import json
import os
import re
import stat
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, Final, NamedTuple, TypeVar

from trce_cli.errors import BadInput, TrceError, what_is_wrong

SMALL: Final = 16 << 20  # bytes of a file that is read whole, unless its kind has a limit of its own
DEPTH: Final = 64  # of tables and lists in each other
_DEEP: Final = f"it is nested too deeply, more than {DEPTH} times"
LARGEST: Final = 1e300  # a number beyond is no size, seed or weight of anything

_TYPE: Final = re.compile(r"(constrained-)?(int|float|str|bool|list|dict|tuple|none)(\[.*\])?")

M = TypeVar("M")


class Identity(NamedTuple):
    """What tells whether a path still leads to the same file with the same content."""

    device: int
    inode: int
    size: int
    mtime_ns: int

    @classmethod
    def of(cls, file: Path | int) -> "Identity":
        """Of a path, or of a file that is open."""
        found = os.stat(file)
        return cls(found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)


def check_unchanged(identities: Mapping[Path, Identity]) -> None:
    """Raise TrceError where a file is no longer what it was when it was opened."""
    for path, identity in identities.items():
        try:
            same = Identity.of(path) == identity
        except OSError:
            same = False
        if not same:
            raise TrceError(
                f"{path} was changed, replaced or removed while it was in use.",
                "Nothing was made of it; run the command again when it stays as it is.",
            )


def identities(paths: Iterable[Path]) -> dict[Path, Identity]:
    """The identity of each file."""
    return {path: Identity.of(path) for path in paths}


def open_regular(path: Path) -> int:
    """Open a regular file to read it; BadInput for whatever else lies there."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (OSError, ValueError) as error:  # ValueError: of a name with a zero byte
        raise BadInput(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}.") from error
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise BadInput(f"{path} is not a file.")
    return handle


def open_file(path: Path) -> BinaryIO:
    """Open a regular file, of any size, as a stream."""
    return os.fdopen(open_regular(path), "rb")


def check_small(path: Path, most: int = SMALL) -> None:
    """Raise BadInput unless a library may read this file: regular, and of at most so many bytes."""
    with open_file(path) as file:
        if (size := os.fstat(file.fileno()).st_size) > most:
            raise BadInput(f"{path} has {size:,} bytes; a file of its kind has at most {most:,}.")


def read_bytes(path: Path, most: int = SMALL) -> bytes:
    """The content of a regular file of at most so many bytes."""
    handle = open_regular(path)
    with os.fdopen(handle, "rb") as file:
        size = os.fstat(handle).st_size
        try:
            content = file.read(most + 1) if size <= most else b""
        except OSError as error:
            raise BadInput(f"{path} cannot be read: {error.strerror}.") from error
    if size > most or len(content) > most:
        raise BadInput(f"{path} has {max(size, most + 1):,} bytes; a file of its kind has at most {most:,}.")
    return content


def read_text(path: Path, most: int = SMALL, encoding: str = "utf-8", errors: str = "strict") -> str:
    """The text of a small file; encoding and errors as `str` has them."""
    try:
        return read_bytes(path, most).decode(encoding, errors)
    except UnicodeDecodeError as error:
        raise BadInput(f"{path} is not UTF-8 text (byte {error.start}).", "Save it as UTF-8.") from None


def read_json(path: Path, most: int = SMALL, strict: bool = False) -> dict[str, Any]:
    """A JSON object from a file; strict: see `parse_json`."""
    table = parse_json(read_text(path, most), str(path), strict)
    if not isinstance(table, dict):
        raise BadInput(f"{path} is not a JSON object.")
    return table


def parse_json(text: str, where: str, strict: bool = False) -> Any:
    """The value of a JSON text.

    strict: refuse NaN and infinity, which JSON does not have. Other tools' configurations hold them; what we
    write never does, and what is taken over from it could not be written again.
    """
    try:
        return _bounded(json.loads(text, parse_constant=_no_number if strict else None))
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{where} cannot be read as JSON: {_reason(error)}.") from None


def parse_toml(text: str, where: str) -> dict[str, Any]:
    """The tables of a TOML text."""
    try:
        table: dict[str, Any] = _bounded(tomllib.loads(text))
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{where} is not valid TOML: {_reason(error)}.") from None
    return table


def parse_yaml(text: str, where: str) -> Any:
    """The value of a YAML text, which may hold no alias: with a few of them it would fill any memory."""
    import yaml  # type: ignore[import-untyped]

    class Loader(yaml.SafeLoader):
        def compose_node(self, parent: Any, index: Any) -> Any:
            if self.check_event(yaml.AliasEvent):
                raise ValueError("it has aliases")
            return super().compose_node(parent, index)

    try:
        return _bounded(yaml.load(text, Loader))
    except (yaml.YAMLError, ValueError, RecursionError, TypeError, AttributeError, OverflowError) as error:
        raise BadInput(f"{where} cannot be read as YAML: {_reason(error)}.") from None


def validated(model: type[M], value: Any, where: str, hint: str | None = None) -> M:
    """The value as pydantic's `model`, or any type that it knows; BadInput names the first wrong key."""
    from pydantic import TypeAdapter, ValidationError

    try:
        return TypeAdapter(model).validate_python(value)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        # Where a value may be of several types pydantic names the one that it tried last as if it were a key.
        parts = [part for part in map(str, first["loc"]) if not _TYPE.fullmatch(part)]
        key = ".".join(parts)[:100]
        raise BadInput(f"{where} cannot be read: {key or 'it'} {what_is_wrong(first)}.", hint) from None


def _no_number(name: str) -> None:
    raise ValueError(f"it holds {name}")


def _bounded(value: Any) -> Any:
    """The value, if it is no deeper than `DEPTH` and holds no absurd number and no half of a character."""
    level, depth = [value], 0
    while level:
        if (depth := depth + 1) > DEPTH:
            raise ValueError(_DEEP)
        inner: list[Any] = []
        for one in level:
            if isinstance(one, dict):
                inner += one.keys()
                inner += one.values()
            elif isinstance(one, list):
                inner += one
            elif isinstance(one, str):
                one.encode()
            elif isinstance(one, int | float) and LARGEST < abs(one) != float("inf"):
                raise ValueError("a number is too large")
        level = inner
    return value


def _reason(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return _DEEP
    if isinstance(error, UnicodeEncodeError):
        return "a text holds half of a character (a lone surrogate)"
    return " ".join(str(error).split())[:120].rstrip(".")
