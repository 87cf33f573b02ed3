"""Paths as users write them."""

import fnmatch
import os
from pathlib import Path

from trce_cli.errors import BadInput


def expanded(path: str | Path) -> Path:
    """The path with `~` replaced; one of an unknown user stays as it is."""
    return Path(os.path.expanduser(path))


def real_path(path: str | Path) -> Path:
    """The absolute path, `~` replaced and symbolic links resolved."""
    return Path(os.path.realpath(expanded(path)))


def as_text(name: str) -> str:
    """The name of a file as what is written can hold it: bytes that are no UTF-8 are replaced."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def existing(path: Path) -> Path:
    """`path`, or the innermost of the folders around it that exists."""
    return next(place for place in (path.absolute(), *path.absolute().parents) if place.exists())


def matching(folder: Path, pattern: str = "*") -> list[Path]:
    """The entries of a folder whose names match, sorted; none where there is no folder.

    OSError where it cannot be looked into: what is not seen would be taken for absent.
    """
    try:
        names = os.listdir(folder)
    except (FileNotFoundError, NotADirectoryError):
        return []
    return sorted(folder / name for name in fnmatch.filter(names, pattern))


def unseen(error: OSError) -> None:
    """For `os.walk`: a folder that cannot be looked into is no empty one."""
    raise error


def inside(folder: Path, relative: str) -> Path:
    """A file of the folder; refused where a symbolic link leads out of it.

    A snapshot in the hub's cache is made of links to the `blobs` beside it, and these are allowed.
    """
    path = folder / relative
    if "\0" in relative:
        raise BadInput(f"{relative!r} is no name of a file.")
    real, root = real_path(path), real_path(folder)
    roots = [root]
    if root.parent.name == "snapshots" and root.parent.parent.name.startswith("models--"):
        roots.append(root.parent.parent / "blobs")
    if not any(real.is_relative_to(allowed) for allowed in roots):
        raise BadInput(
            f"{path} is a symbolic link that leads out of the checkpoint's folder, to {real}.",
            "Put the file itself there.",
        )
    return path
