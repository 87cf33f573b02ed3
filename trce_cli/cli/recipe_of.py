"""The recipe that makes an edit again, from what its history says of it."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from trce_cli.checkpoint.bases import places
from trce_cli.cli.recipe import KINDS, recipe_text
from trce_cli.erase.map_verdict import MAX_COLLATERAL, collateral
from trce_cli.errors import BadInput
from trce_cli.families.registry import FURTHER_STREAMS
from trce_cli.prompts.home import EMBEDDED, REAL_WORLD
from trce_cli.prompts.presets import load_preset, preset_names

ABOVE: Final = """\
What made {name}, as a recipe: trce run on it makes the same weights again, on the same kind of machine with
the same versions of the libraries ({versions})."""


def recipe_of(found: Mapping[str, Any], name: str) -> str:
    """The recipe as TOML; its base is named as it is found from here.

    found: what `describe` tells of the checkpoint or edit. Raises BadInput where it carries no edit, or one
    whose presets' sentences are not in its history.
    """
    entries = found.get("history") or []
    if not entries:
        raise BadInput(f"{name} carries no edit that says how it was made.", "trce inspect shows what it is.")
    own: dict[str, dict[str, Any]] = {}
    presets = [_presets(entry, own) for entry in entries]
    named = [each for each, entry in zip(presets, entries, strict=True) if entry["edit"] != "apply"]
    shared = named[0] if named and all(each == named[0] for each in named) else []
    steps: dict[str, dict[str, Any]] = {}
    for entry, each in zip(entries, presets, strict=True):
        count = sum(other.partition("-")[0] == entry["edit"] for other in steps)
        step = f"{entry['edit']}-{count + 1}" if count else entry["edit"]
        steps[step] = _TOLD[entry["edit"]](entry)
        if entry["edit"] != "apply" and each != shared:
            steps[step] = {"presets": each, **steps[step]}
    base = entries[0]["base"]
    form = found.get("layout") or ("map" if "map" in str(found["kind"]) else "lora")
    if form != base["layout"]:
        steps[next(reversed(steps))]["as"] = [form]
    head = {
        "base": next(places(base, Path(found["path"])), base["name"]),
        "base_sha256": list(base["files"].values()),
        **{key: base[key] for key in ("revision", "variant") if base.get(key)},
        **({"presets": shared} if shared else {}),
        "output": "again",
        **({"preset": list(own.values())} if own else {}),
    }
    versions = ", ".join(f"{each} {version}" for each, version in entries[-1]["versions"].items())
    return recipe_text(head, steps, ABOVE.format(name=name, versions=versions))


def _presets(entry: Mapping[str, Any], own: dict[str, dict[str, Any]]) -> list[str]:
    """The names of an entry's presets; those that are not shipped, or no longer so, are added to `own`."""
    names = []
    for preset in entry["presets"]:
        if preset["name"] in preset_names() and load_preset(preset["name"]).sha256() == preset.get("sha256"):
            names.append(preset["name"])
            continue
        if entry["edit"] == "apply":  # what its files erase, told again
            continue
        if "parts" not in preset:
            raise BadInput(
                f"The history does not hold the sentences of the preset {preset['name']!r}.",
                "It was written by an earlier trce; take the preset's own file.",
            )
        concepts = iter(preset["concepts"])
        for part in preset["parts"]:
            told = {
                "description": f"What {preset['name']} says, from the history",
                "kind": part["kind"],
                "templates": part["templates"],
                "concepts": [next(concepts) for _ in range(part["concepts"])],
            }
            names.append(_own(part["name"], told, own))
    return names


def _own(name: str, told: Mapping[str, Any], own: dict[str, dict[str, Any]]) -> str:
    """The name under which a preset is in `own`: its own, with a number where another one has that."""
    number, free = 1, name
    while free in own and {**own[free], "name": name} != {"name": name, **told}:
        number += 1
        free = f"{name}-{number}"
    own[free] = {"name": free, **told}
    return free


def _map(entry: Mapping[str, Any]) -> dict[str, Any]:
    settings = entry["settings"]
    told = _settings("map", settings) | {key: settings[key] for key in FURTHER_STREAMS if key in settings}
    if settings["prior"] in {home.name for home in (REAL_WORLD, *EMBEDDED)}:
        told.pop("prior", None)
    worst = collateral(entry["figures"])
    return told | ({"max_collateral": math.ceil(100 * worst) / 100} if worst > MAX_COLLATERAL else {})


def _steer(entry: Mapping[str, Any]) -> dict[str, Any]:
    return _settings("steer", entry["settings"])


def _apply(entry: Mapping[str, Any]) -> dict[str, Any]:
    told = {
        "edits": [each["file"] for each in entry["edits"]],
        "sha256": [each["sha256"] for each in entry["edits"]],
        "strength": entry["settings"]["strength"],
    }
    if entry["settings"].get("denoiser_only"):
        told["denoiser_only"] = True
    return told | ({"allow_other_text_encoder": True} if entry["figures"] else {})


_TOLD: Final = {"map": _map, "steer": _steer, "apply": _apply}


def _settings(command: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """What a recipe of this command knows of an entry's settings."""
    keys: Sequence[str] = [key for key in KINDS[command].fields() if settings.get(key) is not None]
    return {key: settings[key] for key in keys}
