"""Where output goes: results on stdout, all else on stderr, errors as one sentence and an exit status."""

import errno
import io
import itertools
import json
import math
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Any, ClassVar, TextIO

from trce_cli.cli.progress import Lines, Progress, Silence, bars
from trce_cli.errors import BadInput, TrceError, first_line, is_out_of_memory, what_is_wrong
from trce_cli.system.entry import heard

if TYPE_CHECKING:
    from rich.console import Console as RichConsole
    from rich.console import RenderableType

# Wide enough that no table of ours is wrapped in a pipe or a file, where lines are searched and compared.
PIPE_WIDTH = 240

_LESS_MEMORY = (
    "Use half precision (--dtype; of trce steer --mixed-precision, and --gradient-checkpointing), a smaller "
    "--batch-size where there is one, or --device cpu."
)

# What the operating system refuses for reasons that lie outside the program, in words of ours.
_SYSTEM_REFUSALS = {
    errno.ENOSPC: "No space is left on the device",
    errno.EDQUOT: "The disk quota is used up",
    errno.EACCES: "Permission is denied",
    errno.EPERM: "The operation is not permitted",
    errno.EROFS: "The file system is read-only",
    errno.EIO: "The device cannot be read or written",
    errno.ENOTDIR: "A part of the path is no folder",
    errno.ENAMETOOLONG: "A name is too long",
    errno.ELOOP: "The links of the path have no end",
    errno.EMFILE: "Too many files are open",
    errno.ENFILE: "Too many files are open",
}

# What libraries and pathlib raise for files and paths only, wherever that is: by class, or by what is said.
_OF_FILES = {"SafetensorError", "PanicException", "DecompressionBombError", "UnidentifiedImageError"}
_NO_TMP = "No usable temporary directory"  # Python's, without a path
_OF_PATHS = ("Symlink loop from", "embedded null byte")

# Characters: of a message, a table's cell, and a line of other text. What is longer is cut in the middle.
MESSAGE, CELL, LINE = 500, 1000, 4000


def _rich(file: TextIO) -> "RichConsole":
    from rich.console import Console as RichConsole

    columns = os.environ.get("COLUMNS", "")
    if columns.isascii() and columns.isdecimal() and int(columns):
        width: int | None = min(int(columns), 10_000)
    elif file.isatty():
        width = 80 if columns else None  # None: as wide as the terminal is
    else:
        width = PIPE_WIDTH
    # Without what rich would read a size from: it fails on some of what may stand there.
    sizeless = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES")}
    return RichConsole(file=file, width=width, highlight=False, emoji=False, _environ=sizeless)


def one_line(text: str, most: int = MESSAGE) -> str:
    """A text from anywhere as it may be shown: one line of printable characters, of bounded length.

    So a name or value can neither break nor colour nor flood what is printed.
    """
    escaped = (c if c.isprintable() else c.encode("unicode_escape").decode() for c in _cut(text, most))
    return _cut("".join(escaped), most)


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most * 2 // 3]} [...] {text[-most // 3 :]}"


def _lines(text: str, most: int) -> str:
    return "\n".join(one_line(line, most) for line in text.split("\n"))


def _shown(renderable: "RenderableType") -> "RenderableType":
    """What is to be shown with every string in it as it may be shown."""
    from rich.table import Table

    if isinstance(renderable, str):
        return _lines(renderable, LINE)
    if isinstance(renderable, Table):
        for name in ("title", "caption"):
            setattr(renderable, name, _cell(getattr(renderable, name)))
        for column in renderable.columns:
            column.header, column.footer = _cell(column.header), _cell(column.footer)
            column._cells[:] = map(_cell, column._cells)
    return renderable


def _cell(cell: Any) -> Any:
    return _lines(cell, CELL) if isinstance(cell, str) else cell


def _plain(value: Any) -> Any:
    """The value as strict JSON knows it: paths and other objects as text, NaN and infinity as null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, str | int):
        return value
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"{type(value).__name__} has no place in a JSON result: {value!r}")


class Console:
    """The one output sink of a command.

    `json`: one JSON value on stdout, human output on stderr. `quiet`: only warnings and errors, and what was
    asked for. `has_told`: whether this process has written its JSON value. begun: when the command began, or
    what a plan is to tell of.
    """

    has_told: ClassVar[bool] = False
    begun: ClassVar[float] = monotonic()
    _gathered: ClassVar[list[Any] | None] = None
    _held: ClassVar[list[Callable[[], None]] | None] = None

    @classmethod
    @contextmanager
    def gathered(cls) -> Iterator[list[Any]]:
        """The results of the commands that are run in the block, in a list and not on stdout."""
        results: list[Any] = []
        cls._gathered = results
        try:
            yield results
        finally:
            cls._gathered = None

    @classmethod
    @contextmanager
    def held(cls) -> Iterator[list[Callable[[], None]]]:
        """All that is told in the block, as calls that tell it when it is wanted after all."""
        calls: list[Callable[[], None]] = []
        cls._held = calls
        try:
            yield calls
        finally:
            cls._held = None

    @classmethod
    def tell(cls, call: Callable[[], None]) -> None:
        """Make a call that tells something, at once or where output is held when it is wanted."""
        if cls._held is None:
            call()
        else:
            cls._held.append(call)

    @property
    def is_held(self) -> bool:
        """Whether what is told is held, as where the steps of a recipe are checked."""
        return Console._held is not None

    def __init__(self, json: bool = False, quiet: bool = False) -> None:
        self.json = json
        self.quiet = quiet

    @property
    def has_bars(self) -> bool:
        """Whether progress is drawn, and not told in lines."""
        return not self.quiet and sys.stderr.isatty()

    def note(self, text: str) -> None:
        """A line on stderr on what is done or worth knowing; silent with `quiet`."""
        if not self.quiet:
            self.tell(lambda: _rich(sys.stderr).print(one_line(text), markup=False, soft_wrap=True))

    def warn(self, text: str) -> None:
        """A line on stderr that even `quiet` lets through."""
        from rich.text import Text

        line = Text.assemble(("Warning: ", "bold yellow"), one_line(text))
        self.tell(lambda: _rich(sys.stderr).print(line, soft_wrap=True))

    def answer(self, renderable: "RenderableType") -> None:
        """What a command is there to tell, which `quiet` does not silence either; else as `show`."""
        self.show(renderable, is_asked_for=not self.json)

    def show(self, renderable: "RenderableType", is_asked_for: bool = False) -> None:
        """The human form of the result, a literal text or a rich table: stdout, or stderr with `json`."""
        if is_asked_for or not self.quiet:
            self.tell(lambda: self._print(renderable))

    def _print(self, renderable: "RenderableType") -> None:
        soft_wrap = isinstance(renderable, str)
        _rich(sys.stderr if self.json else sys.stdout).print(
            _shown(renderable), markup=False, soft_wrap=soft_wrap
        )

    def result(self, result: Mapping[str, Any] | Sequence[Any]) -> None:
        """The machine's form of the result: one JSON value on stdout with `json`, nothing otherwise."""
        self.tell(lambda: self._result(result))

    def _result(self, result: Mapping[str, Any] | Sequence[Any]) -> None:
        if Console._gathered is not None:
            Console._gathered.append(result)
        elif self.json:
            Console.has_told = True
            sys.stdout.write(json.dumps(_plain(result), indent=2, allow_nan=False) + "\n")

    @contextmanager
    def progress(self) -> Iterator[Progress]:
        """How far it is, on stderr while the block runs: bars on a terminal, else now and then a line."""
        if not self.has_bars or Console._held is not None:
            is_silent = self.quiet or Console._held is not None
            yield Progress(Silence() if is_silent else Lines(self.note))
            return
        with bars(_rich(sys.stderr)) as shown:
            yield Progress(shown)


def print_error(message: str, hint: str | None = None) -> None:
    """Write `Error: message` and `Hint: hint`, a line each, to stderr, if it can be written."""
    from rich.text import Text

    with suppress(OSError):
        console = _rich(sys.stderr)
        console.print(Text.assemble(("Error: ", "bold red"), one_line(message)), soft_wrap=True)
        if hint:
            console.print(Text.assemble(("Hint: ", "bold"), one_line(hint)), soft_wrap=True)


def run_app(app: Callable[..., object], args: Sequence[str] | None = None) -> int:
    """Run a Typer app on `args` (default: the command line) and return the exit status.

    0 success, 1 failure, 2 wrong usage or bad input, 130 Ctrl-C, 128 + n another signal. Unknown exceptions
    pass: a bug must show. With `--json` a failure is told as JSON too, unless the result stands there:
    {"error": {"message": ..., "hint": ..., "exit_code": ...}} on stdout.
    """
    line = sys.argv[1:] if args is None else args
    as_json = "--json" in itertools.takewhile(lambda part: part != "--", line)
    Console.has_told, Console.begun = False, monotonic()
    if isinstance(sys.stdout, io.TextIOWrapper):  # a terminal may lack a letter, a file name may be no text
        sys.stdout.reconfigure(errors="backslashreplace")
    status, told = _run(app, args)
    try:
        if told and as_json and not Console.has_told and os.environ.get("RANK", "0") == "0":
            error = {"message": told.message, "hint": told.hint, "exit_code": status}
            Console(json=True).result({"error": error})
        sys.stdout.flush()
    except OSError as error:
        _give_up_stdout()
        if status == 0 and not isinstance(error, BrokenPipeError):
            print_error(f"The result cannot be written to stdout: {error.strerror}.")
        return status or 1
    return status


def _run(app: Callable[..., object], args: Sequence[str] | None) -> tuple[int, TrceError | None]:
    """The exit status, and what failed; told on stderr already."""
    try:
        try:
            ended = app(args=args, prog_name="trce", standalone_mode=False)
        finally:
            heard()
    except SystemExit as stop:  # a signal
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None), None
    except KeyboardInterrupt:
        return 130, _tell(TrceError("Interrupted."))
    except BrokenPipeError:  # the reader had enough, as in `trce presets list | head -1`
        _give_up_stdout()
        return 1, None
    except BaseException as error:
        if (usage := _usage_error(error)) is not None:
            with suppress(OSError):
                sys.stderr.write(_lines(usage[0], MESSAGE))
            return usage[1], BadInput(usage[2], "See trce COMMAND --help.")
        if (told := explain(error)) is None:
            raise
        return told.exit_code, _tell(told)
    if ended == 130:  # Typer's answer to Ctrl-C
        return 130, _tell(TrceError("Interrupted."))
    if ended == 1:  # and to completion where it knows no shell; no command of ours ends so
        hint = "It is for bash, zsh, fish and PowerShell: run this in one of them."
        return 1, _tell(TrceError("Completion is not for this shell.", hint))
    return ended if isinstance(ended, int) else 0, None


def _tell(error: TrceError) -> TrceError:
    print_error(error.message, error.hint)
    return error


def _usage_error(error: BaseException) -> tuple[str, int, str] | None:
    """What Typer says of wrong usage, its exit status, and the error alone; its class has no public name.

    Of a value that is none pydantic says why, in words that change from release to release: ours stand there.
    """
    show, status = getattr(error, "show", None), getattr(error, "exit_code", None)
    if isinstance(error, TrceError) or not callable(show) or not isinstance(status, int):
        return None
    if callable(errors := getattr(error.__cause__, "errors", None)):
        vars(error)["message"] = what_is_wrong(errors(include_url=False)[0])
    said = io.StringIO()
    show(file=said)
    told = said.getvalue()
    if not (line := re.search(r"^Error: (.*)", told, re.MULTILINE | re.DOTALL)):  # a group's help alone
        return f"{told}\nError: Missing command.\n", status, "Missing command."
    return told, status, line[1].strip()


def explain(error: BaseException) -> TrceError | None:
    """An exception as an error in a sentence; None for what can only be a bug."""
    if isinstance(error, TrceError):
        return error
    if is_out_of_memory(error):
        device = type(error).__name__ == "OutOfMemoryError"
        where = "The device's memory" if device else "The memory"
        return TrceError(f"{where} ran out.", _LESS_MEMORY)
    if isinstance(error, OSError) and (error.errno in _SYSTEM_REFUSALS or error.filename is not None):
        reason = _SYSTEM_REFUSALS.get(error.errno or 0, error.strerror)
        place = error.filename if error.filename2 is None else error.filename2
        where = "" if place is None else f": {os.fsdecode(place) if isinstance(place, bytes) else place}"
        return TrceError(f"{reason}{where}.", "Nothing was left half-written; choose another place.")
    if type(error).__name__ in _OF_FILES:
        return BadInput(f"A file cannot be read: {first_line(error).rstrip('.')}.")
    if isinstance(error, OSError) and str(error.strerror).startswith(_NO_TMP):
        return TrceError("There is no folder for temporary files.", "Set TMPDIR to one that takes files.")
    if isinstance(error, RuntimeError | ValueError) and str(error).startswith(_OF_PATHS):
        return BadInput(f"A path cannot be used: {first_line(error).rstrip('.')}.")
    return None


def _give_up_stdout() -> None:
    """What is left in its buffer goes nowhere, so that the end of the process does not fail on it."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
