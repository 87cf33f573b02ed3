"""A planned set of trajectories on disk: safetensors shards that say what they were made from."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor

from trce_cli.erase.settings import Recipe
from trce_cli.erase.trajectories import Kind, Plan, Shard
from trce_cli.errors import BadInput
from trce_cli.system.foreign import parse_json
from trce_cli.system.paths import matching
from trce_cli.system.safetensors import SafetensorsFile, hash_file
from trce_cli.system.whole import write_tensors

if TYPE_CHECKING:
    from trce_cli.checkpoint.checkpoint import Checkpoint, Hashes
    from trce_cli.prompts.presets import Preset

FORMAT: Final = "trajectories 1"
OPEN: Final = 128  # files at once, of as many as there are shards
# The dtypes that tensors may have, by name; the others have `STORED`. Rows are an index, which tensors of
# another dtype are not; a flow's timesteps are no integers.
DTYPES: Final[Mapping[str, tuple[str, ...]]] = {
    "rows": ("I64",),
    "timesteps": ("I64", "F32"),
    "offset": ("F32",),
}


def identify(
    teacher: "Checkpoint",
    erased: "Checkpoint",
    presets: Sequence["Preset"],
    recipe: Recipe,
    mixed_precision: str,
    hashes: "Hashes",
    teacher_hashes: Sequence[str] | None = None,
) -> dict[str, Any]:
    """All that a set depends on: hashes of the models and presets, and the recipe.

    hashes: of `erased`. teacher_hashes: `denoiser_hashes` of the teacher, if known.
    """
    if teacher_hashes is None:
        teacher_hashes = denoiser_hashes(teacher, hashes.files if teacher is erased else None)
    return {
        "teacher": list(teacher_hashes),
        "stage 1": denoiser_hashes(erased, hashes.files),
        "text encoder": hashes.text_encoder,
        "presets": [preset.sha256() for preset in presets],
        "mixed precision": mixed_precision,
        **{name.replace("_", " "): value for name, value in recipe.model_dump().items()},
    }


def denoiser_hashes(checkpoint: "Checkpoint", hashes: Mapping[str, str] | None = None) -> list[str]:
    """SHA-256 in hex of the files of the denoiser's weights that are used; hashes: of all files, if known.

    TrceError where a file is no longer the one that was opened.
    """
    paths = {file.path for file in checkpoint.denoiser[0].files}
    used = {name: path for name, path in checkpoint.files.items() if path in paths}
    found = [hash_file(path) if hashes is None else hashes[name] for name, path in used.items()]
    checkpoint.check_unchanged()
    return found


class TrajectorySet:
    """A planned set in a folder, some or all of its shards made. Reads nothing but headers by itself.

    Raises BadInput where the folder holds a shard that was made for other inputs, or a damaged one.
    """

    def __init__(self, folder: Path, plan: Plan, made_from: Mapping[str, Any]) -> None:
        self.folder = folder
        self.plan = plan
        self.made_from = dict(made_from)
        if folder.exists() and not folder.is_dir():
            raise BadInput(
                f"{folder} is no folder to keep trajectories in.", "Choose another --trajectories."
            )
        expected = {shard.name: shard for shard in plan.shards}
        self.done: set[str] = set()
        for path in matching(folder, "*.safetensors"):
            self._check(path, expected.get(path.name))
            self.done.add(path.name)

    def _check(self, path: Path, shard: Shard | None) -> None:
        hint = "Choose another folder with --trajectories, or remove this one."
        file = SafetensorsFile.open(path)
        if file.metadata.get("trce") != FORMAT:
            raise BadInput(f"{path} is no shard of trajectories.", hint)
        try:
            found = parse_json(file.metadata["made_from"], str(path))
            names = [name for name in self.made_from if found[name] != self.made_from[name]]
        except (BadInput, KeyError, TypeError):
            raise BadInput(f"{path} does not say what it was made for.", hint) from None
        if names:
            name = names[0]
            values = f"{_short(found[name])}, and is {_short(self.made_from[name])} now"
            raise BadInput(
                f"The trajectories in {self.folder} were made for other inputs: {name} was {values}.", hint
            )
        typed = all(info.dtype in DTYPES.get(name, ("F16",)) for name, info in file.tensors.items())
        if shard is None or file.shapes != shard.tensors(self.plan.shape) or not typed:
            raise BadInput(f"{path} does not hold what its place in the set asks for.", hint)

    @property
    def missing(self) -> list[Shard]:
        """The shards that have yet to be made."""
        return [shard for shard in self.plan.shards if shard.name not in self.done]

    def write(self, shard: Shard, tensors: Mapping[str, Tensor]) -> None:
        """Write a shard, whole or not at all."""
        described = [asdict(trajectory) for trajectory in shard.trajectories]
        metadata = {
            "format": "pt",
            "trce": FORMAT,
            "made_from": json.dumps(self.made_from),
            "trajectories": json.dumps(described, ensure_ascii=False),
        }
        write_tensors(self.folder / shard.name, tensors, metadata)
        self.done.add(shard.name)

    def read(self, shard: Shard) -> dict[str, Tensor]:
        """All tensors of a shard."""
        file = SafetensorsFile.open(self.folder / shard.name)
        return {name: file.read(name) for name in file.tensors}

    def states(self, *kinds: Kind) -> "States":
        """The states of one kind; several kinds that belong to the same states are joined."""
        return States([[self.folder / shard.name for shard in self.plan.of(kind)] for kind in kinds])


class States:
    """States of a set by number, read from the files as they are asked for."""

    def __init__(self, files: Sequence[Sequence[Path]]) -> None:
        self._files = files
        self._open = lru_cache(OPEN)(SafetensorsFile.open)
        self._places = [
            (shard, row)
            for shard, path in enumerate(files[0])
            for row in range(next(iter(self._open(path).tensors.values())).shape[0])
        ]

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, numbers: Sequence[int]) -> dict[str, Tensor]:
        """The states of these numbers, tensors of shape (numbers, ...)."""
        rows: list[dict[str, Tensor]] = []
        for shard, row in (self._places[number] for number in numbers):
            opened = [self._open(files[shard]) for files in self._files]
            number = torch.tensor([row])
            rows.append({name: file.rows(name, number) for file in opened for name in file.tensors})
        return {name: torch.cat([one[name] for one in rows]) for name in rows[0]}


def _short(value: Any) -> str:
    text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    return text if len(text) <= 16 else f"{text[:12]}..."
