"""How work tells how far it is, whoever listens."""

from collections.abc import Callable

# Called with the number of items just done, and where there is one a word on how it goes.
Report = Callable[..., None]
# Begins a part of the work: what it is, how many items it has (None: unknown), and what they are called.
Task = Callable[[str, int | None, str], Report]


def no_report(done: float = 1, detail: str = "") -> None:
    """For those who do not want to know."""


def no_task(text: str, total: int | None = None, unit: str = "") -> Report:
    """For those who do not want to know."""
    return no_report
