"""CLIP's tokenizers and text encoders as transformers has them, from the weights of a checkpoint."""

from collections.abc import Sequence
from typing import Any

import torch

from trce_cli.errors import BadInput, first_line
from trce_cli.families.base import Configs, Weights
from trce_cli.families.clip.names import published
from trce_cli.families.clip.spec import EncoderSpec
from trce_cli.families.load import load_strictly


def check(config: Configs, specs: Sequence[EncoderSpec]) -> None:
    """Raise BadInput where a text encoder's configuration lacks a size, or a tokenizer is not there."""
    for spec in specs:
        counts = ["hidden_size", "num_hidden_layers", "vocab_size", "max_position_embeddings"]
        counts += ["projection_dim"] * spec.projects
        for key in counts:
            value = config[spec.folder].get(key)
            if type(value) is not int or value < 1:
                where = config.path / spec.folder / "config.json"
                raise BadInput(f"{where}: {key} is {value!r}, not a positive number.")
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
        try:
            found.append(CLIPTokenizerFast.from_pretrained(folder, local_files_only=True))
        except Exception as error:  # of the tokenizers library, which has no class of its own
            raise BadInput(f"The tokenizer in {folder} cannot be read: {first_line(error)}.") from error
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
