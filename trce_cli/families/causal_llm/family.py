"""What families have in common that a causal language model tells what to draw, by one linear layer."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from trce_cli.errors import BadInput
from trce_cli.families.base import Configs, Door, Names, Shape, Told, Weights
from trce_cli.families.causal_llm.names import llm_weights, text_config
from trce_cli.families.causal_llm.spec import CONTEXT, SLOTS, LlmSpec

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import Tensor, nn

    from trce_cli.families.causal_llm.text import LlmText
    from trce_cli.families.causal_llm.tokens import Tokenizer
    from trce_cli.families.causal_llm.words import LlmWords

Config = Mapping[str, Mapping[str, Any]]


class LlmFamily(ABC):
    """A transformer whose every prompt token passes a norm and then one door; see `families.base.Family`.

    Maps are of normed states. spec: the language model. door: the weight of the linear layer. pipelines: the
    classes of diffusers that draw with it. repository: one that has the parts that single files lack.
    """

    key: ClassVar[str]
    name: ClassVar[str]
    spec: ClassVar[LlmSpec]
    door: ClassVar[str]
    pipelines: ClassVar[tuple[str, ...]]
    repository: ClassVar[str]

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

    @abstractmethod
    def names(self, config: Config) -> Names:
        """See `Family`."""

    @abstractmethod
    def norm_eps(self, config: Mapping[str, Any]) -> float:
        """What the norm before the door adds to the mean square, by the denoiser's configuration."""

    @abstractmethod
    def pipeline(self) -> Any:
        """The module of the family's folder that has `load`, `draw` and `latents` of its pipeline.

        It is imported only here, since libraries come with it.
        """

    def claims(self, config: Configs) -> str | None:
        """See `Family`."""
        index = config["model_index"]
        if (pipeline := index.get("_class_name")) not in self.pipelines:
            return f"its pipeline is {pipeline}"
        entry = index.get(self.spec.folder)
        found = entry[1] if isinstance(entry, list) and len(entry) == 2 else None
        classes = self.spec.classes
        return None if found in classes else f"its {self.spec.folder} is {found}, not {classes[0]}"

    def base_folder(self) -> Path:
        """See `Family`: its tokenizer is too large to come along."""
        raise BadInput(
            f"Such a file holds the transformer of {self.name} alone, neither text encoder nor tokenizer.",
            "Name a diffusers folder or hub id that has them with --config, for example "
            f"--config {self.repository}.",
        )

    def told_by_file(
        self,
        shapes: Mapping[str, Shape],
        metadata: Mapping[str, str],
        read: "Callable[[str], Tensor]",
        config: Config,
        is_base: bool,
    ) -> Told:
        """See `Family`: nothing, these files are sampled as their family is."""
        return Told()

    def marks(self, config: Config) -> tuple[dict[str, Sequence[float]], dict[str, str]]:
        """See `Family`: there are none."""
        return {}, {}

    def weights(self, config: Config, converting: bool) -> dict[str, dict[str, Shape]]:
        """See `Family`: the text encoder's alone."""
        return {}

    def sampling(self, config: Config) -> dict[str, str]:
        """See `Family`."""
        return {"scheduler": str(config["scheduler"].get("_class_name")), "predicts": "flow velocity"}

    def lost_in_file(self, config: Config) -> list[str]:
        """See `Family`: nothing."""
        return []

    def doors(self, config: Config, keys: Collection[str]) -> tuple[Door, ...]:
        """See `Family`."""
        weights = tuple(key for key in (self.door,) if key in keys)
        return (Door(self.door.partition(".")[0], CONTEXT, weights, self._width(config)),)

    def text_weights(self, config: Config) -> dict[str, dict[str, Shape]]:
        """See `Family`."""
        part = self.spec.folder
        norm: dict[str, Shape] = {self.spec.norm: (self._width(config),)}
        return {part: llm_weights(self.spec, config[part]), "denoiser": norm}

    def _width(self, config: Config) -> int:
        width: int = text_config(config[self.spec.folder])["hidden_size"]
        return width

    def text(self, weights: Weights, device: "torch.device | str", dtype: "torch.dtype") -> "LlmText":
        """See `Family`."""
        from trce_cli.families.causal_llm.text import LlmText

        return LlmText(weights, self.spec, self.norm_eps(weights.config["denoiser"]), device, dtype)

    def _tokenizer(self, weights: Weights) -> "Tokenizer":
        from trce_cli.families.causal_llm.load import load_tokenizer
        from trce_cli.families.causal_llm.tokens import Tokenizer

        return Tokenizer(load_tokenizer(weights, self.spec), self.spec)

    def truncated(self, weights: Weights, prompts: Sequence[str]) -> tuple[int, int]:
        """See `Family`; the template counts."""
        tokens = self._tokenizer(weights).tokens(prompts)
        return self.spec.limit, sum(not each.is_whole for each in tokens)

    def room(self, weights: Weights) -> int:
        """See `Family`."""
        (empty,) = self._tokenizer(weights).tokens([""])
        return self.spec.limit - len(empty.ids)

    def pipe(self, weights: Weights, device: "torch.device", dtype: "torch.dtype") -> Any:
        """See `Family`."""
        return self.pipeline().load(weights, self.spec, device, dtype)

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
        """See `Family`: there is no CLIP of which layers could be skipped, and the canvas allows none."""
        return self.pipeline().draw(
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
        found: Tensor = self.pipeline().latents(pipe, images)
        return found

    def scheduler(self, pipe: Any, name: str) -> Any:
        """See `Family`: there is the one that the checkpoint comes with."""
        return pipe.scheduler

    def words(self, pipeline: Any) -> "LlmWords":
        """See `Family`."""
        from trce_cli.families.causal_llm.words import LlmWords

        return LlmWords(pipeline, self.spec)

    def entrance(self, denoiser: "nn.Module") -> "nn.Module":
        """See `Family`: the door itself, behind its norm."""
        return denoiser.get_submodule(self.door.removesuffix(".weight"))

    def mapped(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any], change: Callable[[str, "Tensor"], "Tensor"]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """See `Family`."""
        return (change(CONTEXT, args[0]), *args[1:]), dict(kwargs)
