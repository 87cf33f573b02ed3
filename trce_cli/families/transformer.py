"""What families have in common whose denoiser is a transformer that matches flows, in a folder of its own."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from trce_cli.errors import BadInput
from trce_cli.families.base import (
    Canvas,
    Configs,
    Defaults,
    Names,
    Shape,
    Text,
    Told,
    Weights,
    taken_from_weights,
)
from trce_cli.families.shapes import vae_weights

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import Tensor

Config = Mapping[str, Mapping[str, Any]]


class TransformerFamily(ABC):
    """Files may hold the transformer alone, and Euler's method samples all; see `families.base.Family`.

    transformer: its class in diffusers. encoders: the text encoders' folders, and the classes that each may
    be of. pipelines: the classes of diffusers that draw with it. repository: one that has the parts that
    single files lack. layers: what a configuration calls the number of layers whose weights' names begin so.
    """

    key: ClassVar[str]
    name: ClassVar[str]
    transformer: ClassVar[str]
    encoders: ClassVar[Mapping[str, tuple[str, ...]]]
    pipelines: ClassVar[tuple[str, ...]]
    repository: ClassVar[str]
    defaults: ClassVar[Defaults]
    weight_parts: ClassVar[tuple[str, ...]]
    other_parts: ClassVar[tuple[str, ...]]
    streams: ClassVar[tuple[str, ...]]
    slots: ClassVar[tuple[str, ...]]
    fragments: ClassVar[Mapping[str, str]]
    layers: ClassVar[Mapping[str, str]]

    denoiser: ClassVar = "transformer"
    network: ClassVar = "transformer"
    schedulers: ClassVar[Mapping[str, str]] = {"euler": "FlowMatchEulerDiscreteScheduler"}
    redraw: ClassVar = None

    @abstractmethod
    def names(self, config: Config) -> Names:
        """See `Family`."""

    @abstractmethod
    def pipeline(self) -> Any:
        """The module of the family's folder that has `load`, `draw` and `latents` of its pipeline.

        It is imported only here, since libraries come with it.
        """

    def canvas(self, weights: Weights) -> Canvas:
        """See `Family`: by the autoencoder, two latents a token."""
        from trce_cli.families.flow_config import canvas

        return canvas(weights)

    def skipped_text(
        self, weights: Weights, device: "torch.device | str", dtype: "torch.dtype", clip_skip: int
    ) -> Text:
        """See `Family`: all read it at one layer."""
        if clip_skip > 1:
            raise BadInput(
                f"{weights.name} is not read with a clip skip of {clip_skip}.",
                "It reads its text at one layer alone.",
            )
        return self.text(weights, device, dtype)

    @abstractmethod
    def text(self, weights: Weights, device: "torch.device | str", dtype: "torch.dtype") -> Text:
        """See `Family`."""

    def claims(self, config: Configs) -> str | None:
        """See `Family`."""
        index = config["model_index"]
        if (pipeline := index.get("_class_name")) not in self.pipelines:
            return f"its pipeline is {pipeline}"
        for folder, classes in {self.denoiser: (self.transformer,), **self.encoders}.items():
            entry = index.get(folder)
            found = entry[1] if isinstance(entry, list) and len(entry) == 2 else None
            if found not in classes:
                return f"its {folder} is {found}, not {classes[0]}"
        return None

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
        """See `Family`: how many layers there are, of which pruned models have fewer."""
        found, wanted = self.names(config).from_file(shapes)["denoiser"], self.shapes(config["denoiser"])
        said = {
            key: count
            for key, start in self.layers.items()
            if (count := _numbered(found, start)) not in (0, _numbered(wanted, start))
        }
        if not said:
            return Told()
        return Told({"denoiser": {**config["denoiser"], **said}}, (taken_from_weights("Layers", said),))

    def marks(self, config: Config) -> tuple[dict[str, Sequence[float]], dict[str, str]]:
        """See `Family`: there are none."""
        return {}, {}

    def weights(self, config: Config, converting: bool) -> dict[str, dict[str, Shape]]:
        """See `Family`: single files hold the transformer alone."""
        found: dict[str, dict[str, Shape] | None] = {"denoiser": self.shapes(config["denoiser"])}
        if not converting:
            found["vae"] = self.vae_shapes(config["vae"])
        return {part: weights for part, weights in found.items() if weights is not None}

    @abstractmethod
    def shapes(self, config: Mapping[str, Any]) -> dict[str, Shape]:
        """Of all weights of a transformer of this configuration."""

    def vae_shapes(self, config: Mapping[str, Any]) -> dict[str, Shape] | None:
        """Of all weights of an autoencoder of this configuration; None where they cannot be told."""
        return vae_weights(config)

    def sampling(self, config: Config) -> dict[str, str]:
        """See `Family`."""
        return {"scheduler": str(config["scheduler"].get("_class_name")), "predicts": "flow velocity"}

    def lost_in_file(self, config: Config) -> list[str]:
        """See `Family`: nothing."""
        return []

    def pipe(self, weights: Weights, device: "torch.device", dtype: "torch.dtype") -> Any:
        """See `Family`."""
        return self.pipeline().load(weights, device, dtype)

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


def _numbered(names: Collection[str], start: str) -> int:
    """How many there are, numbered from 0 on, of what names begin so; 0 where a number is left out."""
    found = {name.removeprefix(start).partition(".")[0] for name in names if name.startswith(start)}
    return len(found) if found == {str(number) for number in range(len(found))} else 0
