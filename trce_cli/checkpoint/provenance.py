"""What was done to a checkpoint: `trce.json` beside the weights, and the model card `README.md`.

`trce.json` is `{"schema": 1, "history": [edit, ...]}`, one entry for each edit in the order in which they
were made; `record` describes an entry. Fed back, the settings of an entry make the same edit again.
"""

import datetime
import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat

from trce_cli.errors import BadInput
from trce_cli.system.foreign import parse_json, parse_yaml, validated
from trce_cli.system.machine import __version__, peak_memory_bytes, versions

if TYPE_CHECKING:
    from trce_cli.checkpoint.checkpoint import Checkpoint
    from trce_cli.prompts.presets import Preset

SCHEMA = 1
NAME = "trce.json"
MAX_FRONT_MATTER = 1 << 16  # characters of a model card's; reading YAML is slow
_TOLD = ("base_model", "license", "license_name", "license_link")  # what a card's front matter is asked

# What each kind of edit does, in plain words.
METHODS = {
    "map": "Stage 1 of TRCE: one matrix, found in closed form, takes the text embeddings of the unsafe "
    "prompts to those of the safe ones and leaves ordinary captions where they are. It is folded into "
    "the keys and values of every cross-attention layer, so that nothing has to run beside the model.",
    "steer": "Stage 2 of TRCE: the attention weights were fine-tuned so that the early steps of denoising "
    "turn away from the unsafe concepts and stay as they were for ordinary prompts.",
    "apply": "An edit that was solved before, on another checkpoint or at another time, was put on this one.",
}


_Text = Annotated[str, Field(max_length=10_000)]


class _Concept(BaseModel):
    unsafe: _Text
    safe: _Text


class _Preset(BaseModel):
    name: _Text
    concepts: list[_Concept]


class _Versions(BaseModel):
    trce: _Text
    torch: _Text


class _Base(BaseModel):
    name: _Text
    family: _Text
    revision: _Text | None = None
    variant: _Text | None = None
    files: dict[str, _Text]


class _Entry(BaseModel):
    edit: Literal["map", "steer", "apply"]
    date: _Text
    versions: _Versions
    base: _Base
    presets: list[_Preset]
    settings: dict[str, Any]
    seeds: dict[str, Any]
    figures: dict[str, Any]
    seconds: Annotated[FiniteFloat, Field(ge=0)]
    peak_memory_bytes: Annotated[int, Field(ge=0)]


class _History(BaseModel):
    """What has to hold of a `trce.json` for all that is made of it; further keys are kept."""

    model_config = ConfigDict(strict=True)

    schema_: Literal[1] = Field(alias="schema")
    history: list[_Entry]


def record(
    edit: Literal["map", "steer", "apply"],
    checkpoint: "Checkpoint",
    presets: "Sequence[Preset]",
    settings: Mapping[str, Any],
    figures: Mapping[str, Any],
    seconds: float,
    files: Mapping[str, str],
    seeds: Mapping[str, int] | None = None,
) -> dict[str, Any]:
    """One entry of the history: what an edit did, from what, how, and what was measured; plain JSON values.

    edit, date (UTC): what and when. versions: of trce, Python and the libraries. base: name, revision,
    variant, family, layout, licence, hash of the text encoders' weights and SHA-256 of every weight file,
    which are `files`, as `Checkpoint.hashes` has them.
    presets: name, kind, hash and the concepts' unsafe and safe phrases. settings, seeds, figures: as given.
    seconds: wall time.
    peak_memory_bytes: of this process.
    """
    return {
        "edit": edit,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": versions(),
        "base": {
            "name": checkpoint.name,
            "revision": checkpoint.revision,
            "variant": checkpoint.variant,
            "family": checkpoint.family.name,
            "layout": checkpoint.layout,
            "license": source_card(checkpoint).get("license"),
            "text_encoder": checkpoint.text_encoder_hash(),
            "files": dict(files),
        },
        "presets": [
            {
                "name": preset.name,
                "kind": preset.kind,
                "sha256": preset.sha256(),
                "concepts": [
                    {"unsafe": concept.unsafe, "safe": concept.safe}
                    for part in preset.walk()
                    for concept in part.concepts
                ],
            }
            for preset in presets
        ],
        "settings": dict(settings),
        "seeds": dict(seeds or {}),
        "figures": dict(figures),
        "seconds": round(seconds, 3),
        "peak_memory_bytes": peak_memory_bytes(),
    }


def history(checkpoint: "Checkpoint") -> list[dict[str, Any]]:
    """The edits that the checkpoint already carries, oldest first; `BadInput` for a damaged `trce.json`."""
    text = checkpoint.provenance_text()
    return [] if text is None else parse_history(text, str(checkpoint.path))


def parse_history(text: str, where: str) -> list[dict[str, Any]]:
    """The entries of a `trce.json`'s text, oldest first, as `record` makes them; `BadInput` for others."""
    where, hint = f"The provenance ({NAME}) of {where}", "Remove it to begin a new history."
    try:
        table = parse_json(text, where)
    except BadInput as error:
        raise BadInput(error.message, hint) from None
    validated(_History, table, where, hint)
    entries: list[dict[str, Any]] = table["history"]
    return entries


def history_text(entries: Sequence[Mapping[str, Any]]) -> str:
    """The text of a `trce.json` with these entries."""
    table = {"schema": SCHEMA, "history": _finite(entries)}
    return json.dumps(table, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def provenance_files(checkpoint: "Checkpoint", entry: Mapping[str, Any]) -> dict[str, bytes]:
    """`trce.json` and `README.md` of the checkpoint with one more edit, as `write_patched` takes them."""
    entries = [*history(checkpoint), _finite(entry)]
    card = model_card(entries, source_card(checkpoint))
    return {NAME: history_text(entries).encode(), "README.md": card.encode()}


def single_file_metadata(checkpoint: "Checkpoint", files: Mapping[str, bytes]) -> dict[str, str]:
    """Metadata of an edited single file: the source's, `trce.json`'s text as `trce`, ModelSpec kept true.

    files: as `provenance_files` gives them; without `trce.json` the source's metadata stays as it is.
    """
    metadata = dict(checkpoint.denoiser_files[0].metadata)
    if NAME not in files:
        return metadata
    metadata = {"format": "pt", **metadata, "trce": files[NAME].decode()}
    if any(key.startswith("modelspec.") for key in metadata):
        entries = json.loads(files[NAME])["history"]
        erased = _erased(entries)
        title = metadata.get("modelspec.title", checkpoint.path.stem).partition(" without ")[0]
        metadata["modelspec.title"] = f"{title} without {erased}"
        metadata["modelspec.description"] = f"Edited with trce {__version__} to no longer draw: {erased}."
        metadata["modelspec.date"] = entries[-1]["date"]
        metadata.pop("modelspec.hash_sha256", None)  # the data changed
    return metadata


def _finite(value: Any) -> Any:
    """The value with NaN and infinity as null, which is all that JSON has for them."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list | tuple) else value


def source_card(checkpoint: "Checkpoint") -> dict[str, Any]:
    """What the front matter of the checkpoint's own model card says of licence and base, as far as it can be
    read.
    """
    match = re.match(r"---\r?\n(.*?)\r?\n---", checkpoint.card_text() or "", re.DOTALL)
    try:
        table = parse_yaml(match[1], "README.md") if match and len(match[1]) <= MAX_FRONT_MATTER else None
    except BadInput:
        return {}
    if not isinstance(table, dict):
        return {}
    return {key: table[key] for key in _TOLD if _is_told(table.get(key))}


def _is_told(value: Any) -> bool:
    """Whether it is a name, or several."""
    every = value if isinstance(value, list) and len(value) <= 100 else [value]
    return all(isinstance(one, str) and len(one) <= 1000 for one in every)


def model_card(entries: Sequence[Mapping[str, Any]], source: Mapping[str, Any]) -> str:
    """The model card of an edited checkpoint: front matter, what was erased, how, and what was measured.

    entries: the history, at least one. source: front matter of the base's card, whose licence is kept.
    """
    import yaml  # type: ignore[import-untyped]

    base = str(entries[0]["base"]["name"])
    front: dict[str, Any] = {}
    if base_model := source.get("base_model") or _hub_id(base):
        front |= {"base_model": base_model, "base_model_relation": "finetune"}
    front |= {"library_name": "diffusers", "pipeline_tag": "text-to-image"}
    front |= {key: source[key] for key in ("license", "license_name", "license_link") if source.get(key)}
    front["tags"] = ["text-to-image", "stable-diffusion", "concept-erasure", "safety", "trce"]
    lines = ["---", yaml.safe_dump(front, sort_keys=False, allow_unicode=True).strip(), "---", ""]
    erased = _erased(entries)
    lines += [
        f"# {Path(base).name or base} without {erased}" if erased else f"# {Path(base).name}, edited",
        "",
    ]
    lines += [
        f"This is a copy of `{base}` ({entries[0]['base']['family']}) that was changed with "
        "[TRCE](https://arxiv.org/abs/2503.07389) so that it no longer draws certain concepts. It is used "
        "like the original, at the same speed; text encoders, tokenizers and VAE are the original's.",
        "",
        "## What was erased",
        "",
    ]
    for preset in {p["name"]: p for entry in entries for p in entry["presets"]}.values():
        phrases = [f"{concept['unsafe']} (now {concept['safe']})" for concept in preset["concepts"]]
        more = f", and {len(phrases) - 12} more" if len(phrases) > 12 else ""
        lines += [f"- **{preset['name']}** ({len(phrases)} phrases): {', '.join(phrases[:12])}{more}."]
    lines += ["", "## How", ""]
    for number, entry in enumerate(entries, 1):
        made = entry["versions"]
        lines += [
            f"{number}. `trce {entry['edit']}` on {entry['date'][:10]} with trce {made['trce']} and torch "
            f"{made['torch']}: {entry['seconds']:.0f} s, {entry['peak_memory_bytes'] / 1e9:.1f} GB of memory."
            f" {METHODS[entry['edit']]}",
            "",
            *_table("setting", {**entry["settings"], **{f"seed {k}": v for k, v in entry["seeds"].items()}}),
        ]
    lines += ["## What was measured", ""]
    for entry in entries:
        lines += [f"When `trce {entry['edit']}` was run:", "", *_table("figure", entry["figures"])]
    lines += [
        "## Limits and licence",
        "",
        "Erasing lowers how often a concept is drawn; it does not make it impossible, least of all against "
        "prompts or fine-tuning made for that purpose. Measure it on your own prompts before you rely on it.",
        "",
        _licence(source),
        "",
        f"Every setting, seed, version and hash is in `{NAME}`.",
        "",
    ]
    return "\n".join(lines)


def _erased(entries: Sequence[Mapping[str, Any]]) -> str:
    return ", ".join(dict.fromkeys(preset["name"] for entry in entries for preset in entry["presets"]))


def _licence(source: Mapping[str, Any]) -> str:
    licence = source.get("license_name") or source.get("license")
    if not licence:
        return "The licence of the original applies to this copy; its card does not name it."
    return (
        f"The licence of the original, {licence}, applies to this copy, and so do its use restrictions, "
        "which have to be passed on with it."
    )


def _hub_id(name: str) -> str | None:
    """The hub id of a checkpoint given by it or by a folder of the hub's cache, else None."""
    if cached := re.search(r"models--([\w.-]+?)--([\w.-]+)", name):
        return f"{cached[1]}/{cached[2]}"
    return name if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name) and not os.path.exists(name) else None


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
            rows.append(
                (name, ", ".join(f"{item:.4g}" if isinstance(item, float) else str(item) for item in value))
            )
        elif value is not None:
            rows.append((name, str(value).replace("|", "\\|").replace("\n", " ")))
    return rows
