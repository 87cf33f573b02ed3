"""Paths as users write them."""

import os
from pathlib import Path


def expanded(path: str | Path) -> Path:
    """The path with `~` replaced; one of an unknown user stays as it is."""
    return Path(os.path.expanduser(path))


def real_path(path: str | Path) -> Path:
    """The absolute path, `~` replaced and symbolic links resolved."""
    return Path(os.path.realpath(expanded(path)))


def existing(path: Path) -> Path:
    """`path`, or the innermost of the folders around it that exists."""
    return next(place for place in (path.absolute(), *path.absolute().parents) if place.exists())
