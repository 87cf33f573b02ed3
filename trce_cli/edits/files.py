"""Edit files: opened and checked, fitted to a checkpoint, and put one after the other."""

import re
from collections.abc import Mapping, Sequence
from functools import partial, reduce
from pathlib import Path
from typing import Any, Final

from torch import Tensor

from trce_cli.checkpoint import hub
from trce_cli.checkpoint.checkpoint import PICKLE_SUFFIXES, Checkpoint, Hashes
from trce_cli.checkpoint.provenance import history, record
from trce_cli.edits.edit import WeightEdit, same_but_for_rounding
from trce_cli.edits.lora import MERGE, Lora, is_lora, open_lora
from trce_cli.edits.map import MAP, Map, open_map
from trce_cli.edits.weights import Weights, open_weights
from trce_cli.errors import BadInput
from trce_cli.families.registry import may_be_denoiser, not_a_checkpoint
from trce_cli.system.paths import as_text, expanded
from trce_cli.system.safetensors import SafetensorsFile, hash_file

Edit = Map | Lora | Weights
# What adapters of other kinds are called, and what is in the names of their tensors.
_OTHER_ADAPTERS: Final = {
    "a GLoRA": r"\.a1\.weight$",
    "OFT": r"\.oft_\w+",
    "IA3": r"\.(on_input|ia3_l)$",
    "VeRA": r"\.vera_lambda_\w+",
    "a LoRA of XLabs' processors": r"\.processor\.(qkv|proj)_lora[12]?\.(down|up)\.weight$",
    "a LyCORIS file of whole differences": r"\.(diff|diff_b|w_norm|b_norm)$",
}


def load_map(path: str | Path) -> Map:
    """Read a map from its file; BadInput says in one sentence what is wrong with it."""
    edit = open_edit(path)
    if not isinstance(edit, Map):
        what = "a LoRA" if isinstance(edit, Lora) else "weights of a denoiser"
        raise BadInput(f"{path} is {what}, not a map.", "Load it into the pipeline as diffusers does.")
    return edit


def is_edit(name: str) -> bool:
    """Whether what a user gives as a checkpoint is a file with an edit."""
    path = expanded(name)
    if path.suffix != ".safetensors" or not path.is_file():
        return False
    try:
        open_edit(path)
    except BadInput:
        return False
    return True


def locate(name: str | Path) -> Path:
    """The file that a user means by the name of an edit: a path, or a file on the hub, which is fetched."""
    path, name = expanded(name), str(name)
    asked = None if path.exists() else hub.repository(name)
    if asked is None or (asked.file and "://" not in name and Path(path.parts[0]).is_dir()):
        return path
    if asked.file is None:
        if "://" not in name:
            return path
        raise BadInput(
            f"{name} is a repository, and an edit is one file of it.",
            f"Give {asked.id}/FILE.safetensors, or the address of the file's page.",
        )
    return hub.fetched(name, asked, None, None)


def open_edit(path: str | Path) -> Edit:
    """Open a map, a LoRA, or weights of a denoiser, and check it; BadInput says what is wrong with it."""
    path = expanded(path)
    if not path.exists():
        raise BadInput(f"There is no file {path}.", "The edits come first, the checkpoint last.")
    if path.is_dir() or path.suffix in PICKLE_SUFFIXES:
        what = "a folder" if path.is_dir() else "a PyTorch pickle, which can run code when it is loaded"
        raise BadInput(
            f"{path} is {what}, not an edit in a .safetensors file.",
            "The edits come first, the checkpoint last.",
        )
    file = SafetensorsFile.open(path)
    if any(name.startswith(MAP) for name in file.tensors):
        return open_map(file)
    for kind, part in _OTHER_ADAPTERS.items():
        if any(re.search(part, name) for name in file.tensors):
            raise BadInput(f"{path} is {kind}, which cannot be applied here.", MERGE)
    if is_lora(file):
        return open_lora(file)
    if may_be_denoiser(file.shapes):
        return open_weights(file)
    what = not_a_checkpoint(file.shapes) or "a file of another kind"
    raise BadInput(
        f"{path} is neither a map nor a LoRA nor weights of a denoiser, but {what}.",
        "The edits come first, the checkpoint last.",
    )


def check_fits(
    edit: Edit,
    checkpoint: Checkpoint,
    text_encoder: str,
    allow_other_text_encoder: bool = False,
    denoiser_only: bool = False,
) -> bool:
    """Whether the checkpoint has the very text encoders that the edit was made for, rounded or not.

    text_encoder: the checkpoint's `text_encoder_hash`. Weights of a denoiser do not say, and are what they
    are whatever encodes.

    Raises BadInput for another family, for other or unknown text encoders unless they are allowed, and for a
    LoRA that changes text encoders as well, of which only `denoiser_only` leaves that part out.
    """
    if isinstance(edit, Weights):
        return True
    made, name = edit.made, checkpoint.name
    if isinstance(edit, Lora) and edit.text_layers and not denoiser_only:
        raise BadInput(
            f"{told_text(edit, checkpoint)} Text encoders are never changed here.",
            "`trce apply --denoiser-only` applies the rest alone, which is not what was trained; else merge "
            "all of it into the checkpoint with the tool that it comes from.",
        )
    if made and checkpoint.family is not made.family:
        family = checkpoint.family.name
        raise BadInput(
            f"The edit was made for {made.family.name}, and {name} is of the family {family}.",
            "Make one for that family with `trce map`.",
        )
    if made and text_encoder == made.text_encoder:
        return True
    if made and made.sample and same_but_for_rounding(made.sample, checkpoint.text_encoder_sample()):
        return True
    if not allow_other_text_encoder:
        maker = (
            f"for the text encoder {made.text_encoder[:12]}"
            if made
            else "for a text encoder it does not name"
        )
        raise BadInput(
            f"The edit was made {maker}, and {name} has {text_encoder[:12]}.",
            "If that is a fine-tuned one of the same base, add --allow-other-text-encoder.",
        )
    return False


def told_text(lora: Lora, checkpoint: Checkpoint) -> str:
    """What a LoRA changes that has a part for text encoders as well."""
    return (
        f"{lora.file.path.name} changes {len(lora.parts)} layers of the {checkpoint.family.network} and "
        f"{lora.text_layers} of the text encoder."
    )


def carried(checkpoint: Checkpoint, paths: Sequence[Path], edits: Sequence[Edit]) -> list[str]:
    """The names of those of these files whose edit the checkpoint carries already, by its history."""
    entries = history(checkpoint)
    applied = [one for entry in entries for one in entry.get("edits", ())]
    entries += [entry for one in applied for entry in one["history"]]
    hashes, made_so = {one["sha256"] for one in applied}, [_deed(entry) for entry in entries]
    return [
        path.name
        for path, edit in zip(paths, edits, strict=True)
        if (hashes and hash_file(path) in hashes)
        or (edit.made and any(_deed(entry) in made_so for entry in edit.made.history))
    ]


def _deed(entry: Mapping[str, Any]) -> dict[str, Any]:
    """What an entry of a history says that is so again whenever the same edit is made once more."""
    return {key: entry.get(key) for key in ("edit", "presets", "settings", "seeds", "edits")}


def cautions(checkpoint: Checkpoint, paths: Sequence[Path], edits: Sequence[Edit]) -> list[str]:
    """Sentences on edits that are there already, and on what of an edit is not applied."""
    twice = "carries {} already, which is put on it once more."
    return [
        *(f"{checkpoint.name} {twice.format(name)}" for name in carried(checkpoint, paths, edits)),
        *(
            f"{told_text(edit, checkpoint)} The latter are left out."
            for edit in edits
            if isinstance(edit, Lora) and edit.text_layers
        ),
    ]


def combine(
    edits: Sequence[Edit], checkpoint: Checkpoint, strength: float = 1.0
) -> tuple[dict[str, WeightEdit], Map | None]:
    """Edits one after the other, each at the strength: by diffusers key, and as one map if they are maps.

    Maps of the same text encoders are joined by matrix product. Raises BadInput where one does not fit.
    """
    maps = [edit.scaled(strength) for edit in edits if isinstance(edit, Map)]
    encoders = {text_map.made.text_encoder for text_map in maps}
    if len(maps) == len(edits) and len(encoders) == 1:
        text_map = reduce(Map.__matmul__, maps)
        return text_map.weight_edits(checkpoint), text_map
    each = [edit.weight_edits(checkpoint, strength) for edit in edits]
    keys = dict.fromkeys(key for edit in each for key in edit)
    return {key: partial(_in_turn, [edit[key] for edit in each if key in edit]) for key in keys}, None


def _in_turn(edits: Sequence[WeightEdit], weight: Tensor) -> Tensor:
    return reduce(lambda found, edit: edit(found), edits, weight.double())


def record_apply(
    checkpoint: Checkpoint,
    paths: Sequence[Path],
    edits: Sequence[Edit],
    strength: float,
    figures: Mapping[str, Any],
    seconds: float,
    hashes: Hashes,
) -> dict[str, Any]:
    """The entry for edits that were made before: like `record`'s, with the concepts that they erase.

    edits: for each, in the order in which they act, file name, SHA-256, form, and its own history.
    hashes: of the checkpoint.
    """
    histories = [list(edit.made.history) if edit.made else [] for edit in edits]
    files = [
        {
            "file": as_text(path.name),
            "sha256": hash_file(path),
            "form": type(edit).__name__.lower(),
            "history": entries,
        }
        for path, edit, entries in zip(paths, edits, histories, strict=True)
    ]
    settings: dict[str, Any] = {"edits": [file["file"] for file in files], "strength": strength}
    if any(isinstance(edit, Lora) and edit.text_layers for edit in edits):
        settings["denoiser_only"] = True
    entry = record("apply", checkpoint, [], settings, figures, seconds, hashes)
    entry["presets"] = [preset for entries in histories for made in entries for preset in made["presets"]]
    return entry | {"edits": files}
