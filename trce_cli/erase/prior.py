"""The prior: the benign captions that an edit has to leave alone."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from trce_cli.checkpoint.checkpoint import Checkpoint
from trce_cli.checkpoint.home import home_of
from trce_cli.errors import BadInput
from trce_cli.prompts.files import read_prompts
from trce_cli.system.paths import as_text


@dataclass(frozen=True)
class Prior:
    """Benign captions to preserve, and canary captions to measure side effects on that are not among them.

    source: `built-in`, `emoji`, `emoji-dit`, or the user's file. A caption that is given twice counts
    twice. bystanders: further ones of what neither names.
    """

    source: str
    captions: tuple[str, ...]
    canaries: tuple[str, ...]
    bystanders: tuple[str, ...] = ()

    def sha256(self) -> str:
        """The hash of the captions in their order, in hex."""
        return hashlib.sha256("\0".join(self.captions).encode()).hexdigest()


def choose_prior(
    checkpoint: Checkpoint, file: Path | None = None, note: Callable[[str], None] = lambda text: None
) -> Prior:
    """The captions of the user's file where one is given, else those that fit the checkpoint.

    Raises BadInput where the file cannot be read or holds no caption.
    """
    home = home_of(checkpoint)
    if file is None:
        source, benign = home.name, home.captions()
    else:
        source, benign = as_text(file.name), [prompt.text for prompt in read_prompts(file, note=note)]
    taken = set(map(_plain, benign))
    kept = tuple(canary for canary in home.canaries() if _plain(canary) not in taken)
    if not kept:
        raise BadInput(
            f"{file} holds every caption that side effects are measured on.",
            "Leave some of them out.",
        )
    bystanders = tuple(caption for caption in home.bystander_canaries() if _plain(caption) not in taken)
    return Prior(source, tuple(benign), kept, bystanders)


def _plain(caption: str) -> str:
    return " ".join(caption.casefold().split())
