"""The state of a training run as one safetensors file: tensors in training, optimizer moments, step. No
pickles.

Randomness has no state here: what is random at a step is drawn from a generator seeded with the run's seed
and the step's number, so that a run that goes on draws what an undisturbed one would have drawn.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from trce_cli.errors import BadInput
from trce_cli.system.safetensors import SafetensorsFile
from trce_cli.system.whole import write_tensors

_OPTIMIZER = "optimizer/"


def save(
    path: Path,
    step: int,
    tensors: Mapping[str, Tensor],
    optimizer: torch.optim.Optimizer,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write the state after `step` steps, atomically: a kill leaves the old state or the new one.

    tensors: all that training changes besides the optimizer, by name: weights, moving averages. metadata:
    what else `load` shall return.
    """
    moments = {
        f"{_OPTIMIZER}{index}/{name}": value
        for index, entry in optimizer.state_dict()["state"].items()
        for name, value in entry.items()
    }
    write_tensors(path, {**tensors, **moments}, {**(metadata or {}), "format": "pt", "step": str(step)})


def load(
    path: Path, tensors: Mapping[str, Tensor], optimizer: torch.optim.Optimizer
) -> tuple[int, Mapping[str, str]]:
    """Read a state into `tensors`, in place, and into the optimizer; returns (steps done, metadata).

    Raises BadInput where the file is damaged or of another model.
    """
    file = SafetensorsFile.open(path)
    wanted = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    found = {name: info.shape for name, info in file.tensors.items() if not name.startswith(_OPTIMIZER)}
    if found != wanted or not file.metadata.get("step", "").isdecimal():
        raise BadInput(f"{path} is no training state of this run.", "Remove it to begin again.")
    with torch.no_grad():
        for name, tensor in tensors.items():
            tensor.copy_(file.read(name))
    state: dict[int, dict[str, Tensor]] = {}
    for name in file.tensors:
        if name.startswith(_OPTIMIZER):
            index, key = name.removeprefix(_OPTIMIZER).split("/")
            state.setdefault(int(index), {})[key] = file.read(name)
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    return int(file.metadata["step"]), file.metadata
