"""The model card `README.md` of an edited checkpoint, and what the original's own card says."""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from trce_cli.checkpoint.hub import repository
from trce_cli.checkpoint.measured import MAX_FRONT_MATTER, UNMEASURED, parts_of
from trce_cli.errors import BadInput
from trce_cli.families.registry import family_named
from trce_cli.system.foreign import parse_yaml

if TYPE_CHECKING:
    from trce_cli.checkpoint.checkpoint import Checkpoint
    from trce_cli.families.base import Family

_TOLD = ("base_model", "license", "license_name", "license_link")  # what a card's front matter is asked

SHOWN: Final = 12  # values of a list that a table holds
FOLDER: Final = "path/to/this/folder"  # where a card that was never handed out says it is
# What each kind of edit does, in plain words; `doors` are the family's.
METHODS = {
    "map": "Stage 1 of TRCE: one matrix, found in closed form, takes the text embeddings of the unsafe "
    "prompts to those of the safe ones and leaves ordinary captions where they are. It is folded into "
    "{doors}, so that nothing has to run beside the model.",
    "steer": "Stage 2 of TRCE: the attention weights were fine-tuned so that the early steps of denoising "
    "turn away from the unsafe concepts and stay as they were for ordinary prompts.",
    "apply": "An edit that was solved before, on another checkpoint or at another time, was put on this one.",
}


def source_card(checkpoint: "Checkpoint") -> dict[str, Any]:
    """What the front matter of the checkpoint's own model card says of licence and base, as far as it can be
    read.
    """
    front, _, _ = parts_of(checkpoint.card_text() or "")
    try:
        table = parse_yaml(front, "README.md") if len(front) <= MAX_FRONT_MATTER else None
    except BadInput:
        return {}
    if not isinstance(table, dict):
        return {}
    return {key: table[key] for key in _TOLD if _is_told(table.get(key))}


def _is_told(value: Any) -> bool:
    """Whether it is a name, or several."""
    every = value if isinstance(value, list) and len(value) <= 100 else [value]
    return all(isinstance(one, str) and len(one) <= 1000 for one in every)


@dataclass(frozen=True)
class Loading:
    """What the code that loads the edit has to name.

    dtype: of the weights, by the format's name. variant: of the weights in a folder. place: a folder or a hub
    id. files: of forms other than a folder, a form's name -> the file's name there.
    """

    dtype: str = "F32"
    variant: str | None = None
    place: str = FOLDER
    files: Mapping[str, str] = field(default_factory=dict)


def model_card(
    entries: Sequence[Mapping[str, Any]],
    source: Mapping[str, Any],
    loading: Loading | None = None,
) -> str:
    """The model card of an edit: front matter, what was erased and what not, how, and what was measured.

    entries: the history, at least one. source: front matter of the base's card, whose licence is kept.
    """
    import yaml  # type: ignore[import-untyped]

    loading = loading or Loading()
    base = str(entries[0]["base"]["name"])
    family = family_named(entries[0]["base"]["family"])
    base_model = source.get("base_model") or _hub_id(base)
    front: dict[str, Any] = {}
    if base_model:
        is_whole = not loading.files or "single-file" in loading.files
        front |= {"base_model": base_model, "base_model_relation": "finetune" if is_whole else "adapter"}
    front |= {"library_name": "diffusers", "pipeline_tag": "text-to-image"}
    front |= {key: source[key] for key in ("license", "license_name", "license_link") if source.get(key)}
    tags = family.defaults.tags if family else ()
    front["tags"] = ["text-to-image", *tags, "concept-erasure", "safety", "trce"]
    name = Path(base).name if os.path.isabs(base) else base  # no folders of this machine
    lines = ["---", yaml.safe_dump(front, sort_keys=False, allow_unicode=True).strip(), "---", ""]
    erased = erased_names(entries)
    lines += [
        f"# {Path(base).name or base} without {erased}" if erased else f"# {Path(base).name}, edited",
        "",
        f"`{name}` ({entries[0]['base']['family']}), changed with "
        "[TRCE](https://arxiv.org/abs/2503.07389) so that it no longer draws certain concepts. It is used "
        "like the original, at the same speed; text encoders, tokenizers and VAE are the original's.",
        "",
        *loading_lines(loading, str(base_model or "path/to/the/original"), family),
        "## What was erased",
        "",
    ]
    for preset in {p["name"]: p for entry in entries for p in entry["presets"]}.values():
        phrases = [f"{concept['unsafe']} (now {concept['safe']})" for concept in preset["concepts"]]
        more = f", and {len(phrases) - SHOWN} more" if len(phrases) > SHOWN else ""
        lines += [f"- **{preset['name']}** ({len(phrases)} phrases): {', '.join(phrases[:SHOWN])}{more}."]
    lines += [
        "",
        "**What was not:** everything else. No other concept was made rarer, and all that the original does "
        "wrong otherwise, this copy does too.",
        "",
        "## What still gets through",
        "",
        "Erasing lowers how often a concept is drawn; it does not make it impossible, least of all against "
        "prompts or fine-tuning made for that purpose. Measure it on your own prompts before you rely on it.",
        "",
        UNMEASURED,
        "",
        "## How",
        "",
    ]
    doors = family.defaults.doors if family else "the weights where prompts enter"
    for number, entry in enumerate(entries, 1):
        made = entry["versions"]
        lines += [
            f"{number}. `trce {entry['edit']}` on {entry['date'][:10]} with trce {made['trce']} and torch "
            f"{made['torch']}: {entry['seconds']:.0f} s, {entry['peak_memory_bytes'] / 1e9:.1f} GB of memory."
            f" {METHODS[entry['edit']].format(doors=doors)}",
            "",
            *_verdicts(entry["figures"].get("verdicts")),
            *_folded(
                "Settings", {**entry["settings"], **{f"seed {k}": v for k, v in entry["seeds"].items()}}
            ),
            *_folded("Figures of the edit", {k: v for k, v in entry["figures"].items() if k != "verdicts"}),
        ]
    lines += [
        "## Licence",
        "",
        _licence(source),
        "",
        "Every setting, seed, version and hash is in `trce.json`.",
        "",
    ]
    return "\n".join(lines)


def erased_names(entries: Sequence[Mapping[str, Any]]) -> str:
    """The names of all presets of a history."""
    return ", ".join(dict.fromkeys(preset["name"] for entry in entries for preset in entry["presets"]))


def loading_lines(loading: Loading, original: str, family: "Family | None") -> list[str]:
    """How each form of an edit is loaded, in Markdown.

    The dtype is named, since without it diffusers converts every part to float32.
    """
    dtype = {"F16": "float16", "BF16": "bfloat16", "F32": "float32"}.get(loading.dtype, "bfloat16")
    variant = f', variant="{loading.variant}"' if loading.variant else ""
    place, files = loading.place, loading.files
    start = ["```python", "import torch"]
    fetch = ["from huggingface_hub import hf_hub_download", ""] if place != FOLDER else [""]
    lines: list[str] = []

    def whole(folder: str, variant: str = "") -> list[str]:
        return [
            "from diffusers import DiffusionPipeline",
            "",
            f"dtype = torch.{dtype}",
            f'pipe = DiffusionPipeline.from_pretrained("{folder}", torch_dtype=dtype{variant})',
        ]

    def path(name: str) -> str:
        return f'hf_hub_download("{place}", "{name}")' if place != FOLDER else f'"{name}"'

    if not files.keys() - {"lora", "map"} and files:
        lines += ["The original is loaded, and this beside it.", ""]
    if not files or "diffusers" in files:
        lines += [*start, *whole(place, variant), "```", ""]
    if name := files.get("single-file"):
        if pipeline := family.defaults.whole_file if family else None:
            load = f"pipe = {pipeline}.from_single_file({path(name)}, torch_dtype=torch.{dtype})"
            lines += [*start, f"from diffusers import {pipeline}", *fetch, load, "```", ""]
        else:
            lines += [f"`{name}` has the layout of the original's file, and is loaded in its place.", ""]
    if name := files.get("lora"):
        load = f'pipe.load_lora_weights("{place}", weight_name="{name}")'
        lines += [*start, *whole(original), load, "```", ""]
    if name := files.get("map"):
        lines += [
            *start,
            "import trce_cli",
            *fetch[:-1],
            *whole(original),
            f"trce_cli.load_map({path(name)}).apply_to(pipe)",
            "```",
            "",
        ]
    return lines


def _verdicts(told: Any) -> list[str]:
    """What the guards' figures mean, a sentence each."""
    if not isinstance(told, Mapping):
        return []
    judged = [each for each in told.values() if isinstance(each, Mapping) and "sentence" in each]
    return [*(f"    - {str(each['verdict']).capitalize()}: {each['sentence']}" for each in judged), ""]


def _folded(what: str, values: Mapping[str, Any]) -> list[str]:
    """A table that a reader opens."""
    rows = _table(what, values)
    return [f"<details><summary>{what}</summary>", "", *rows, "</details>", ""] if rows else []


def _licence(source: Mapping[str, Any]) -> str:
    licence = source.get("license_name") or source.get("license")
    link = f" ({source['license_link']})" if source.get("license_link") else ""
    if not licence:
        return (
            "The licence and the use restrictions of the original apply to this copy. Which they are is not "
            "known here: its card does not name them. Look them up before you use it or pass it on."
        )
    return (
        f"The licence of the original, {licence}, applies to this copy, and so do its use restrictions, "
        f"which have to be passed on with it{link}."
    )


def _hub_id(name: str) -> str | None:
    """The hub id of a checkpoint given by it, by a file in it, by the address of either's page, or by a
    folder of the hub's cache, else None."""
    if cached := re.search(r"models--([\w.-]+?)--([\w.-]+)", name):
        return f"{cached[1]}/{cached[2]}"
    if name.startswith((".", "/", "~")) or os.path.exists(name):
        return None
    asked = repository(name)
    return asked.id if asked and "/" in asked.id else None


def _table(what: str, values: Mapping[str, Any]) -> list[str]:
    rows = [f"| {key} | {value} |" for key, value in _flat(values)]
    return [f"| {what} | value |", "| --- | --- |", *rows, ""] if rows else []


def _flat(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Rows of a table: nested keys joined, numbers to four digits."""
    rows: list[tuple[str, str]] = []
    for key, value in values.items():
        name = f"{prefix}{key}".replace("_", " ")
        if isinstance(value, Mapping):
            rows += _flat(value, f"{name}: ")
        elif isinstance(value, float):
            rows.append((name, f"{value:.4g}"))
        elif isinstance(value, list | tuple):
            told = [f"{item:.4g}" if isinstance(item, float) else str(item) for item in value]
            more = f" and {len(told) - SHOWN} more, in `trce.json`" if len(told) > SHOWN else ""
            rows.append((name, ", ".join(told[:SHOWN]) + more))
        elif value is not None:
            rows.append((name, str(value).replace("|", "\\|").replace("\n", " ")))
    return rows
