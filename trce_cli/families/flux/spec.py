"""The text encoders: T5's states of all positions, and for FLUX.1 CLIP's state at the EoT."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Final

from trce_cli.families.clip.spec import EncoderSpec
from trce_cli.families.t5.spec import T5Spec

POOLED: Final = "pooled"  # the stream of CLIP's last state at the EoT
CLIP: Final = EncoderSpec(
    "text_encoder", "tokenizer", "CLIPTextModel", "last", "text_encoders.clip_l.", False
)
T5: Final = T5Spec("text_encoder_2", "tokenizer_2", 512)
CHROMA_T5: Final = T5Spec("text_encoder", "tokenizer", 512, masked=True)
SCHNELL: Final = 256  # tokens that the variant without embedded guidance was trained to read

# What dev's repository says of its schedule, and schnell's otherwise.
DEV_SCHEDULE: Final[Mapping[str, Any]] = {"use_dynamic_shifting": True, "shift": 3.0}


def t5(denoiser: Mapping[str, Any]) -> T5Spec:
    """How much of a prompt a transformer of this configuration reads."""
    return T5 if denoiser.get("guidance_embeds") else replace(T5, limit=SCHNELL)
