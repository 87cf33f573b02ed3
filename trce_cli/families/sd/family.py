"""Stable Diffusion 1.x, 2.x and XL: CLIP text encoders, and a U-Net that attends to them."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Final, Literal

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
from trce_cli.families.clip.names import POSITIONS, clip_weights, text_in_file
from trce_cli.families.clip.spec import CONTEXT, POOLED, EncoderSpec, max_clip_skip
from trce_cli.families.clip.tokens import SLOTS
from trce_cli.families.sd import configs
from trce_cli.families.sd.doors import doors, mapped, widths
from trce_cli.families.sd.names import FLAT, UNET, Names, is_tuned, unet_in_file

if TYPE_CHECKING:
    import numpy as np
    import torch
    from PIL import Image
    from torch import Tensor, nn

    from trce_cli.families.clip.text import ClipText
    from trce_cli.families.clip.words import ClipWords
    from trce_cli.families.sd.denoiser import UNet

Config = Mapping[str, Mapping[str, Any]]
CHANNELS: Final = (4, 9)  # of latents; for inpainting those of the masked picture and the mask as well
# Diffusers' classes of U-Nets that texts enter by the same doors.
PLAIN_UNET: Final = "UNet2DConditionModel"
MOTION_UNET: Final = "UNetMotionModel"


@dataclass(frozen=True)
class StableDiffusion:
    """A family of checkpoints; see `families.base.Family`.

    encoders: their hidden states side by side are the context; with `pooled` the last one's projected EoT
    state enters as well. pipeline: the class of diffusers that draws with it; whatever class saved a folder,
    it is of the family by its parts. linear: whether the layers around the attention are linear or
    convolutions; None where that tells nothing.
    """

    key: Literal["sd1", "sd2", "sdxl"]
    name: str
    pipeline: str
    encoders: tuple[EncoderSpec, ...]
    linear: bool | None
    pooled: bool
    defaults: Defaults

    denoiser: ClassVar = "unet"
    network: ClassVar = "U-Net"
    slots: ClassVar = SLOTS
    schedulers: ClassVar[Mapping[str, str]] = {
        "ddim": "DDIMScheduler",
        "ddpm": "DDPMScheduler",
        "dpmsolver++": "DPMSolverMultistepScheduler",
        "euler": "EulerDiscreteScheduler",
        "euler-a": "EulerAncestralDiscreteScheduler",
        "heun": "HeunDiscreteScheduler",
        "lms": "LMSDiscreteScheduler",
        "pndm": "PNDMScheduler",
        "unipc": "UniPCMultistepScheduler",
    }
    fragments: ClassVar[Mapping[str, str]] = {
        "controlnet_": "a ControlNet",
        "control_model.": "a ControlNet",
        "down_blocks.": "the U-Net of a diffusers folder",
        "first_stage_model.": "a VAE",
        "decoder.": "a VAE",
        "text_model.": "a text encoder",
    }

    @property
    def streams(self) -> tuple[str, ...]:
        """The context of the cross-attention, and SDXL's pooled embedding."""
        return (CONTEXT, POOLED) if self.pooled else (CONTEXT,)

    @property
    def weight_parts(self) -> tuple[str, ...]:
        """The text encoders and the autoencoder."""
        return (*(spec.folder for spec in self.encoders), "vae")

    @property
    def other_parts(self) -> tuple[str, ...]:
        """The schedule and the tokenizers."""
        return ("scheduler", *(spec.tokenizer for spec in self.encoders))

    def claims(self, config: Configs) -> str | None:
        """See `Family`."""
        index = config["model_index"]
        unet, folders = index.get("unet"), {spec.folder for spec in self.encoders}
        if not isinstance(unet, list) or unet[-1:] not in ([PLAIN_UNET], [MOTION_UNET]):
            return f"its pipeline is {index.get('_class_name')}"
        for name, entry in index.items():
            if name.startswith("text_encoder") and name not in folders and entry not in (None, [None, None]):
                return f"its pipeline is {index.get('_class_name')}, which has a {name}"
        for spec in self.encoders:
            entry = index.get(spec.folder)
            found = entry[1] if isinstance(entry, list) and len(entry) == 2 else None
            if found != spec.model_class:
                return f"its {spec.folder} is {found}, not {spec.model_class}"
        if self.linear is not None and bool(config["denoiser"].get("use_linear_projection")) != self.linear:
            return f"its attention lies between {'convolutions' if self.linear else 'linear layers'}"
        return None

    def claims_file(self, shapes: Mapping[str, Shape]) -> str | None:
        """See `Family`."""
        unet = unet_in_file(shapes)
        if not unet and not any(key.startswith(UNET) for key in shapes):
            return f"it has no key that begins with {UNET}"
        channels = shapes.get(unet.get("conv_in.weight", ""), (0, 0))
        if len(channels) < 2 or channels[1] not in CHANNELS:
            return f"its U-Net takes neither 4 channels nor 9 (input_blocks.0.0: {list(channels)})"
        flat = any(key.startswith(FLAT) for key in unet.values())
        starts = [f"{spec.folder}." if flat else spec.ldm for spec in self.encoders]
        absent = [start for start in starts if not any(key.startswith(start) for key in shapes)]
        if absent:
            return f"it holds no text encoder {' and '.join(absent)}"
        if not flat:
            return None
        if ("add_embedding.linear_1.weight" in unet) != self.pooled:
            return f"its U-Net {'lacks' if self.pooled else 'has'} an embedding of sizes"
        around = next((len(shapes[at]) for key, at in unet.items() if key.endswith("proj_in.weight")), 0)
        if self.linear is not None and (around == 2) != self.linear:
            return f"its attention lies between {'convolutions' if self.linear else 'linear layers'}"
        return None

    def base_folder(self) -> Path:
        """See `Family`."""
        return configs.folder(self.key)

    def check(self, config: Configs) -> None:
        """See `Family`."""
        from trce_cli.families.clip.config import check
        from trce_cli.families.sd import config as sd

        check(config, self.encoders)
        sd.check(config)

    def told_by_file(
        self,
        shapes: Mapping[str, Shape],
        metadata: Mapping[str, str],
        read: "Callable[[str], Tensor]",
        config: Config,
        is_base: bool,
    ) -> Told:
        """See `Family`."""
        from trce_cli.families.sd import sampling
        from trce_cli.families.sd.shapes import built_by

        names = unet_in_file(shapes)
        bias = names.get(sampling.SD2_BIAS, "") if self.key == "sd2" else None
        told = sampling.told_by_file(shapes, metadata, read, config, is_base, bias)
        text, remarks = text_in_file(self.names(config).from_file(shapes), shapes, read, config)
        told = Told({**told.config, **text}, (*told.notes, *remarks))
        denoiser = told.config.get("denoiser", config["denoiser"])
        if not (said := built_by(denoiser, shapes, names)):
            return told
        notes = (
            ()
            if is_base and not said.keys() - {"time_cond_proj_dim"}
            else (taken_from_weights("Layers", said),)
        )
        found = {**told.config, "denoiser": {**denoiser, **said}}
        if "in_channels" in said:  # what fills in pictures is of another class
            index = found.get("model_index", config["model_index"])
            inpaints = said["in_channels"] == CHANNELS[1]
            name = self.pipeline.replace("Pipeline", "InpaintPipeline") if inpaints else self.pipeline
            found["model_index"] = {**index, "_class_name": name}
        return Told(found, (*told.notes, *notes))

    def marks(self, config: Config) -> tuple[Mapping[str, Sequence[float]], Mapping[str, str]]:
        """See `Family`."""
        from trce_cli.families.sd import sampling

        return sampling.marks(config, configs.tables(self.key))

    def sampling(self, config: Config) -> dict[str, str]:
        """See `Family`."""
        from trce_cli.families.sd import sampling

        return sampling.sampling(config)

    def lost_in_file(self, config: Config) -> list[str]:
        """See `Family`."""
        from trce_cli.families.sd import sampling

        base = configs.tables(self.key)
        return [
            *sampling.lost_in_file(config, base, are_read=self.pooled),
            *(
                f"Other tools refuse a single file whose {spec.folder} has {count:,} {what}."
                for spec in self.encoders
                for key, what in ((POSITIONS, "positions"), ("vocab_size", "tokens"))
                if (count := config[spec.folder][key]) != base[spec.folder][key]
            ),
        ]

    def doors(self, config: Config, keys: Collection[str]) -> tuple[Door, ...]:
        """See `Family`."""
        return doors(config, keys, [spec.folder for spec in self.encoders], self.pooled)

    def widths(self, config: Mapping[str, Any]) -> dict[str, int]:
        """See `Family`."""
        return widths(config, self.pooled)

    def entrance(self, denoiser: "nn.Module") -> "nn.Module":
        """See `Family`: the U-Net itself."""
        return denoiser

    def mapped(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any], change: Callable[[str, "Tensor"], "Tensor"]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """See `Family`."""
        return mapped(args, kwargs, change, self.pooled)

    def text(self, weights: Weights, device: "torch.device | str", dtype: "torch.dtype") -> "ClipText":
        """See `Family`."""
        from trce_cli.families.clip.text import ClipText

        return ClipText(weights, self.encoders, device, dtype)

    def skipped_text(
        self, weights: Weights, device: "torch.device | str", dtype: "torch.dtype", clip_skip: int
    ) -> "ClipText":
        """See `Family`: SDXL is read at one layer by all."""
        from trce_cli.families.clip.text import ClipText

        if clip_skip > (most := max_clip_skip(weights.config, self.encoders)):
            raise BadInput(
                f"{weights.name} is not read with a clip skip of {clip_skip}.",
                f"Its text encoder has {most} layers."
                if most > 1
                else "It reads its text at one layer alone.",
            )
        return ClipText(weights, self.encoders, device, dtype, clip_skip)

    def latents(self, pipe: Any, images: "np.ndarray") -> "Tensor":
        """See `Family`."""
        from trce_cli.families.sd import pipeline

        return pipeline.latents(pipe, images)

    def words(self, pipeline: Any) -> "ClipWords":
        """See `Family`."""
        from trce_cli.families.clip.words import ClipWords

        return ClipWords(pipeline, self.encoders)

    def names(self, config: Config) -> Names:
        """See `Family`."""
        text = self.text_weights(config)
        return Names(
            layers=config["denoiser"].get("layers_per_block", 2),
            text={spec.folder: (spec.ldm, spec.openclip, tuple(text[spec.folder])) for spec in self.encoders},
            ldm_lora=self.pooled,
        )

    def text_weights(self, config: Config) -> dict[str, dict[str, Shape]]:
        """See `Family`."""
        return {spec.folder: clip_weights(config[spec.folder], spec.projects) for spec in self.encoders}

    def weights(self, config: Config, converting: bool) -> dict[str, dict[str, Shape]]:
        """See `Family`."""
        from trce_cli.families.sd.shapes import unet_weights
        from trce_cli.families.shapes import vae_weights

        if converting and config["denoiser"].get("_class_name") == MOTION_UNET:
            raise BadInput("Its U-Net has motion modules, for which the other layout has no names.")
        vae = config["model_index"].get("vae")
        kind = vae[1] if isinstance(vae, list) and len(vae) == 2 else None
        kind = config["vae"].get("_class_name", kind) if kind else kind
        if converting and kind not in (None, "AutoencoderKL"):
            raise BadInput(f"Its VAE is an {kind}, for which the other layout has no names.")
        found = {"denoiser": unet_weights(config["denoiser"])}
        if kind == "AutoencoderKL":
            found["vae"] = vae_weights(config["vae"])
        return {part: weights for part, weights in found.items() if weights is not None}

    def tuned(self, key: str) -> bool:
        """See `Family`: all of self-attention, and the queries of cross-attention."""
        return is_tuned(key)

    def denoise(self, weights: Weights) -> "UNet":
        """See `Family`."""
        from trce_cli.families.sd.denoiser import UNet

        return UNet(weights, self.encoders, self.pooled)

    def canvas(self, weights: Weights) -> Canvas:
        """See `Family`."""
        from trce_cli.families.sd import pipeline

        return pipeline.canvas(weights, self.encoders)

    def truncated(self, weights: Weights, prompts: Sequence[str]) -> tuple[int, int]:
        """See `Family`."""
        from trce_cli.families.clip.load import truncated

        return truncated(weights, self.encoders[0], prompts)

    def room(self, weights: Weights) -> int:
        """See `Family`."""
        return self.truncated(weights, [])[0] - 2  # SoT and EoT

    def pipe(self, weights: Weights, device: "torch.device", dtype: "torch.dtype") -> Any:
        """See `Family`."""
        from trce_cli.families.sd import pipeline

        return pipeline.load(weights, self.pipeline, self.encoders, device, dtype)

    def scheduler(self, pipe: Any, name: str) -> Any:
        """See `Family`."""
        from trce_cli.families.sd import pipeline

        return pipeline.scheduler(pipe, self.schedulers.get(name, name), self.steps_offset)

    @property
    def steps_offset(self) -> Mapping[str, int]:
        """What DDIM adds to its timesteps, where the family's pipeline asks for it."""
        return {} if self.pooled else {"steps_offset": 1}

    def draw(
        self,
        pipe: Any,
        prompts: Sequence[str],
        negative: Sequence[str] | None,
        generators: Sequence["torch.Generator"],
        *,
        steps: int,
        guidance_scale: float,
        width: int,
        height: int,
        clip_skip: int = 1,
    ) -> Any:
        """See `Family`."""
        from trce_cli.families.sd import pipeline

        with pipeline.skipping(pipe, clip_skip):
            return pipeline.draw(
                pipe,
                prompts,
                negative,
                generators,
                num_inference_steps=steps,
                guidance_scale=guidance_scale,
                width=width,
                height=height,
            )

    def redraw(
        self,
        pipe: Any,
        prompt: str,
        negative: str | None,
        generator: "torch.Generator",
        picture: "Image.Image",
        mask: "Image.Image | None",
        *,
        strength: float,
        steps: int,
        guidance_scale: float,
        clip_skip: int = 1,
    ) -> "np.ndarray":
        """See `Redraw`."""
        from trce_cli.families.sd import pipeline

        with pipeline.skipping(pipe, clip_skip):
            return pipeline.redraw(
                pipe,
                picture,
                mask,
                prompt=prompt,
                negative_prompt=negative,
                generator=generator,
                strength=strength,
                num_inference_steps=steps,
                guidance_scale=guidance_scale,
            )


_SLOTS: Final = {"FIRST_EOT": 1.0}  # the paper's
_TAGS: Final = ("stable-diffusion",)
_DOORS: Final = "the keys and values of every cross-attention layer"

SD1 = StableDiffusion(
    "sd1",
    "SD 1.x",
    "StableDiffusionPipeline",
    (
        EncoderSpec(
            "text_encoder", "tokenizer", "CLIPTextModel", "last", "cond_stage_model.transformer.", False
        ),
    ),
    linear=False,
    pooled=False,
    defaults=Defaults(
        7.5, _SLOTS, "sd_v1", _TAGS, _DOORS, "StableDiffusionPipeline"
    ),  # guidance here and below: diffusers' defaults
)
SD2 = StableDiffusion(
    "sd2",
    "SD 2.x",
    "StableDiffusionPipeline",
    (EncoderSpec("text_encoder", "tokenizer", "CLIPTextModel", "last", "cond_stage_model.model.", True),),
    linear=True,
    pooled=False,
    defaults=Defaults(7.5, _SLOTS, "sd_v2", _TAGS, _DOORS, "StableDiffusionPipeline"),
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
    linear=None,
    pooled=True,
    defaults=Defaults(5.0, _SLOTS, "sdxl_base_v1-0", _TAGS, _DOORS, "StableDiffusionXLPipeline"),
)
