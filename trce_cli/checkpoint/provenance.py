"""What was done to a checkpoint: `trce.json` beside the weights.

`trce.json` is `{"schema": 1, "history": [edit, ...]}`, one entry for each edit in the order in which they
were made; `record` describes an entry. Fed back, the settings of an entry make the same edit again.
"""

import datetime
import json
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat

from trce_cli.checkpoint.bases import public_name
from trce_cli.checkpoint.card import FOLDER, Loading, erased_names, model_card, source_card
from trce_cli.checkpoint.measured import CARD
from trce_cli.errors import BadInput
from trce_cli.system.foreign import parse_json, validated
from trce_cli.system.machine import __version__, peak_memory_bytes, versions
from trce_cli.system.paths import as_text

if TYPE_CHECKING:
    from trce_cli.checkpoint.checkpoint import Checkpoint, Hashes
    from trce_cli.prompts.presets import Preset

SCHEMA = 1
NAME = "trce.json"
HISTORY = "trce"  # the key of its text in the metadata of single files and edits

_Text = Annotated[str, Field(max_length=10_000)]


class _Concept(BaseModel):
    unsafe: _Text
    safe: _Text


class _Preset(BaseModel):
    name: _Text
    sha256: _Text | None = None
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


class _Applied(BaseModel):
    sha256: _Text
    history: list["_Entry"]


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
    edits: list[_Applied] = []


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
    hashes: "Hashes",
    seeds: Mapping[str, int] | None = None,
) -> dict[str, Any]:
    """One entry of the history: what an edit did, from what, how, and what was measured; plain JSON values.

    edit, date (UTC): what and when. versions: of trce, Python and the libraries. base: name, revision,
    variant, family, layout, licence, and its `hashes`.
    presets: name, kind, hash and the concepts' unsafe and safe phrases; parts: of it and what it includes,
    in their order, how many of the concepts are whose, and the templates that these are put into. settings,
    seeds, figures: as given. seconds: wall time.
    peak_memory_bytes: of this process.
    """
    return {
        "edit": edit,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": versions(),
        "base": {
            "name": public_name(checkpoint.name),
            "revision": checkpoint.revision,
            "variant": checkpoint.variant,
            "family": checkpoint.family.name,
            "layout": checkpoint.layout,
            "license": source_card(checkpoint).get("license"),
            "text_encoder": hashes.text_encoder,
            "files": {as_text(name): digest for name, digest in hashes.files.items()},
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
                "parts": [
                    {
                        "name": part.name,
                        "kind": part.kind,
                        "concepts": len(part.concepts),
                        "templates": list(part.templates),
                    }
                    for part in preset.walk()
                    if part.concepts
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


def erased_before(checkpoint: "Checkpoint", presets: "Sequence[Preset]") -> list[str]:
    """The names of those of these presets that the checkpoint's history erases already."""
    known = {told.get("sha256") for entry in history(checkpoint) for told in entry["presets"]}
    return [preset.name for preset in presets if preset.sha256() in known]


def parse_history(text: str, where: str) -> list[dict[str, Any]]:
    """The entries of a `trce.json`'s text, oldest first, as `record` makes them; `BadInput` for others."""
    where, hint = f"The provenance ({NAME}) of {where}", "Remove it to begin a new history."
    try:
        table = parse_json(text, where, strict=True)
    except BadInput as error:
        raise BadInput(error.message, hint) from None
    validated(_History, table, where, hint)
    entries: list[dict[str, Any]] = table["history"]
    return entries


def history_text(entries: Sequence[Mapping[str, Any]]) -> str:
    """The text of a `trce.json` with these entries."""
    table = {"schema": SCHEMA, "history": _finite(entries)}
    return json.dumps(table, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def provenance_files(
    checkpoint: "Checkpoint",
    entry: Mapping[str, Any],
    place: str = FOLDER,
    files: Mapping[str, str] | None = None,
) -> dict[str, bytes]:
    """`trce.json` and `README.md` of the checkpoint with one more edit, as `write_patched` takes them.

    place, files: where it will be and what will be there, see `Loading`.
    """
    entries = [*history(checkpoint), _finite(entry)]
    card = card_of(checkpoint, entries, place, files)
    return {NAME: history_text(entries).encode(), CARD: card.encode()}


def card_of(
    checkpoint: "Checkpoint",
    entries: Sequence[Mapping[str, Any]],
    place: str = FOLDER,
    files: Mapping[str, str] | None = None,
) -> str:
    """The model card of a checkpoint with this history; place, files: as `provenance_files` has them."""
    return model_card(entries, source_card(checkpoint), _loading(checkpoint, place, files))


def _loading(checkpoint: "Checkpoint", place: str, files: Mapping[str, str] | None) -> Loading:
    label = checkpoint.denoiser[0].label if checkpoint.path.is_dir() else "plain"
    return Loading(checkpoint.dtype, None if label == "plain" else label, place, files or {})


def single_file_metadata(checkpoint: "Checkpoint", files: Mapping[str, bytes]) -> dict[str, str]:
    """Metadata of an edited single file: the source's, `trce.json`'s text as `trce`, ModelSpec kept true.

    files: as `provenance_files` gives them; without `trce.json` the source's metadata stays as it is.
    """
    metadata = dict(checkpoint.denoiser_files[0].metadata)
    if NAME not in files:
        return metadata
    metadata = {"format": "pt", **metadata, HISTORY: files[NAME].decode()}
    if any(key.startswith("modelspec.") for key in metadata):
        entries = json.loads(files[NAME])["history"]
        erased = erased_names(entries)
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
