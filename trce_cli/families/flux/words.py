"""FLUX.1's text encoders as an attack sees them: words that both read as one token, and their embeddings."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from trce_cli.families.clip.models import prefixed
from trce_cli.families.clip.words import whole_words
from trce_cli.families.flux.spec import POOLED, t5
from trce_cli.families.t5.words import T5Words
from trce_cli.families.words import common


class FluxWords(T5Words):
    """Both encoders, T5's embeddings first; see `T5Words`."""

    def __init__(self, pipeline: Any) -> None:
        super().__init__(pipeline, t5(pipeline.transformer.config))
        self.clip, self.clip_tokenizer = pipeline.text_encoder.requires_grad_(False), pipeline.tokenizer
        self.words, self.rows = common((self.words, self.rows), whole_words([self.clip_tokenizer]))
        self.tables.append(self.clip.get_input_embeddings().weight)
        self.begins.append(1)  # SoT
        self.check()

    def ids(self, prompts: Sequence[str]) -> list[Tensor]:
        """Token ids for T5 and for CLIP, (prompts, tokens), padded and cut as the pipeline does."""
        theirs = self.clip_tokenizer(
            list(prompts),
            padding="max_length",
            max_length=self.clip_tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        ).input_ids
        return [*super().ids(prompts), theirs]

    def __call__(self, ids: Sequence[Tensor], prefix: Tensor | None = None) -> dict[str, Tensor]:
        """What enters by each stream, in the encoders' dtype."""
        own, theirs = (None, None) if prefix is None else self.parts(prefix)
        with prefixed(self.clip.get_input_embeddings(), theirs):
            pooled = self.clip(ids[1].to(self.clip.device)).pooler_output
        return {**super().__call__(ids, own), POOLED: pooled}
