"""Which language model a family encodes prompts with, and which of its states reach the denoiser."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Literal

from trce_cli.maths.verdict import Limits

CONTEXT: Final = "context"  # the stream of hidden states of a prompt's tokens
# The slots of a prompt, each matched with the safe prompt's. END: the last of the constant tokens behind the
# prompt, where an answer would begin. SUFFIX: all of them. LAST: the prompt's last token. TAIL: its tokens
# behind the concept's phrase, aligned from the right. KEYWORD: the phrase's tokens without its article, which
# go to the last one before the safe prompt's tail.
SLOTS: Final = ("END", "SUFFIX", "LAST", "TAIL", "KEYWORD")
# The slots that are mapped by default, as measured on `emoji-dit`; see docs/method.md.
MAPPED: Final[Mapping[str, float]] = {"END": 0.5, "KEYWORD": 0.5}
PRESERVE: Final = 0.3  # the lambda that goes with them
MOVED: Final = Limits(0.65, 0.4)  # of how far they have to be moved; see docs/method.md
# Where the denoiser sees padding as well. PADS: a sample of it, which counts once together.
PADDED_SLOTS: Final = (*SLOTS, "PADS")


@dataclass(frozen=True)
class LlmSpec:
    """A text encoder that is a causal language model, and how a prompt is put to it.

    kind: transformers' name of the architecture. classes: in model_index.json. hidden: `last` is the last
    layer's output after the final norm, `penultimate` the input of the last layer; numbers: the outputs of
    the layers so far, side by side. limit: how many tokens are read at most, the template's included. norm:
    the denoiser's RMSNorm before its door, by its weight, if there is one. template: a text with {} for the
    prompt; None: the tokenizer's own chat template, which is told whether the model `thinks`. dropped: so
    many first tokens never reach the denoiser. padded: it sees padding up to `limit`, as if it were text.
    """

    kind: Literal["qwen3", "qwen2_5_vl"]
    classes: tuple[str, ...]
    hidden: Literal["last", "penultimate"] | tuple[int, ...]
    limit: int
    norm: str | None
    template: str | None = None
    thinks: bool = True
    dropped: int = 0
    padded: bool = False

    folder: str = "text_encoder"
    tokenizer: str = "tokenizer"
