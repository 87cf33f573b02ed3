"""T5's encoder and tokenizer as transformers has them, from the weights of a checkpoint."""

from collections.abc import Sequence
from typing import Any

import torch

from trce_cli.errors import BadInput
from trce_cli.families.base import Weights
from trce_cli.families.load import fast_tokenizer, guarded, load_strictly
from trce_cli.families.t5.names import module_name
from trce_cli.families.t5.spec import T5Spec
from trce_cli.families.t5.tokens import Tokenizer


def load_tokenizer(weights: Weights, spec: T5Spec) -> Any:
    """The tokenizer, from local files only; BadInput for a broken one."""
    folder = weights.folder(spec.tokenizer)
    tokenizer = fast_tokenizer(folder)
    if tokenizer.eos_token_id is None or tokenizer("a").input_ids[-1] != tokenizer.eos_token_id:
        raise BadInput(
            f"The tokenizer in {folder} puts no end-of-sequence token behind a prompt, as T5's does."
        )
    rows, known = weights.config[spec.folder]["vocab_size"], tokenizer.get_vocab()
    if max(known.values()) >= rows:
        raise BadInput(
            f"The {spec.folder} has {rows:,} rows, and none for some tokens of the tokenizer in {folder}."
        )
    return guarded(tokenizer, folder)


def truncated(weights: Weights, spec: T5Spec, prompts: Sequence[str]) -> tuple[int, int]:
    """See `Family`, of this encoder: how many tokens it reads, and how many prompts have more."""
    tokens = Tokenizer(load_tokenizer(weights, spec), spec).tokens(prompts)
    return spec.limit, sum(not each.is_whole for each in tokens)


def make_model(config: dict[str, Any]) -> Any:
    """transformers' encoder of this configuration, whose `encoder` is the stack of blocks."""
    import transformers

    return transformers.T5EncoderModel(transformers.T5Config.from_dict(config))


def load_text_encoder(
    weights: Weights, spec: T5Spec, device: torch.device | str, dtype: torch.dtype | None
) -> Any:
    """The encoder on `device` in `dtype` (or the files'); see `load_strictly`.

    In fp16 the layers whose sums overflow it stay float32, as transformers keeps them.
    """

    def kept(key: str) -> torch.dtype | None:
        return torch.float32 if dtype == torch.float16 and key.endswith(".wo.weight") else dtype

    stack = load_strictly(
        lambda config: make_model(config).encoder, weights, spec.folder, device, kept, module_name
    )
    with torch.device("meta"):
        model = make_model(dict(weights.config[spec.folder]))
    model.encoder, model.shared = stack, stack.embed_tokens
    return model.eval()


def t5_parts(weights: Weights, spec: T5Spec, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """T5's encoder and tokenizer by their folders."""
    return {
        spec.folder: load_text_encoder(weights, spec, device, dtype),
        spec.tokenizer: load_tokenizer(weights, spec),
    }
