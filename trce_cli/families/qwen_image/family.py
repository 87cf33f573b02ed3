"""Qwen-Image: the states of Qwen2.5-VL enter the text's stream of a transformer by one linear layer."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Final

from trce_cli.families.base import Canvas, Configs, Defaults, Shape, Weights
from trce_cli.families.causal_llm.family import LlmFamily
from trce_cli.families.causal_llm.spec import CONTEXT, MAPPED, MOVED, PRESERVE, LlmSpec
from trce_cli.families.qwen_image.names import DOOR, NORM, PREFIX, Names, is_tuned

if TYPE_CHECKING:
    from trce_cli.families.qwen_image.denoiser import Transformer

# The template is written in diffusers' pipeline, and so is how much of it never reaches the transformer.
TEMPLATE: Final = (
    "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, "
    "spatial relationships of the objects and background:<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n"
    "<|im_start|>assistant\n"
)
DROPPED: Final = 34
READ: Final = 512  # tokens behind these
QWEN25: Final = LlmSpec(
    "qwen2_5_vl",
    ("Qwen2_5_VLForConditionalGeneration",),
    "last",
    DROPPED + READ,
    NORM,
    template=TEMPLATE,
    dropped=DROPPED,
)


class QwenImage(LlmFamily):
    """The family; see `families.base.Family`. The norm is `txt_norm`, the door `txt_in`."""

    key = "qwen-image"
    name = "Qwen-Image"
    spec = QWEN25
    transformer = "QwenImageTransformer2DModel"
    encoders: ClassVar = {QWEN25.folder: QWEN25.classes}
    door = DOOR
    pipelines = ("QwenImagePipeline", "QwenImageImg2ImgPipeline", "QwenImageInpaintPipeline")
    repository = "Qwen/Qwen-Image"
    layers: ClassVar = {"num_layers": "transformer_blocks."}
    # Guidance: diffusers' default for it.
    defaults: ClassVar = Defaults(
        4.0,
        MAPPED,
        "qwen_image",
        ("qwen-image",),
        "the one layer by which the prompt enters",
        moved=MOVED,
        preserve=PRESERVE,
    )

    def claims_file(self, shapes: Mapping[str, Shape]) -> str | None:
        """See `Family`."""
        keys = {key.removeprefix(PREFIX) for key in shapes}
        needed = (DOOR, NORM, "transformer_blocks.0.attn.add_q_proj.weight")
        return None if keys.issuperset(needed) else f"it has no {DOOR} with a {NORM}, as Qwen-Image has"

    def check(self, config: Configs) -> None:
        """See `Family`."""
        from trce_cli.families.qwen_image.config import check

        check(config, QWEN25)

    def shapes(self, config: Mapping[str, Any]) -> dict[str, Shape]:
        """See `TransformerFamily`."""
        from trce_cli.families.qwen_image.shapes import denoiser_weights

        return denoiser_weights(config)

    def vae_shapes(self, config: Mapping[str, Any]) -> dict[str, Shape] | None:
        """See `TransformerFamily`."""
        from trce_cli.families.qwen_image.shapes import vae_weights

        return vae_weights(config)

    def norm_eps(self, config: Mapping[str, Any]) -> float:
        """See `LlmFamily`."""
        from trce_cli.families.qwen_image.denoiser import EPS

        return EPS

    def widths(self, config: Mapping[str, Any]) -> dict[str, int]:
        """See `Family`."""
        return {CONTEXT: config.get("joint_attention_dim", 3584)}

    def names(self, config: Mapping[str, Mapping[str, Any]]) -> Names:
        """See `Family`."""
        return Names()

    def tuned(self, key: str) -> bool:
        """See `Family`: the attention of the image's stream."""
        return is_tuned(key)

    def denoise(self, weights: Weights) -> "Transformer":
        """See `Family`."""
        from trce_cli.families.qwen_image.denoiser import Transformer

        return Transformer(weights, self.spec, self.norm_eps(weights.config["denoiser"]))

    def canvas(self, weights: Weights) -> Canvas:
        """See `Family`."""
        from trce_cli.families.qwen_image.config import canvas

        return canvas(weights)

    def pipeline(self) -> Any:
        """See `LlmFamily`."""
        from trce_cli.families.qwen_image import pipeline

        return pipeline


QWEN_IMAGE: Final = QwenImage()
