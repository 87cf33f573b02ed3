"""Text encoders as an attack sees them: words that it may use, and their embeddings."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from trce_cli.families.clip.models import ClipModels
from trce_cli.families.clip.spec import EncoderSpec
from trce_cli.families.load import spread
from trce_cli.families.words import EncodersWords


class ClipWords(ClipModels, EncodersWords):
    """The text encoders of a pipeline, differentiable in a prompt's first words; see `families.base.Words`.

    words: the tokens that are whole words of ASCII letters. All tokenizers of the family read a text of them
    as exactly these tokens, so that what was optimised is what a user types. table: their embeddings, of all
    encoders side by side.
    """

    def __init__(self, pipeline: Any, specs: Sequence[EncoderSpec]) -> None:
        tokenizers, encoders = (
            [getattr(pipeline, name) for name in names]
            for names in zip(*((spec.tokenizer, spec.folder) for spec in specs), strict=True)
        )
        super().__init__(specs, tokenizers, [encoder.requires_grad_(False) for encoder in encoders])
        self.words, self.rows = whole_words(tokenizers)
        self.tables = [encoder.get_input_embeddings().weight for encoder in encoders]
        self.begins = [1] * len(encoders)  # SoT
        self.check()


def whole_words(tokenizers: Sequence[Any], count: int | None = None) -> tuple[list[str], list[Tensor]]:
    """Words that each tokenizer reads as the one token of that name, and the tokens' ids by tokenizer.

    In alphabetical order; with `count` up to so many, spread evenly over the first vocabulary, in its order.
    """
    vocabularies = [tokenizer.get_vocab() for tokenizer in tokenizers]
    ends = ((token, row) for token, row in vocabularies[0].items() if token.endswith("</w>"))
    rank = {token.removesuffix("</w>"): row for token, row in ends}
    tried = spread((word for word in rank if word.isascii() and word.isalpha()), rank, count)
    read = [tokenizer(tried, add_special_tokens=False).input_ids if tried else [] for tokenizer in tokenizers]
    words = [
        word
        for place, word in enumerate(tried)
        if all(
            ids[place] == [known.get(f"{word}</w>")] for ids, known in zip(read, vocabularies, strict=True)
        )
    ]
    return words, [torch.tensor([known[f"{word}</w>"] for word in words]) for known in vocabularies]
