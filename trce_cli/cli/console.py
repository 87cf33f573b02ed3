"""Where output goes: results on stdout, all else on stderr, errors as one sentence and an exit status."""

import errno
import io
import json
import math
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from trce_cli.errors import TrceError

if TYPE_CHECKING:
    from rich.console import Console as RichConsole
    from rich.console import RenderableType
    from rich.progress import Progress as RichProgress
    from rich.progress import TaskID

# Wide enough that no table of ours is wrapped in a pipe or a file, where lines are searched and compared.
PIPE_WIDTH = 240

_LESS_MEMORY = (
    "Use a smaller --batch-size or half precision (--dtype; of trce steer --mixed-precision, and "
    "--gradient-checkpointing), or --device cpu."
)

# What the operating system refuses for reasons that lie outside the program.
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
}


def _rich(file: TextIO) -> "RichConsole":
    from rich.console import Console as RichConsole

    width = None if file.isatty() or "COLUMNS" in os.environ else PIPE_WIDTH
    return RichConsole(file=file, width=width, highlight=False)


def _one_line(text: str) -> str:
    """Escape control characters, so that a name or value from outside can neither break nor colour a line."""
    return re.sub(r"[\x00-\x1f\x7f-\x9f]", lambda match: repr(match[0])[1:-1], text)


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


class Stage:
    """One line of progress; call it with the number of items just done, and a word on how it goes if any."""

    def __init__(self, progress: "RichProgress", task: "TaskID", unit: str) -> None:
        self._progress = progress
        self._task = task
        self._unit = unit

    def __call__(self, advance: float = 1, detail: str = "") -> None:
        self._progress.advance(self._task, advance)
        speed = self._progress.tasks[self._progress.task_ids.index(self._task)].speed
        rate = f"{speed:.1f} {self._unit}/s" if speed and self._unit else ""
        self._progress.update(self._task, detail="  ".join(part for part in (rate, detail) if part))


class Progress:
    """The stages of one command, each a bar with its elapsed and remaining time."""

    def __init__(self, progress: "RichProgress") -> None:
        self._progress = progress

    def stage(self, text: str, total: int | None = None, unit: str = "") -> Stage:
        """Begin a stage of `total` items (None: unknown); where `unit` is given, items a second are shown."""
        for task in self._progress.tasks:  # a stage ends where the next begins
            if not task.finished:
                self._progress.update(task.id, total=task.completed or 1, completed=task.completed or 1)
        return Stage(self._progress, self._progress.add_task(text, total=total, detail=""), unit)


class Console:
    """The one output sink of a command.

    `json`: one JSON value on stdout, human output on stderr. `quiet`: only warnings and errors.
    """

    def __init__(self, json: bool = False, quiet: bool = False) -> None:
        self.json = json
        self.quiet = quiet

    def note(self, text: str) -> None:
        """A line on stderr on what is done or worth knowing; silent with `quiet`."""
        if not self.quiet:
            _rich(sys.stderr).print(text, markup=False, soft_wrap=True)

    def warn(self, text: str) -> None:
        """A line on stderr that even `quiet` lets through."""
        from rich.text import Text

        line = Text.assemble(("Warning: ", "bold yellow"), _one_line(text))
        _rich(sys.stderr).print(line, soft_wrap=True)

    def show(self, renderable: "RenderableType") -> None:
        """The human form of the result, a literal text or a rich table: stdout, or stderr with `json`."""
        if not self.quiet:
            soft_wrap = isinstance(renderable, str)
            _rich(sys.stderr if self.json else sys.stdout).print(
                renderable, markup=False, soft_wrap=soft_wrap
            )

    def result(self, result: Mapping[str, Any] | Sequence[Any]) -> None:
        """The machine's form of the result: one JSON value on stdout with `json`, nothing otherwise."""
        if self.json:
            sys.stdout.write(json.dumps(_plain(result), indent=2, allow_nan=False) + "\n")

    @contextmanager
    def progress(self) -> Iterator[Progress]:
        """Bars on stderr while the block runs; silent when stderr is no terminal, or `quiet`."""
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )
        from rich.progress import Progress as RichProgress

        with RichProgress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[detail]}", markup=False),
            console=_rich(sys.stderr),
            disable=self.quiet or not sys.stderr.isatty(),
        ) as progress:
            yield Progress(progress)


def print_error(message: str, hint: str | None = None) -> None:
    """Write `Error: message` and `Hint: hint`, a line each, to stderr."""
    from rich.text import Text

    console = _rich(sys.stderr)
    console.print(Text.assemble(("Error: ", "bold red"), _one_line(message)), soft_wrap=True)
    if hint:
        console.print(Text.assemble(("Hint: ", "bold"), _one_line(hint)), soft_wrap=True)


def run_app(app: Callable[..., object], args: Sequence[str] | None = None) -> int:
    """Run a Typer app on `args` (default: the command line) and return the exit status.

    0 success, 1 failure, 2 wrong usage or bad input, 130 Ctrl-C. Unknown exceptions pass: a bug must show.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):  # a terminal may lack a letter, a file name may be no text
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        try:
            app(args=args, prog_name="trce")
        finally:
            sys.stdout.flush()
    except SystemExit as stop:  # how Typer ends, having printed its own usage errors
        if stop.code == 130:
            print_error("Interrupted.")
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except KeyboardInterrupt:
        print_error("Interrupted.")
        return 130
    except BrokenPipeError:  # the reader had enough, as in `trce presets list | head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except TrceError as error:
        print_error(error.message, error.hint)
        return error.exit_code
    except OSError as error:
        if error.errno not in _SYSTEM_REFUSALS:
            raise
        where = f": {error.filename}" if error.filename else ""
        print_error(
            f"{_SYSTEM_REFUSALS[error.errno]}{where}.",
            "Nothing was left half-written; make room or choose another place.",
        )
        return 1
    except MemoryError:
        print_error("The memory ran out.", _LESS_MEMORY)
        return 1
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":  # torch's; not imported just to name it
            raise
        print_error("The device's memory ran out.", _LESS_MEMORY)
        return 1
    return 0
