"""The processes of a run, and what only the main one may do: read and write files, and say what is wrong."""

import os
from collections.abc import Callable
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Final, TypeVar

from trce_cli.errors import BadInput, TrceError

if TYPE_CHECKING:
    from accelerate import Accelerator

T = TypeVar("T")

# One process may have much more to do than the others: the wait for it has no sensible limit.
PATIENCE: Final = timedelta(days=7)


class Alone:
    """The one process of a run without `accelerate launch`, by the names of accelerate's PartialState."""

    num_processes, process_index, is_main_process = 1, 0, True

    def wait_for_everyone(self) -> None:
        """There is nobody to wait for."""


def launched() -> int:
    """How many processes the environment says this run has; BadInput where it says something else."""
    size = os.environ.get("WORLD_SIZE", "1")
    if not (size.isascii() and size.isdecimal() and len(size) < 10):
        raise BadInput(f"WORLD_SIZE is {size[:40]!r}, which is no number of processes.")
    return int(size)


def join_team(device: str) -> Any:
    """The processes of this run: accelerate's PartialState where it launched several, else `Alone`."""
    if launched() < 2:
        return Alone()
    from accelerate import PartialState

    return PartialState(cpu=device == "cpu", timeout=PATIENCE)


def on_main(accelerator: "Accelerator", function: Callable[[], T]) -> T:
    """Call `function` in the main process alone, and return its result in all of them.

    Where it raises one of our errors or an OSError, that is raised in the main process, and the others end
    silently with the same exit status, so that none waits for ever. The result has to be picklable.
    """
    if accelerator.num_processes == 1:
        return function()
    from accelerate.utils import broadcast_object_list

    outcome: list[Any] = [None, None]
    error: TrceError | OSError | None = None
    if accelerator.is_main_process:
        try:
            outcome[0] = function()
        except (TrceError, OSError) as caught:
            error = caught
            outcome[1] = getattr(caught, "exit_code", 1)
    broadcast_object_list(outcome)
    if error is not None:
        raise error
    if outcome[1] is not None:
        raise SystemExit(outcome[1])
    result: T = outcome[0]
    return result
