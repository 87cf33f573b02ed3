"""FLUX.1, dev and schnell: T5's states enter a transformer by one layer, CLIP's pooled state by another."""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Final

from trce_cli.families.base import Canvas, Configs, Defaults, Door, Shape, Weights
from trce_cli.families.clip.names import clip_weights
from trce_cli.families.flux.names import DOOR, FILE_DOORS, POOLED_DOOR, PREFIX, Names, is_tuned
from trce_cli.families.flux.spec import CLIP, POOLED, T5, t5
from trce_cli.families.t5.names import t5_weights
from trce_cli.families.t5.spec import CONTEXT, SLOTS
from trce_cli.families.transformer import Config, TransformerFamily

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from trce_cli.families.flux.denoiser import Transformer
    from trce_cli.families.flux.text import FluxText
    from trce_cli.families.flux.words import FluxWords


class Flux(TransformerFamily):
    """The family; see `families.base.Family`. The doors are `context_embedder` and `text_embedder`."""

    key = "flux"
    name = "FLUX.1"
    encoders: ClassVar = {CLIP.folder: ("CLIPTextModel",), T5.folder: ("T5EncoderModel",)}
    pipelines = ("FluxPipeline", "FluxImg2ImgPipeline", "FluxInpaintPipeline")
    repository = "black-forest-labs/FLUX.1-schnell"
    weight_parts = (CLIP.folder, T5.folder, "vae")
    other_parts = ("scheduler", CLIP.tokenizer, T5.tokenizer)
    streams = (CONTEXT, POOLED)
    slots = SLOTS
    fragments: ClassVar = {"shared.": "a text encoder", "encoder.block.": "a text encoder"}
    # The slots: not measured, since no trained checkpoint with T5 is at hand; both see the whole prompt, and
    # the denoiser sees both. Guidance: diffusers' default for it.
    defaults = Defaults(
        3.5, {"EOS": 1.0, "PADS": 1.0}, "flux1", ("flux",), "the two layers by which the prompt enters"
    )

    def claims_file(self, shapes: Mapping[str, Shape]) -> str | None:
        """See `Family`."""
        keys = {key.removeprefix(PREFIX) for key in shapes}
        needed = (*FILE_DOORS, "double_blocks.0.img_attn.qkv.weight")
        return None if keys.issuperset(needed) else f"it has no {' and '.join(FILE_DOORS)}, as FLUX.1 has"

    def check(self, config: Configs) -> None:
        """See `Family`."""
        from trce_cli.families.flux.config import check

        check(config)

    def doors(self, config: Config, keys: Collection[str]) -> tuple[Door, ...]:
        """See `Family`."""
        widths = {DOOR: config[T5.folder]["d_model"], POOLED_DOOR: config[CLIP.folder]["hidden_size"]}
        return tuple(
            Door(name, stream, tuple(key for key in (door,) if key in keys), widths[door])
            for name, stream, door in (
                ("context_embedder", CONTEXT, DOOR),
                ("text_embedder", POOLED, POOLED_DOOR),
            )
        )

    def widths(self, config: Mapping[str, Any]) -> dict[str, int]:
        """See `Family`."""
        return {
            CONTEXT: config.get("joint_attention_dim", 4096),
            POOLED: config.get("pooled_projection_dim", 768),
        }

    def names(self, config: Config) -> Names:
        """See `Family`."""
        return Names()

    def text_weights(self, config: Config) -> dict[str, dict[str, Shape]]:
        """See `Family`."""
        clip = clip_weights(config[CLIP.folder], CLIP.projects)
        return {CLIP.folder: clip, T5.folder: t5_weights(config[T5.folder])}

    def tuned(self, key: str) -> bool:
        """See `Family`: the attention of the image's stream, in the blocks in which it has one of its own."""
        return is_tuned(key)

    def text(self, weights: Weights, device: "torch.device | str", dtype: "torch.dtype") -> "FluxText":
        """See `Family`."""
        from trce_cli.families.flux.text import FluxText

        return FluxText(weights, t5(weights.config["denoiser"]), device, dtype)

    def denoise(self, weights: Weights) -> "Transformer":
        """See `Family`."""
        from trce_cli.families.flux.denoiser import Transformer

        return Transformer(weights)

    def canvas(self, weights: Weights) -> Canvas:
        """See `Family`."""
        from trce_cli.families.flux.config import canvas

        return canvas(weights)

    def truncated(self, weights: Weights, prompts: Sequence[str]) -> tuple[int, int]:
        """See `Family`; T5's, which tells what to draw."""
        from trce_cli.families.t5.load import load_tokenizer
        from trce_cli.families.t5.tokens import Tokenizer

        spec = t5(weights.config["denoiser"])
        tokens = Tokenizer(load_tokenizer(weights, spec), spec).tokens(prompts)
        return spec.limit, sum(not each.is_whole for each in tokens)

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

    def entrance(self, denoiser: "nn.Module") -> "nn.Module":
        """See `Family`: the transformer itself."""
        return denoiser

    def mapped(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any], change: Callable[[str, "Tensor"], "Tensor"]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """See `Family`; pipelines name them."""
        context = change(CONTEXT, kwargs["encoder_hidden_states"])
        pooled = change(POOLED, kwargs["pooled_projections"])
        return args, {**kwargs, "encoder_hidden_states": context, "pooled_projections": pooled}


FLUX: Final = Flux()
