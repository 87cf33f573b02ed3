"""The errors a user can do something about; everything else is a bug and keeps its traceback."""

import reprlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final


class TrceError(Exception):
    """A failure told in one sentence (`message`), with what to do next (`hint`); the command exits with 1."""

    exit_code = 1

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class BadInput(TrceError):  # noqa: N818 - it names what was given, not what broke
    """Wrong usage, a bad file or a bad value; the command exits with 2."""

    exit_code = 2


class Stopped(TrceError):  # noqa: N818 - it is no error
    """Ctrl-C, or another signal, in work that goes on where it was; exit_code: 128 + the signal's number."""

    def __init__(self, exit_code: int = 130) -> None:
        super().__init__("Interrupted.", "Run the same line to go on where it was.")
        self.exit_code = exit_code


class Closed(TrceError):  # noqa: N818 - it is no error
    """Ctrl-C, which is how a page is closed."""

    exit_code = 130

    def __init__(self) -> None:
        super().__init__("The page is closed.", "Run the same line to open it again.")


def first_line(error: BaseException) -> str:
    """The first line of what another library's error says, or its name where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


@contextmanager
def refusing(what: str, hint: str | None = None) -> Iterator[None]:
    """Around a library's call on what a stranger wrote: whatever it raises becomes BadInput("what: why.").

    That is every exception, Rust's panics among them, which are no `Exception`; memory that runs out, and
    whatever ends the process, pass.
    """
    try:
        yield
    except (TrceError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:
        if is_out_of_memory(error):
            raise
        raise BadInput(f"{what}: {first_line(error)[:200].rstrip('.')}.", hint) from error


@contextmanager
def refusing_library(what: str, hint: str | None = None) -> Iterator[None]:
    """As `refusing`, around code of ours that calls a library: what our code itself raises passes, a bug."""
    try:
        yield
    except BaseException as error:
        frame = error.__traceback__
        while frame is not None and frame.tb_next is not None:
            frame = frame.tb_next
        if frame is None or Path(frame.tb_frame.f_code.co_filename).is_relative_to(Path(__file__).parent):
            raise
        with refusing(what, hint):
            raise


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the memory of machine or device ran out; torch is not imported just to name its classes."""
    if isinstance(error, MemoryError):
        return True
    said = ("can't allocate memory", "not enough memory", "CUBLAS_STATUS_ALLOC_FAILED")
    return isinstance(error, RuntimeError) and (
        type(error).__name__ == "OutOfMemoryError" or any(each in str(error) for each in said)
    )


# pydantic's error types -> what is wanted; its own texts change from release to release.
_WANTED: Final[Mapping[str, str]] = {
    "string_type": "must be a text in quotes",
    "string_too_long": "must have at most {max_length} characters",
    "string_too_short": "must have at least {min_length} characters",
    "string_pattern_mismatch": "must be of the form {pattern}",
    "bool_type": "must be true or false",
    "bool_parsing": "must be true or false",
    "int_type": "must be a whole number",
    "int_parsing": "must be a whole number",
    "int_parsing_size": "must be a whole number of fewer digits",
    "int_from_float": "must be a whole number",
    "float_type": "must be a number",
    "float_parsing": "must be a number",
    "finite_number": "must be a finite number",
    "none_required": "must be null",
    "tuple_type": "must be a list in [ ]",
    "list_type": "must be a list in [ ]",
    "dict_type": "must be a table",
    "mapping_type": "must be a table",
    "model_type": "must be a table",
    "model_attributes_type": "must be a table",
    "dataclass_type": "must be a table",
    "greater_than": "must be greater than {gt}",
    "greater_than_equal": "must be at least {ge}",
    "less_than": "must be less than {lt}",
    "less_than_equal": "must be at most {le}",
    "literal_error": "must be one of {expected}",
    "too_long": "must have at most {max_length} entries",
    "too_short": "must have at least {min_length} entries",
}
_ALONE: Final[Mapping[str, str]] = {"missing": "is missing", "extra_forbidden": "is not known here"}


def what_is_wrong(error: Mapping[str, Any]) -> str:
    """One of pydantic's errors as what stands behind the name: `must be at least 1, not 0`."""
    kind, context = error["type"], error.get("ctx", {})
    if kind in ("value_error", "assertion_error"):  # a validator's own words
        return str(context["error"])
    if kind in _ALONE:
        return _ALONE[kind]
    if kind == "literal_error":
        context = {"expected": context["expected"].replace("'", "").replace(" or ", ", ")}
    wanted = _WANTED.get(kind, "is not what belongs there").format(**context)
    return f"{wanted}, not {reprlib.repr(error['input'])}" if kind in _WANTED else wanted
