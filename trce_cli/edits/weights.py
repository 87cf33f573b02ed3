"""Files with weights of a denoiser, all of them or some, as other erasers hand them out, read as edits."""

from dataclasses import dataclass
from functools import partial
from typing import Final

from torch import Tensor

from trce_cli.checkpoint.checkpoint import Checkpoint
from trce_cli.edits.edit import WeightEdit, check_strength
from trce_cli.errors import BadInput
from trce_cli.system.safetensors import FLOATS, SafetensorsFile, all_finite

HINT: Final = "Such a file fits the base that it was made from; the edits come first, the checkpoint last."


@dataclass(frozen=True, eq=False)
class Weights:
    """Weights W' of a denoiser by diffusers' names, as UCE, RECE and ESD write them; read as needed.

    Nothing in such a file says what it was made from.
    """

    file: SafetensorsFile

    @property
    def made(self) -> None:
        """Not known."""
        return None

    def weight_edits(self, checkpoint: Checkpoint, strength: float = 1.0) -> dict[str, WeightEdit]:
        """W -> W + s (W' - W) for each weight; BadInput where the checkpoint has not all of them."""
        check_strength(strength)
        names = set(checkpoint.keys("denoiser"))
        for name, info in self.file.tensors.items():
            if name not in names:
                raise BadInput(f"{self.file.path} holds {name}, which {checkpoint.name} does not have.", HINT)
            if info.shape != (shape := checkpoint.shape("denoiser", name)):
                raise BadInput(
                    f"{name} in {self.file.path} is {list(info.shape)}; {checkpoint.name} has {list(shape)}.",
                    HINT,
                )
        return {name: partial(self._instead, name, strength) for name in self.file.tensors}

    def _instead(self, name: str, strength: float, weight: Tensor) -> Tensor:
        tensor = self.file.read(name)
        if not all_finite(tensor):
            raise BadInput(f"{name} in {self.file.path} holds NaN or infinite values.")
        return weight.double() + strength * (tensor.double() - weight.double())


def open_weights(file: SafetensorsFile) -> Weights:
    """The weights in a file; BadInput for what is no weight."""
    for name, info in file.tensors.items():
        if info.dtype not in FLOATS:
            raise BadInput(f"{name} in {file.path} is no weight that can be edited: {info.dtype}.")
    return Weights(file)
