"""An opened checkpoint of any layout: names, headers and configurations; tensors are read one at a time."""

import hashlib
from abc import ABC, abstractmethod
from base64 import b64encode
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Final, Literal

from trce_cli.errors import BadInput
from trce_cli.families.base import Door, Family, Names, Stored
from trce_cli.system.foreign import Identity, check_unchanged
from trce_cli.system.progress import Report, no_report
from trce_cli.system.safetensors import SafetensorsFile, TensorInfo, hash_file

if TYPE_CHECKING:
    import torch
    from diffusers import DiffusionPipeline

# Files that may hold weights. Where they are no part of the pipeline they could keep the concept.
WEIGHT_SUFFIXES = {
    *(".safetensors", ".bin", ".ckpt", ".pt", ".pth", ".pkl", ".pickle", ".msgpack", ".h5", ".npz", ".npy"),
    *(".onnx", ".onnx_data", ".pb", ".gguf", ".ggml", ".mlmodel", ".data", ".zip", ".tar"),
}
PICKLE_SUFFIXES = {".bin", ".ckpt", ".pt", ".pth", ".pkl", ".pickle"}
PACKED_SUFFIXES = {".gguf", ".ggml"}  # quantized, by tools for inference


SAMPLED: Final = 8  # values of a weight


def _spread(count: int) -> "torch.Tensor":
    import torch

    return torch.linspace(0, count - 1, SAMPLED).long()


@dataclass(frozen=True)
class Place:
    """Where a weight lies: the file, and how it lies in it.

    scale: the tensor of one number that it is to be multiplied by, as of fp8 files.
    """

    file: SafetensorsFile
    stored: Stored
    scale: str | None = None

    def __post_init__(self) -> None:
        """Raise BadInput where the tensor cannot be cut into the weights that are stacked in it."""
        pieces, found = self.stored.piece[1], self.file.tensors.get(self.stored.name)
        if pieces > 1 and found is not None and (not found.shape or found.shape[0] % pieces):
            raise BadInput(
                f"{self.stored.name} in {self.file.path} has shape {list(found.shape)}; "
                f"it cannot be {pieces} equal pieces on each other."
            )

    @property
    def info(self) -> TensorInfo:
        """The header's entry of the tensor that holds it."""
        return self.file.tensors[self.stored.name]

    @property
    def shape(self) -> tuple[int, ...]:
        """The weight's own shape."""
        return self.stored.shape(self.info.shape)

    def read(self) -> "torch.Tensor":
        """The weight in the file's dtype; with a scale in float32, multiplied by it."""
        if self.scale is not None:
            factor = self.file.read(self.scale).float().reshape(())
            return self.stored.view(self.file.read(self.stored.name)).float() * factor
        count = self.stored.piece[1]
        if count == 1 or self.stored.span > 1:
            return self.stored.view(self.file.read(self.stored.name))
        return replace(self.stored, piece=(0, 1)).view(self.file.read(self.stored.name, self.stored.piece))

    def rows(self, numbers: "torch.Tensor") -> "torch.Tensor":
        """Some of its rows."""
        if self.stored == Stored(self.stored.name) and self.scale is None:
            return self.file.rows(self.stored.name, numbers)
        return self.read()[numbers]


@dataclass(frozen=True)
class WeightCopy:
    """One complete set of a part's weights: a file, an index with its shards, or the EMA part of a file.

    `tensors` maps each diffusers key to its place.
    """

    label: str
    tensors: Mapping[str, Place]

    @property
    def files(self) -> list[SafetensorsFile]:
        """The files that hold this copy."""
        return list({place.file.path: place.file for place in self.tensors.values()}.values())


@dataclass(frozen=True)
class Hashes:
    """What a checkpoint's weights are known by, computed once and passed on; SHA-256 in hex.

    files: of every weight file by its relative name. text_encoder: `Checkpoint.text_encoder_hash`. sample:
    `Checkpoint.text_encoder_sample`.
    """

    files: Mapping[str, str]
    text_encoder: str
    sample: str = ""


@dataclass(frozen=True)
class Checkpoint(ABC):
    """An opened checkpoint, the `Weights` that its family reads from. Nothing of its weights is in memory.

    name: as the user gave it. path: the folder or file. denoiser: every copy of the denoiser's weights, the
    one that is used first. parts: the weights of the other parts, by folder. config: configurations by part.
    config_folder: a diffusers folder with the configurations and tokenizers; the checkpoint itself if it is
    one. files: what belongs to an edited checkpoint, relative name -> path. left_out: relative name ->
    reason. identities: of the files that were read or are to be copied, when it was opened. rewritten:
    configurations that are not as `config_folder` has them, by relative name. remarks: sentences on what was
    assumed of it.
    """

    layout: ClassVar[Literal["diffusers", "single-file"]]

    name: str
    path: Path
    family: Family
    denoiser: tuple[WeightCopy, ...]
    parts: Mapping[str, WeightCopy]
    config: Mapping[str, Mapping[str, Any]]
    config_folder: Path
    files: Mapping[str, Path]
    left_out: Mapping[str, str] = field(default_factory=dict)
    variant: str | None = None
    revision: str | None = None
    identities: Mapping[Path, Identity] = field(default_factory=dict)
    rewritten: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    remarks: tuple[str, ...] = ()

    @property
    def denoiser_files(self) -> list[SafetensorsFile]:
        """Every file with the denoiser's weights that an edit has to change: plain, variants, shards."""
        return list({file.path: file for copy in self.denoiser for file in copy.files}.values())

    @property
    def dtype(self) -> str:
        """The dtype of the doors in the copy that is used, by the format's name ("F16")."""
        return self.denoiser[0].tensors[self.doors()[0].weights[0]].info.dtype

    @property
    def names(self) -> Names:
        """The names of the weights in each layout."""
        return self.family.names(self.config)

    def doors(self) -> tuple[Door, ...]:
        """Where prompts enter the denoiser."""
        return self.family.doors(self.config, self.keys("denoiser"))

    @property
    def widths(self) -> dict[str, int]:
        """The width of the embeddings of each stream."""
        return {door.stream: door.width for door in self.doors()}

    def door_weights(self) -> dict[str, list[str]]:
        """By stream, the weights of its doors in the order in which the checkpoint has them."""
        streams = {key: door.stream for door in self.doors() for key in door.weights}
        found: dict[str, list[str]] = {stream: [] for stream in self.family.streams}
        for key in self.keys("denoiser"):
            if key in streams:
                found[streams[key]].append(key)
        return found

    def keys(self, part: str) -> Collection[str]:
        """The names of a part's weights: of the denoiser, or by folder of another part; none where it has
        none."""
        return self._weights(part).keys()

    def shape(self, part: str, key: str) -> tuple[int, ...]:
        """The shape of a weight by its diffusers name; BadInput where there is no such weight."""
        return self._place(part, key).shape

    def stored_dtype(self, part: str, key: str) -> str:
        """The dtype of a weight in its file, by the format's name."""
        return self._place(part, key).info.dtype

    def read(self, part: str, key: str) -> "torch.Tensor":
        """Read one weight by its diffusers name, in the file's dtype."""
        return self._place(part, key).read()

    def rows(self, part: str, key: str, numbers: "torch.Tensor") -> "torch.Tensor":
        """Some rows of a weight of two dimensions; the others are not read."""
        return self._place(part, key).rows(numbers)

    def folder(self, part: str = "") -> Path:
        """Where the configuration of a part lies, and the files of a tokenizer; without one, all of them."""
        return self.config_folder / (self.family.denoiser if part == "denoiser" else part)

    def _weights(self, part: str) -> Mapping[str, Place]:
        if part == "denoiser":
            return self.denoiser[0].tensors
        return self.parts[part].tensors if part in self.parts else {}

    def _place(self, part: str, key: str) -> Place:
        weights = self._weights(part)
        if not weights:
            raise BadInput(
                f"{self.path} holds no weights of its {part}.",
                "Get the form of this checkpoint that has them.",
            )
        if key not in weights:
            raise BadInput(f"The {part} of {self.path} lacks the weight {key}.")
        return weights[key]

    def text_encoder_hash(self) -> str:
        """SHA-256 in hex of the text encoders' weights: the same for every layout, for fp16 and fp32 files.

        Hashed are name, shape and fp16 bytes of every weight that the encoders use. All of them are read.
        """
        import torch

        digest = hashlib.sha256()
        for part, weights in self.family.text_weights(self.config).items():
            for key in weights:
                tensor = self.read(part, key)
                digest.update(f"{part}/{key} {tuple(tensor.shape)}\n".encode())
                for piece in tensor.reshape(-1).split(1 << 20):  # no fp16 copy of a whole token embedding
                    digest.update(piece.to(torch.float16).view(torch.uint8).numpy().data)
        return digest.hexdigest()

    def text_encoder_sample(self) -> str:
        """A few values of every weight that is hashed, float16 in base64: the encoders are known by them in
        whatever dtype they are stored, where the hash is another one. No more than their rows are read.
        """
        import torch

        found = []
        for part, weights in self.family.text_weights(self.config).items():
            for key in weights:
                rows = self.rows(part, key, _spread(self.shape(part, key)[0])).reshape(SAMPLED, -1)
                found.append(rows[range(SAMPLED), _spread(rows.shape[1])].to(torch.float16))
        return b64encode(torch.cat(found).numpy().astype("<f2").tobytes()).decode()

    def hashes(self, report: Report = no_report, text_encoder: str | None = None) -> Hashes:
        """What its weights are known by; files are streamed, `report` is called with the bytes just read.

        text_encoder: `text_encoder_hash`, where it was computed before. Raises TrceError where a file is no
        longer the one that was opened: what was read of that would be known by the hash of another.
        """
        files = {
            name: hash_file(path, report)
            for name, path in self.files.items()
            if path.suffix == ".safetensors"
        }
        self.check_unchanged()
        return Hashes(files, text_encoder or self.text_encoder_hash(), self.text_encoder_sample())

    def pipe(self, device: "torch.device", dtype: "torch.dtype") -> "DiffusionPipeline":
        """The pipeline that draws, all in memory; see `Family.pipe`."""
        pipe = self.family.pipe(self, device, dtype)
        self.check_unchanged()
        return pipe

    def cut(self, prompts: Collection[str]) -> list[str]:
        """A sentence on how many of the prompts are longer than the text encoders read; none for none."""
        return told_cut(self.name, *self.family.truncated(self, list(prompts)), len(prompts))

    def check_unchanged(self) -> None:
        """Raise TrceError where a file is no longer what it was when the checkpoint was opened."""
        copies = (*self.denoiser, *self.parts.values())
        opened = {file.path: file.identity for copy in copies for file in copy.files}
        check_unchanged({**self.identities, **opened})

    def total_bytes(self) -> int:
        """Size in bytes of all files that belong to the checkpoint: what an edited one takes on disk."""
        return sum(path.stat().st_size for path in self.files.values())

    def notes(self) -> list[str]:
        """Sentences on what an edited checkpoint will not contain, and why."""
        return [f"Left out: {name} ({reason})." for name, reason in self.left_out.items()]

    @abstractmethod
    def provenance_text(self) -> str | None:
        """The text of `trce.json` as the checkpoint carries it, None where it was never edited."""

    @abstractmethod
    def carried(self, files: Mapping[str, bytes]) -> tuple[dict[str, str] | None, Mapping[str, bytes]]:
        """What a copy carries of these files (`trce.json`, `README.md`): metadata of its weights, None where
        that stays as it is, and files."""

    @abstractmethod
    def card_text(self) -> str | None:
        """The text of the checkpoint's own model card, None where it has none."""

    @abstractmethod
    def further_tensors(self, parts: Collection[str]) -> Iterator[tuple[str, SafetensorsFile, str]]:
        """What it holds besides the weights of these parts, folders: what to call it, its file and name."""

    @abstractmethod
    def drawn_from(self) -> dict[str, Path]:
        """The files that a picture depends on, by relative name: weights, tokenizers and configurations."""


def told_cut(name: str, limit: int, count: int, prompts: int) -> list[str]:
    """A sentence on how many of so many prompts are longer than the tokens that are read; none for none."""
    return [f"{name} reads {limit} tokens; {count} of {prompts} prompts are longer and cut."] if count else []
