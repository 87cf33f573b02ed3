"""What long runs found, by kind: `python -m fuzz.table LOG...` sums the lines that `fuzz.run` printed."""

import re
import sys
from collections.abc import Iterable
from pathlib import Path

LINE = re.compile(
    r"^(.+): ([\d,]+) inputs \(([\d,]+) exit 0, ([\d,]+) exit 1, ([\d,]+) exit 2\), ", re.MULTILINE
)


def table(logs: Iterable[str]) -> str:
    """A Markdown table: of each kind its inputs, how they ended, and in how many a promise was broken."""
    sums: dict[str, list[int]] = {}
    for kind, *counts in (found for log in logs for found in LINE.findall(log)):
        inputs, *ends = (int(count.replace(",", "")) for count in counts)
        row = [inputs, *ends, inputs - sum(ends)]
        sums[kind] = [one + more for one, more in zip(sums.get(kind, [0] * len(row)), row, strict=True)]
    head = "| kind | inputs | exit 0 | exit 1 | exit 2 | promises broken |\n|---|---:|---:|---:|---:|---:|"
    return "\n".join(
        [head, *(f"| {kind} | {' | '.join(f'{n:,}' for n in row)} |" for kind, row in sums.items())]
    )


if __name__ == "__main__":
    print(table(Path(name).read_text() for name in sys.argv[1:]))
