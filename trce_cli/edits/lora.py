"""LoRAs in kohya's form, ours and those of other tools, read as edits."""

import re
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Final

from torch import Tensor

from trce_cli.checkpoint.checkpoint import Checkpoint
from trce_cli.edits.edit import FORM, Made, WeightEdit, check_strength
from trce_cli.errors import BadInput
from trce_cli.system.safetensors import FLOATS, SafetensorsFile, all_finite

# A layer's name, kohya's or behind `transformer.` diffusers', and which part of its edit a tensor is.
LORA: Final = re.compile(r"(lora_(?!te)\w+|transformer(?:\.\w+)+)\.(lora_down\.weight|lora_up\.weight|alpha)")


@dataclass(frozen=True, eq=False)
class Lora:
    """A LoRA in kohya's form: W' = W + alpha / rank up down for each layer that it names; read as needed.

    made: None where another tool made it, which did not say for which text encoder.
    """

    made: Made | None
    file: SafetensorsFile

    @cached_property
    def layers(self) -> list[str]:
        """The names of its layers."""
        return sorted({split(name)[0] for name in self.file.tensors})

    def weight_edits(self, checkpoint: Checkpoint, strength: float = 1.0) -> dict[str, WeightEdit]:
        """W -> W + s alpha / rank up down for each layer; BadInput where the checkpoint has no such layer."""
        check_strength(strength)
        names = {name: key for key in checkpoint.keys("denoiser") for name in checkpoint.names.kohya(key)}
        edits: dict[str, WeightEdit] = {}
        for layer in self.layers:
            if layer not in names:
                raise BadInput(f"{self.file.path} changes {layer}, which {checkpoint.name} does not have.")
            key = names[layer]
            down, up = (self.file.tensors[f"{layer}.lora_{part}.weight"].shape for part in ("down", "up"))
            shape = checkpoint.shape("denoiser", key)
            if (up[0], down[1]) != shape[:2] or shape[2:] not in ((), (1, 1)):
                raise BadInput(
                    f"{layer} in {self.file.path} is for weights of {up[0]} x {down[1]}; {checkpoint.name} "
                    f"has {' x '.join(map(str, shape))}."
                )
            edits[key] = partial(self._added, layer, strength)
        return edits

    def _added(self, layer: str, strength: float, weight: Tensor) -> Tensor:
        down, up = (self._read(f"{layer}.lora_{part}.weight") for part in ("down", "up"))
        alpha = float(self._read(f"{layer}.alpha")) if f"{layer}.alpha" in self.file.tensors else len(down)
        change = (strength * alpha / len(down) * up.flatten(1)) @ down.flatten(1)
        return weight.double() + change.reshape(weight.shape)

    def _read(self, name: str) -> Tensor:
        tensor = self.file.read(name)
        if not all_finite(tensor):
            raise BadInput(f"{name} in {self.file.path} holds NaN or infinite values.")
        return tensor.double()


def split(name: str) -> tuple[str, str]:
    """The layer and the part that a tensor's name says; BadInput for no name of a LoRA's tensor."""
    if not (found := LORA.fullmatch(name)):
        raise BadInput(f"{name!r} is no tensor of a LoRA.")
    layer, part = found.groups()
    return layer, part


def open_lora(file: SafetensorsFile) -> Lora:
    """The LoRA in a file whose tensors all have names as `LORA` asks; BadInput where they do not fit."""
    for name, info in file.tensors.items():
        layer, part = split(name)
        if part == "alpha":
            fits = info.shape in ((), (1,))
        else:
            other = f"{layer}.{'lora_up' if part == 'lora_down.weight' else 'lora_down'}.weight"
            if other not in file.tensors:
                raise BadInput(f"{file.path} has {name} without {other}.")
            pair = info.shape, file.tensors[other].shape
            down, up = pair if part == "lora_down.weight" else pair[::-1]
            fits = len(down) == len(up) in (2, 4) and down[0] == up[1] > 0
            fits = fits and {*down[2:], *up[2:]} <= {1}  # a convolution of 1 x 1 is linear
        if not fits or info.dtype not in FLOATS:
            raise BadInput(
                f"{name} in {file.path} is no factor of a linear layer: {info.dtype} {list(info.shape)}.",
                "LoRAs of convolutions larger than 1 x 1 cannot be applied here.",
            )
        if part == "alpha" and f"{layer}.lora_down.weight" not in file.tensors:
            raise BadInput(f"{file.path} has {name} without factors.")
    return Lora(Made.read(file, "lora") if FORM in file.metadata else None, file)
