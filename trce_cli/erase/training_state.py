"""The state of a training run as one safetensors file: tensors in training, optimizer moments, step. No
pickles.

Randomness has no state here: what is random at a step is drawn from a generator seeded with the run's seed
and the step's number, so that a run that goes on draws what an undisturbed one would have drawn.
"""

import errno
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from trce_cli.errors import BadInput
from trce_cli.system.safetensors import SafetensorsFile

_OPTIMIZER = "optimizer/"


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file, whole or not at all, over an old one; OSError where the disk refuses."""
    partial = path.with_name(f".{path.name}.partial")
    partial.touch()
    mode = partial.stat().st_mode  # what the umask asks for; safetensors writes 0600
    try:
        detached = {key: value.detach().contiguous() for key, value in tensors.items()}
        save_file(detached, partial, dict(metadata))
        partial.chmod(mode)
        partial.replace(path)
    except SafetensorError as error:  # it has no error number of its own
        full = "StorageFull" in str(error) or "No space left" in str(error)
        raise OSError(errno.ENOSPC if full else errno.EIO, str(error), str(path)) from error
    finally:
        partial.unlink(missing_ok=True)


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
