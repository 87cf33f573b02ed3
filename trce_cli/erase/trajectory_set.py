"""A planned set of trajectories on disk: safetensors shards that say what they were made from."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from trce_cli.erase.trajectories import Kind, Plan, Recipe, Shard
from trce_cli.errors import BadInput
from trce_cli.system.safetensors import SafetensorsFile
from trce_cli.system.whole import write_tensors

if TYPE_CHECKING:
    from trce_cli.checkpoint.checkpoint import Checkpoint
    from trce_cli.prompts.presets import Preset

FORMAT: Final = "trajectories 1"


def identify(
    teacher: "Checkpoint",
    erased: "Checkpoint",
    presets: Sequence["Preset"],
    recipe: Recipe,
    mixed_precision: str,
) -> dict[str, Any]:
    """All that a set depends on: hashes of the models and presets, and the recipe."""
    return {
        "teacher": denoiser_hashes(teacher),
        "stage 1": denoiser_hashes(erased),
        "text encoder": erased.text_encoder_hash(),
        "presets": [preset.sha256() for preset in presets],
        "mixed precision": mixed_precision,
        **{name.replace("_", " "): value for name, value in asdict(recipe).items()},
    }


def denoiser_hashes(checkpoint: "Checkpoint") -> list[str]:
    """SHA-256 in hex of the files of the denoiser's weights that are used."""
    used = {file.path for file in checkpoint.denoiser[0].files}
    return [digest for name, digest in checkpoint.hashes().items() if checkpoint.files[name] in used]


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
        for path in sorted(folder.glob("*.safetensors")):
            self._check(path, expected.get(path.name))
            self.done.add(path.name)

    def _check(self, path: Path, shard: Shard | None) -> None:
        hint = "Choose another folder with --trajectories, or remove this one."
        file = SafetensorsFile.open(path)
        if file.metadata.get("trce") != FORMAT:
            raise BadInput(f"{path} is no shard of trajectories.", hint)
        try:
            found = json.loads(file.metadata["made_from"])
            names = [name for name in self.made_from if found[name] != self.made_from[name]]
        except (KeyError, TypeError, ValueError):
            raise BadInput(f"{path} does not say what it was made for.", hint) from None
        if names:
            name = names[0]
            values = f"{_short(found[name])}, and is {_short(self.made_from[name])} now"
            raise BadInput(
                f"The trajectories in {self.folder} were made for other inputs: {name} was {values}.", hint
            )
        shapes = {name: info.shape for name, info in file.tensors.items()}
        if shard is None or shapes != shard.tensors(self.plan.shape):
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
        return load_file(self.folder / shard.name)

    def states(self, *kinds: Kind) -> "States":
        """The states of one kind; several kinds that belong to the same states are joined."""
        return States([[self.folder / shard.name for shard in self.plan.of(kind)] for kind in kinds])


class States:
    """States of a set by number, read from the mapped files as they are asked for."""

    def __init__(self, files: Sequence[Sequence[Path]]) -> None:
        self._files = [[safe_open(path, framework="pt") for path in paths] for paths in files]
        self._places = [
            (shard, row)
            for shard, file in enumerate(self._files[0])
            for row in range(file.get_slice(_names(file)[0]).get_shape()[0])
        ]

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, numbers: Sequence[int]) -> dict[str, Tensor]:
        """The states of these numbers, tensors of shape (numbers, ...)."""
        rows: list[dict[str, Tensor]] = []
        for shard, row in (self._places[number] for number in numbers):
            opened = [files[shard] for files in self._files]
            rows.append(
                {name: file.get_slice(name)[row : row + 1] for file in opened for name in _names(file)}
            )
        return {name: torch.cat([one[name] for one in rows]) for name in rows[0]}


def _names(file: Any) -> list[str]:
    names: list[str] = file.keys()
    return names


def _short(value: Any) -> str:
    text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    return text if len(text) <= 16 else f"{text[:12]}..."
