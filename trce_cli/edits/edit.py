"""What edits have in common: for each weight a function from the old to the new one, and how they were made.

Edit files say which text encoders they were made for, and carry the history of how they were made.
"""

import math
import re
from base64 import b64decode
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import torch
from torch import Tensor

from trce_cli.checkpoint.checkpoint import SAMPLED
from trce_cli.checkpoint.provenance import HISTORY, history_text, parse_history
from trce_cli.errors import BadInput
from trce_cli.families.base import Family
from trce_cli.families.registry import family_of_key
from trce_cli.system.paths import real_path
from trce_cli.system.safetensors import NewTensor, SafetensorsFile, write_tensors
from trce_cli.system.whole import whole

WeightEdit = Callable[[Tensor], Tensor]

FORM, FAMILY, ENCODER = "trce_form", "trce_family", "trce_text_encoder"  # metadata
SAMPLE = "trce_text_encoder_sample"
# The dtypes of edit files by torch's names, as the format names them.
EditDType = Literal["float32", "float16"]
EDIT_DTYPES: Final[Mapping[EditDType, str]] = {"float32": "F32", "float16": "F16"}


@dataclass(frozen=True)
class Made:
    """What an edit was made for and how.

    text_encoder: `Checkpoint.text_encoder_hash()` of what it was made for. history: one provenance entry for
    each step, oldest first. sample: `Checkpoint.text_encoder_sample()` of the same; empty in files of before.
    """

    family: Family
    text_encoder: str
    history: tuple[Mapping[str, Any], ...] = ()
    sample: str = ""

    def metadata(self, form: Literal["map", "lora"]) -> dict[str, str]:
        """As it is kept in the file's metadata."""
        metadata = {"format": "pt", FORM: form, FAMILY: self.family.key, ENCODER: self.text_encoder}
        metadata |= {SAMPLE: self.sample} if self.sample else {}
        return metadata | {HISTORY: history_text(self.history)}

    @classmethod
    def read(cls, file: SafetensorsFile, form: str) -> "Made":
        """What the metadata of an edit file says; it may come from anywhere, so everything is checked."""
        metadata = file.metadata
        family = family_of_key(metadata.get(FAMILY))
        text_encoder = metadata.get(ENCODER, "")
        if metadata.get(FORM) != form or family is None or not re.fullmatch(r"[0-9a-f]{64}", text_encoder):
            raise BadInput(
                f"{file.path} does not say in its metadata which text encoder it was made for.",
                "A tool may have dropped the metadata; make the edit again.",
            )
        text = metadata.get(HISTORY, '{"schema": 1, "history": []}')
        return cls(family, text_encoder, tuple(parse_history(text, str(file.path))), metadata.get(SAMPLE, ""))


@dataclass(frozen=True, eq=False)
class LowRank:
    """W -> W + up down, of which a LoRA keeps the factors: (out, rank) and (rank, in), float32."""

    up: Tensor
    down: Tensor

    def __call__(self, weight: Tensor) -> Tensor:
        """The new weight, in the old one's dtype."""
        return weight + (self.up @ self.down).to(weight)


def same_but_for_rounding(one: str, other: str) -> bool:
    """Whether two samples are of the same text encoders, of which one has weights stored in bfloat16.

    Not all of them need be: a norm before the door, which belongs to them, lies in the denoiser's file.
    """
    try:
        left, right = (np.frombuffer(b64decode(each, validate=True), "<f2") for each in (one, other))
    except ValueError:  # no sample: it may come from anywhere
        return False
    if len(left) != len(right) or len(left) % SAMPLED:
        return False
    a, b = (torch.from_numpy(each.astype(np.float32)).reshape(-1, SAMPLED) for each in (left, right))
    same = (a == b).all(1)  # if all are, what differs was not sampled
    return not bool(same.all()) and bool((same | _rounds_to(a, b) | _rounds_to(b, a)).all())


def _rounds_to(exact: Tensor, rounded: Tensor) -> Tensor:
    """Whether `rounded` may be the bfloat16 of numbers of which `exact` are the float16, for each weight.

    Both are float32 (weights, values); bool (weights,).
    """
    step = 2**-24  # the smallest that float16 tells from 0
    slack = exact.abs() * 2**-11 + step / 2  # what float16 may have rounded off
    low, high = ((exact + end * slack).bfloat16().float() for end in (-1, 1))
    return ((low - step <= rounded) & (rounded <= high + step)).all(1)


def check_strength(strength: float) -> None:
    """BadInput unless it is finite and at least 0."""
    if not (math.isfinite(strength) and strength >= 0):
        raise BadInput(f"The strength must be finite and at least 0, not {strength:g}.")


def write_edit_file(
    path: Path,
    tensors: Mapping[str, NewTensor],
    metadata: Mapping[str, str],
    force: bool = False,
    unchanged: Callable[[], None] = lambda: None,
) -> Path:
    """Write a map or LoRA, whole or not at all; BadInput for an existing file without `force`.

    unchanged: see `whole`.
    """
    path = real_path(path)
    if path.suffix != ".safetensors":
        raise BadInput(f"The output {path} must end in .safetensors.")
    if path.exists() and not (force and path.is_file()):
        raise BadInput(
            f"The output {path} exists already.", "Choose another one, or replace it with --force."
        )
    with whole(path, force, unchanged) as task:
        write_tensors(task, tensors, metadata)
    return path
