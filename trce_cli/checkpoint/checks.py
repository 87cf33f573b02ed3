"""What an opened checkpoint has to hold before it is believed, seen from headers and configurations alone."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from trce_cli.checkpoint.checkpoint import Checkpoint, WeightCopy
from trce_cli.checkpoint.scaled import BESIDE
from trce_cli.errors import BadInput
from trce_cli.system.safetensors import FLOATS

# What to do with weights in fewer bits than are computed with.
UNPACKED: Final = "Edit the checkpoint that it comes from --as lora, and load the LoRA on this one."
OTHER_BUILD: Final = (
    "If it is built differently from its family's base, give its diffusers folder with --config."
)


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


def check_weights(checkpoint: Checkpoint, converting: bool) -> None:
    """Raise BadInput where weights of any part are not those that its configuration asks for.

    Of other names than are asked for there may be some in a copy; in a conversion they would be lost, and
    are an error.
    """
    hint = "The configuration and the weights are of different models: get those that belong together."
    if not checkpoint.path.is_dir():
        hint = OTHER_BUILD
    for part, wanted in checkpoint.family.weights(checkpoint.config, converting).items():
        copies = checkpoint.denoiser if part == "denoiser" else [checkpoint.parts.get(part)]
        for number, copy in enumerate(copies):
            if copy is None:
                continue
            where = f"The {checkpoint.folder(part).name} of {_lies_in(checkpoint, copy)}"
            missing = [key for key in wanted if key not in copy.tensors]
            if missing and (number == 0 or checkpoint.path.is_dir()):
                raise BadInput(f"{where} lacks {_some(missing)}, which its configuration asks for.", hint)
            for key, place in copy.tensors.items():
                if place.info.dtype not in FLOATS and not converting:
                    continue  # packed, in a shape of its own; such weights are copied as they are
                if key in wanted and _plain(place.shape) != _plain(wanted[key]):
                    raise BadInput(
                        f"{key} in the {where[4:]} has the shape {list(place.shape)}; its configuration asks "
                        f"for {list(wanted[key])}.",
                        hint,
                    )
            if converting and number == 0 and (unknown := [key for key in copy.tensors if key not in wanted]):
                raise BadInput(f"{where} has {_some(unknown)}, which its configuration does not know.", hint)
    if converting and (unknown := unknown_tensors(checkpoint)):
        raise BadInput(f"{checkpoint.path} holds {_some(unknown)}, which would be lost.", hint)


def _lies_in(checkpoint: Checkpoint, copy: WeightCopy) -> Path:
    """The checkpoint, or the folder of the configurations, which has what a single file lacks."""
    is_own = checkpoint.path.is_dir() or any(file.path == checkpoint.path for file in copy.files)
    return checkpoint.path if is_own else checkpoint.config_folder


def unknown_tensors(checkpoint: Checkpoint) -> list[str]:
    """The tensors of a single file that belong to no part and are no leftovers."""
    if checkpoint.path.is_dir():
        return []
    known = {
        place.stored.name
        for copy in (*checkpoint.denoiser, *checkpoint.parts.values())
        for place in copy.tensors.values()
    }
    (file,) = checkpoint.denoiser_files
    return [
        name
        for name in file.tensors
        if name not in known and not name.endswith(BESIDE) and not checkpoint.names.is_leftover(name)
    ]


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{', '.join(names[:3])}{more}"


def _plain(shape: Sequence[int]) -> Sequence[int]:
    """A 1 x 1 convolution's shape as that of the linear layer that it is."""
    return shape[:2] if tuple(shape[2:]) == (1, 1) else shape


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
