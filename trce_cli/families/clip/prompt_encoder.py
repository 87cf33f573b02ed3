"""Text encoders as an attack sees them: words it may use, and what the U-Net is told, with gradients."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from trce_cli.errors import BadInput
from trce_cli.families.sd.family import StableDiffusion


class PromptEncoder:
    """The text encoders of a pipeline, differentiable in the embeddings of a prompt's first words.

    words: the tokens that are whole words of ASCII letters. All tokenizers of the family read a text of them
    as exactly these tokens, so that what was optimised is what a user types. Elsewhere a word is its place in
    this list. table: the words' embeddings, of all encoders side by side, float32 (words, dim).
    """

    def __init__(self, pipeline: Any, family: StableDiffusion) -> None:
        self.specs, self.pooled = family.encoders, family.pooled
        self.tokenizers = [getattr(pipeline, spec.tokenizer) for spec in self.specs]
        self.encoders = [getattr(pipeline, spec.folder).requires_grad_(False) for spec in self.specs]
        self.device = self.encoders[0].device
        self.words, self._ids = whole_words(self.tokenizers)
        if not self.words:
            raise BadInput("The checkpoint's tokenizer has no token that is a whole word.")
        self.table = torch.cat(
            [
                encoder.get_input_embeddings().weight[ids.to(self.device)].float()
                for encoder, ids in zip(self.encoders, self._ids, strict=True)
            ],
            1,
        )

    def text(self, words: Tensor) -> str:
        """The words, (length,), as a text."""
        return " ".join(self.words[word] for word in words.tolist())

    def ids(self, prompts: Sequence[str]) -> list[Tensor]:
        """Token ids for each encoder, (prompts, tokens), padded and cut as the pipeline does."""
        return [
            tokenizer(
                list(prompts),
                padding="max_length",
                max_length=tokenizer.model_max_length,
                truncation=True,
                return_tensors="pt",
            ).input_ids
            for tokenizer in self.tokenizers
        ]

    def word_ids(self, words: Tensor) -> list[Tensor]:
        """Token ids for each encoder of texts of words, (texts, length), that fit into a prompt."""
        count, length = words.shape
        found = []
        for blank, ids in zip(self.ids([self.text(words[0])]), self._ids, strict=True):
            found.append(blank.repeat(count, 1))
            found[-1][:, 1 : 1 + length] = ids[words]
        return found

    def __call__(self, ids: Sequence[Tensor], prefix: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Context (prompts, tokens, width) and SDXL's pooled embedding, in the encoders' dtype.

        prefix: embeddings in place of those of the first words, (prompts, words, dim of `table`).
        """
        context, pooled, begin = [], None, 0
        for spec, encoder, tokens in zip(self.specs, self.encoders, ids, strict=True):
            embedding = encoder.get_input_embeddings()
            end = begin + embedding.embedding_dim
            with _prefixed(embedding, None if prefix is None else prefix[..., begin:end]):
                found = encoder(tokens.to(self.device), output_hidden_states=True)
            last = spec.hidden == "last"
            context.append(found.last_hidden_state if last else found.hidden_states[-2])
            pooled = found.text_embeds if self.pooled and "text_embeds" in found else pooled
            begin = end
        return torch.cat(context, -1), pooled


def whole_words(tokenizers: Sequence[Any]) -> tuple[list[str], list[Tensor]]:
    """Words that each tokenizer reads as the one token of that name, and the tokens' ids by tokenizer."""
    vocabularies = [tokenizer.get_vocab() for tokenizer in tokenizers]
    named = {token.removesuffix("</w>") for token in vocabularies[0] if token.endswith("</w>")}
    tried = sorted(word for word in named if word.isascii() and word.isalpha())
    read = [tokenizer(tried, add_special_tokens=False).input_ids if tried else [] for tokenizer in tokenizers]
    words = [
        word
        for place, word in enumerate(tried)
        if all(
            ids[place] == [known.get(f"{word}</w>")] for ids, known in zip(read, vocabularies, strict=True)
        )
    ]
    return words, [torch.tensor([known[f"{word}</w>"] for word in words]) for known in vocabularies]


@contextmanager
def _prefixed(embedding: nn.Module, prefix: Tensor | None) -> Iterator[None]:
    """Token embeddings with `prefix` after SoT."""
    if prefix is None:
        yield
        return

    def replaced(module: nn.Module, ids: Any, found: Tensor) -> Tensor:
        return torch.cat([found[:, :1], prefix.to(found.dtype), found[:, 1 + prefix.shape[1] :]], 1)

    handle = embedding.register_forward_hook(replaced)
    try:
        yield
    finally:
        handle.remove()
