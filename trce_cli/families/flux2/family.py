"""FLUX.2 klein, base and distilled: three of Qwen3's states enter a transformer by one linear layer."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Final

from trce_cli.families.base import Configs, Defaults, Shape, Weights
from trce_cli.families.block_names import COUNTS, QKV, is_tuned
from trce_cli.families.causal_llm.family import LlmFamily
from trce_cli.families.causal_llm.spec import CONTEXT, MAPPED, MOVED, PADDED_SLOTS, PRESERVE, LlmSpec
from trce_cli.families.flux2.names import DOOR, FILE_DOOR, GUIDANCE, MODULATION, Names
from trce_cli.families.layout import PREFIX
from trce_cli.families.transformer import Config

if TYPE_CHECKING:
    from trce_cli.families.flux2.denoiser import Transformer

LAYERS: Final = (9, 18, 27)  # whose outputs are read, as diffusers' pipeline has them
QWEN3: Final = LlmSpec(
    "qwen3", ("Qwen3ForCausalLM", "Qwen3Model"), LAYERS, 512, None, thinks=False, padded=True
)


class Flux2Klein(LlmFamily):
    """The family; see `families.base.Family`. The door is `context_embedder`, and there is no norm."""

    key = "flux2-klein"
    name = "FLUX.2 klein"
    spec = QWEN3
    transformer = "Flux2Transformer2DModel"
    encoders: ClassVar = {QWEN3.folder: QWEN3.classes}
    door = DOOR
    pipelines = ("Flux2KleinPipeline", "Flux2KleinInpaintPipeline")
    repository = "black-forest-labs/FLUX.2-klein-4B"
    layers: ClassVar = COUNTS
    slots: ClassVar = PADDED_SLOTS
    # The slots: not measured. Those of `ZImage`, and the padding, since it sees the whole prompt and the
    # denoiser sees all of it. Guidance: diffusers' default for it.
    defaults: ClassVar = Defaults(
        4.0,
        {**MAPPED, "PADS": 0.5},
        "flux2_klein",
        ("flux2", "flux2-klein"),
        "the one layer by which the prompt enters",
        moved=MOVED,
        preserve=PRESERVE,
    )

    def claims_file(self, shapes: Mapping[str, Shape]) -> str | None:
        """See `Family`."""
        keys = {key.removeprefix(PREFIX) for key in shapes}
        if not keys.issuperset((FILE_DOOR, MODULATION, QKV)):
            return f"it has no {FILE_DOOR} with a {MODULATION}, as FLUX.2 has"
        return "it embeds guidance, as FLUX.2 dev does and klein does not" if GUIDANCE in keys else None

    def check(self, config: Configs) -> None:
        """See `Family`."""
        from trce_cli.families.flux2.config import check

        check(config, QWEN3)

    def shapes(self, config: Mapping[str, Any]) -> dict[str, Shape]:
        """See `TransformerFamily`."""
        from trce_cli.families.flux2.shapes import denoiser_weights

        return denoiser_weights(config)

    def vae_shapes(self, config: Mapping[str, Any]) -> dict[str, Shape] | None:
        """See `TransformerFamily`."""
        from trce_cli.families.flux2.shapes import vae_weights

        return vae_weights(config)

    def sampling(self, config: Config) -> dict[str, str]:
        """See `Family`."""
        from trce_cli.families.flux2.config import is_distilled

        distilled = is_distilled(config)
        return {**super().sampling(config), "guidance": "none, distilled" if distilled else "classifier-free"}

    def widths(self, config: Mapping[str, Any]) -> dict[str, int]:
        """See `Family`."""
        return {CONTEXT: config.get("joint_attention_dim", 15360)}

    def names(self, config: Config) -> Names:
        """See `Family`."""
        return Names()

    def tuned(self, key: str) -> bool:
        """See `Family`: the attention of the image's stream, in the blocks in which it has one of its own."""
        return is_tuned(key)

    def denoise(self, weights: Weights) -> "Transformer":
        """See `Family`."""
        from trce_cli.families.flux2.denoiser import Transformer

        return Transformer(weights, self.spec, self.norm_eps(weights.config["denoiser"]))

    def pipeline(self) -> Any:
        """See `TransformerFamily`."""
        from trce_cli.families.flux2 import pipeline

        return pipeline


FLUX2_KLEIN: Final = Flux2Klein()
