"""Checkpoints of any layout: opened lazily, checked before they are believed.

A `Checkpoint` holds names, headers and configurations only; tensors are read one at a time.
"""

import json
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, Literal

from trce_cli.errors import BadInput, first_line
from trce_cli.families.base import Door
from trce_cli.families.clip.spec import EncoderSpec
from trce_cli.families.registry import detect_folder, detect_single_file
from trce_cli.families.sd.family import POOLED_KEY, StableDiffusion
from trce_cli.families.sd.names import (
    EMA,
    UNET,
    clip_weights,
    ema_from_ldm,
    ldm_layers_per_block,
    openclip_from_clip,
    unet_from_ldm,
)
from trce_cli.prompts.home import EMBEDDED
from trce_cli.system.paths import expanded
from trce_cli.system.safetensors import (
    FLOATS,
    Report,
    SafetensorsFile,
    all_finite,
    hash_file,
    no_report,
)

if TYPE_CHECKING:
    import torch

# Files that may hold weights. Where they are no part of the pipeline they could keep the concept.
WEIGHT_SUFFIXES = {
    *(".safetensors", ".bin", ".ckpt", ".pt", ".pth", ".pkl", ".pickle", ".msgpack", ".h5", ".npz", ".npy"),
    *(".onnx", ".onnx_data", ".pb", ".gguf", ".ggml", ".mlmodel", ".data", ".zip", ".tar"),
}
PICKLE_SUFFIXES = {".bin", ".ckpt", ".pt", ".pth", ".pkl", ".pickle"}
PROJECTIONS = (".attn2.to_k.weight", ".attn2.to_v.weight")
_SHARD = re.compile(r"(?P<stem>.+)-\d{5}-of-\d{5}\.safetensors")
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


@dataclass(frozen=True)
class WeightCopy:
    """One complete set of the U-Net's weights: a file, an index with its shards, or the EMA part of a file.

    `tensors` maps each diffusers key to the file that holds it and its name there.
    """

    label: str
    tensors: Mapping[str, tuple[SafetensorsFile, str]]

    @property
    def files(self) -> list[SafetensorsFile]:
        """The files that hold this copy."""
        return list({file.path: file for file, _ in self.tensors.values()}.values())


@dataclass(frozen=True)
class EncoderFiles:
    """One text encoder: its adapter, its config.json, and its weights by transformers' names.

    `map(name)` gives a weight as pages of its file, `release()` gives their memory back.
    """

    spec: EncoderSpec
    config: Mapping[str, Any]
    where: Path
    files: tuple[SafetensorsFile, ...]
    map: Callable[[str], "torch.Tensor"]

    def release(self) -> None:
        """Give back the memory of all pages that were looked at so far."""
        for file in self.files:
            file.release()

    def weights(self) -> list[str]:
        """The names of all weights that the encoder uses."""
        return clip_weights(self.config["num_hidden_layers"], "WithProjection" in self.spec.model_class)


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint. Nothing of its weights is in memory.

    name: as the user gave it. path: the folder or file. layout: how its weights lie.
    unet: every copy of the U-Net's weights, the one that is used first.
    config_folder: a diffusers folder with the configurations and tokenizers; the checkpoint itself if it is
    one.
    files: what belongs to an edited checkpoint, relative name -> path. left_out: relative name ->
    reason.
    """

    name: str
    path: Path
    layout: Literal["diffusers", "single-file"]
    family: StableDiffusion
    unet: tuple[WeightCopy, ...]
    unet_config: Mapping[str, Any]
    encoders: tuple[EncoderFiles, ...]
    config_folder: Path
    files: Mapping[str, Path]
    left_out: Mapping[str, str] = field(default_factory=dict)
    variant: str | None = None
    revision: str | None = None

    @property
    def folder(self) -> Path:
        """The diffusers folder, or the folder of the single file."""
        return self.path if self.path.is_dir() else self.path.parent

    @property
    def unet_files(self) -> list[SafetensorsFile]:
        """Every file with U-Net weights that an edit has to change: plain, variants, shards."""
        return list({file.path: file for copy in self.unet for file in copy.files}.values())

    @property
    def dtype(self) -> str:
        """The dtype of the U-Net's cross-attention in the copy that is used, by the format's name ("F16")."""
        file, name = self.unet[0].tensors[self.projection_keys()[0]]
        return file.tensors[name].dtype

    @property
    def context_width(self) -> int:
        """Width D of the text embeddings that the cross-attention sees: 768, 1024, or 768 + 1280 for SDXL."""
        return sum(encoder.config["hidden_size"] for encoder in self.encoders)

    @property
    def pooled_width(self) -> int:
        """Width of the pooled embedding, the first columns of `add_embedding.linear_1`; 0 without one."""
        return int(self.encoders[-1].config["projection_dim"]) if self.family.pooled else 0

    def projection_keys(self) -> list[str]:
        """The diffusers names of all cross-attention key and value weights, each (out, context_width)."""
        return [key for key in self.unet[0].tensors if key.endswith(PROJECTIONS)]

    def doors(self) -> tuple[Door, ...]:
        """Where prompts enter the denoiser."""
        return self.family.doors(self.unet_config, self.unet[0].tensors)

    def door_weights(self) -> dict[str, list[str]]:
        """By stream, the weights of its doors in the order in which the checkpoint has them."""
        streams = {key: door.stream for door in self.doors() for key in door.weights}
        found: dict[str, list[str]] = {stream: [] for stream in self.family.streams}
        for key in self.unet[0].tensors:
            if key in streams:
                found[streams[key]].append(key)
        return found

    def shape(self, key: str) -> tuple[int, ...]:
        """The shape of a U-Net weight by its diffusers name."""
        file, name = self.unet[0].tensors[key]
        return file.tensors[name].shape

    def read(self, key: str) -> "torch.Tensor":
        """Read one U-Net weight by its diffusers name, in the file's dtype."""
        file, name = self.unet[0].tensors[key]
        return file.read(name)

    def load_tokenizers(self) -> list[Any]:
        """The tokenizers, one for each text encoder, from local files only; BadInput for a broken one."""
        from transformers import CLIPTokenizerFast  # since transformers 5 another name of CLIPTokenizer

        found = []
        for spec in self.family.encoders:
            folder = self.config_folder / spec.tokenizer
            try:
                found.append(CLIPTokenizerFast.from_pretrained(folder, local_files_only=True))
            except Exception as error:  # of the tokenizers library, which has no class of its own
                raise BadInput(f"The tokenizer in {folder} cannot be read: {first_line(error)}.") from error
        return found

    def load_text_encoders(self, device: Any = "cpu", dtype: "torch.dtype | None" = None) -> list[Any]:
        """The text encoders in evaluation mode, without gradients, on `device`, in `dtype` (or the files').

        Weights that need no conversion are pages of their files: a token embedding takes the memory of the
        rows that are looked up.

        Raises `BadInput` where a weight is missing, has another shape, or holds NaN or infinite values;
        nothing is left at random values.
        """
        import hashlib

        digest = hashlib.sha256()
        models = [_load_encoder(encoder, device, dtype, digest) for encoder in self.encoders]
        self.__dict__["_text_encoder_hash"] = digest.hexdigest()
        return models

    def text_encoder_hash(self) -> str:
        """SHA-256 in hex of the text encoders' weights: the same for every layout, for fp16 and fp32 files.

        Hashed are name, shape and fp16 bytes of every weight that the encoder uses. After
        `load_text_encoders`, which does it on the way, nothing is read again.
        """
        return self._text_encoder_hash

    @cached_property
    def _text_encoder_hash(self) -> str:
        import hashlib

        digest = hashlib.sha256()
        for encoder in self.encoders:
            for name in encoder.weights():
                _hash_weight(digest, f"{encoder.spec.folder}/{name}", encoder.map(name))
                encoder.release()
        return digest.hexdigest()

    def hashes(self, report: Report = no_report) -> dict[str, str]:
        """SHA-256 in hex of every weight file of the checkpoint by its relative name; streamed."""
        known: dict[str, str] = self.__dict__.setdefault("_hashes", {})
        for name, path in self.files.items():
            if path.suffix == ".safetensors" and name not in known:
                known[name] = hash_file(path, report)
        return dict(known)

    def total_bytes(self) -> int:
        """Size in bytes of all files that belong to the checkpoint: what an edited one takes on disk."""
        return sum(path.stat().st_size for path in self.files.values())

    def provenance_text(self) -> str | None:
        """The text of `trce.json` as the checkpoint carries it, None where it was never edited."""
        if self.layout == "single-file":
            return self.unet_files[0].metadata.get("trce")
        path = self.files.get("trce.json")
        return path.read_text(encoding="utf-8", errors="replace") if path else None

    def notes(self) -> list[str]:
        """Sentences on what an edited checkpoint will not contain, and why."""
        return [f"Left out: {name} ({reason})." for name, reason in self.left_out.items()]


def open_checkpoint(
    name: str, revision: str | None = None, variant: str | None = None, config: str | Path | None = None
) -> Checkpoint:
    """Open `emoji`, a diffusers folder, a single `.safetensors` file or a hub id, and check it.

    `revision` and `variant` (for example `fp16`) choose among what a hub repository or a folder holds.
    `config` is a diffusers folder with the configurations and tokenizers for a single file that is built
    differently from its family's published base; weights in it are not looked at. Raises
    `BadInput` in one sentence for everything that is wrong with it; no weight is read.
    """
    embedded = {home.name: home.folder for home in EMBEDDED}
    path = embedded.get(name) or _resolve(name, revision, variant)
    if path.is_dir():
        if path.parent.name == "snapshots":  # of the hub's cache: its name is the commit
            revision = path.name
        return _open_folder(name, path, variant, revision)
    if path.suffix == ".safetensors":
        return _open_single_file(name, path, expanded(config) if config else None)
    if path.suffix in PICKLE_SUFFIXES:
        raise BadInput(
            f"{path} is a PyTorch pickle; loading one can run code, so only safetensors are read.",
            "Get the safetensors form of this checkpoint.",
        )
    raise BadInput(f"{path} is neither a diffusers folder nor a .safetensors file.")


def _resolve(name: str, revision: str | None, variant: str | None) -> Path:
    """An existing path is a path; what looks like one but is missing is an error; all else is a hub id."""
    path = expanded(name)
    try:
        if path.exists():
            return path
    except OSError as error:  # longer than a name may be, or in a folder that may not be looked into
        raise BadInput(f"{name[:100]!r} cannot be opened: {error.strerror}.") from error
    looks_like_path = name.startswith(("/", ".", "~")) or name.count("/") > 1 or "\\" in name
    if looks_like_path or path.suffix in WEIGHT_SUFFIXES:
        raise BadInput(
            f"There is no file or folder {name}.", "Check the path; a hub id has the form owner/name."
        )
    if not _HUB_ID.fullmatch(name):
        raise BadInput(
            f"{name!r} is neither an existing path nor a hub id.", "A hub id has the form owner/name."
        )
    return _from_hub(name, revision, variant)


def _from_hub(name: str, revision: str | None, variant: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    weights = f"*/*.{variant}*.safetensors" if variant else "*/*.safetensors"
    ignored = [] if variant else ["*.fp16.*", "*.fp16-*", "*.bf16.*", "*.non_ema.*", "*.non_ema-*"]
    try:
        folder = snapshot_download(
            name,
            revision=revision,
            allow_patterns=["*.json", "*.txt", "*.md", "LICENSE*", weights],
            ignore_patterns=ignored,
        )
    except (HfHubHTTPError, HFValidationError, OSError, ValueError) as error:
        raise BadInput(
            f"{name} is no local path, and cannot be had from the hub: {first_line(error)}",
            "Check the name, the network, HF_TOKEN for gated repositories, and HF_HUB_OFFLINE.",
        ) from error
    return Path(folder)


def _open_folder(name: str, folder: Path, variant: str | None, revision: str | None) -> Checkpoint:
    if not (folder / "model_index.json").is_file():
        raise BadInput(
            f"{folder} is not a diffusers checkpoint: it has no model_index.json.",
            "Give the folder that holds unet/, text_encoder/ and tokenizer/.",
        )
    model_index = read_json(_inside(folder, "model_index.json"))
    unet_config = read_json(_inside(folder, "unet/config.json"))
    family = detect_folder(str(folder), model_index, unet_config)
    unet = _unet_copies(folder, variant)
    encoders = tuple(_folder_encoder(folder, spec, variant) for spec in family.encoders)
    for spec in family.encoders:
        _check_tokenizer(folder / spec.tokenizer)
    files, left_out = _folder_files(folder, model_index, unet)
    checkpoint = Checkpoint(
        name=name,
        path=folder,
        layout="diffusers",
        family=family,
        unet=unet,
        unet_config=unet_config,
        encoders=encoders,
        config_folder=folder,
        files=files,
        left_out=left_out,
        variant=variant,
        revision=revision,
    )
    _check_shapes(checkpoint)
    return checkpoint


def _open_single_file(name: str, path: Path, config: Path | None) -> Checkpoint:
    file = SafetensorsFile.open(path)
    family = detect_single_file(str(path), {key: info.shape for key, info in file.tensors.items()})
    if config is None:
        from trce_cli.families.sd import configs

        config = configs.folder(family.key)
    elif not (config / "model_index.json").is_file():
        raise BadInput(f"--config {config} is not a diffusers folder: it has no model_index.json.")
    unet_config = read_json(_inside(config, "unet/config.json"))
    model_index = read_json(_inside(config, "model_index.json"))
    if (meant := detect_folder(str(config), model_index, unet_config)) is not family:
        raise BadInput(f"{path} is of the family {family.name}, and {config} of {meant.name}.")
    for spec in family.encoders:
        _check_tokenizer(config / spec.tokenizer)
    checkpoint = Checkpoint(
        name=name,
        path=path,
        layout="single-file",
        family=family,
        unet=_single_file_copies(file),
        unet_config=unet_config,
        encoders=tuple(_single_file_encoder(file, config, spec) for spec in family.encoders),
        config_folder=config,
        files={path.name: path},
    )
    _check_shapes(checkpoint)
    return checkpoint


def _single_file_copies(file: SafetensorsFile) -> tuple[WeightCopy, ...]:
    """The U-Net of a single file, and its EMA copy where there is one."""
    keys = [key.removeprefix(UNET) for key in file.tensors if key.startswith(UNET)]
    layers = ldm_layers_per_block(keys)
    names = {ours: UNET + key for key in keys if (ours := unet_from_ldm(key, layers))}
    copies = [WeightCopy("plain", {ours: (file, key) for ours, key in names.items()})]
    if any(key.startswith(EMA) and key.endswith("weight") for key in file.tensors):
        ema = {ours: ema_from_ldm(key) for ours, key in names.items()}
        copies.append(WeightCopy("EMA", {o: (file, key) for o, key in ema.items() if key in file.tensors}))
    return tuple(copies)


def _single_file_encoder(file: SafetensorsFile, config_folder: Path, spec: EncoderSpec) -> EncoderFiles:
    config = _clip_config(config_folder, spec)

    def map_weight(key: str) -> "torch.Tensor":
        name, third, transposed = openclip_from_clip(key) if spec.openclip else (key, None, False)
        if spec.ldm + name not in file.tensors:
            raise BadInput(f"{file.path} lacks the weight {spec.ldm}{name} of its text encoder.", hint)
        tensor = file.map(spec.ldm + name)
        if third is not None:
            tensor = tensor.chunk(3)[third]
        return tensor.T if transposed else tensor

    hint = "If it is built differently from its family's base, give its diffusers folder with --config."
    name = f"{spec.ldm}{'' if spec.openclip else 'text_model.embeddings.'}token_embedding.weight"
    wanted = (config["vocab_size"], config["hidden_size"])
    if (shape := file.tensors[name].shape if name in file.tensors else None) != wanted:
        raise BadInput(
            f"{name} in {file.path} has the shape {shape}; the configuration asks for {wanted}.", hint
        )
    return EncoderFiles(spec, config, file.path, (file,), map_weight)


def _check_tokenizer(folder: Path) -> None:
    old, new = folder / "vocab.json", folder / "tokenizer.json"
    if not old.is_file() and not new.is_file():
        raise BadInput(f"{folder} holds no tokenizer: neither vocab.json with merges.txt nor tokenizer.json.")


def _check_shapes(checkpoint: Checkpoint) -> None:
    """All copies must hold all edited weights, as wide as the text encoders' output."""
    keys, width = checkpoint.projection_keys(), checkpoint.context_width
    if not keys:
        raise BadInput(f"The U-Net of {checkpoint.path} has no cross-attention (attn2.to_k, attn2.to_v).")
    if checkpoint.family.pooled:
        keys = [*keys, POOLED_KEY]
    for copy in checkpoint.unet:
        for key in keys:
            if key not in copy.tensors:
                raise BadInput(f"The {copy.label} U-Net weights of {checkpoint.path} lack {key}.")
            file, name = copy.tensors[key]
            shape, dtype = file.tensors[name].shape, file.tensors[name].dtype
            if dtype not in FLOATS:
                raise BadInput(f"{name} in {file.path} has the dtype {dtype}, which cannot be edited.")
            if len(shape) != 2 or (key != POOLED_KEY and shape[1] != width):
                raise BadInput(
                    f"{key} in {file.path} has shape {list(shape)}; the text encoders give {width} columns."
                )
            if key == POOLED_KEY and shape[1] <= checkpoint.pooled_width:
                raise BadInput(
                    f"{key} in {file.path} has {shape[1]} columns; the pooled embedding alone has "
                    f"{checkpoint.pooled_width}."
                )


def _unet_copies(folder: Path, variant: str | None) -> tuple[WeightCopy, ...]:
    """Every complete set of U-Net weights in the folder, the requested (or plain) one first."""
    unet = folder / "unet"
    copies: dict[str, WeightCopy] = {}
    listed: set[str] = set()
    for index in sorted(unet.glob("*.safetensors.index*.json")):
        stem, label = index.name.removesuffix(".json").split(".safetensors.index", 1)
        weight_map = _read_index(folder, index)
        opened = {
            shard: SafetensorsFile.open(_inside(folder, f"unet/{shard}"))
            for shard in dict.fromkeys(weight_map.values())
        }
        for key, shard in weight_map.items():
            if key not in opened[shard].tensors:
                raise BadInput(f"{index} promises {key} in {shard}, which does not hold it.")
        listed |= set(opened)
        tensors = {key: (file, key) for file in opened.values() for key in file.tensors}
        name = label.removeprefix(".") or _variant_of(stem)
        copies[name] = WeightCopy(name, tensors)
    for path in sorted(unet.glob("*.safetensors")):
        if path.name in listed or path.name.startswith("."):
            continue
        if _SHARD.fullmatch(path.name):
            raise BadInput(f"{path} is one of several shards, and no index in {unet} lists it.")
        file = SafetensorsFile.open(_inside(folder, f"unet/{path.name}"))
        name = _variant_of(path.stem)
        if name == path.stem and not any(key.endswith(PROJECTIONS) for key in file.tensors):
            continue  # a LoRA or the like, which diffusers does not load as the U-Net; it is left out
        copies[name if name not in copies else path.name] = WeightCopy(
            name, {key: (file, key) for key in file.tensors}
        )
    if not copies:
        _refuse_pickles(unet)
        raise BadInput(f"{unet} holds no .safetensors weights.")
    first = variant or ("plain" if "plain" in copies else next(iter(sorted(copies))))
    if first not in copies:
        raise BadInput(
            f"{unet} has no weights of the variant {first!r}.",
            f"Variants found: {', '.join(sorted(copies))}.",
        )
    return (copies.pop(first), *copies.values())


def _variant_of(stem: str) -> str:
    """`fp16` of `diffusion_pytorch_model.fp16`, `plain` of the plain name, else the name itself."""
    return stem.removeprefix("diffusion_pytorch_model").removeprefix(".") or "plain"


def _read_index(folder: Path, index: Path) -> dict[str, str]:
    weight_map = read_json(_inside(folder, index.relative_to(folder).as_posix())).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise BadInput(f"{index} has no table weight_map.")
    for file in weight_map.values():
        if not isinstance(file, str) or PurePosixPath(file).name != file or "\\" in file:
            raise BadInput(f"{index} points outside of its folder: {file!r}.")
        if file.startswith("."):
            raise BadInput(f"{index} names a hidden file: {file!r}.", "Hidden files are not copied.")
    return weight_map


def _folder_encoder(folder: Path, spec: EncoderSpec, variant: str | None) -> EncoderFiles:
    where = folder / spec.folder
    config = _clip_config(folder, spec)
    choices = [variant, None] if variant else [None]
    names = [f"model.{choice}.safetensors" if choice else "model.safetensors" for choice in choices]
    names += sorted(path.name for path in where.glob("*.safetensors"))
    name = next((name for name in names if (where / name).is_file()), None)
    if name is None:
        _refuse_pickles(where)
        raise BadInput(f"{where} holds no .safetensors weights.")
    if _SHARD.fullmatch(name):
        files = [
            SafetensorsFile.open(_inside(folder, f"{spec.folder}/{path.name}"))
            for path in sorted(where.glob("*.safetensors"))
        ]
    else:
        files = [SafetensorsFile.open(_inside(folder, f"{spec.folder}/{name}"))]
    # Names as in published files: newer transformers write them without `text_model.`
    places = {
        key if key.startswith("text_") else f"text_model.{key}": (file, key)
        for file in files
        for key in file.tensors
        if not key.endswith("position_ids")
    }

    def map_weight(key: str) -> "torch.Tensor":
        if key not in places:
            raise BadInput(f"{where} lacks the weight {key}.")
        file, name = places[key]
        return file.map(name)

    return EncoderFiles(spec, config, where, tuple(files), map_weight)


def _clip_config(folder: Path, spec: EncoderSpec) -> dict[str, Any]:
    config = read_json(_inside(folder, f"{spec.folder}/config.json"))
    counts = ["hidden_size", "num_hidden_layers", "vocab_size", "max_position_embeddings"]
    if spec.model_class == "CLIPTextModelWithProjection":
        counts.append("projection_dim")
    for key in counts:
        if type(config.get(key)) is not int or config[key] < 1:
            where = folder / spec.folder / "config.json"
            raise BadInput(f"{where}: {key} is {config.get(key)!r}, not a positive number.")
    return config


def _refuse_pickles(folder: Path) -> None:
    pickles = sorted(path.name for path in folder.glob("*") if path.suffix in PICKLE_SUFFIXES)
    if pickles:
        raise BadInput(
            f"{folder} has its weights only as a pickle ({pickles[0]}); loading one can run code, so only "
            "safetensors are read.",
            "Get the safetensors form of this checkpoint.",
        )


def _folder_files(
    folder: Path, model_index: Mapping[str, Any], unet: tuple[WeightCopy, ...]
) -> tuple[dict[str, Path], dict[str, str]]:
    """What belongs to an edited checkpoint, and what is left out because it may hold unedited weights."""
    parts = {name for name, entry in model_index.items() if isinstance(entry, list) and entry[:1] != [None]}
    edited = {f"unet/{file.path.name}" for copy in unet for file in copy.files}
    files: dict[str, Path] = {}
    left_out: dict[str, str] = {}
    for place, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in folders:
            if (Path(place) / name).is_symlink():
                raise BadInput(
                    f"{Path(place) / name} is a symbolic link to a folder.", "Put the folder itself there."
                )
        for name in sorted(names):
            path = (Path(place) / name).relative_to(folder)
            relative = path.as_posix()
            if name.startswith("."):
                continue
            if not (folder / path).exists():
                raise BadInput(
                    f"{folder / path} is a link to a file that is not there.", "Fetch the checkpoint again."
                )
            if not (folder / path).is_file():
                continue
            if path.suffix in WEIGHT_SUFFIXES and path.parts[0] == "unet" and relative not in edited:
                left_out[relative] = "a copy of the U-Net that cannot be edited would keep what is erased"
            elif path.suffix in WEIGHT_SUFFIXES and path.parts[0] not in parts:
                left_out[relative] = "weights of no part of the pipeline could keep what is erased"
            else:
                files[relative] = _inside(folder, relative)
    return files, left_out


def _inside(folder: Path, relative: str) -> Path:
    """A file of the folder; refused where a symbolic link leads out of it.

    A snapshot in the hub's cache is made of links to the `blobs` beside it, and these are allowed.
    """
    path = folder / relative
    real, root = path.resolve(), folder.resolve()
    roots = [root]
    if root.parent.name == "snapshots" and root.parent.parent.name.startswith("models--"):
        roots.append(root.parent.parent / "blobs")
    if not any(real.is_relative_to(allowed) for allowed in roots):
        raise BadInput(
            f"{path} is a symbolic link that leads out of the checkpoint's folder, to {real}.",
            "Put the file itself there.",
        )
    return path


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; `BadInput` where there is none."""
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BadInput(f"Cannot read {path}: {error.strerror}.") from error
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{path} is not valid JSON: {str(error)[:120]}.") from error
    if not isinstance(table, dict):
        raise BadInput(f"{path} is not a JSON object.")
    return table


def _load_encoder(encoder: EncoderFiles, device: Any, dtype: "torch.dtype | None", digest: Any) -> Any:
    import torch
    import transformers

    config = transformers.CLIPTextConfig.from_dict(dict(encoder.config))
    with torch.device("meta"):
        model = getattr(transformers, encoder.spec.model_class)(config)
    parameters = dict(model.named_parameters())
    state = {}
    for weight in encoder.weights():
        tensor = encoder.map(weight)
        _hash_weight(digest, f"{encoder.spec.folder}/{weight}", tensor)
        # transformers 5.6 dropped `text_model.` from the names of a model without projection
        name = weight if weight in parameters else weight.removeprefix("text_model.")
        if tensor.shape != parameters[name].shape:
            raise BadInput(
                f"{weight} in {encoder.where} has shape {list(tensor.shape)}; its config.json asks for "
                f"{list(parameters[name].shape)}."
            )
        if not all_finite(tensor):
            raise BadInput(f"{weight} in {encoder.where} holds NaN or infinite values.")
        state[name] = tensor.to(device=device, dtype=dtype)
        encoder.release()
    model.load_state_dict(state, strict=False, assign=True)
    embeddings = getattr(model, "text_model", model).embeddings
    embeddings.position_ids = torch.arange(config.max_position_embeddings, device=device).expand((1, -1))
    return model.eval().requires_grad_(False)


def _hash_weight(digest: Any, name: str, tensor: "torch.Tensor") -> None:
    import torch

    digest.update(f"{name} {tuple(tensor.shape)}\n".encode())
    for part in tensor.reshape(-1).split(1 << 20):  # no fp16 copy of a whole token embedding
        digest.update(part.to(torch.float16).view(torch.uint8).numpy().data)
