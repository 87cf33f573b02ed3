"""Z-Image, base and Turbo: the states of Qwen3 enter a transformer of single streams by one linear layer."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Final

from trce_cli.families.base import Configs, Defaults, Shape, Weights
from trce_cli.families.causal_llm.family import LlmFamily
from trce_cli.families.causal_llm.spec import CONTEXT, MAPPED, MOVED, PRESERVE, LlmSpec
from trce_cli.families.z_image.names import DOOR, NORM, PREFIX, Names, is_tuned

if TYPE_CHECKING:
    from trce_cli.families.z_image.denoiser import Transformer

QWEN3: Final = LlmSpec("qwen3", ("Qwen3Model", "Qwen3ForCausalLM"), "penultimate", 512, NORM)


class ZImage(LlmFamily):
    """The family; see `families.base.Family`. The norm is `cap_embedder.0`, the door `cap_embedder.1`."""

    key = "z-image"
    name = "Z-Image"
    spec = QWEN3
    transformer = "ZImageTransformer2DModel"
    encoders: ClassVar = {QWEN3.folder: QWEN3.classes}
    door = DOOR
    pipelines = ("ZImagePipeline", "ZImageImg2ImgPipeline", "ZImageInpaintPipeline")
    repository = "Tongyi-MAI/Z-Image-Turbo"
    layers: ClassVar = {"n_layers": "layers.", "n_refiner_layers": "noise_refiner."}
    # Guidance: diffusers' default for it.
    defaults: ClassVar = Defaults(
        5.0,
        MAPPED,
        "z_image",
        ("z-image",),
        "the one layer by which the prompt enters",
        moved=MOVED,
        preserve=PRESERVE,
    )

    def claims(self, config: Configs) -> str | None:
        """See `Family`."""
        why = super().claims(config)
        if why is None and config["denoiser"].get("siglip_feat_dim") is not None:
            return "its transformer reads pictures as well"
        return why

    def claims_file(self, shapes: Mapping[str, Shape]) -> str | None:
        """See `Family`."""
        keys = {key.removeprefix(PREFIX) for key in shapes}
        if DOOR not in keys or "cap_pad_token" not in keys or "layers.0.attention.qkv.weight" not in keys:
            return f"it has no {DOOR} with a cap_pad_token, as Z-Image has"
        return "its transformer reads pictures as well" if "siglip_pad_token" in keys else None

    def check(self, config: Configs) -> None:
        """See `Family`."""
        from trce_cli.families.z_image.config import check

        check(config, QWEN3)

    def shapes(self, config: Mapping[str, Any]) -> dict[str, Shape]:
        """See `TransformerFamily`."""
        from trce_cli.families.z_image.shapes import denoiser_weights

        return denoiser_weights(config)

    def norm_eps(self, config: Mapping[str, Any]) -> float:
        """See `LlmFamily`."""
        from trce_cli.families.z_image.config import transformer

        return transformer(config).norm_eps

    def widths(self, config: Mapping[str, Any]) -> dict[str, int]:
        """See `Family`."""
        return {CONTEXT: config.get("cap_feat_dim", 2560)}

    def names(self, config: Mapping[str, Mapping[str, Any]]) -> Names:
        """See `Family`."""
        return Names()

    def tuned(self, key: str) -> bool:
        """See `Family`: the attention of the main layers."""
        return is_tuned(key)

    def denoise(self, weights: Weights) -> "Transformer":
        """See `Family`."""
        from trce_cli.families.z_image.denoiser import Transformer

        return Transformer(weights, self.spec, self.norm_eps(weights.config["denoiser"]))

    def pipeline(self) -> Any:
        """See `LlmFamily`."""
        from trce_cli.families.z_image import pipeline

        return pipeline


Z_IMAGE: Final = ZImage()
