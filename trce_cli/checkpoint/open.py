"""Checkpoints by the names that users give them: a path, a hub id, or of an embedded one."""

import difflib
from collections.abc import Collection
from contextlib import suppress
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path

from trce_cli.checkpoint import hub
from trce_cli.checkpoint.checkpoint import PACKED_SUFFIXES, PICKLE_SUFFIXES, WEIGHT_SUFFIXES, Checkpoint
from trce_cli.checkpoint.checks import UNPACKED
from trce_cli.checkpoint.folder import Configs, open_folder
from trce_cli.checkpoint.provenance import HISTORY, parse_history
from trce_cli.checkpoint.single_file import open_single_file
from trce_cli.errors import BadInput
from trce_cli.families.registry import FAMILIES, family_of_folder
from trce_cli.prompts.home import EMBEDDED
from trce_cli.prompts.presets import preset_names
from trce_cli.system.paths import expanded
from trce_cli.system.safetensors import SafetensorsFile


def open_checkpoint(
    name: str, revision: str | None = None, variant: str | None = None, config: str | Path | None = None
) -> Checkpoint:
    """Open `emoji`, `emoji-dit`, a diffusers folder, a single `.safetensors` file, a hub id, a file in a
    repository (owner/name/file.safetensors) or the address of its page, and check it.

    `revision` and `variant` (for example `fp16`) choose among what a hub repository or a folder holds.
    `config` is a diffusers folder, or the hub id of one, with the configurations and tokenizers for a single
    file that is built differently from its family's published base; weights in it are looked at for parts
    that the file does not hold. A file that says it was made from an embedded checkpoint needs none. Raises
    `BadInput` in one sentence for everything that is wrong with it; no weight is read.
    """
    path = _embedded(name) or _resolve(name, revision, variant)
    if path.is_dir():
        return open_folder(name, path, variant, hub.commit(path / "model_index.json") or revision)
    if path.suffix == ".safetensors":
        file = SafetensorsFile.open(path)
        found = open_single_file(name, file, _config(config) if config else _embedded_base(file))
        return replace(found, revision=hub.commit(path))
    if path.suffix in PICKLE_SUFFIXES:
        raise BadInput(
            f"{path} is a PyTorch pickle; loading one can run code, so only safetensors are read.",
            "Get the safetensors form of this checkpoint.",
        )
    if path.suffix in PACKED_SUFFIXES:
        raise BadInput(
            f"{path} is quantized ({path.suffix}), and weights in this form are not edited.",
            UNPACKED,
        )
    raise BadInput(f"{path} is neither a diffusers folder nor a .safetensors file.")


def _embedded(name: str) -> Path | None:
    """The folder of an embedded checkpoint."""
    return next((home.folder for home in EMBEDDED if home.name == name), None)


def _embedded_base(file: SafetensorsFile) -> Path | None:
    """The folder of the embedded checkpoint that a single file was made from, by its own history."""
    with suppress(BadInput):
        for entry in parse_history(file.metadata.get(HISTORY, ""), str(file.path)):
            return _embedded(entry["base"]["name"])
    return None


def _config(name: str | Path) -> Path:
    """The folder of configurations; of a hub id all but the denoiser, which a single file holds itself."""
    return _embedded(str(name)) or _resolve(
        str(name), None, None, {f"{family.denoiser}/*.safetensors" for family in FAMILIES}
    )


def _resolve(
    name: str, revision: str | None, variant: str | None, without: Collection[str] = frozenset()
) -> Path:
    """An existing path is a path; what looks like one but is missing is an error; all else is a hub id."""
    path = expanded(name)
    try:
        if path.exists():
            return path
    except OSError as error:  # longer than a name may be, or in a folder that may not be looked into
        raise BadInput(f"{name[:100]!r} cannot be opened: {error.strerror}.") from error
    asked = hub.repository(name)
    if asked is None or "://" not in name:
        looks_like_path = name.startswith(("/", ".", "~")) or "\\" in name
        if asked is None:
            looks_like_path |= name.count("/") > 1
        elif asked.file:  # below a folder that is here it is a path that somebody mistyped
            looks_like_path |= Path(path.parts[0]).is_dir()
        else:
            looks_like_path |= path.suffix in WEIGHT_SUFFIXES
        if looks_like_path:
            raise BadInput(
                f"There is no file or folder {name}.",
                f"{_guess(name)}Check the path; a hub id has the form owner/name, a file there "
                "owner/name/file.safetensors.",
            )
    if asked is None:
        raise BadInput(
            f"{name!r} is neither an existing path nor a hub id.",
            "The checkpoint stands first, prompts behind it; a hub id has the form owner/name.",
        )
    try:
        return hub.fetched(name, asked, revision, variant, partial(_check_family, name), without)
    except BadInput as error:
        if guess := _guess(name):
            raise BadInput(error.message, f"{guess}{error.hint or ''}".strip()) from error
        raise


def _guess(name: str) -> str:
    """What a misspelt name may mean: an embedded checkpoint, what lies where it points, or a preset."""
    if name in preset_names():
        return f"{name} is a preset: give it with --preset, behind the checkpoint. "
    path = expanded(name)
    try:
        known = [each.name for each in islice(path.parent.iterdir(), 1000)]
    except (OSError, ValueError):
        known = []
    known += [home.name for home in EMBEDDED] if name == path.name else []
    close = difflib.get_close_matches(path.name, known, n=1)
    return f"Did you mean {path.with_name(close[0])}? " if close else ""


def _check_family(name: str, folder: Path) -> None:
    """Raise BadInput where a folder's configurations are of no known family."""
    family_of_folder(name, lambda denoiser: Configs(folder, denoiser))
