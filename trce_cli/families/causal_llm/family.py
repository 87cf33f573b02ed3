"""What families have in common that a causal language model tells what to draw, by one linear layer."""

from abc import abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from trce_cli.families.base import Door, Shape, Weights
from trce_cli.families.causal_llm.names import llm_weights, text_config
from trce_cli.families.causal_llm.spec import CONTEXT, SLOTS, LlmSpec
from trce_cli.families.transformer import Config, TransformerFamily

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from trce_cli.families.causal_llm.text import LlmText
    from trce_cli.families.causal_llm.tokens import Tokenizer
    from trce_cli.families.causal_llm.words import LlmWords


class LlmFamily(TransformerFamily):
    """A transformer whose every prompt token passes a norm and then one door; see `families.base.Family`.

    Maps are of normed states. spec: the language model. door: the weight of the linear layer.
    """

    spec: ClassVar[LlmSpec]
    door: ClassVar[str]

    weight_parts: ClassVar = ("text_encoder", "vae")
    other_parts: ClassVar = ("scheduler", "tokenizer")
    streams: ClassVar = (CONTEXT,)
    slots: ClassVar = SLOTS
    fragments: ClassVar[Mapping[str, str]] = {
        "embed_tokens.": "a text encoder",
        "model.embed_tokens.": "a text encoder",
    }

    @abstractmethod
    def norm_eps(self, config: Mapping[str, Any]) -> float:
        """What the norm before the door adds to the mean square, by the denoiser's configuration."""

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
