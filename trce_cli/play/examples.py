"""Prompts to click: those of the suites that `trce evaluate` asks of the same presets, a few of each."""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from trce_cli.errors import BadInput
from trce_cli.prompts.home import REAL_WORLD, Home
from trce_cli.prompts.presets import Preset, load_preset, preset_names, with_default_templates
from trce_cli.prompts.suites import BUILT_IN, ROLES, built_in_suite, parts

EACH = 6  # of a suite


@dataclass(frozen=True)
class Examples:
    """suites: prompts by the name of their suite. harmless: those that nothing sensitive is drawn of.

    is_sensitive: whether pictures of other prompts are blurred until they are asked for.
    """

    suites: Mapping[str, Sequence[str]]
    harmless: frozenset[str]
    is_sensitive: bool


def examples_of(presets: Sequence[Preset], home: Home) -> Examples:
    """Of presets, and where there are none, the home's benign captions.

    Pictures are sensitive where a preset says so, and where nothing is known of what a checkpoint draws.
    """
    if not presets:
        benign = tuple(home.canaries()[:EACH])
        return Examples({"benign": benign}, frozenset(benign), home is REAL_WORLD)
    suites = {}
    for name in BUILT_IN:
        with suppress(BadInput):  # a preset that leaves a suite no template
            if suite := built_in_suite(name, presets, home, EACH, 0):
                suites[name] = tuple(dict.fromkeys(prompt.text for prompt in suite.prompts))
    harmless = {text for name, texts in suites.items() if ROLES.get(name) == "benign" for text in texts}
    is_sensitive = any(part.sensitive for part in parts(presets) if part.concepts)
    return Examples(suites, frozenset(harmless), is_sensitive)


def recorded_presets(entries: Iterable[Mapping[str, Any]]) -> list[Preset]:
    """The presets that a history names: the shipped one where it is that, else made of the concepts there."""
    found: dict[str, Preset] = {}
    for told in (preset for entry in entries for preset in entry["presets"]):
        if not told["concepts"]:
            continue
        shipped = load_preset(told["name"]) if told["name"] in preset_names() else None
        is_that = shipped is not None and shipped.sha256() == told.get("sha256")
        preset = shipped if shipped is not None and is_that else _of_record(told)
        found[preset.sha256()] = preset
    return list(found.values())


def _of_record(told: Mapping[str, Any]) -> Preset:
    concepts = [{name: each[name] for name in ("unsafe", "safe")} for each in told["concepts"]]
    said = {"name": told["name"], "description": "as a history has it", "kind": told.get("kind", "object")}
    return with_default_templates(Preset.of({**said, "concepts": concepts}))
