"""The original of an erased checkpoint, which stage 2 learns from: named, or found in its history."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trce_cli.checkpoint.bases import places
from trce_cli.checkpoint.checkpoint import Checkpoint
from trce_cli.checkpoint.open import open_checkpoint
from trce_cli.checkpoint.provenance import erased_before, history
from trce_cli.checkpoint.same_model import check_same_model
from trce_cli.erase.trajectory_set import denoiser_hashes
from trce_cli.errors import BadInput
from trce_cli.prompts.presets import Preset


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

    option: by which it can be named. The base is looked for as `bases.places` has it, and known by the hash
    of its denoiser. Raises BadInput where none is found that is what the history says, or as
    `check_same_model` does.
    """
    entries = history(erased)
    if name is None and not entries:
        return Teacher(erased)
    base = entries[0]["base"] if entries else {}
    if name is None:
        return _found(erased, base, config, option)
    opened = open_checkpoint(name, config=config)
    check_same_model(opened, erased)
    if not base:
        return Teacher(opened)
    hashes = denoiser_hashes(opened)
    if not _is_base(base, hashes):
        warn(_other(opened, erased))
    return Teacher(opened, hashes)


def other_presets(erased: Checkpoint, presets: Sequence[Preset]) -> list[str]:
    """The names of those of these presets that no edit of the checkpoint erased; none where it had none."""
    known = erased_before(erased, presets)
    return [preset.name for preset in presets if history(erased) and preset.name not in known]


def _found(erased: Checkpoint, base: Mapping[str, Any], config: Path | None, option: str) -> Teacher:
    """The first of the places where the base may be that holds it."""
    hint = f"Name it with {option}."
    why = f"there is no {base['name']} here, nor beside it."
    for place in places(base, erased.path):
        try:
            revision = base.get("revision") if place == base["name"] else None
            opened = open_checkpoint(place, revision, base.get("variant"), config)
            hashes = denoiser_hashes(opened)
            if not _is_base(base, hashes):
                raise BadInput(_other(opened, erased))
        except BadInput as error:
            why = error.message
            continue
        check_same_model(opened, erased)
        return Teacher(opened, hashes)
    raise BadInput(f"The original that {erased.name} was made from is not found: {why}", hint)


def _is_base(base: Mapping[str, Any], hashes: Sequence[str]) -> bool:
    return bool(set(base["files"].values()) & set(hashes))


def _other(opened: Checkpoint, erased: Checkpoint) -> str:
    differing = f"its {opened.family.network}'s weights differ"
    return f"{opened.name} is not the original that {erased.name} was made from: {differing}."
