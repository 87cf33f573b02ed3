"""The checkpoints that edits were made from: called by a name when handed out, and found again by their hash.

What is handed out names no one's folders. Where a base of some hash was last seen on this machine stands in
the user's own cache, and is never more than a place to look: whoever finds one there compares its hash.
"""

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, Final

from pydantic import Field

from trce_cli.checkpoint.checkpoint import Checkpoint, Hashes
from trce_cli.errors import BadInput, TrceError
from trce_cli.prompts.home import EMBEDDED
from trce_cli.system.cache import cache_folder
from trce_cli.system.foreign import read_json, validated
from trce_cli.system.paths import as_text, expanded, real_path
from trce_cli.system.whole import write_json

INDEX: Final = "bases.json"
MOST: Final = 200  # bases that are remembered, the latest ones
EACH: Final = 8  # places of one base
Places = dict[
    Annotated[str, Field(max_length=64)], list[Annotated[str, Field(max_length=4096)]]
]  # hash -> latest first


def public_name(name: str) -> str:
    """What a checkpoint that was given by this name is called in what is handed out.

    A hub id, also of a folder in the hub's cache, or the last part of a path.
    """
    if cached := re.search(r"models--([\w.-]+?)--([\w.-]+)", name):
        return "/".join(cached.groups())
    is_path = name.startswith(("/", ".", "~"))
    with suppress(OSError):  # a name that no file can have
        is_path = is_path or expanded(name).exists()
    return as_text(real_path(name).name or name if is_path else name)


def remember(checkpoint: Checkpoint, hashes: Hashes) -> None:
    """Note where this base lies, in the user's cache; where that cannot be written nothing is noted."""
    denoiser = {file.path for file in checkpoint.denoiser_files}
    keys = [hashes.files[name] for name, path in checkpoint.files.items() if path in denoiser]
    told, place = _known(), str(real_path(checkpoint.path))
    for key in keys:
        others = [other for other in told.pop(key, []) if other != place and os.path.exists(other)]
        told[key] = [place, *others][:EACH]
    with suppress(TrceError, OSError, UnicodeEncodeError):  # the last: of a path that is no text
        cache_folder().mkdir(parents=True, exist_ok=True)
        write_json(cache_folder() / INDEX, dict(list(told.items())[-MOST:]))


def places(base: Mapping[str, Any], erased: Path) -> Iterator[str]:
    """Where the base of a history's entry may be, as names to open: none of them is more than a guess.

    By its name where one is, in the folders around the edited checkpoint, then where one of its hash was last
    seen.
    """
    name = str(base["name"])
    if "/" in name or base.get("revision") or name in {home.name for home in EMBEDDED}:
        yield name
    own = Path(name).name
    around = (Path(), *list(real_path(erased).parents)[:2])
    known = _known()
    found = [folder / own for folder in around] if own else []
    found += [Path(place) for key in base["files"].values() for place in known.get(key, [])]
    for path in dict.fromkeys(found):
        with suppress(OSError):
            if path.exists() and real_path(path) != real_path(erased):
                yield str(path)


def _known() -> Places:
    path = cache_folder() / INDEX
    try:
        return validated(Places, read_json(path), str(path)) if path.exists() else {}
    except (BadInput, OSError):
        return {}
