"""What families have in common that a causal language model tells what to draw, by one linear layer."""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from trce_cli.families.base import Door, Shape, Weights
from trce_cli.families.causal_llm.names import llm_weights, states_width
from trce_cli.families.causal_llm.spec import CONTEXT, SLOTS, LlmSpec
from trce_cli.families.transformer import Config, TransformerFamily

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from trce_cli.families.causal_llm.text import LlmText
    from trce_cli.families.causal_llm.tokens import Tokenizer
    from trce_cli.families.causal_llm.words import LlmWords


class LlmFamily(TransformerFamily):
    """A transformer whose every prompt token passes one door, some behind a norm; see `families.base.Family`.

    Maps are of what meets the door. spec: the language model. door: the weight of the linear layer.
    """

    spec: ClassVar[LlmSpec]
    door: ClassVar[str]

    weight_parts: ClassVar = ("text_encoder", "vae")
    other_parts: ClassVar = ("scheduler", "tokenizer")
    streams: ClassVar = (CONTEXT,)
    slots: ClassVar[tuple[str, ...]] = SLOTS
    fragments: ClassVar[Mapping[str, str]] = {
        "embed_tokens.": "a text encoder",
        "model.embed_tokens.": "a text encoder",
    }

    def norm_eps(self, config: Mapping[str, Any]) -> float:
        """What a norm before the door adds to the mean square, by the denoiser's configuration."""
        return 0.0

    def doors(self, config: Config, keys: Collection[str]) -> tuple[Door, ...]:
        """See `Family`."""
        weights = tuple(key for key in (self.door,) if key in keys)
        return (Door(self.door.partition(".")[0], CONTEXT, weights, self._width(config)),)

    def text_weights(self, config: Config) -> dict[str, dict[str, Shape]]:
        """See `Family`."""
        part, norm = self.spec.folder, self.spec.norm
        before: dict[str, Shape] = {norm: (self._width(config),)} if norm else {}
        return {part: llm_weights(self.spec, config[part]), "denoiser": before}

    def _width(self, config: Config) -> int:
        return states_width(self.spec, config[self.spec.folder])

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
        """See `Family`: the door itself, behind a norm."""
        return denoiser.get_submodule(self.door.removesuffix(".weight"))

    def mapped(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any], change: Callable[[str, "Tensor"], "Tensor"]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """See `Family`."""
        return (change(CONTEXT, args[0]), *args[1:]), dict(kwargs)
