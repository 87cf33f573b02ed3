"""Stable Diffusion 3 and 3.5: all text encoders' states enter a transformer by one layer, pooled ones by
another.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Final

from trce_cli.errors import BadInput
from trce_cli.families.base import (
    Canvas,
    Configs,
    Defaults,
    Door,
    Shape,
    Told,
    Weights,
    taken_from_weights,
)
from trce_cli.families.clip.names import clip_weights, text_in_file
from trce_cli.families.clip.spec import CONTEXT, POOLED
from trce_cli.families.clip.tokens import SLOTS as CLIP_SLOTS
from trce_cli.families.layout import PREFIX
from trce_cli.families.sd3.names import DOOR, FILE_DOORS, POOLED_DOOR, QKV, Names, is_tuned
from trce_cli.families.sd3.spec import CLIPS, SLOTS, T5, T5_IN_FILE, reads_t5
from trce_cli.families.t5.names import t5_weights
from trce_cli.families.transformer import Config, TransformerFamily

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from trce_cli.families.sd3.denoiser import Sd3Transformer
    from trce_cli.families.sd3.text import Sd3Text
    from trce_cli.families.sd3.words import Sd3Words


class Sd3(TransformerFamily):
    """The family; the doors are `context_embedder` and `text_embedder`."""

    key = "sd3"
    name = "Stable Diffusion 3"
    transformer = "SD3Transformer2DModel"
    encoders: ClassVar = {
        **{spec.folder: (spec.model_class,) for spec in CLIPS},
        T5.folder: ("T5EncoderModel",),
    }
    pipelines = (
        *("StableDiffusion3Pipeline", "StableDiffusion3Img2ImgPipeline"),
        "StableDiffusion3InpaintPipeline",
    )
    repository = "stabilityai/stable-diffusion-3.5-medium"
    weight_parts = (*(spec.folder for spec in CLIPS), T5.folder, "vae")
    other_parts = ("scheduler", *(spec.tokenizer for spec in CLIPS), T5.tokenizer)
    streams = (CONTEXT, POOLED)
    slots = SLOTS
    fragments: ClassVar = {}
    # The slots: the paper's of CLIP, and T5's which see the whole prompt; not measured, since no trained
    # checkpoint with T5 is at hand. Guidance: diffusers' default.
    defaults = Defaults(
        7.0,
        {"FIRST_EOT": 1.0, "EOS": 1.0, "PADS": 1.0},
        "sd3",
        ("stable-diffusion",),
        "the two layers by which the prompt enters",
    )

    def claims_file(self, shapes: Mapping[str, Shape]) -> str | None:
        """See `Family`."""
        keys = {key.removeprefix(PREFIX) for key in shapes}
        needed = (*FILE_DOORS, QKV)
        return (
            None
            if keys.issuperset(needed)
            else f"it has no {' and '.join(needed[1:])}, as Stable Diffusion 3 has"
        )

    def base_folder(self) -> Path:
        """See `Family`: T5's tokenizer is too large to come along."""
        raise BadInput(
            f"A single file of {self.name} holds neither tokenizers nor configurations.",
            "Name a diffusers folder or hub id that has them with --config, for example "
            f"--config {self.repository}.",
        )

    def check(self, config: Configs) -> None:
        """See `Family`."""
        from trce_cli.families.sd3.config import check

        check(config)

    def shapes(self, config: Mapping[str, Any]) -> dict[str, Shape]:
        """See `TransformerFamily`."""
        from trce_cli.families.sd3.shapes import denoiser_weights

        return denoiser_weights(config)

    def weights(self, config: Config, converting: bool) -> dict[str, dict[str, Shape]]:
        """See `Family`: single files have an autoencoder as well."""
        return super().weights(config, converting=False)

    def told_by_file(
        self,
        shapes: Mapping[str, Shape],
        metadata: Mapping[str, str],
        read: "Callable[[str], Tensor]",
        config: Config,
        is_base: bool,
    ) -> Told:
        """See `Family`: of which blocks the transformer is, and what `text_in_file` finds."""
        from trce_cli.families.sd3.config import built_by

        if not reads_t5(config["model_index"]) and any(key.startswith(T5_IN_FILE) for key in shapes):
            raise BadInput(
                f"The file holds a T5, and the folder given with --config has no {T5.folder}.",
                "Name one that has its configuration and tokenizer.",
            )
        text, remarks = text_in_file(self.names(config).from_file(shapes), shapes, read, config)
        own = {key.removeprefix(PREFIX): shape for key, shape in shapes.items()}
        if not (said := built_by(config["denoiser"], own)):
            return Told(text, tuple(remarks))
        note = taken_from_weights("Blocks", said)
        return Told({**text, "denoiser": {**config["denoiser"], **said}}, (note, *remarks))

    def doors(self, config: Config, keys: Collection[str]) -> tuple[Door, ...]:
        """See `Family`."""
        width = config["denoiser"].get("joint_attention_dim", 4096)
        pooled = sum(config[spec.folder]["projection_dim"] for spec in CLIPS)
        return tuple(
            Door(name, stream, tuple(key for key in (weight,) if key in keys), columns)
            for name, stream, weight, columns in (
                ("context_embedder", CONTEXT, DOOR, width),
                ("text_embedder", POOLED, POOLED_DOOR, pooled),
            )
        )

    def widths(self, config: Mapping[str, Any]) -> dict[str, int]:
        """See `Family`."""
        return {
            CONTEXT: config.get("joint_attention_dim", 4096),
            POOLED: config.get("pooled_projection_dim", 2048),
        }

    def names(self, config: Config) -> Names:
        """See `Family`."""
        starts = {**{spec.folder: spec.ldm for spec in CLIPS}, T5.folder: T5_IN_FILE}
        text = {part: (starts[part], tuple(of)) for part, of in self.text_weights(config).items()}
        return Names(config["denoiser"].get("num_layers", 18), text)

    def text_weights(self, config: Config) -> dict[str, dict[str, Shape]]:
        """See `Family`."""
        found = {spec.folder: clip_weights(config[spec.folder], spec.projects) for spec in CLIPS}
        return found | ({T5.folder: t5_weights(config[T5.folder])} if reads_t5(config["model_index"]) else {})

    def tuned(self, key: str) -> bool:
        """See `Family`: the attention of the image's stream, to the prompt and to itself."""
        return is_tuned(key)

    def text(self, weights: Weights, device: "torch.device | str", dtype: "torch.dtype") -> "Sd3Text":
        """See `Family`."""
        from trce_cli.families.sd3.text import Sd3Text

        return Sd3Text(weights, device, dtype)

    def denoise(self, weights: Weights) -> "Sd3Transformer":
        """See `Family`."""
        from trce_cli.families.sd3.denoiser import Sd3Transformer

        return Sd3Transformer(weights)

    def canvas(self, weights: Weights) -> Canvas:
        """See `Family`."""
        from trce_cli.families.sd3.config import canvas

        return canvas(weights)

    def truncated(self, weights: Weights, prompts: Sequence[str]) -> tuple[int, int]:
        """See `Family`; of the encoder that reads most."""
        from trce_cli.families.clip import load as clip
        from trce_cli.families.t5 import load as t5

        if reads_t5(weights.config["model_index"]):
            return t5.truncated(weights, T5, prompts)
        return clip.truncated(weights, CLIPS[0], prompts)

    def room(self, weights: Weights) -> int:
        """See `Family`: that of CLIP, which has less."""
        from trce_cli.families.clip.load import load_tokenizers

        return min(tokenizer.model_max_length for tokenizer in load_tokenizers(weights, CLIPS)) - 2

    def pipeline(self) -> Any:
        """See `TransformerFamily`."""
        from trce_cli.families.sd3 import pipeline

        return pipeline

    def words(self, pipeline: Any) -> "Sd3Words":
        """See `Family`."""
        from trce_cli.families.sd3.words import Sd3Words

        return Sd3Words(pipeline)

    def entrance(self, denoiser: "nn.Module") -> "nn.Module":
        """See `Family`: the transformer itself."""
        return denoiser

    def mapped(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any], change: Callable[[str, "Tensor"], "Tensor"]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """See `Family`; pipelines name them."""
        return args, {
            **kwargs,
            "encoder_hidden_states": change(CONTEXT, kwargs["encoder_hidden_states"]),
            "pooled_projections": change(POOLED, kwargs["pooled_projections"]),
        }


class Sd3Clip(Sd3):
    """The family without T5, in whose place its pipeline puts zeros: nothing of them says a prompt."""

    key = "sd3-clip"
    name = "Stable Diffusion 3 without T5"
    encoders: ClassVar = {spec.folder: (spec.model_class,) for spec in CLIPS}
    weight_parts = (*(spec.folder for spec in CLIPS), "vae")
    other_parts = ("scheduler", *(spec.tokenizer for spec in CLIPS))
    slots = CLIP_SLOTS
    defaults = replace(Sd3.defaults, slots={"FIRST_EOT": 1.0})  # the paper's

    def claims(self, config: Configs) -> str | None:
        """See `Family`."""
        why = super().claims(config)
        return f"it has a {T5.folder}" if why is None and reads_t5(config["model_index"]) else why


SD3: Final = Sd3()
SD3_CLIP: Final = Sd3Clip()
