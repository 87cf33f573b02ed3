"""Single safetensors files, as most tools for Stable Diffusion keep a whole checkpoint."""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final

from trce_cli.checkpoint.checkpoint import Checkpoint, Place, WeightCopy
from trce_cli.checkpoint.checks import OTHER_BUILD, check
from trce_cli.checkpoint.folder import Configs, listed, part_weights, seen
from trce_cli.checkpoint.provenance import HISTORY, single_file_metadata
from trce_cli.checkpoint.scaled import BESIDE, scale_of
from trce_cli.errors import BadInput
from trce_cli.families.base import Family, Shape, Stored
from trce_cli.families.registry import FAMILIES, family_of_file, family_of_folder
from trce_cli.system.foreign import check_unchanged
from trce_cli.system.paths import inside
from trce_cli.system.safetensors import SafetensorsFile

# What to do with a file of the denoiser alone.
ALONE: Final = "A denoiser alone takes a diffusers folder of its base, with weights, as --config."


class SingleFile(Checkpoint):
    """One file with the weights; configurations and tokenizers lie in another folder, and so do parts that
    files of the family never hold.
    """

    layout = "single-file"

    def provenance_text(self) -> str | None:
        """The text of `trce.json` in the file's metadata."""
        return self.denoiser_files[0].metadata.get(HISTORY)

    def carried(self, files: Mapping[str, bytes]) -> tuple[dict[str, str] | None, Mapping[str, bytes]]:
        """`trce.json`, in the metadata."""
        return single_file_metadata(self, files), {}

    def card_text(self) -> str | None:
        """None: a README.md beside the file may be of anything."""
        return None

    def further_tensors(self, parts: Collection[str]) -> Iterator[tuple[str, SafetensorsFile, str]]:
        """The tensors that are neither of the denoiser nor lie among those of the parts."""
        known = [place.stored.name for copy in self.denoiser for place in copy.tensors.values()]
        for part in parts:
            if part in self.parts and not self.borrowed(part):
                places = self.parts[part].tensors.values()
                known.append(_common_prefix([at.stored.name for at in places if at.file.path == self.path]))
        (file,) = self.denoiser_files
        yield from ((key, file, key) for key in file.tensors if not key.startswith(tuple(known)))

    def borrowed(self, part: str) -> bool:
        """Whether a part's weights lie in the folder of the configurations, not in the file."""
        return part in self.parts and all(file.path != self.path for file in self.parts[part].files)

    def drawn_from(self) -> dict[str, Path]:
        """The file, by whatever name it goes, the configurations and tokenizers, and parts that it lacks."""
        folder = self.config_folder
        beside = list(_texts(folder, self.family, seen(folder, listed(folder))).values())
        for part in self.parts:
            beside += [file.path for file in self.parts[part].files if file.path != self.path]
        return {
            "checkpoint.safetensors": self.path,
            **{f"{path.parent.name}/{path.name}": path for path in beside},
        }


def _texts(folder: Path, family: Family, names: Iterable[str]) -> dict[str, Path]:
    """Of the files in a diffusers folder its configurations and tokenizers, each a file of that folder."""
    parts = (family.denoiser, *family.weight_parts, *family.other_parts)
    found = [name for name in names if name.endswith((".json", ".txt", ".jinja", ".model"))]
    return {name: inside(folder, name) for name in found if name.rpartition("/")[0] in parts}


def _common_prefix(names: Sequence[str]) -> str:
    first, last = min(names), max(names)
    return first[
        : next((at for at, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))
    ]


def _configured(folder: Path) -> tuple[Family, Configs]:
    if not (folder / "model_index.json").is_file():
        raise BadInput(f"--config {folder} is not a diffusers folder: it has no model_index.json.")
    return family_of_folder(str(folder), lambda denoiser: Configs(folder, denoiser))


def _family(path: Path, shapes: Mapping[str, Shape], given: tuple[Family, Configs] | None) -> Family:
    """The family of a file: that which --config says, where it may be; so it is where a denoiser is alone."""
    if given and given[0].claims_file(shapes) is None:
        return given[0]
    try:
        return family_of_file(str(path), shapes)
    except BadInput as error:
        if given:
            meant, configs = given
            found = meant.names(configs).from_file(shapes)["denoiser"]
            if any(door.weights for door in meant.doors(configs, found)):
                return meant
        elif any(of.network in error.message for of in FAMILIES) or "no text encoder" in error.message:
            raise BadInput(error.message, f"{error.hint or ''} {ALONE}".strip()) from None
        raise


def open_single_file(name: str, file: SafetensorsFile, config: Path | None) -> SingleFile:
    """See `open_checkpoint`."""
    path = file.path
    shapes = {key: info.shape for key, info in file.tensors.items() if not key.endswith(BESIDE)}
    before = seen(config, listed(config)) if config and config.is_dir() else {}
    given = _configured(config) if config else None
    family = _family(path, shapes, given)
    meant, configs = given or _configured(family.base_folder())
    folder = configs.path
    if meant is not family:
        raise BadInput(f"{path} is of the family {family.name}, and {folder} of {meant.name}.")
    told = family.told_by_file(shapes, file.metadata, file.read, configs, config is None)
    configs = Configs(folder, family.denoiser, told.config)
    if told.config:  # else the folder's own, which were checked
        try:
            family.check(configs)
        except BadInput as error:  # the folder alone was fine, unless it has changed since
            check_unchanged({folder / relative: identity for relative, identity in before.items()})
            raise BadInput(f"By what {path} says of itself {error.message}", OTHER_BUILD) from None
    names = family.names(configs)
    places = names.from_file(shapes)
    denoiser = {ours: at.name for ours, at in places["denoiser"].items()}
    copies = [
        WeightCopy(
            label, {ours: Place(file, Stored(copy[key])) for ours, key in denoiser.items() if key in copy}
        )
        for label, copy in names.copies(shapes).items()
    ]
    checkpoint = SingleFile(
        name=name,
        path=path,
        family=family,
        denoiser=(_held(file, places["denoiser"]), *copies),
        parts=_parts(file, places, family, configs),
        config=configs,
        config_folder=folder,
        files={path.name: path},
        identities={path: before[name] for name, path in _texts(folder, family, before).items()},
        rewritten=configs.rewritten(),
        remarks=told.notes,
    )
    check(
        checkpoint,
        {part: {ours: at.name for ours, at in of.items()} for part, of in places.items()},
        OTHER_BUILD,
    )
    checkpoint.check_unchanged()
    return checkpoint


def _held(file: SafetensorsFile, places: Mapping[str, Stored]) -> WeightCopy:
    """The weights at these places, as far as the file holds them."""
    held = {ours: at for ours, at in places.items() if at.name in file.tensors}
    return WeightCopy("plain", {ours: Place(file, at, scale_of(file, at.name)) for ours, at in held.items()})


def _parts(
    file: SafetensorsFile, places: Mapping[str, Mapping[str, Stored]], family: Family, configs: Configs
) -> dict[str, WeightCopy]:
    """The parts beside the denoiser: the file's, and what such files never hold from the configurations'
    folder.
    """
    held = {part: _held(file, of) for part, of in places.items() if part != "denoiser"}
    parts = {part: copy for part, copy in held.items() if copy.tensors}
    for part in family.weight_parts:
        needed = family.text_weights(configs).get(part, {}).keys() - places.get(part, {}).keys()
        if (part not in places or needed) and (copy := part_weights(configs.path, family, configs, part)):
            of = {key: at for key, at in copy.tensors.items() if part not in places or key in needed}
            parts[part] = replace(copy, tensors={**of, **(parts[part].tensors if part in parts else {})})
    return parts
