"""The errors a user can do something about; everything else is a bug and keeps its traceback."""


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


def first_line(error: Exception) -> str:
    """The first line of what another library's error says, or its name where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
