"""The errors a user can do something about; everything else is a bug and keeps its traceback."""

from collections.abc import Iterator
from contextlib import contextmanager


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


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the memory of machine or device ran out; torch is not imported just to name its classes."""
    if isinstance(error, MemoryError):
        return True
    said = ("can't allocate memory", "not enough memory", "CUBLAS_STATUS_ALLOC_FAILED")
    return isinstance(error, RuntimeError) and (
        type(error).__name__ == "OutOfMemoryError" or any(each in str(error) for each in said)
    )
