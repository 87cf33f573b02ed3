"""Where what can be computed again is kept. A cache that cannot be used costs time, never the run."""

import os
import tempfile
from collections.abc import Mapping
from functools import cache
from pathlib import Path

from trce_cli.errors import TrceError
from trce_cli.system.whole import whole


def cache_folder() -> Path:
    """`$TRCE_CACHE`, else `trce` in the user's cache folder (which follows `$XDG_CACHE_HOME` on Linux)."""
    import platformdirs

    return Path(os.environ.get("TRCE_CACHE") or platformdirs.user_cache_path("trce"))


def cached_folder(name: str, content: Mapping[str, bytes]) -> Path:
    """A folder of these files, kept in the cache; a damaged one is replaced.

    Where the cache cannot be written it lies in a temporary folder that goes with the process.
    """
    folder = cache_folder() / name
    if _holds(folder, content):
        return folder
    try:
        _write(folder, content)
    except TrceError:
        folder = Path(_temporary().name) / name
        _write(folder, content)
    return folder


@cache
def _temporary() -> "tempfile.TemporaryDirectory[str]":
    """The one that goes with the process; it is as safe from others as a folder in $TMPDIR can be."""
    return tempfile.TemporaryDirectory(prefix="trce-")


def _holds(folder: Path, content: Mapping[str, bytes]) -> bool:
    try:
        return all(
            (folder / name).stat().st_size == len(data)
            and (folder / name).is_file()
            and (folder / name).read_bytes() == data
            for name, data in content.items()
        )
    except OSError:
        return False


def _write(folder: Path, content: Mapping[str, bytes]) -> None:
    with whole(folder) as fresh:
        for name, data in content.items():
            (fresh / name).parent.mkdir(parents=True, exist_ok=True)
            (fresh / name).write_bytes(data)
