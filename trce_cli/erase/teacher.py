"""The original of an erased checkpoint, which stage 2 learns from: named, or found in its history."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trce_cli.checkpoint.checkpoint import Checkpoint
from trce_cli.checkpoint.open import open_checkpoint
from trce_cli.checkpoint.provenance import history
from trce_cli.checkpoint.same_model import check_same_model
from trce_cli.erase.trajectory_set import denoiser_hashes
from trce_cli.errors import BadInput


@dataclass(frozen=True)
class Teacher:
    """The original. hashes: `denoiser_hashes` of it, where it was read to compare them with the history's."""

    checkpoint: Checkpoint
    hashes: Sequence[str] | None = None


def find_teacher(
    erased: Checkpoint,
    name: str | None,
    config: Path | None,
    *,
    note: Callable[[str], None] = lambda text: None,
    warn: Callable[[str], None] = lambda text: None,
) -> Teacher:
    """The checkpoint of that name (None: not given), else the first base of the history, else `erased`.

    config: of single files, as for `open_checkpoint`. `note` and `warn` receive remarks. Raises BadInput
    as `find_original` does.
    """
    if not any(entry["edit"] in ("map", "apply") for entry in history(erased)):
        note(f"{erased.name} has not been mapped: stage 2 alone is the weaker half of the method.")
    return find_original(erased, name, config, "--teacher", warn=warn)


def find_original(
    erased: Checkpoint,
    name: str | None,
    config: Path | None,
    option: str,
    *,
    warn: Callable[[str], None] = lambda text: None,
) -> Teacher:
    """What `erased` was made from: as `find_teacher`, for any command.

    option: by which it can be named. Raises BadInput where the base cannot be opened, is no longer what the
    history says, or as `check_same_model` does.
    """
    entries = history(erased)
    if name is None and not entries:
        return Teacher(erased)
    base = entries[0]["base"] if entries else {}
    named = None if name is None else open_checkpoint(name, config=config)
    opened = named or _base(erased, base, config, option)
    check_same_model(opened, erased)
    if not base:
        return Teacher(opened)
    hashes = denoiser_hashes(opened)
    if not set(base["files"].values()) & set(hashes):
        differing = f"its {opened.family.network}'s weights differ"
        message = f"{opened.name} is not the original that {erased.name} was made from: {differing}."
        if name is None:
            raise BadInput(message, f"Name the original with {option}.")
        warn(message)
    return Teacher(opened, hashes)


def _base(erased: Checkpoint, base: Mapping[str, Any], config: Path | None, option: str) -> Checkpoint:
    try:
        return open_checkpoint(base["name"], base.get("revision"), base.get("variant"), config)
    except BadInput as error:
        raise BadInput(
            f"The original that {erased.name} was made from cannot be opened: {error.message}",
            f"Name it with {option}.",
        ) from None
