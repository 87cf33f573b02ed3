"""What `--dry-run` shows, in every command: what would be done, what it takes, and about how long."""

from collections.abc import Callable, Mapping
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Any

from trce_cli.cli.console import Console
from trce_cli.cli.progress import spoken

if TYPE_CHECKING:
    from rich.table import Table


def show_plan(
    console: Console,
    output: Path,
    planned: Mapping[str, Any],
    seconds: Callable[[], float] | None = None,
    measured: Callable[[], Mapping[str, Any]] = dict,
) -> None:
    """Tell the plan, for people and as JSON.

    planned: figures by name; those that end in `_bytes` are sizes. Only when the plan is told, seconds
    measures about how long it would take, by a short piece of the real work, and measured further figures
    that take a while.
    """
    spent = monotonic() - Console.begun  # on libraries and checkpoints, which the work itself needs too
    Console.begun = monotonic()
    console.tell(lambda: _show(console, output, {**planned, **measured()}, spent, seconds))


def _show(
    console: Console,
    output: Path,
    planned: Mapping[str, Any],
    spent: float,
    seconds: Callable[[], float] | None,
) -> None:
    told = dict(planned)
    if seconds is not None:
        told["estimated_seconds"] = float(f"{spent + seconds():.3g}")
    console.answer(plan_table(told))
    console.result({"dry_run": True, "output": output, **told})
    lack = told.get("disk_bytes", 0) - told.get("free_disk_bytes", told.get("disk_bytes", 0))
    if lack > 0:
        console.warn(f"The disk of {output} lacks {size(lack)}.")


def plan_table(planned: Mapping[str, Any]) -> "Table":
    """A line a figure."""
    from rich.table import Table

    table = Table("Plan", "", title="Nothing was written")
    for name, value in planned.items():
        if name == "layers":
            table.add_row("weights edited", f"{len(value)}, named by --json")
        elif isinstance(value, Mapping):
            for inner, each in value.items():
                table.add_row(f"{name.replace('_', ' ')}, {inner}", _told(name, each))
        elif value is not None:
            label = "time" if name == "estimated_seconds" else name.removesuffix("_bytes").replace("_", " ")
            table.add_row(label, _told(name, value))
    return table


def size(count: int) -> str:
    """`1.25 GB`, or `3.4 MB` of less than one."""
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def _told(name: str, value: Any) -> str:
    if name.endswith("_bytes"):
        return size(value)
    if name == "estimated_seconds":
        return f"about {spoken(value)}"
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
