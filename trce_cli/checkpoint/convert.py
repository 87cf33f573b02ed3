"""Checkpoints in the other layout: a single file as a diffusers folder, a folder as a single file.

Tensors are read, edited, renamed and written one by one. Values and dtypes stay; the layouts differ in names,
in OpenCLIP's stacked and transposed weights, and in the VAE's attention, which LDM stores as convolutions.
"""

import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final

from trce_cli.checkpoint.checkpoint import Checkpoint, EncoderFiles, read_json
from trce_cli.checkpoint.copy import Form, check_output
from trce_cli.checkpoint.provenance import single_file_metadata
from trce_cli.errors import BadInput
from trce_cli.families.sd.names import (
    UNET,
    ldm_from_unet,
    ldm_from_vae,
    openclip_from_clip,
    vae_from_ldm,
)
from trce_cli.system.safetensors import (
    READABLE,
    Edit,
    NewTensor,
    Report,
    SafetensorsFile,
    copy_file,
    no_report,
    rounded_edit,
    write_tensors,
)
from trce_cli.system.whole import whole

if TYPE_CHECKING:
    import torch

VAE: Final = "first_stage_model."
_DTYPES: Final = {dtype: name for name, dtype in READABLE.items()}  # torch's name -> the format's
_TEXT_SUFFIXES: Final = {".json", ".txt", ".md", ".model"}  # what a folder holds besides weights

Tensors = dict[str, NewTensor]


def write_converted(
    checkpoint: Checkpoint,
    output: Path,
    edits: Mapping[str, Edit],
    files: Mapping[str, bytes],
    force: bool = False,
    report: Report = no_report,
) -> Path:
    """Write an edited copy in the other layout, whole or not at all, and return its real path.

    Arguments and errors are those of `write_patched`; of several copies of the U-Net the first is written.
    """
    other: Form = "diffusers" if checkpoint.layout == "single-file" else "single-file"
    output = check_output(checkpoint, output, force, form=other)
    with whole(output, force) as stage:
        if other == "diffusers":
            _write_folder(checkpoint, stage, edits, files, report)
        else:
            tensors = _single_file_tensors(checkpoint, edits)
            write_tensors(stage, tensors, single_file_metadata(checkpoint, files), report)
    return output


def left_behind(checkpoint: Checkpoint) -> list[str]:
    """Sentences on what the other layout does not hold."""
    return [f"Left out: the {copy.label} copy of the U-Net." for copy in checkpoint.unet[1:]]


def _write_folder(
    checkpoint: Checkpoint,
    stage: Path,
    edits: Mapping[str, Edit],
    files: Mapping[str, bytes],
    report: Report,
) -> None:
    """A single file as a folder, with the configurations and tokenizers of its `config_folder`."""
    parts: dict[str, Tensors] = {
        "unet/diffusion_pytorch_model": _unet(checkpoint, edits),
        "vae/diffusion_pytorch_model": vae_of_single_file(checkpoint),
    }
    for encoder in checkpoint.encoders:
        parts[f"{encoder.spec.folder}/model"] = {
            name: _new(partial(encoder.map, name)) for name in encoder.weights()
        }
    config = checkpoint.config_folder
    index = read_json(config / "model_index.json")
    folders = {"unet", "vae", "scheduler", *(e.folder for e in checkpoint.family.encoders)}
    folders |= {e.tokenizer for e in checkpoint.family.encoders}
    for name, entry in index.items():
        if isinstance(entry, list) and name not in folders:
            index[name] = [None, None]  # a single file has no such part
    if "requires_safety_checker" in index:
        index["requires_safety_checker"] = False
    for folder in sorted(folders):
        (stage / folder).mkdir(parents=True)
        for path in sorted((config / folder).iterdir()):
            if path.suffix in _TEXT_SUFFIXES and ".index." not in path.name:
                copy_file(path, stage / folder / path.name)
    (stage / "model_index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    for name, tensors in parts.items():
        write_tensors(stage / f"{name}.safetensors", tensors, {"format": "pt"}, report)
    for name, content in files.items():
        (stage / name).write_bytes(content)


def _single_file_tensors(checkpoint: Checkpoint, edits: Mapping[str, Edit]) -> Tensors:
    """A folder's weights by their names in a single file."""
    unet = _unet(checkpoint, edits)
    layers = checkpoint.unet_config["layers_per_block"]
    attention = {
        ".".join(key.split(".")[:2]) for key in unet if key.startswith("up_") and ".attentions." in key
    }
    tensors = {UNET + ldm_from_unet(key, layers, attention): new for key, new in unet.items()}
    tensors |= _vae_of_folder(checkpoint)
    for encoder in checkpoint.encoders:
        names = _openclip(encoder) if encoder.spec.openclip else {
            name: _new(partial(encoder.map, name)) for name in encoder.weights()
        }  # fmt: skip
        tensors |= {encoder.spec.ldm + name: new for name, new in names.items()}
    return tensors


def _unet(checkpoint: Checkpoint, edits: Mapping[str, Edit]) -> Tensors:
    tensors = {}
    for key, (file, name) in checkpoint.unet[0].tensors.items():
        info, read = file.tensors[name], partial(file.read, name)
        if key in edits:
            read = partial(_edited, edits[key], file, name)
        tensors[key] = NewTensor(info.dtype, info.shape, read)
    return tensors


def _edited(edit: Edit, file: SafetensorsFile, name: str) -> "torch.Tensor":
    return rounded_edit(edit, file.read(name), f"{name} in {file.path}")


def vae_of_single_file(checkpoint: Checkpoint) -> Tensors:
    """The VAE's weights by their diffusers names; BadInput for a file without a VAE."""
    file = checkpoint.unet_files[0]
    keys = [key.removeprefix(VAE) for key in file.tensors if key.startswith(VAE)]
    if not keys:
        raise BadInput(
            f"{file.path} holds no VAE ({VAE}...), which drawing and a diffusers folder need.",
            "Get the form of this checkpoint that has its VAE in it.",
        )
    depth = 1 + max((int(key.split(".")[2]) for key in keys if key.startswith("decoder.up.")), default=0)
    tensors = {}
    for key in keys:
        info, name = file.tensors[VAE + key], vae_from_ldm(key, depth)
        linear = ".attentions." in name and len(info.shape) == 4
        shape = info.shape[:2] if linear else info.shape
        tensors[name] = NewTensor(info.dtype, shape, partial(_reshaped, file, VAE + key, shape))
    return tensors


def _vae_of_folder(checkpoint: Checkpoint) -> Tensors:
    variant = f".{checkpoint.variant}" if checkpoint.variant else ""
    folder = checkpoint.folder / "vae"
    names = [f"diffusion_pytorch_model{variant}.safetensors", "diffusion_pytorch_model.safetensors"]
    names += sorted(path.name for path in folder.glob("*.safetensors"))
    path = next((folder / name for name in names if f"vae/{name}" in checkpoint.files), None)
    if path is None or "-of-" in path.name:
        raise BadInput(f"{folder} does not hold its weights in one .safetensors file.")
    file = SafetensorsFile.open(path)
    depth = 1 + max(int(key.split(".")[2]) for key in file.tensors if key.startswith("decoder.up_blocks."))
    tensors = {}
    for key, info in file.tensors.items():
        convolution = ".attentions." in key and len(info.shape) == 2
        shape = (*info.shape, 1, 1) if convolution else info.shape
        tensors[VAE + ldm_from_vae(key, depth)] = NewTensor(
            info.dtype, shape, partial(_reshaped, file, key, shape)
        )
    return tensors


def _reshaped(file: SafetensorsFile, name: str, shape: tuple[int, ...]) -> "torch.Tensor":
    return file.read(name).reshape(shape)


def _openclip(encoder: EncoderFiles) -> Tensors:
    """The weights of a text encoder in OpenCLIP's form: queries, keys and values stacked."""
    tensors = {}
    for name in encoder.weights():
        theirs, third, transposed = openclip_from_clip(name)
        if third is None:
            tensors[theirs] = _new(partial(_turned, encoder, name, transposed))
        elif third == 0:
            tensors[theirs] = _new(partial(_stacked, encoder, name))
    return tensors


def _turned(encoder: EncoderFiles, name: str, transposed: bool) -> "torch.Tensor":
    return encoder.map(name).T if transposed else encoder.map(name)


def _stacked(encoder: EncoderFiles, name: str) -> "torch.Tensor":
    import torch

    return torch.cat([encoder.map(name.replace(".q_proj.", f".{part}_proj.")) for part in "qkv"])


def _new(make: Callable[[], "torch.Tensor"]) -> NewTensor:
    tensor = make()
    return NewTensor(_DTYPES[str(tensor.dtype).removeprefix("torch.")], tuple(tensor.shape), make)
