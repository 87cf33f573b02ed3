"""Folders of users' own pictures, by their names: nothing is opened."""

from pathlib import Path
from typing import Final

from trce_cli.errors import BadInput

SUFFIXES: Final = (".bmp", ".jpeg", ".jpg", ".png", ".webp")


def pictures_in(folder: Path, of: str, fewest: int = 1) -> list[Path]:
    """The picture files in a folder, sorted.

    of: what they are, for the sentences. Raises BadInput where there is no folder, and for fewer than
    `fewest`.
    """
    if not folder.is_dir():
        raise BadInput(f"There is no folder {folder} of {of}.")
    paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)
    if len(paths) < fewest:
        raise BadInput(
            f"{folder} holds {len(paths) or 'no'} pictures; at least {fewest} of {of} are needed.",
            f"They end in {', '.join(SUFFIXES)}.",
        )
    return paths
