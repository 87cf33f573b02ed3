"""Which CLIP text encoder a family has, and which of its states reach the denoiser."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

CONTEXT: Final = "context"  # the stream of hidden states of all tokens, the encoders' side by side
POOLED: Final = "pooled"  # that of the EoT after the last layer, projected, of all encoders that project


@dataclass(frozen=True)
class EncoderSpec:
    """One text encoder of a family and where its parts lie.

    `hidden` is what the U-Net attends to: `last` is the last layer's output after the final LayerNorm,
    `penultimate` the input of the last layer, without LayerNorm. `ldm` is the key prefix in a single file,
    whose weights are in OpenCLIP's form where `openclip` is set.
    """

    folder: str
    tokenizer: str
    model_class: Literal["CLIPTextModel", "CLIPTextModelWithProjection"]
    hidden: Literal["last", "penultimate"]
    ldm: str
    openclip: bool

    @property
    def projects(self) -> bool:
        """Whether it has a projection of the EoT state."""
        return self.model_class == "CLIPTextModelWithProjection"


def max_clip_skip(config: Mapping[str, Mapping[str, Any]], specs: Sequence[EncoderSpec]) -> int:
    """Up to which clip skip a family is read. It is of an encoder that is read at its last layer: SDXL's are
    not, and clients ignore it there.
    """
    reads_last = all(spec.hidden == "last" for spec in specs)
    layers: int = config[specs[0].folder]["num_hidden_layers"]
    return layers if reads_last else 1
