"""Stable Diffusion 1.x, 2.x and XL: CLIP text encoders, and a U-Net that attends to them."""

from dataclasses import dataclass
from typing import Final, Literal

from trce_cli.families.clip.spec import EncoderSpec

POOLED_KEY: Final = "add_embedding.linear_1.weight"


@dataclass(frozen=True)
class StableDiffusion:
    """A family of checkpoints. The context is the encoders' hidden states side by side, in this order.

    With `pooled`, the last encoder's projected EoT state enters through the first columns of
    `add_embedding.linear_1` as well (`pooled_width` of them).
    """

    key: Literal["sd1", "sd2", "sdxl"]
    name: str
    pipeline: str
    encoders: tuple[EncoderSpec, ...]
    pooled: bool = False


SD1 = StableDiffusion(
    "sd1",
    "SD 1.x",
    "StableDiffusionPipeline",
    (
        EncoderSpec(
            "text_encoder", "tokenizer", "CLIPTextModel", "last", "cond_stage_model.transformer.", False
        ),
    ),
)
SD2 = StableDiffusion(
    "sd2",
    "SD 2.x",
    "StableDiffusionPipeline",
    (EncoderSpec("text_encoder", "tokenizer", "CLIPTextModel", "last", "cond_stage_model.model.", True),),
)
SDXL = StableDiffusion(
    "sdxl",
    "SDXL",
    "StableDiffusionXLPipeline",
    (
        EncoderSpec(
            "text_encoder",
            "tokenizer",
            "CLIPTextModel",
            "penultimate",
            "conditioner.embedders.0.transformer.",
            False,
        ),
        EncoderSpec(
            "text_encoder_2",
            "tokenizer_2",
            "CLIPTextModelWithProjection",
            "penultimate",
            "conditioner.embedders.1.model.",
            True,
        ),
    ),
    pooled=True,
)
