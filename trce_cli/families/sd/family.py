"""Stable Diffusion 1.x, 2.x and XL: CLIP text encoders, and a U-Net that attends to them."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Literal

from trce_cli.families.base import Door
from trce_cli.families.clip.spec import EncoderSpec
from trce_cli.families.clip.tokens import SLOTS

if TYPE_CHECKING:
    from torch import Tensor

POOLED_KEY: Final = "add_embedding.linear_1.weight"
CONTEXT: Final = 2  # the place of encoder_hidden_states among the positional arguments of a U-Net


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
    denoiser: str = "unet"
    slots: tuple[str, ...] = SLOTS

    @property
    def streams(self) -> tuple[str, ...]:
        """What the cross-attention sees, and for SDXL the pooled embedding."""
        return ("context", "pooled") if self.pooled else ("context",)

    @property
    def default_slots(self) -> Mapping[str, float]:
        """The paper's: only the first EoT."""
        return {"FIRST_EOT": 1.0}

    def doors(self, config: Mapping[str, Any], keys: Collection[str]) -> tuple[Door, ...]:
        """The keys and values of every cross-attention, and for SDXL the embedding of the pooled text."""
        width = config["cross_attention_dim"]
        doors = [
            Door(name, "context", tuple(key for key in keys if key.endswith(end)), width)
            for name, end in (("keys", ".attn2.to_k.weight"), ("values", ".attn2.to_v.weight"))
        ]
        if self.pooled and config.get("addition_time_embed_dim"):
            sizes = 6 * config["addition_time_embed_dim"]  # of the picture's size, crop and target size
            width = config["projection_class_embeddings_input_dim"] - sizes
            doors.append(Door("add_embedding", "pooled", (POOLED_KEY,), width))
        return tuple(doors)

    def mapped(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any], change: Callable[[str, "Tensor"], "Tensor"]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of a call of the U-Net with the embeddings of every stream changed."""
        kwargs = dict(kwargs)
        if len(args) > CONTEXT:
            args = (*args[:CONTEXT], change("context", args[CONTEXT]), *args[CONTEXT + 1 :])
        else:
            kwargs["encoder_hidden_states"] = change("context", kwargs["encoder_hidden_states"])
        if self.pooled:
            conditions = kwargs["added_cond_kwargs"]
            text_embeds = change("pooled", conditions["text_embeds"])
            kwargs["added_cond_kwargs"] = {**conditions, "text_embeds": text_embeds}
        return args, kwargs


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
