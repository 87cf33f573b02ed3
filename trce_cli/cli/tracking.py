"""`--log-with`: the figures of a run, told to a tracker as well."""

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trce_cli.settings import Tracking

if TYPE_CHECKING:
    import torch


def logs_of(output: Path) -> Path:
    """The folder of the trackers that write files."""
    return output.parent / f"{output.name}-logs"


def track(
    tracking: Tracking,
    command: str,
    output: Path,
    config: Mapping[str, Any],
    rows: Sequence[Mapping[str, Any]],
    device: "torch.device",
) -> None:
    """Tell the tracker that was asked for, if any, the numbers of each row, a step each.

    config: what they were found with. For the main process alone.
    """
    if tracking.log_with is None:
        return
    from trce_cli.erase.steer import make_accelerator

    with redirect_stdout(sys.stderr):  # trackers talk, and stdout is for the result
        accelerator = make_accelerator(device, "no", tracking.log_with, logs_of(output))
        accelerator.init_trackers(f"trce-{command}", {name: str(value) for name, value in flat(config)})
        for step, row in enumerate(rows):
            numbers = {name: float(value) for name, value in flat(row) if isinstance(value, int | float)}
            accelerator.log(numbers, step=step)
        for tracker in accelerator.trackers:
            tracker.finish()


def flat(values: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """What is nested, by the path to it: `{"a": {"b": 1}}` gives `a.b`."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from ((f"{name}.{inner}", each) for inner, each in flat(value))
        else:
            yield name, value
