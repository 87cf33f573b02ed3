"""The text encoders: both CLIP's states side by side, T5's behind them, and both CLIP's pooled."""

from collections.abc import Mapping
from typing import Any, Final

from trce_cli.families.clip.spec import EncoderSpec
from trce_cli.families.clip.tokens import SLOTS as CLIP_SLOTS
from trce_cli.families.t5.spec import SLOTS as T5_SLOTS
from trce_cli.families.t5.spec import T5Spec

CLIPS: Final = (
    EncoderSpec(
        *("text_encoder", "tokenizer", "CLIPTextModelWithProjection", "penultimate"),
        *("text_encoders.clip_l.transformer.", False),
    ),
    EncoderSpec(
        *("text_encoder_2", "tokenizer_2", "CLIPTextModelWithProjection", "penultimate"),
        *("text_encoders.clip_g.transformer.", False),
    ),
)
T5: Final = T5Spec("text_encoder_3", "tokenizer_3", 256)
T5_IN_FILE: Final = "text_encoders.t5xxl.transformer."  # before its names in a single file
# CLIP's slots and T5's; a KEYWORD is where each of them has it.
SLOTS: Final = tuple(dict.fromkeys((*CLIP_SLOTS[:-1], *T5_SLOTS)))


def reads_t5(index: Mapping[str, Any]) -> bool:
    """Whether a checkpoint of this model_index.json has T5, without which there are zeros for its states."""
    return index.get(T5.folder) not in (None, [None, None])
