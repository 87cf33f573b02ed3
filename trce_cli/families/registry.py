"""The known families, and which of them a checkpoint is of."""

from collections.abc import Collection, Mapping
from typing import Any, Final

from trce_cli.errors import BadInput
from trce_cli.families.sd.family import SD1, SD2, SDXL, StableDiffusion
from trce_cli.families.sd.names import UNET

FAMILIES: Final = (SD1, SD2, SDXL)

# The text-to-image pipelines of the known families; image-to-image ones are the same checkpoints.
_PIPELINES = {
    "StableDiffusionPipeline",
    "StableDiffusionImg2ImgPipeline",
    "StableDiffusionXLPipeline",
    "StableDiffusionXLImg2ImgPipeline",
}


def detect_folder(
    where: str, model_index: Mapping[str, Any], unet_config: Mapping[str, Any]
) -> StableDiffusion:
    """The family of a diffusers folder from its `model_index.json` and `unet/config.json`.

    Raises `BadInput`, which lists the known families, for any other.
    """
    pipeline = model_index.get("_class_name")
    if not isinstance(pipeline, str) or pipeline not in _PIPELINES:
        raise unknown_family(where, f"its pipeline is {pipeline}")
    if unet_config.get("in_channels", 4) != 4:
        raise unknown_family(where, f"its U-Net takes {unet_config['in_channels']} channels, not 4")
    # SD 2.x has linear layers around its attention where SD 1.x has convolutions.
    sd = SD2 if unet_config.get("use_linear_projection") else SD1
    family = SDXL if "XL" in pipeline else sd
    for encoder in family.encoders:
        entry = model_index.get(encoder.folder)
        found = entry[1] if isinstance(entry, list) and len(entry) == 2 else None
        if found != encoder.model_class:
            raise unknown_family(where, f"its {encoder.folder} is {found}, not {encoder.model_class}")
    return family


def detect_single_file(where: str, shapes: Mapping[str, tuple[int, ...]]) -> StableDiffusion:
    """The family of a single file in the CompVis/LDM layout from its keys and shapes.

    Raises `BadInput`, which lists the known families, for any other file.
    """
    if found := not_a_checkpoint(shapes):
        raise BadInput(f"{where} is no checkpoint but {found}.")
    if not any(key.startswith(UNET) for key in shapes):
        raise unknown_family(where, f"it has no key that begins with {UNET}")
    channels = shapes.get(f"{UNET}input_blocks.0.0.weight", (0, 0))
    if len(channels) < 2 or channels[1] != 4:
        raise unknown_family(
            where, f"its U-Net does not take 4 channels (input_blocks.0.0: {list(channels)})"
        )
    for family in (SDXL, SD2, SD1):
        if all(any(key.startswith(spec.ldm) for key in shapes) for spec in family.encoders):
            return family
    wanted = " or ".join(" with ".join(spec.ldm for spec in family.encoders) for family in FAMILIES)
    raise unknown_family(where, f"it holds no text encoder (keys {wanted})")


def not_a_checkpoint(keys: Collection[str]) -> str | None:
    """What a safetensors file is by its keys, where it is something that is often taken for a checkpoint."""
    if any(key.startswith(UNET) for key in keys):
        return None
    return next(
        (what for start, what in _OTHER_FILES.items() if any(key.startswith(start) for key in keys)), None
    )


_OTHER_FILES = {
    "trce_map.": "a map of text embeddings",
    "lora_": "a LoRA",
    "unet.": "a LoRA",
    "down_blocks.": "the U-Net of a diffusers folder",
    "first_stage_model.": "a VAE",
    "decoder.": "a VAE",
    "text_model.": "a text encoder",
}


def unknown_family(where: str, reason: str) -> BadInput:
    """The refusal of a checkpoint of no known family."""
    known = ", ".join(family.name for family in FAMILIES)
    return BadInput(f"{where} is of a family that is not known: {reason}.", f"Known families: {known}.")
