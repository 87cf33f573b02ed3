"""Weights in fp8 that a tensor of one number scales, as tools for inference keep them in single files."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Final

from trce_cli.checkpoint.checkpoint import Place
from trce_cli.errors import BadInput
from trce_cli.system.safetensors import READABLE, Edit, SafetensorsFile

if TYPE_CHECKING:
    import torch

SCALES: Final = (".scale_weight", ".weight_scale")  # of the weight of the same module
# What goes along with them and is no weight: scales of activations, and what marks such files.
BESIDE: Final = (*SCALES, ".scale_input", ".input_scale", ".comfy_quant", "scaled_fp8")


def scale_of(file: SafetensorsFile, name: str) -> str | None:
    """The tensor that scales the weight of this name; BadInput for one of more numbers, which is of a block.

    A weight that is not in fp8 has none, whatever lies beside it.
    """
    module, _, leaf = name.rpartition(".")
    if leaf != "weight" or not file.tensors[name].dtype.startswith("F8_"):
        return None
    found = next((module + ending for ending in SCALES if module + ending in file.tensors), None)
    if found is not None and file.tensors[found].shape not in ((), (1,)):
        raise BadInput(
            f"{found} in {file.path} has the shape {list(file.tensors[found].shape)}: only weights with one "
            "scale each can be edited.",
            "Edit the checkpoint that it comes from --as lora, and load the LoRA on this one.",
        )
    return found


def scaled_edits(place: Place, edit: Edit) -> Mapping[str, Edit]:
    """The edits of the tensors that hold a weight with a scale, for that of the weight itself.

    The scale stays as it is where the new weight fits it, and grows to the new weight's largest value where
    not.
    """
    import torch

    name, scale = place.stored.name, place.scale
    if scale is None:
        return {name: edit}
    largest = torch.finfo(getattr(torch, READABLE[place.info.dtype])).max

    def grown(factor: "torch.Tensor", new: "torch.Tensor") -> "torch.Tensor":
        return torch.maximum(factor, new.abs().amax().to(factor) / largest)

    def of_weight(stored: "torch.Tensor") -> "torch.Tensor":
        factor = place.file.read(scale).to(stored).reshape(())
        new = edit(stored * factor)
        return (new / grown(factor, new)).clamp(-largest, largest)

    def of_scale(factor: "torch.Tensor") -> "torch.Tensor":
        return grown(factor, edit(place.read()))

    return {name: of_weight, scale: of_scale}
