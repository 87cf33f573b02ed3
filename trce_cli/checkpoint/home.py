"""Where a checkpoint comes from, told by its text encoder, which no edit changes."""

from functools import cache

from trce_cli.checkpoint.checkpoint import Checkpoint
from trce_cli.checkpoint.open import open_checkpoint
from trce_cli.prompts.home import EMBEDDED, REAL_WORLD, Home


def home_of(checkpoint: Checkpoint) -> Home:
    """The home of the embedded checkpoint that this one is or was made from, else the real world."""
    for home in EMBEDDED:
        if checkpoint.name == home.name:
            return home
        if home.folder is None or not (home.folder / "model_index.json").is_file():
            continue
        # The widths first: a large text encoder is not read to learn that it is another one.
        if _widths_of(home.name) == _widths(checkpoint) and (
            open_checkpoint(home.name).text_encoder_hash() == checkpoint.text_encoder_hash()
        ):
            return home
    return REAL_WORLD


@cache
def _widths_of(embedded: str) -> list[int]:
    return _widths(open_checkpoint(embedded))


def _widths(checkpoint: Checkpoint) -> list[int]:
    return [door.width for door in checkpoint.doors()]
