"""LoRAs and their kin, ours and those of other tools, read as edits."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from math import sqrt
from typing import Annotated, Final

import torch
from pydantic import AliasChoices, BaseModel, Field, FiniteFloat
from torch import Tensor

from trce_cli.checkpoint.checkpoint import Checkpoint
from trce_cli.edits.edit import FORM, Made, WeightEdit, check_strength
from trce_cli.errors import BadInput
from trce_cli.families.base import Shape, Stored
from trce_cli.maths.adapters import hadamard, kronecker, low_rank, rescaled
from trce_cli.system.foreign import parse_json, read_text, validated
from trce_cli.system.safetensors import FLOATS, SafetensorsFile, all_finite

_UP, _DOWN, _MID = "lora_up.weight", "lora_down.weight", "lora_mid.weight"
_MAGNITUDE: Final = "lora_magnitude_vector"
# The parts of a layer's edit by other tools' names -> by kohya's.
_SPELT: Final = {
    "lora_A.weight": _DOWN,
    "lora_B.weight": _UP,
    "lora.down.weight": _DOWN,
    "lora.up.weight": _UP,
    "lora_magnitude_vector.weight": _MAGNITUDE,
    "lora_A.default.weight": _DOWN,  # with the name that PEFT gives an adapter which got none
    "lora_B.default.weight": _UP,
    "lora_A": _DOWN,
    "lora_B": _UP,
    "lora_linear_layer.down.weight": _DOWN,
    "lora_linear_layer.up.weight": _UP,
}
_PARTS: Final = (
    *(_UP, _DOWN, _MID, "alpha", "dora_scale", _MAGNITUDE, *_SPELT),
    *(f"hada_{name}" for name in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")),
    *(f"lokr_{name}" for name in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")),
)
# What stands before a layer's path in diffusers' files, PEFT's, ComfyUI's, and others', and before the path
# with underscores in kohya's, OneTrainer's and SimpleTuner's.
_BEFORE: Final = ("unet.", "transformer.", "base_model.model.", "diffusion_model.", "")
_BEFORE_FLAT: Final = ("lora_unet_", "lora_transformer_", "lycoris_")
# A layer's name and which part of its edit a tensor is.
_LORA: Final = re.compile(rf"([\w.-]+?)\.({'|'.join(map(re.escape, sorted(_PARTS, key=len, reverse=True)))})")
# How diffusers before 0.22 named what its attention processors held: the layers that these were of.
_PROCESSOR: Final = re.compile(r"\.processor\.(to_[qkv]|to_out)_lora\.(down|up)\.weight$")
# What the names of a text encoder's tensors begin with, and what follows a layer's name in them.
_OF_TEXT: Final = ("lora_te", "text_encoder")
_BEHIND: Final = re.compile(r"\.(lora|alpha|dora_scale|hada|lokr)")
MERGE: Final = "Merge it into the checkpoint with the tool that it comes from."
PEFT_CONFIG: Final = "lora_adapter_metadata"  # the metadata in which diffusers keeps PEFT's configuration


class _Adapter(BaseModel):
    """What PEFT's configuration says of the scale of a LoRA, or its kin."""

    alpha: Annotated[FiniteFloat, Field(ge=0)] | None = Field(
        None, validation_alias=AliasChoices("lora_alpha", "alpha")
    )
    r: Annotated[int, Field(ge=1)] | None = None
    use_rslora: bool = False
    alpha_pattern: dict[str, FiniteFloat] = {}


@dataclass(frozen=True, eq=False)
class Lora:
    """A LoRA, LoHa or LoKr, rescaled where it is a DoRA: W' from W for each layer it names; read as needed.

    made: None where another tool made it, which did not say for which text encoder. parts: by layer and part,
    by kohya's names, the tensors. scale: of a rank, None where nothing has one, where no tensor says alpha.
    text_layers: how many layers of text encoders it changes as well, which is never done here.
    """

    made: Made | None
    file: SafetensorsFile
    parts: Mapping[str, Mapping[str, str]]
    scale: Callable[[int | None], float]
    text_layers: int = 0

    @cached_property
    def layers(self) -> list[str]:
        """The names of its layers."""
        return sorted(self.parts)

    def weight_edits(self, checkpoint: Checkpoint, strength: float = 1.0) -> dict[str, WeightEdit]:
        """W -> W + s alpha / rank up down, and the like for its kin; of a DoRA, whose W' is no such sum,
        W -> W + s (W' - W). BadInput where the checkpoint has no such layer.
        """
        check_strength(strength)
        known = layers_of(checkpoint)
        edits: dict[str, WeightEdit] = {}
        for layer, parts in self.parts.items():
            if layer not in known:
                raise BadInput(f"{self.file.path} changes {layer}, which {checkpoint.name} does not have.")
            for key, stored in known[layer].items():
                if key in edits:
                    raise BadInput(f"{self.file.path} changes {key} twice: by {layer}, and by another name.")
                self._check_fits(layer, parts, stored, checkpoint.shape("denoiser", key), checkpoint.name)
                edits[key] = partial(self._edited, layer, stored, strength)
        return edits

    def _check_fits(
        self, layer: str, parts: Mapping[str, str], stored: Stored, shape: Shape, name: str
    ) -> None:
        """Raise BadInput where a layer's parts are not for the tensor that a weight of this shape lies in."""
        shape = stored.packed_shape(shape)
        blank = {part: torch.empty(self.file.tensors[at].shape, device="meta") for part, at in parts.items()}
        found = tuple(_change(blank)[0].shape)
        if found[0] != shape[0] or _columns(found) != _columns(shape):
            raise BadInput(
                f"{layer} in {self.file.path} is for weights of {' x '.join(map(str, found))}; "
                f"{name} has {' x '.join(map(str, shape))}."
            )
        for part in ("dora_scale", _MAGNITUDE):
            if part not in blank:
                continue
            by_rows = _by_rows(part, blank[part], shape)
            if blank[part].numel() != shape[0 if by_rows else 1]:
                raise BadInput(f"{parts[part]} in {self.file.path} does not fit {name}.")
            if not by_rows and stored.piece[1] > 1:
                raise BadInput(
                    f"{layer} in {self.file.path} is a DoRA with magnitudes of the columns of several "
                    "stacked weights, which are edited one by one here.",
                    MERGE,
                )

    def _edited(self, layer: str, stored: Stored, strength: float, weight: Tensor) -> Tensor:
        parts = {part: self._read(name) for part, name in self.parts[layer].items()}
        change, rank = _change(parts)
        scale = self.scale(rank)
        if rank is not None and "alpha" in parts:
            scale = float(parts["alpha"]) / rank
        weight = weight.double()
        change = scale * stored.view(change).reshape(weight.shape)
        for part in ("dora_scale", _MAGNITUDE):
            if part in parts:
                by_rows = _by_rows(part, parts[part], stored.packed_shape(tuple(weight.shape)))
                magnitude = stored.view(parts[part].flatten()) if by_rows else parts[part]
                change = rescaled(weight + change, magnitude, by_rows) - weight
        return weight + strength * change

    def _read(self, name: str) -> Tensor:
        tensor = self.file.read(name)
        if not all_finite(tensor):
            raise BadInput(f"{name} in {self.file.path} holds NaN or infinite values.")
        return tensor.double()


def layers_of(checkpoint: Checkpoint) -> dict[str, dict[str, Stored]]:
    """The layers of a denoiser by each name that trainers give them, from diffusers' paths and from those of
    single files: the weights in one, several where they are stacked, and how they lie in it.
    """
    layers: dict[str, dict[str, Stored]] = {}
    for key, stored in checkpoint.names.in_file(checkpoint.keys("denoiser")).items():
        for name, place in ((key, Stored(key)), (stored.name, stored)):
            path = name.removesuffix(".weight")
            flat = path.replace(".", "_")
            spelt = (*(start + path for start in _BEFORE), *(start + flat for start in _BEFORE_FLAT))
            for layer in spelt if path != name else ():
                layers.setdefault(layer, {})[key] = place
    return layers


def _columns(shape: tuple[int, ...]) -> int:
    columns = 1
    for count in shape[1:]:
        columns *= count
    return columns


def _by_rows(part: str, magnitude: Tensor, shape: tuple[int, ...]) -> bool:
    """Whether a DoRA's magnitudes are of the rows, as they are now everywhere; else of the columns."""
    return part == _MAGNITUDE or magnitude.ndim < 2 or magnitude.shape[0] == shape[0] != 1


def _change(parts: Mapping[str, Tensor]) -> tuple[Tensor, int | None]:
    """What a layer's parts add to its weight before it is scaled, and the rank that alpha is divided by."""
    if _UP in parts:
        return low_rank(parts[_UP], parts[_DOWN], parts.get(_MID)), len(parts[_DOWN])
    if "hada_w1_a" in parts:
        one, two = ((parts[f"hada_w{n}_a"], parts[f"hada_w{n}_b"]) for n in (1, 2))
        cores = (parts["hada_t1"], parts["hada_t2"]) if "hada_t1" in parts else None
        return hadamard(one, two, cores), len(parts["hada_w1_b"])
    (left, rank), (right, other) = (_factor(parts, number) for number in (1, 2))
    return kronecker(left, right), other or rank


def _factor(parts: Mapping[str, Tensor], number: int) -> tuple[Tensor, int | None]:
    """One factor of a LoKr, and its rank where it is a product itself."""
    name = f"lokr_w{number}"
    if name in parts:
        return parts[name], None
    a, b = parts[f"{name}_a"], parts[f"{name}_b"]
    if number == 2 and "lokr_t2" in parts:
        return torch.einsum("ijkl,ip,jr->prkl", parts["lokr_t2"], a, b), len(b)
    return a @ b, len(b)


def split(name: str) -> tuple[str, str] | None:
    """The layer of a denoiser and the part that a tensor's name says; None for no name of such a tensor."""
    name = _PROCESSOR.sub(lambda at: f".{at[1].replace('to_out', 'to_out.0')}.lora.{at[2]}.weight", name)
    if name.startswith(_OF_TEXT) or not (found := _LORA.fullmatch(name)):
        return None
    layer, part = found.groups()
    return layer, _SPELT.get(part, part)


def is_lora(file: SafetensorsFile) -> bool:
    """Whether some of a file's tensors are of layers of a denoiser, or of a text encoder."""
    return any(split(name) or (name.startswith(_OF_TEXT) and _BEHIND.search(name)) for name in file.tensors)


def open_lora(file: SafetensorsFile) -> Lora:
    """The LoRA in such a file; BadInput where its tensors do not fit, and where they are of text encoders."""
    parts: dict[str, dict[str, str]] = {}
    text = {_BEHIND.split(name)[0] for name in file.tensors if name.startswith(_OF_TEXT)}
    if text and all(name.startswith(_OF_TEXT) for name in file.tensors):
        raise BadInput(
            f"{file.path} is a LoRA of the text encoder alone ({len(text)} layers), and that is never "
            "changed here.",
            MERGE,
        )
    for name, info in file.tensors.items():
        if name.startswith(_OF_TEXT):
            continue
        if (of := split(name)) is None:
            raise BadInput(f"{file.path} is a LoRA with {name}, which cannot be applied here.", MERGE)
        layer, part = of
        parts.setdefault(layer, {})[part] = name
        if info.dtype not in FLOATS or (part == "alpha" and info.shape not in ((), (1,))):
            raise _no_factor(file, name)
    for layer, found in parts.items():
        _check_layer(file, layer, found)
    made = Made.read(file, "lora") if FORM in file.metadata else None
    scale = _scale(file) if made is None else _whole  # of ours each layer's alpha is its rank
    return Lora(made, file, parts, scale, len(text))


def _check_layer(file: SafetensorsFile, layer: str, parts: Mapping[str, str]) -> None:
    """Raise BadInput where the parts of a layer are not all there, or are of shapes that do not fit."""
    shapes = {part: file.tensors[name].shape for part, name in parts.items()}
    some = next(iter(parts.values()))
    for part, other in ((_UP, _DOWN), (_DOWN, _UP), (_MID, _UP)):
        if part in parts and other not in parts:
            raise BadInput(f"{file.path} has {parts[part]} without {layer}.{other}.")
    kinds = [_UP in parts, any(part.startswith("hada_") for part in parts)]
    kinds.append(any(part.startswith("lokr_") for part in parts))
    if sum(kinds) != 1:
        raise BadInput(f"{file.path} has {some} without factors.")
    if _UP in parts:
        up, down = shapes[_UP], shapes[_DOWN]
        fits = len(down) == len(up) in (2, 4) and set(up[2:]) <= {1}
        if not fits or not (down[0] == up[1] > 0 or (_MID in parts and min(down[0], up[1]) > 0)):
            raise _no_factor(file, parts[_UP])
    if not all(shape and all(shape) for part, shape in shapes.items() if part != "alpha"):
        raise _no_factor(file, some)
    try:
        _change({part: torch.empty(shape, device="meta") for part, shape in shapes.items()})
    except KeyError as error:
        raise BadInput(f"{file.path} has {some} without {layer}.{error.args[0]}.") from None
    except (RuntimeError, ValueError, IndexError):
        raise _no_factor(file, some) from None


def _no_factor(file: SafetensorsFile, name: str) -> BadInput:
    info = file.tensors[name]
    return BadInput(f"{name} in {file.path} is no factor of a layer: {info.dtype} {list(info.shape)}.")


def _scale(file: SafetensorsFile) -> Callable[[int | None], float]:
    """What a LoRA of a rank is multiplied by where no alpha says so: 1, or as PEFT's configuration says."""
    where, beside = f"The metadata {PEFT_CONFIG} of {file.path}", file.path.with_name("adapter_config.json")
    text = file.metadata.get(PEFT_CONFIG)
    if text is None and file.path.name == "adapter_model.safetensors" and beside.is_file():
        text, where = read_text(beside), str(beside)
    if text is None:
        return _whole
    table = parse_json(text, where)
    plain = {key.rpartition(".")[2]: value for key, value in table.items()} if isinstance(table, dict) else {}
    said = validated(_Adapter, plain, where)
    if said.alpha_pattern:
        raise BadInput(f"{where} scales some layers in another way than the rest, which is not read here.")
    if said.alpha is None:
        return _whole
    return partial(_alpha, said.alpha, said.use_rslora, said.r)


def _whole(rank: int | None) -> float:
    return 1.0


def _alpha(alpha: float, stabilised: bool, own: int | None, rank: int | None) -> float:
    count = rank or own or alpha
    return alpha / (sqrt(count) if stabilised else count)
