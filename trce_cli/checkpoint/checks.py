"""What an opened checkpoint has to hold before it is believed, seen from headers and configurations alone."""

from collections.abc import Mapping
from typing import Final

from trce_cli.checkpoint.checkpoint import Checkpoint
from trce_cli.errors import BadInput
from trce_cli.system.safetensors import FLOATS

# What to do with weights in fewer bits than are computed with.
UNPACKED: Final = "Edit the checkpoint that it comes from --as lora, and load the LoRA on this one."


def check(
    checkpoint: Checkpoint, stored: Mapping[str, Mapping[str, str]] | None = None, hint: str | None = None
) -> None:
    """Raise BadInput where doors, text encoders or tokenizers are not what the configurations ask for.

    stored: by part and weight the names in the file, where they are others. hint: what to do about a text
    encoder that does not fit.
    """
    family = checkpoint.family
    for part, weights in family.text_weights(checkpoint.config).items():
        for key, wanted in weights.items():
            name = stored[part].get(key, key) if stored and part in stored else key
            where = checkpoint.path if stored and part in stored else checkpoint.folder(part)
            if key not in checkpoint.keys(part):
                raise BadInput(f"{where} lacks the weight {name}, on which text embeddings depend.", hint)
            if (dtype := checkpoint.stored_dtype(part, key)) not in FLOATS:
                raise BadInput(f"{name} in {where} has the dtype {dtype}, which is no use here.", UNPACKED)
            if (shape := checkpoint.shape(part, key)) != wanted:
                raise BadInput(
                    f"{name} in {where} has the shape {shape}; the configuration asks for {wanted}.", hint
                )
    _check_doors(checkpoint)


def _check_doors(checkpoint: Checkpoint) -> None:
    """All copies must hold all doors, as wide as the text encoders' output, in a dtype that can be edited."""
    network = checkpoint.family.network
    for door in checkpoint.doors():
        if not door.weights:
            raise BadInput(f"The {network} of {checkpoint.path} has no weights where prompts enter.")
        for copy in checkpoint.denoiser:
            for key in door.weights:
                if key not in copy.tensors:
                    raise BadInput(f"The {copy.label} {network} weights of {checkpoint.path} lack {key}.")
                place = copy.tensors[key]
                shape, where = place.shape, f"{place.stored.name} in {place.file.path}"
                if place.info.dtype not in FLOATS:
                    raise BadInput(
                        f"{where} has the dtype {place.info.dtype}, which cannot be edited.", UNPACKED
                    )
                fits = len(shape) == 2 and (shape[1] > door.width if door.wider else shape[1] == door.width)
                if not fits:
                    raise BadInput(
                        f"{where} has shape {list(shape)}; the text encoders give {door.width} columns."
                    )
