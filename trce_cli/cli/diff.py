"""`trce diff`: in which tensors two checkpoints differ, and by how much."""

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from trce_cli.cli.options import Answer, Published, with_options

if TYPE_CHECKING:
    from rich.table import Table

    from trce_cli.edits.inspection import Comparison

ROWS = 40  # as many as a table may have and still be read; --json has all


@with_options
def diff(
    a: Annotated[
        str, typer.Argument(metavar="A", help="A checkpoint or .safetensors file.", show_default=False)
    ],
    b: Annotated[str, typer.Argument(metavar="B", help="The other one, of any layout.", show_default=False)],
    published: Published,
    answer: Answer,
) -> None:
    """Show which tensors of two checkpoints or files differ.

    The table tells by how much: the largest change of a single value, in the unit of the weights, and the
    norm of the whole change in per cent of the norm of A's tensor.
    """
    from trce_cli.edits.inspection import both, compare

    console = answer.console()
    left, right = both(a, b, published.config)
    with console.progress() as progress:
        found = compare(left, right, progress.task("Comparing", len(left.keys() & right.keys()), "tensors"))
    if found.differing:
        console.answer(_table(found))
    for names, what in (
        (found.reshaped, "have different shapes"),
        (found.only_a, f"are only in {a}"),
        (found.only_b, f"are only in {b}"),
    ):
        if names:
            more = ", ..." if len(names) > 3 else ""
            console.answer(f"Tensors that {what}: {len(names)} ({', '.join(names[:3])}{more})")
    console.answer(f"Tensors that differ: {len(found.differing)}. Equal: {found.equal}.")
    console.result(asdict(found))


def _table(found: "Comparison") -> "Table":
    from rich.table import Table

    hidden = len(found.differing) - ROWS
    caption = f"and {hidden} more, which --json lists" if hidden > 0 else None
    table = Table(caption=caption)
    table.add_column("tensor", overflow="fold")  # the ends of the names tell them apart
    for heading in ("shape", "largest change", "change, % of norm"):
        table.add_column(heading, no_wrap=True)
    for row in found.differing[:ROWS]:
        shape = " x ".join(map(str, row.shape))
        table.add_row(row.name, shape, f"{row.largest:.3g}", f"{100 * row.relative:.3g} %")
    return table
