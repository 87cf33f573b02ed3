"""CLIP's tokenizers and text encoders as transformers has them, from the weights of a checkpoint."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trce_cli.errors import BadInput, first_line
from trce_cli.families.base import Configs, Weights
from trce_cli.families.clip.names import TEXT, clip_weights
from trce_cli.families.clip.spec import EncoderSpec
from trce_cli.system.safetensors import all_finite


@dataclass(frozen=True)
class EncoderFiles:
    """One text encoder of a checkpoint."""

    spec: EncoderSpec
    source: Weights

    @property
    def config(self) -> Mapping[str, Any]:
        """Its config.json."""
        return self.source.config[self.spec.folder]

    @property
    def where(self) -> Path:
        """What errors name."""
        return self.source.folder(self.spec.folder)

    def weights(self) -> list[str]:
        """The names of all weights that the encoder uses."""
        return list(clip_weights(self.config, self.spec.projects))

    def map(self, name: str) -> Tensor:
        """A weight as pages of its file."""
        return self.source.map(self.spec.folder, name)

    def release(self) -> None:
        """Give back the memory of all pages that were looked at so far."""
        self.source.release(self.spec.folder)


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
    """The text encoders in evaluation mode, without gradients, on `device`, in `dtype` (or the files').

    Weights that need no conversion are pages of their files: a token embedding takes the memory of the rows
    that are looked up. Raises `BadInput` where a weight is missing, has another shape, or holds NaN or
    infinite values; nothing is left at random values.
    """
    return [_load_encoder(weights, spec, device, dtype) for spec in specs]


def _load_encoder(
    weights: Weights, spec: EncoderSpec, device: torch.device | str, dtype: torch.dtype | None
) -> Any:
    import transformers

    config = transformers.CLIPTextConfig.from_dict(dict(weights.config[spec.folder]))
    with torch.device("meta"):
        model = getattr(transformers, spec.model_class)(config)
    parameters = dict(model.named_parameters())
    state = {}
    for weight in clip_weights(weights.config[spec.folder], spec.projects):
        tensor = weights.map(spec.folder, weight)
        # transformers 5.6 dropped `text_model.` from the names of a model without projection
        name = weight if weight in parameters else weight.removeprefix(TEXT)
        if tensor.shape != parameters[name].shape:
            raise BadInput(
                f"{weight} in {weights.folder(spec.folder)} has shape {list(tensor.shape)}; its config.json "
                f"asks for {list(parameters[name].shape)}."
            )
        if not all_finite(tensor):
            raise BadInput(f"{weight} in {weights.folder(spec.folder)} holds NaN or infinite values.")
        state[name] = tensor.to(device=device, dtype=dtype)
        weights.release(spec.folder)
    model.load_state_dict(state, strict=False, assign=True)
    embeddings = getattr(model, "text_model", model).embeddings
    embeddings.position_ids = torch.arange(config.max_position_embeddings, device=device).expand((1, -1))
    return model.eval().requires_grad_(False)
