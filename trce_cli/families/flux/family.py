"""FLUX.1 and Chroma: T5's states enter a transformer by one layer, FLUX.1's pooled CLIP state by another."""

from abc import abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Final

from trce_cli.families.base import Configs, Defaults, Door, Shape, Told, Weights
from trce_cli.families.block_names import COUNTS, QKV, is_tuned
from trce_cli.families.clip.names import clip_weights
from trce_cli.families.flux.names import APPROXIMATOR, DOOR, FILE_DOORS, GUIDANCE, POOLED_DOOR, Names
from trce_cli.families.flux.spec import CHROMA_T5, CLIP, DEV_SCHEDULE, POOLED, T5, t5
from trce_cli.families.layout import PREFIX
from trce_cli.families.t5.names import t5_weights
from trce_cli.families.t5.spec import CONTEXT, SLOTS, T5Spec
from trce_cli.families.transformer import Config, TransformerFamily

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from trce_cli.families.flux.denoiser import ChromaTransformer, FluxTransformer
    from trce_cli.families.flux.text import FluxText
    from trce_cli.families.flux.words import FluxWords
    from trce_cli.families.t5.text import T5Text
    from trce_cli.families.t5.words import T5Words


class T5Family(TransformerFamily):
    """What FLUX.1 and Chroma share: T5, and where its states enter; see `families.base.Family`."""

    slots: ClassVar = SLOTS
    fragments: ClassVar = {"shared.": "a text encoder", "encoder.block.": "a text encoder"}
    layers: ClassVar = COUNTS

    @abstractmethod
    def t5(self, config: Mapping[str, Any]) -> T5Spec:
        """How a transformer of this configuration is told prompts."""

    def doors(self, config: Config, keys: Collection[str]) -> tuple[Door, ...]:
        """See `Family`."""
        width = config[self.t5(config["denoiser"]).folder]["d_model"]
        return (_door("context_embedder", CONTEXT, DOOR, width, keys),)

    def widths(self, config: Mapping[str, Any]) -> dict[str, int]:
        """See `Family`."""
        return {CONTEXT: config.get("joint_attention_dim", 4096)}

    def tuned(self, key: str) -> bool:
        """See `Family`: the attention of the image's stream, in the blocks in which it has one of its own."""
        return is_tuned(key)

    def truncated(self, weights: Weights, prompts: Sequence[str]) -> tuple[int, int]:
        """See `Family`; T5's, which tells what to draw."""
        from trce_cli.families.t5.load import truncated

        return truncated(weights, self.t5(weights.config["denoiser"]), prompts)

    def entrance(self, denoiser: "nn.Module") -> "nn.Module":
        """See `Family`: the transformer itself."""
        return denoiser

    def mapped(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any], change: Callable[[str, "Tensor"], "Tensor"]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """See `Family`; pipelines name them."""
        return args, {**kwargs, "encoder_hidden_states": change(CONTEXT, kwargs["encoder_hidden_states"])}


class Flux(T5Family):
    """The family; the doors are `context_embedder` and `text_embedder`."""

    key = "flux"
    name = "FLUX.1"
    transformer = "FluxTransformer2DModel"
    encoders: ClassVar = {CLIP.folder: ("CLIPTextModel",), T5.folder: ("T5EncoderModel",)}
    pipelines = ("FluxPipeline", "FluxImg2ImgPipeline", "FluxInpaintPipeline")
    repository = "black-forest-labs/FLUX.1-schnell"
    weight_parts = (CLIP.folder, T5.folder, "vae")
    other_parts = ("scheduler", CLIP.tokenizer, T5.tokenizer)
    streams = (CONTEXT, POOLED)
    # The slots: not measured, since no trained checkpoint with T5 is at hand; both see the whole prompt, and
    # the denoiser sees both. Guidance: diffusers' default for it.
    defaults = Defaults(
        3.5, {"EOS": 1.0, "PADS": 1.0}, "flux1", ("flux",), "the two layers by which the prompt enters"
    )

    def claims_file(self, shapes: Mapping[str, Shape]) -> str | None:
        """See `Family`."""
        keys = {key.removeprefix(PREFIX) for key in shapes}
        needed = (*FILE_DOORS, QKV)
        return None if keys.issuperset(needed) else f"it has no {' and '.join(FILE_DOORS)}, as FLUX.1 has"

    def check(self, config: Configs) -> None:
        """See `Family`."""
        from trce_cli.families.flux.config import check

        check(config)

    def shapes(self, config: Mapping[str, Any]) -> dict[str, Shape]:
        """See `TransformerFamily`."""
        from trce_cli.families.flux.shapes import flux_weights

        return flux_weights(config)

    def told_by_file(
        self,
        shapes: Mapping[str, Shape],
        metadata: Mapping[str, str],
        read: "Callable[[str], Tensor]",
        config: Config,
        is_base: bool,
    ) -> Told:
        """See `Family`: whether guidance is embedded, too, as in dev and not in schnell."""
        told = super().told_by_file(shapes, metadata, read, config, is_base)
        guided = any(name.removeprefix(PREFIX).startswith(GUIDANCE) for name in shapes)
        if guided == bool(config["denoiser"].get("guidance_embeds")):
            return told
        said = {**told.config.get("denoiser", config["denoiser"]), "guidance_embeds": guided}
        if not guided:
            note = "The file embeds no guidance, as schnell: its schedule is that of the --config folder."
            return Told({"denoiser": said}, (*told.notes, note))
        note = "The file embeds guidance, as dev, and its --config folder does not: its schedule is dev's."
        schedule = {**config["scheduler"], **DEV_SCHEDULE}
        return Told({"denoiser": said, "scheduler": schedule}, (*told.notes, note))

    def t5(self, config: Mapping[str, Any]) -> T5Spec:
        """See `T5Family`."""
        return t5(config)

    def doors(self, config: Config, keys: Collection[str]) -> tuple[Door, ...]:
        """See `Family`."""
        width = config[CLIP.folder]["hidden_size"]
        return (*super().doors(config, keys), _door("text_embedder", POOLED, POOLED_DOOR, width, keys))

    def widths(self, config: Mapping[str, Any]) -> dict[str, int]:
        """See `Family`."""
        return {**super().widths(config), POOLED: config.get("pooled_projection_dim", 768)}

    def names(self, config: Config) -> Names:
        """See `Family`."""
        return Names(T5.folder, CLIP.folder)

    def text_weights(self, config: Config) -> dict[str, dict[str, Shape]]:
        """See `Family`."""
        clip = clip_weights(config[CLIP.folder], CLIP.projects)
        return {CLIP.folder: clip, T5.folder: t5_weights(config[T5.folder])}

    def text(self, weights: Weights, device: "torch.device | str", dtype: "torch.dtype") -> "FluxText":
        """See `Family`."""
        from trce_cli.families.flux.text import FluxText

        return FluxText(weights, t5(weights.config["denoiser"]), device, dtype)

    def denoise(self, weights: Weights) -> "FluxTransformer":
        """See `Family`."""
        from trce_cli.families.flux.denoiser import FluxTransformer

        return FluxTransformer(weights)

    def room(self, weights: Weights) -> int:
        """See `Family`: that of CLIP, which has less."""
        from trce_cli.families.clip.load import load_tokenizers

        (tokenizer,) = load_tokenizers(weights, [CLIP])
        return int(tokenizer.model_max_length) - 2  # SoT and EoT

    def pipeline(self) -> Any:
        """See `TransformerFamily`."""
        from trce_cli.families.flux import pipeline

        return pipeline

    def words(self, pipeline: Any) -> "FluxWords":
        """See `Family`."""
        from trce_cli.families.flux.words import FluxWords

        return FluxWords(pipeline)

    def mapped(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any], change: Callable[[str, "Tensor"], "Tensor"]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """See `Family`."""
        args, changed = super().mapped(args, kwargs, change)
        return args, {**changed, "pooled_projections": change(POOLED, kwargs["pooled_projections"])}


class Chroma(T5Family):
    """FLUX.1 without a pooled embedding; the one door is `context_embedder`."""

    key = "chroma"
    name = "Chroma"
    transformer = "ChromaTransformer2DModel"
    encoders: ClassVar = {CHROMA_T5.folder: ("T5EncoderModel",)}
    pipelines = ("ChromaPipeline", "ChromaImg2ImgPipeline", "ChromaInpaintPipeline")
    repository = "lodestones/Chroma1-HD"
    layers: ClassVar = {**COUNTS, "approximator_layers": f"{APPROXIMATOR}.layers."}
    weight_parts = (CHROMA_T5.folder, "vae")
    other_parts = ("scheduler", CHROMA_T5.tokenizer)
    streams = (CONTEXT,)
    # The slots: see `Flux`. Guidance: diffusers' default for it.
    defaults = Defaults(
        5.0, {"EOS": 1.0, "PADS": 1.0}, "chroma", ("chroma",), "the one layer by which the prompt enters"
    )

    def claims_file(self, shapes: Mapping[str, Shape]) -> str | None:
        """See `Family`."""
        keys = {key.removeprefix(PREFIX) for key in shapes}
        needed = (FILE_DOORS[0], QKV, f"{APPROXIMATOR}.in_proj.weight")
        if keys.issuperset(needed):
            return None
        return f"it has no {FILE_DOORS[0]} with a {APPROXIMATOR}, as Chroma has"

    def check(self, config: Configs) -> None:
        """See `Family`."""
        from trce_cli.families.flux.config import check_chroma

        check_chroma(config)

    def shapes(self, config: Mapping[str, Any]) -> dict[str, Shape]:
        """See `TransformerFamily`."""
        from trce_cli.families.flux.shapes import chroma_weights

        return chroma_weights(config)

    def t5(self, config: Mapping[str, Any]) -> T5Spec:
        """See `T5Family`."""
        return CHROMA_T5

    def names(self, config: Config) -> Names:
        """See `Family`."""
        return Names(CHROMA_T5.folder)

    def text_weights(self, config: Config) -> dict[str, dict[str, Shape]]:
        """See `Family`."""
        return {CHROMA_T5.folder: t5_weights(config[CHROMA_T5.folder])}

    def text(self, weights: Weights, device: "torch.device | str", dtype: "torch.dtype") -> "T5Text":
        """See `Family`."""
        from trce_cli.families.t5.text import T5Text

        return T5Text(weights, CHROMA_T5, device, dtype)

    def denoise(self, weights: Weights) -> "ChromaTransformer":
        """See `Family`."""
        from trce_cli.families.flux.denoiser import ChromaTransformer

        return ChromaTransformer(weights)

    def room(self, weights: Weights) -> int:
        """See `Family`."""
        return CHROMA_T5.limit - 1  # the end-of-sequence token

    def pipeline(self) -> Any:
        """See `TransformerFamily`."""
        from trce_cli.families.flux import chroma_pipeline

        return chroma_pipeline

    def words(self, pipeline: Any) -> "T5Words":
        """See `Family`."""
        from trce_cli.families.t5.words import T5Words

        return T5Words(pipeline, CHROMA_T5)


def _door(name: str, stream: str, weight: str, width: int, keys: Collection[str]) -> Door:
    return Door(name, stream, tuple(key for key in (weight,) if key in keys), width)


FLUX: Final = Flux()
CHROMA: Final = Chroma()
