"""Z-Image, base and Turbo: the states of Qwen3 enter a transformer of single streams by one linear layer."""

from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Final

from trce_cli.errors import BadInput
from trce_cli.families.base import Canvas, Configs, Defaults, Door, Shape, Weights
from trce_cli.families.causal_llm.names import llm_weights, text_config
from trce_cli.families.causal_llm.spec import CONTEXT, SLOTS, LlmSpec
from trce_cli.families.z_image.names import DOOR, NORM, PREFIX, Names, is_tuned

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import Tensor, nn

    from trce_cli.families.causal_llm.text import LlmText
    from trce_cli.families.z_image.denoiser import Transformer

Config = Mapping[str, Mapping[str, Any]]

QWEN3: Final = LlmSpec("qwen3", ("Qwen3Model", "Qwen3ForCausalLM"), "penultimate", 512, NORM)
PIPELINES: Final = ("ZImagePipeline", "ZImageImg2ImgPipeline", "ZImageInpaintPipeline")


class ZImage:
    """The family; see `families.base.Family`.

    The tokens of a prompt in its chat template pass a norm (`cap_embedder.0`) and then the door
    (`cap_embedder.1`): maps are of normed states.
    """

    key: ClassVar = "z-image"
    name: ClassVar = "Z-Image"
    denoiser: ClassVar = "transformer"
    network: ClassVar = "transformer"
    weight_parts: ClassVar = ("text_encoder", "vae")
    other_parts: ClassVar = ("scheduler", "tokenizer")
    streams: ClassVar = (CONTEXT,)
    slots: ClassVar = SLOTS
    schedulers: ClassVar[Mapping[str, str]] = {"euler": "FlowMatchEulerDiscreteScheduler"}
    fragments: ClassVar[Mapping[str, str]] = {
        "embed_tokens.": "a text encoder",
        "model.embed_tokens.": "a text encoder",
    }
    # The slot: measured on a small trained model of this format. Guidance: diffusers' default for it.
    defaults: ClassVar = Defaults(
        5.0, {"END": 1.0}, "z_image", ("z-image",), "the one layer by which the prompt enters"
    )

    def claims(self, config: Configs) -> str | None:
        """See `Family`."""
        index = config["model_index"]
        if (pipeline := index.get("_class_name")) not in PIPELINES:
            return f"its pipeline is {pipeline}"
        if config["denoiser"].get("siglip_feat_dim") is not None:
            return "its transformer reads pictures as well"
        entry = index.get(QWEN3.folder)
        found = entry[1] if isinstance(entry, list) and len(entry) == 2 else None
        return None if found in QWEN3.classes else f"its text_encoder is {found}, not {QWEN3.classes[0]}"

    def claims_file(self, shapes: Mapping[str, Shape]) -> str | None:
        """See `Family`."""
        keys = {key.removeprefix(PREFIX) for key in shapes}
        if DOOR not in keys or "cap_pad_token" not in keys or "layers.0.attention.qkv.weight" not in keys:
            return f"it has no {DOOR} with a cap_pad_token, as Z-Image has"
        return "its transformer reads pictures as well" if "siglip_pad_token" in keys else None

    def base_folder(self) -> Path:
        """See `Family`: its tokenizer is too large to come along."""
        raise BadInput(
            f"Such a file holds the transformer of {self.name} alone, neither text encoder nor tokenizer.",
            "Name a diffusers folder or hub id that has them with --config, for example "
            "--config Tongyi-MAI/Z-Image-Turbo.",
        )

    def check(self, config: Configs) -> None:
        """See `Family`."""
        from trce_cli.families.z_image.config import check

        check(config, QWEN3)

    def doors(self, config: Config, keys: Collection[str]) -> tuple[Door, ...]:
        """See `Family`."""
        width = text_config(config[QWEN3.folder])["hidden_size"]
        return (Door("cap_embedder", CONTEXT, tuple(key for key in (DOOR,) if key in keys), width),)

    def widths(self, config: Mapping[str, Any]) -> dict[str, int]:
        """See `Family`."""
        return {CONTEXT: config.get("cap_feat_dim", 2560)}

    def names(self, config: Config) -> Names:
        """See `Family`."""
        return Names()

    def text_weights(self, config: Config) -> dict[str, dict[str, Shape]]:
        """See `Family`."""
        width = text_config(config[QWEN3.folder])["hidden_size"]
        return {QWEN3.folder: llm_weights(QWEN3, config[QWEN3.folder]), "denoiser": {NORM: (width,)}}

    def tuned(self, key: str) -> bool:
        """See `Family`: the attention of the main layers."""
        return is_tuned(key)

    def text(self, weights: Weights, device: "torch.device | str", dtype: "torch.dtype") -> "LlmText":
        """See `Family`."""
        from trce_cli.families.causal_llm.text import LlmText
        from trce_cli.families.z_image.config import transformer

        return LlmText(weights, QWEN3, transformer(weights.config["denoiser"]).norm_eps, device, dtype)

    def denoise(self, weights: Weights) -> "Transformer":
        """See `Family`."""
        from trce_cli.families.z_image.denoiser import Transformer

        return Transformer(weights, QWEN3)

    def canvas(self, weights: Weights) -> Canvas:
        """See `Family`."""
        from trce_cli.families.z_image.config import canvas

        return canvas(weights)

    def truncated(self, weights: Weights, prompts: Sequence[str]) -> tuple[int, int]:
        """See `Family`: of the template as well."""
        from trce_cli.families.causal_llm.load import load_tokenizer
        from trce_cli.families.causal_llm.tokens import Tokenizer

        tokens = Tokenizer(load_tokenizer(weights, QWEN3), QWEN3).tokens(prompts)
        return QWEN3.limit, sum(not each.is_whole for each in tokens)

    def room(self, weights: Weights) -> int:
        """See `Family`."""
        from trce_cli.families.causal_llm.load import load_tokenizer
        from trce_cli.families.causal_llm.tokens import Tokenizer

        (empty,) = Tokenizer(load_tokenizer(weights, QWEN3), QWEN3).tokens([""])
        return QWEN3.limit - len(empty.ids)

    def pipe(self, weights: Weights, device: "torch.device", dtype: "torch.dtype") -> Any:
        """See `Family`."""
        from trce_cli.families.z_image import pipeline

        return pipeline.load(weights, QWEN3, device, dtype)

    def scheduler(self, pipe: Any, name: str) -> Any:
        """See `Family`: there is the one that the checkpoint comes with."""
        return pipe.scheduler

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
    ) -> Any:
        """See `Family`."""
        from trce_cli.families.z_image import pipeline

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

    def latents(self, pipe: Any, images: "np.ndarray") -> "Tensor":
        """See `Family`."""
        from trce_cli.families.z_image import pipeline

        return pipeline.latents(pipe, images)

    def words(self, pipeline: Any) -> None:
        """See `Family`: the words of a language model are not searched yet."""
        return

    def entrance(self, denoiser: "nn.Module") -> "nn.Module":
        """See `Family`: the door itself, behind its norm."""
        return denoiser.get_submodule(DOOR.removesuffix(".weight"))

    def mapped(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any], change: Callable[[str, "Tensor"], "Tensor"]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """See `Family`."""
        return (change(CONTEXT, args[0]), *args[1:]), dict(kwargs)


Z_IMAGE: Final = ZImage()
