"""CLIP's tokenizers and text encoders as transformers has them, from the weights of a checkpoint."""

from collections.abc import Sequence
from typing import Any, Final

import torch

from trce_cli.errors import BadInput, refusing
from trce_cli.families.base import Configs, Weights
from trce_cli.families.clip.names import CONFIG, MOST_POSITIONS, POSITIONS, published
from trce_cli.families.clip.spec import EncoderSpec
from trce_cli.families.load import check_files, guarded, load_strictly

# What a text encoder's configuration may ask for: sizes are memory, and layers are built one by one.
MOST: Final = {
    "hidden_size": 1 << 16,
    "num_hidden_layers": 256,
    "vocab_size": 1 << 20,
    POSITIONS: MOST_POSITIONS,
    "projection_dim": 1 << 16,
    "intermediate_size": 1 << 18,
    "num_attention_heads": 1 << 10,
}


def check(config: Configs, specs: Sequence[EncoderSpec]) -> None:
    """Raise BadInput where a text encoder's configuration lacks a size, or a tokenizer is not there."""
    for spec in specs:
        counts = ["hidden_size", "num_hidden_layers", "vocab_size", "max_position_embeddings"]
        counts += ["intermediate_size", "num_attention_heads"]
        counts += ["projection_dim"] * spec.projects
        for key in counts:
            value = {**CONFIG, **config[spec.folder]}.get(key)
            where = config.path / spec.folder / "config.json"
            if type(value) is not int or value < 1:
                raise BadInput(f"{where}: {key} is {str(value)[:100]!r}, not a positive number.")
            if value > MOST[key]:
                raise BadInput(f"{where}: {key} is {value:,}, which is more than {MOST[key]:,}.")
    for spec in specs:
        folder = config.path / spec.tokenizer
        if not (folder / "vocab.json").is_file() and not (folder / "tokenizer.json").is_file():
            raise BadInput(
                f"{folder} holds no tokenizer: neither vocab.json with merges.txt nor tokenizer.json."
            )


def load_tokenizers(weights: Weights, specs: Sequence[EncoderSpec]) -> list[Any]:
    """The tokenizers, one for each text encoder, from local files only; BadInput for a broken one."""
    from transformers import CLIPTokenizerFast  # since transformers 5 another name of CLIPTokenizer

    found = []
    for spec in specs:
        folder = weights.folder(spec.tokenizer)
        check_files(folder)
        with refusing(f"The tokenizer in {folder} cannot be read"):
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
