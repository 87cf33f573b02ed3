"""The state of a training run as one safetensors file: tensors in training, optimizer moments, step. No
pickles.

Randomness has no state here: what is random at a step is drawn from a generator seeded with the run's seed
and the step's number, so that a run that goes on draws what an undisturbed one would have drawn.
"""

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from trce_cli.errors import BadInput
from trce_cli.system.safetensors import SafetensorsFile
from trce_cli.system.whole import write_tensors

_OPTIMIZER = "optimizer/"
_ADAM = {"step", "exp_avg", "exp_avg_sq"}  # what it keeps of each parameter


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
    moments = _moments(file, optimizer)
    if found != wanted or moments is None or not re.fullmatch(r"[0-9]{1,18}", file.metadata.get("step", "")):
        raise BadInput(f"{path} is no training state of this run.", "Remove it to begin again.")
    with torch.no_grad():
        for name, tensor in tensors.items():
            tensor.copy_(file.read(name))
    state: dict[int, dict[str, Tensor]] = {}
    for name, (index, key) in moments.items():
        state.setdefault(index, {})[key] = file.read(name)
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    return int(file.metadata["step"]), file.metadata


def _moments(file: SafetensorsFile, optimizer: torch.optim.Optimizer) -> dict[str, tuple[int, str]] | None:
    """The optimizer's tensors in a file: the number of their parameter, and what they are of it; None where
    one has no place.
    """
    trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    found: dict[str, tuple[int, str]] = {}
    for name, info in file.tensors.items():
        if name.startswith(_OPTIMIZER):
            place = re.fullmatch(r"([0-9]{1,6})/(\w+)", name.removeprefix(_OPTIMIZER))
            if place is None or int(place[1]) >= len(trained):
                return None
            shape = () if place[2] == "step" else tuple(trained[int(place[1])].shape)
            if (info.shape, info.dtype) != (shape, "F32"):
                return None
            found[name] = int(place[1]), place[2]
    kinds = [{key for index, key in found.values() if index == number} for number in range(len(trained))]
    return found if all(one == _ADAM for one in kinds) else None
