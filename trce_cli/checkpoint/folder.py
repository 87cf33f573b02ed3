"""Diffusers folders: every copy of the denoiser found, and all that could keep a concept left out."""

import os
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path, PurePosixPath
from types import SimpleNamespace
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

from trce_cli.checkpoint.checkpoint import (
    PACKED_SUFFIXES,
    PICKLE_SUFFIXES,
    WEIGHT_SUFFIXES,
    Checkpoint,
    Place,
    WeightCopy,
    told_cut,
)
from trce_cli.checkpoint.checks import UNPACKED, check
from trce_cli.checkpoint.measured import CARD, PICTURE
from trce_cli.errors import BadInput
from trce_cli.families.base import Family, Stored
from trce_cli.families.registry import CONTROLNET, FAMILIES, family_of_folder
from trce_cli.system.foreign import Identity, check_unchanged, read_json, read_text, validated
from trce_cli.system.paths import inside, matching, unseen
from trce_cli.system.safetensors import SafetensorsFile

_SHARD = re.compile(r"(?P<stem>.+)-\d{5}-of-\d{5}\.safetensors")


def _is_name(told: Any) -> bool:
    return told is None or isinstance(told, str)


class ModelIndex(BaseModel):
    """What a model_index.json has to say; further keys are parts, as lists, or the pipeline's own."""

    model_config = ConfigDict(strict=True, extra="allow")

    pipeline: str | None = Field(None, alias="_class_name")

    @model_validator(mode="after")
    def _names_classes(self) -> "ModelIndex":
        for part, told in (self.model_extra or {}).items():
            if isinstance(told, list) and not (len(told) == 2 and all(map(_is_name, told))):
                raise ValueError(f"{part[:40]!r} must be a library and a class")
        return self


class ShardIndex(BaseModel):
    """Which file holds each weight; further keys are the libraries' own."""

    model_config = ConfigDict(strict=True)

    weight_map: Annotated[dict[str, str], Field(min_length=1)]


class DiffusersFolder(Checkpoint):
    """A folder with a model_index.json and a folder for each part."""

    layout = "diffusers"

    def provenance_text(self) -> str | None:
        """The text of its `trce.json`."""
        path = self.files.get("trce.json")
        return read_text(path, errors="replace") if path else None

    def carried(self, files: Mapping[str, bytes]) -> tuple[dict[str, str] | None, Mapping[str, bytes]]:
        """All of them, as files."""
        return None, files

    def card_text(self) -> str | None:
        """The text of its README.md."""
        card = self.path / CARD
        return read_text(card, errors="replace") if card.is_file() else None

    def further_tensors(self, parts: Collection[str]) -> Iterator[tuple[str, SafetensorsFile, str]]:
        """The tensors in other folders, named after their file."""
        for relative, path in self.files.items():
            if path.suffix == ".safetensors" and relative.partition("/")[0] not in parts:
                file = SafetensorsFile.open(path)
                yield from ((f"{relative}: {key}", file, key) for key in file.tensors)

    def drawn_from(self) -> dict[str, Path]:
        """The files in the folders of the parts that draw."""
        family = self.family
        parts = {family.denoiser, *family.weight_parts, *family.other_parts}
        return {name: path for name, path in self.files.items() if name.partition("/")[0] in parts}


class Configs(Mapping[str, Mapping[str, Any]]):
    """The configurations in a diffusers folder by part, each read when it is asked for; BadInput without one.

    "model_index" is the folder's own, "denoiser" that of the denoiser, whatever its folder is called. said:
    by part what stands in place of the folder's.
    """

    def __init__(
        self, folder: Path, denoiser: str, said: Mapping[str, Mapping[str, Any]] | None = None
    ) -> None:
        self.path, self.said = folder, said or {}
        self._places = {
            "model_index": "model_index.json",
            "denoiser": f"{denoiser}/config.json",
            "scheduler": "scheduler/scheduler_config.json",
        }
        self._read: dict[str, Mapping[str, Any]] = {}

    def __getitem__(self, part: str) -> Mapping[str, Any]:
        if part in self.said:
            return self.said[part]
        if part not in self._read:
            place = self._place(part)
            if not os.path.lexists(self.path / place):
                raise BadInput(
                    f"{self.path} has no {place}.",
                    "Get the folder whole: every part needs its configuration, with or without its weights.",
                )
            told = read_json(path := inside(self.path, place))
            if part == "model_index":
                validated(ModelIndex, told, str(path))
            self._read[part] = told
        return self._read[part]

    def rewritten(self) -> dict[str, Mapping[str, Any]]:
        """What stands in place of the folder's files, by their relative names."""
        return {self._place(part): said for part, said in self.said.items()}

    def _place(self, part: str) -> str:
        return self._places.get(part, f"{part}/config.json")

    def __iter__(self) -> Iterator[str]:
        return iter(path.parent.name for path in self.path.glob("*/*config.json"))

    def __len__(self) -> int:
        return sum(1 for _ in self)


def cut_by_base(prompts: Collection[str]) -> list[str]:
    """A sentence on how many of the prompts are longer than the base of the oldest family reads."""
    family: Any = FAMILIES[0]
    base = family.base_folder()
    told = SimpleNamespace(config=Configs(base, family.denoiser), folder=base.joinpath)
    limit, count = family.truncated(told, list(prompts))
    return told_cut(family.name, limit, count, len(prompts))


def open_folder(name: str, folder: Path, variant: str | None, revision: str | None) -> DiffusersFolder:
    """See `open_checkpoint`."""
    if not (folder / "model_index.json").is_file():
        part = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
        kind = f" but a {part['_class_name']} alone" if "_class_name" in part else ""
        raise BadInput(
            f"{folder} is not a diffusers checkpoint{kind}: it has no model_index.json.",
            CONTROLNET
            if "ControlNet" in kind
            else "Give the folder that holds text_encoder/, tokenizer/ and the like.",
        )
    names = listed(folder)
    before = seen(folder, names)
    family, config = family_of_folder(str(folder), lambda denoiser: Configs(folder, denoiser))
    denoiser = _denoiser_copies(folder, family, config, variant)
    files, left_out = _folder_files(folder, names, family, config["model_index"], denoiser)
    parts = {part: part_weights(folder, family, config, part, variant) for part in family.weight_parts}
    checkpoint = DiffusersFolder(
        name=name,
        path=folder,
        family=family,
        denoiser=denoiser,
        parts={part: copy for part, copy in parts.items() if copy},
        config=config,
        config_folder=folder,
        files=files,
        left_out=left_out,
        variant=variant,
        revision=revision,
        # The card may be written into meanwhile; no copy takes it over.
        identities={folder / relative: one for relative, one in before.items() if relative in files},
        remarks=(CONTROLNET,) if config["model_index"].get("controlnet") not in (None, [None, None]) else (),
    )
    check(checkpoint)
    check_unchanged({folder / relative: identity for relative, identity in before.items()})
    return checkpoint


def listed(folder: Path) -> list[str]:
    """The relative names of a folder's files, and of links in it to whatever; nothing that is hidden."""
    found = []
    for place, folders, names in os.walk(folder, onerror=unseen):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        links = [name for name in folders if Path(place, name).is_symlink()]  # these are not gone into
        names = [*links, *sorted(name for name in names if not name.startswith("."))]
        found += [Path(place, name).relative_to(folder).as_posix() for name in names]
    return found


def seen(folder: Path, names: Iterable[str]) -> dict[str, Identity]:
    """Of these names in a folder the files as they are before anything of it is read; not its card."""
    found = {}
    for name in names:
        if name != CARD and not (folder / name).is_dir():
            with suppress(OSError):  # a link to nothing, which is told where it matters
                found[name] = Identity.of(folder / name)
    return found


def _denoiser_copies(
    folder: Path, family: Family, config: Mapping[str, Any], variant: str | None
) -> tuple[WeightCopy, ...]:
    """Every complete set of the denoiser's weights in the folder, the requested (or plain) one first."""
    where = folder / family.denoiser
    copies: dict[str, WeightCopy] = {}
    listed: set[str] = set()
    for index in matching(where, "*.safetensors.index*.json"):
        stem, label = index.name.removesuffix(".json").split(".safetensors.index", 1)
        opened = _shards(folder, index)
        listed |= set(opened)
        tensors = {key: Place(file, Stored(key)) for file in opened.values() for key in file.tensors}
        name = label.removeprefix(".") or _variant_of(stem)
        copies[name] = WeightCopy(name, tensors)
    for path in matching(where, "*.safetensors"):
        if path.name in listed or path.name.startswith("."):
            continue
        if _SHARD.fullmatch(path.name):
            raise _unlisted(path)
        file = SafetensorsFile.open(inside(folder, f"{family.denoiser}/{path.name}"))
        name = _variant_of(path.stem)
        doors = [key for door in family.doors(config, file.tensors) for key in door.weights]
        if name == path.stem and not any(key in file.tensors for key in doors):
            continue  # a LoRA or the like, which diffusers does not load as the denoiser; it is left out
        copies[name if name not in copies else path.name] = WeightCopy(
            name, {key: Place(file, Stored(key)) for key in file.tensors}
        )
    if not copies:
        _refuse_other_forms(where)
        raise BadInput(f"{where} holds no .safetensors weights.")
    first = variant or ("plain" if "plain" in copies else next(iter(sorted(copies))))
    if first not in copies:
        raise BadInput(
            f"{where} has no weights of the variant {first!r}.",
            f"Variants found: {', '.join(sorted(copies))}.",
        )
    return (copies.pop(first), *copies.values())


def _variant_of(stem: str) -> str:
    """`fp16` of `diffusion_pytorch_model.fp16`, `plain` of the plain name, else the name itself."""
    return stem.removeprefix("diffusion_pytorch_model").removeprefix(".") or "plain"


def _shards(folder: Path, index: Path) -> dict[str, SafetensorsFile]:
    """The shards that an index lists, opened, by name; BadInput where one lacks what the index promises."""
    weight_map = _read_index(folder, index)
    opened = {
        shard: SafetensorsFile.open(inside(folder, f"{index.parent.name}/{shard}"))
        for shard in dict.fromkeys(weight_map.values())
    }
    for key, shard in weight_map.items():
        if key not in opened[shard].tensors:
            raise BadInput(f"{index} promises {key} in {shard}, which does not hold it.")
    return opened


def _unlisted(shard: Path) -> BadInput:
    """The libraries find shards by their index alone."""
    return BadInput(
        f"{shard} is one of several shards, and no index in {shard.parent} lists it.",
        "Fetch the folder again, with its .safetensors.index.json.",
    )


def _read_index(folder: Path, index: Path) -> dict[str, str]:
    told = read_json(inside(folder, index.relative_to(folder).as_posix()))
    weight_map = validated(ShardIndex, told, str(index)).weight_map
    for file in weight_map.values():
        if PurePosixPath(file).name != file or "\\" in file:
            raise BadInput(f"{index} points outside of its folder: {file!r}.")
        if file.startswith("."):
            raise BadInput(f"{index} names a hidden file: {file!r}.", "Hidden files are not copied.")
    return weight_map


def part_weights(
    folder: Path, family: Family, config: Mapping[str, Any], part: str, variant: str | None = None
) -> WeightCopy | None:
    """The weights of a part beside the denoiser: of the variant, else plain, else what there is.

    None without any, which the text encoders alone may not be. Of the same variant a file comes before an
    index with its shards, as for transformers.
    """
    where = folder / part
    found = [path for path in matching(where, "*.safetensors") if not path.name.startswith(".")]
    shards = [path for path in found if _SHARD.fullmatch(path.name)]
    sets: dict[str, Path] = {}  # the file or the index, by variant
    for path in [*found, *matching(where, "*.safetensors.index*.json")]:
        if path not in shards and not path.name.startswith("."):
            stem, _, label = path.name.removesuffix(".json").partition(".safetensors")
            sets.setdefault(label.removeprefix(".index").removeprefix(".") or stem.partition(".")[2], path)
    if not sets:
        if shards:
            raise _unlisted(shards[0])
        if part in family.text_weights(config):
            _refuse_other_forms(where)
            raise BadInput(f"{where} holds no .safetensors weights.")
        return None
    label = next((one for one in (variant, "") if one in sets), next(iter(sets)))
    if (chosen := sets[label]).suffix == ".json":
        files = list(_shards(folder, chosen).values())
    else:
        files = [SafetensorsFile.open(inside(folder, f"{part}/{chosen.name}"))]
    published = family.names(config).published
    return WeightCopy(
        variant if variant and label == variant else "plain",
        {
            ours: Place(file, Stored(key))
            for file in files
            for key in file.tensors
            if (ours := published(part, key)) is not None
        },
    )


def _refuse_other_forms(folder: Path) -> None:
    """Raise BadInput where a folder without safetensors has its weights in a form that is not read."""
    names = [path.name for path in matching(folder)]
    if pickles := [name for name in names if Path(name).suffix in PICKLE_SUFFIXES]:
        raise BadInput(
            f"{folder} has its weights only as a pickle ({pickles[0]}); loading one can run code, so only "
            "safetensors are read.",
            "Get the safetensors form of this checkpoint.",
        )
    if packed := [name for name in names if Path(name).suffix in PACKED_SUFFIXES]:
        raise BadInput(
            f"{folder} has its weights only quantized ({packed[0]}), and those are not edited.",
            UNPACKED,
        )


def _folder_files(
    folder: Path,
    names: Iterable[str],
    family: Family,
    model_index: Mapping[str, Any],
    denoiser: tuple[WeightCopy, ...],
) -> tuple[dict[str, Path], dict[str, str]]:
    """What of the `listed` names belongs to an edited checkpoint, and what is left out, most of it since it
    may hold unedited weights.
    """
    parts = {name for name, entry in model_index.items() if isinstance(entry, list) and entry[:1] != [None]}
    edited = {f"{family.denoiser}/{file.path.name}" for copy in denoiser for file in copy.files}
    files: dict[str, Path] = {}
    left_out: dict[str, str] = {}
    for relative in names:
        path, part = folder / relative, relative.partition("/")[0]
        if path.is_dir():
            raise BadInput(f"{path} is a symbolic link to a folder.", "Put the folder itself there.")
        if path.is_symlink() and not path.exists():
            raise BadInput(f"{path} is a link to a file that is not there.", "Fetch the checkpoint again.")
        if not path.is_file():
            continue
        is_weights = path.suffix in WEIGHT_SUFFIXES
        if relative == PICTURE:
            left_out[relative] = "it shows what this checkpoint draws, and not an edited one"
        elif is_weights and part == family.denoiser and relative not in edited:
            left_out[relative] = (
                f"a copy of the {family.network} that cannot be edited would keep what is erased"
            )
        elif is_weights and part not in parts:
            left_out[relative] = "weights of no part of the pipeline could keep what is erased"
        else:
            files[relative] = inside(folder, relative)
    return files, left_out
