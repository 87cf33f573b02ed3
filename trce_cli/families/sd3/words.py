"""The text encoders as an attack sees them: words that all read as one token, and their embeddings."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from trce_cli.families.clip.spec import CONTEXT
from trce_cli.families.clip.words import ClipWords
from trce_cli.families.sd3.spec import CLIPS, T5
from trce_cli.families.t5.words import T5Words
from trce_cli.families.words import EncodersWords, common


class Sd3Words(EncodersWords):
    """All encoders of a pipeline, both CLIP's embeddings first; see `families.base.Words`."""

    def __init__(self, pipeline: Any) -> None:
        self.clip = ClipWords(pipeline, CLIPS)
        self.t5 = None if pipeline.text_encoder_3 is None else T5Words(pipeline, T5)
        self.width: int = pipeline.transformer.config.joint_attention_dim
        every: list[EncodersWords] = [self.clip] if self.t5 is None else [self.clip, self.t5]
        self.words, self.rows = common(*((each.words, each.rows) for each in every))
        self.tables = [table for each in every for table in each.tables]
        self.begins = [begin for each in every for begin in each.begins]
        self.check()

    def ids(self, prompts: Sequence[str]) -> list[Tensor]:
        """Token ids for each encoder, (prompts, tokens), padded and cut as the pipeline does."""
        return [*self.clip.ids(prompts), *(self.t5.ids(prompts) if self.t5 else [])]

    def __call__(self, ids: Sequence[Tensor], prefix: Tensor | None = None) -> dict[str, Tensor]:
        """What enters by each stream, in the encoders' dtype; zeros where T5 would be."""
        count, behind = len(CLIPS), None
        parts = None if prefix is None else self.parts(prefix)
        found = self.clip(ids[:count], None if parts is None else torch.cat(list(parts[:count]), -1))
        context = found[CONTEXT]
        if self.t5:
            behind = self.t5(ids[count:], None if parts is None else parts[count])[CONTEXT].to(context)
        else:
            behind = context.new_zeros(len(context), T5.limit, self.width)
        context = pad(context, (0, self.width - context.shape[-1]))
        return {**found, CONTEXT: torch.cat([context, behind], 1)}
