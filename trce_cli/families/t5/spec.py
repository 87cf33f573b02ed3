"""How a family puts prompts to T5, and which of its states reach the denoiser."""

from dataclasses import dataclass
from typing import Final

CONTEXT: Final = "context"  # the stream of hidden states of a prompt's tokens
# The slots of a prompt, each matched with the safe prompt's. EOS: the token behind the prompt. PADS: padding,
# a sample of it, which counts once together. CONTENT: the tokens around the concept's phrase, those before
# it aligned from the left and those behind it from the right. KEYWORD: the phrase's tokens, which go to the
# safe phrase's last one.
SLOTS: Final = ("EOS", "PADS", "CONTENT", "KEYWORD")


@dataclass(frozen=True)
class T5Spec:
    """T5's encoder and its tokenizer in a diffusers folder.

    limit: how many positions reach the denoiser, padding included. masked: whether the encoder's attention
    leaves padding out, which then sees the prompt and is seen by nothing; else it is as if it were text.
    """

    folder: str
    tokenizer: str
    limit: int
    masked: bool = False
