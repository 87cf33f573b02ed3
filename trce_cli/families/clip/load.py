"""CLIP's tokenizers and text encoders as transformers has them, from the weights of a checkpoint."""

from collections.abc import Sequence
from typing import Any

import torch

from trce_cli.errors import refusing
from trce_cli.families.base import Weights
from trce_cli.families.clip.names import published
from trce_cli.families.clip.spec import EncoderSpec
from trce_cli.families.load import guarded, load_strictly
from trce_cli.families.tokenizer_files import AGAIN


def load_tokenizers(weights: Weights, specs: Sequence[EncoderSpec]) -> list[Any]:
    """The tokenizers, one for each text encoder, from local files only; BadInput for a broken one."""
    from transformers import CLIPTokenizerFast  # since transformers 5 another name of CLIPTokenizer

    found = []
    for spec in specs:
        folder = weights.folder(spec.tokenizer)
        with refusing(f"The tokenizer in {folder} cannot be read", AGAIN):
            tokenizer = CLIPTokenizerFast.from_pretrained(folder, local_files_only=True)
            # A configuration that is absent, or silent, says 10^30, for which the library asks memory.
            positions = weights.config[spec.folder]["max_position_embeddings"]
            tokenizer.model_max_length = min(tokenizer.model_max_length, positions)
            if not isinstance(tokenizer.model_max_length, int) or tokenizer.model_max_length < 3:
                raise ValueError(f"its model_max_length is {tokenizer.model_max_length}")
            rows, known = weights.config[spec.folder]["vocab_size"], tokenizer.get_vocab()
            if known and max(known.values()) >= rows:
                beyond = sorted(token for token, number in known.items() if number >= rows)
                raise ValueError(
                    f"the {spec.folder} has {rows:,} rows and none for {len(beyond)} tokens such as "
                    f"{beyond[0][:40]!r}"
                )
        found.append(guarded(tokenizer, folder))
    return found


def truncated(weights: Weights, spec: EncoderSpec, prompts: Sequence[str]) -> tuple[int, int]:
    """See `Family`, of this text encoder: how many tokens it reads, and how many prompts have more."""
    (tokenizer,) = load_tokenizers(weights, [spec])
    ids = tokenizer(list(prompts), truncation=False, verbose=False).input_ids if prompts else []
    limit: int = tokenizer.model_max_length
    return limit, sum(len(row) > limit for row in ids)


def load_text_encoders(
    weights: Weights,
    specs: Sequence[EncoderSpec],
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
) -> list[Any]:
    """The text encoders on `device`, in `dtype` (or the files'); see `load_strictly`."""
    return [_load(weights, spec, device, dtype) for spec in specs]


def _load(weights: Weights, spec: EncoderSpec, device: torch.device | str, dtype: torch.dtype | None) -> Any:
    import transformers

    def make(config: dict[str, Any]) -> Any:
        return getattr(transformers, spec.model_class)(transformers.CLIPTextConfig.from_dict(config))

    model = load_strictly(make, weights, spec.folder, device, lambda key: dtype, published)
    embeddings = getattr(model, "text_model", model).embeddings
    embeddings.position_ids = torch.arange(embeddings.position_ids.shape[-1], device=device).expand((1, -1))
    return model
