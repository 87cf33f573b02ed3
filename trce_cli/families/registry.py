"""The known families, and which of them a checkpoint is of."""

from collections.abc import Callable, Mapping
from typing import Final, TypeVar

from trce_cli.errors import BadInput
from trce_cli.families.base import Configs, Family, Shape
from trce_cli.families.flux.family import CHROMA, FLUX
from trce_cli.families.flux2.family import FLUX2_KLEIN
from trce_cli.families.qwen_image.family import QWEN_IMAGE
from trce_cli.families.sd.family import SD1, SD2, SDXL
from trce_cli.families.sd3.family import SD3, SD3_CLIP
from trce_cli.families.z_image.family import Z_IMAGE

FAMILIES: Final[tuple[Family, ...]] = (
    SD1,
    SD2,
    SDXL,
    SD3,
    SD3_CLIP,
    Z_IMAGE,
    QWEN_IMAGE,
    FLUX,
    CHROMA,
    FLUX2_KLEIN,
)
# The streams that some families have beside their main one; each may be left alone by its name.
FURTHER_STREAMS: Final = tuple(dict.fromkeys(stream for family in FAMILIES for stream in family.streams[1:]))

# What has to be known of a ControlNet, alone or beside a denoiser.
CONTROLNET: Final = (
    "A ControlNet attends to the prompt by weights of its own, which no edit of a checkpoint changes: with "
    "it an erased concept may come back."
)
CHECKPOINT: Final = "model.diffusion_model."  # what names of a denoiser begin with in single files
_WHOLE: Final = ("model_ema.diffusion_model",)  # and where only the copy of averages was kept
_FLAT: Final = ("unet.conv_in.",)  # and where the parts of a folder were put into one file
_EDITS: Final = {
    "trce_map.": "a map of text embeddings",
    "lora_": "a LoRA",
    "unet.": "a LoRA",
    "transformer.": "a LoRA",
    "emb_params": "a textual inversion embedding",
    "ip_adapter.": "an IP-Adapter",
    "image_proj.": "an IP-Adapter",
    "input_hint_block.": "a ControlNet",
}

C = TypeVar("C", bound=Configs)


def family_of_folder(where: str, configs: Callable[[str], C]) -> tuple[Family, C]:
    """The family of a diffusers folder, and its configurations, which are given for a name of the denoiser.

    Raises `BadInput`, which lists the known families, for any other.
    """
    reasons = []
    for family in FAMILIES:
        config = configs(family.denoiser)
        why = family.claims(config)
        if why is None:
            family.check(config)
            return family, config
        reasons.append(why)
    pipeline = f"its pipeline is {configs('')['model_index'].get('_class_name')}"
    nearly = [why for why in reasons if why != pipeline]
    raise _unknown(where, ", and ".join([pipeline, *nearly[:1]]))


def family_of_file(where: str, shapes: Mapping[str, Shape]) -> Family:
    """The family of a single file from the names and shapes of its tensors.

    Raises `BadInput`, which lists the known families, for any other file.
    """
    if found := not_a_checkpoint(shapes):
        raise BadInput(f"{where} is no checkpoint but {found}.")
    reasons = {}
    for family in FAMILIES:
        if (why := family.claims_file(shapes)) is None:
            return family
        reasons[why] = family
    # A family of which a file has nothing says so; one that it nearly is says more.
    nearly = [why for why in reasons if not why.startswith("it has no ")]
    nothing = f"no name of its {len(shapes)} tensors, such as {next(iter(shapes), None)}, is one of theirs"
    raise _unknown(where, "; ".join(nearly) or nothing)


def family_named(name: str) -> Family | None:
    """The family that people call so."""
    return next((family for family in FAMILIES if family.name == name), None)


def family_of_key(key: str | None) -> Family | None:
    """The family that files call so."""
    return next((family for family in FAMILIES if family.key == key), None)


# Parameters of transformers that are no layer's: Z-Image's padding, and the positions of SD 3.
_BARE: Final = ("x_pad_token", "cap_pad_token", "pos_embed.pos_embed")


def may_be_denoiser(shapes: Mapping[str, Shape]) -> bool:
    """Whether a file's tensors may be weights of a denoiser by diffusers' names, and no whole checkpoint."""
    if not shapes or not all(key.endswith((".weight", ".bias")) or key in _BARE for key in shapes):
        return False
    if any(key.startswith(CHECKPOINT) for key in shapes):
        return False
    denoisers = {f"the {family.network} of a diffusers folder" for family in FAMILIES}
    return not_a_checkpoint(shapes) in (None, *denoisers) and not _is_claimed(shapes)


def not_a_checkpoint(shapes: Mapping[str, Shape]) -> str | None:
    """What a safetensors file is by its tensors, where it is often taken for a checkpoint and is none."""
    if any(key.startswith((CHECKPOINT, *_WHOLE)) for key in shapes) or _is_claimed(shapes):
        return None
    if any(".lora" not in key and key.startswith(_FLAT) for key in shapes):
        return None
    known = dict(_EDITS)
    for family in FAMILIES:
        known |= family.fragments
    return next((what for start, what in known.items() if any(key.startswith(start) for key in shapes)), None)


def _is_claimed(shapes: Mapping[str, Shape]) -> bool:
    """Whether a single file with such tensors is of a family."""
    return any(family.claims_file(shapes) is None for family in FAMILIES)


def _unknown(where: str, reason: str) -> BadInput:
    known = ", ".join(family.name for family in FAMILIES)
    return BadInput(f"{where} is of a family that is not known: {reason}.", f"Known families: {known}.")
